// SPDX-License-Identifier: LGPL-2.1-or-later

package rpc

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"virtlockd/internal/poll"
	"virtlockd/internal/xdr"
)

// verdict says how to go on with a client.
type verdict uint8

const (
	proceed   verdict = iota // with the next message
	starved                  // when the peer has sent more
	blocked                  // when the peer has read its reply
	endByPeer                // not at all: the peer has gone
	endByUs                  // not at all: we close the connection
	frozen                   // when the server goes on
)

const (
	inputSize  = 2 << 10  // enough for a dozen of usual requests; hundreds of clients may wait for a disk, each with it
	outputSize = 512      // enough for nearly all replies
	outputKeep = 64 << 10 // a larger reply buffer is not kept for the next request
)

// workspace is what a client needs while it is active.
type workspace struct {
	receiver
	out []byte // for building a reply
	in  [inputSize]byte
}

var workspaces = sync.Pool{New: func() any { return &workspace{out: make([]byte, 0, outputSize)} }}

// turn does what can be done now: sends what is left of a reply, reads, executes
// requests one after the other.
func (c *Client) turn() verdict {
	if c.state.Load()&stateClose != 0 {
		return endByUs
	}
	if c.server.freezing.Load() {
		return c.park()
	}
	if len(c.out) > 0 {
		if v := c.flush(); v != proceed {
			return v
		}
	}
	w := workspaces.Get().(*workspace)
	v := c.pump(w)
	if cap(w.out) > outputKeep {
		w.out = make([]byte, 0, outputSize)
	}
	workspaces.Put(w)
	return v
}

// window is the input of an active client: buf[off:end] is received and not
// executed yet. buf is the workspace's, or the client's own c.in.
type window struct {
	buf      []byte
	off, end int
}

func (b *window) bytes() []byte { return b.buf[b.off:b.end] }

// pump reads and executes until the peer has nothing more to say for now.
func (c *Client) pump(w *workspace) verdict {
	b := window{buf: w.in[:]}
	if c.in != nil {
		b = window{buf: c.in[:cap(c.in)], end: len(c.in)}
	}
	drained := false
	for {
		want, v := c.serve(w, &b)
		if v == blocked || v == frozen || v == starved && drained {
			return c.store(&b, v)
		}
		if v != starved {
			return v
		}
		if !c.room(w, &b, want) {
			return endByUs
		}
		space := b.buf[b.end:]
		c.phase(c.request+1, phaseReading)
		n, attached, errno := w.recv(c.fd, space)
		if c.token == (poll.Token{}) {
			// Only now, since the first request has mostly come with the
			// connection: no other goroutine is woken for it.
			if err := c.register(); err != nil {
				c.server.log.Error("cannot serve "+c.String(), "error", err)
				return endByUs
			}
		}
		switch {
		case errno == unix.EAGAIN:
			return c.store(&b, starved)
		case errno == unix.ECONNRESET || errno == 0 && n == 0:
			return endByPeer
		case errno != 0:
			c.server.log.Error("cannot read from "+c.String(), "error", errno)
			return endByUs
		}
		b.end += n
		c.lastFD = attached
		// A read that had room for more has emptied the socket, and what comes
		// later raises a new event: the usual request needs no second read to
		// find nothing. Not so where a read also ends early, at descriptors and
		// at out-of-band data, and where the end of the stream is to be read.
		drained = n < len(space) && !attached &&
			c.state.Load()&(stateHalf|stateHangup|stateUrgent) == 0
	}
}

// room makes room in b for the rest of a message of want bytes, at least for a
// part of it. It never makes more than twice the room for what is there: the
// length word alone reserves nothing.
func (c *Client) room(w *workspace, b *window, want int) bool {
	n := b.end - b.off
	if want <= len(w.in) {
		if c.in != nil || b.off > 0 {
			copy(w.in[:], b.bytes())
			*b = window{buf: w.in[:], end: n}
		}
		c.in = nil
		return c.charge()
	}
	if c.in != nil && n < len(b.buf) {
		copy(b.buf, b.bytes())
		b.off, b.end = 0, n
		return true
	}
	own := make([]byte, min(want, max(2*n, 2*inputSize)))
	copy(own, b.bytes())
	*b = window{buf: own, end: n}
	c.in = own
	return c.charge()
}

// park makes Thaw run the client.
func (c *Client) park() verdict {
	c.state.Or(stateParked)
	// Thaw may have looked between our seeing the freeze and this: then we run on ourselves.
	if !c.server.freezing.Load() && c.state.And(^uint32(stateParked))&stateParked != 0 {
		c.state.Or(stateEvent)
	}
	return frozen
}

// store keeps what is in b until the client's next turn, in a buffer of its size.
func (c *Client) store(b *window, v verdict) verdict {
	n := b.end - b.off
	switch {
	case n == 0:
		c.in = nil
	case c.in == nil || cap(c.in) > 2*n+inputSize:
		c.in = append(make([]byte, 0, n), b.bytes()...)
	default:
		c.in = b.buf[:copy(b.buf, b.bytes())]
	}
	if !c.charge() {
		return endByUs
	}
	if n == 0 && len(c.out) == 0 {
		c.phase(c.request, phaseIdle)
	}
	return v
}

// charge brings the server's account of kept bytes up to date. If that is beyond
// the budget it says so, and the client has to go.
func (c *Client) charge() bool {
	n := cap(c.in) + cap(c.out)
	if n == c.charged {
		return true
	}
	total := c.server.kept.Add(int64(n - c.charged))
	grown := n > c.charged
	c.charged = n
	if limit := c.server.cfg.MaxKept; grown && total > limit {
		c.complain(fmt.Sprintf("closing %s: unfinished requests and unread replies of all clients are above %d bytes", c, limit))
		return false
	}
	return true
}

// serve executes the complete messages in b. starved comes with the number of
// bytes that the first incomplete one needs in b.
func (c *Client) serve(w *workspace, b *window) (want int, v verdict) {
	limit := c.server.cfg.MaxMessage
	for {
		data := b.bytes()
		if len(data) < lengthSize {
			return headerSize, starved
		}
		length := binary.BigEndian.Uint32(data)
		switch {
		case length < lengthSize:
			return c.refuse("packet %d bytes received from server too small, want %d", length, lengthSize)
		case length == lengthSize:
			return c.refuse("unexpected zero/negative length request %d", 0)
		case length > maxLength:
			return c.refuse("packet %d bytes received from server too large, want %d", int32(length-lengthSize), maxLength-lengthSize)
		}

		// Of a message beyond the limit the first part is kept and the rest
		// dropped as it comes.
		size := int(min(length, uint32(limit)))
		if len(data) < size {
			return size, starved
		}
		if beyond := length - uint32(size); c.dropped < beyond {
			n := min(len(data)-size, int(beyond-c.dropped))
			copy(data[size:], data[size+n:])
			b.end -= n
			c.dropped += uint32(n)
			data = b.bytes()
			if c.dropped < beyond {
				return size + min(int(beyond-c.dropped), inputSize), starved
			}
		}
		if size < headerSize {
			return c.refuse("Unable to decode message header")
		}
		h := parseHeader(data)
		args := data[headerSize:size:size]

		if h.kind == typeCallFDs {
			if len(args) < 4 {
				return c.refuse("Unable to decode number of FDs")
			}
			fds := binary.BigEndian.Uint32(args)
			if fds > maxDescriptors {
				return c.refuse("Received too many FDs %d, expected %d maximum", int32(fds), maxDescriptors)
			}
			args = args[4:]
			for c.fds < fds {
				if len(data) == size {
					return size + 1, starved
				}
				if len(data) > size+1 || !c.lastFD {
					return c.refuse("Failed to recv file descriptor: Permission denied")
				}
				c.fds++
				b.end--
				data = b.bytes()
			}
		}

		if c.server.freezing.Load() {
			return 0, c.park()
		}
		b.off += size
		c.dropped, c.fds = 0, 0
		c.request++
		c.phase(c.request, phaseReading)
		if v := c.execute(w, &h, args); v != proceed {
			return 0, v
		}
		if b.off == b.end {
			c.phase(c.request, phaseIdle)
		}
		if c.state.Load()&stateClose != 0 {
			return 0, endByUs
		}
	}
}

// refuse logs why a message is no message at all; the connection is closed then.
func (c *Client) refuse(format string, v ...any) (int, verdict) {
	c.complain(fmt.Sprintf(format, v...))
	return 0, endByUs
}

// complain logs what is wrong with what the client has sent.
func (c *Client) complain(text string) {
	c.server.log.Error(text, "server", c.server.cfg.Name, "client", c.id, "pid", c.pid)
}

// execute does what one message asks for and sends the reply.
func (c *Client) execute(w *workspace, h *header, args []byte) verdict {
	if h.program == keepaliveProgram && h.version == keepaliveVersion && h.kind == typeMessage {
		if h.proc != keepalivePing {
			return proceed
		}
		pong := header{program: keepaliveProgram, version: keepaliveVersion, proc: keepalivePong, kind: typeMessage, status: statusOK}
		return c.reply(nil, &pong, w.out[:headerSize])
	}

	call := h.kind == typeCall || h.kind == typeCallFDs
	program := c.server.program(h.program, h.version)
	switch {
	case program == nil && call:
		return c.fail(w, nil, h, fmt.Sprintf("Cannot find program %d version %d", int32(h.program), int32(h.version)))
	case program == nil:
		c.server.log.Info("dropping a message of a program that is not there",
			"client", c.id, "pid", c.pid, "program", h.program, "version", h.version, "type", h.kind)
		return proceed
	case h.kind == typeStream:
		// What is left of a stream that was closed on our side. We have none.
		return proceed
	case !call:
		c.complain(fmt.Sprintf("Unexpected message type %d", h.kind))
		return proceed
	case h.status != statusOK:
		return c.fail(w, nil, h, fmt.Sprintf("Unexpected message status %d", h.status))
	}

	out, err := program.Call(c, h.proc, args, w.out[:headerSize])
	if c.state.Load()&stateClose != 0 {
		c.caller = program
		return endByUs
	}
	if err == nil {
		w.out = out[:0]
		h.kind = typeReply
		return c.reply(program, h, out)
	}
	var wire *Error
	switch {
	case errors.As(err, &wire):
		return c.replyError(w, program, h, wire)
	case errors.Is(err, ErrNoProc):
		return c.fail(w, program, h, fmt.Sprintf("unknown procedure: %d", int32(h.proc)))
	case errors.Is(err, xdr.ErrDecode):
		return c.fail(w, program, h, "Unable to decode message payload")
	}
	c.complain(err.Error())
	return c.replyError(w, program, h, Ordinary(CodeInternal, DomainRPC, "internal error: %s", err.Error()))
}

// fail logs and answers that the message is not as the protocol wants it.
func (c *Client) fail(w *workspace, caller Program, h *header, text string) verdict {
	c.complain(text)
	return c.replyError(w, caller, h, Protocol(text))
}

func (c *Client) replyError(w *workspace, caller Program, h *header, e *Error) verdict {
	h.kind, h.status = typeReply, statusError
	w.out = appendError(w.out[:headerSize], e)
	return c.reply(caller, h, w.out)
}

// reply completes a message by its header and sends it. What the socket does not
// take is kept. caller is the program that was called, nil for none.
func (c *Client) reply(caller Program, h *header, m []byte) verdict {
	h.put(m)
	c.keep()
	c.phase(c.request, phaseReplying)
	n, errno := send(c.fd, m)
	c.caller = caller
	switch {
	case errno == unix.EAGAIN:
		n = 0
	case errno != 0:
		return c.undelivered(errno)
	case n == len(m):
		return c.delivered()
	}
	c.out = append(make([]byte, 0, len(m)-n), m[n:]...)
	if !c.charge() {
		return endByUs
	}
	// Until it is out no further message of this client is executed.
	return c.watch(clientEvents|unix.EPOLLOUT, blocked)
}

// flush sends what is left of a reply.
func (c *Client) flush() verdict {
	for len(c.out) > 0 {
		n, errno := send(c.fd, c.out)
		switch {
		case errno == unix.EAGAIN:
			return blocked
		case errno != 0:
			return c.undelivered(errno)
		}
		c.out = c.out[n:]
	}
	c.out = nil
	c.charge()
	if v := c.delivered(); v != proceed {
		return v
	}
	return c.watch(clientEvents, proceed)
}

// watch changes what the client is registered for. epoll looks at once whether
// one of the events holds already.
func (c *Client) watch(events uint32, v verdict) verdict {
	if err := c.server.poller.Modify(c.token, c.fd, events); err != nil {
		c.server.log.Error("closing "+c.String(), "error", err)
		return endByUs
	}
	return v
}

func (c *Client) delivered() verdict {
	c.caller = nil
	if c.last {
		return endByUs
	}
	return proceed
}

// undelivered ends the client because a reply could not be sent.
func (c *Client) undelivered(errno unix.Errno) verdict {
	switch {
	case errno != unix.EPIPE && errno != unix.ECONNRESET:
		c.server.log.Error("cannot write to "+c.String(), "error", errno)
		return endByUs
	case hungUp(c.fd):
		return endByPeer
	}
	// It has only shut down its receiving side. That is no sign that it has
	// ended, and must not be taken for one.
	return endByUs
}

// unanswered tells the program that the reply to its call has not gone out.
func (c *Client) unanswered() {
	if c.caller != nil {
		c.caller.Undo(c)
		c.caller = nil
	}
}
