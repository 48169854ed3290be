// SPDX-License-Identifier: LGPL-2.1-or-later

package libvirt_test

import (
	"strings"
	"testing"

	"virtlockd/test/vmhost"
)

// own makes a host that this test alone uses, since it does things to the daemons.
func own(t *testing.T, d daemon, kind string, opts vmhost.Options) *machine {
	t.Helper()
	h, err := vmhost.Start(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := h.StartAll(t.Context(), d.path); err != nil {
		t.Fatal(err)
	}
	test, _, _ := strings.Cut(strings.TrimPrefix(t.Name(), "Test"), "/")
	return onHost(t, h, d, kind, strings.ToLower(test))
}

func (m *machine) startDaemon(name string, argv ...string) {
	m.Helper()
	if err := m.host.StartDaemon(m.Context(), name, argv...); err != nil {
		m.Fatal(err)
	}
}

func (m *machine) stopDaemon(name, signal string) {
	m.Helper()
	if err := m.host.StopDaemon(m.Context(), name, signal); err != nil {
		m.Fatal(err)
	}
}

// libvirtd ends and comes back while guests run, and guests end while it is away.
func TestLibvirtdRestart(t *testing.T) {
	t.Parallel()
	for _, d := range daemons {
		for _, kind := range bothLockspaces {
			t.Run(d.name+"/"+kind, func(t *testing.T) {
				t.Parallel()
				m := own(t, d, kind, hostOptions("restart-"+d.name+"-"+kind, kind))
				libvirtdRestart(m)
			})
		}
	}
}

func libvirtdRestart(m *machine) {
	data := m.shareable("data.raw", "sdb")
	a, b := m.guest("a", m.exclusive("a.qcow2", "sda"), data), m.guest("b", m.exclusive("b.qcow2", "sda"), data)
	c := m.guest("c", m.exclusive("c.qcow2", "sda"))
	for _, g := range []vmhost.Guest{a, b, c} {
		m.start(g)
		m.booted(g, 1)
	}
	m.virsh("suspend", c.Name)
	all := []string{"a.qcow2 exclusive", "b.qcow2 exclusive", "data.raw shared"}
	for _, signal := range []string{"TERM", "KILL"} {
		m.stopDaemon(vmhost.Libvirtd, signal)
		m.locks("libvirtd away by "+signal, all...)
		m.startDaemon(vmhost.Libvirtd, "/usr/sbin/libvirtd")
		m.state(a, "running")
		m.state(c, "paused")
		m.locks("libvirtd back after "+signal, all...)
	}
	m.virsh("suspend", a.Name)
	m.locks("suspended", "b.qcow2 exclusive", "data.raw shared")
	m.virsh("resume", a.Name)
	m.locks("resumed", all...)
	m.attach(a, m.exclusive("d.qcow2", "sdc"))
	m.locks("one more disk", append(all, "d.qcow2 exclusive")...)

	pid := m.pid(b)
	m.press(a, "R")
	m.booted(a, 2)
	m.stopDaemon(vmhost.Libvirtd, "TERM")
	m.signal("KILL", pid)
	m.locks("a guest killed without libvirtd", "a.qcow2 exclusive", "d.qcow2 exclusive", "data.raw shared")
	m.startDaemon(vmhost.Libvirtd, "/usr/sbin/libvirtd")
	m.state(b, "shut off")
	m.virsh("start", b.Name)
	m.locks("started again", append(all, "d.qcow2 exclusive")...)
	m.virsh("resume", c.Name)
	m.locks("third one resumed", append(all, "d.qcow2 exclusive", "c.qcow2 exclusive")...)
	for _, g := range []vmhost.Guest{a, b, c} {
		m.virsh("destroy", g.Name)
	}
	m.locks("all destroyed")
	if err := checkEmpty(m.host); err != nil {
		m.Error(err)
	}
}

// The lock daemon is stopped while guests run. The C daemon kills them (docs/differences.md: W18); ours must not. Then libvirtd
// finds no daemon, and finds it again.
func TestLockDaemonStop(t *testing.T) {
	t.Parallel()
	for _, d := range daemons {
		for _, kind := range bothLockspaces {
			t.Run(d.name+"/"+kind, func(t *testing.T) {
				t.Parallel()
				m := own(t, d, kind, hostOptions("stop-"+d.name+"-"+kind, kind))
				a, b := m.guest("a", m.exclusive("a.qcow2", "sda")), m.guest("b", m.exclusive("b.qcow2", "sda"))
				m.start(a)
				m.booted(a, 1)
				pid := m.pid(a)
				m.stopDaemon(vmhost.Lockd, "TERM")
				m.locks("stopped")
				if d.name == reference.name {
					m.state(a, "shut off")
				} else {
					m.press(a, "R")
					m.booted(a, 2)
					if now := m.pid(a); now != pid {
						m.Errorf("guest's pid is %d after the daemon was stopped, was %d", now, pid)
					}
				}
				m.define(b)
				m.virshRefused("Failed to connect socket to '/run/libvirt/virtlockd-sock'", "start", b.Name)
				m.state(b, "shut off")
				m.startDaemon(vmhost.Lockd, d.path)
				// The new daemon knows no lockspace until libvirtd tells it: the C daemon's has the same gap.
				if kind == indirect {
					m.virshRefused("Lockspace for path "+vmhost.LeasesDir+" does not exist", "start", b.Name)
					m.stopDaemon(vmhost.Libvirtd, "TERM")
					m.startDaemon(vmhost.Libvirtd, "/usr/sbin/libvirtd")
				}
				m.virsh("start", b.Name)
				m.locks("started with the new daemon", "b.qcow2 exclusive")
			})
		}
	}
}
