// SPDX-License-Identifier: LGPL-2.1-or-later

package systemd

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"virtlockd/test/host"
	"virtlockd/test/vmhost"
)

// libvirt is a machine on which libvirtd runs, by the units of its package, and guests of it.
type libvirt struct {
	*Machine
	t testing.TB
}

// bootLibvirt boots a machine and starts libvirtd there, whose unit pulls in the lock daemon's socket.
func bootLibvirt(t testing.TB) libvirt {
	t.Helper()
	files := vmhost.Options{UUID: "76697274-0000-4000-8000-6c6f636b6401"}.Configuration()
	delete(files, Config) // as it was installed
	m := libvirt{Boot(t, Options{Files: files}), t}
	m.Systemctl("start", "libvirtd.service")
	t.Cleanup(func() {
		if t.Failed() {
			out, err := m.Run("tail", "-n", "40", "/var/log/libvirt/libvirtd.log")
			t.Logf("libvirtd's log (%v):\n%s", err, out)
		}
	})
	return m
}

func (m libvirt) virsh(args ...string) string {
	m.t.Helper()
	out, err := m.Run(append([]string{"virsh", "--quiet", "--connect", "qemu:///system"}, args...)...)
	if err != nil {
		m.t.Fatalf("%v\n%s", err, out)
	}
	return out
}

// create starts a guest and waits until it runs.
func (m libvirt) create(name string, disks ...vmhost.Disk) {
	m.t.Helper()
	console, definition := Data+"/"+name+".console", Data+"/"+name+".xml"
	m.WriteFile(definition, vmhost.Guest{Name: name, Disks: disks, Console: console}.XML(), 0o644)
	m.virsh("create", definition)
	booted := func() bool {
		text, err := os.ReadFile(m.Path(console))
		return err == nil && strings.Contains(string(text), "B")
	}
	if !host.Within(commandTime, booted) {
		m.t.Fatalf("guest %s does not boot", name)
	}
}

// disk makes a disk from which a guest boots.
func (m libvirt) disk(target string) vmhost.Disk {
	m.t.Helper()
	d := vmhost.Disk{Path: Data + "/" + target + ".raw", Target: target, Cache: "writeback"}
	m.WriteFile(d.Path, string(vmhost.BootDisk()), 0o600)
	return d
}

// qemu is the process id of a guest, on the machine.
func (m libvirt) qemu(name string) string {
	m.t.Helper()
	return m.ReadFile("/run/libvirt/qemu/" + name + ".pid")
}

// The lock daemon is restarted and killed, by systemctl as an administrator does it, while QEMU guests of a real libvirtd run. They go
// on, their locks are never free, and libvirtd does with them whatever it is told.
func TestLibvirt(t *testing.T) {
	t.Parallel()
	m := bootLibvirt(t)
	own, other, both := m.disk("sda"), m.disk("sdb"), m.disk("sdc")
	both.Shareable = true
	const still, busy = "still", "busy" // nothing is done with the one; the other is suspended and resumed
	m.create(still, own, both)
	m.create(busy, other, both)
	guests := map[string]string{still: m.qemu(still), busy: m.qemu(busy)}
	waiters := map[string]*host.Waiter{}
	for _, d := range []vmhost.Disk{own, other, both} {
		waiters[d.Path] = m.Wait(d.Path)
	}
	for round := range 3 {
		for _, args := range [][]string{{"restart"}, {"kill", "--signal=KILL"}} {
			how := fmt.Sprintf("%s %d", args[0], round+1)
			pid := m.MainPID()
			m.Systemctl(append(args, "virtlockd")...)
			if !host.Eventually(func() bool { again := m.MainPID(); return again != 0 && again != pid }) {
				t.Fatalf("%s: there is no process after %d", how, pid)
			}
			m.WaitState(Service, "active")
			if pid := m.MainPID(); m.Exe(pid) != Binary {
				t.Fatalf("%s: the lock daemon is %s", how, m.Exe(pid))
			}
			for name, pid := range guests {
				if now := m.qemu(name); now != pid {
					t.Fatalf("%s: guest %s is process %s, was %s", how, name, now, pid)
				}
				if state := m.virsh("domstate", name); state != "running" {
					t.Fatalf("%s: guest %s is %s", how, name, state)
				}
			}
			for _, w := range waiters {
				w.Asleep()
			}
			// Over connections of before and new ones.
			m.virsh("suspend", busy)
			waiters[other.Path].Wakes()
			waiters[both.Path].Asleep() // the other guest has it too
			m.virsh("resume", busy)
			waiters[other.Path] = m.Wait(other.Path)
		}
	}
	m.virsh("destroy", busy)
	waiters[other.Path].Wakes()
	waiters[both.Path].Asleep()
	waiters[own.Path].Asleep()
	m.virsh("destroy", still)
	waiters[own.Path].Wakes()
	waiters[both.Path].Wakes()
	// A guest may have them anew.
	m.create(busy, own, both)
	m.virsh("destroy", busy)
	for _, d := range []vmhost.Disk{own, other, both} {
		if m.Locked(d.Path) {
			t.Errorf("%s is locked for nobody", d.Path)
		}
	}
	complains(m.Machine)
}
