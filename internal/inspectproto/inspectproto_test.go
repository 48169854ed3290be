// SPDX-License-Identifier: LGPL-2.1-or-later

package inspectproto

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"virtlockd/internal/events"
	"virtlockd/internal/filelock"
	"virtlockd/internal/inspect"
	"virtlockd/internal/lockspace"
	"virtlockd/internal/owner"
	"virtlockd/internal/poll"
	"virtlockd/internal/rpc"
	"virtlockd/internal/verify"
	"virtlockd/internal/watch"
	"virtlockd/internal/xdr"
)

// fixture is the two programs on a table without daemon.
type fixture struct {
	testing.TB
	cfg    Config
	owners *owner.Registry
	dir    string
	reader rpc.Program
	writer rpc.Program
}

func newFixture(t testing.TB) *fixture {
	t.Helper()
	files, err := filelock.New(filelock.Config{})
	if err != nil {
		t.Fatal(err)
	}
	p, err := poll.New()
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	happened := events.New()
	table := lockspace.New(lockspace.Config{Locker: files, Logger: log, Events: happened})
	f := &fixture{TB: t, dir: t.TempDir()}
	f.owners = owner.NewRegistry(owner.Config{Poller: p, Logger: log, Died: table.ReleaseOwner})
	f.cfg = Config{
		Table: table, Files: files, Events: happened, Checker: verify.New(table), Safe: func() (bool, string, int) { return false, "no keeper", 0 }, Logger: log,
		Servers: func() []*rpc.Server { return nil },
		Life:    func() Life { return Life{Started: time.Unix(1, 0), Serving: time.Unix(2, 0), Upgrades: 3} },
		Dropped: func() uint64 { return 4 },
	}
	f.cfg.Watcher = watch.New(watch.Config{Table: table, Checker: f.cfg.Checker, Events: happened, Logger: log, Action: func() string { return watch.Log }})
	programs := Programs(f.cfg)
	f.reader, f.writer = programs[0], programs[1]
	t.Cleanup(func() {
		table.Close()
		f.owners.Close()
		p.Close()
		files.Close()
	})
	return f
}

// acquire makes a file and locks it for an owner that is only a number.
func (f *fixture) acquire(name string, pid int32, flags uint32) string {
	f.Helper()
	path := filepath.Join(f.dir, name)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		f.Fatal(err)
	}
	o, err := f.owners.Named(&owner.Details{PID: pid, Name: "guest"}, false)
	if err != nil {
		f.Fatal(err)
	}
	defer o.Release()
	if _, err := f.cfg.Table.Acquire(lockspace.Request{Resource: path, Flags: flags, Owner: o}); err != nil {
		f.Fatal(err)
	}
	return path
}

// call makes a call and reads the result.
func call(c *rpc.Client, p rpc.Program, proc uint32, args, result any) error {
	payload, err := inspect.Append(nil, args)
	if err != nil {
		return err
	}
	out, err := p.Call(c, proc, payload, nil)
	if err != nil || result == nil {
		return err
	}
	return inspect.Decode(out, inspect.MaxReply, result)
}

func TestLocks(t *testing.T) {
	t.Parallel()
	f, c := newFixture(t), new(rpc.Client)
	const n = 300
	for i := range n {
		f.acquire(fmt.Sprintf("%03d", i), int32(i+1), 0)
	}
	for _, limit := range []int{0, 1, 100, inspect.MaxPart, 1 << 30, -5} {
		seen := 0
		for from := 0; ; {
			var part inspect.Locks
			if err := call(c, f.reader, inspect.ProcLocks, inspect.Part{From: from, Limit: limit}, &part); err != nil {
				t.Fatal(err)
			}
			if len(part.Locks) > inspect.MaxPart || limit > 0 && len(part.Locks) > limit {
				t.Fatalf("a part of %d has %d", limit, len(part.Locks))
			}
			seen += len(part.Locks)
			if from = part.Next; from == 0 {
				break
			}
		}
		if seen != n {
			t.Errorf("in parts of %d: %d of %d", limit, seen, n)
		}
	}
	for _, from := range []int{-1, n, 1 << 40} {
		if err := call(c, f.reader, inspect.ProcLocks, inspect.Part{From: from}, nil); err != nil {
			t.Errorf("from %d: %v", from, err)
		}
	}
}

// However many owners a lock has, and however long names are, an answer stays within its bounds.
func TestLargest(t *testing.T) {
	t.Parallel()
	f, c := newFixture(t), new(rpc.Client)
	name := string(make([]byte, 60000)) // each byte as \u0000
	var paths []string
	for i := range 5 {
		path := filepath.Join(f.dir, fmt.Sprint(i))
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		paths = append(paths, path)
	}
	owners := 0
	for pid := int32(1); pid <= 4096; pid++ {
		o, err := f.owners.Named(&owner.Details{PID: pid, Name: name}, false)
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range paths[:2+int(pid)%2*3] { // some have all, the others half
			if _, err := f.cfg.Table.Acquire(lockspace.Request{Resource: path, Flags: lockspace.Shared, Owner: o}); err != nil {
				t.Fatal(err)
			}
			owners++
		}
		o.Release()
	}
	parts, seen := 0, 0
	for from := 0; ; parts++ {
		payload, err := inspect.Append(nil, inspect.Part{From: from})
		if err != nil {
			t.Fatal(err)
		}
		out, err := f.reader.Call(c, inspect.ProcLocks, payload, nil)
		if err != nil || len(out) > inspect.MaxReply {
			t.Fatalf("%d bytes, %v", len(out), err)
		}
		var part inspect.Locks
		if err := inspect.Decode(out, inspect.MaxReply, &part); err != nil {
			t.Fatal(err)
		}
		for _, l := range part.Locks {
			seen += len(l.Owners)
		}
		if from = part.Next; from == 0 {
			break
		}
	}
	if seen != owners || parts < 2 {
		t.Errorf("%d of %d owners in %d parts", seen, owners, parts+1)
	}
}

func TestStatus(t *testing.T) {
	t.Parallel()
	f, c := newFixture(t), new(rpc.Client)
	f.acquire("a", 1, 0)
	f.acquire("b", 1, lockspace.Shared)
	var s inspect.Status
	if err := call(c, f.reader, inspect.ProcStatus, nil, &s); err != nil {
		t.Fatal(err)
	}
	if s.PID != os.Getpid() || s.Started.Unix() != 1 || s.Serving.Unix() != 2 || s.Upgrades != 3 || s.LogDropped != 4 ||
		s.Locks != (inspect.LockCount{Exclusive: 1, Shared: 1}) || s.CrashSafe || s.CrashSafeReason == "" || s.Lockspaces != 1 {
		t.Errorf("%+v", s)
	}
}

// Both ways to count descriptors agree: that of Linux 6.2 and later, and that for all. It runs alone, since others open files.
func TestDescriptors(t *testing.T) {
	before, err := listDescriptors()
	if err != nil {
		t.Fatal(err)
	}
	const n = 10
	for range n {
		f, err := os.Open("/dev/null")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
	}
	listed, err := listDescriptors()
	if err != nil || listed != before+n {
		t.Errorf("%d more than %d are %d, %v", n, before, listed, err)
	}
	if got, err := descriptors(); err != nil || got != listed {
		t.Errorf("counted %d, %v, listed %d", got, err, listed)
	}
}

// It runs alone, since others start goroutines.
func TestGoroutines(t *testing.T) {
	f, c := newFixture(t), new(rpc.Client)
	count := func() int {
		var s inspect.Status
		if err := call(c, f.reader, inspect.ProcStatus, nil, &s); err != nil {
			t.Fatal(err)
		}
		return s.Goroutines
	}
	const n = 10
	stop := make(chan struct{})
	defer close(stop)
	before := count()
	for range n {
		go func() { <-stop }()
	}
	if now := count(); before == 0 || now != before+n {
		t.Errorf("%d more than %d are %d", n, before, now)
	}
}

func TestHeapLive(t *testing.T) {
	f, c := newFixture(t), new(rpc.Client)
	live := func() uint64 {
		runtime.GC()
		var s inspect.Status
		if err := call(c, f.reader, inspect.ProcStatus, nil, &s); err != nil {
			t.Fatal(err)
		}
		return s.HeapLive
	}
	before := live()
	more := make([]byte, 16<<20)
	if now := live(); before == 0 || now < before+uint64(len(more))/2 {
		t.Errorf("%d bytes more than %d are %d", len(more), before, now)
	}
	runtime.KeepAlive(more)
}

func TestCheckAndEvents(t *testing.T) {
	t.Parallel()
	f, c := newFixture(t), new(rpc.Client)
	f.acquire("good", 0, 0)
	bad := f.acquire("bad", 0, 0)
	if err := os.Remove(bad); err != nil {
		t.Fatal(err)
	}
	var checks inspect.Checks
	if err := call(c, f.reader, inspect.ProcCheck, inspect.Part{}, &checks); err != nil {
		t.Fatal(err)
	}
	if checks.Checked != 2 || len(checks.Faulty) != 1 || string(checks.Faulty[0].Lock.Resource) != bad || checks.Faulty[0].Problems[0].Kind != string(verify.Deleted) {
		t.Errorf("%+v", checks)
	}
	var e inspect.Events
	if err := call(c, f.reader, inspect.ProcEvents, inspect.EventsRequest{Limit: 1}, &e); err != nil || len(e.Events) != 1 || e.Events[0].Kind != "acquired" {
		t.Errorf("%+v, %v", e, err)
	}
	after := e.Next
	if err := call(c, f.reader, inspect.ProcEvents, inspect.EventsRequest{After: after}, &e); err != nil || len(e.Events) != 1 || e.Events[0].Seq != after+1 {
		t.Errorf("%+v, %v", e, err)
	}
}

func TestRelease(t *testing.T) {
	t.Parallel()
	f, c := newFixture(t), new(rpc.Client)
	path := f.acquire("a", 5, 0)
	req := inspect.ReleaseRequest{Resource: inspect.Text(path)}
	looker := new(rpc.Client)
	looker.SetReadOnly()
	var refused *rpc.Error
	if err := call(looker, f.writer, inspect.ProcRelease, req, nil); !errors.As(err, &refused) || refused.Code != rpc.CodeOperationDenied {
		t.Errorf("by somebody who can only look: %v", err)
	}
	var done inspect.Released
	if err := call(c, f.writer, inspect.ProcRelease, req, &done); err != nil || done.Owner.PID != 5 || done.Left != 0 {
		t.Errorf("%+v, %v", done, err)
	}
	if err := call(c, f.writer, inspect.ProcRelease, req, nil); !errors.As(err, &refused) || refused.Code != rpc.CodeOperationInvalid {
		t.Errorf("for the second time: %v", err)
	}
}

func TestUnknownProcedures(t *testing.T) {
	t.Parallel()
	f, c := newFixture(t), new(rpc.Client)
	for _, proc := range []uint32{0, 6, 1 << 31} {
		for _, p := range []rpc.Program{f.reader, f.writer} {
			if _, err := p.Call(c, proc, nil, nil); !errors.Is(err, rpc.ErrNoProc) {
				t.Errorf("procedure %d: %v", proc, err)
			}
		}
	}
}

// Whatever comes, there is an answer.
func FuzzCall(f *testing.F) {
	x := newFixture(f)
	x.acquire("kept", 7, lockspace.Shared)
	for _, v := range []any{inspect.Part{}, inspect.Part{From: 1, Limit: 2}, inspect.EventsRequest{After: 1},
		inspect.ReleaseRequest{Resource: "a\xff"}, inspect.ReleaseRequest{PID: new(int32(1))}, nil, []int{1}} {
		b, err := inspect.Append(nil, v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(uint32(inspect.ProcLocks), b)
		f.Add(uint32(inspect.ProcEvents), b)
		f.Add(uint32(inspect.ProcCheck), b)
		f.Add(uint32(inspect.ProcRelease), b)
		f.Add(uint32(inspect.ProcResume), b)
	}
	f.Fuzz(func(t *testing.T, proc uint32, payload []byte) {
		c := new(rpc.Client)
		for _, p := range []rpc.Program{x.reader, x.writer} {
			out, err := p.Call(c, proc, payload, []byte("1234"))
			var answer *rpc.Error
			switch {
			case err == nil:
				d := xdr.NewDecoder(out[4:])
				if d.Bytes(inspect.MaxReply); len(out) > 4 && (d.Err() != nil || len(d.Remaining()) > 0) {
					t.Errorf("procedure %d answers %q", proc, out)
				}
			case errors.Is(err, rpc.ErrNoProc), errors.Is(err, rpc.ErrDecode), errors.As(err, &answer):
			default:
				t.Errorf("procedure %d fails of %v", proc, err)
			}
		}
	})
}
