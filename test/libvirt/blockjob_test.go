// SPDX-License-Identifier: LGPL-2.1-or-later

package libvirt_test

import "testing"

func TestSnapshotAndCommit(t *testing.T) {
	each(t, bothLockspaces, func(m *machine) {
		a := m.guest("a", m.exclusive("a.qcow2", "sda"), m.exclusive("b.qcow2", "sdb"))
		m.start(a)
		m.booted(a, 1)
		for _, file := range []string{"a1.qcow2", "a2.qcow2"} {
			m.know(m.path(file))
		}
		snapshot := func(file string) {
			m.virsh("snapshot-create-as", a.Name, file, "--disk-only", "--no-metadata", "--diskspec", "sda,file="+m.path(file),
				"--diskspec", "sdb,snapshot=no")
		}
		snapshot("a1.qcow2")
		m.locks("snapshot", "a1.qcow2 exclusive", "b.qcow2 exclusive")
		snapshot("a2.qcow2")
		m.locks("second snapshot", "a2.qcow2 exclusive", "b.qcow2 exclusive")
		m.virsh("suspend", a.Name)
		m.locks("suspended")
		m.virsh("resume", a.Name)
		m.locks("resumed", "a2.qcow2 exclusive", "b.qcow2 exclusive")
		m.virsh("blockcommit", a.Name, "sda", "--active", "--pivot", "--wait")
		m.locks("committed", "a.qcow2 exclusive", "b.qcow2 exclusive")
		m.virsh("suspend", a.Name)
		m.locks("suspended again")
		m.virsh("resume", a.Name)
		m.locks("resumed again", "a.qcow2 exclusive", "b.qcow2 exclusive")
		m.virsh("destroy", a.Name)
		m.locks("destroyed")
	})
}

func TestBlockCopy(t *testing.T) {
	each(t, bothLockspaces, func(m *machine) {
		a := m.guest("a", m.exclusive("a.qcow2", "sda"))
		m.start(a)
		m.booted(a, 1)
		m.know(m.path("copy.qcow2"))
		m.virsh("blockcopy", a.Name, "sda", m.path("copy.qcow2"), "--transient-job", "--wait")
		m.locks("copied, both in use", "a.qcow2 exclusive", "copy.qcow2 exclusive")
		m.virsh("blockjob", a.Name, "sda", "--abort")
		m.locks("given up", "a.qcow2 exclusive")
		m.virsh("blockcopy", a.Name, "sda", m.path("copy.qcow2"), "--transient-job", "--wait", "--pivot", "--reuse-external")
		m.locks("pivoted", "copy.qcow2 exclusive")
		m.virsh("suspend", a.Name)
		m.locks("suspended")
		m.virsh("resume", a.Name)
		m.locks("resumed", "copy.qcow2 exclusive")
		m.virsh("destroy", a.Name)
		m.locks("destroyed")
	})
}
