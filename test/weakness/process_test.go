// SPDX-License-Identifier: LGPL-2.1-or-later

package weakness

import (
	"fmt"
	"strings"
	"syscall"
	"testing"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// A lock ends when its owner is dead, not before: the next guest must not start while the last one still writes.
func TestW07ReleaseAfterDeath(t *testing.T) {
	t.Parallel()
	for _, flags := range []uint32{0, wire.Autocreate, wire.Shared, wire.Shared | wire.Autocreate} {
		t.Run(fmt.Sprint(flags), func(t *testing.T) {
			t.Parallel()
			h, d := start(t, host.Options{})
			a := path("a")
			if flags&wire.Autocreate == 0 {
				touch(h, a)
			}
			p, vm := guest(t, h, d, host.ProcessOptions{}, a, flags)
			p.IgnoreTerm()
			vm.Close()
			eventually(t, "lock is free", func() bool {
				free := h.Free(a, true)
				if free && !p.Dead() {
					t.Fatal("lock is free while its owner lives")
				}
				return free
			})
			p.Gone()
		})
	}
}

// The same as seen by the next owner on this host; and a zombie is dead.
func TestW07NextOwner(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	a := path("a")
	p, vm := guest(t, h, d, host.ProcessOptions{Zombie: true}, a, wire.Autocreate)
	p.IgnoreTerm()
	vm.Close()
	next := d.Client(noOne)
	eventually(t, "next owner gets the lock", func() bool {
		err := next.Acquire("", a, wire.Autocreate)
		if err == nil && !p.Dead() {
			t.Fatal("two owners at the same time")
		}
		return err == nil
	})
	// Nobody has reaped it yet, and nobody waited for that.
	if err := syscall.Kill(p.PID(), 0); err != nil {
		t.Errorf("not a zombie: %v", err)
	}
}

// An owner that holds a shared lock twice leaves nothing behind.
func TestW08SharedTwice(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	a := path("a")
	p, vm := guest(t, h, d, host.ProcessOptions{}, a, wire.Shared|wire.Autocreate)
	must(t, vm.Acquire("", a, wire.Shared))
	must(t, vm.Acquire("", a, wire.Shared))
	vm.Close()
	p.Gone()
	next := d.Client(noOne)
	eventually(t, "resource is free", func() bool { return next.Acquire("", a, wire.Autocreate) == nil })
}

// Stopping the daemon gives locks up, with a line for each, and kills nobody.
func TestW18StopKillsNobody(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			h, d := start(t, host.Options{})
			p, vm := guest(t, h, d, host.ProcessOptions{}, path("a"), wire.Autocreate)
			must(t, vm.Acquire("", path("b"), wire.Autocreate|wire.Shared))
			d.Signal(sig)
			if got := d.Wait(); got != 0 {
				t.Errorf("exit status %d", got)
			}
			if host.Within(moment, p.Dead) {
				t.Fatal("owner was killed")
			}
			for _, f := range []string{path("a"), path("b"), d.SocketPath("lock"), d.SocketPath("admin")} {
				if h.Exists(f) {
					t.Errorf("%s is left", f)
				}
			}
			for _, f := range []string{path("a"), path("b")} {
				if !hasLine(d.Stderr(), f, "vm", "11111111-1111-1111-1111-111111111111", fmt.Sprint(p.PID())) {
					t.Errorf("no line of the log tells of %s:\n%s", f, d.Stderr())
				}
			}
		})
	}
}

// hasLine tells whether one line has all the words.
func hasLine(text string, words ...string) bool {
	for line := range strings.Lines(text) {
		all := true
		for _, w := range words {
			all = all && strings.Contains(line, w)
		}
		if all {
			return true
		}
	}
	return false
}

// The operator can't end a guest by closing its connection, but close any other.
func TestW18ClientDisconnectKillsNobody(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	a := path("a")
	p, vm := guest(t, h, d, host.ProcessOptions{}, a, wire.Autocreate)
	other := d.Client(p.PID())
	admin := d.Dial("admin")
	must(t, admin.AdminOpen())
	clients, err := admin.AdminClients(wire.LockServer)
	must(t, err)
	if len(clients) != 2 {
		t.Fatalf("%d clients, want 2", len(clients))
	}
	refusal := wire.AsError(admin.AdminClientClose(wire.LockServer, clients[0].ID))
	if refusal == nil || !strings.Contains(refusal.Text(), fmt.Sprint(p.PID())) {
		t.Errorf("a guest's own connection: got %v, want an error that names process %d", refusal, p.PID())
	}
	must(t, vm.Ping())
	must(t, admin.AdminClientClose(wire.LockServer, clients[1].ID))
	if m, err := other.Recv(); err != wire.ErrClosed {
		t.Errorf("connection is still open: %v %v", m, err)
	}
	if host.Within(moment, p.Dead) {
		t.Fatal("owner was killed")
	}
	if h.Free(a, false) {
		t.Error("lock of a living owner was given up")
	}
	p.Kill()
	eventually(t, "lock of a dead owner is given up", func() bool { return !h.Exists(a) })
}

// A connection that the daemon closes because of what came in on it is not its owner's end.
func TestW18ProtocolErrorKillsNobody(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	a := path("a")
	p, vm := guest(t, h, d, host.ProcessOptions{}, a, wire.Autocreate)
	must(t, vm.Send(make([]byte, 40)))
	if m, err := vm.Recv(); err != wire.ErrClosed {
		t.Errorf("connection is still open: %v %v", m, err)
	}
	vm.Close()
	if host.Within(moment, p.Dead) {
		t.Fatal("owner was killed")
	}
	if h.Free(a, false) {
		t.Error("lock of a living owner was given up")
	}
}
