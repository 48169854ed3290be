// SPDX-License-Identifier: LGPL-2.1-or-later

package killpoint

import (
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
)

// breakPoller makes the daemon's next epoll_pwait fail: it asks for one event at a time, which the run-time's own poller does not.
func (t *Trace) breakPoller() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.before = func(tid, call int) {
		var regs unix.PtraceRegs
		if call == unix.SYS_EPOLL_PWAIT && unix.PtraceGetRegs(tid, &regs) == nil && regs.Rdx == 1 {
			regs.Rdi = 1 << 30 // no descriptor
			_ = unix.PtraceSetRegs(tid, &regs)
		}
	}
}

// A daemon that can't wait for its clients any more ends, and the next one takes over from it as from one that was killed.
func TestPollerFails(t *testing.T) {
	t.Parallel()
	s := startKept(t, local)
	c := s.client()
	must(t, c.Acquire("", disk, 0))
	pid, trace := s.trace(0)
	trace.breakPoller()
	next := func() bool {
		if c, err := s.TryDial("lock"); err == nil { // an event
			c.Close()
		}
		now := s.Kept()
		return now != 0 && now != pid
	}
	if !host.Eventually(next) {
		t.Fatalf("there is no daemon after process %d\n%s", pid, host.Shorten(s.Stderr()))
	}
	<-trace.ended
	must(t, trace.err)
	says(t, s.Daemon, "it can't wait for clients any more")
	must(t, s.bystand.Ping())
	must(t, c.Release("", disk))
	s.holds("after the end")
	s.end()
}
