// SPDX-License-Identifier: LGPL-2.1-or-later

package systemd

import (
	"encoding/json"
	"errors"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// leases is a lockspace's directory.
const leases = Data + "/leases"

// crowd is what must outlive every end of a daemon: guests with all kinds of locks, their connections, and who waits outside for the
// locks, which must never be free.
type crowd struct {
	m       *Machine
	writer  *Guest     // has a disk of its own, a shared one and a lease
	hand    *wire.Conn // its connection
	reader  *Guest     // has the shared disk too
	eye     *wire.Conn
	idle    *Guest // has a lease, and a restricted connection that never speaks
	mute    *wire.Conn
	admin   *wire.Conn
	waiters map[string]*host.Waiter
}

// What the crowd has.
const (
	ownDisk   = Data + "/own"
	bothDisk  = Data + "/both"
	leaseName = "1111"
	idleName  = "2222"
)

func newCrowd(m *Machine) *crowd {
	m.t.Helper()
	c := &crowd{m: m, writer: m.Guest(), reader: m.Guest(), idle: m.Guest(), waiters: map[string]*host.Waiter{}}
	c.hand, c.eye, c.mute, c.admin = c.writer.Client(), c.reader.Client(), c.idle.Client(), m.Dial("admin")
	m.WriteFile(ownDisk, "", 0o600)
	m.WriteFile(bothDisk, "", 0o600)
	if out, err := m.Run("mkdir", leases); err != nil {
		m.t.Fatalf("%v\n%s", err, out)
	}
	for what, err := range map[string]error{
		"admin":         c.admin.AdminOpen(),
		"lockspace":     c.hand.CreateLockspace(leases),
		"own disk":      c.hand.Acquire("", ownDisk, 0),
		"shared disk":   c.hand.Acquire("", bothDisk, wire.Shared),
		"shared by two": c.eye.Acquire("", bothDisk, wire.Shared),
	} {
		if err != nil {
			m.t.Fatalf("%s: %v", what, err)
		}
	}
	for name, conn := range map[string]*wire.Conn{leaseName: c.hand, idleName: c.mute} {
		if err := conn.Acquire(leases, name, wire.Autocreate); err != nil {
			m.t.Fatalf("lease %s: %v", name, err)
		}
	}
	if err := c.mute.Restrict(); err != nil {
		m.t.Fatal(err)
	}
	for _, path := range []string{ownDisk, bothDisk, leases + "/" + leaseName, leases + "/" + idleName} {
		c.waiters[path] = m.Wait(path)
	}
	return c
}

// goesOn fails the test unless everything is as it was: the same connections answer, locks were never free, nobody gets what others
// have, and who is restricted still is.
func (c *crowd) goesOn(after string) {
	c.m.t.Helper()
	for name, conn := range map[string]*wire.Conn{"writer": c.hand, "reader": c.eye, "idle": c.mute, "admin": c.admin} {
		if err := conn.Ping(); err != nil {
			c.m.t.Fatalf("after %s: connection of the %s: %v", after, name, err)
		}
	}
	for path, w := range c.waiters {
		w.Asleep()
		held(c.m, path)
	}
	if _, err := c.admin.AdminClients("virtlockd"); err != nil {
		c.m.t.Errorf("after %s: the administrator: %v", after, err)
	}
	if err := c.mute.Release(leases, idleName); !refusedBy(err) {
		c.m.t.Errorf("after %s: RELEASE_RESOURCE over a restricted connection: %v", after, err)
	}
	if pid := c.m.ReadFile("/run/virtlockd.pid"); pid != strconv.Itoa(c.m.MainPID()) {
		c.m.t.Errorf("after %s: the pid file says %q, the process is %d", after, pid, c.m.MainPID())
	}
	other := c.m.Guest()
	defer other.end()
	o := other.Client()
	defer o.Close()
	for _, r := range []struct {
		space, name string
		flags       uint32
	}{{"", ownDisk, wire.Shared}, {"", bothDisk, 0}, {leases, leaseName, 0}, {leases, idleName, wire.Autocreate}} {
		if err := o.Acquire(r.space, r.name, r.flags); !wire.IsLocked(err) {
			c.m.t.Errorf("after %s: somebody else asks for %s %s: %v", after, r.space, r.name, err)
		}
	}
	for _, g := range []*Guest{c.writer, c.reader, c.idle} {
		if !g.Alive() {
			c.m.t.Fatalf("after %s: guest %d is dead", after, g.PID())
		}
	}
}

func refusedBy(err error) bool {
	var e *wire.Error
	return errors.As(err, &e)
}

// end gives up everything, and fails the test unless nothing is left in the kernel, the lease directory and the store.
func (c *crowd) end() {
	c.m.t.Helper()
	for what, err := range map[string]error{
		"own disk": c.hand.Release("", ownDisk),
		"lease":    c.hand.Release(leases, leaseName),
		"shared":   c.hand.Release("", bothDisk),
	} {
		if err != nil {
			c.m.t.Errorf("release of the %s: %v", what, err)
		}
	}
	c.waiters[ownDisk].Wakes()
	c.waiters[leases+"/"+leaseName].Wakes()
	c.waiters[bothDisk].Asleep() // the other one still has it
	c.reader.Kill()
	c.waiters[bothDisk].Wakes()
	c.idle.Kill()
	c.waiters[leases+"/"+idleName].Wakes()
	for _, name := range []string{leaseName, idleName} {
		path := leases + "/" + name
		if !host.Eventually(func() bool { return !c.m.Exists(path) }) {
			c.m.t.Errorf("%s is left behind", path)
		}
	}
	// New ones work as ever.
	if err := c.hand.Acquire(leases, idleName, wire.Autocreate); err != nil {
		c.m.t.Errorf("acquire anew: %v", err)
	}
	if err := c.hand.Release(leases, idleName); err != nil {
		c.m.t.Errorf("release anew: %v", err)
	}
	if !c.writer.Alive() {
		c.m.t.Error("the guest died of it")
	}
}

// next does something that ends the daemon, and waits for the next process.
func (c *crowd) next(how string, do func()) {
	c.m.t.Helper()
	pid := c.m.MainPID()
	do()
	c.awaitNext(how, pid)
}

// awaitNext waits for the process after that with this id.
func (c *crowd) awaitNext(how string, pid int) {
	c.m.t.Helper()
	next := func() bool { again := c.m.MainPID(); return again != 0 && again != pid }
	if !host.Eventually(next) {
		c.m.t.Fatalf("%s: there is no process after %d", how, pid)
	}
	c.m.WaitState(Service, "active")
	serves(c.m, "lock")
	c.goesOn(how)
}

// Under the unit as it is shipped nothing that ends the process is noticed by anybody.
func TestCrash(t *testing.T) {
	t.Parallel()
	m := Boot(t, Options{Files: map[string]string{Config: "log_level = 2\n"}})
	m.Systemctl("start", Service)
	c := newCrowd(m)
	c.goesOn("the start")
	for _, how := range []string{"restart", "try-restart"} {
		c.next(how, func() { m.Systemctl(how, Service) })
	}
	c.next("kill of the whole group", func() { m.Systemctl("kill", "--signal=KILL", Service) })
	c.next("abort", func() { m.Signal("ABRT") })
	c.next("TERM without a job", func() { m.Signal("TERM") })
	for range 3 {
		c.next("one of several kills", func() { m.Signal("KILL") })
	}
	for _, how := range []string{"daemon-reload", "daemon-reexec"} {
		m.Systemctl(how)
		c.next(how+" and kill", func() { m.Signal("KILL") })
	}
	m.Systemctl("reload", Service)
	m.WaitJournal("this binary has taken over", "_SYSTEMD_UNIT="+Service)
	c.next("live upgrade and kill", func() { m.Signal("KILL") })
	c.next("restart of the socket", func() { m.Systemctl("restart", LockSocket) })
	serves(m, "admin")
	c.next("kill", func() { m.Signal("KILL") })
	c.end()
	if n := m.ShowInt(Service, "NFileDescriptorStore"); n != 1 {
		t.Errorf("%d descriptors in the store, want the vault alone", n)
	}
	complains(m)
}

// complains fails the test if the daemon says that something was lost, or went wrong otherwise.
func complains(m *Machine) {
	m.t.Helper()
	for _, e := range m.Journal("_SYSTEMD_UNIT="+Service, "PRIORITY=3", "PRIORITY=4") {
		text := e["MESSAGE"]
		for _, usual := range []string{
			"resource busy:", "operation forbidden:", // what goesOn asks for
			"recovery: this process has taken over",
		} {
			if strings.HasPrefix(text, usual) {
				text = ""
			}
		}
		if text != "" {
			m.t.Errorf("the daemon complains: %s", text)
		}
	}
}

// status is what virtlockctl says of the daemon, as far as it matters here.
type status struct {
	CrashSafe       bool   `json:"crash_safe"`
	CrashSafeReason string `json:"crash_safe_reason"`
	Recoveries      int    `json:"recoveries"`
	Locks           struct {
		CrashSafe int `json:"crash_safe"`
	} `json:"locks"`
}

func statusOf(m *Machine) (s status) {
	m.t.Helper()
	out, err := m.Run("virtlockctl", "status", "--output", "json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &s)
	}
	if err != nil {
		m.t.Fatalf("virtlockctl status: %v\n%s", err, out)
	}
	return s
}

// A binary that can't start costs nothing but time, however often it is tried: whoever asks meanwhile is answered when another one is
// there.
func TestFailedStarts(t *testing.T) {
	t.Parallel()
	const failures = 50
	m := Boot(t, Options{})
	m.Systemctl("start", Service)
	c := newCrowd(m)
	m.WriteFile(Binary, "#!/bin/sh\nexit 1\n", 0o755)
	m.Signal("KILL")
	if err := c.hand.Send(wire.Ping()); err != nil {
		t.Fatal(err)
	}
	if !host.Within(commandTime, func() bool { return m.ShowInt(Service, "NRestarts") > failures }) {
		t.Fatalf("given up after %d restarts: %s", m.ShowInt(Service, "NRestarts"), m.State(Service))
	}
	for _, w := range c.waiters {
		w.Asleep()
	}
	if _, err := c.hand.RecvWithin(20 * time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("somebody answers, or the connection has ended: %v", err)
	}
	m.CopyIn(host.Ours(t), Binary)
	if _, err := c.hand.Recv(); err != nil {
		t.Fatalf("whoever has asked meanwhile: %v", err)
	}
	c.goesOn("failed starts")
	c.end()
}

// A configuration that was made bad meanwhile keeps nobody from his locks, and what was set at run time holds.
func TestCrashWithBadConfiguration(t *testing.T) {
	t.Parallel()
	m := Boot(t, Options{Files: map[string]string{Config: "max_clients = 50\n"}})
	m.Systemctl("start", Service)
	c := newCrowd(m)
	admin := func(args ...string) string {
		t.Helper()
		out, err := m.Run(append([]string{"virt-admin", "-c", "virtlockd:///system"}, args...)...)
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return strings.Join(strings.Fields(out), " ")
	}
	shown := func() string {
		return admin("server-clients-info", "virtlockd") + "; " + admin("daemon-log-filters")
	}
	admin("server-clients-set", "virtlockd", "--max-clients", "77")
	admin("daemon-log-filters", "1:locking")
	before := shown()
	for _, want := range []string{"nclients_max : 77", "1:*locking*"} {
		if !strings.Contains(before, want) {
			t.Fatalf("virt-admin shows %q, want %q in it", before, want)
		}
	}
	m.WriteFile(Config, "max_clients = many\n", 0o644)
	c.next("kill with a bad configuration", func() { m.Signal("KILL") })
	m.WaitJournal(Config+":1", "_SYSTEMD_UNIT="+Service, "PRIORITY=3")
	if diff := cmp.Diff(before, shown()); diff != "" {
		t.Errorf("settings -before +after:\n%s", diff)
	}
	c.next("restart with a bad configuration", func() { m.Systemctl("restart", Service) })
	if diff := cmp.Diff(before, shown()); diff != "" {
		t.Errorf("settings after a restart -before +after:\n%s", diff)
	}
	// A good one that says something else is followed.
	m.WriteFile(Config, "max_clients = 60\n", 0o644)
	c.next("restart with another configuration", func() { m.Systemctl("restart", Service) })
	if after := shown(); !strings.Contains(after, "nclients_max : 60") {
		t.Errorf("settings after a restart with another configuration: %s", after)
	}
	// So it is by a process that nobody has asked to read it. What is set at run time after that holds, as long as the file stays.
	m.WriteFile(Config, "max_clients = 61\n", 0o644)
	c.next("kill with another configuration", func() { m.Signal("KILL") })
	if after := shown(); !strings.Contains(after, "nclients_max : 61") {
		t.Errorf("settings after a kill with another configuration: %s", after)
	}
	admin("server-clients-set", "virtlockd", "--max-clients", "78")
	c.next("another kill", func() { m.Signal("KILL") })
	if after := shown(); !strings.Contains(after, "nclients_max : 78") {
		t.Errorf("settings after another kill: %s", after)
	}
	c.end()
}

// Where systemd keeps nothing, the daemon says so at its start, and serves.
func TestNoStore(t *testing.T) {
	t.Parallel()
	m := Boot(t, Options{})
	m.DropIn(Service, "[Service]\nFileDescriptorStoreMax=0\n")
	m.Systemctl("start", Service)
	c := newCrowd(m)
	c.goesOn("the start")
	m.WaitJournal("locks are lost if this daemon crashes", "_SYSTEMD_UNIT="+Service, "PRIORITY=4")
	s := statusOf(m)
	if s.CrashSafe || s.Locks.CrashSafe != 0 || !strings.Contains(s.CrashSafeReason, "FileDescriptorStoreMax=") {
		t.Errorf("virtlockctl status: %+v", s)
	}
	c.end()
}

// A stop gives up everything that outlives a restart, and kills nobody.
func TestStopWithLocks(t *testing.T) {
	t.Parallel()
	m := Boot(t, Options{})
	m.Systemctl("start", Service)
	c := newCrowd(m)
	if s := statusOf(m); !s.CrashSafe || s.Locks.CrashSafe != 4 {
		t.Errorf("virtlockctl status: %+v", s)
	}
	c.next("kill", func() { m.Signal("KILL") })
	m.Systemctl("stop", Service)
	for _, w := range c.waiters {
		w.Wakes()
	}
	for _, name := range []string{leaseName, idleName} {
		if m.Exists(leases + "/" + name) {
			t.Errorf("lease %s is left", name)
		}
	}
	given := map[string]int{}
	for _, e := range m.Journal("_SYSTEMD_UNIT="+Service, "PRIORITY=4") {
		if strings.Contains(e["MESSAGE"], "lock given up") {
			for path := range c.waiters {
				given[path] += strings.Count(e["MESSAGE"], " path="+path+" ")
			}
		}
	}
	if diff := cmp.Diff(map[string]int{ownDisk: 1, bothDisk: 2, leases + "/" + leaseName: 1, leases + "/" + idleName: 1}, given); diff != "" {
		t.Errorf("lines about locks given up -want +got:\n%s", diff)
	}
	for _, g := range []*Guest{c.writer, c.reader, c.idle} {
		if !g.Alive() {
			t.Error("a guest died of the stop")
		}
	}
	if n := m.ShowInt(Service, "NFileDescriptorStore"); n != 0 {
		t.Errorf("%d descriptors are left in the store", n)
	}
	// The next start has nothing to do with it.
	m.Systemctl("start", Service)
	if s := statusOf(m); s.Recoveries != 0 || s.Locks.CrashSafe != 0 || !s.CrashSafe {
		t.Errorf("virtlockctl status after another start: %+v", s)
	}
	acquire(m, c.writer.Client(), ownDisk)
}

// Who ends while no daemon is there is found to have ended, and who only hangs up is ended, as ever.
func TestEndsWhileDead(t *testing.T) {
	t.Parallel()
	m := Boot(t, Options{})
	const gate = Data + "/gate"
	m.DropIn(Service, "[Service]\nExecStart=\nExecStart=/bin/sh -c 'until test -e "+gate+"; do sleep 0.01; done; exec "+Binary+"'\n")
	m.WriteFile(gate, "", 0o644)
	m.Systemctl("start", Service)
	c := newCrowd(m)
	pid := m.MainPID()
	if out, err := m.Run("rm", gate); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	m.Signal("KILL")
	if !host.Eventually(func() bool { return !m.Alive(pid) }) {
		t.Fatal("the daemon survives SIGKILL")
	}
	c.writer.Kill()
	c.mute.Close()
	for _, w := range c.waiters {
		w.Asleep()
	}
	m.WriteFile(gate, "", 0o644)
	for _, path := range []string{ownDisk, leases + "/" + leaseName, leases + "/" + idleName} {
		c.waiters[path].Wakes()
	}
	if !host.Eventually(func() bool { return !c.idle.Alive() }) {
		t.Error("a guest that has hung up goes on, without its lock")
	}
	for _, name := range []string{leaseName, idleName} {
		if !host.Eventually(func() bool { return !m.Exists(leases + "/" + name) }) {
			t.Errorf("lease %s is left", name)
		}
	}
	c.waiters[bothDisk].Asleep()
	if err := c.eye.Release("", bothDisk); err != nil {
		t.Error(err)
	}
	c.waiters[bothDisk].Wakes()
	if !c.reader.Alive() {
		t.Error("the guest that did nothing is dead")
	}
}
