// SPDX-License-Identifier: LGPL-2.1-or-later

package libvirt_test

import (
	"path/filepath"
	"testing"

	"virtlockd/test/vmhost"
)

var bothLockspaces = []string{direct, indirect}

func TestLife(t *testing.T) {
	each(t, bothLockspaces, func(m *machine) {
		system, data, image := m.exclusive("a.qcow2", "sda"), m.shareable("data.raw", "sdb"), m.exclusive("ro.raw", "sdc")
		image.ReadOnly = true
		a := m.guest("a", system, data, image)
		m.start(a)
		m.locks("started", "a.qcow2 exclusive", "data.raw shared")
		m.booted(a, 1)
		m.virsh("suspend", a.Name)
		m.locks("suspended")
		m.virsh("resume", a.Name)
		m.locks("resumed", "a.qcow2 exclusive", "data.raw shared")

		m.virsh("reset", a.Name)
		m.booted(a, 2)
		m.locks("reset from outside", "a.qcow2 exclusive", "data.raw shared")
		m.press(a, "R")
		m.booted(a, 3)
		m.locks("reset by the guest", "a.qcow2 exclusive", "data.raw shared")

		b := m.guest("b", m.exclusive("b.qcow2", "sda"), data)
		m.start(b)
		m.locks("second guest started", "a.qcow2 exclusive", "b.qcow2 exclusive", "data.raw shared")
		m.virsh("suspend", b.Name)
		m.locks("second guest suspended", "a.qcow2 exclusive", "data.raw shared")
		m.virsh("resume", b.Name)
		m.virsh("destroy", a.Name)
		m.locks("first guest destroyed", "b.qcow2 exclusive", "data.raw shared")
		m.booted(b, 1)
		m.press(b, "P")
		m.state(b, "shut off")
		m.locks("second guest switched itself off")
	})
}

// A reboot that libvirt does itself, by the power button and a reset, ends the guest: libvirtd 9.0.0 asks for the locks again that
// it hasn't given up.
func TestReboot(t *testing.T) {
	each(t, bothLockspaces, func(m *machine) {
		a := m.guest("a", m.exclusive("a.qcow2", "sda"))
		m.start(a)
		m.booted(a, 1)
		m.virsh("reboot", a.Name)
		m.state(a, "shut off")
		m.locks("rebooted")

		m.virsh("start", a.Name)
		m.booted(a, 1)
		m.virsh("shutdown", a.Name)
		m.state(a, "shut off")
		m.locks("shut down")

		a.OnReboot = "destroy"
		m.start(a)
		m.locks("started", "a.qcow2 exclusive")
		m.booted(a, 1)
		m.press(a, "R")
		m.state(a, "shut off")
		m.locks("rebooted with on_reboot=destroy")
	})
}

func TestKill(t *testing.T) {
	each(t, bothLockspaces, func(m *machine) {
		data := m.shareable("data.raw", "sdb")
		a, b := m.guest("a", m.exclusive("a.qcow2", "sda"), data), m.guest("b", m.exclusive("b.qcow2", "sda"), data)
		m.start(a)
		m.start(b)
		m.locks("started", "a.qcow2 exclusive", "b.qcow2 exclusive", "data.raw shared")
		m.signal("KILL", m.pid(a))
		m.locks("one of two killed", "b.qcow2 exclusive", "data.raw shared")
		m.state(a, "shut off")
		m.virsh("start", a.Name)
		m.locks("started again", "a.qcow2 exclusive", "b.qcow2 exclusive", "data.raw shared")
		m.signal("KILL", m.pid(b))
		m.signal("KILL", m.pid(a))
		m.locks("both killed")
	})
}

func TestSaveRestore(t *testing.T) {
	each(t, bothLockspaces, func(m *machine) {
		a := m.guest("a", m.exclusive("a.qcow2", "sda"), m.shareable("data.raw", "sdb"))
		all := []string{"a.qcow2 exclusive", "data.raw shared"}
		m.start(a)
		m.booted(a, 1)
		file := m.path("saved")
		m.virsh("save", a.Name, file)
		m.state(a, "shut off")
		m.locks("saved")
		m.virsh("restore", file)
		m.locks("restored", all...)
		m.virsh("save", a.Name, file, "--paused")
		m.locks("saved again")
		m.virsh("restore", file)
		m.state(a, "paused")
		m.locks("restored to be paused")
		m.virsh("resume", a.Name)
		m.locks("resumed", all...)

		m.virsh("managedsave", a.Name)
		m.state(a, "shut off")
		m.locks("managed save")
		m.virsh("start", a.Name)
		m.locks("started from managed save", all...)
		m.press(a, "R")
		m.booted(a, 1)
		m.virsh("suspend", a.Name)
		m.virsh("managedsave", a.Name)
		m.locks("managed save of a paused guest")
		m.virsh("start", a.Name)
		m.state(a, "paused")
		m.locks("started from it")
		m.virsh("resume", a.Name)
		m.locks("resumed from it", all...)
	})
}

// Other things that stop and start a guest's CPUs.
func TestPause(t *testing.T) {
	each(t, bothLockspaces, func(m *machine) {
		a := m.guest("a", m.exclusive("a.qcow2", "sda"))
		m.define(a)
		m.virsh("start", "--paused", a.Name)
		m.locks("started paused")
		m.virsh("resume", a.Name)
		m.locks("resumed", "a.qcow2 exclusive")
		m.booted(a, 1)
		m.virsh("dump", "--memory-only", a.Name, m.path("dump"))
		m.state(a, "running")
		m.locks("dumped", "a.qcow2 exclusive")
		m.virsh("snapshot-create-as", a.Name, "s1")
		m.state(a, "running")
		m.locks("internal snapshot", "a.qcow2 exclusive")
		m.virsh("snapshot-revert", a.Name, "s1")
		m.state(a, "running")
		m.locks("reverted", "a.qcow2 exclusive")
		m.virsh("snapshot-revert", a.Name, "s1", "--paused")
		m.state(a, "paused")
		m.locks("reverted to be paused")
		m.virsh("destroy", a.Name)
		m.locks("destroyed while paused")
	})
}

func TestTransient(t *testing.T) {
	each(t, bothLockspaces, func(m *machine) {
		a := m.guest("a", m.exclusive("a.qcow2", "sda"))
		for _, end := range []func(){
			func() { m.virsh("destroy", a.Name) },
			func() { m.press(a, "P") },
			func() { m.signal("KILL", m.pid(a)) },
		} {
			if err := m.host.Create(m.Context(), a); err != nil {
				m.Fatal(err)
			}
			m.locks("created", "a.qcow2 exclusive")
			m.booted(a, 1)
			end()
			m.state(a, "none")
			m.locks("ended")
		}
	})
}

// A disk that is a block device, like most in production.
func TestBlockDevice(t *testing.T) {
	each(t, bothLockspaces, func(m *machine) {
		disk, data := "/dev/"+m.daemon.name+"-disk", "/dev/"+m.daemon.name+"-data"
		m.device(m.loop("disk.raw"), disk)
		m.device(m.loop("data.raw"), data)
		diskHeld, dataHeld := filepath.Base(disk)+" exclusive", filepath.Base(data)+" shared"
		shared := vmhost.Disk{Path: data, Target: "sdb", Shareable: true}
		a := m.guest("a", vmhost.Disk{Path: disk, Target: "sda"}, shared)
		b := m.guest("b", m.exclusive("b.raw", "sda"), shared)
		m.start(a)
		m.start(b)
		m.locks("started", diskHeld, dataHeld, "b.raw exclusive")
		m.booted(a, 1)
		m.virsh("suspend", a.Name)
		m.locks("suspended", dataHeld, "b.raw exclusive")
		release := m.outsider(disk, true)
		m.virshRefused(m.busy(disk), "resume", a.Name)
		release()
		m.virsh("resume", a.Name)
		m.locks("resumed", diskHeld, dataHeld, "b.raw exclusive")
		m.signal("KILL", m.pid(a))
		m.locks("killed", dataHeld, "b.raw exclusive")
		m.virsh("destroy", b.Name)
		m.locks("destroyed")
	})
}
