// SPDX-License-Identifier: LGPL-2.1-or-later

package ctl

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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

// guarded is a daemon that looks at its locks soon: the more there are, the sooner it comes to the first one.
type guarded struct {
	*testing.T
	h *host.Host
	d *host.Daemon
	p *host.Process
	c *wire.Conn
}

func newGuarded(t *testing.T, action string, args ...string) *guarded {
	t.Helper()
	h, d := start(t, host.Options{Args: args, Config: "lock_lost_action = \"" + action + "\"\n"})
	p, c := guest(t, h, d, "alpha")
	return &guarded{t, h, d, p, c}
}

// fill acquires many locks behind those that are held.
func (g *guarded) fill() {
	g.Helper()
	others := g.d.Dial("lock")
	must(g.T, others.Register(stranger("others", 0)))
	space := host.Data + "/others"
	must(g.T, others.CreateLockspace(space))
	for i := range 600 {
		must(g.T, others.Acquire(space, fmt.Sprint(i), wire.Autocreate))
	}
}

// stranger is a domain with a UUID of its own.
func stranger(name string, pid int) wire.Owner {
	o := wire.VM(pid)
	o.Name, o.UUID[0] = name, 0x22
	return o
}

// look makes the daemon begin to look at its locks anew.
func (g *guarded) look() {
	g.Helper()
	upgrade(g.T, g.h, g.d)
}

// hangingRegain has alpha lose the lock on /tmp/slow/a, which is being taken again on the disk that hangs until Resume.
func (g *guarded) hangingRegain() *slowdisk.Disk {
	g.Helper()
	disk := slowdisk.Mount(g.T, g.h, "/tmp/slow", slowdisk.Options{Locks: true})
	disk.Fill("a")
	must(g.T, g.c.Acquire("", "/tmp/slow/a", 0))
	g.fill()
	disk.Forget("a")
	disk.Hang(slowdisk.Lock)
	g.look()
	disk.AwaitHang(slowdisk.Lock)
	return disk
}

// told tells whether that was told of alpha's lock: of that kind, with this in its text.
func (g *guarded) told(kind, reason, text string) bool {
	g.Helper()
	r := want(g.T, g.h, ok, "events", "--kind", kind)
	return strings.Contains(r.out, "("+reason+")") && strings.Contains(r.out, "alpha") && strings.Contains(r.out, text)
}

// eventually waits for longer than the daemon does before it believes that a path leads elsewhere.
func eventually(ok func() bool) bool {
	for range 2 {
		if host.Eventually(ok) {
			return true
		}
	}
	return false
}

// counted insists on metrics.
func (g *guarded) counted(lines ...string) {
	g.Helper()
	out := want(g.T, g.h, ok, "metrics").out
	for _, line := range lines {
		if !strings.Contains(out, line+"\n") {
			g.Errorf("the metrics have no %s:\n%s", line, out)
		}
	}
}

// steal takes a local file from the daemon, as nobody should.
func (g *guarded) steal(path string) {
	g.Helper()
	f, err := os.OpenFile(g.h.Path(path), os.O_RDWR, 0)
	must(g.T, err)
	g.Cleanup(func() { f.Close() })
	if !host.Eventually(func() bool { // the daemon may be faster
		unlockBehind(g.T, g.h, g.d, path)
		return unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Len: 1}) == nil
	}) {
		g.Fatal("the lock can't be stolen")
	}
}

// Whatever makes a lock lost is told, counted, and dealt with as it is configured.
func TestLostLock(t *testing.T) {
	t.Parallel()
	const slow = "/tmp/slow"
	losses := []struct {
		reason, path, text string
		lose               func(g *guarded, disk *slowdisk.Disk)
	}{
		{"replaced", host.Data + "/disk", "leads to another file now", func(g *guarded, _ *slowdisk.Disk) {
			must(g.T, os.Rename(g.h.Path(host.Data+"/disk"), g.h.Path(host.Data+"/disk.old")))
			file(g.h, "disk")
		}},
		{"deleted", host.Data + "/disk", "leads nowhere now", func(g *guarded, _ *slowdisk.Disk) {
			must(g.T, os.Remove(g.h.Path(host.Data+"/disk")))
		}},
		{"lock-gone", host.Data + "/disk", "the kernel does not have the lock any more", func(g *guarded, _ *slowdisk.Disk) {
			g.steal(host.Data + "/disk")
		}},
		{"lock-gone", slow + "/a", "the kernel does not have the lock any more", func(_ *guarded, disk *slowdisk.Disk) {
			disk.Tear()
			disk.Steal("a")
		}},
	}
	for _, action := range []string{"log", "pause", "kill"} {
		for _, l := range losses {
			t.Run(action+"/"+l.reason+l.path, func(t *testing.T) {
				t.Parallel()
				g := newGuarded(t, action)
				disk := slowdisk.Mount(t, g.h, slow, slowdisk.Options{Locks: true})
				disk.Fill("a")
				file(g.h, "disk")
				must(t, g.c.Acquire("", l.path, 0))
				g.fill()
				l.lose(g, disk)
				g.look()
				if !eventually(func() bool { return g.told("lost", l.reason, l.text) }) {
					t.Fatalf("nobody is told: %s", host.Shorten(g.d.Stderr()))
				}
				g.counted(fmt.Sprintf(`virtlockd_locks_lost_total{reason="%s"} 1`, l.reason))
				if log := g.d.Stderr(); !strings.Contains(log, "while its owner lives: ") || !strings.Contains(log, `lock_lost_action=`+action) {
					t.Errorf("the log says %s", host.Shorten(log))
				}
				switch action {
				case "log":
					g.counted(`virtlockd_owners_killed_total{step="SIGSTOP"} 0`, `virtlockd_owners_killed_total{step="SIGKILL"} 0`)
					if stopped(g.p) || g.p.Dead() {
						t.Error("something was done to the guest")
					}
				case "pause":
					if !host.Eventually(func() bool { return stopped(g.p) }) {
						t.Fatal("the guest goes on")
					}
					g.counted(`virtlockd_owners_killed_total{step="SIGSTOP"} 1`)
					if r := want(t, g.h, failure, "resume", "alpha"); !strings.Contains(r.errs, "its lock on") || !stopped(g.p) {
						t.Errorf("resumed without its lock: %v", r)
					}
				case "kill":
					g.p.Gone()
					g.counted(`virtlockd_owners_killed_total{step="SIGKILL"} 1`)
					if !host.Eventually(func() bool {
						var locks []inspect.Lock
						read(t, g.h, ok, &locks, "list", "-r", l.path)
						return len(locks) == 0
					}) {
						t.Error("its lock is left")
					}
				}
			})
		}
	}
}

// A disk that can't be read, or not be opened either, while its lock is held, is no reason to do something to its owner.
func TestReadErrorOfHeldLock(t *testing.T) {
	t.Parallel()
	for _, server := range []bool{true, false} {
		for _, opens := range []syscall.Errno{0, syscall.EIO, syscall.ENXIO, syscall.ENOENT} {
			t.Run(fmt.Sprintf("server=%t,open=%d", server, opens), func(t *testing.T) {
				t.Parallel()
				g := newGuarded(t, "kill")
				disk := slowdisk.Mount(t, g.h, "/tmp/slow", slowdisk.Options{Locks: server})
				disk.Fill("a")
				must(t, g.c.Acquire("", "/tmp/slow/a", 0))
				g.fill()
				disk.Tear()
				free := func() int { return 0 }
				if opens == 0 {
					free = g.watchLock("/tmp/slow/a")
				}
				disk.FailOpens(opens)
				g.look()
				if !host.Eventually(func() bool { return g.told("faulty", "read-error", "the lock is held") }) {
					t.Fatalf("nobody is told: %s", host.Shorten(g.d.Stderr()))
				}
				if n := free(); n > 0 {
					t.Errorf("the lock was free %d times", n)
				}
				g.counted(`virtlockd_locks_faulty_total{reason="read-error"} 1`, `virtlockd_locks_lost_total{reason="read-error"} 0`,
					`virtlockd_locks_lost_total{reason="lock-gone"} 0`, `virtlockd_owners_killed_total{step="SIGKILL"} 0`)
				if g.p.Dead() {
					t.Error("the guest was killed")
				}
				if server && !disk.Locked("a") {
					t.Error("the lock was given up")
				}
				disk.FailOpens(0)
			})
		}
	}
}

// While a lock is being taken again on a disk that hangs, it is there for everybody who asks.
func TestRegainHangs(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, "kill")
	disk := g.hangingRegain()
	var locks []inspect.Lock
	read(t, g.h, ok, &locks, "list", "-r", "/tmp/slow/a")
	if len(locks) != 1 || len(locks[0].Owners) != 1 || string(locks[0].Owners[0].Name) != "alpha" {
		t.Errorf("listed are %+v", locks)
	}
	want(t, g.h, ok, "who", "/tmp/slow/a")
	wantChecks(t, g.h, 601, "/tmp/slow/a: no-answer")
	disk.Resume(slowdisk.Lock)
	if !host.Eventually(func() bool { return g.told("lost", "lock-gone", "taken again") }) {
		t.Fatalf("not taken again: %s", host.Shorten(g.d.Stderr()))
	}
	wantChecks(t, g.h, 601, "")
}

// A lock that was taken again is held through a live upgrade while it is being stored on a disk that hangs, and after a crash then.
func TestRegainedWhileReplaced(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, "kill", "--keeper")
	disk := g.hangingRegain()
	disk.Hang(slowdisk.Flush)
	disk.Resume(slowdisk.Lock)
	disk.AwaitHang(slowdisk.Flush) // of the worker that has taken it
	stop, stopped := make(chan struct{}), make(chan struct{})
	free := 0
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond / 10):
			}
			if !disk.Locked("a") {
				free++
			}
		}
	}()
	disk.Pass(slowdisk.Flush)
	disk.AwaitHang(slowdisk.Flush) // of the one that stores it
	g.look()
	disk.Resume(slowdisk.Flush)
	var locks []inspect.Lock
	stored := func() bool {
		read(t, g.h, ok, &locks, "list", "-r", "/tmp/slow/a")
		return len(locks) == 1 && len(locks[0].Owners) == 1 && locks[0].CrashSafe
	}
	if !host.Eventually(stored) {
		t.Errorf("after the live upgrade: %+v", locks)
	}
	crash(t, g.h, g.d)
	if !stored() {
		t.Errorf("after the crash: %+v", locks)
	}
	wantChecks(t, g.h, 601, "")
	close(stop)
	<-stopped
	if free > 0 {
		t.Errorf("the disk was unlocked at %d looks", free)
	}
	must(t, g.c.Release("", "/tmp/slow/a"))
	if disk.Locked("a") {
		t.Error("it stays locked")
	}
	end(g.T, g.h, g.d)
}

// An administrator's order that waits for a disk is answered, and keeps nobody from replacing the daemon.
func TestReleaseOnHungDisk(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	disk := slowdisk.Mount(t, h, "/tmp/slow", slowdisk.Options{Locks: true})
	_, c := guest(t, h, d, "alpha")
	must(t, c.Acquire("", "/tmp/slow/a", wire.Autocreate))
	disk.Hang(slowdisk.Unlink)
	said := make(chan result, 1)
	go func() { said <- ctl(t, h, "release", "--yes", "/tmp/slow/a") }()
	disk.AwaitHang(slowdisk.Unlink)
	upgrade(t, h, d)
	if r := <-said; r.exit != ok || !strings.Contains(r.out, "being released: ") || !strings.Contains(r.out, "alpha") {
		t.Errorf("release: %v", r)
	}
	disk.Resume(slowdisk.Unlink)
	if !host.Eventually(func() bool { return held(t, h) == 0 && !disk.Has("a") }) {
		t.Error("the lock is left")
	}
}

// A lease that somebody else has by now keeps its file, and what he wrote into it: who came next would make another file, and lock that.
func TestReleaseOfLostLease(t *testing.T) {
	t.Parallel()
	for name, release := range map[string]func(*guarded, string){
		"by its client":       func(g *guarded, path string) { must(g.T, g.c.Release("", path)) },
		"by its end":          func(g *guarded, _ string) { g.p.Kill() },
		"by an administrator": func(g *guarded, path string) { want(g.T, g.h, ok, "release", "--yes", path) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newGuarded(t, "log")
			disk := slowdisk.Mount(t, g.h, "/tmp/slow", slowdisk.Options{Locks: true})
			const local, remote, own = host.Data + "/lease", "/tmp/slow/lease", host.Data + "/own"
			for _, path := range []string{local, remote, own} {
				must(t, g.c.Acquire("", path, wire.Autocreate))
			}
			g.steal(local)
			disk.Steal("lease")
			for _, path := range []string{own, local, remote} {
				release(g, path)
			}
			if !host.Eventually(func() bool { return !g.h.Exists(own) && held(t, g.h) == 0 }) {
				t.Fatal("not everything is released")
			}
			if info, err := os.Stat(g.h.Path(local)); err != nil || info.Size() == 0 {
				t.Errorf("another one's lease was removed or emptied: %v", err)
			}
			if !disk.Has("lease") {
				t.Error("another one's lease on another host was removed")
			}
		})
	}
}

// held returns how many locks are.
func held(t *testing.T, h *host.Host) int {
	t.Helper()
	var locks []inspect.Lock
	read(t, h, ok, &locks, "list")
	return len(locks)
}

// So is the order to continue a guest, who then stays stopped.
func TestResumeOnHungDisk(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, "pause")
	disk := slowdisk.Mount(t, g.h, "/tmp/slow", slowdisk.Options{Locks: true})
	disk.Fill("a")
	must(t, g.c.Acquire("", "/tmp/slow/a", 0))
	g.fill()
	disk.Steal("a")
	g.look()
	if !host.Eventually(func() bool { return stopped(g.p) }) {
		t.Fatalf("it is not stopped: %s", host.Shorten(g.d.Stderr()))
	}
	disk.Forget("a")
	disk.Hang(slowdisk.Lock)
	said := make(chan result, 1)
	go func() { said <- ctl(t, g.h, "resume", "alpha") }()
	disk.AwaitHang(slowdisk.Lock)
	upgrade(t, g.h, g.d)
	if r := <-said; r.exit != failure || !strings.Contains(r.errs, "in time") || !stopped(g.p) {
		t.Errorf("resume: %v", r)
	}
	disk.Resume(slowdisk.Lock)
	if !host.Eventually(func() bool { return ctl(t, g.h, "resume", "alpha").exit == ok && !stopped(g.p) }) {
		t.Error("it stays stopped")
	}
}

// watchLock tries to get a lock all the time, until the returned function is called, which says how often that worked.
func (g *guarded) watchLock(path string) (free func() int) {
	stop, result := make(chan struct{}), make(chan int)
	go func() {
		n := 0
		for {
			select {
			case <-stop:
				result <- n
				return
			default:
				if g.h.Free(path, true) {
					n++
				}
			}
		}
	}()
	return func() int {
		close(stop)
		return <-result
	}
}

// On NFS, when the server has forgotten us, the kernel goes on to believe in the lock, while what it was taken through can't be read any
// more. It is taken again, and nobody gets in between.
func TestRegainExpired(t *testing.T) {
	t.Parallel()
	for _, mode := range []uint32{0, wire.Shared} {
		t.Run(fmt.Sprintf("flags=%d", mode), func(t *testing.T) {
			t.Parallel()
			g := newGuarded(t, "kill", "--keeper")
			disk := slowdisk.Mount(t, g.h, "/tmp/slow", slowdisk.Options{})
			disk.Fill("a")
			must(t, g.c.Acquire("", "/tmp/slow/a", mode))
			g.fill()
			disk.Expire("a")
			free := g.watchLock("/tmp/slow/a")
			g.look()
			if !host.Eventually(func() bool { return g.told("lost", "read-error", "taken again, it may have been free for up to") }) {
				t.Fatalf("not taken again: %s", host.Shorten(g.d.Stderr()))
			}
			var locks []inspect.Lock
			read(t, g.h, ok, &locks, "list", "-r", "/tmp/slow/a")
			if len(locks) != 1 || !locks[0].CrashSafe || len(locks[0].Owners) != 1 {
				t.Errorf("held are %+v", locks)
			}
			if !g.h.Free("/tmp/slow/a", false) == (mode == wire.Shared) {
				t.Error("its mode has changed")
			}
			crash(t, g.h, g.d)
			wantChecks(t, g.h, 601, "")
			if n := free(); n > 0 {
				t.Errorf("the lock was free %d times", n)
			}
			must(t, g.c.Release("", "/tmp/slow/a"))
			if !g.h.Free("/tmp/slow/a", true) {
				t.Error("it stays locked")
			}
			end(g.T, g.h, g.d)
		})
	}
}

// A server that has forgotten a lock gives it again, and it outlives the daemon as before.
func TestRegainRemote(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, "kill", "--keeper")
	disk := slowdisk.Mount(t, g.h, "/tmp/slow", slowdisk.Options{Locks: true})
	disk.Fill("a")
	_, other := guest(t, g.h, g.d, "beta")
	must(t, g.c.Acquire("", "/tmp/slow/a", wire.Shared))
	must(t, other.Acquire("", "/tmp/slow/a", wire.Shared))
	g.fill()
	disk.Forget("a")
	wantChecks(t, g.h, 601, "/tmp/slow/a: lock-gone")
	g.look()
	if !host.Eventually(func() bool { return g.told("lost", "lock-gone", "taken again") }) {
		t.Fatalf("not taken again: %s", host.Shorten(g.d.Stderr()))
	}
	wantChecks(t, g.h, 601, "")
	var locks []inspect.Lock
	read(t, g.h, ok, &locks, "list", "-r", "/tmp/slow/a")
	if len(locks) != 1 || len(locks[0].Owners) != 2 || !locks[0].CrashSafe {
		t.Errorf("held are %+v", locks)
	}
	g.look()
	wantChecks(t, g.h, 601, "")
	crash(t, g.h, g.d)
	wantChecks(t, g.h, 601, "")
	must(t, g.c.Release("", "/tmp/slow/a"))
	if !disk.Locked("a") {
		t.Error("the first release gives it up")
	}
	must(t, other.Release("", "/tmp/slow/a"))
	if disk.Locked("a") {
		t.Error("it stays locked")
	}
	end(g.T, g.h, g.d)
}

// Only whom the daemon has stopped is continued, also by the binary that comes after a live upgrade or a crash.
func TestResume(t *testing.T) {
	t.Parallel()
	for i, again := range []func(*testing.T, *host.Host, *host.Daemon){func(*testing.T, *host.Host, *host.Daemon) {}, upgrade, crash} {
		t.Run([]string{"same", "upgraded", "recovered"}[i], func(t *testing.T) {
			t.Parallel()
			g := newGuarded(t, "pause", "--keeper")
			disk := file(g.h, "disk")
			must(t, g.c.Acquire("", disk, 0))
			g.fill()
			p := g.h.Spawn(host.ProcessOptions{})
			c := p.Dial(g.d, "lock")
			must(t, c.Register(stranger("beta", p.PID())))
			must(t, c.Acquire("", file(g.h, "another"), 0))
			p.Signal(syscall.SIGSTOP)
			must(t, os.Rename(g.h.Path(disk), g.h.Path(disk+".old")))
			g.look()
			if !eventually(func() bool { return stopped(g.p) && stopped(p) }) {
				t.Fatalf("it is not stopped: %s", host.Shorten(g.d.Stderr()))
			}
			if r := want(t, g.h, failure, "resume", "alpha"); !strings.Contains(r.errs, "its lock on") || !stopped(g.p) {
				t.Errorf("resumed without lock: %v", r)
			}
			must(t, os.Rename(g.h.Path(disk+".old"), g.h.Path(disk)))
			again(t, g.h, g.d) // now there is nothing that it would stop anybody for
			if r := want(t, g.h, failure, "resume", "beta"); !strings.Contains(r.errs, "has not stopped it") || !stopped(p) {
				t.Errorf("resumed whom somebody else has stopped: %v", r)
			}
			want(t, g.h, failure, "resume", "gamma")
			who := []string{"alpha", fmt.Sprint(g.p.PID()), "11111111-1111-1111-1111-111111111111"}[i]
			if r := want(t, g.h, ok, "resume", who); !strings.Contains(r.out, "alpha") {
				t.Errorf("resume %s: %v", who, r)
			}
			if !host.Eventually(func() bool { return !stopped(g.p) }) {
				t.Errorf("resume %s does nothing", who)
			}
			// Once more it is not ours.
			g.p.Signal(syscall.SIGSTOP)
			want(t, g.h, failure, "resume", who)
			again(t, g.h, g.d)
			want(t, g.h, failure, "resume", who)
			end(g.T, g.h, g.d)
		})
	}
}

// Two of one name have to be told apart.
func TestResumeNeedsOneOwner(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	for _, name := range []string{"a", "b"} {
		_, c := guest(t, h, d, "alpha")
		must(t, c.Acquire("", file(h, name), 0))
	}
	if r := want(t, h, failure, "resume", "alpha"); !strings.Contains(r.errs, "process id") {
		t.Errorf("two of that name: %v", r)
	}
}

// The daemon itself never opens a local file to look at it, or to take its lock again: closing it would drop a POSIX lock, if it has
// one. That it has, on a file system without better ones, is the business of package filelock's tests.
func TestLookOpensNothing(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, "log")
	disk := file(g.h, "disk")
	must(t, g.c.Acquire("", disk, 0))
	g.fill()
	opens, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	must(t, err)
	defer unix.Close(opens)
	_, err = unix.InotifyAddWatch(opens, g.h.Path(disk), unix.IN_OPEN)
	must(t, err)
	wantChecks(t, g.h, 601, "")
	if !host.Eventually(func() bool { // in the instant in which the daemon has not yet looked
		g.look()
		unlockBehind(t, g.h, g.d, disk)
		return host.Within(2*time.Second, func() bool { return g.told("lost", "lock-gone", "taken again") })
	}) {
		t.Fatalf("not taken again: %s", host.Shorten(g.d.Stderr()))
	}
	wantChecks(t, g.h, 601, "")
	var b [4096]byte
	if n, err := unix.Read(opens, b[:]); err != unix.EAGAIN {
		t.Errorf("the file was opened: %d bytes of events, %v", n, err)
	}
}

// A disk that hangs keeps the daemon from looking at that disk only, and nobody from anything.
func TestLookAtHungDisk(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, "kill")
	disk := slowdisk.Mount(t, g.h, "/tmp/slow", slowdisk.Options{Locks: true})
	disk.Fill("a")
	beta := g.h.Spawn(host.ProcessOptions{})
	c := beta.Dial(g.d, "lock")
	must(t, c.Register(stranger("beta", beta.PID())))
	must(t, c.Acquire("", "/tmp/slow/a", 0))
	must(t, g.c.Acquire("", file(g.h, "disk"), 0))
	g.fill()
	must(t, os.Remove(g.h.Path(host.Data+"/disk")))
	disk.Hang(slowdisk.Read)
	g.look()
	disk.AwaitHang(slowdisk.Read)
	if !host.Eventually(func() bool { return g.told("lost", "deleted", "leads nowhere now") }) {
		t.Fatalf("nobody is told of another lock: %s", host.Shorten(g.d.Stderr()))
	}
	for range 100 {
		must(t, c.Acquire("", file(g.h, "other"), 0))
		must(t, c.Release("", host.Data+"/other"))
	}
	g.look()
	disk.Resume(slowdisk.Read)
	must(t, c.Release("", "/tmp/slow/a"))
	if beta.Dead() || disk.Locked("a") || strings.Contains(want(t, g.h, ok, "events", "-k", "lost").out, "beta") {
		t.Error("a disk that does not answer counts as a lost lock")
	}
}
