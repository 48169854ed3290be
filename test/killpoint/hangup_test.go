// SPDX-License-Identifier: LGPL-2.1-or-later

package killpoint

import (
	"testing"

	"virtlockd/test/host"
)

// A guest that goes on after it has hung up while it holds a lock is ended, at whatever point the daemon is killed that notices it: by
// that or by the next one.
func TestHangUp(t *testing.T) {
	t.Parallel()
	s := startKept(t, local)
	pid, at := 0, 0
	for done := false; !done; at++ {
		c := s.client()
		must(t, c.Acquire("", disk, 0))
		var trace *Trace
		pid, trace = s.trace(pid)
		trace.Kill(at)
		c.Close()
		must(t, trace.Finish(s.guest.Dead))
		points := trace.Points()
		done = len(points) <= at
		if !host.Eventually(s.guest.Dead) {
			t.Fatalf("killed at the end of %v: the guest that has hung up is not ended\n%s", points, host.Shorten(s.Stderr()))
		}
		if !host.Eventually(func() bool { return s.Free(disk, true) }) {
			t.Fatalf("killed at the end of %v: the lock is held for nobody", points)
		}
		if !host.Eventually(func() bool { next := s.Kept(); return next != 0 && next != pid }) {
			t.Fatalf("there is no daemon after process %d\n%s", pid, host.Shorten(s.Stderr()))
		}
		s.guest = s.Spawn(host.ProcessOptions{})
	}
	t.Logf("%d kills", at)
	if at < 4 {
		t.Error("nothing was tested")
	}
	s.end()
}
