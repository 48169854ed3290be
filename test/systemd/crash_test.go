// SPDX-License-Identifier: LGPL-2.1-or-later

package systemd

import (
	"errors"
	"strings"
	"testing"

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
	waiters map[string]*Waiter
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
	c := &crowd{m: m, writer: m.Guest(), reader: m.Guest(), idle: m.Guest(), waiters: map[string]*Waiter{}}
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
