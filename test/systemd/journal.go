// SPDX-License-Identifier: LGPL-2.1-or-later

package systemd

import (
	"encoding/json"
	"strings"

	"virtlockd/test/host"
)

// Entry is one entry of the machine's journal: field to value. Values that are no text are left out.
type Entry map[string]string

// Journal returns the entries that match, as journalctl(1) takes them: "_PID=1", "PRIORITY=3" ...; all without.
func (m *Machine) Journal(matches ...string) []Entry {
	m.t.Helper()
	// What was sent before is written when this returns.
	if out, err := m.Run("journalctl", "--sync"); err != nil {
		m.t.Fatalf("%v\n%s", err, out)
	}
	out, err := m.Run(append([]string{"journalctl", "--quiet", "--no-pager", "--output=json", "--all"}, matches...)...)
	if err != nil {
		m.t.Fatalf("%v\n%s", err, out)
	}
	var entries []Entry
	for line := range strings.Lines(out) {
		var fields map[string]any
		if err := json.Unmarshal([]byte(line), &fields); err != nil {
			m.t.Fatalf("journalctl says %q: %v", line, err)
		}
		e := Entry{}
		for name, v := range fields {
			if text, ok := v.(string); ok {
				e[name] = text
			}
		}
		entries = append(entries, e)
	}
	return entries
}

// WaitJournal waits for an entry that matches and whose message contains text.
func (m *Machine) WaitJournal(text string, matches ...string) Entry {
	m.t.Helper()
	var found Entry
	ok := host.Eventually(func() bool {
		for _, e := range m.Journal(matches...) {
			if strings.Contains(e["MESSAGE"], text) {
				found = e
				return true
			}
		}
		return false
	})
	if !ok {
		m.t.Fatalf("the journal has no %q (%v)", text, matches)
	}
	return found
}

// ShowNotifications makes systemd write to the journal what services tell it.
func (m *Machine) ShowNotifications() {
	m.t.Helper()
	m.Systemctl("log-level", "debug")
}

// Notifications returns what the lock daemon has told systemd of its state since ShowNotifications, message by message,
// without what is different each time.
func (m *Machine) Notifications() []string {
	m.t.Helper()
	var list []string
	for _, e := range m.Journal("_PID=1") {
		_, what, ok := strings.Cut(e["MESSAGE"], Service+": Got notification message from PID ")
		if !ok {
			continue
		}
		_, what, _ = strings.Cut(what, " (")
		what, _, _ = strings.Cut(strings.TrimSuffix(what, ")"), ", MONOTONIC_USEC=")
		if !strings.HasPrefix(what, "FDSTORE") {
			list = append(list, what)
		}
	}
	return list
}
