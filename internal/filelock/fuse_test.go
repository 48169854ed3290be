// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"errors"
	"fmt"
	"log"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// gateFS shows a directory, keeps the locks itself as a server on another
// host would, and can be told not to answer.
type gateFS struct {
	fuse.RawFileSystem

	mu      sync.Mutex
	gates   map[string]chan struct{} // call -> closed when it may go on
	waiting int
	handles int
	unlocks int // explicit ones
	locks   []serverLock
}

type serverLock struct {
	node, handle, owner uint64
	write               bool
}

// pass waits at the gate of a call.
func (g *gateFS) pass(call string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for gate := g.gates[call]; gate != nil; gate = g.gates[call] {
		g.waiting++
		g.mu.Unlock()
		<-gate
		g.mu.Lock()
		g.waiting--
	}
}

func (g *gateFS) opened(status fuse.Status) fuse.Status {
	g.mu.Lock()
	defer g.mu.Unlock()
	if status.Ok() {
		g.handles++
	}
	return status
}

func (g *gateFS) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	g.pass("open")
	return g.opened(g.RawFileSystem.Open(cancel, in, out))
}

func (g *gateFS) Create(cancel <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	g.pass("open")
	return g.opened(g.RawFileSystem.Create(cancel, in, name, out))
}

func (g *gateFS) SetLk(cancel <-chan struct{}, in *fuse.LkIn) fuse.Status {
	if in.Lk.Typ == unix.F_UNLCK {
		g.pass("unlock")
	} else {
		g.pass("lock")
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	ours := func(l serverLock) bool { return l.node == in.NodeId && l.owner == in.Owner }
	if in.Lk.Typ == unix.F_UNLCK {
		g.unlocks++
	} else {
		for _, l := range g.locks {
			if l.node == in.NodeId && l.owner != in.Owner && (l.write || in.Lk.Typ == unix.F_WRLCK) {
				return fuse.Status(unix.EAGAIN)
			}
		}
	}
	g.locks = slices.DeleteFunc(g.locks, ours)
	if in.Lk.Typ != unix.F_UNLCK {
		g.locks = append(g.locks, serverLock{in.NodeId, in.Fh, in.Owner, in.Lk.Typ == unix.F_WRLCK})
	}
	return fuse.OK
}

// Flush ends the locks of the process that closes a descriptor.
func (g *gateFS) Flush(cancel <-chan struct{}, in *fuse.FlushIn) fuse.Status {
	g.pass("flush")
	g.mu.Lock()
	defer g.mu.Unlock()
	g.locks = slices.DeleteFunc(g.locks, func(l serverLock) bool { return l.node == in.NodeId && l.owner == in.LockOwner })
	return fuse.OK
}

func (g *gateFS) Release(cancel <-chan struct{}, in *fuse.ReleaseIn) {
	g.mu.Lock()
	g.handles--
	g.locks = slices.DeleteFunc(g.locks, func(l serverLock) bool { return l.node == in.NodeId && l.handle == in.Fh })
	g.mu.Unlock()
	g.RawFileSystem.Release(cancel, in)
}

// fuseMain serves the directory args[0] at args[1]. Commands: "hang CALL",
// "free CALL", "waiting", "handles", "locks", "unlocks".
func fuseMain(args []string) {
	root, err := fs.NewLoopbackRoot(args[0])
	if err != nil {
		log.Fatal(err)
	}
	zero := time.Duration(0)
	g := &gateFS{
		RawFileSystem: fs.NewNodeFS(root, &fs.Options{EntryTimeout: &zero, AttrTimeout: &zero}),
		gates:         map[string]chan struct{}{},
	}
	server, err := fuse.NewServer(g, args[1], &fuse.MountOptions{DirectMountStrict: true, EnableLocks: true, FsName: "test", Name: "gate"})
	if err != nil {
		log.Fatal(err)
	}
	go server.Serve()
	if err := server.WaitMount(); err != nil {
		log.Fatal(err)
	}
	forCommands(func(f []string) string {
		g.mu.Lock()
		defer g.mu.Unlock()
		switch f[0] {
		case "hang":
			g.gates[f[1]] = make(chan struct{})
		case "free":
			close(g.gates[f[1]])
			delete(g.gates, f[1])
		case "waiting":
			return fmt.Sprint(g.waiting)
		case "handles":
			return fmt.Sprint(g.handles)
		case "unlocks":
			return fmt.Sprint(g.unlocks)
		case "locks":
			return fmt.Sprint(len(g.locks))
		}
		return "ok"
	})
}

// holderMain is a daemon that locks args[0] exclusively and tells.
func holderMain(args []string) {
	f, err := New(Config{})
	if err != nil {
		log.Fatal(err)
	}
	forCommands(func([]string) string {
		if _, err := f.Lock(args[0], Exclusive, false, nil); err != nil {
			return err.Error()
		}
		return "ok"
	})
}

// gated is a FUSE file system with the file "disk".
type gated struct {
	*child
	dir string
}

func newGated(t *testing.T) gated {
	t.Helper()
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("needs /dev/fuse")
	}
	base := t.TempDir()
	makeFile(t, mkdir(t, base+"/back")+"/disk", "data")
	dir := mkdir(t, base+"/mnt")
	g := gated{startRole(t, "fuse", base+"/back", dir), dir}
	g.want("ok", "ready?")
	t.Cleanup(func() {
		g.cmd.Process.Kill() // this aborts what hangs
		unix.Unmount(dir, unix.MNT_DETACH)
	})
	return g
}

func (g gated) eventually(want string, command ...any) {
	g.t.Helper()
	eventually(g.t, fmt.Sprintf("%v: %s", command, want), func() bool { return g.ask(command...) == want })
}

// background runs a call that may hang.
func background(call func() error) <-chan error {
	ch := make(chan error, 1)
	go func() { ch <- call() }()
	return ch
}

func lockFor(f *Files, path string, l **Lock) func() error {
	return func() (err error) {
		*l, err = f.Lock(path, Exclusive, false, nil)
		return err
	}
}

func noWorkers(t *testing.T) {
	t.Helper()
	eventually(t, "all workers have ended", func() bool { return len(workers()) == 0 })
}

func TestRemoteLockLiesInCell(t *testing.T) {
	if !apart(t) {
		return
	}
	g := newGated(t)
	f := newFiles(t, Config{WorkerIdle: time.Millisecond})
	other := startRole(t, "locker")
	before := openFiles(t)

	l := mustLock(t, f, g.dir+"/disk", Exclusive, false)
	if !l.Remote() || l.Kind() != OFD {
		t.Errorf("remote %t, kind %v", l.Remote(), l.Kind())
	}
	noWorkers(t) // and the lock is still held:
	g.want("1", "locks")
	other.want(refusedText, "posix", "write", g.dir+"/disk")
	if _, err := f.Lock(g.dir+"/disk", Shared, false, nil); !errors.Is(err, ErrLocked) {
		t.Errorf("a second lock: %v", err)
	}
	for _, name := range openFiles(t) {
		if strings.HasPrefix(name, g.dir) {
			t.Errorf("this process has %s open", name)
		}
	}
	g.eventually("1", "handles")
	mustRelease(t, l, "")
	g.want("0", "locks")
	g.want("1", "unlocks")
	g.eventually("0", "handles")
	other.want("ok", "posix", "write", g.dir+"/disk")
	other.want("ok", "close", g.dir+"/disk")

	l = mustLock(t, f, g.dir+"/lease", Exclusive, true)
	mustRelease(t, l, g.dir+"/lease")
	if _, err := os.Stat(g.dir + "/lease"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the lease file after the release: %v", err)
	}
	g.eventually("0", "handles")
	noWorkers(t)
	if after := openFiles(t); len(after) != len(before) {
		t.Errorf("open before: %v, after: %v", before, after)
	}
}

func TestHungCallDelaysNobodyElse(t *testing.T) {
	if !apart(t) {
		return
	}
	hung, other := newGated(t), newGated(t)
	const limit = 3
	f := newFiles(t, Config{MaxWorkersPerMount: limit, HungAfter: 50 * time.Millisecond, WorkerIdle: time.Millisecond})
	local := makeFile(t, t.TempDir()+"/disk", "")
	for i := range limit {
		makeFile(t, fmt.Sprint(hung.dir, "/disk", i), "")
	}

	for _, call := range []string{"open", "lock", "flush"} {
		hung.want("ok", "hang", call)
		locks := make([]*Lock, limit)
		var results []<-chan error
		for i := range limit {
			results = append(results, background(lockFor(f, fmt.Sprint(hung.dir, "/disk", i), &locks[i])))
		}
		hung.eventually(fmt.Sprint(limit), "waiting")
		calls := f.InFlight()
		if len(calls) != limit {
			t.Fatalf("in flight: %v", calls)
		}
		for _, c := range calls {
			if c.Op != "lock" || c.Mount != hung.dir || !strings.HasPrefix(c.Path, hung.dir) || c.Worker == 0 || time.Since(c.Since) > time.Minute {
				t.Errorf("in flight: %+v", c)
			}
		}

		for _, path := range []string{local, other.dir + "/disk"} {
			mustRelease(t, mustLock(t, f, path, Exclusive, false), "")
		}
		var limited *HungError
		_, err := f.Lock(hung.dir+"/disk", Exclusive, false, nil)
		if !errors.As(err, &limited) || limited.Mount != hung.dir || limited.Calls != limit || limited.Oldest <= 0 {
			t.Errorf("beyond the limit: %v", err)
		}
		var e *Error
		if !errors.As(err, &e) || e.Op != OpWorker || e.Path != hung.dir+"/disk" {
			t.Errorf("beyond the limit: %#v", err)
		}
		if err := f.Create(hung.dir + "/new"); !errors.As(err, &limited) {
			t.Errorf("Create beyond the limit: %v", err)
		}

		hung.want("ok", "free", call)
		for i, result := range results {
			if err := <-result; err != nil {
				t.Fatal(err)
			}
			mustRelease(t, locks[i], "")
		}
		hung.want("0", "locks")
	}
	noWorkers(t)
}

// A call that hangs has a process, but no thread of this one, whose processors of the run-time are few.
func TestHungCallsTakeNoThreads(t *testing.T) {
	if !apart(t) {
		return
	}
	g := newGated(t)
	const calls = 24
	f := newFiles(t, Config{MaxWorkersPerMount: calls})
	threads := func() int {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		return len(tasks)
	}
	lock := func(i int) <-chan error {
		return background(func() error {
			l, err := f.Lock(fmt.Sprint(g.dir, "/disk", i), Exclusive, false, nil)
			if err != nil {
				return err
			}
			return l.Release(l.path, nil)
		})
	}
	for i := range calls {
		makeFile(t, fmt.Sprint(g.dir, "/disk", i), "")
	}
	g.want("ok", "hang", "open")
	all := []<-chan error{lock(0)}
	g.eventually("1", "waiting")
	before := threads()
	for i := 1; i < calls; i++ {
		all = append(all, lock(i))
	}
	g.eventually(fmt.Sprint(calls), "waiting")
	if now := threads(); now-before > calls/2 { // to start workers takes some
		t.Errorf("%d threads with one call that hangs, %d with %d", before, now, calls)
	}
	g.want("ok", "free", "open")
	for _, result := range all {
		if err := <-result; err != nil {
			t.Error(err)
		}
	}
}

// When a disk answers again, some of its workers stay for what comes next, and the others end.
func TestWorkersEnd(t *testing.T) {
	if !apart(t) {
		return
	}
	g := newGated(t)
	const calls = 3 * maxIdle
	f := newFiles(t, Config{MaxWorkersPerMount: calls})
	var paths []string
	for i := range calls {
		paths = append(paths, makeFile(t, fmt.Sprint(g.dir, "/disk", i), ""))
	}
	g.want("ok", "hang", "open")
	var all []<-chan error
	for _, path := range paths {
		all = append(all, background(func() error {
			l, err := f.Lock(path, Exclusive, false, nil)
			if err != nil {
				return err
			}
			return l.Release(l.path, nil)
		}))
	}
	g.eventually(fmt.Sprint(calls), "waiting")
	g.want("ok", "free", "open")
	for _, result := range all {
		if err := <-result; err != nil {
			t.Error(err)
		}
	}
	eventually(t, "as many workers as may be idle", func() bool { return len(workers()) == maxIdle })

	// One that does not end does not keep the next.
	p := &f.pool
	p.mu.Lock()
	first := p.idle[0]
	p.mu.Unlock()
	if err := unix.Kill(first.pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		w, err := p.start()
		if err != nil {
			t.Fatal(err)
		}
		p.put(w)
	}
	eventually(t, "as many workers as may be idle, and one that is stopped", func() bool { return len(workers()) == maxIdle+1 })
	if err := unix.Kill(first.pid, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	eventually(t, "as many workers as may be idle", func() bool { return len(workers()) == maxIdle })
	f.Close()
	noWorkers(t)
}

// More calls than places wait while the others come back.
func TestBurstWaits(t *testing.T) {
	if !apart(t) {
		return
	}
	g := newGated(t)
	f := newFiles(t, Config{MaxWorkersPerMount: 2, MaxWorkers: 3, WorkerIdle: time.Millisecond})
	var all []<-chan error
	for i := range 40 {
		all = append(all, background(func() error {
			l, err := f.Lock(fmt.Sprint(g.dir, "/lease", i), Exclusive, true, nil)
			if err != nil {
				return err
			}
			return l.Release(l.path, nil)
		}))
	}
	for _, result := range all {
		if err := <-result; err != nil {
			t.Error(err)
		}
	}
	g.want("0", "locks")
	noWorkers(t)
}

func TestReleaseHangs(t *testing.T) {
	if !apart(t) {
		return
	}
	g := newGated(t)
	f := newFiles(t, Config{MaxWorkersPerMount: 1, HungAfter: time.Millisecond, WorkerIdle: time.Millisecond})
	makeFile(t, g.dir+"/second", "")
	first := mustLock(t, f, g.dir+"/disk", Exclusive, false)
	second := mustLock(t, f, g.dir+"/second", Shared, false)
	g.want("ok", "hang", "unlock")
	result := background(func() error { return first.Release("", nil) })
	g.eventually("1", "waiting")
	waits := background(func() error { return second.Release("", nil) }) // no place left, but no error
	eventually(t, "both are in flight", func() bool { return len(f.InFlight()) == 2 })
	select {
	case err := <-result:
		t.Errorf("released before the server said so: %v", err)
	case err := <-waits:
		t.Errorf("released without a worker: %v", err)
	default:
	}
	g.want("ok", "free", "unlock")
	for _, ch := range []<-chan error{result, waits} {
		if err := <-ch; err != nil {
			t.Error(err)
		}
	}
	g.want("0", "locks")
	g.eventually("0", "handles")
	noWorkers(t)
}

func TestCloseLeavesHungWorkersBehind(t *testing.T) {
	if !apart(t) {
		return
	}
	for _, call := range []string{"open", "lock"} {
		g := newGated(t)
		f := newFiles(t, Config{MaxWorkersPerMount: 1, HungAfter: time.Hour})
		mustRelease(t, mustLock(t, f, g.dir+"/disk", Exclusive, false), "")
		g.want("ok", "hang", call)
		var l *Lock
		result := background(lockFor(f, g.dir+"/disk", &l))
		g.eventually("1", "waiting")
		waits := background(func() error { return f.MakeDir(g.dir + "/new") })
		eventually(t, "both are in flight", func() bool { return len(f.InFlight()) == 2 })
		f.Close()
		for _, ch := range []<-chan error{result, waits} {
			if err := <-ch; !errors.Is(err, ErrClosed) {
				t.Errorf("a call in progress: %v", err)
			}
		}
		if _, err := f.Lock(g.dir+"/disk", Exclusive, false, nil); !errors.Is(err, ErrClosed) {
			t.Errorf("a call after it: %v", err)
		}
		g.want("ok", "free", call)
		noWorkers(t)
		g.want("0", "locks")
		g.eventually("0", "handles")
	}
}

func TestLateLockIsUndoneWhenDaemonIsGone(t *testing.T) {
	if !apart(t) {
		return
	}
	for _, call := range []string{"open", "lock"} {
		g := newGated(t)
		holder := startRole(t, "holder", g.dir+"/disk")
		g.want("ok", "hang", call)
		fmt.Fprintln(holder.in, "lock")
		g.eventually("1", "waiting")
		holder.cmd.Process.Kill()
		holder.cmd.Wait()
		g.want("1", "waiting")
		g.want("ok", "free", call)
		g.eventually("0", "waiting")
		g.eventually("0", "handles")
		g.want("0", "locks")
		if call == "lock" {
			g.want("1", "unlocks")
		}
		// The worker is nobody's child by now.
		eventually(t, "no worker is left", func() bool { return len(processes(t, workerName)) == 0 })
	}
}

// processes returns the processes of that name in this mount namespace.
func processes(t *testing.T, name string) (pids []string) {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	ours, _ := os.Readlink("/proc/self/ns/mnt")
	for _, e := range entries {
		if ns, _ := os.Readlink("/proc/" + e.Name() + "/ns/mnt"); ns != ours {
			continue
		}
		if args, _ := os.ReadFile("/proc/" + e.Name() + "/cmdline"); strings.HasPrefix(string(args), name+"\x00") {
			pids = append(pids, e.Name())
		}
	}
	return pids
}

func TestWorkerIsKilled(t *testing.T) {
	if !apart(t) {
		return
	}
	g := newGated(t)
	f := newFiles(t, Config{})
	path := g.dir + "/disk"
	kill := func(pid int, signal syscall.Signal) {
		t.Helper()
		if err := unix.Kill(pid, signal); err != nil {
			t.Fatal(err)
		}
	}
	worker := func() int {
		t.Helper()
		calls := f.InFlight()
		if len(calls) != 1 {
			t.Fatalf("in flight: %v", calls)
		}
		return calls[0].Worker
	}

	// In the middle of a call.
	g.want("ok", "hang", "lock")
	var l *Lock
	result := background(lockFor(f, path, &l))
	g.eventually("1", "waiting")
	for _, signal := range []syscall.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT} {
		kill(worker(), signal) // such ones aren't meant for it
	}
	g.want("ok", "free", "lock")
	if err := <-result; err != nil {
		t.Fatalf("after signals to ignore: %v", err)
	}
	mustRelease(t, l, "")

	g.want("ok", "hang", "open")
	result = background(lockFor(f, path, &l))
	g.eventually("1", "waiting")
	kill(worker(), unix.SIGKILL)
	g.want("ok", "free", "open")
	var e *Error
	if err := <-result; !errors.As(err, &e) || e.Op != OpWorker || !errors.Is(err, errDied) {
		t.Errorf("killed in the middle: %v", err)
	}
	g.eventually("0", "locks")

	// While it was idle: nobody notices.
	mustRelease(t, mustLock(t, f, path, Exclusive, false), "")
	for _, pid := range workers() {
		var n int
		fmt.Sscan(pid, &n)
		kill(n, unix.SIGKILL)
		// Until it is dead it can still take a request with it.
		eventually(t, "the worker is dead", func() bool {
			stat, _ := os.ReadFile("/proc/" + pid + "/stat")
			return strings.Contains(string(stat), ") Z ")
		})
	}
	l = mustLock(t, f, path, Exclusive, false)

	// In the middle of a release: the next one goes on.
	g.want("ok", "hang", "unlock")
	result = background(func() error { return l.Release("", nil) })
	g.eventually("1", "waiting")
	kill(worker(), unix.SIGKILL)
	g.want("ok", "free", "unlock")
	if err := <-result; err != nil {
		t.Errorf("released by a worker that was killed: %v", err)
	}
	g.eventually("0", "locks")
	f.Close()
	noWorkers(t)
}

func TestLinkToRemote(t *testing.T) {
	if !apart(t) {
		return
	}
	g := newGated(t)
	dir := t.TempDir()
	os.Symlink(g.dir, dir+"/dir")
	os.Symlink("dir/disk", dir+"/file")
	back := mkdir(t, g.dir+"/local")
	f := newFiles(t, Config{WorkerIdle: time.Millisecond})
	mount(t, "tmpfs", back, "tmpfs", 0, "") // local, but only by way of the remote one
	makeFile(t, back+"/disk", "")
	// From dir/.. the kernel goes to the parent of what the link points to.
	for _, path := range []string{dir + "/dir/disk", dir + "/file", back + "/disk", dir + "/dir/../mnt/disk"} {
		l := mustLock(t, f, path, Exclusive, false)
		if !l.Remote() {
			t.Errorf("%s was locked directly", path)
		}
		mustRelease(t, l, "")
	}
	// A call that hangs there is known by the mount that it hangs on.
	g.want("ok", "hang", "open")
	var l *Lock
	result := background(lockFor(f, dir+"/file", &l))
	g.eventually("1", "waiting")
	if calls := f.InFlight(); len(calls) != 1 || calls[0].Mount != g.dir || calls[0].Path != dir+"/file" {
		t.Errorf("in flight: %v", calls)
	}
	g.want("ok", "free", "open")
	if err := <-result; err != nil {
		t.Fatal(err)
	}
	mustRelease(t, l, "")
	unix.Unmount(back, unix.MNT_DETACH)
	noWorkers(t)
}
