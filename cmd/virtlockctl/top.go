// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/pflag"
	"golang.org/x/term"

	"virtlockd/internal/inspect"
	"virtlockd/internal/inspectclient"
)

// Sequences of ECMA-48 and xterm.
const (
	enterScreen = "\x1b[?1049h\x1b[?25l" // another screen, no cursor
	leaveScreen = "\x1b[?25h\x1b[?1049l"
	home        = "\x1b[H"
	eraseLine   = "\x1b[K"
	eraseBelow  = "\x1b[J"
)

// keptEvents is how many events are kept for a screen.
const keptEvents = 200

func top(flags *pflag.FlagSet) func(*tool, []string) error {
	interval := flags.DurationP("interval", "i", time.Second, "how often to look")
	return func(t *tool, _ []string) error {
		if *interval < 100*time.Millisecond {
			return misuse("top: an interval of %v is too short, 100ms at least", *interval)
		}
		in, inOK := t.in.(*os.File)
		out, outOK := t.out.(*os.File)
		if !inOK || !outOK || !term.IsTerminal(int(in.Fd())) || !term.IsTerminal(int(out.Fd())) {
			return misuse("top: it needs a terminal; status and events are for scripts")
		}
		v := &view{tool: t, out: out}
		// Before the screen is gone: nobody would see why.
		if err := t.ask(v.look); err != nil {
			return err
		}
		old, err := term.MakeRaw(int(in.Fd()))
		if err != nil {
			return fmt.Errorf("cannot read single keys from the terminal: %w", err)
		}
		defer term.Restore(int(in.Fd()), old)
		if _, err := io.WriteString(out, enterScreen); err != nil {
			return err
		}
		defer io.WriteString(out, leaveScreen)
		return v.run(*interval, keys(in))
	}
}

// keys returns what is typed, byte by byte, until the terminal goes away.
func keys(in io.Reader) <-chan byte {
	typed := make(chan byte)
	go func() {
		defer close(typed)
		var b [1]byte
		for {
			if n, err := in.Read(b[:]); err != nil || n == 0 {
				return
			}
			typed <- b[0]
		}
	}()
	return typed
}

// view is what is on the screen.
type view struct {
	*tool
	out    *os.File
	status *inspect.Status
	before *inspect.Status // the one that rates count from
	after  uint64          // of the last event
	events []inspect.Event
	err    error // why the daemon did not answer; nil: it did
}

// look asks the daemon for news.
func (v *view) look(c *inspectclient.Conn) error {
	s, err := c.Status()
	if err != nil {
		return err
	}
	v.before, v.status = v.status, s
	for more := true; more; {
		e, err := c.Events(v.after)
		if err != nil {
			return err
		}
		v.after, more = e.Next, len(e.Events) > 0
		v.events = append(v.events, e.Events...)
		v.events = v.events[max(0, len(v.events)-keptEvents):]
	}
	return nil
}

const ctrlC = 3

func (v *view) run(interval time.Duration, typed <-chan byte) error {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	// A look can take long, and keys are not to wait for it. What it changes is its own until it comes back.
	ctx, stop := context.WithCancel(v.ctx)
	asker := *v.tool
	asker.ctx = ctx
	looking, looked := false, make(chan error)
	defer func() {
		if stop(); looking {
			<-looked
		}
	}()
	for {
		if !looking {
			if err := v.draw(); err != nil {
				return err
			}
		}
		select {
		case <-v.ctx.Done():
			return nil
		case key, ok := <-typed:
			if !ok || key == 'q' || key == 'Q' || key == ctrlC {
				return nil
			}
		case v.err = <-looked:
			looking = false
		case <-tick.C:
			if !looking {
				looking = true
				go func() { looked <- asker.ask(v.look) }()
			}
		}
	}
}

// draw writes the whole screen, over the old one so that nothing flickers.
func (v *view) draw() error {
	width, height, err := term.GetSize(int(v.out.Fd()))
	if err != nil || width <= 0 || height <= 0 {
		width, height = 80, 24
	}
	lines := v.lines()
	if room := height - len(lines); room > 0 {
		for _, e := range v.events[max(0, len(v.events)-room):] {
			lines = append(lines, v.eventLine(&e))
		}
	}
	var b strings.Builder
	b.WriteString(home)
	for i, line := range lines[:min(len(lines), height)] {
		if i > 0 {
			b.WriteString("\r\n")
		}
		b.WriteString(cut(line, width))
		b.WriteString(eraseLine)
	}
	b.WriteString(eraseBelow)
	_, err = io.WriteString(v.out, b.String())
	return err
}

// lines are those above the events.
func (v *view) lines() []string {
	state := v.paint(dim, "q quits")
	if v.err != nil {
		var code exit
		if !errors.As(v.err, &code) {
			state = v.paint(red, clean(v.err.Error()))
		}
	}
	lines := append([]string{v.paint(bold, "virtlockd") + "  " + state}, v.statusLines(v.status)...)
	lines = append(lines, fmt.Sprintf("%-14s %s", "per second", v.rates()))
	return append(lines, "", v.paint(bold, "Events"))
}

// rates says how often something has happened since the last look.
func (v *view) rates() string {
	if v.before == nil || !v.before.Serving.Equal(v.status.Serving) {
		return "-" // another binary counts anew
	}
	seconds := v.status.Now.Sub(v.before.Now).Seconds()
	if seconds <= 0 {
		return "-"
	}
	count := func(s *inspect.Status, kind string) (n float64) {
		for _, c := range s.Counts {
			if c.Kind == kind {
				n += float64(c.N)
			}
		}
		return n
	}
	var parts []string
	for _, kind := range []string{"acquired", "released", "refused"} {
		parts = append(parts, fmt.Sprintf("%.1f %s", (count(v.status, kind)-count(v.before, kind))/seconds, kind))
	}
	return strings.Join(parts, ", ")
}

// cut shortens a line to what fits; colours take no room.
func cut(line string, width int) string {
	n := 0
	for i := 0; i < len(line); {
		if line[i] == '\x1b' {
			end := strings.IndexByte(line[i:], 'm')
			if end < 0 {
				return line[:i]
			}
			i += end + 1
			continue
		}
		if n == width {
			return line[:i] + reset
		}
		_, size := utf8.DecodeRuneInString(line[i:])
		i += size
		n++
	}
	return line
}
