// SPDX-License-Identifier: LGPL-2.1-or-later

package libvirt_test

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"virtlockd/test/vmhost"
)

// lockdLink is the lock daemon as the host's processes know it: a symbolic link that can be turned.
const lockdLink = "/run/lockd"

// The lock daemon is replaced under running guests, from the C one to ours and back, twice. Guests go on and keep their locks, and
// whatever is done with them works after each step.
func TestLiveUpgrade(t *testing.T) {
	t.Parallel()
	onEachKind(t, "upgrade", reference, func(m *machine) {
		m.turn(reference)
		if err := m.host.StartAll(m.Context(), lockdLink); err != nil {
			m.Fatal(err)
		}
		liveUpgrade(m)
	})
}

// turn makes lockdLink lead to a daemon.
func (m *machine) turn(d daemon) {
	m.Helper()
	link := m.host.Path(lockdLink)
	if err := os.Symlink(d.path, link+".new"); err != nil {
		m.Fatal(err)
	}
	if err := os.Rename(link+".new", link); err != nil {
		m.Fatal(err)
	}
}

// upgrade replaces the running lock daemon.
func (m *machine) upgrade(to daemon) {
	m.Helper()
	m.turn(to)
	pid, err := m.host.DaemonPID(vmhost.Lockd)
	if err != nil {
		m.Fatal(err)
	}
	m.signal("USR1", pid)
	exe := fmt.Sprintf("/proc/%d/exe", pid)
	var got string
	m.eventually("the lock daemon to be "+to.path, func() (bool, error) {
		// In the middle of an exec there is none.
		r, err := m.host.Run(m.Context(), "readlink", exe)
		got = fmt.Sprint(r.Out, err)
		return err == nil && r.Out == to.path, nil
	}, func() string { return got })
	m.daemon = to
}

// held waits until the locks are those wanted, whatever their kind: what the C daemon got from us stays what it was.
func (m *machine) held(when string, want ...string) {
	m.Helper()
	slices.Sort(want)
	var got []string
	m.eventually(when, func() (bool, error) {
		seen, err := m.observe()
		got = got[:0]
		for _, entry := range seen {
			got = append(got, strings.TrimSuffix(entry, " by somebody else"))
		}
		slices.Sort(got)
		return slices.Equal(got, want), err
	}, func() string { return fmt.Sprintf("locked %q; want %q", got, want) })
}

func liveUpgrade(m *machine) {
	data := m.shareable("data.raw", "sdb")
	a, b := m.guest("a", m.exclusive("a.qcow2", "sda"), data), m.guest("b", m.exclusive("b.qcow2", "sda"), data)
	c := m.guest("c", m.exclusive("c.qcow2", "sda"))
	for _, g := range []vmhost.Guest{a, b, c} {
		m.start(g)
		m.booted(g, 1)
	}
	m.virsh("suspend", c.Name)
	all := []string{"a.qcow2 exclusive", "b.qcow2 exclusive", "data.raw shared"}
	for i, to := range []daemon{ours, reference, ours, reference, ours, ours} {
		step := func(what string) string { return fmt.Sprintf("hop %d, to %s: %s", i+1, to.name, what) }
		before := m.pid(a)
		m.upgrade(to)
		m.held(step("as before"), all...)
		m.state(a, "running")
		m.state(b, "running")
		m.state(c, "paused")
		if m.pid(a) != before {
			m.Fatal(step("the guest was started anew"))
		}

		m.virsh("suspend", a.Name)
		m.held(step("suspended"), "b.qcow2 exclusive", "data.raw shared")
		m.virsh("resume", a.Name)
		m.held(step("resumed"), all...)
		m.virsh("resume", c.Name)
		m.held(step("one more resumed"), append(slices.Clone(all), "c.qcow2 exclusive")...)
		m.virsh("suspend", c.Name)
		m.held(step("and suspended"), all...)
		// The connection of this guest was made before the upgrade, the one that comes in its place after it.
		if i%2 == 0 {
			m.virsh("destroy", b.Name)
		} else {
			m.press(b, "P")
		}
		m.state(b, "shut off")
		m.held(step("one has ended"), "a.qcow2 exclusive", "data.raw shared")
		m.virsh("start", b.Name)
		m.held(step("and is started again"), all...)
		m.booted(b, 1)
	}
	// One that is there since before the first upgrade.
	m.signal("KILL", m.pid(a))
	m.state(a, "shut off")
	m.held("killed", "b.qcow2 exclusive", "data.raw shared")
	m.virsh("destroy", b.Name)
	m.virsh("destroy", c.Name)
	m.held("all have ended")
	log := m.host.Log(vmhost.Lockd)
	for line := range strings.Lines(log) {
		// libvirtd releases twice at times.
		if strings.Contains(line, " error : ") && !strings.Contains(line, "is not locked") {
			m.Errorf("the lock daemon says: %s", line)
		}
	}
}
