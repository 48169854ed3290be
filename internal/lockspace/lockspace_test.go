// SPDX-License-Identifier: LGPL-2.1-or-later

package lockspace

import (
	"errors"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/events"
	"virtlockd/internal/filelock"
	"virtlockd/internal/owner"
	"virtlockd/internal/poll"
)

const deadline = 20 * time.Second

// gate is a Locker whose Lock can be held up, as a disk that hangs does it.
type gate struct {
	*filelock.Files
	mu      sync.Mutex
	hang    map[string]chan struct{}
	reached chan string
}

func (g *gate) Lock(path string, m filelock.Mode, create bool, record []byte) (*filelock.Lock, error) {
	g.mu.Lock()
	wait := g.hang[path]
	g.mu.Unlock()
	if wait != nil {
		g.reached <- path
		<-wait
	}
	return g.Files.Lock(path, m, create, record)
}

// hold makes the next calls of Lock on path wait for the returned function.
func (g *gate) hold(path string) (open func()) {
	wait := make(chan struct{})
	g.mu.Lock()
	defer g.mu.Unlock()
	g.hang[path] = wait
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		delete(g.hang, path)
		close(wait)
	}
}

type fixture struct {
	*testing.T
	*Table
	gate   *gate
	owners *owner.Registry
	events *events.Log
	dir    string
	pid    int32
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	files, err := filelock.New(filelock.Config{})
	if err != nil {
		t.Fatal(err)
	}
	p, err := poll.New()
	if err != nil {
		t.Fatal(err)
	}
	go p.Run(t.Context())
	f := &fixture{T: t, gate: &gate{Files: files, hang: map[string]chan struct{}{}, reached: make(chan string, 16)}, events: events.New(), dir: t.TempDir(), pid: 0x70000000}
	log := slog.New(slog.DiscardHandler)
	f.Table = New(Config{Locker: f.gate, Logger: log, Events: f.events})
	f.owners = owner.NewRegistry(owner.Config{Poller: p, Logger: log, Died: f.Table.ReleaseOwner})
	t.Cleanup(func() {
		f.Table.Close()
		if n := len(f.Table.files) + len(f.Table.byOwner) + len(f.Table.deleting) + len(f.Table.slots.all) + f.Table.held + f.Table.busy; n != 0 {
			t.Errorf("the table is not empty after Close: %+v", f.Table)
		}
		f.owners.Close()
		p.Close()
		files.Close()
	})
	return f
}

// number returns an owner that is only a number.
func (f *fixture) number() *owner.Owner {
	f.pid++
	o, err := f.owners.Named(&owner.Details{PID: f.pid, Name: "guest"}, false)
	if err != nil {
		f.Fatal(err)
	}
	return o
}

func (f *fixture) path(name string) string { return filepath.Join(f.dir, name) }

func (f *fixture) touch(name string) string {
	f.Helper()
	if err := os.WriteFile(f.path(name), nil, 0o644); err != nil {
		f.Fatal(err)
	}
	return f.path(name)
}

func (f *fixture) acquire(name string, flags uint32, o *owner.Owner) error {
	return f.take(Request{Resource: name, Flags: flags, Owner: o})
}

func (f *fixture) take(req Request) error {
	_, err := f.Table.Acquire(req)
	return err
}

func (f *fixture) release(name string, o *owner.Owner) error {
	return f.Table.Release(Request{Resource: name}, o.PID, true)
}

func (f *fixture) want(what string, got, want error) {
	f.Helper()
	if !errors.Is(got, want) || (want == nil && got != nil) {
		f.Errorf("%s: got %v, want %v", what, got, want)
	}
}

// kernelLocked asks the kernel, through a description of its own, whether anybody holds byte 0.
func (f *fixture) kernelLocked(path string) bool {
	f.Helper()
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		f.Fatal(err)
	}
	defer unix.Close(fd)
	lk := unix.Flock_t{Type: unix.F_WRLCK, Len: 1}
	if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &lk); err != nil {
		f.Fatal(err)
	}
	return lk.Type != unix.F_UNLCK
}

func TestModes(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	disk := f.touch("disk")
	a, b := f.number(), f.number()
	f.want("exclusive", f.acquire(disk, 0, a), nil)
	f.want("exclusive again, same owner", f.acquire(disk, 0, a), ErrLocked)
	f.want("exclusive, another owner", f.acquire(disk, 0, b), ErrLocked)
	f.want("shared on exclusive", f.acquire(disk, Shared, b), ErrLocked)
	f.want("release by another owner", f.release(disk, b), ErrNotOwner)
	f.want("release", f.release(disk, a), nil)
	f.want("release again", f.release(disk, a), ErrNotLocked)
	if f.kernelLocked(disk) {
		t.Error("the kernel's lock outlived the release")
	}
	f.want("shared", f.acquire(disk, Shared, a), nil)
	f.want("shared, another owner", f.acquire(disk, Shared, b), nil)
	f.want("shared twice", f.acquire(disk, Shared, b), nil)
	f.want("exclusive on shared", f.acquire(disk, 0, a), ErrLocked)
	for _, o := range []*owner.Owner{b, a, b} {
		if !f.kernelLocked(disk) {
			t.Error("the kernel's lock is gone while a sharer holds it")
		}
		f.want("release of a sharer", f.release(disk, o), nil)
	}
	if f.Held() != 0 || f.kernelLocked(disk) {
		t.Error("something is still held")
	}
	a.Release()
	b.Release()
}

// One file under several names is one resource.
func TestAliases(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	disk, link, hard := f.touch("disk"), f.path("symlink"), f.path("hard")
	if err := errors.Join(os.Symlink(disk, link), os.Link(disk, hard)); err != nil {
		t.Fatal(err)
	}
	names := []string{disk, link, hard, f.dir + "//disk", f.dir + "/./disk"}
	a, b := f.number(), f.number()
	for _, first := range names {
		f.want("exclusive "+first, f.acquire(first, 0, a), nil)
		for _, second := range names {
			for _, flags := range []uint32{0, Shared} {
				if err := f.acquire(second, flags, b); !f.locked(err) {
					t.Errorf("%s is held, %s with flags %d: %v", first, second, flags, err)
				}
			}
		}
		f.want("release", f.release(first, a), nil)
	}
	for _, name := range names {
		f.want("shared "+name, f.acquire(name, Shared, a), nil)
	}
	for _, name := range names {
		if !f.kernelLocked(disk) {
			t.Error("the kernel's lock ended before the last name's")
		}
		f.want("release "+name, f.release(name, a), nil)
	}
	if f.kernelLocked(disk) {
		t.Error("the kernel's lock outlived the last name")
	}
	a.Release()
	b.Release()
}

// locked matches a refusal by the table and one by the kernel.
func (f *fixture) locked(err error) bool {
	return errors.Is(err, ErrLocked) || errors.Is(err, filelock.ErrLocked)
}

func TestLockspaces(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	dir := f.path("a/b/leases")
	f.want("no lockspace", f.Table.Lookup(dir), ErrNoLockspace)
	f.want("acquire without lockspace", f.take(Request{Lockspace: dir, Resource: "x"}), ErrNoLockspace)
	f.want("new", f.Table.Add(dir), nil)
	f.want("new again", f.Table.Add(dir), ErrExists)
	f.want("the default one", f.Table.Add(""), ErrDefaultExists)
	f.want("a file is there", f.Table.Add(f.touch("file")), filelock.ErrNotDir)
	f.want("lookup of the failed one", f.Table.Lookup(f.path("file")), ErrNoLockspace)

	o := f.number()
	lease := filepath.Join(dir, "lease")
	for _, name := range []string{"..", "../x", "x/../../y", "/.."} {
		req := Request{Lockspace: dir, Resource: name, Flags: AutoCreate, Owner: o}
		f.want("acquire "+name, f.take(req), ErrEscapes)
		f.want("create "+name, f.Table.Create(req), ErrEscapes)
		f.want("delete "+name, f.Table.Delete(req), ErrEscapes)
	}
	req := Request{Lockspace: dir, Resource: "lease", Flags: AutoCreate, Owner: o}
	f.want("acquire", f.take(req), nil)
	f.want("create a held one", f.Table.Create(req), ErrLocked)
	f.want("delete a held one", f.Table.Delete(req), ErrLocked)
	f.want("delete it by another name", f.Table.Delete(Request{Resource: lease}), filelock.ErrLocked)
	f.want("release", f.Table.Release(req, o.PID, true), nil)
	if _, err := os.Lstat(lease); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the lease file is still there: %v", err)
	}
	f.want("create", f.Table.Create(req), nil)
	f.want("delete", f.Table.Delete(req), nil)
	o.Release()
}

// Locks of a process that can be seen are out of reach of a client that means another
// process by the same number.
func TestForeignNumberReleasesNothing(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	disk := f.touch("disk")
	o, stop := f.process()
	f.want("acquire", f.acquire(disk, 0, o), nil)
	f.want("foreign release", f.Table.Release(Request{Resource: disk}, o.PID, false), ErrNotOwner)
	f.want("release", f.release(disk, o), nil)
	stop()
	o.Release()
}

// process returns an owner that is a running process, and what ends it.
func (f *fixture) process() (o *owner.Owner, kill func()) {
	f.Helper()
	cmd := exec.Command("/bin/sleep", "1000")
	if err := cmd.Start(); err != nil {
		f.Fatal(err)
	}
	o, err := f.owners.Named(&owner.Details{PID: int32(cmd.Process.Pid)}, true)
	if err != nil {
		f.Fatal(err)
	}
	return o, sync.OnceFunc(func() { cmd.Process.Kill(); cmd.Wait() })
}

func (f *fixture) eventually(what string, ok func() bool) {
	f.Helper()
	for end := time.Now().Add(deadline); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			f.Fatalf("not in time: %s", what)
		}
	}
}

func TestDeathReleases(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	o, kill := f.process()
	other := f.number()
	disk, shared := f.touch("disk"), f.touch("shared")
	lease := Request{Lockspace: f.path("leases"), Resource: "lease", Flags: AutoCreate, Owner: o}
	f.want("new", f.Table.Add(lease.Lockspace), nil)
	f.want("disk", f.acquire(disk, 0, o), nil)
	f.want("lease", f.take(lease), nil)
	f.want("shared", f.acquire(shared, Shared, o), nil)
	f.want("shared twice", f.acquire(shared, Shared, o), nil) // W8: none of them stays
	f.want("shared by another", f.acquire(shared, Shared, other), nil)
	kill()
	f.eventually("all but the other's is released", func() bool { return f.Held() == 1 })
	if f.kernelLocked(disk) || !f.kernelLocked(shared) {
		t.Error("the wrong locks were released")
	}
	f.want("for the dead", f.acquire(disk, 0, o), ErrOwnerEnded)
	f.want("for the dead, shared", f.acquire(shared, Shared, o), ErrOwnerEnded)
	if f.kernelLocked(disk) {
		t.Error("a lock for the dead was kept")
	}
	f.want("the other's", f.release(shared, other), nil)
	o.Release()
	other.Release()
}

// A disk that hangs holds up requests for itself alone; whoever waits may go away, and an owner
// that dies meanwhile gets nothing.
func TestHangingDisk(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	hung, fine := f.touch("hung"), f.touch("fine")
	open := f.gate.hold(hung)
	o, kill := f.process()
	b := f.number()

	first := make(chan error, 1)
	go func() { first <- f.acquire(hung, 0, o) }()
	<-f.gate.reached
	second := make(chan error, 1)
	go func() { second <- f.acquire(hung, 0, b) }()
	impatient := client{done: make(chan struct{})}
	third := make(chan error, 1)
	go func() {
		third <- f.take(Request{Resource: hung, Owner: b, Client: impatient})
	}()

	f.want("another disk", f.acquire(fine, 0, b), nil)
	f.want("another disk", f.release(fine, b), nil)
	close(impatient.done)
	f.want("the impatient client", <-third, ErrGone)
	select {
	case err := <-first:
		t.Fatalf("the hung call returned %v", err)
	case err := <-second:
		t.Fatalf("the waiting call returned %v", err)
	default:
	}
	kill()
	f.eventually("the death is known", o.Dead)
	open()
	f.want("for an owner that died meanwhile", <-first, ErrOwnerEnded)
	f.want("the one that waited", <-second, nil)
	f.want("release", f.release(hung, b), nil)
	o.Release()
	b.Release()
}

type client struct{ done chan struct{} }

func (c client) Done() <-chan struct{} { return c.done }

func TestBoundsOfTable(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	disk := f.touch("disk")
	o := f.number()
	for range maxHolders {
		f.want("share", f.acquire(disk, Shared, o), nil)
	}
	f.want("one more", f.acquire(disk, Shared, o), ErrTooMany)
	for i := len(f.Table.spaces); i < maxLockspaces; i++ {
		f.Table.spaces[strconv.Itoa(i)] = &space{}
	}
	f.want("one lockspace more", f.Table.Add(f.path("more")), ErrTooMany)
	o.Release()
}

// An acquisition is undone by itself, whoever else holds the resource under the same number.
func TestUndo(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	disk := f.touch("disk")
	process, kill := f.process()
	number, err := f.owners.Named(&owner.Details{PID: process.PID}, false)
	if err != nil {
		t.Fatal(err)
	}
	req := Request{Resource: disk, Flags: Shared}
	req.Owner = process
	f.want("the process", f.take(req), nil)
	req.Owner = number
	hold, err := f.Table.Acquire(req)
	f.want("the number", err, nil)
	f.want("undo", f.Table.Undo(hold), nil)
	if f.Table.Holds(number) || !f.Table.Holds(process) {
		t.Error("the wrong hold was undone")
	}
	f.want("undo again", f.Table.Undo(hold), ErrNotOwner)
	// A release by a client of ours means the process.
	f.want("the number again", f.take(req), nil)
	f.want("release", f.Table.Release(req, process.PID, true), nil)
	if !f.Table.Holds(number) || f.Table.Holds(process) {
		t.Error("the wrong hold was released")
	}
	f.want("release by a stranger", f.Table.Release(req, process.PID, false), nil)
	kill()
	process.Release()
	number.Release()
}

// A lock that was given up in the kernel, but is still in the table, is in nobody's way: the file may be gone, and
// another one have its inode number.
func TestReleasedButListed(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	disk, hard := f.touch("disk"), f.path("hard")
	if err := os.Link(disk, hard); err != nil {
		t.Fatal(err)
	}
	a, b := f.number(), f.number()
	f.want("acquire", f.acquire(disk, 0, a), nil)
	// The first half of a release.
	r := f.Table.spaces[""].resources[disk]
	f.Table.mu.Lock()
	f.Table.dropHolder(r, 0, events.Stopped)
	f.Table.begin(r, releasing)
	f.Table.mu.Unlock()
	f.Table.release(r)
	f.want("acquire the same file", f.acquire(hard, 0, b), nil)
	f.Table.forget(r)
	f.want("release", f.release(hard, b), nil)
	a.Release()
	b.Release()
}

// Clients that make and remove leases all the time are never in each other's way.
func TestLeasesOfMany(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.want("new", f.Table.Add(f.path("leases")), nil)
	var all sync.WaitGroup
	for i := range 8 {
		o := f.number()
		req := Request{Lockspace: f.path("leases"), Resource: strconv.Itoa(i), Flags: AutoCreate, Owner: o}
		all.Go(func() {
			defer o.Release()
			for range 300 {
				f.want("acquire", f.take(req), nil)
				f.want("release", f.Table.Release(req, o.PID, true), nil)
			}
		})
	}
	all.Wait()
}

// While a name is being deleted nobody acquires the file under another one.
func TestDeleteAgainstAlias(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	disk, hard := f.touch("disk"), f.path("hard")
	if err := os.Link(disk, hard); err != nil {
		t.Fatal(err)
	}
	o := f.number()
	var during error
	f.Table.cfg.Locker = deleter{f.gate, func() { during = f.acquire(hard, 0, o) }}
	f.want("delete", f.Table.Delete(Request{Resource: disk}), nil)
	f.want("acquire meanwhile", during, ErrLocked)
	f.want("acquire afterwards", f.acquire(hard, 0, o), nil)
	f.want("release", f.release(hard, o), nil)
	o.Release()
}

// deleter does something between the question whether a file is held and its removal.
type deleter struct {
	*gate
	between func()
}

func (d deleter) Delete(path string, held func(filelock.FileID) bool) error {
	return d.gate.Delete(path, func(id filelock.FileID) bool {
		is := held(id)
		d.between()
		return is
	})
}

// Many owners and names at once: never two exclusive holders, and nothing is left in the end.
func TestRandomly(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	disk, hard := f.touch("disk"), f.path("hard")
	if err := os.Link(disk, hard); err != nil {
		t.Fatal(err)
	}
	names := []string{disk, hard, f.dir + "//disk"}
	var exclusive, sharers atomic.Int32
	var all sync.WaitGroup
	for i := range 8 {
		o := f.number()
		rnd := rand.New(rand.NewPCG(uint64(i), 1))
		all.Go(func() {
			defer o.Release()
			for range 500 {
				name, flags := names[rnd.IntN(len(names))], uint32(rnd.IntN(2))
				err := f.acquire(name, flags, o)
				if err != nil {
					if !f.locked(err) {
						t.Errorf("acquire: %v", err)
					}
					continue
				}
				if flags&Shared == 0 {
					if n := exclusive.Add(1); n != 1 || sharers.Load() != 0 {
						t.Errorf("%d exclusive holders, %d sharers", n, sharers.Load())
					}
					exclusive.Add(-1)
				} else {
					sharers.Add(1)
					if n := exclusive.Load(); n != 0 {
						t.Errorf("an exclusive holder beside a sharer")
					}
					sharers.Add(-1)
				}
				f.want("release", f.release(name, o), nil)
			}
		})
	}
	all.Wait()
	if f.Held() != 0 {
		t.Errorf("%d are still held", f.Held())
	}
}

// A table that holds nothing can be retired, and then gives nothing away any more.
func TestRetire(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	disk := f.touch("disk")
	o := f.number()
	f.want("acquire", f.acquire(disk, 0, o), nil)
	if n := f.Table.Retire(); n != 1 {
		t.Errorf("with one lock held: %d", n)
	}
	f.want("release", f.release(disk, o), nil)
	if n := f.Table.Retire(); n != 0 {
		t.Errorf("with nothing held: %d", n)
	}
	f.want("acquire after that", f.acquire(disk, 0, o), ErrRetired)
	o.Release()
}

// Close gives up everything, also what is being acquired when it is called.
func TestClose(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	o := f.number()
	disk, slow := f.touch("disk"), f.touch("slow")
	lease := Request{Lockspace: f.path("leases"), Resource: "lease", Flags: AutoCreate, Owner: o}
	f.want("new", f.Table.Add(lease.Lockspace), nil)
	f.want("lease", f.take(lease), nil)
	f.want("disk", f.acquire(disk, 0, o), nil)
	open := f.gate.hold(slow)
	acquired := make(chan error, 1)
	go func() { acquired <- f.acquire(slow, 0, o) }()
	<-f.gate.reached
	closed := make(chan struct{})
	go func() { f.Table.Close(); close(closed) }()
	f.eventually("Close has given up what it could and waits", func() bool { return f.Held() == 0 })
	open()
	f.want("the slow one", <-acquired, nil)
	<-closed
	if f.Held() != 0 || f.kernelLocked(disk) || f.kernelLocked(slow) {
		t.Error("something is still held")
	}
	if _, err := os.Lstat(f.path("leases/lease")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the lease file is still there: %v", err)
	}
	o.Release()
}
