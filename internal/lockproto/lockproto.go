// SPDX-License-Identifier: LGPL-2.1-or-later

// Package lockproto serves libvirt's lock protocol, program 0x0EA7BEEF version 1: it decodes
// a call, does it on the table of lockspaces, and words the answer as the C daemon does.
package lockproto

import (
	"errors"
	"log/slog"
	"sync/atomic"

	"virtlockd/internal/lockspace"
	"virtlockd/internal/owner"
	"virtlockd/internal/rpc"
	"virtlockd/internal/state"
	"virtlockd/internal/vault"
	"virtlockd/internal/xdr"
)

// The program's numbers on the wire.
const (
	ProgramID = 0x0EA7BEEF
	Version   = 1
)

const (
	// maxString bounds each name and path of a message, in bytes: the protocol's own limit.
	maxString = 65536
	// MaxMessage bounds what is kept of a call, in bytes. The largest valid one has two strings.
	MaxMessage = 256 << 10
)

// layout says which arguments a procedure has, in the order of the wire.
type layout struct{ owner, path, name, flags bool }

// procedure is one call of the protocol.
type procedure struct {
	function string // of the C daemon, which an error for unknown flags names
	layout   layout
	flags    uint32 // those that it knows
	anyone   bool   // may be called before REGISTER
	run      func(p *Program, c *rpc.Client, s *session, a *args) error
}

// procedures by their number on the wire.
var procedures = [...]procedure{
	1: {"Register", layout{owner: true, flags: true}, 0, true, (*Program).register},
	2: {"Restrict", layout{flags: true}, 0, false, (*Program).restrict},
	3: {"New", layout{path: true, flags: true}, 0, false, (*Program).addLockspace},
	4: {"CreateResource", layout{path: true, name: true, flags: true}, 0, false, (*Program).createResource},
	5: {"DeleteResource", layout{path: true, name: true, flags: true}, 0, false, (*Program).deleteResource},
	6: {"AcquireResource", layout{path: true, name: true, flags: true}, lockspace.Shared | lockspace.AutoCreate, false, (*Program).acquire},
	7: {"ReleaseResource", layout{path: true, name: true, flags: true}, 0, false, (*Program).release},
	8: {"CreateLockSpace", layout{path: true}, 0, true, (*Program).ensureLockspace},
}

type args struct {
	owner      owner.Details
	path, name string
	flags      uint32
}

func (l layout) decode(payload []byte) (a args, err error) {
	d := xdr.NewDecoder(payload)
	if l.owner {
		copy(a.owner.UUID[:], d.Fixed(len(a.owner.UUID)))
		a.owner.Name = d.String(maxString)
		a.owner.ID = d.Uint32()
		a.owner.PID = d.Int32()
	}
	if l.path {
		a.path = d.String(maxString)
	}
	if l.name {
		a.name = d.String(maxString)
	}
	if l.flags {
		a.flags = d.Uint32()
	}
	if d.Err() != nil {
		return a, rpc.ErrDecode
	}
	return a, nil
}

// session is what a connection has told us. One goroutine at a time uses it, the one that serves
// the client, but for self, which others may look at.
type session struct {
	owner      *owner.Details              // nil: not registered
	self       atomic.Pointer[owner.Owner] // the owner that is the peer itself, as the kernel says; or nil
	restricted bool
	namespace  namespace
	acquired   lockspace.Hold // by the last call, in case its reply can't be delivered
	inherited  *state.Undo    // the same, of a call that the binary before this one executed
}

func (s *session) request(c *rpc.Client, a *args) lockspace.Request {
	return lockspace.Request{Lockspace: a.path, Resource: a.name, Flags: a.flags, Client: c}
}

// Config of a Program.
type Config struct {
	Table  *lockspace.Table
	Owners *owner.Registry
	Logger *slog.Logger
}

// Program is an rpc.Program.
type Program struct {
	cfg     Config
	manager manager
}

var (
	_ rpc.Program = (*Program)(nil)
	_ rpc.Opener  = (*Program)(nil)
)

// New returns the program on a table.
func New(cfg Config) *Program { return &Program{cfg: cfg} }

// ID implements rpc.Program.
func (p *Program) ID() (program, version uint32) { return ProgramID, Version }

// Opened implements rpc.Opener.
func (p *Program) Opened(c *rpc.Client) { c.Session = new(session) }

// Call implements rpc.Program. The order of the checks is part of the protocol: arguments, unknown
// flags, restriction, registration, lockspace. No procedure returns anything but success.
func (p *Program) Call(c *rpc.Client, proc uint32, payload, out []byte) ([]byte, error) {
	s := c.Session.(*session)
	s.acquired, s.inherited = lockspace.Hold{}, nil // its reply is out; what is undone is this call's, whatever becomes of it
	if proc == 0 || proc >= uint32(len(procedures)) {
		return out, rpc.ErrNoProc
	}
	pr := &procedures[proc]
	a, err := pr.layout.decode(payload)
	if err != nil {
		return out, err // the server words and logs it
	}
	if err = s.admit(pr, a.flags); err == nil {
		err = pr.run(p, c, s, &a)
	}
	if err != nil {
		wire := wireError(err, s, &a)
		p.log(s, &a, err, wire)
		return out, wire
	}
	return out, nil
}

func (s *session) admit(pr *procedure, flags uint32) error {
	switch {
	case flags&^pr.flags != 0:
		return rpc.BadFlags("virLockSpaceProtocolDispatch"+pr.function, rpc.DomainRPC, flags&^pr.flags)
	case s.restricted:
		return errRestricted
	case s.owner == nil && !pr.anyone:
		return errNotRegistered
	}
	return nil
}

// register names the owner for whom the connection speaks: its own process, or, from libvirtd,
// any guest's. It may be called again. As with the C daemon a zero id registers nobody.
func (p *Program) register(c *rpc.Client, s *session, a *args) error {
	if a.owner.ID == 0 {
		return errNotRegistered
	}
	self, err := p.self(c, &a.owner)
	if err != nil {
		return err
	}
	s.forget()
	s.owner = &a.owner
	s.self.Store(self)
	c.Changed()
	return nil
}

// forget drops the registration. Locks of the owner stay.
func (s *session) forget() {
	if self := s.self.Swap(nil); self != nil {
		self.Release()
	}
	s.owner = nil
}

func (p *Program) restrict(c *rpc.Client, s *session, _ *args) error {
	s.restricted = true
	c.Changed()
	return nil
}

func (p *Program) addLockspace(_ *rpc.Client, _ *session, a *args) error {
	return p.cfg.Table.Add(a.path)
}

// ensureLockspace is what libvirtd calls at its start for each configured directory.
func (p *Program) ensureLockspace(_ *rpc.Client, _ *session, a *args) error {
	if p.cfg.Table.Lookup(a.path) == nil {
		return nil
	}
	err := p.cfg.Table.Add(a.path)
	if errors.Is(err, lockspace.ErrExists) {
		return nil
	}
	return err
}

func (p *Program) createResource(c *rpc.Client, s *session, a *args) error {
	return p.cfg.Table.Create(s.request(c, a))
}

func (p *Program) deleteResource(c *rpc.Client, s *session, a *args) error {
	return p.cfg.Table.Delete(s.request(c, a))
}

func (p *Program) acquire(c *rpc.Client, s *session, a *args) error {
	req := s.request(c, a)
	req.Origin = vault.Origin{Client: c.ID(), Request: c.Request()}
	req.Owner = s.self.Load()
	if req.Owner == nil {
		local, err := p.inOurs(c, s)
		if err != nil {
			return err
		}
		named, err := p.cfg.Owners.Named(s.owner, local)
		if err != nil {
			return err
		}
		defer named.Release() // the lock has its own reference
		req.Owner = named
	}
	var err error
	s.acquired, err = p.cfg.Table.Acquire(req)
	return err
}

func (p *Program) release(c *rpc.Client, s *session, a *args) error {
	local, err := p.speaksForOurs(c, s)
	if err != nil {
		return err
	}
	return p.cfg.Table.Release(s.request(c, a), s.owner.PID, local)
}

// speaksForOurs tells whether the client may give up locks of processes that we can see. It is
// asked for a number that we know nothing of as well, so it costs nothing for the owner itself.
func (p *Program) speaksForOurs(c *rpc.Client, s *session) (bool, error) {
	if s.self.Load() != nil {
		return true, nil
	}
	return p.inOurs(c, s)
}

// Undo implements rpc.Program: the client went away before it could hear of its lock, so nobody
// knows that it is held.
func (p *Program) Undo(c *rpc.Client) {
	s := c.Session.(*session)
	undo := s.acquired
	if i := s.inherited; i != nil {
		undo = p.cfg.Table.Find(i.Lockspace, i.Resource, s.owner.PID)
	}
	if undo == (lockspace.Hold{}) {
		return
	}
	s.acquired, s.inherited = lockspace.Hold{}, nil
	if err := p.cfg.Table.Undo(undo); err != nil {
		p.cfg.Logger.Debug("an acquisition without client was released by somebody else first", "error", err)
	} else {
		p.cfg.Logger.Info("an acquisition was undone: its client has gone", "lockspace", undo.Lockspace, "resource", undo.Resource, "", s.owner)
	}
}

// Closed implements rpc.Program. The hang-up of a guest's own connection is the sign that it ends; a
// connection that we close is never taken for one.
func (p *Program) Closed(c *rpc.Client, byPeer bool) {
	s := c.Session.(*session)
	if self := s.self.Load(); byPeer && self != nil {
		p.HungUp(self)
	}
	s.forget()
}

// HungUp says that an owner has closed the connection that he registered himself on: if he holds anything he is ended.
func (p *Program) HungUp(o *owner.Owner) {
	if p.cfg.Table.Holds(o) {
		p.cfg.Owners.HangUp(o)
		p.cfg.Table.NoteOwner(o)
	}
}

// Guards returns whose locks end, with the guest, if the client hangs up: the owner that connected
// itself and holds something. It is nil for every other client.
func (p *Program) Guards(c *rpc.Client) *owner.Details {
	s, ok := c.Session.(*session)
	if !ok { // a client of another program
		return nil
	}
	if self := s.self.Load(); self != nil && !self.Dead() && p.cfg.Table.Holds(self) {
		return self.Details()
	}
	return nil
}
