// SPDX-License-Identifier: LGPL-2.1-or-later

package libvirt_test

import (
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"virtlockd/test/vmhost"
)

// createLockspace makes the daemon know the directory of leases. libvirtd does that itself only if auto_disk_leases is on; else it is
// up to the administrator. It is the call CREATE_LOCKSPACE, to be made without registration.
func (m *machine) createLockspace(dir string) {
	m.Helper()
	c, err := net.Dial("unix", m.host.Path("/run/libvirt/virtlockd-sock"))
	if err != nil {
		m.Fatal(err)
	}
	defer c.Close()
	const program, version, createLockspace = 0xEA7BEEF, 1, 8
	padded := dir + strings.Repeat("\x00", (4-len(dir)%4)%4)
	var frame []byte
	for _, word := range []uint32{uint32(28 + 4 + len(padded)), program, version, createLockspace, 0, 0, 0, uint32(len(dir))} {
		frame = binary.BigEndian.AppendUint32(frame, word)
	}
	if _, err := c.Write(append(frame, padded...)); err != nil {
		m.Fatal(err)
	}
	reply := make([]byte, 28)
	if _, err := io.ReadFull(c, reply); err != nil {
		m.Fatal(err)
	}
	if binary.BigEndian.Uint32(reply) != 28 || binary.BigEndian.Uint32(reply[24:]) != 0 {
		m.Fatalf("CREATE_LOCKSPACE refused: % x", reply)
	}
}

// lease makes a lease in the host's lockspace. Lockspace and path together are the configured directory, as libvirt wants it.
func (m *machine) lease(name string) vmhost.Lease {
	m.Helper()
	l := vmhost.Lease{Lockspace: filepath.Base(vmhost.LeasesDir), Key: m.slug + "-" + name, Path: filepath.Dir(vmhost.LeasesDir)}
	if err := m.host.WriteFile(filepath.Join(vmhost.LeasesDir, l.Key), ""); err != nil {
		m.Fatal(err)
	}
	m.leases = append(m.leases, l.Key)
	return l
}

// Leases of the guest's own choice, with the disks left alone.
func TestLeases(t *testing.T) {
	each(t, []string{manual}, func(m *machine) {
		m.createLockspace(vmhost.LeasesDir)
		l1, l2, l3 := m.lease("1"), m.lease("2"), m.lease("3")
		held := func(leases ...vmhost.Lease) (want []string) {
			for _, l := range leases {
				want = append(want, "lease "+l.Key+" exclusive")
			}
			return want
		}
		a := m.guest("a", m.exclusive("a.qcow2", "sda"), m.shareable("data.raw", "sdb"))
		m.define(a)
		m.virshRefused("no leases specified", "start", a.Name)
		m.locks("no lease")

		a.Leases = []vmhost.Lease{l1, l2}
		m.start(a)
		m.locks("started", held(l1, l2)...)
		m.booted(a, 1)
		m.virsh("suspend", a.Name)
		m.locks("suspended")
		m.virsh("resume", a.Name)
		m.locks("resumed", held(l1, l2)...)
		m.virsh("reset", a.Name)
		m.booted(a, 2)
		m.locks("reset", held(l1, l2)...)

		b := m.guest("b", m.exclusive("b.qcow2", "sda"))
		b.Leases = []vmhost.Lease{l3, l2}
		m.define(b)
		m.virshRefused("resource busy: Lockspace resource '"+l2.Key+"' is locked", "start", b.Name)
		m.locks("second guest refused", held(l1, l2)...)
		m.attach(a, l3)
		m.locks("one more", held(l1, l2, l3)...)
		m.detach(a, l2)
		m.locks("one less", held(l1, l3)...)
		b.Leases = []vmhost.Lease{l2}
		m.start(b)
		m.locks("second guest started", held(l1, l2, l3)...)
		m.refused(m.host.Attach(m.Context(), b.Name, l3.XML()), "resource busy: Lockspace resource '"+l3.Key+"' is locked")
		m.refused(m.host.Attach(m.Context(), a.Name, m.exclusive("c.qcow2", "sdc").XML()), "no leases specified")
		m.attach(a, m.shareable("d.raw", "sdc"))
		m.locks("disks don't matter", held(l1, l2, l3)...)

		file := m.path("saved")
		m.virsh("save", a.Name, file)
		m.locks("saved", held(l2)...)
		m.virsh("restore", file)
		m.locks("restored", held(l1, l2, l3)...)
		m.signal("KILL", m.pid(a))
		m.locks("killed", held(l2)...)
		m.virsh("destroy", b.Name)
		m.locks("destroyed")
		for _, l := range []vmhost.Lease{l1, l2, l3} {
			m.run("test", "-f", filepath.Join(vmhost.LeasesDir, l.Key)) // leases are not ours to remove
		}
	})
}

// Leases that can't be had.
func TestBadLeases(t *testing.T) {
	each(t, []string{manual}, func(m *machine) {
		a := m.guest("a", m.exclusive("a.qcow2", "sda"))
		m.createLockspace(vmhost.LeasesDir)
		l := m.lease("1")
		a.Leases = []vmhost.Lease{l, {Lockspace: "files", Key: m.slug + "-none", Path: filepath.Dir(vmhost.LeasesDir)}}
		m.define(a)
		m.virshRefused("Unable to open resource "+filepath.Join(vmhost.LeasesDir, a.Leases[1].Key)+": No such file or directory", "start", a.Name)
		m.locks("no such lease")
		a.Leases[1] = vmhost.Lease{Lockspace: "else", Key: "x", Path: m.path("")}
		m.define(a)
		m.virshRefused("Lockspace for path "+m.path("else")+" does not exist", "start", a.Name)
		m.locks("no such lockspace")
	})
}

// Leases and disks together.
func TestLeasesAndDisks(t *testing.T) {
	each(t, []string{indirect}, func(m *machine) {
		a := m.guest("a", m.exclusive("a.qcow2", "sda"))
		a.Leases = []vmhost.Lease{m.lease("1")}
		all := []string{"a.qcow2 exclusive", "lease " + a.Leases[0].Key + " exclusive"}
		m.start(a)
		m.locks("started", all...)
		m.virsh("suspend", a.Name)
		m.locks("suspended")
		m.virsh("resume", a.Name)
		m.locks("resumed", all...)
		m.virsh("managedsave", a.Name)
		m.locks("saved")
		m.virsh("start", a.Name)
		m.locks("restored", all...)
		m.virsh("destroy", a.Name)
		m.locks("destroyed")
	})
}
