// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// clean makes any bytes good for a terminal: what a client has named must not move the cursor, change colours
// or write backwards.
func clean(s string) string {
	if !strings.ContainsFunc(s, unclean) && utf8.ValidString(s) {
		return s
	}
	var b strings.Builder
	for len(s) > 0 {
		r, n := utf8.DecodeRuneInString(s)
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&b, `\x%02x`, s[0])
		case unclean(r):
			q := strconv.QuoteRuneToASCII(r)
			b.WriteString(q[1 : len(q)-1])
		default:
			b.WriteString(s[:n])
		}
		s = s[n:]
	}
	return b.String()
}

// cleanJSON is clean for JSON, in which encoding/json has left some characters as they are. It stays JSON with the same values.
func cleanJSON(text []byte) []byte {
	b := make([]byte, 0, len(text))
	for _, r := range string(text) {
		switch high, low := utf16.EncodeRune(r); {
		case r == '\n' || unicode.IsPrint(r):
			b = utf8.AppendRune(b, r)
		case r > 0xffff:
			b = fmt.Appendf(b, `\u%04x\u%04x`, high, low)
		default:
			b = fmt.Appendf(b, `\u%04x`, r)
		}
	}
	return b
}

func unclean(r rune) bool { return r == '\\' || !unicode.IsPrint(r) }

// colour of a cell.
type colour string

const (
	plain  colour = ""
	bold   colour = "\x1b[1m"
	dim    colour = "\x1b[2m"
	red    colour = "\x1b[31m"
	green  colour = "\x1b[32m"
	yellow colour = "\x1b[33m"
	reset         = "\x1b[0m"
)

// paint colours a text that is clean already.
func (t *tool) paint(c colour, s string) string {
	if !t.colours || c == plain {
		return s
	}
	return string(c) + s + reset
}

// cell is a clean text in a table.
type cell struct {
	text string
	colour
}

func text(s string) cell { return cell{text: clean(s)} }

// table is written with columns as wide as their widest cell.
type table struct {
	heads []string
	rows  [][]cell
}

func (b *table) add(row ...cell) { b.rows = append(b.rows, row) }

// write writes the table. The last column is not filled up.
func (b *table) write(t *tool, w io.Writer) error {
	widths := make([]int, len(b.heads))
	head := make([]cell, len(b.heads))
	for i, h := range b.heads {
		head[i] = cell{h, bold}
		widths[i] = len(h)
	}
	for _, row := range b.rows {
		for i, c := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(c.text))
		}
	}
	var out strings.Builder
	for _, row := range append([][]cell{head}, b.rows...) {
		for i, c := range row {
			out.WriteString(t.paint(c.colour, c.text))
			if i < len(row)-1 {
				out.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c.text)+2))
			}
		}
		out.WriteByte('\n')
	}
	_, err := io.WriteString(w, out.String())
	return err
}

// age shows for how long something is so, in its two largest units.
func age(since, now time.Time) string {
	if since.IsZero() {
		return "?"
	}
	d := max(0, now.Sub(since)).Truncate(time.Second)
	days, d := d/(24*time.Hour), d%(24*time.Hour)
	hours, minutes, seconds := d/time.Hour, d/time.Minute%60, d/time.Second%60
	switch {
	case days > 0:
		return fmt.Sprintf("%dd%dh", days, hours)
	case hours > 0:
		return fmt.Sprintf("%dh%dm", hours, minutes)
	case minutes > 0:
		return fmt.Sprintf("%dm%ds", minutes, seconds)
	}
	return fmt.Sprintf("%ds", seconds)
}
