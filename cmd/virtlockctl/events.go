// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"virtlockd/internal/inspect"
	"virtlockd/internal/inspectclient"
)

// followEvery is how often a follower asks.
const followEvery = 250 * time.Millisecond

func showEvents(flags *pflag.FlagSet) func(*tool, []string) error {
	follow := flags.BoolP("follow", "f", false, "go on until interrupted, also while the daemon is replaced")
	kinds := flags.StringSliceP("kind", "k", nil, "only these: acquired, released, refused, killed, upgraded, recovered, lost, faulty")
	after := flags.Uint64("after", 0, "only those with a greater number")
	return func(t *tool, _ []string) error {
		for _, k := range *kinds {
			if _, known := eventColours[k]; !known {
				return misuse("events: there is no kind %q, only %s", k, strings.Join(slices.Sorted(maps.Keys(eventColours)), ", "))
			}
		}
		s := &stream{tool: t, after: *after, kinds: *kinds}
		err := t.ask(s.read)
		for *follow && t.ctx.Err() == nil && (err == nil || s.gone(err)) {
			select {
			case <-t.ctx.Done():
			case <-time.After(followEvery):
				err = t.ask(s.follow)
			}
		}
		if *follow && t.ctx.Err() != nil {
			return nil // interrupted, as it is meant to be
		}
		return err
	}
}

// stream prints events in their order.
type stream struct {
	*tool
	after    uint64
	kinds    []string
	answered bool // at least once
	lost     bool // the daemon is gone, which was said
}

// gone tells whether the daemon may come back, and says once that it is waited for.
func (s *stream) gone(err error) bool {
	switch {
	case errors.Is(err, inspectclient.ErrNoDaemon):
	case !s.answered:
		return false
	// One that ends accepts and does not answer; one that begins has its socket before it answers.
	case errors.Is(err, inspectclient.ErrLost), errors.Is(err, inspectclient.ErrDenied), errors.Is(err, inspectclient.ErrBusy),
		errors.Is(err, os.ErrDeadlineExceeded):
	default:
		return false
	}
	if !s.lost {
		fmt.Fprintf(s.err, "virtlockctl: %s; waiting for it\n", clean(err.Error()))
	}
	s.lost = true
	return true
}

// follow prints what comes until the connection ends.
func (s *stream) follow(c *inspectclient.Conn) error {
	for {
		if err := s.read(c); err != nil {
			return err
		}
		s.lost = false
		select {
		case <-s.ctx.Done():
			return nil
		case <-time.After(followEvery):
		}
	}
}

// read prints all that is there.
func (s *stream) read(c *inspectclient.Conn) error {
	for {
		e, err := c.Events(s.after)
		if err != nil {
			return err
		}
		s.answered = true
		if e.Missed > 0 {
			fmt.Fprintf(s.err, "virtlockctl: %d events are forgotten already\n", e.Missed)
		}
		for i := range e.Events {
			if err := s.print(&e.Events[i]); err != nil {
				return err
			}
		}
		if s.after = e.Next; len(e.Events) == 0 {
			return nil
		}
	}
}

func (s *stream) print(e *inspect.Event) error {
	if len(s.kinds) > 0 && !slices.Contains(s.kinds, e.Kind) {
		return nil
	}
	if !s.json {
		_, err := fmt.Fprintln(s.out, s.eventLine(e))
		return err
	}
	line, err := json.Marshal(e)
	if err != nil {
		return err
	}
	return s.writeJSON(append(line, '\n'))
}

var eventColours = map[string]colour{
	"acquired": green, "released": dim, "refused": yellow, "killed": red, "upgraded": bold, "recovered": bold, "lost": red, "faulty": yellow,
}

// eventLine describes an event.
func (t *tool) eventLine(e *inspect.Event) string {
	parts := []string{
		e.Time.Local().Format("2006-01-02 15:04:05.000"),
		t.paint(eventColours[e.Kind], fmt.Sprintf("%-9s", clean(e.Kind))),
	}
	if e.Reason != "" {
		parts = append(parts, "("+clean(e.Reason)+")")
	}
	if e.Resource != "" {
		parts = append(parts, clean(string(e.Resource)))
	}
	if e.Lockspace != "" {
		parts = append(parts, "in", clean(string(e.Lockspace)))
	}
	if e.Mode != "" {
		parts = append(parts, clean(e.Mode))
	}
	if e.Owner != nil {
		parts = append(parts, "for", ownerText(e.Owner))
	}
	if e.Text != "" {
		parts = append(parts, "-", clean(string(e.Text)))
	}
	return strings.Join(parts, " ")
}

// ownerText names an owner in a sentence.
func ownerText(o *inspect.Owner) string {
	return fmt.Sprintf("%s (uuid %s, pid %d)", clean(string(o.Name)), clean(o.UUID), o.PID)
}
