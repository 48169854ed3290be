// SPDX-License-Identifier: LGPL-2.1-or-later

package killpoint

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// Paths of locks: one that is not touched, one that another owner shares, and those of the request.
const (
	witness = host.Data + "/witness"
	shared  = host.Data + "/shared"
	disk    = host.Data + "/disk"
	lease   = host.Data + "/lease"
	space   = host.Data + "/space"
)

// Owners whose process ids belong to no process: the kernel gives none above 4194304.
const noOne = 0x70000001

// kept is a host with a keeper and its daemon, a guest, and locks of somebody else that no crash may touch.
type kept struct {
	*host.Host
	*host.Daemon
	t       testing.TB
	guest   *host.Process
	bystand *wire.Conn
	waiters []*host.Waiter
}

func startKept(t testing.TB) *kept {
	t.Helper()
	h := host.New(t)
	k := &kept{Host: h, t: t}
	k.Daemon = h.Start(host.Ours(t), host.Options{Args: []string{"--keeper"}, Config: "log_level = 2\n"})
	t.Cleanup(k.EndKept)
	k.guest = h.Spawn(host.ProcessOptions{})
	for _, path := range []string{witness, shared, disk} {
		h.WriteFile(path, "", 0o644)
	}
	k.bystand = k.Client(noOne)
	must(t, k.bystand.Acquire("", witness, 0))
	must(t, k.bystand.Acquire("", shared, wire.Shared))
	for _, path := range []string{witness, shared} {
		k.waiters = append(k.waiters, host.Wait(t, h.Path(path)))
	}
	return k
}

// client is a connection of the guest.
func (k *kept) client() *wire.Conn {
	k.t.Helper()
	c := k.guest.Dial(k.Daemon, "lock")
	must(k.t, c.Register(wire.VM(k.guest.PID())))
	return c
}

// trace begins to trace the daemon, which must be another one than before.
func (k *kept) trace(before int) (pid int, trace *Trace) {
	k.t.Helper()
	if !host.Eventually(func() bool { pid = k.Kept(); return pid != 0 && pid != before }) {
		k.t.Fatalf("there is no daemon after process %d\n%s", before, host.Shorten(k.Stderr()))
	}
	must(k.t, k.bystand.Ping()) // it serves, and nothing of its start is counted
	trace, err := Attach(pid)
	must(k.t, err)
	return pid, trace
}

// request is one kind of request, with what there is before it.
type request struct {
	name         string
	unregistered bool // it is the connection's first one
	before       func(c *wire.Conn) error
	proc         uint32
	args         []byte
	next         []byte                   // another request, sent together with this one
	path         string                   // of the lock that it takes or gives up
	takes, gives bool                     // which of these
	after        func(c *wire.Conn) error // it was not answered: asks for it again, and undoes it
}

func resource(path string, flags uint32) []byte { return wire.ResourceArgs("", path, flags) }

// again takes the lock, unless the guest has it, and gives it up.
func again(path string, flags uint32) func(*wire.Conn) error {
	return func(c *wire.Conn) error {
		if err := c.Acquire("", path, flags); err != nil && !wire.IsLocked(err) {
			return err
		}
		return c.Release("", path)
	}
}

// againShared is again for a lock that an owner can have more than once.
func againShared(c *wire.Conn) error {
	err := c.Acquire("", shared, wire.Shared)
	for n := 0; err == nil; n++ {
		if err = c.Release("", shared); err != nil && n > 0 {
			return nil // that was all; somebody else has it still
		}
	}
	return err
}

func acquired(path string, flags uint32) func(*wire.Conn) error {
	return func(c *wire.Conn) error { return c.Acquire("", path, flags) }
}

var requests = []request{
	{name: "acquire disk", proc: wire.ProcAcquire, args: resource(disk, 0), path: disk, takes: true, after: again(disk, 0)},
	{name: "acquire lease", proc: wire.ProcAcquire, args: resource(lease, wire.Autocreate), path: lease, takes: true, after: again(lease, wire.Autocreate)},
	{name: "acquire shared", proc: wire.ProcAcquire, args: resource(shared, wire.Shared), after: againShared},
	{name: "release disk", before: acquired(disk, 0), proc: wire.ProcRelease, args: resource(disk, 0), path: disk, gives: true, after: again(disk, 0)},
	{name: "release lease", before: acquired(lease, wire.Autocreate), proc: wire.ProcRelease, args: resource(lease, 0), path: lease, gives: true, after: again(lease, wire.Autocreate)},
	{name: "release shared", before: acquired(shared, wire.Shared), proc: wire.ProcRelease, args: resource(shared, 0), after: againShared},
	{name: "acquire and release", proc: wire.ProcAcquire, args: resource(disk, 0), next: wire.Request(wire.ProcRelease, 8, resource(disk, 0)), after: again(disk, 0)},
	{name: "register first", unregistered: true, proc: wire.ProcRegister, after: again(disk, 0)},
	{name: "restrict", proc: wire.ProcRestrict, args: wire.FlagsArgs(0), after: again(disk, 0)},
	{name: "create lockspace", proc: wire.ProcCreateLockspace, args: wire.LockspaceArgs(space), after: func(c *wire.Conn) error {
		if err := c.CreateLockspace(space); err != nil && !strings.Contains(err.Error(), "exists") {
			return err
		}
		if err := c.Acquire(space, "x", wire.Autocreate); err != nil {
			return err
		}
		return c.Release(space, "x")
	}},
}

// A daemon that is killed at any point of a request, before or after any of its system calls, is followed by one that answers it or
// has closed the connection. What was confirmed is so; what was not has taken effect wholly or not at all; no lock is held for nobody.
func TestRequest(t *testing.T) {
	t.Parallel()
	for _, r := range requests {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			k := startKept(t)
			usual, pid := k.round(r, Never, nil, 0)
			if len(usual) < 4 {
				t.Fatalf("it took the points %v: nothing was tested", usual)
			}
			for at := range usual {
				_, pid = k.round(r, at, usual, pid)
				if t.Failed() {
					break
				}
			}
			t.Logf("%d kills: %v", len(usual), usual)
			// The guest was never taken for one that had hung up.
			if k.guest.Dead() {
				t.Error("the guest was ended")
			}
			must(t, k.bystand.Release("", witness))
			must(t, k.bystand.Release("", shared))
			for _, w := range k.waiters {
				w.Wakes()
			}
			if code := k.Stop(); code != 0 {
				t.Errorf("exit code %d", code)
			}
			for _, bad := range []string{"not safe from a crash", "is not kept", "not understood", "is not given up"} {
				if strings.Contains(k.Stderr(), bad) {
					t.Errorf("the log says %q\n%s", bad, host.Shorten(k.Stderr()))
				}
			}
		})
	}
}

// settled is how long no point is reached when a request is over. It only matters to how many points there are.
const settled = 20 * time.Millisecond

// round makes a request and kills the daemon at one of its points, or after the last one. It returns the points that were reached.
func (k *kept) round(r request, at int, usual []Point, before int) (points []Point, pid int) {
	t := k.t
	t.Helper()
	var c *wire.Conn
	args := r.args
	if r.unregistered {
		c = k.guest.Dial(k.Daemon, "lock")
		args = wire.RegisterArgs(wire.VM(k.guest.PID()))
	} else {
		c = k.client()
	}
	defer func() { c.Close() }()
	if r.before != nil {
		must(t, r.before(c))
	}
	pid, trace := k.trace(before)
	trace.Kill(at)
	must(t, c.Send(append(wire.Request(r.proc, 7, args), r.next...)))
	answered := k.recv(c, trace)
	if r.next != nil {
		answered = answered && k.recv(c, trace)
	}
	// It may be killed after the answer.
	ended := func() bool {
		select {
		case <-trace.Ended():
			return true
		default:
			return false
		}
	}
	if !host.Eventually(func() bool { return ended() || trace.Quiet() > settled }) {
		t.Fatal("the daemon does not come to rest")
	}
	if !ended() {
		must(t, unix.Kill(pid, unix.SIGKILL))
		<-trace.Ended()
	}
	must(t, trace.Err())
	points = trace.Points()
	where := "at rest"
	if at != Never && len(points) > 0 {
		where = points[len(points)-1].String()
	}

	if err := c.Ping(); err != nil { // what it is on the other connection, too
		if !errors.Is(err, wire.ErrClosed) {
			t.Fatalf("%s: %v", where, err)
		}
		c.Close()
		c = k.client()
	}
	must(t, k.bystand.Ping())
	locked := r.path != "" && !k.Free(r.path, true)
	switch {
	case answered && r.takes && !locked:
		t.Errorf("%s (point %d of %v): a lock that was confirmed is free", where, at, points)
	case answered && r.gives && locked:
		t.Errorf("%s (point %d of %v): a lock is held that was given up", where, at, points)
	case answered || !slices.Equal(points, usual[:min(len(points), len(usual))]):
	case r.takes && locked && at < replies(usual):
		t.Errorf("%s (point %d of %v): a lock is held that nobody was told of", where, at, points)
	case r.gives && locked && at > 1: // after the request was read
		t.Errorf("%s (point %d of %v): a release is not completed", where, at, points)
	}
	if answered && r.takes {
		must(t, c.Release("", r.path))
	} else if err := r.after(c); err != nil && r.proc != wire.ProcRestrict {
		t.Errorf("%s (point %d of %v; answered: %v): %v", where, at, points, answered, err)
	}
	for _, path := range []string{disk, lease} {
		if !k.Free(path, true) {
			t.Errorf("%s (point %d of %v): %s is held for nobody", where, at, points, path)
		}
	}
	if k.Exists(lease) {
		t.Errorf("%s (point %d of %v): the lease file is left", where, at, points)
	}
	for _, w := range k.waiters {
		w.Asleep()
	}
	return points, pid
}

// recv tells whether an answer comes; else the connection has been closed.
func (k *kept) recv(c *wire.Conn, trace *Trace) bool {
	t := k.t
	t.Helper()
	reply, err := c.RecvWithin(host.Patience)
	switch {
	case errors.Is(err, wire.ErrClosed):
		return false
	case errors.Is(err, os.ErrDeadlineExceeded):
		t.Fatalf("%v: neither an answer nor an end\n%s", trace.Points(), host.Shorten(k.Stderr()))
	case err != nil:
		t.Fatal(err)
	}
	must(t, reply.Err())
	return true
}

// replies returns the point at which the answer is sent.
func replies(points []Point) int {
	for i, p := range slices.Backward(points) {
		if p == (Point{Call: unix.SYS_SENDTO}) {
			return i
		}
	}
	return -1
}
