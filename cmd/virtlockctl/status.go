// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"virtlockd/internal/buildinfo"
	"virtlockd/internal/inspect"
	"virtlockd/internal/inspectclient"
)

func status(*pflag.FlagSet) func(*tool, []string) error {
	return func(t *tool, _ []string) error {
		s, err := t.status()
		if err != nil {
			return err
		}
		if t.json {
			return t.printJSON(s)
		}
		_, err = io.WriteString(t.out, strings.Join(t.statusLines(s), "\n")+"\n")
		return err
	}
}

func (t *tool) status() (s *inspect.Status, err error) {
	err = t.ask(func(c *inspectclient.Conn) error {
		s, err = c.Status()
		return err
	})
	return s, err
}

// statusLines describes a daemon.
func (t *tool) statusLines(s *inspect.Status) []string {
	var lines []string
	line := func(name, format string, v ...any) {
		lines = append(lines, fmt.Sprintf("%-14s %s", name, fmt.Sprintf(format, v...)))
	}
	line("version", "%s (%s), as libvirt %s", clean(s.Version), clean(s.Commit), clean(s.Libvirt))
	line("process", "%d, up %s since %s", s.PID, age(s.Started, s.Now), s.Started.Local().Format(time.DateTime))
	if s.Upgrades > 0 || s.Recoveries > 0 {
		line("", "%d live upgrades, %d recoveries, this binary serves for %s", s.Upgrades, s.Recoveries, age(s.Serving, s.Now))
	}
	safe := t.paint(green, "yes")
	if !s.CrashSafe {
		safe = t.paint(yellow, "no")
	}
	if s.CrashSafeReason != "" {
		safe += ": " + clean(s.CrashSafeReason)
	}
	line("crash-safe", "%s", safe)
	held := s.Locks.Exclusive + s.Locks.Shared
	line("locks", "%d held: %d exclusive, %d shared; %d crash-safe; %d lockspaces",
		held, s.Locks.Exclusive, s.Locks.Shared, s.Locks.CrashSafe, s.Lockspaces)
	for _, v := range s.Servers {
		n := fmt.Sprintf("%d of at most %d clients", v.Clients, v.MaxClients)
		if uint64(v.Clients)*10 >= uint64(v.MaxClients)*9 {
			n = t.paint(red, n)
		}
		line("server", "%s: %s", clean(v.Name), n)
	}
	if s.Files.Max > 0 {
		n := fmt.Sprintf("%d of at most %d", s.Files.Open, s.Files.Max)
		if uint64(s.Files.Open)*10 >= s.Files.Max*9 {
			n = t.paint(red, n)
		}
		line("open files", "%s", n)
	}
	line("disk calls", "%d in progress; %d worker processes, %d of them busy", s.CallCount, s.Workers.All, s.Workers.Busy)
	for _, c := range s.Calls {
		if s.Now.Sub(c.Since) < time.Second {
			continue
		}
		where := ""
		if c.Mount != "" {
			where = " on " + clean(string(c.Mount))
		}
		line("", "%s", t.paint(red, fmt.Sprintf("%s %s%s: no answer for %s", clean(c.Op), clean(string(c.Path)), where, age(c.Since, s.Now))))
	}
	line("events", "%s", countsText(s.Counts))
	if s.Unstored > 0 {
		line("not stored", "%s", t.paint(yellow, fmt.Sprintf("%d times a lock or connection could not be made crash-safe; the log says why", s.Unstored)))
	}
	if s.LogDropped > 0 {
		line("log", "%s", t.paint(yellow, fmt.Sprintf("%d messages were lost", s.LogDropped)))
	}
	return lines
}

// countsText sums up what has happened, in the order in which it is told.
func countsText(counts []inspect.Count) string {
	var parts []string
	for i := 0; i < len(counts); {
		kind, n := counts[i].Kind, uint64(0)
		for ; i < len(counts) && counts[i].Kind == kind; i++ {
			n += counts[i].N
		}
		parts = append(parts, fmt.Sprintf("%d %s", n, clean(kind)))
	}
	return strings.Join(parts, ", ")
}

func version(*pflag.FlagSet) func(*tool, []string) error {
	return func(t *tool, _ []string) error {
		_, err := fmt.Fprintf(t.out, "virtlockctl %s (%s)\n", buildinfo.Version, buildinfo.CommitName())
		return err
	}
}
