// SPDX-License-Identifier: LGPL-2.1-or-later

package rpc

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// blocked waits until a call of procBlock runs.
func (b *bench) blocked() *Client {
	b.t.Helper()
	select {
	case c := <-b.lab.entered:
		return c
	case <-time.After(patience):
		b.t.Fatal("the call has not begun")
		return nil
	}
}

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

func await(t *testing.T, ch <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-ch:
	case <-time.After(patience):
		t.Fatal("waited in vain for ", what)
	}
}

func TestIdentity(t *testing.T) {
	t.Parallel()
	before := time.Now()
	b := serve(t, nil)
	_, c := b.client()
	if c.ID() != 1 || int(c.PID()) != unix.Getpid() || int(c.UID()) != unix.Geteuid() || int(c.GID()) != unix.Getegid() {
		t.Errorf("id %d, pid %d, uid %d, gid %d", c.ID(), c.PID(), c.UID(), c.GID())
	}
	if at := c.ConnectTime(); at.Before(before.Truncate(0)) || at.After(time.Now()) {
		t.Errorf("connected at %v, not after %v", at, before)
	}
	if b.Client(1) != c || b.Client(2) != nil || b.Count() != 1 {
		t.Error("the client is not found by its id")
	}
	p2, c2 := b.client()
	if all := b.Clients(); len(all) != 2 || all[0] != c || all[1] != c2 || c2.ID() != 2 {
		t.Errorf("clients %v", all)
	}
	p2.close()
	b.lab.end(t, 2)
	if b.Client(2) != nil || b.Count() != 1 {
		t.Error("a client is still there after its end")
	}
}

// TestHangUp: the peer goes while its call runs.
func TestHangUp(t *testing.T) {
	t.Parallel()
	b := serve(t, nil)
	p := b.dial()
	p.send(append(request(procBlock, 1, nil), request(procEcho, 2, []byte("never"))...))
	c := b.blocked()
	done := c.Done()
	if isClosed(done) {
		t.Fatal("done at once")
	}
	p.close()
	await(t, done, "Done")
	if !b.lab.end(t, c.ID()) {
		t.Error("the hang-up was not taken for one")
	}
	if n := b.lab.undos(); n != 1 {
		t.Errorf("%d undone, want 1", n)
	}
	// The second request may have been received, but not executed.
	if b.lab.executed() != "" {
		t.Error("a request was executed after the hang-up")
	}
	if !isClosed(c.Done()) {
		t.Error("Done is open after the end")
	}
}

// TestRequestThenClose: what has been received completely is executed, and
// undone since nobody heard of it.
func TestRequestThenClose(t *testing.T) {
	t.Parallel()
	b := serve(t, func(c *Config) { c.MaxClients = 0 })
	for range 20 {
		p := b.dial()
		p.send(append(request(procEcho, 1, []byte("first")), request(procEcho, 2, []byte("second"))...))
		p.close()
	}
	b.SetLimits(Limits{MaxClients: 100})
	for id := range uint64(20) {
		if !b.lab.end(t, id+1) {
			t.Errorf("client %d was not closed by its peer", id+1)
		}
	}
	if got := b.lab.executed(); got+" " != strings.Repeat("first ", 20) {
		t.Errorf("executed: %q", got)
	}
	if n := b.lab.undos(); n != 20 {
		t.Errorf("%d undone, want 20", n)
	}
}

// TestUnreadReply: a peer that goes without having read its reply has gone all
// the same. The reply was delivered as far as anybody can tell.
func TestUnreadReply(t *testing.T) {
	t.Parallel()
	b := serve(t, nil)
	p := b.dial()
	p.send(request(procEcho, 1, nil))
	fds := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}
	if err := retry(func() error { _, err := unix.Poll(fds, int(patience.Milliseconds())); return err }); err != nil {
		t.Fatal(err)
	}
	p.close()
	if !b.lab.end(t, 1) || b.lab.undos() != 0 {
		t.Error("not closed by the peer, or undone")
	}
}

func TestHalfClose(t *testing.T) {
	t.Parallel()
	b := serve(t, nil)
	p := b.dial()
	p.send(request(procBlock, 1, []byte("a")))
	c := b.blocked()
	p.send(request(procEcho, 2, []byte("b")))
	p.half()
	p.silence()
	if isClosed(c.Done()) {
		t.Error("a peer that waits for its reply was taken for gone")
	}
	b.lab.release <- struct{}{}
	p.expect(reply(procBlock, 1, []byte("a")))
	p.expect(reply(procEcho, 2, []byte("b")))
	p.closed()
	if !b.lab.end(t, 1) {
		t.Error("not closed by the peer")
	}
	if b.lab.undos() != 0 {
		t.Error("undone though the reply was delivered")
	}
}

// TestDeaf: a peer that has shut down its receiving side gets no reply. That
// alone is not its end.
func TestDeaf(t *testing.T) {
	t.Parallel()
	b := serve(t, nil)
	p, c := b.client()
	if err := unix.Shutdown(p.fd, unix.SHUT_RD); err != nil {
		t.Fatal(err)
	}
	p.send(request(procEcho, 2, nil))
	if b.lab.end(t, c.ID()) {
		t.Error("taken for the peer's end")
	}
	if b.lab.undos() != 1 {
		t.Error("not undone")
	}
}

func TestClose(t *testing.T) {
	t.Parallel()
	t.Run("idle", func(t *testing.T) {
		t.Parallel()
		b := serve(t, nil)
		p, c := b.client()
		c.Close()
		c.Close()
		p.closed()
		if b.lab.end(t, 1) {
			t.Error("taken for the peer's end")
		}
		if !isClosed(c.Done()) {
			t.Error("Done is open")
		}
	})
	t.Run("with a copy", func(t *testing.T) { // as a child has it between fork and exec
		t.Parallel()
		b := serve(t, nil)
		p, c := b.client()
		fd, err := unix.FcntlInt(uintptr(c.fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		c.Close()
		p.closed()
	})
	t.Run("in a call", func(t *testing.T) {
		t.Parallel()
		b := serve(t, nil)
		p := b.dial()
		p.send(request(procBlock, 1, nil))
		c := b.blocked()
		c.Close()
		await(t, c.Done(), "Done")
		p.closed()
		if b.lab.end(t, 1) {
			t.Error("taken for the peer's end")
		}
		if b.lab.undos() != 1 {
			t.Error("a call without reply was not undone")
		}
	})
	t.Run("itself", func(t *testing.T) {
		t.Parallel()
		b := serve(t, nil)
		p := b.dial()
		p.send(append(request(procCloseSelf, 1, nil), request(procEcho, 2, nil)...))
		p.closed()
		if b.lab.end(t, 1) || b.lab.executed() != "" {
			t.Error("not closed by the call")
		}
	})
	t.Run("after the reply", func(t *testing.T) {
		t.Parallel()
		b := serve(t, nil)
		p := b.dial()
		p.send(append(request(procLastReply, 1, u32(8)), request(procEcho, 2, nil)...))
		p.expect(reply(procLastReply, 1, make([]byte, 8)))
		p.closed()
		if b.lab.end(t, 1) || b.lab.undos() != 0 || b.lab.executed() != "" {
			t.Error("not closed by us, undone, or gone on")
		}
	})
	t.Run("after a large reply", func(t *testing.T) {
		t.Parallel()
		b := serve(t, nil)
		p := b.dial()
		p.send(request(procLastReply, 1, u32(4<<20)))
		eventually(t, "the reply to get stuck", func() bool { return b.kept.Load() > 0 })
		p.expect(reply(procLastReply, 1, make([]byte, 4<<20)))
		p.closed()
		if b.lab.end(t, 1) || b.lab.undos() != 0 {
			t.Error("not closed by us, or undone")
		}
	})
}

// TestSlowReader: a reply that the peer does not read is kept, and nothing more
// of it is executed meanwhile; others go on.
func TestSlowReader(t *testing.T) {
	t.Parallel()
	b := serve(t, nil)
	p := b.dial()
	p.send(bytes.Join([][]byte{
		request(procBig, 1, u32(3<<20)),
		request(procEcho, 2, []byte("second")),
		request(procBig, 3, u32(2<<20)),
		request(procEcho, 4, []byte("fourth"))[:10],
	}, nil))
	eventually(t, "the reply to get stuck", func() bool { return b.kept.Load() > 0 })
	p.send(request(procEcho, 4, []byte("fourth"))[10:])
	q := b.dial()
	q.call(procEcho, []byte("other"))
	q.silence()
	if got := b.lab.executed(); got != "other" {
		t.Errorf("executed %q", got)
	}
	p.expect(reply(procBig, 1, make([]byte, 3<<20)))
	p.expect(reply(procEcho, 2, []byte("second")))
	p.expect(reply(procBig, 3, make([]byte, 2<<20)))
	p.expect(reply(procEcho, 4, []byte("fourth")))
	p.call(procEcho, nil)
	eventually(t, "the buffers to be given back", func() bool { return b.kept.Load() == 0 })
	if b.lab.undos() != 0 {
		t.Error("undone")
	}
}

// TestStuckReplyLost: half of a reply is no reply.
func TestStuckReplyLost(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		end  func(*peer, *Client)
		want bool
	}{
		{"by peer", func(p *peer, _ *Client) { p.close() }, true},
		{"by us", func(_ *peer, c *Client) { c.Close() }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := serve(t, nil)
			p, c := b.client()
			p.send(request(procBig, 1, u32(3<<20)))
			eventually(t, "the reply to get stuck", func() bool { return b.kept.Load() > 0 })
			tt.end(p, c)
			if got := b.lab.end(t, 1); got != tt.want {
				t.Errorf("by peer: %v", got)
			}
			if n := b.lab.undos(); n != 1 {
				t.Errorf("%d undone, want 1", n)
			}
		})
	}
}

// TestBudget: what all clients keep in the server has one limit, and the one that
// goes beyond it is closed.
func TestBudget(t *testing.T) {
	t.Parallel()
	const budget = 1 << 20
	b := serve(t, func(c *Config) { c.MaxKept = budget })
	var peers []*peer
	half := request(procEcho, 1, make([]byte, 100<<10))
	half = half[:len(half)-1]
	for range 30 {
		p := b.dial()
		p.trySend(half)
		peers = append(peers, p)
		if n := b.kept.Load(); n > budget+200<<10 {
			t.Fatalf("%d bytes are kept", n)
		}
	}
	eventually(t, "a client to be closed", func() bool { return b.log.count("above 1048576 bytes") > 0 })
	eventually(t, "all to be received", func() bool {
		n := b.kept.Load()
		return n > 0 && n <= budget && b.Count() < 30 && b.Count() >= 5
	})
	b.dial().call(procEcho, nil) // others are served
	// Those that were closed make room.
	for _, p := range peers {
		p.close()
	}
	eventually(t, "the memory to be given back", func() bool { return b.kept.Load() == 0 })
}
