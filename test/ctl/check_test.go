// SPDX-License-Identifier: LGPL-2.1-or-later

package ctl

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/internal/inspect"
	"virtlockd/test/host"
	"virtlockd/test/slowdisk"
	"virtlockd/test/wire"
)

// checks runs check, whose exit code must fit what it finds, and returns that.
func checks(t *testing.T, h *host.Host) (n int, faulty string) {
	t.Helper()
	r := ctl(t, h, "check", "-o", "json")
	var all struct {
		Checked int
		Faulty  []inspect.Finding
	}
	if err := json.Unmarshal([]byte(r.out), &all); err != nil {
		t.Fatalf("check: %v: %v", err, r)
	}
	if (r.exit == found) != (len(all.Faulty) > 0) || r.exit > found {
		t.Errorf("check finds %d: %v", len(all.Faulty), r)
	}
	return all.Checked, kinds(all.Faulty)
}

func wantChecks(t *testing.T, h *host.Host, n int, want string) {
	t.Helper()
	if got, found := checks(t, h); got != n || found != want {
		t.Errorf("of %d locks: %q, want of %d: %q", got, found, n, want)
	}
}

// unlockBehind drops the daemon's lock on a file through a copy of its descriptor, as nobody should.
func unlockBehind(t *testing.T, h *host.Host, d *host.Daemon, path string) {
	t.Helper()
	want, err := os.Stat(h.Path(path))
	must(t, err)
	pidfd, err := unix.PidfdOpen(d.PID(), 0)
	must(t, err)
	defer unix.Close(pidfd)
	dir := fmt.Sprintf("/proc/%d/fd", d.PID())
	entries, err := os.ReadDir(dir)
	must(t, err)
	for _, e := range entries {
		if st, err := os.Stat(dir + "/" + e.Name()); err != nil || !os.SameFile(st, want) {
			continue
		}
		var n int
		_, err := fmt.Sscan(e.Name(), &n)
		must(t, err)
		fd, err := unix.PidfdGetfd(pidfd, n, 0)
		must(t, err)
		defer unix.Close(fd)
		must(t, unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_UNLCK, Len: 1}))
		return
	}
	t.Fatalf("the daemon has no descriptor of %s", path)
}

func TestCheck(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	wantChecks(t, h, 0, "")
	_, c := guest(t, h, d, "alpha")
	good, moved, replaced, gone, loop := file(h, "good"), file(h, "moved"), file(h, "replaced"), file(h, "gone"), file(h, "loop")
	for _, path := range []string{good, moved, replaced, gone, loop} {
		must(t, c.Acquire("", path, 0))
	}
	wantChecks(t, h, 5, "")
	if r := want(t, h, ok, "check"); !strings.Contains(r.out, "5 locks checked, all as they should be") {
		t.Errorf("%v", r)
	}
	must(t, os.Rename(h.Path(moved), h.Path(moved+".old")))
	must(t, os.Rename(h.Path(replaced), h.Path(replaced+".old")))
	file(h, "replaced")
	unlockBehind(t, h, d, gone)
	must(t, os.Remove(h.Path(loop)))
	must(t, os.Symlink("loop", h.Path(loop)))
	// In the order in which they were acquired.
	wantChecks(t, h, 5, "moved: deleted; replaced: replaced; gone: lock-gone; loop: path-error")
	r := want(t, h, found, "check")
	for _, text := range []string{moved + ", exclusive:\n", "held for alpha", "lock-gone: the kernel does not have the lock", "5 locks checked, 4 not as"} {
		if !strings.Contains(r.out, text) {
			t.Errorf("check does not say %q:\n%s", text, r.out)
		}
	}
	if r := want(t, h, found, "check", "--quiet"); r.out+r.errs != "" {
		t.Errorf("a quiet check says %v", r)
	}
	// Nothing was changed by it.
	if !h.Free(gone, true) || h.Free(good, true) {
		t.Error("a check has changed a lock")
	}
}

// Nobody waits for a check when the daemon is replaced.
func TestCheckAndUpgrade(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	c := d.Client(0)
	space := host.Data + "/leases"
	must(t, c.CreateLockspace(space))
	const n = 600
	for i := range n {
		must(t, c.Acquire(space, fmt.Sprint(i), wire.Autocreate))
	}
	for range 3 {
		done := make(chan result)
		go func() { done <- ctl(t, h, "check", "-o", "json") }()
		upgrade(t, h, d)
		if r := <-done; r.exit != ok || !strings.Contains(r.out, fmt.Sprintf(`"checked": %d,`, n)) {
			t.Errorf("check over an upgrade: %v", r)
		}
	}
}

// A number that libvirt named, but no process has it.
func TestCheckOwner(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	must(t, d.Client(0x70000001).Acquire("", file(h, "a"), 0))
	must(t, d.Client(0).Acquire("", file(h, "b"), 0)) // Xen names none
	p, c := guest(t, h, d, "alpha")
	must(t, c.Acquire("", file(h, "c"), 0))
	wantChecks(t, h, 3, "a: no-owner")
	// One that has just ended is not a finding: its locks go by themselves.
	p.Kill()
	if !host.Eventually(func() bool { n, _ := checks(t, h); return n == 2 }) {
		t.Error("a lock outlives its owner")
	}
}

// Whoever ends while his lost lock is being taken again on a disk that hangs has it until the disk answers.
func TestCheckDeadOwner(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, "log")
	disk := g.hangingRegain()
	g.p.Kill()
	wantChecks(t, g.h, 601, "/tmp/slow/a: no-answer owner-dead")
	disk.Resume(slowdisk.Lock)
	if !host.Eventually(func() bool { n, found := checks(t, g.h); return n == 600 && found == "" }) {
		t.Error("the lock outlives its owner")
	}
}

// A daemon that may open no more files can't look, and says so of each lock.
func TestCheckCannotLook(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	_, c := guest(t, h, d, "alpha")
	must(t, c.Acquire("", file(h, "disk"), 0))
	host.Settled(t, d.PID())
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.PID()))
	must(t, err)
	taken := map[string]bool{}
	for _, e := range entries {
		taken[e.Name()] = true
	}
	// One is left, for whoever asks: the limit is the second number that is free.
	limit := uint64(0)
	for left := 1; taken[fmt.Sprint(limit)] || left > 0; limit++ {
		if !taken[fmt.Sprint(limit)] {
			left--
		}
	}
	var old unix.Rlimit
	must(t, unix.Prlimit(d.PID(), unix.RLIMIT_NOFILE, nil, &old))
	must(t, unix.Prlimit(d.PID(), unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: limit, Max: old.Max}, nil))
	wantChecks(t, h, 1, "disk: not-checked")
	if r := want(t, h, found, "check"); !strings.Contains(r.out, "too many open files") {
		t.Errorf("check does not say why it can't look: %v", r)
	}
	must(t, unix.Prlimit(d.PID(), unix.RLIMIT_NOFILE, &old, nil))
	wantChecks(t, h, 1, "")
}

// A disk whose server has taken the lock away, or does not answer.
func TestCheckRemote(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	disk := slowdisk.Mount(t, h, "/tmp/slow", slowdisk.Options{Locks: true})
	disk.Fill("a")
	_, c := guest(t, h, d, "alpha")
	must(t, c.Acquire("", "/tmp/slow/a", 0))
	must(t, c.Acquire("", file(h, "local"), 0))
	wantChecks(t, h, 2, "")

	disk.Hang(slowdisk.Read)
	wantChecks(t, h, 2, "/tmp/slow/a: no-answer")
	// Nobody else waits, and the same disk is not asked again.
	wantChecks(t, h, 2, "/tmp/slow/a: no-answer")
	if n := disk.Waiting(slowdisk.Read); n != 1 {
		t.Errorf("%d reads hang", n)
	}
	other := d.Client(0x70000001)
	must(t, other.Acquire("", file(h, "other"), 0))
	must(t, other.Release("", host.Data+"/other"))
	must(t, c.Acquire("", "/tmp/slow/b", wire.Autocreate))
	must(t, c.Release("", "/tmp/slow/b"))
	disk.Resume(slowdisk.Read)
	if !host.Eventually(func() bool { _, found := checks(t, h); return found == "" }) {
		t.Error("the disk answers again, and is not seen to")
	}

	// That a look at the lock fails says nothing about it.
	disk.FailOpens(unix.EIO)
	wantChecks(t, h, 2, "")
	disk.FailOpens(0)
	disk.Tear()
	wantChecks(t, h, 2, "/tmp/slow/a: read-error")
	disk.Steal("a")
	wantChecks(t, h, 2, "/tmp/slow/a: lock-gone read-error")
}
