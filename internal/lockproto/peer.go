// SPDX-License-Identifier: LGPL-2.1-or-later

package lockproto

import (
	"errors"
	"sync"

	"golang.org/x/sys/unix"

	"virtlockd/internal/owner"
	"virtlockd/internal/poll"
	"virtlockd/internal/rpc"
)

// namespace tells whether the numbers that a client sends are processes of our pid
// namespace. It costs some system calls, so it is found out once, when it matters.
type namespace uint8

const (
	unknown namespace = iota
	ours
	foreign
)

// inOurs finds out the namespace of a client that speaks for others. An error says that this was not possible.
func (p *Program) inOurs(c *rpc.Client, s *session) (bool, error) {
	if s.namespace == unknown && p.manager.is(c) {
		s.namespace = ours
	}
	if s.namespace == unknown {
		pidfd, err := peerInOurs(c)
		switch {
		case err != nil:
			return false, err
		case pidfd < 0:
			s.namespace = foreign
		default:
			s.namespace = ours
			p.manager.met(c, pidfd)
		}
	}
	return s.namespace == ours, nil
}

// self returns the owner of those details if that is the peer itself, else nil. A number from another pid namespace is another process,
// even if it is the client's own here.
func (p *Program) self(c *rpc.Client, d *owner.Details) (*owner.Owner, error) {
	if d.PID <= 0 || d.PID != c.PID() {
		return nil, nil
	}
	pidfd, err := peerInOurs(c)
	if err != nil || pidfd < 0 {
		return nil, err
	}
	return p.cfg.Owners.Self(d, pidfd)
}

// peerInOurs asks about the very process that connected: if it lives now, its number was not
// another's a moment before. The pidfd is the caller's; -1: it is not in our namespace, or has ended.
//
// An error says that this can't be told now, for lack of descriptors above all. To take it for a stranger then would leave locks to it for ever.
func peerInOurs(c *rpc.Client) (pidfd int, err error) {
	pidfd, err = c.PeerPIDFD()
	switch {
	case errors.Is(err, rpc.ErrNoPeerPID), errors.Is(err, rpc.ErrPeerGone):
		return -1, nil
	case err != nil:
		return -1, err
	case owner.InOurPIDNamespace(c.PID()) && unix.PidfdSendSignal(pidfd, 0, nil, 0) == nil:
		return pidfd, nil
	}
	unix.Close(pidfd)
	return -1, nil
}

// manager is the process in our pid namespace that spoke for another one last: libvirtd, which makes a connection for each
// call, so that it would be asked about each time.
//
// While it lives, nobody else has its number. And a socket's connections are accepted in the order in which they were made, so that no
// later client can have connected as a process that had the number before.
type manager struct {
	mu     sync.Mutex // held over poll(2) without a timeout, which does not block
	pid    int32      // 0: none yet
	pidfd  int
	client uint64 // whose connection told of it
}

// is tells whether it is the peer of c; false: it may be.
func (m *manager) is(c *rpc.Client) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.pid > 0 && m.pid == c.PID() && m.client < c.ID() && !poll.Ended(m.pidfd)
}

// met makes the peer of c the manager. The pidfd is the manager's from now on.
func (m *manager) met(c *rpc.Client, pidfd int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pid > 0 {
		unix.Close(m.pidfd)
	}
	m.pid, m.pidfd, m.client = c.PID(), pidfd, c.ID()
}
