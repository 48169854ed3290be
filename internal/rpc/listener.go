// SPDX-License-Identifier: LGPL-2.1-or-later

package rpc

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"virtlockd/internal/poll"
)

// listenerEvents is what a listening socket is registered for. It is
// level-triggered, so a connection that waits is never missed, and one-shot, so
// that only one goroutine accepts and none is woken while there is no room.
const listenerEvents = unix.EPOLLIN | unix.EPOLLONESHOT

// rest says why a listener is not registered for events.
type rest uint8

const (
	restNot       rest = iota
	restFull           // the limit of clients is reached
	restExhausted      // accept failed for lack of descriptors or memory
)

// listener is a listening socket of a Server.
type listener struct {
	server *Server
	token  poll.Token

	rest rest // guarded by server.mu

	// mu is held while accepting; nothing in there blocks. A listener that
	// accepts may take the mu of another one, but of one that rests only, and
	// that does not do so itself.
	mu sync.Mutex
	fd int // -1: closed
}

// Listen accepts clients on a bound Unix stream socket. If it does not listen
// yet, it does from now on. The descriptor belongs to the server then, unless an
// error is returned.
func (s *Server) Listen(fd int) error {
	if err := prepare(fd); err != nil {
		return fmt.Errorf("rpc: server %s: listening on descriptor %d: %w", s.cfg.Name, fd, err)
	}
	l := &listener{server: s, fd: fd}
	var err error
	if l.token, err = s.poller.Reserve(l); err != nil {
		return fmt.Errorf("rpc: server %s: %w", s.cfg.Name, err)
	}
	if err := s.adopt(l); err != nil {
		_ = s.poller.Remove(l.token, fd)
		return err
	}
	if err := s.poller.Start(l.token, fd, listenerEvents); err != nil {
		s.mu.Lock()
		s.listeners = slices.DeleteFunc(s.listeners, func(x *listener) bool { return x == l })
		s.mu.Unlock()
		return fmt.Errorf("rpc: server %s: %w", s.cfg.Name, err)
	}
	return nil
}

// adopt adds a listener to the server's.
func (s *Server) adopt(l *listener) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return fmt.Errorf("rpc: server %s is shut down", s.cfg.Name)
	}
	s.listeners = append(s.listeners, l)
	return nil
}

// prepare makes a bound socket listen, without blocking.
func prepare(fd int) error {
	kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return os.NewSyscallError("getsockopt(SO_TYPE)", err)
	}
	if kind != unix.SOCK_STREAM {
		return fmt.Errorf("it is no stream socket: type %d", kind)
	}
	listening, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil {
		return os.NewSyscallError("getsockopt(SO_ACCEPTCONN)", err)
	}
	// A socket passed by systemd listens with the queue that its unit says.
	if listening == 0 {
		if err := unix.Listen(fd, backlog); err != nil {
			return os.NewSyscallError("listen", err)
		}
	}
	unix.CloseOnExec(fd)
	refuseDescriptors(fd)
	return os.NewSyscallError("fcntl(O_NONBLOCK)", unix.SetNonblock(fd, true))
}

// Ready implements poll.Handler: it accepts one connection, lets another
// goroutine accept the next one, and serves the client's first request, which
// has mostly come by now.
func (l *listener) Ready(uint32) {
	if c := l.accept(); c != nil {
		c.run()
	}
}

// accept returns a new client, which is active, or nil.
func (l *listener) accept() *Client {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fd < 0 || l.server.freezing.Load() || !l.server.admit(l) {
		return nil
	}
	fd, errno := accept(l.fd)
	switch errno {
	case 0:
		c := l.server.accepted(fd)
		l.arm()
		return c
	case unix.EAGAIN, unix.ECONNABORTED:
		l.server.cancel()
		l.arm()
	default:
		l.server.cancel()
		l.server.exhausted(l, errno)
	}
	return nil
}

// arm makes the next connection call Ready. l.mu is held.
func (l *listener) arm() {
	if l.fd < 0 {
		return
	}
	if err := l.server.poller.Modify(l.token, l.fd, listenerEvents); err != nil && !errors.Is(err, poll.ErrClosed) {
		l.server.log.Error("cannot accept clients any more", "server", l.server.cfg.Name, "error", err)
	}
}

// arm arms listeners that have rested.
func arm(listeners []*listener) {
	for _, l := range listeners {
		l.mu.Lock()
		l.arm()
		l.mu.Unlock()
	}
}

// close ends the listener. A connection that is being accepted is a client then.
func (l *listener) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	_ = l.server.poller.Remove(l.token, l.fd)
	unix.Close(l.fd)
	l.fd = -1
}
