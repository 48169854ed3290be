// SPDX-License-Identifier: LGPL-2.1-or-later

package adminproto_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/internal/adminproto"
	"virtlockd/internal/owner"
	"virtlockd/internal/poll"
	"virtlockd/internal/rpc"
	"virtlockd/test/wire"
)

// bench is two servers on real sockets, with the program on the second.
type bench struct {
	t     testing.TB
	dir   string
	lock  *rpc.Server
	admin *rpc.Server
	cfg   adminproto.Config
	prog  *adminproto.Program
	peers peers
	logs  fakeLogs
}

// peers is the lock program: it answers everything, and remembers how clients went.
type peers struct {
	mu     sync.Mutex
	byPeer map[uint64]bool
	closed chan uint64
}

func (*peers) ID() (program, version uint32) { return wire.LockProgram, wire.Version }

func (*peers) Call(_ *rpc.Client, _ uint32, _, out []byte) ([]byte, error) { return out, nil }

func (*peers) Undo(*rpc.Client) {}

func (p *peers) Closed(c *rpc.Client, byPeer bool) {
	p.mu.Lock()
	p.byPeer[c.ID()] = byPeer
	p.mu.Unlock()
	p.closed <- c.ID()
}

// fakeLogs fails where it is told to.
type fakeLogs struct {
	mu               sync.Mutex
	filters, outputs string
	nfilters         int
	err              error
}

func (l *fakeLogs) set(s *string, v string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err == nil {
		*s = v
	}
	return l.err
}

func (l *fakeLogs) SetFilters(s string) error { return l.set(&l.filters, s) }
func (l *fakeLogs) SetOutputs(s string) error { return l.set(&l.outputs, s) }

func (l *fakeLogs) Filters() (string, int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.filters, l.nfilters
}

func (l *fakeLogs) Outputs() (string, int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.outputs, 1
}

var errNotWanted = errors.New("not wanted here")

// newBench starts the servers. change may change what the program gets.
func newBench(t testing.TB, lock, admin rpc.Limits, change func(*bench)) *bench {
	t.Helper()
	b := &bench{t: t, dir: t.TempDir(), peers: peers{byPeer: map[uint64]bool{}, closed: make(chan uint64, 64)}}
	b.cfg = adminproto.Config{
		Servers:    func() []*rpc.Server { return []*rpc.Server{b.admin, b.lock} },
		Logs:       &b.logs,
		Guards:     func(*rpc.Client) *owner.Details { return nil },
		SetTimeout: func(uint32) {},
		Shutdown:   func(bool) (func(), error) { return nil, errNotWanted },
		LibVersion: 9000000,
		Logger:     slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(b)
	}
	p, err := poll.New()
	if err != nil {
		t.Fatal(err)
	}
	ran := make(chan error, 1)
	server := func(name string, l rpc.Limits, program rpc.Program) *rpc.Server {
		return rpc.NewServer(p, rpc.Config{
			Name: name, MaxClients: l.MaxClients, MaxUnauth: l.MaxUnauth,
			MaxMessage: adminproto.MaxMessage, AllowUID: uint32(os.Geteuid()), Programs: []rpc.Program{program},
		})
	}
	b.lock = server("virtlockd", lock, &b.peers)
	b.prog = adminproto.New(b.cfg)
	b.admin = server("admin", admin, b.prog)
	go func() { ran <- p.Run(context.Background()) }()
	t.Cleanup(func() {
		b.admin.Shutdown()
		b.lock.Shutdown()
		p.Close()
		if err := <-ran; err != nil {
			t.Errorf("poller: %v", err)
		}
	})
	b.listen(b.lock, "lock")
	b.listen(b.admin, "admin")
	return b
}

func (b *bench) listen(s *rpc.Server, socket string) {
	b.t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: filepath.Join(b.dir, socket)}); err != nil {
		b.t.Fatal(err)
	}
	if err := s.Listen(fd); err != nil {
		b.t.Fatal(err)
	}
}

// dial connects to the "lock" or "admin" socket.
func (b *bench) dial(socket string) *wire.Conn {
	b.t.Helper()
	program := wire.LockProgram
	if socket == "admin" {
		program = wire.AdminProgram
	}
	c, err := wire.Dial(filepath.Join(b.dir, socket), program)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(c.Close)
	return c
}

var defaults = rpc.Limits{MaxClients: 20, MaxUnauth: 20}
