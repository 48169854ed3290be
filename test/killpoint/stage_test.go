// SPDX-License-Identifier: LGPL-2.1-or-later

package killpoint

import (
	"path/filepath"
	"strings"
	"testing"

	"virtlockd/test/host"
	"virtlockd/test/slowdisk"
	"virtlockd/test/wire"
)

const (
	witness = host.Data + "/witness" // a lock that is not touched
	space   = host.Data + "/space"
)

// places are paths of locks: one that another owner shares, and those of the request.
type places struct{ shared, disk, lease string }

func in(dir string) places { return places{dir + "/shared", dir + "/disk", dir + "/lease"} }

// local are places on which the daemon works itself, remote those that it leaves to worker processes.
var local, remote = in(host.Data), in("/tmp/slow")

const disk = host.Data + "/disk" // of local

// noOne is an owner whose process id belongs to no process: the kernel gives none above 4194304.
const noOne = 0x70000001

// stage is a host with a daemon, a guest, and locks of somebody else that no crash may touch.
type stage struct {
	*host.Host
	*host.Daemon
	places
	t       testing.TB
	guest   *host.Process
	bystand *wire.Conn
	waiters []*host.Waiter
}

// populate is called when there is a daemon.
func (s *stage) populate(p places) {
	t := s.t
	t.Helper()
	s.places = p
	s.guest = s.Spawn(host.ProcessOptions{})
	s.WriteFile(witness, "", 0o644)
	if p == remote {
		d := slowdisk.Mount(t, s, filepath.Dir(p.disk), slowdisk.Options{})
		d.Add(filepath.Base(p.shared))
		d.Add(filepath.Base(p.disk))
	} else {
		s.WriteFile(p.shared, "", 0o644)
		s.WriteFile(p.disk, "", 0o644)
	}
	s.bystand = s.Client(noOne)
	must(t, s.bystand.Acquire("", witness, 0))
	must(t, s.bystand.Acquire("", p.shared, wire.Shared))
	for _, path := range []string{witness, p.shared} {
		s.waiters = append(s.waiters, host.Wait(t, s.Path(path)))
	}
}

// nextGuest lets another guest take the part of the last one. When the daemon notices that a connection of that was closed is not known,
// and if the guest held a lock then, it would be ended.
func (s *stage) nextGuest() {
	s.t.Helper()
	s.mustLive()
	s.guest.Kill()
	s.guest = s.Spawn(host.ProcessOptions{})
}

// mustLive checks that the guest was not ended.
func (s *stage) mustLive() {
	s.t.Helper()
	if s.guest.Dead() {
		s.t.Error("the guest was ended, as one that had hung up")
	}
}

// client is a connection of the guest.
func (s *stage) client() *wire.Conn {
	s.t.Helper()
	c := s.guest.Dial(s.Daemon, "lock")
	must(s.t, c.Register(wire.VM(s.guest.PID())))
	return c
}

// holds checks that no lock but those of the bystander is held, and was at no time free.
func (s *stage) holds(when string) {
	s.t.Helper()
	for _, path := range []string{s.disk, s.lease} {
		if !s.Free(path, true) {
			s.t.Errorf("%s: %s is held for nobody", when, path)
		}
	}
	if s.Exists(s.lease) {
		s.t.Errorf("%s: the lease file is left", when)
	}
	for _, w := range s.waiters {
		w.Asleep()
	}
}

// end checks that all was well, and lets the bystander give up its locks.
func (s *stage) end() {
	t := s.t
	t.Helper()
	s.mustLive()
	must(t, s.bystand.Release("", witness))
	must(t, s.bystand.Release("", s.shared))
	for _, w := range s.waiters {
		w.Wakes()
	}
	if code := s.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	for _, bad := range []string{"not safe from a crash", "is not kept", "not understood", "is not given up"} {
		if strings.Contains(s.Stderr(), bad) {
			t.Errorf("the log says %q\n%s", bad, host.Shorten(s.Stderr()))
		}
	}
}
