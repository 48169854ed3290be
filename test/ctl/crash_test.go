// SPDX-License-Identifier: LGPL-2.1-or-later

package ctl

import (
	"encoding/json"
	"strings"
	"syscall"
	"testing"
	"time"

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

// A crash that nobody felt is told all the same, by the first event of the next process.
func TestRecoveredEvent(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{Args: []string{"--keeper"}})
	_, c := guest(t, h, d, "alpha")
	must(t, c.Acquire("", file(h, "one"), 0))
	must(t, c.Acquire("", file(h, "two"), 0))
	f := follow(t, h, command(t, h, "events", "-k", "recovered", "--follow"))
	for n := range 2 {
		if r := want(t, h, ok, "events", "-k", "recovered"); strings.Count(r.out, "\n") != min(n, 1) {
			t.Errorf("after %d crashes: %v", n, r)
		}
		begin := time.Now()
		crash(t, h, d)
		r := want(t, h, ok, "events", "-k", "recovered", "-o", "json")
		var e inspect.Event
		must(t, json.Unmarshal([]byte(r.out), &e)) // the process has counted one
		if e.Kind != "recovered" || !strings.Contains(string(e.Text), "2 locks") || e.Time.Before(begin.Add(-time.Second)) || e.Time.After(time.Now()) {
			t.Errorf("after %d crashes: %+v", n+1, e)
		}
		if !host.Eventually(func() bool { return strings.Count(f.printed(), " recovered ") == n+1 }) {
			t.Errorf("a follower hears\n%s", f.printed())
		}
	}
	if got := value(exposition(t, want(t, h, ok, "metrics").out), "virtlockd_recoveries_total", ""); got != 2 {
		t.Errorf("virtlockd_recoveries_total is %v", got)
	}
	end(t, h, d)
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
