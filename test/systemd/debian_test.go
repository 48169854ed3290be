// SPDX-License-Identifier: LGPL-2.1-or-later

package systemd

import (
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"virtlockd/test/host"
)

// isOurs tells whether a process of the machine runs our daemon and not the C one. Both have the same name.
func isOurs(m *Machine, pid int) bool {
	m.t.Helper()
	out, err := m.Run("/proc/"+strconv.Itoa(pid)+"/exe", "--version")
	if err != nil {
		m.t.Fatalf("%v\n%s", err, out)
	}
	return strings.Count(out, "\n") == 1
}

// Under Debian's unit, which is of Type=simple and knows no notification, the C daemon's binary is replaced by ours;
// the unit's own reload is the upgrade. Then our units are installed, and everything goes on under them. Then the
// same backwards.
func TestReplaceDebians(t *testing.T) {
	t.Parallel()
	m := Boot(t, Options{Debian: true})
	if kind := m.Show(Service, "Type"); kind != "simple" {
		t.Logf("the C daemon's unit is of Type=%s", kind)
	}
	m.Systemctl("start", LockSocket, AdminSocket)
	g := m.Guest()
	c := g.Client()
	acquire(m, c, disk)
	m.WaitState(Service, "active")
	if pid := m.MainPID(); isOurs(m, pid) {
		t.Fatalf("process %d is not the C daemon", pid)
	}
	before := unitFacts(m)
	goesOn := func(ours bool) {
		t.Helper()
		pid := m.MainPID()
		if !host.Eventually(func() bool { return isOurs(m, pid) == ours }) {
			t.Fatalf("process %d is still the daemon from before", pid)
		}
		if err := c.Ping(); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(before, unitFacts(m)); diff != "" {
			t.Errorf("the unit -before +after:\n%s", diff)
		}
		held(m, disk)
		serves(m, "lock")
		serves(m, "admin")
	}

	m.CopyIn(host.Ours(t), Binary)
	m.Systemctl("reload", Service) // sends SIGUSR1
	goesOn(true)

	installed := t.TempDir()
	if err := install(host.Ours(t), installed); err != nil {
		t.Fatal(err)
	}
	const unitDir = "/usr/lib/systemd/system/"
	theirs := map[string]string{}
	for _, unit := range []string{Service, LockSocket, AdminSocket} {
		theirs[unit] = m.ReadFile(unitDir + unit)
		b, err := os.ReadFile(installed + unitDir + unit)
		if err != nil {
			t.Fatal(err)
		}
		m.WriteFile(unitDir+unit, string(b), 0o644)
	}
	m.Systemctl("daemon-reload")
	goesOn(true)
	m.Systemctl("reload", Service) // sends SIGHUP
	goesOn(true)
	m.Signal("USR1")
	goesOn(true)

	// Back, under our units.
	m.CopyIn(host.C(t), Binary)
	m.Signal("USR1")
	goesOn(false)
	for unit, content := range theirs {
		m.WriteFile(unitDir+unit, content, 0o644)
	}
	m.Systemctl("daemon-reload")
	goesOn(false)
	m.CopyIn(host.Ours(t), Binary)
	m.Systemctl("reload", Service)
	goesOn(true)
	if err := c.Release("", disk); err != nil {
		t.Error(err)
	}
	if m.Locked(disk) {
		t.Error("the lock outlives its release")
	}
	if !g.Alive() {
		t.Error("the guest died of it")
	}
}

// A daemon of ours that was started by our unit goes on as the C one and comes back: systemd waits for no
// notification.
func TestBackToC(t *testing.T) {
	t.Parallel()
	m := Boot(t, Options{})
	m.Systemctl("start", Service)
	g := m.Guest()
	c := g.Client()
	acquire(m, c, disk)
	before := unitFacts(m)
	for _, to := range []struct {
		binary string
		ours   bool
	}{{host.C(t), false}, {host.Ours(t), true}, {host.C(t), false}} {
		m.CopyIn(to.binary, Binary)
		m.Signal("USR1")
		pid := m.MainPID()
		if !host.Eventually(func() bool { return isOurs(m, pid) == to.ours }) {
			t.Fatalf("process %d does not become %s", pid, to.binary)
		}
		if err := c.Ping(); err != nil {
			t.Fatal(err)
		}
		held(m, disk)
		m.WaitState(Service, "active")
		if diff := cmp.Diff(before, unitFacts(m)); diff != "" {
			t.Errorf("%s: the unit -before +after:\n%s", to.binary, diff)
		}
	}
	if err := c.Release("", disk); err != nil {
		t.Error(err)
	}
	m.Systemctl("stop", Service)
}
