// SPDX-License-Identifier: LGPL-2.1-or-later

package lockproto

import (
	"fmt"

	"virtlockd/internal/lockspace"
	"virtlockd/internal/owner"
	"virtlockd/internal/rpc"
	"virtlockd/internal/state"
	"virtlockd/internal/vault"
)

// Save writes what a connection has told us into a snapshot. No call of the client runs meanwhile. place
// says where an owner stands in the snapshot.
func (p *Program) Save(c *rpc.Client, place func(*owner.Owner) int32, into *state.Client) {
	s := c.Session.(*session)
	into.Restricted = s.restricted
	into.Self = state.None
	if s.owner == nil {
		return
	}
	into.Registered = true
	into.Owner = state.Details(*s.owner)
	if self := s.self.Load(); self != nil {
		into.Self = place(self)
	}
	if c.Owed() && s.acquired != (lockspace.Hold{}) {
		into.Undo = &state.Undo{Lockspace: s.acquired.Lockspace, Resource: s.acquired.Resource}
	}
}

// Describe says what is stored of a connection so that it outlives a crash. No other call of the client runs meanwhile.
func (p *Program) Describe(c *rpc.Client, into *vault.Client) {
	s := c.Session.(*session)
	into.State.Restricted = s.restricted
	if s.owner == nil {
		return
	}
	into.State.Registered = true
	into.State.Owner = state.Details(*s.owner)
	if self := s.self.Load(); self != nil {
		into.PIDFD = self.PIDFD()
	}
}

// Restore gives a connection back what it had told us. owners are those of the snapshot, each
// adopted. The C daemon keeps no proof of who a peer is: the kernel is asked again. If the answer is no, or there is
// none, which the error then says, the connection is as good as any other, but its end is not taken for the guest's.
func (p *Program) Restore(c *rpc.Client, from *state.Client, owners []*owner.Owner) error {
	s := &session{restricted: from.Restricted}
	c.Session = s
	if !from.Registered {
		return nil
	}
	d := owner.Details(from.Owner)
	s.owner = &d
	if from.Undo != nil {
		s.inherited = from.Undo
	}
	if from.Self != state.None {
		self := owners[from.Self]
		self.Retain()
		s.self.Store(self)
		return nil
	}
	self, err := p.self(c, &d)
	if err != nil {
		return fmt.Errorf("cannot watch the guest %q (pid %d) by its connection, client %d: %w", d.Name, d.PID, c.ID(), err)
	}
	s.self.Store(self)
	return nil
}
