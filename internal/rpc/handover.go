// SPDX-License-Identifier: LGPL-2.1-or-later

package rpc

import (
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/state"
)

// Freeze makes the server stand still for a hand-over to another binary: nobody is accepted, no
// further request is read or executed, and those that run come to their end, reply included. It
// waits for them until the deadline, and returns the clients whose call still runs then.
//
// Bytes that were read of a request, and bytes of a reply that the peer has not read, stay with
// the client. Thaw undoes it.
func (s *Server) Freeze(deadline time.Time) (running []*Client) {
	s.freezing.Store(true)
	s.mu.Lock()
	listeners := slices.Clone(s.listeners)
	s.mu.Unlock()
	for _, l := range listeners {
		// Whoever is accepting has made a client before this returns; the next one sees that we freeze.
		l.mu.Lock()
		//lint:ignore SA2001 it is a barrier
		l.mu.Unlock()
	}
	return s.StillRunning(s.Clients(), deadline)
}

// StillRunning waits until the given clients of a frozen server rest, and until those that were ending have
// ended, but no longer than the deadline. It returns the clients that run then. They
// are not to be saved: their connections end with this binary.
func (s *Server) StillRunning(of []*Client, deadline time.Time) []*Client {
	timeout := time.NewTimer(time.Until(deadline))
	defer timeout.Stop()
	for {
		// A client that is found at rest stays so: whoever wakes it sees that we freeze.
		of = slices.DeleteFunc(of, func(c *Client) bool {
			return c.state.Load()&stateActive == 0 || s.Client(c.id) != c
		})
		s.mu.Lock()
		ending := s.live > uint32(len(s.clients))
		s.mu.Unlock()
		if len(of) == 0 && !ending {
			return nil
		}
		select {
		case <-s.rested:
		case <-timeout.C:
			return of
		}
	}
}

// Thaw ends Freeze: everybody goes on where he stood.
func (s *Server) Thaw() {
	s.freezing.Store(false)
	s.mu.Lock()
	awake := slices.DeleteFunc(slices.Clone(s.listeners), func(l *listener) bool { return l.rest != restNot })
	s.mu.Unlock()
	arm(awake)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.clients {
		// What came meanwhile was noticed and left alone.
		if c.state.And(^uint32(stateParked))&stateParked != 0 && c.state.Or(stateActive|stateEvent)&stateActive == 0 {
			go c.run()
		}
	}
}

// frozenRest tells Freeze that a client rests. Nobody is waited for: one message is enough.
func (s *Server) frozenRest() {
	select {
	case s.rested <- struct{}{}:
	default:
	}
}

// Snapshot returns what is to be kept of a frozen server. unlink says of each listening socket whether its
// file is ours to remove. Clients is to be filled by the caller, from each Client's Save.
func (s *Server) Snapshot(unlink func(fd int) bool) *state.Server {
	s.mu.Lock()
	defer s.mu.Unlock()
	sv := &state.Server{
		MaxClients: s.limits.MaxClients, MaxUnauth: s.limits.MaxUnauth,
		KeepaliveInterval: ^uint32(0), // the daemon sends no PINGs
		NextClientID:      s.lastID + 1,
	}
	for _, l := range s.listeners {
		sv.Services = append(sv.Services, state.Service{
			MaxRequests: 1,
			Sockets:     []state.Socket{{FD: int32(l.fd), Unlink: unlink(l.fd)}},
		})
	}
	return sv
}

// Owed tells whether a reply of the program that was called last is not out yet. What else may be unsent,
// a PONG or an error of the server's own, is nothing to undo.
func (c *Client) Owed() bool { return c.caller != nil }

// Save returns what is to be kept of a client of a frozen server that is not running.
func (c *Client) Save() state.Client {
	return state.Client{
		ID: c.id, ConnectTime: c.accepted, Uptime: c.uptime, FD: int32(c.fd), Peer: c.pid,
		MaxRequests: 1,
		ReadOnly:    c.readOnly.Load(),
		Self:        state.None,
		Unread:      c.in, Dropped: c.dropped, FDs: c.fds, LastFD: c.lastFD,
		Unsent: c.out, Closing: c.last,
		Cell: c.cell.Index(),
	}
}

// Resume sets what a snapshot says of the server itself, before any client comes. The server is frozen
// then: clients that are adopted have to wait for Thaw.
func (s *Server) Resume(from *state.Server) {
	s.freezing.Store(true)
	s.mu.Lock()
	defer s.mu.Unlock()
	if from.MaxClients > 0 { // else the state file does not say, and the configured ones hold
		s.limits = Limits{from.MaxClients, from.MaxUnauth}
	}
	s.lastID = max(s.lastID, from.NextClientID-1)
}

// Adopt makes a client of a connection of a snapshot. setup gives the program its session back. If there is
// an error the connection is still the caller's.
func (s *Server) Adopt(from *state.Client, setup func(*Client) error) error {
	fail := func(err error) error {
		return fmt.Errorf("cannot take over client %d of server %s, descriptor %d: %w", from.ID, s.cfg.Name, from.FD, err)
	}
	fd := int(from.FD)
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return fail(os.NewSyscallError("getsockopt(SO_PEERCRED)", err))
	}
	switch {
	case from.Peer == 0: // the peer can't be told, or the C daemon did not say
		kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
		if err != nil || kind != unix.SOCK_STREAM {
			return fail(fmt.Errorf("it is no stream socket: type %d", kind))
		}
	case cred.Pid != from.Peer:
		return fail(fmt.Errorf("it is of process %d, not %d", cred.Pid, from.Peer))
	}
	up := from.Uptime
	if up == 0 { // from the C daemon, which keeps seconds of the wall clock
		if up, err = uptime(); err != nil {
			return fail(err)
		}
		if age := time.Now().UnixNano() - from.ConnectTime; from.ConnectTime > 0 && age > 0 {
			up -= age - int64(time.Second) // rounded up: a process may have started within that second
		}
		if err := unix.SetNonblock(fd, true); err != nil {
			return fail(os.NewSyscallError("fcntl(O_NONBLOCK)", err))
		}
	}
	refuseDescriptors(fd)
	c := &Client{
		server: s, id: from.ID, fd: fd,
		accepted: from.ConnectTime, uptime: up,
		pid: cred.Pid, uid: cred.Uid, gid: cred.Gid,
		in: from.Unread, dropped: from.Dropped, fds: from.FDs, lastFD: from.LastFD,
		out: from.Unsent, last: from.Closing,
	}
	c.readOnly.Store(from.ReadOnly)
	if v := s.vault.Load(); v != nil && from.Cell != 0 {
		if c.cell = v.Cell(from.Cell); c.cell != nil {
			c.request, c.told = ProgressOf(c.cell.Word().Load()).Request, true
		}
	}
	if from.Undo != nil && len(s.programs) > 0 {
		c.caller = s.programs[0].Program // of the servers that have something to undo each has one
	}
	if len(c.in) > 0 {
		c.state.Store(stateParked) // it may have sent a whole request to the binary before us
	}
	for i := range s.programs {
		if o, ok := s.programs[i].Program.(Opener); ok {
			o.Opened(c)
		}
	}
	if err := setup(c); err != nil {
		return fail(err)
	}
	s.mu.Lock()
	if s.clients[c.id] != nil || c.id == 0 {
		s.mu.Unlock()
		return fail(fmt.Errorf("its number is taken"))
	}
	s.clients[c.id] = c
	s.lastID = max(s.lastID, c.id)
	s.live++
	s.mu.Unlock()
	c.charge()
	events := uint32(clientEvents)
	if len(c.out) > 0 {
		events |= unix.EPOLLOUT
	}
	if c.token, err = s.poller.Reserve((*conn)(c)); err == nil {
		err = s.poller.Start(c.token, fd, events)
	}
	if err != nil {
		s.log.Error("cannot serve "+c.String(), "error", err)
		c.Close()
	}
	return nil
}
