// SPDX-License-Identifier: LGPL-2.1-or-later

package libvirt_test

import "testing"

// Somebody else has the lock of a disk that a guest wants to start with.
func TestStartRefused(t *testing.T) {
	each(t, bothLockspaces, func(m *machine) {
		first, second := m.exclusive("a.qcow2", "sda"), m.exclusive("b.qcow2", "sdb")
		data := m.shareable("data.raw", "sdc")
		a := m.guest("a", first, second, data)
		m.define(a)
		release := m.outsider(second.Path, true)
		m.virshRefused(m.busy(second.Path), "start", a.Name)
		m.state(a, "shut off")
		m.locks("refused", "b.qcow2 exclusive by somebody else")
		release()
		release = m.outsider(second.Path, false)
		m.virshRefused(m.busy(second.Path), "start", a.Name)
		m.locks("refused, too, while somebody else shares", "b.qcow2 shared by somebody else")
		release()
		release = m.outsider(data.Path, true)
		m.virshRefused(m.busy(data.Path), "start", a.Name)
		m.locks("refused because of the shareable disk", "data.raw exclusive by somebody else")
		release()
		m.outsider(data.Path, false)
		m.virsh("start", a.Name)
		m.locks("started", "a.qcow2 exclusive", "b.qcow2 exclusive", "data.raw shared", "data.raw shared by somebody else")
	})
}

// Somebody else takes the lock of a disk whose guest is paused.
func TestResumeRefused(t *testing.T) {
	each(t, bothLockspaces, func(m *machine) {
		disk := m.exclusive("a.qcow2", "sda")
		a := m.guest("a", disk, m.shareable("data.raw", "sdb"))
		m.start(a)
		m.booted(a, 1)
		m.virsh("suspend", a.Name)
		release := m.outsider(disk.Path, true)
		m.virshRefused(m.busy(disk.Path), "resume", a.Name)
		m.state(a, "paused")
		m.locks("refused", "a.qcow2 exclusive by somebody else")
		release()
		m.virsh("resume", a.Name)
		m.locks("resumed", "a.qcow2 exclusive", "data.raw shared")
	})
}

// What on_lockfailure says.
func TestOnLockFailure(t *testing.T) {
	each(t, bothLockspaces, func(m *machine) {
		disk := m.exclusive("a.qcow2", "sda")
		for _, action := range []string{"poweroff", "restart", "pause", "ignore"} {
			a := m.guest(action, disk)
			a.OnLockFailure = action
			m.define(a)
			release := m.outsider(disk.Path, true)
			m.virshRefused(m.busy(disk.Path), "start", a.Name)
			m.state(a, "shut off")
			m.locks(action+": start refused", "a.qcow2 exclusive by somebody else")
			release()
			m.virsh("start", a.Name)
			m.locks(action+": started", "a.qcow2 exclusive")
			m.virsh("suspend", a.Name)
			release = m.outsider(disk.Path, true)
			m.virshRefused(m.busy(disk.Path), "resume", a.Name)
			m.state(a, "paused")
			m.locks(action+": resume refused", "a.qcow2 exclusive by somebody else")
			m.virsh("destroy", a.Name)
			release()
			m.locks(action + ": destroyed")
		}
	})
}
