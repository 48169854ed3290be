// SPDX-License-Identifier: LGPL-2.1-or-later

package lockproto

import (
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/filelock"
	"virtlockd/internal/lockspace"
	"virtlockd/internal/owner"
	"virtlockd/internal/poll"
	"virtlockd/internal/rpc"
	"virtlockd/internal/state"
	"virtlockd/test/wire"
)

// The protocol's answers are compared with the C daemon's in test/vectors and test/differential. Here is
// what needs a look from inside.

const strangerPID = 0x70000001 // no process has it

// bench is a server of the lock program.
type bench struct {
	*testing.T
	table   *lockspace.Table
	program *Program
	server  *rpc.Server
	dir     string
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{T: t, dir: t.TempDir()}
	files, err := filelock.New(filelock.Config{})
	if err != nil {
		t.Fatal(err)
	}
	p, err := poll.New()
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	b.table = lockspace.New(lockspace.Config{Locker: files, Logger: log})
	owners := owner.NewRegistry(owner.Config{Poller: p, Logger: log, Died: b.table.ReleaseOwner})
	b.program = New(Config{Table: b.table, Owners: owners, Logger: log})
	b.server = rpc.NewServer(p, rpc.Config{MaxClients: 100, AllowUID: uint32(os.Geteuid()), MaxMessage: MaxMessage, Programs: []rpc.Program{b.program}, Logger: log})
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrUnix{Name: b.path("s")})
	}
	if err == nil {
		err = b.server.Listen(fd)
	}
	if err != nil {
		t.Fatal(err)
	}
	go p.Run(t.Context())
	t.Cleanup(func() {
		b.server.Shutdown()
		b.table.Close()
		owners.Close()
		p.Close()
		files.Close()
	})
	return b
}

func (b *bench) path(name string) string { return filepath.Join(b.dir, name) }

// client returns one that has registered the owner.
func (b *bench) client(pid int) *wire.Conn {
	b.Helper()
	c, err := wire.Dial(b.path("s"), wire.LockProgram)
	if err == nil {
		err = c.Register(wire.VM(pid))
	}
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(c.Close)
	return c
}

func (b *bench) must(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// gone waits until the server has forgotten all clients but n.
func (b *bench) gone(n int) {
	b.Helper()
	for end := time.Now().Add(20 * time.Second); b.server.Count() > n; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			b.Fatal("a client that has closed is still there")
		}
	}
}

// A lock whose reply was read is not undone because a later call's reply gets lost, not even a call that the
// program does not have.
func TestDeliveredLockStays(t *testing.T) {
	for _, proc := range []uint32{0, 99, wire.ProcRestrict, wire.ProcRelease} {
		b := newBench(t)
		c := b.client(strangerPID)
		b.must(c.Acquire("", b.path("disk"), wire.Autocreate))
		// So many that the client has gone before the last ones are answered.
		args := wire.ResourceArgs("", b.path("other"), 0)
		b.must(c.Send(slices.Repeat(wire.Request(proc, 1, args), 500)))
		c.Close()
		b.gone(0)
		if n := b.table.Held(); n != 1 {
			t.Errorf("procedure %d: %d locks are held, want 1", proc, n)
		}
	}
}

// What a connection has said comes back after a hand-over, and only an acquisition whose own reply is
// still owed is to be undone.
func TestSaveRestore(t *testing.T) {
	b := newBench(t)
	c := b.client(os.Getpid())
	b.must(c.Acquire("", b.path("disk"), wire.Autocreate))
	b.must(c.Restrict())
	if running := b.server.Freeze(time.Now().Add(time.Minute)); len(running) > 0 {
		t.Fatalf("running: %v", running)
	}
	var owners []*owner.Owner
	place := func(o *owner.Owner) int32 {
		owners = append(owners, o)
		return int32(len(owners) - 1)
	}
	client := b.server.Clients()[0]
	saved := client.Save()
	b.program.Save(client, place, &saved)
	want := state.Details{Name: wire.VM(0).Name, UUID: wire.VM(0).UUID, ID: wire.VM(0).ID, PID: int32(os.Getpid())}
	if !saved.Registered || !saved.Restricted || saved.Owner != want || saved.Self != 0 || saved.Undo != nil {
		t.Errorf("saved: %+v", saved)
	}

	before := client.Session
	if err := b.program.Restore(client, &saved, owners); err != nil {
		t.Fatal(err)
	}
	s := client.Session.(*session)
	if s.owner == nil || state.Details(*s.owner) != want || !s.restricted || s.self.Load() != owners[0] {
		t.Errorf("restored: %+v", s)
	}
	s.forget()
	client.Session = before
	if g := b.program.Guards(client); g == nil || g.Name != want.Name {
		t.Errorf("the connection guards %v", g)
	}
	b.server.Thaw()
	// Else the hang-up at the end would be that of a guest with a lock, which is us.
	b.must(b.client(os.Getpid()).Release("", b.path("disk")))
}
