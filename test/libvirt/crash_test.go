// SPDX-License-Identifier: LGPL-2.1-or-later

package libvirt_test

import (
	"fmt"
	"path/filepath"
	"slices"
	"testing"

	"virtlockd/test/host"
	"virtlockd/test/vmhost"
)

// The lock daemon, which its keeper starts again, dies again and again while guests run. They go on and keep their locks, and whatever
// is done with them works afterwards, over the connections from before.
func TestLockDaemonDies(t *testing.T) {
	t.Parallel()
	onEachKind(t, "dies", ours, func(m *machine) {
		m.run(ours.path, "-d")
		m.startDaemon(vmhost.Libvirtd, "/usr/sbin/libvirtd")
		lockDaemonDies(m)
	})
}

// lockOf is the file, as the test sees it, whose lock is a disk's.
func (m *machine) lockOf(d vmhost.Disk) string {
	if m.kind == direct {
		return m.host.Path(d.Path)
	}
	return m.host.Path(filepath.Join(vmhost.LeasesDir, vmhost.LeaseName(d.Path)))
}

// die ends the lock daemon by a signal and waits for the next process.
func (m *machine) die(signal string) {
	m.Helper()
	pid, err := m.host.DaemonPID(vmhost.Lockd)
	if err != nil {
		m.Fatal(err)
	}
	m.signal(signal, pid)
	var got string
	m.eventually("another lock daemon", func() (bool, error) {
		now, err := m.host.DaemonPID(vmhost.Lockd)
		got = fmt.Sprint(now, err)
		return err == nil && now != pid, nil
	}, func() string { return got })
}

func lockDaemonDies(m *machine) {
	data := m.shareable("data.raw", "sdb")
	disk := m.exclusive("b.qcow2", "sda")
	a, b := m.guest("a", m.exclusive("a.qcow2", "sda"), data), m.guest("b", disk, data)
	c := m.guest("c", m.exclusive("c.qcow2", "sda"))
	for _, g := range []vmhost.Guest{a, b, c} {
		m.start(g)
		m.booted(g, 1)
	}
	m.virsh("suspend", c.Name)
	all := []string{"a.qcow2 exclusive", "b.qcow2 exclusive", "data.raw shared"}
	shared := host.Wait(m.T, m.lockOf(data))
	for i, signal := range []string{"KILL", "ABRT", "KILL"} {
		step := func(what string) string { return fmt.Sprintf("end %d, by %s: %s", i+1, signal, what) }
		before, own := m.pid(a), host.Wait(m.T, m.lockOf(disk))
		m.die(signal)
		m.locks(step("as before"), all...)
		own.Asleep()
		m.state(a, "running")
		m.state(b, "running")
		m.state(c, "paused")
		if m.pid(a) != before {
			m.Fatal(step("the guest was started anew"))
		}

		m.virsh("suspend", a.Name)
		m.locks(step("suspended"), "b.qcow2 exclusive", "data.raw shared")
		m.virsh("resume", a.Name)
		m.locks(step("resumed"), all...)
		m.virsh("resume", c.Name)
		m.locks(step("one more resumed"), append(slices.Clone(all), "c.qcow2 exclusive")...)
		m.virsh("suspend", c.Name)
		m.locks(step("and suspended"), all...)
		own.Asleep()
		// The connection of this guest was made before the daemon died, the one that comes in its place after it.
		if i%2 == 0 {
			m.virsh("destroy", b.Name)
		} else {
			m.press(b, "P")
		}
		m.state(b, "shut off")
		own.Wakes()
		m.locks(step("one has ended"), "a.qcow2 exclusive", "data.raw shared")
		m.virsh("start", b.Name)
		m.locks(step("and is started again"), all...)
		m.booted(b, 1)
	}
	// One that is there since before the first end of the daemon ends while there is none.
	pid, err := m.host.DaemonPID(vmhost.Lockd)
	if err != nil {
		m.Fatal(err)
	}
	guest := m.pid(a)
	m.signal("KILL", pid)
	m.signal("KILL", guest)
	m.state(a, "shut off")
	m.locks("killed together with the daemon", "b.qcow2 exclusive", "data.raw shared")
	shared.Asleep()
	m.virsh("destroy", b.Name)
	m.virsh("destroy", c.Name)
	shared.Wakes()
	m.locks("all have ended")
	if err := checkEmpty(m.host); err != nil {
		m.Error(err)
	}
}
