// SPDX-License-Identifier: LGPL-2.1-or-later

package rpc

import (
	"bytes"
	"context"
	"encoding/binary"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/poll"
	"virtlockd/internal/state"
)

// A closed client's call is undone, also when it is closed because of what came behind that call.
func TestUndoBeyondBudget(t *testing.T) {
	b := serve(t, func(c *Config) { c.MaxKept = 1 << 20 })
	// The first ones fill most of the budget with half requests.
	for range 9 {
		p := b.dial()
		half := request(procEcho, 1, make([]byte, 100<<10))
		p.trySend(half[:len(half)-1])
	}
	eventually(t, "half requests are kept", func() bool { return b.kept.Load() > 900<<10 })
	// How much of a reply does a socket take?
	m := serve(t, nil)
	q := m.dial()
	q.send(request(procBig, 1, u32(3<<20)))
	eventually(t, "a reply is stuck", func() bool { return m.kept.Load() > 0 })
	taken := 3<<20 + headerSize - int(m.kept.Load())
	q.close()
	// One whose rest just fits, with half a request behind it, which does not.
	left := 1<<20 - int(b.kept.Load())
	half := request(procEcho, 2, make([]byte, 100<<10))
	p := b.dial()
	p.send(append(request(procBig, 1, u32(uint32(taken+left-inputSize/2))), half[:inputSize]...))
	b.lab.end(t, 10)
	if n := b.lab.undos(); n != 1 {
		t.Errorf("undone %d calls, want 1", n)
	}
}

type sessions struct{ *lab }

func (sessions) Opened(c *Client) { c.Session = new(atomic.Int32) }

// Whoever finds a client finds its session. The race detector judges.
func TestSessionComesFirst(t *testing.T) {
	b := serve(t, func(c *Config) { c.Programs = []Program{sessions{newLab()}} })
	stop := make(chan struct{})
	var seeking sync.WaitGroup
	seeking.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			for _, c := range b.Clients() {
				c.Session.(*atomic.Int32).Load()
			}
		}
	})
	for range 200 {
		p := b.dial()
		p.send(ping)
		p.recv()
		p.close()
	}
	close(stop)
	seeking.Wait()
}

// What is unsent at a hand-over may be a PONG. The call before it was answered, and is not undone.
func TestUnsentPong(t *testing.T) {
	b := serve(t, nil)
	p, c := b.client() // its call is answered
	// Without waiting: where it has to send us something first, it makes no room for more.
	eventually(t, "a PONG has no room", func() bool {
		for b.kept.Load() == 0 {
			if _, err := unix.SendmsgN(p.fd, ping, nil, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT); err == unix.EAGAIN {
				break // its turn
			} else if err != nil {
				t.Fatal(err)
			}
		}
		return b.kept.Load() > 0
	})
	if running := b.Freeze(time.Now().Add(time.Minute)); len(running) != 0 {
		t.Fatalf("running: %v", running)
	}
	saved := c.Save()
	if c.Owed() || len(saved.Unsent) == 0 {
		t.Fatalf("owed %v, unsent %d bytes", c.Owed(), len(saved.Unsent))
	}
	fd, err := unix.FcntlInt(uintptr(saved.FD), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	saved.FD = int32(fd)
	next := serve(t, nil)
	if err := next.Adopt(&saved, func(*Client) error { return nil }); err != nil {
		t.Fatal(err)
	}
	next.Thaw()
	p.close()
	next.lab.end(t, 1)
	if n := next.lab.undos(); n != 0 {
		t.Errorf("the next server undid %d calls", n)
	}
	b.Thaw()
	b.lab.end(t, 1)
	if n := b.lab.undos(); n != 0 {
		t.Errorf("the first server undid %d calls", n)
	}
}

// A frozen server accepts nobody, and tells which call still runs at the deadline.
func TestFreezeWaits(t *testing.T) {
	b := serve(t, nil)
	p := b.dial()
	p.send(request(procBlock, 1, nil))
	b.blocked()
	running := b.Freeze(time.Now())
	if len(running) != 1 {
		t.Errorf("%d clients run, want 1", len(running))
	}
	late := b.dial()
	late.send(request(procEcho, 1, u32(7)))
	if n := b.Count(); n != 1 {
		t.Errorf("%d clients while frozen, want 1", n)
	}
	b.lab.release <- struct{}{}
	p.recv()
	b.Thaw()
	if got := late.recv(); !bytes.Equal(got, reply(procEcho, 1, u32(7))) {
		t.Errorf("after the thaw: %x", got)
	}
}

// Under load, with requests cut anywhere, each is answered once and in order, whether the server thaws or
// another one goes on from its state file.
func TestFreezeUnderLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	listening := listenAt(path)
	type instance struct {
		*poll.Poller
		*Server
		ended chan error
	}
	start := func() instance {
		p, err := poll.New()
		if err != nil {
			t.Fatal(err)
		}
		s := NewServer(p, Config{Name: "x", MaxClients: 1000, AllowUID: uint32(os.Geteuid()), Programs: []Program{newLab()}, Logger: slog.New(slog.DiscardHandler)})
		return instance{p, s, make(chan error, 1)}
	}
	run := func(i instance) {
		go func() { i.ended <- i.Run(context.Background()) }()
		if err := i.Listen(listening); err != nil {
			t.Fatal(err)
		}
	}
	now := start()
	run(now)

	stop := make(chan struct{})
	var clients sync.WaitGroup
	for w := range 6 {
		clients.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(w), 0))
			for {
				select {
				case <-stop:
					return
				default:
				}
				p := dial(t, path)
				for serial := uint32(1); serial < 100; {
					var out []byte
					var want [][]byte
					for range 1 + rnd.IntN(30) {
						arg := make([]byte, 4+4*rnd.IntN(1<<rnd.IntN(12)))
						binary.BigEndian.PutUint32(arg, serial)
						out = append(out, request(procEcho, serial, arg)...)
						want = append(want, reply(procEcho, serial, arg))
						serial++
					}
					pieces := rand.New(rand.NewPCG(uint64(w), uint64(serial)))
					var sending sync.WaitGroup
					sending.Go(func() {
						for len(out) > 0 {
							n := 1 + pieces.IntN(len(out))
							p.trySend(out[:n])
							out = out[n:]
						}
					})
					for _, m := range want {
						if got := p.recv(); !bytes.Equal(got, m) {
							t.Errorf("client %d: got %d bytes, want %d", w, len(got), len(m))
						}
					}
					sending.Wait()
				}
				p.close()
			}
		})
	}

	for round := range 300 {
		time.Sleep(time.Duration(rand.IntN(2000)) * time.Microsecond) // some load between two, not a wait for anything
		if running := now.Freeze(time.Now().Add(time.Minute)); len(running) > 0 {
			t.Fatalf("running: %v", running)
		}
		if round%2 == 0 {
			now.Thaw()
			continue
		}
		snapshot := now.Snapshot(func(int) bool { return false })
		for _, c := range now.Clients() {
			saved := c.Save()
			fd, err := unix.FcntlInt(uintptr(saved.FD), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			saved.FD = int32(fd)
			snapshot.Clients = append(snapshot.Clients, saved)
		}
		data, err := state.Encode(&state.Snapshot{PID: 1, PIDFile: state.NoFD, Lock: snapshot}, state.Ours)
		if err != nil {
			t.Fatal(err)
		}
		read, problems, err := state.Decode(data, 1)
		if err != nil || len(problems) > 0 {
			t.Fatal(err, problems)
		}
		next, err := unix.FcntlInt(uintptr(listening), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		// As exec ends it: nothing is shut down, descriptors just go.
		now.Poller.Close()
		<-now.ended
		for _, c := range now.Clients() {
			unix.Close(c.fd)
		}
		unix.Close(listening)
		listening = next
		now = start()
		now.Resume(read.Lock)
		for i := range read.Lock.Clients {
			if err := now.Adopt(&read.Lock.Clients[i], func(*Client) error { return nil }); err != nil {
				t.Fatal(err)
			}
		}
		now.Thaw()
		run(now)
	}
	close(stop)
	clients.Wait()
	now.Shutdown()
	now.Poller.Close()
	<-now.ended
}

// A connection of another peer than the snapshot says is not adopted, nor is what is no connection.
func TestAdoptRefuses(t *testing.T) {
	b, next := serve(t, nil), serve(t, nil)
	_, c := b.client()
	next.client() // it runs
	b.Freeze(time.Now().Add(time.Minute))
	defer b.Thaw()
	other := c.Save()
	other.Peer++
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	other.ID = 100
	packets := other
	packets.FD, packets.Peer = int32(pair[0]), 0
	for _, saved := range []state.Client{other, packets} {
		if err := next.Adopt(&saved, func(*Client) error { return nil }); err == nil {
			t.Errorf("adopted: %+v", saved)
		}
	}
}
