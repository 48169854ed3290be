// SPDX-License-Identifier: LGPL-2.1-or-later

package libvirt_test

import (
	"testing"

	"virtlockd/test/vmhost"
)

func (m *machine) attach(g vmhost.Guest, d interface{ XML() string }) {
	m.Helper()
	if err := m.host.Attach(m.Context(), g.Name, d.XML()); err != nil {
		m.Fatal(err)
	}
}

func (m *machine) detach(g vmhost.Guest, d interface{ XML() string }) {
	m.Helper()
	if err := m.host.Detach(m.Context(), g.Name, d.XML()); err != nil {
		m.Fatal(err)
	}
}

func TestHotplug(t *testing.T) {
	each(t, bothLockspaces, func(m *machine) {
		a := m.guest("a", m.exclusive("a.qcow2", "sda"))
		m.start(a)
		m.booted(a, 1)
		b, data := m.exclusive("b.qcow2", "sdb"), m.shareable("data.raw", "sdc")
		image := m.exclusive("ro.raw", "sdd")
		image.ReadOnly = true
		m.attach(a, b)
		m.locks("one more", "a.qcow2 exclusive", "b.qcow2 exclusive")
		m.attach(a, data)
		m.locks("shareable one more", "a.qcow2 exclusive", "b.qcow2 exclusive", "data.raw shared")
		m.attach(a, image)
		m.locks("read-only one more", "a.qcow2 exclusive", "b.qcow2 exclusive", "data.raw shared")
		m.detach(a, b)
		m.locks("one less", "a.qcow2 exclusive", "data.raw shared")
		m.attach(a, b)
		m.locks("again", "a.qcow2 exclusive", "b.qcow2 exclusive", "data.raw shared")
		m.virsh("suspend", a.Name)
		m.locks("suspended")
		m.virsh("resume", a.Name)
		m.locks("resumed", "a.qcow2 exclusive", "b.qcow2 exclusive", "data.raw shared")
		m.detach(a, data)
		m.detach(a, image)
		m.locks("two less", "a.qcow2 exclusive", "b.qcow2 exclusive")

		c := m.exclusive("c.qcow2", "sde")
		release := m.outsider(c.Path, true)
		m.refused(m.host.Attach(m.Context(), a.Name, c.XML()), m.busy(c.Path))
		m.locks("refused", "a.qcow2 exclusive", "b.qcow2 exclusive", "c.qcow2 exclusive by somebody else")
		release()
		m.attach(a, c)
		m.locks("granted", "a.qcow2 exclusive", "b.qcow2 exclusive", "c.qcow2 exclusive")
		m.signal("KILL", m.pid(a))
		m.locks("killed")
	})
}

// Disks that come and go while the guest is paused.
func TestHotplugPaused(t *testing.T) {
	each(t, bothLockspaces, func(m *machine) {
		a := m.guest("a", m.exclusive("a.qcow2", "sda"))
		m.start(a)
		m.booted(a, 1)
		m.virsh("suspend", a.Name)
		b := m.exclusive("b.qcow2", "sdb")
		m.attach(a, b)
		m.locks("attached", "b.qcow2 exclusive")
		m.detach(a, b)
		m.locks("detached")
		m.virsh("resume", a.Name)
		m.locks("resumed", "a.qcow2 exclusive")
	})
}

func TestMedia(t *testing.T) {
	each(t, bothLockspaces, func(m *machine) {
		cd := m.exclusive("cd1.raw", "sdb")
		cd.Device, cd.ReadOnly = "cdrom", true
		floppy := m.exclusive("floppy1.raw", "fda")
		floppy.Device = "floppy"
		a := m.guest("a", m.exclusive("a.qcow2", "sda"), cd, floppy)
		m.start(a)
		m.booted(a, 1)
		m.locks("started", "a.qcow2 exclusive", "floppy1.raw exclusive")
		m.virsh("change-media", a.Name, "sdb", m.disk("cd2.raw"), "--live")
		m.locks("another CD", "a.qcow2 exclusive", "floppy1.raw exclusive")
		m.virsh("change-media", a.Name, "sdb", "--eject", "--live", "--force")
		m.locks("no CD", "a.qcow2 exclusive", "floppy1.raw exclusive")
		m.virsh("change-media", a.Name, "sdb", cd.Path, "--insert", "--live")
		m.locks("the first CD", "a.qcow2 exclusive", "floppy1.raw exclusive")
		m.virsh("change-media", a.Name, "fda", m.disk("floppy2.raw"), "--live")
		m.locks("another floppy", "a.qcow2 exclusive", "floppy2.raw exclusive")
		m.virsh("change-media", a.Name, "fda", "--eject", "--live", "--force")
		m.locks("no floppy", "a.qcow2 exclusive")
		m.virsh("change-media", a.Name, "fda", floppy.Path, "--insert", "--live")
		m.locks("the first floppy", "a.qcow2 exclusive", "floppy1.raw exclusive")
		release := m.outsider(m.disk("floppy3.raw"), true)
		m.virshRefused(m.busy(m.path("floppy3.raw")), "change-media", a.Name, "fda", m.path("floppy3.raw"), "--live")
		m.locks("refused", "a.qcow2 exclusive", "floppy1.raw exclusive", "floppy3.raw exclusive by somebody else")
		release()
		m.virsh("suspend", a.Name)
		m.virsh("resume", a.Name)
		m.locks("resumed", "a.qcow2 exclusive", "floppy1.raw exclusive")
	})
}
