// SPDX-License-Identifier: LGPL-2.1-or-later

package ctl

import (
	"encoding/json"
	"syscall"
	"testing"

	"virtlockd/internal/inspect"
	"virtlockd/test/host"
	"virtlockd/test/slowdisk"
	"virtlockd/test/wire"
)

// crash kills a daemon that has a keeper, and waits for the next one.
func crash(t *testing.T, h *host.Host, d *host.Daemon) {
	t.Helper()
	var before, s inspect.Status
	read(t, h, ok, &before, "status")
	host.Settled(t, before.PID)
	must(t, syscall.Kill(before.PID, syscall.SIGKILL))
	if !host.Eventually(func() bool {
		r := ctl(t, h, "status", "-o", "json")
		return r.exit == ok && json.Unmarshal([]byte(r.out), &s) == nil && s.Recoveries > before.Recoveries
	}) {
		t.Fatal("no recovery")
	}
}

// end ends a daemon that has a keeper, which would start it again if it were killed. The daemon itself is asked, not its keeper: that may be
// on its way to another binary, and a process that has just begun dies of the signal.
func end(t *testing.T, h *host.Host, d *host.Daemon) {
	t.Helper()
	var s inspect.Status
	read(t, h, ok, &s, "status")
	must(t, syscall.Kill(s.PID, syscall.SIGTERM))
	d.Wait()
}

// Two share a lock on a disk that may hang, the daemon dies, and they release it in either order.
func TestSharedRemoteAfterCrash(t *testing.T) {
	t.Parallel()
	for first := range 2 {
		h, d := start(t, host.Options{Args: []string{"--keeper"}})
		disk := slowdisk.Mount(t, h, "/tmp/slow", slowdisk.Options{Locks: true})
		disk.Fill("a")
		var both [2]*wire.Conn
		for i := range both {
			_, both[i] = guest(t, h, d, "alpha")
			must(t, both[i].Acquire("", "/tmp/slow/a", wire.Shared))
		}
		crash(t, h, d)
		must(t, both[first].Release("", "/tmp/slow/a"))
		if !disk.Locked("a") {
			t.Error("the first release gives it up")
		}
		must(t, both[1-first].Release("", "/tmp/slow/a"))
		if disk.Locked("a") {
			t.Error("it stays locked")
		}
		end(t, h, d)
	}
}
