// SPDX-License-Identifier: LGPL-2.1-or-later

package killpoint

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// startKept starts a daemon with a keeper.
func startKept(t testing.TB, p places) *stage {
	t.Helper()
	h := host.New(t)
	s := &stage{Host: h, t: t, Daemon: h.Start(host.Ours(t), host.Options{Args: []string{"--keeper"}, Config: "log_level = 2\n"})}
	t.Cleanup(s.EndKept)
	s.populate(p)
	return s
}

// trace begins to trace the daemon, which must be another one than before.
func (s *stage) trace(before int) (pid int, trace *Trace) {
	s.t.Helper()
	if !host.Eventually(func() bool { pid = s.Kept(); return pid != 0 && pid != before }) {
		s.t.Fatalf("there is no daemon after process %d\n%s", before, host.Shorten(s.Stderr()))
	}
	must(s.t, s.bystand.Ping()) // it serves, and nothing of its start is counted
	const confirmed = 50 * time.Millisecond
	time.Sleep(confirmed)  // nor that it looks at all locks, 20 ms after its start; if it is late, it is not at rest:
	host.Settled(s.t, pid) // and knows that the reply was sent
	trace, err := Attach(pid)
	must(s.t, err)
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
func againShared(path string) func(*wire.Conn) error {
	return func(c *wire.Conn) error {
		err := c.Acquire("", path, wire.Shared)
		for n := 0; err == nil; n++ {
			if err = c.Release("", path); err != nil && n > 0 {
				return nil // that was all; somebody else has it still
			}
		}
		return err
	}
}

func acquired(path string, flags uint32) func(*wire.Conn) error {
	return func(c *wire.Conn) error { return c.Acquire("", path, flags) }
}

// onFiles are those requests whose points depend on where the file is.
func onFiles(p places) []request {
	return []request{
		{name: "acquire disk", proc: wire.ProcAcquire, args: resource(p.disk, 0), path: p.disk, takes: true, after: again(p.disk, 0)},
		{name: "acquire lease", proc: wire.ProcAcquire, args: resource(p.lease, wire.Autocreate), path: p.lease, takes: true, after: again(p.lease, wire.Autocreate)},
		{name: "acquire shared", proc: wire.ProcAcquire, args: resource(p.shared, wire.Shared), after: againShared(p.shared)},
		{name: "release disk", before: acquired(p.disk, 0), proc: wire.ProcRelease, args: resource(p.disk, 0), path: p.disk, gives: true, after: again(p.disk, 0)},
		{name: "release lease", before: acquired(p.lease, wire.Autocreate), proc: wire.ProcRelease, args: resource(p.lease, 0), path: p.lease, gives: true, after: again(p.lease, wire.Autocreate)},
		{name: "release shared", before: acquired(p.shared, wire.Shared), proc: wire.ProcRelease, args: resource(p.shared, 0), after: againShared(p.shared)},
	}
}

var requests = append(onFiles(local), []request{
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
}...)

// A daemon that is killed at any point of a request, before or after any of its system calls, is followed by one that answers it or
// has closed the connection. What was confirmed is so; what was not has taken effect wholly or not at all; no lock is held for nobody.
func TestRequest(t *testing.T) { killAtEach(t, local, requests) }

// The same where the daemon leaves a file to worker processes.
func TestRequestByWorker(t *testing.T) { killAtEach(t, remote, onFiles(remote)) }

func killAtEach(t *testing.T, p places, requests []request) {
	t.Parallel()
	for _, r := range requests {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			s := startKept(t, p)
			usual, pid := s.round(r, Never, nil, 0)
			if len(usual) < 4 {
				t.Fatalf("it took the points %v: nothing was tested", usual)
			}
			for at := range usual {
				_, pid = s.round(r, at, usual, pid)
				if t.Failed() {
					break
				}
			}
			t.Logf("%d kills: %v", len(usual), usual)
			s.end()
		})
	}
}

// round makes a request and kills the daemon at one of its points, or after the last one. It returns the points that were reached.
func (s *stage) round(r request, at int, usual []Point, before int) (points []Point, pid int) {
	t := s.t
	t.Helper()
	s.nextGuest()
	var c *wire.Conn
	args := r.args
	if r.unregistered {
		c = s.guest.Dial(s.Daemon, "lock")
		args = wire.RegisterArgs(wire.VM(s.guest.PID()))
	} else {
		c = s.client()
	}
	defer func() { c.Close() }()
	if r.before != nil {
		must(t, r.before(c))
	}
	pid, trace := s.trace(before)
	trace.Kill(at)
	must(t, c.Send(append(wire.Request(r.proc, 7, args), r.next...)))
	answered := false
	if r.next == nil {
		answered = s.recv(c, trace)
	}
	// It may be killed after the answer.
	must(t, trace.Finish(func() bool { return true }))
	if r.next != nil { // the first answer lies there, unread, when the second request is executed
		if answered = s.recv(c, trace); answered {
			answered = s.recv(c, trace)
		}
	}
	points = trace.Points()
	where := fmt.Sprintf("killed at the end of %v", points)

	if err := c.Ping(); err != nil { // what it is on the other connection, too
		if !errors.Is(err, wire.ErrClosed) {
			t.Fatalf("%s: %v", where, err)
		}
		c.Close()
		c = s.client()
	}
	must(t, s.bystand.Ping())
	locked := r.path != "" && !s.Free(r.path, true)
	// A worker process may outlive the daemon for a moment.
	stays := func() bool {
		return locked && !(s.places == remote && host.Eventually(func() bool { return s.Free(r.path, true) }))
	}
	switch {
	case answered && r.takes && !locked:
		t.Errorf("%s: a lock that was confirmed is free", where)
	case answered && r.gives && locked:
		t.Errorf("%s: a lock is held that was given up", where)
	case answered || !slices.Equal(points, usual[:min(len(points), len(usual))]):
	case r.takes && at < replies(usual) && stays():
		t.Errorf("%s: a lock is held that nobody was told of", where)
	case r.gives && at > 1 && stays(): // after the request was read
		t.Errorf("%s: a release is not completed", where)
	}
	if answered && r.takes {
		must(t, c.Release("", r.path))
	} else if err := r.after(c); err != nil && r.proc != wire.ProcRestrict {
		t.Errorf("%s (answered: %v): %v", where, answered, err)
	}
	s.holds(where)
	return points, pid
}

// recv tells whether an answer comes; else the connection has been closed.
func (s *stage) recv(c *wire.Conn, trace *Trace) bool {
	t := s.t
	t.Helper()
	reply, err := c.RecvWithin(host.Patience)
	switch {
	case errors.Is(err, wire.ErrClosed):
		return false
	case errors.Is(err, os.ErrDeadlineExceeded):
		t.Fatalf("%v: neither an answer nor an end\n%s", trace.Points(), host.Shorten(s.Stderr()))
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
