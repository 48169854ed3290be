// SPDX-License-Identifier: LGPL-2.1-or-later

package upgrade

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// descriptorsOf returns how many descriptors a process has, and how many lie in the fullest queue of its sockets: in a daemon's, that is
// the root of the vault.
func descriptorsOf(pid int) (n, inRoot int) {
	entries, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fdinfo", pid))
	for _, e := range entries {
		info, _ := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%s", pid, e.Name()))
		for line := range strings.Lines(string(info)) {
			if text, is := strings.CutPrefix(line, "scm_fds:"); is {
				held, _ := strconv.Atoi(strings.TrimSpace(text))
				inRoot = max(inRoot, held)
			}
		}
	}
	return len(entries), inRoot
}

// killKept kills the daemon and waits for the next one.
func (m *machine) killKept() {
	m.t.Helper()
	before := m.countLines("recovery: this process has taken over")
	host.Settled(m.t, m.pidOf())
	must(m.t, unix.Kill(m.pidOf(), unix.SIGKILL))
	eventually(m.t, "there is another daemon", func() bool {
		return m.countLines("recovery: this process has taken over") > before
	})
}

// After a peak the vault and the table of descriptors become small again, also if the daemon that has seen the peak is dead.
func TestVaultShrinks(t *testing.T) {
	t.Parallel()
	const clients, each = 400, 6
	peak := func(m *machine) {
		conns := make([]*wire.Conn, clients)
		for i := range conns {
			conns[i] = m.Client(noOne + 100 + i)
			for k := range each {
				must(m.t, conns[i].Acquire("", fmt.Sprint(host.Data, "/peak", i, "-", k), wire.Autocreate))
			}
		}
		if n, inRoot := descriptorsOf(m.pidOf()); n < clients*each || inRoot < clients*each {
			m.t.Errorf("at the peak the daemon has %d descriptors, and %d cells", n, inRoot)
		}
		for i, c := range conns {
			for k := range each {
				must(m.t, c.Release("", fmt.Sprint(host.Data, "/peak", i, "-", k)))
			}
			c.Close()
		}
	}
	for name, dies := range map[string]bool{"daemon lives": false, "daemon dies": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := startKept(t)
			locks := m.hold()
			usual, _ := descriptorsOf(m.pidOf())
			peak(m)
			if dies {
				m.killKept()
			}
			const near = 150
			small := func() bool {
				n, inRoot := descriptorsOf(m.pidOf())
				return n < usual+near && inRoot < near
			}
			if !host.Within(3*host.Patience, small) { // it waits for a while whether others come
				n, inRoot := descriptorsOf(m.pidOf())
				t.Errorf("the daemon still has %d descriptors, and %d cells", n, inRoot)
			}
			must(t, locks.conn.Ping())
			locks.check(m)
			m.killKept()
			must(t, locks.conn.Ping())
			locks.check(m)
			if n, inRoot := descriptorsOf(m.pidOf()); n >= usual+near || inRoot >= near {
				t.Errorf("the next daemon has %d descriptors, and %d cells", n, inRoot)
			}
			locks.release(m)
			if code := m.Stop(); code != 0 {
				t.Errorf("exit code %d", code)
			}
		})
	}
}
