// SPDX-License-Identifier: LGPL-2.1-or-later

package watch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/events"
	"virtlockd/internal/filelock"
	"virtlockd/internal/lockspace"
	"virtlockd/internal/owner"
	"virtlockd/internal/poll"
	"virtlockd/internal/verify"
)

// fixture is a table with a watcher that looks all the time.
type fixture struct {
	*testing.T
	*Watcher
	owners *owner.Registry
	events *events.Log
	action atomic.Value
	dir    string
	fds    map[string]int // by path

	mu  sync.Mutex
	log bytes.Buffer
}

func (f *fixture) Write(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.log.Write(b)
}

func (f *fixture) logged() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.log.String()
}

func newFixture(t *testing.T, action string) *fixture {
	t.Helper()
	return newPatientFixture(t, action, 5*time.Millisecond)
}

// newPatientFixture is one that looks again after a while before it does something to an owner.
func newPatientFixture(t *testing.T, action string, confirm time.Duration) *fixture {
	t.Helper()
	f := &fixture{T: t, dir: t.TempDir(), fds: map[string]int{}, events: events.New()}
	f.action.Store(action)
	files, err := filelock.New(filelock.Config{})
	if err != nil {
		t.Fatal(err)
	}
	p, err := poll.New()
	if err != nil {
		t.Fatal(err)
	}
	go p.Run(context.Background())
	log := slog.New(slog.NewTextHandler(f, nil))
	table := lockspace.New(lockspace.Config{Locker: files, Logger: log, Events: f.events})
	f.owners = owner.NewRegistry(owner.Config{Poller: p, Logger: log, Events: f.events, Died: table.ReleaseOwner})
	f.Watcher = New(Config{
		Table: table, Checker: verify.New(table), Events: f.events, Logger: log, Pass: 20 * time.Millisecond,
		Confirm: confirm, Action: func() string { return f.action.Load().(string) },
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		f.Watcher.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		table.Close()
		f.owners.Close()
		p.Close()
		files.Close()
		if t.Failed() {
			t.Log(f.logged())
		}
	})
	return f
}

// guest is a process that holds a lock on a new file.
func (f *fixture) guest(name string, flags uint32) (process *exec.Cmd, path string) {
	f.Helper()
	process = exec.Command("sleep", "1000")
	process.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := process.Start(); err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() {
		_ = process.Process.Kill()
		_ = process.Wait()
	})
	path = filepath.Join(f.dir, name)
	if err := os.WriteFile(path, []byte("data"), 0o600); err != nil {
		f.Fatal(err)
	}
	f.acquire(process, name, path, flags)
	return process, path
}

func (f *fixture) acquire(process *exec.Cmd, name, path string, flags uint32) {
	f.Helper()
	o, err := f.owners.Named(&owner.Details{PID: int32(process.Process.Pid), Name: name}, true)
	if err != nil {
		f.Fatal(err)
	}
	defer o.Release()
	if _, err := f.cfg.Table.Acquire(lockspace.Request{Resource: path, Flags: flags, Owner: o}); err != nil {
		f.Fatal(err)
	}
	entries, _ := f.cfg.Table.List(0, 100)
	for _, e := range entries {
		if e.Path == path {
			f.fds[path], _ = e.Lock.State()
		}
	}
	f.cfg.Table.Held() // whoever releases it does so later
}

// unlock drops a lock behind the table's back.
func (f *fixture) unlock(path string) {
	f.Helper()
	if err := unix.FcntlFlock(uintptr(f.fds[path]), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_UNLCK, Len: 1}); err != nil {
		f.Fatal(err)
	}
}

// steal drops a lock and takes it as somebody else would; the returned function gives it back.
func (f *fixture) steal(path string) (release func()) {
	f.Helper()
	other, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { other.Close() })
	f.eventually("to steal the lock", func() bool { // the watcher takes it again
		f.unlock(path)
		return unix.FcntlFlock(other.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Len: 1}) == nil
	})
	return func() { other.Close() }
}

// passes waits until the watcher has looked at everything so many times: each time it sees another lock that is lost.
func (f *fixture) passes(n int) {
	f.Helper()
	_, path := f.guest(fmt.Sprint("witness", f.count(events.Acquired, "")), 0)
	for range n {
		before := f.count(events.Lost, events.Gone)
		f.unlock(path)
		f.eventually("a pass", func() bool { return f.count(events.Lost, events.Gone) > before })
	}
}

func (f *fixture) eventually(what string, ok func() bool) {
	f.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			f.Fatalf("not within 20 s: %s", what)
		}
	}
}

// stopped tells whether a process is.
func stopped(p *exec.Cmd) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.Process.Pid))
	return err == nil && strings.Contains(string(stat), ") T ")
}

func (f *fixture) count(kind events.Kind, reason events.Reason) uint64 {
	for _, c := range f.events.Counts() {
		if c.Kind == kind && c.Reason == reason {
			return c.N
		}
	}
	return 0
}

// A lock that is free is taken again, and nothing is done to its owner.
func TestTakenAgain(t *testing.T) {
	t.Parallel()
	f := newFixture(t, Kill)
	p, path := f.guest("a", 0)
	f.unlock(path)
	f.eventually("the lock is taken again", func() bool { return f.count(events.Lost, events.Gone) == 1 })
	other, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := unix.FcntlFlock(other.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Len: 1}); err == nil {
		t.Error("somebody else gets it")
	}
	if text := f.logged(); !strings.Contains(text, "taken again") || !strings.Contains(text, "free_for_at_most=") {
		t.Error("the log does not say it")
	}
	if err := p.Process.Signal(unix.Signal(0)); err != nil || stopped(p) {
		t.Errorf("the owner: %v", err)
	}
}

// A lock that somebody else has is told once, and its owner is stopped. He goes on when the lock can be had again.
func TestPauseAndResume(t *testing.T) {
	t.Parallel()
	f := newFixture(t, Pause)
	p, path := f.guest("a", 0)
	free := f.steal(path)
	f.eventually("the owner is stopped", func() bool { return stopped(p) })
	f.passes(3)
	if n := strings.Count(f.logged(), "a lock is lost while"); n != 1 {
		t.Errorf("told %d times", n)
	}
	is := func(name string) func(*owner.Owner) bool {
		return func(o *owner.Owner) bool { return o.Details().Name == name }
	}
	if _, err := f.Resume(context.Background(), is("a")); err == nil || !strings.Contains(err.Error(), path) || !stopped(p) {
		t.Errorf("resumed without lock: %v", err)
	}
	if _, err := f.Resume(context.Background(), is("b")); !errors.Is(err, ErrNobody) {
		t.Errorf("somebody else: %v", err)
	}
	free()
	f.eventually("the owner goes on", func() bool {
		d, err := f.Resume(context.Background(), is("a"))
		return err == nil && d.Name == "a"
	})
	f.eventually("it runs", func() bool { return !stopped(p) })
	if f.count(events.Killed, events.Stop) != 1 || f.count(events.Killed, events.Continue) != 1 {
		t.Error("not counted")
	}
}

func TestKill(t *testing.T) {
	t.Parallel()
	f := newFixture(t, Kill)
	p, path := f.guest("a", 0)
	other, _ := f.guest("b", 0)
	f.steal(path)
	if err := p.Wait(); err == nil || p.ProcessState.Sys().(syscall.WaitStatus).Signal() != unix.SIGKILL {
		t.Errorf("ended by %v", err)
	}
	f.eventually("its lock is released", func() bool { return f.cfg.Table.Held() == 1 })
	if err := other.Process.Signal(unix.Signal(0)); err != nil {
		t.Errorf("another guest: %v", err)
	}
}

// What is only told.
func TestLog(t *testing.T) {
	t.Parallel()
	f := newFixture(t, Log)
	p, gone := f.guest("gone", 0)
	_, replaced := f.guest("replaced", 0)
	_, deleted := f.guest("deleted", lockspace.Shared)
	f.steal(gone)
	for _, err := range []error{os.Rename(replaced, replaced+".old"), os.WriteFile(replaced, nil, 0o600), os.Remove(deleted)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	f.eventually("all are told", func() bool {
		return f.count(events.Lost, events.Gone) > 0 && f.count(events.Lost, events.Replaced) > 0 && f.count(events.Lost, events.Deleted) > 0
	})
	if err := os.Rename(replaced+".old", replaced); err != nil {
		t.Fatal(err)
	}
	f.eventually("one is good again", func() bool { return strings.Contains(f.logged(), "as it should be again") })
	if stopped(p) || p.Process.Signal(unix.Signal(0)) != nil {
		t.Error("something was done to the owner")
	}
}

// A loss is dealt with once, though it may look different later.
func TestOnceForEachLoss(t *testing.T) {
	t.Parallel()
	f := newFixture(t, Pause)
	p, path := f.guest("a", 0)
	for _, err := range []error{os.Rename(path, path+".old"), os.WriteFile(path, nil, 0o600)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	f.eventually("the owner is stopped", func() bool { return stopped(p) })
	if err := p.Process.Signal(unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	f.passes(3)
	if n := f.count(events.Killed, events.Stop); n != 1 || stopped(p) {
		t.Errorf("stopped %d times", n)
	}
	if n := f.count(events.Lost, events.Replaced) + f.count(events.Lost, events.Deleted); n != 1 {
		t.Errorf("told %d times", n)
	}
	// It was good in between: that is another loss.
	if err := os.Rename(path+".old", path); err != nil {
		t.Fatal(err)
	}
	f.eventually("it is good again", func() bool { return strings.Contains(f.logged(), "as it should be again") })
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	f.eventually("the owner is stopped again", func() bool { return f.count(events.Killed, events.Stop) == 2 })
}

// A path that leads elsewhere for a while is no reason to do something to anybody.
func TestPathIsPutBack(t *testing.T) {
	t.Parallel()
	f := newPatientFixture(t, Kill, 2*time.Second)
	p, path := f.guest("a", 0)
	if err := os.Rename(path, path+".old"); err != nil {
		t.Fatal(err)
	}
	f.eventually("it is seen", func() bool { return strings.Contains(f.logged(), "looked at again before anything is done") })
	if err := os.Rename(path+".old", path); err != nil {
		t.Fatal(err)
	}
	f.eventually("it is looked at again", func() bool { return strings.Contains(f.logged(), "leads to the locked file again") })
	if err := p.Process.Signal(unix.Signal(0)); err != nil || stopped(p) {
		t.Errorf("the owner: %v", err)
	}
	if n := f.count(events.Lost, events.Replaced) + f.count(events.Lost, events.Deleted) + f.count(events.Killed, events.Kill); n > 0 {
		t.Errorf("%d events", n)
	}
}

// Where it can't be said who has a lock, it is told and tried again, and nothing is done to its owner. What waits for one mount does not
// keep others from being taken again.
func TestNotTakenAgainYet(t *testing.T) {
	t.Parallel()
	f := newFixture(t, Kill)
	p, path := f.guest("a", 0)
	for range maxActing {
		if !f.enter("") || !f.enter("elsewhere") {
			t.Fatal("there is no place")
		}
	}
	f.leave("elsewhere")
	f.unlock(path)
	f.eventually("it is told", func() bool { return strings.Contains(f.logged(), "can't be taken again yet") })
	if !f.enter("elsewhere") {
		t.Error("there is no place on another mount")
	}
	f.leave("")
	f.eventually("it is taken again", func() bool { return strings.Contains(f.logged(), "and is taken again") })
	if n := strings.Count(f.logged(), "can't be taken again yet"); n != 1 {
		t.Errorf("told %d times", n)
	}
	if err := p.Process.Signal(unix.Signal(0)); err != nil || stopped(p) {
		t.Errorf("the owner: %v", err)
	}
}

// A lock of which something was told is the same one when the first of those who share it has gone.
func TestSharersGo(t *testing.T) {
	t.Parallel()
	f := newFixture(t, Log)
	first, path := f.guest("a", lockspace.Shared)
	second, _ := f.guest("b", 0)
	f.acquire(second, "b", path, lockspace.Shared)
	w := New(f.cfg) // another one, that does not run
	before := w.watched(f.entry(path), 1)
	w.locks[nameOf(f.entry(path))] = before
	_ = first.Process.Kill()
	f.eventually("the first has gone", func() bool { return len(f.entry(path).Holds) == 1 })
	if w.watched(f.entry(path), 2) != before {
		t.Error("it is taken for another lock")
	}
}

// entry is what the table lists of a lock.
func (f *fixture) entry(path string) *lockspace.Entry {
	f.Helper()
	entries, _ := f.cfg.Table.List(0, 100)
	for i := range entries {
		if entries[i].Path == path {
			return &entries[i]
		}
	}
	f.Fatalf("%s is not listed", path)
	return nil
}

// Nothing is kept of a lock that is as it should be: if it is lost, it was good when the last pass began, or when it was acquired since.
func TestGoodLocks(t *testing.T) {
	t.Parallel()
	f := newFixture(t, Log)
	_, path := f.guest("a", 0)
	w := New(f.cfg) // another one, that does not run
	e := f.entry(path)
	acquired := time.Unix(0, e.Holds[0].Since)
	if l := w.watched(e, 1); !l.good.Equal(acquired) {
		t.Errorf("good at %v, acquired at %v", l.good, acquired)
	}
	w.look(t.Context(), e, 1)
	if len(w.locks) != 0 {
		t.Errorf("%d locks are kept", len(w.locks))
	}
	begin := time.Now()
	w.forget(1, begin)
	if l := w.watched(e, 2); !l.good.Equal(begin) {
		t.Errorf("good at %v, the last pass began at %v", l.good, begin)
	}
}

// Whoever was stopped by somebody else is not ours to continue.
func TestResumeOnlyOurs(t *testing.T) {
	t.Parallel()
	f := newFixture(t, Pause)
	p, _ := f.guest("a", 0)
	if err := p.Process.Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	f.eventually("it is stopped", func() bool { return stopped(p) })
	if _, err := f.Resume(context.Background(), func(*owner.Owner) bool { return true }); !errors.Is(err, owner.ErrNotStopped) || !stopped(p) {
		t.Errorf("resumed: %v", err)
	}
}

// Only a number: nobody is hit.
func TestUnseenOwner(t *testing.T) {
	t.Parallel()
	f := newFixture(t, Kill)
	path := filepath.Join(f.dir, "a")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	o, err := f.owners.Named(&owner.Details{PID: int32(os.Getpid()), Name: "a"}, false)
	if err != nil {
		t.Fatal(err)
	}
	defer o.Release()
	if _, err := f.cfg.Table.Acquire(lockspace.Request{Resource: path, Owner: o}); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	f.eventually("it is told", func() bool { return strings.Contains(f.logged(), owner.ErrUnseen.Error()) })
}
