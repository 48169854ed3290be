// SPDX-License-Identifier: LGPL-2.1-or-later

package systemd

import (
	"os"
	"strconv"
	"testing"

	"github.com/google/go-cmp/cmp"

	"virtlockd/test/host"
	"virtlockd/test/wire"
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

	theirs := ourUnits(m)
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
	theirs()
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

// ourUnits puts our units in the place of those that are installed, and returns what puts those back. systemd is not told.
func ourUnits(m *Machine) (back func()) {
	m.t.Helper()
	installed := m.t.TempDir()
	if err := install(host.Ours(m.t), host.Ctl(m.t), installed); err != nil {
		m.t.Fatal(err)
	}
	theirs := map[string]string{}
	for _, unit := range []string{Service, LockSocket, AdminSocket} {
		path := vendorUnits + "/" + unit
		theirs[path] = m.ReadFile(path)
		b, err := os.ReadFile(installed + path)
		if err != nil {
			m.t.Fatal(err)
		}
		m.WriteFile(path, string(b), 0o644)
	}
	return func() {
		m.t.Helper()
		for path, content := range theirs {
			m.WriteFile(path, content, 0o644)
		}
	}
}

// What a package does on a host whose C daemon runs: from then on nothing of what that had is lost with the process. And when the C
// daemon comes back, nothing of ours keeps what it gives up.
func TestCrashAfterReplace(t *testing.T) {
	t.Parallel()
	m := Boot(t, Options{Debian: true})
	m.Systemctl("start", LockSocket, AdminSocket)
	g := m.Guest()
	conn := g.Client()
	acquire(m, conn, disk)
	const shared = Data + "/shared"
	m.WriteFile(shared, "", 0o600)
	sharers := map[*Guest]*wire.Conn{m.Guest(): nil, m.Guest(): nil}
	for g := range sharers {
		sharers[g] = g.Client()
		if err := sharers[g].Acquire("", shared, wire.Shared); err != nil {
			t.Fatal(err)
		}
	}
	waits, waitsForTwo := m.Wait(disk), m.Wait(shared)

	becomes := func(binary string) {
		t.Helper()
		m.CopyIn(binary, Binary)
		pid := m.MainPID()
		m.Systemctl("reload", Service) // sends SIGUSR1
		if !host.Eventually(func() bool { return runsInstalled(m, pid) }) {
			t.Fatalf("process %d does not become %s", pid, binary)
		}
		if err := conn.Ping(); err != nil {
			t.Fatal(err)
		}
	}
	back := ourUnits(m)
	m.CopyIn(host.Ctl(t), "/usr/sbin/virtlockctl")
	m.Systemctl("daemon-reload")
	becomes(host.Ours(t))
	var s status
	if !host.Eventually(func() bool { s = statusOf(m); return s.CrashSafe && s.Locks.CrashSafe == 2 }) {
		t.Fatalf("virtlockctl status: %+v", s)
	}
	for range 3 {
		pid := m.MainPID()
		m.Signal("KILL")
		if err := conn.Ping(); err != nil {
			t.Fatal(err)
		}
		if again := serves(m, "lock"); again == pid {
			t.Fatalf("process %d goes on", pid)
		}
	}
	waits.Asleep()

	becomes(host.C(t))
	waits.Asleep()
	if n := m.ShowInt(Service, "NFileDescriptorStore"); n != 0 {
		t.Errorf("%d descriptors are in the store of the C daemon", n)
	}
	if err := conn.Release("", disk); err != nil {
		t.Fatal(err)
	}
	waits.Wakes()
	for g, conn := range sharers {
		waitsForTwo.Asleep()
		g.Kill()
		conn.Close() // the C daemon looks at nothing else
	}
	waitsForTwo.Wakes()
	if !g.Alive() {
		t.Error("the guest died of it")
	}
	back()
	m.Systemctl("daemon-reload")
	m.Systemctl("restart", Service)
	acquire(m, m.Guest().Client(), disk)
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
