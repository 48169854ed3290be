// SPDX-License-Identifier: LGPL-2.1-or-later

package killpoint

import (
	"strings"
	"testing"

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

// noOne is an owner whose process id belongs to no process: the kernel gives none above 4194304.
const noOne = 0x70000001

// stage is a host with a daemon, a guest, and locks of somebody else that no crash may touch.
type stage struct {
	*host.Host
	*host.Daemon
	t       testing.TB
	guest   *host.Process
	bystand *wire.Conn
	waiters []*host.Waiter
}

// populate is called when there is a daemon.
func (s *stage) populate() {
	t := s.t
	t.Helper()
	s.guest = s.Spawn(host.ProcessOptions{})
	for _, path := range []string{witness, shared, disk} {
		s.WriteFile(path, "", 0o644)
	}
	s.bystand = s.Client(noOne)
	must(t, s.bystand.Acquire("", witness, 0))
	must(t, s.bystand.Acquire("", shared, wire.Shared))
	for _, path := range []string{witness, shared} {
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
	for _, path := range []string{disk, lease} {
		if !s.Free(path, true) {
			s.t.Errorf("%s: %s is held for nobody", when, path)
		}
	}
	if s.Exists(lease) {
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
	must(t, s.bystand.Release("", shared))
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
