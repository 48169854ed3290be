// SPDX-License-Identifier: LGPL-2.1-or-later

package lockproto

import (
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

// inOurs finds out the namespace of a client that speaks for others.
func (p *Program) inOurs(c *rpc.Client, s *session) bool {
	if s.namespace == unknown {
		s.namespace = foreign
		if p.manager.is(c) {
			s.namespace = ours
		} else if pidfd, ok := peerInOurs(c); ok {
			s.namespace = ours
			p.manager.met(c, pidfd)
		}
	}
	return s.namespace == ours
}

// peerInOurs asks about the very process that connected: if it lives now, its number was not
// another's a moment before. The pidfd is the caller's.
func peerInOurs(c *rpc.Client) (pidfd int, ok bool) {
	pidfd, err := c.PeerPIDFD()
	if err != nil {
		return -1, false
	}
	if owner.InOurPIDNamespace(c.PID()) && unix.PidfdSendSignal(pidfd, 0, nil, 0) == nil {
		return pidfd, true
	}
	unix.Close(pidfd)
	return -1, false
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
