// SPDX-License-Identifier: LGPL-2.1-or-later

package rpc

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/poll"
	"virtlockd/internal/vault"
)

// clientEvents is what an idle client is registered for. Edge-triggered, so that
// nothing has to be said to epoll from one request to the next.
const clientEvents = unix.EPOLLIN | unix.EPOLLPRI | unix.EPOLLRDHUP | unix.EPOLLET

// Bits of Client.state.
const (
	// stateActive: a goroutine works on the client. It alone touches the fields
	// that say so. Whoever sets the bit has to call run.
	stateActive = 1 << iota
	// stateEvent: something has happened since the goroutine looked last.
	stateEvent
	// These stay set.
	stateHalf   // the peer sends nothing more
	stateHangup // the peer is gone
	stateUrgent // the peer uses out-of-band data, where a read can end early
	stateClose  // we close the connection
	// stateParked: there is something to do when the server is not frozen any more.
	stateParked
)

// Client is one accepted connection.
//
// The life of a client is idle -> active -> idle ... -> active for good, when
// its connection ends. While it is idle it has no goroutine and, unless it has
// sent half a request or not read a reply, no buffer.
type Client struct {
	// Session is what a Program keeps with the client. The server never
	// touches it.
	Session any

	// Fixed at accept.
	server   *Server
	id       uint64
	accepted int64 // Unix time in ns
	uptime   int64 // the same moment in ns since boot, to tell the peer from a later process with its pid
	pid      int32
	uid, gid uint32
	fd       int // open until the end; used by the active goroutine only

	state    atomic.Uint32
	readOnly atomic.Bool // see ReadOnly

	// What outlasts a turn of the active goroutine, which owns it.
	token   poll.Token  // zero: not registered yet
	in      []byte      // received and not executed yet
	out     []byte      // the part of a reply that the peer has not read yet
	charged int         // what in and out take from the server's budget
	dropped uint32      // bytes received of the message at the head of in that are beyond MaxMessage
	fds     uint32      // descriptors received for that message
	lastFD  bool        // the last byte that was read came with descriptors
	last    bool        // close when the reply is out
	caller  Program     // whose reply is in out; nil: the server's own
	request uint64      // how many messages were executed
	cell    *vault.Cell // what the connection is stored in, see Server.SetVault
	told    bool        // it is stored as it is now, or it can't be

	mu   sync.Mutex    // also held when fd changes, for others than the active goroutine
	over bool          // Done is or would be closed
	done chan struct{} // nil until somebody asks

	next   *Client // in the list of clients to be ended
	byPeer bool    // how it ended
}

// ID returns the client's number on its server, counting from 1.
func (c *Client) ID() uint64 { return c.id }

// PID returns the process that connected, as the kernel told at accept
// (SO_PEERCRED, unix(7)). 0 means that it is in a pid namespace that cannot be
// seen from ours.
func (c *Client) PID() int32 { return c.pid }

// UID returns the effective user id that the peer connected with.
func (c *Client) UID() uint32 { return c.uid }

// GID returns the effective group id that the peer connected with.
func (c *Client) GID() uint32 { return c.gid }

// ConnectTime returns when the connection was accepted.
func (c *Client) ConnectTime() time.Time { return time.Unix(0, c.accepted) }

// ReadOnly tells whether the client has given up the right to change anything. Programs see to it that it
// does not.
func (c *Client) ReadOnly() bool { return c.readOnly.Load() }

// SetReadOnly makes the client one that can only look, for the rest of its life.
func (c *Client) SetReadOnly() { c.readOnly.Store(true) }

// Hurry tells whether everybody waits for the Call that runs, because of a hand-over to another binary. One that can
// give a part of its answer now does so.
func (c *Client) Hurry() bool { return c.server != nil && c.server.freezing.Load() }

// String names the client in logs.
func (c *Client) String() string { return fmt.Sprintf("client %d (pid %d)", c.id, c.pid) }

// Done returns a channel that is closed as soon as the peer is seen to have hung
// up or we close the connection, also while a Call runs. A peer that has merely
// shut down its sending side still waits for its reply.
func (c *Client) Done() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done == nil {
		c.done = make(chan struct{})
		if c.over {
			close(c.done)
		}
	}
	return c.done
}

// Over reports whether Done is closed, or would be. The client counts until its last
// Call has ended, but nothing can be done with it any more.
func (c *Client) Over() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.over
}

// finish closes Done.
func (c *Client) finish() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.over {
		c.over = true
		if c.done != nil {
			close(c.done)
		}
	}
}

// CloseAfterReply makes the server close the connection when the reply to the
// running Call is out. It is called from within that Call.
func (c *Client) CloseAfterReply() { c.last = true }

// Close closes the connection, from any goroutine, and returns at once. A Call
// that runs goes on, its reply is not sent. Closing twice is harmless.
func (c *Client) Close() {
	if c.requestClose() {
		// Not here: the caller may hold what Program.Closed needs.
		go c.run()
	}
}

// requestClose marks the client as to be closed by us, and reports whether it was
// idle: then the caller has to call run.
func (c *Client) requestClose() bool {
	old := c.state.Or(stateActive | stateEvent | stateClose)
	c.finish()
	return old&stateActive == 0
}

// conn is a Client as its poll.Handler.
type conn Client

// Ready implements poll.Handler.
func (h *conn) Ready(events uint32) {
	c := (*Client)(h)
	bits := uint32(stateActive | stateEvent)
	if events&unix.EPOLLRDHUP != 0 {
		bits |= stateHalf
	}
	if events&(unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		bits |= stateHangup
	}
	if events&unix.EPOLLPRI != 0 {
		bits |= stateUrgent
	}
	old := c.state.Or(bits)
	if bits&stateHangup != 0 {
		c.finish()
	}
	if old&stateActive == 0 {
		c.run()
	}
}

// run works on the client until nothing is left to do. It is called by whoever
// has set stateActive.
func (c *Client) run() {
	for {
		// Cleared before looking, so that what happens from here on is seen.
		c.state.And(^uint32(stateEvent))
		switch verdict := c.turn(); verdict {
		case endByPeer, endByUs:
			c.byPeer = verdict == endByPeer
			c.unanswered()
			c.finish()
			c.server.end(c)
			return // active for good: late events find nothing to do
		}
		if c.rest() {
			return
		}
	}
}

// rest makes an active client idle, unless something has happened meanwhile.
func (c *Client) rest() bool {
	for {
		st := c.state.Load()
		if st&stateEvent != 0 {
			return false
		}
		if c.state.CompareAndSwap(st, st&^stateActive) {
			if c.server.freezing.Load() {
				c.server.frozenRest()
			}
			return true
		}
	}
}

// register makes later events call Ready. An event that holds already does, too.
func (c *Client) register() error {
	token, err := c.server.poller.Reserve((*conn)(c))
	if err != nil {
		return err
	}
	c.token = token
	return c.server.poller.Start(token, c.fd, clientEvents)
}

// hangUp ends the connection on our side, but for its descriptor.
func (c *Client) hangUp() {
	// An error says that it is not registered, which is what we want.
	_ = c.server.poller.Remove(c.token, c.fd)
	if !c.byPeer {
		c.unkeep() // else the next process, after a crash, would take the end that follows for the peer's
		// A copy of the descriptor in a child that was just forked must not keep
		// the peer waiting.
		_ = unix.Shutdown(c.fd, unix.SHUT_RDWR)
	}
}

// closeDescriptor comes after hangUp.
func (c *Client) closeDescriptor() {
	c.mu.Lock()
	fd := c.fd
	c.fd = -1
	c.mu.Unlock()
	unix.Close(fd)
}
