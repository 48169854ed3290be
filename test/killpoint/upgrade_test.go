// SPDX-License-Identifier: LGPL-2.1-or-later

package killpoint

import (
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// A daemon that is killed in the midst of a live upgrade, as the old binary or as the new one, is followed by one that has everything.
func TestUpgrade(t *testing.T) {
	t.Parallel()
	m := startManaged(t)
	c := m.client()
	must(t, c.Acquire("", disk, 0))
	m.waiters = append(m.waiters, host.Wait(t, m.Path(disk)))
	kills, at, step, before := 0, 0, 10, 0
	for done := false; !done; at += step {
		trace, err := Attach(m.PID())
		must(t, err)
		trace.Kill(at)
		ready := m.manager.Said("READY=1")
		m.Signal(syscall.SIGUSR1)
		must(t, trace.Finish(func() bool { return m.manager.Said("READY=1") > ready }))
		m.Wait()
		points := trace.Points()
		done = len(points) <= at
		if slices.Contains(points, Point{Call: unix.SYS_EXECVE}) {
			step = 100 // the new binary looks at many numbers of descriptors first
		} else {
			before++
		}
		kills++
		for _, w := range m.waiters {
			w.Asleep()
		}
		m.Daemon = m.manager.Start(quiet)
		must(t, m.bystand.Ping())
		must(t, c.Ping())
		other := m.Client(noOne)
		if err := other.Acquire("", disk, 0); !wire.IsLocked(err) {
			t.Fatalf("killed at the end of %v: the lock of somebody else: %v", points, err)
		}
		other.Close()
		if m.Exists("/run/virtlockd-restart-exec.json") {
			t.Errorf("killed at the end of %v: the state file is left", points)
		}
	}
	t.Logf("%d kills, %d of them before the new binary ran, up to point %d", kills, before, at)
	must(t, c.Release("", disk))
	m.waiters[2].Wakes()
	m.waiters = m.waiters[:2]
	m.end()
}
