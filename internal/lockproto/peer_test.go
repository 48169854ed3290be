// SPDX-License-Identifier: LGPL-2.1-or-later

package lockproto

import (
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/test/wire"
)

// Who asks while that can't be told is refused, and not taken for a stranger, whose guests' locks would never be given up.
func TestCannotTellWhoAsks(t *testing.T) {
	b := newBench(t)
	guest := exec.Command("sleep", "1000")
	b.must(guest.Start())
	defer guest.Wait()
	defer guest.Process.Kill()
	c := b.client(guest.Process.Pid)
	self := b.client(strangerPID)
	var was unix.Rlimit
	b.must(unix.Getrlimit(unix.RLIMIT_NOFILE, &was))
	next, err := unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 0)
	b.must(err)
	unix.Close(next)
	full := was
	full.Cur = uint64(next) // no number is left
	b.must(unix.Setrlimit(unix.RLIMIT_NOFILE, &full))
	acquired := c.Acquire("", b.path("disk"), wire.Autocreate)
	registered := self.Register(wire.VM(os.Getpid()))
	b.must(unix.Setrlimit(unix.RLIMIT_NOFILE, &was))
	if acquired == nil || registered == nil {
		t.Errorf("acquired: %v, registered: %v", acquired, registered)
	}
	b.must(c.Acquire("", b.path("disk"), wire.Autocreate))
	b.must(guest.Process.Kill())
	for end := time.Now().Add(20 * time.Second); b.table.Held() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the lock of a guest that has ended is held")
		}
	}
}

// Who has spoken for others is known again at his later connections, as long as he lives, and nobody is taken for him.
func TestManager(t *testing.T) {
	b := newBench(t)
	m := &b.program.manager
	now := func() (pid int32, client uint64, pidfd int) {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.pid, m.client, m.pidfd
	}
	var conns []*wire.Conn
	for range 3 {
		conns = append(conns, b.client(strangerPID))
	}
	clients := b.server.Clients()
	if m.is(clients[2]) {
		t.Error("somebody is the manager before anybody was")
	}
	b.must(conns[1].Acquire("", b.path("disk"), wire.Autocreate))
	pid, client, first := now()
	if pid != int32(os.Getpid()) || client != clients[1].ID() {
		t.Errorf("the manager is process %d by client %d", pid, client)
	}
	for i, want := range []bool{false, false, true} { // earlier connections may be of a process that had the number before
		if is := m.is(clients[i]); is != want {
			t.Errorf("client %d is the manager: %v", i, is)
		}
	}
	b.must(conns[2].Release("", b.path("disk")))
	if _, _, later := now(); later != first {
		t.Error("a later connection was asked about again")
	}

	another := manager{pid: pid + 1, pidfd: first, client: client}
	if another.is(clients[2]) {
		t.Error("another process is the manager")
	}
	dead := exec.Command("true")
	b.must(dead.Start())
	pidfd, err := unix.PidfdOpen(dead.Process.Pid, 0)
	b.must(err)
	b.must(dead.Wait())
	m.met(clients[0], pidfd)
	if m.is(clients[2]) {
		t.Error("a process that has ended is the manager")
	}
	if _, err := unix.FcntlInt(uintptr(first), unix.F_GETFD, 0); err != unix.EBADF {
		t.Errorf("the pidfd of the manager before is open: %v", err)
	}
}
