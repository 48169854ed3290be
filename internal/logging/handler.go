// SPDX-License-Identifier: LGPL-2.1-or-later

package logging

import (
	"context"
	"encoding"
	"fmt"
	"log/slog"
	"path"
	"runtime"
	"slices"
	"strconv"
	"time"
	"unicode/utf8"
)

// Bounds of a record's text, in bytes. Names of owners and locks come from clients and may be megabytes long; a path has
// at most 4,095 bytes. Escaping makes at most four bytes of one.
const (
	maxMessage = 16 << 10
	maxValue   = 4 << 10
	maxText    = 48 << 10
)

// handler is the slog.Handler of a logger.
type handler struct {
	logs     *Logs
	category *category
	numbers  numbers // of WithAttrs
	attrs    []byte  // of WithAttrs as text, a blank before each
	group    string  // of WithGroup, with a dot behind each
}

// Enabled reports whether any output wants messages of that level from the logger's category.
func (h *handler) Enabled(_ context.Context, level slog.Level) bool {
	return int64(level) >= h.category.min.Load()
}

// Handle formats the record and queues it for the outputs. It never blocks and returns nil.
func (h *handler) Handle(_ context.Context, sr slog.Record) error {
	r := record{time: sr.Time, level: levelOf(sr.Level), category: h.category.name, numbers: h.numbers}
	if sr.PC != 0 {
		frame, _ := runtime.CallersFrames([]uintptr{sr.PC}).Next()
		r.function, r.file, r.line = path.Base(frame.Function), frame.File, frame.Line
	}
	text := appendEscaped(make([]byte, 0, 256), sr.Message, maxMessage)
	message := len(text)
	text = append(text, h.attrs...)
	sr.Attrs(func(a slog.Attr) bool {
		text = r.numbers.appendAttr(text, h.group, a)
		return true
	})
	if len(text) > message {
		text = slices.Insert(text, message, ':')
	}
	r.text = string(cut(text, maxText))
	h.logs.route(&r)
	return nil
}

// WithAttrs returns a handler that adds attrs to each record.
func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	h2 := *h
	h2.attrs = slices.Clip(h.attrs)
	for _, a := range attrs {
		if a.Key == Category && h.group == "" {
			h2.category = h.logs.category(a.Value.Resolve().String())
			continue
		}
		h2.attrs = cut(h2.numbers.appendAttr(h2.attrs, h.group, a), maxText)
	}
	return &h2
}

// WithGroup returns a handler that puts name and a dot before the keys of later attributes.
func (h *handler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	h2 := *h
	h2.group += name + "."
	return &h2
}

// numbers are libvirt's for an error.
type numbers struct {
	domain, code       int64
	hasDomain, hasCode bool
}

// appendAttr appends a blank and key=value, for each attribute if a is a group. Libvirt's numbers go into n instead.
func (n *numbers) appendAttr(b []byte, group string, a slog.Attr) []byte {
	v := a.Value.Resolve()
	if a.Key == "" && v.Equal(slog.Value{}) {
		return b
	}
	if v.Kind() == slog.KindGroup {
		if a.Key != "" {
			group += a.Key + "."
		}
		for _, a := range v.Group() {
			b = n.appendAttr(b, group, a)
		}
		return b
	}
	if group == "" && v.Kind() == slog.KindInt64 {
		switch a.Key {
		case ErrorDomain:
			n.domain, n.hasDomain = v.Int64(), true
			return b
		case ErrorCode:
			n.code, n.hasCode = v.Int64(), true
			return b
		}
	}
	b = append(b, ' ')
	b = appendQuoted(b, group+a.Key)
	b = append(b, '=')
	return appendQuoted(b, valueText(v))
}

// valueText renders a value. A method of the value that panics must not take the daemon with it.
func valueText(v slog.Value) (s string) {
	defer func() {
		if p := recover(); p != nil {
			s = fmt.Sprintf("!PANIC: %v", p)
		}
	}()
	switch v.Kind() {
	case slog.KindTime:
		return v.Time().UTC().Format("2006-01-02T15:04:05.000Z07:00")
	case slog.KindAny:
		switch x := v.Any().(type) {
		case error:
			return x.Error()
		case fmt.Stringer:
			return x.String()
		case encoding.TextMarshaler:
			if text, err := x.MarshalText(); err == nil {
				return string(text)
			}
		case []byte:
			return string(x)
		}
	}
	return v.String()
}

// appendQuoted appends s as it is or quoted.
func appendQuoted(b []byte, s string) []byte {
	more := 0
	if len(s) > maxValue {
		more = len(s) - maxValue
		s = s[:maxValue]
	}
	if plain(s) {
		b = append(b, s...)
	} else {
		b = strconv.AppendQuote(b, s)
	}
	return appendMore(b, more)
}

// plain reports whether s can stand without quotation marks.
func plain(s string) bool {
	for _, c := range s {
		if c == ' ' || c == '"' || c == '=' || c == utf8.RuneError || !strconv.IsPrint(c) {
			return false
		}
	}
	return s != ""
}

// appendEscaped appends at most limit bytes of s, with escapes for all that isn't printable.
func appendEscaped(b []byte, s string, limit int) []byte {
	more := 0
	if len(s) > limit {
		more = len(s) - limit
		s = s[:limit]
	}
	for len(s) > 0 {
		c, n := utf8.DecodeRuneInString(s)
		if strconv.IsPrint(c) && !(c == utf8.RuneError && n == 1) {
			b = append(b, s[:n]...)
		} else {
			quoted := strconv.Quote(s[:n])
			b = append(b, quoted[1:len(quoted)-1]...)
		}
		s = s[n:]
	}
	return appendMore(b, more)
}

// appendMore says that n bytes were left out.
func appendMore(b []byte, n int) []byte {
	if n == 0 {
		return b
	}
	return fmt.Appendf(b, "...(%d more bytes)", n)
}

// cut shortens printable text to limit and a few bytes.
func cut(b []byte, limit int) []byte {
	if len(b) <= limit {
		return b
	}
	end := limit
	for !utf8.RuneStart(b[end]) {
		end--
	}
	return appendMore(b[:end:end], len(b)-end)
}

// record is a message on its way to the outputs; never changed after it was queued.
type record struct {
	time           time.Time // zero: a line has none
	level          Level
	text           string // one line, printable
	category       string
	function, file string // of the caller, "" if unknown
	line           int
	numbers

	mark chan struct{} // instead of all the above: to be closed when it is this entry's turn
}

// recordOverhead is about the memory of a record beside its text.
const recordOverhead = 256

// appendLine appends what follows the time in a line, with the line end.
func (r *record) appendLine(b []byte, pid int) []byte {
	b = strconv.AppendInt(b, int64(pid), 10)
	b = append(b, ": "...)
	b = append(b, r.level.String()...)
	b = append(b, " : "...)
	if r.function != "" {
		b = append(b, r.function...)
		b = append(b, ':')
		b = strconv.AppendInt(b, int64(r.line), 10)
		b = append(b, " : "...)
	}
	b = append(b, r.text...)
	return append(b, '\n')
}
