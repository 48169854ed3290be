// SPDX-License-Identifier: LGPL-2.1-or-later

package ctl

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"virtlockd/internal/inspect"
	"virtlockd/test/host"
	"virtlockd/test/slowdisk"
	"virtlockd/test/wire"
)

// stopped tells whether a process is.
func stopped(p *host.Process) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.PID()))
	return err == nil && strings.Contains(string(stat), ") T ")
}

// lose starts a daemon, has a guest acquire many locks and takes their files away. The daemon looks at one of them soon.
func lose(t *testing.T, action string) (*host.Host, *host.Process) {
	t.Helper()
	h, d := start(t, host.Options{Config: "lock_lost_action = \"" + action + "\"\n"})
	p, c := guest(t, h, d, "alpha")
	for i := range 600 {
		disk := file(h, fmt.Sprint(i))
		must(t, c.Acquire("", disk, 0))
		must(t, os.Remove(h.Path(disk)))
	}
	upgrade(t, h, d) // it looks at everything anew
	return h, p
}

func TestLockLostPause(t *testing.T) {
	t.Parallel()
	h, p := lose(t, "pause")
	if !host.Eventually(func() bool { return stopped(p) }) {
		t.Fatal("the guest goes on")
	}
	if r := want(t, h, failure, "resume", "alpha"); !strings.Contains(r.errs, "its lock on") || !stopped(p) {
		t.Errorf("resumed without its locks: %v", r)
	}
	if r := want(t, h, ok, "events", "--kind", "lost"); !strings.Contains(r.out, "deleted") || !strings.Contains(r.out, "alpha") {
		t.Errorf("events: %v", r)
	}
	if r := want(t, h, ok, "metrics"); !strings.Contains(r.out, `virtlockd_locks_lost_total{reason="deleted"}`) || !strings.Contains(r.out, `virtlockd_owners_killed_total{step="SIGSTOP"}`) {
		t.Errorf("metrics: %v", r)
	}
}

func TestLockLostKill(t *testing.T) {
	t.Parallel()
	h, p := lose(t, "kill")
	p.Gone()
	if !host.Eventually(func() bool {
		var locks []inspect.Lock
		read(t, h, ok, &locks, "list")
		return len(locks) == 0
	}) {
		t.Error("its locks are left")
	}
}

func TestLockLostLog(t *testing.T) {
	t.Parallel()
	h, p := lose(t, "log")
	if !host.Eventually(func() bool { return strings.Contains(want(t, h, ok, "events", "--kind", "lost").out, "alpha") }) {
		t.Error("nobody is told")
	}
	if stopped(p) || p.Dead() {
		t.Error("something was done to the guest")
	}
}

func TestResume(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	p, c := guest(t, h, d, "alpha")
	must(t, c.Acquire("", file(h, "disk"), 0))
	for _, who := range []string{"alpha", fmt.Sprint(p.PID()), "11111111-1111-1111-1111-111111111111"} {
		p.Signal(syscall.SIGSTOP)
		if !host.Eventually(func() bool { return stopped(p) }) {
			t.Fatal("it does not stop")
		}
		if r := want(t, h, ok, "resume", who); !strings.Contains(r.out, "alpha") {
			t.Errorf("resume %s: %v", who, r)
		}
		if !host.Eventually(func() bool { return !stopped(p) }) {
			t.Errorf("resume %s does nothing", who)
		}
	}
	want(t, h, failure, "resume", "beta")
	_, other := guest(t, h, d, "alpha")
	must(t, other.Acquire("", file(h, "other"), 0))
	if r := want(t, h, failure, "resume", "alpha"); !strings.Contains(r.errs, "process id") {
		t.Errorf("two of that name: %v", r)
	}
}

// A server that has forgotten a lock gives it again, and it outlives the daemon as before.
func TestRegainRemote(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{Args: []string{"--keeper"}})
	disk := slowdisk.Mount(t, h, "/tmp/slow", slowdisk.Options{Locks: true})
	disk.Fill("a")
	_, c := guest(t, h, d, "alpha")
	_, other := guest(t, h, d, "beta")
	must(t, c.Acquire("", "/tmp/slow/a", wire.Shared))
	must(t, other.Acquire("", "/tmp/slow/a", wire.Shared))
	disk.Forget("a")
	wantChecks(t, h, 1, "/tmp/slow/a: lock-gone")
	want(t, h, ok, "resume", "alpha")
	wantChecks(t, h, 1, "")
	var locks []inspect.Lock
	read(t, h, ok, &locks, "list")
	if len(locks) != 1 || len(locks[0].Owners) != 2 || !locks[0].CrashSafe {
		t.Errorf("held are %+v", locks)
	}
	upgrade(t, h, d)
	wantChecks(t, h, 1, "")
	must(t, c.Release("", "/tmp/slow/a"))
	if !disk.Locked("a") {
		t.Error("the first release gives it up")
	}
	must(t, other.Release("", "/tmp/slow/a"))
	if disk.Locked("a") {
		t.Error("it stays locked")
	}
	d.Stop() // killed, its keeper would start it again
}
