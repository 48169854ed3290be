// SPDX-License-Identifier: LGPL-2.1-or-later

package systemd

import (
	"os"
	"strconv"
	"testing"

	"github.com/google/go-cmp/cmp"

	"virtlockd/test/host"
)

// runsInstalled tells whether a process of the machine runs the binary that is installed now. While it executes another
// one, its entry in /proc may be gone for a moment.
func runsInstalled(m *Machine, pid int) bool {
	m.t.Helper()
	runs, err := os.Stat(m.Path("/proc/" + strconv.Itoa(pid) + "/exe"))
	if err != nil {
		return false
	}
	installed, err := os.Stat(m.Path(Binary))
	if err != nil {
		m.t.Fatalf("machine: %v", err)
	}
	return os.SameFile(runs, installed)
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
	before := unitFacts(m)
	goesOn := func() {
		t.Helper()
		pid := m.MainPID()
		if !host.Eventually(func() bool { return runsInstalled(m, pid) }) {
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
	goesOn()

	installed := t.TempDir()
	if err := install(host.Ours(t), host.Ctl(t), installed); err != nil {
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
	goesOn()
	m.Systemctl("reload", Service) // sends SIGUSR1 as well
	goesOn()
	m.CopyIn(host.Ours(t), Binary)
	m.Signal("USR1")
	goesOn()

	// Back, under our units.
	m.CopyIn(host.C(t), Binary)
	m.Signal("USR1")
	goesOn()
	for unit, content := range theirs {
		m.WriteFile(unitDir+unit, content, 0o644)
	}
	m.Systemctl("daemon-reload")
	goesOn()
	m.CopyIn(host.Ours(t), Binary)
	m.Systemctl("reload", Service)
	goesOn()
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
	for _, binary := range []string{host.C(t), host.Ours(t), host.C(t)} {
		m.CopyIn(binary, Binary)
		m.Signal("USR1")
		pid := m.MainPID()
		if !host.Eventually(func() bool { return runsInstalled(m, pid) }) {
			t.Fatalf("process %d does not become %s", pid, binary)
		}
		if err := c.Ping(); err != nil {
			t.Fatal(err)
		}
		held(m, disk)
		m.WaitState(Service, "active")
		if diff := cmp.Diff(before, unitFacts(m)); diff != "" {
			t.Errorf("%s: the unit -before +after:\n%s", binary, diff)
		}
	}
	if err := c.Release("", disk); err != nil {
		t.Error(err)
	}
	m.Systemctl("stop", Service)
}
