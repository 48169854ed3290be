// SPDX-License-Identifier: LGPL-2.1-or-later

package rpc

import (
	"virtlockd/internal/state"
	"virtlockd/internal/vault"
)

// A connection that is stored in a vault has a word there, which tells whoever comes after a crash how far its
// last request had come:
//
//	request << 2 | phase
//
// where request counts the client's requests from 1.
const (
	phaseIdle     = iota // each request that was read is answered
	phaseReading         // request may have been read, and is not answered
	phaseReplying        // its reply may have been sent
	phaseBits     = 2
)

// Request returns the number of the client's request that is being executed, from 1. It is called from within a Call.
func (c *Client) Request() uint64 { return c.request }

// phase notes how far a request has come. It is called before what it announces, or after what it says is over.
func (c *Client) phase(request, phase uint64) {
	if cell := c.cell; cell != nil { // which LeaveVault takes away from one that hangs
		cell.Word().Store(request<<phaseBits | phase)
	}
}

// Progress is what a word says of a connection.
type Progress struct {
	Request  uint64 // its last one, or the one that it may have sent
	Idle     bool   // each request that was read is answered, so that the connection can go on
	Replying bool   // the reply may have been sent; else it was not
}

// ProgressOf reads the word of a connection's cell.
func ProgressOf(word uint64) Progress {
	p := Progress{Request: word >> phaseBits}
	switch word & (1<<phaseBits - 1) {
	case phaseIdle:
		p.Idle = true
	case phaseReplying:
		p.Replying = true
	}
	return p
}

// SetVault says where from now on each connection is stored before its first reply. nil: nowhere. It is called before
// the first client, or while the server is frozen.
func (s *Server) SetVault(v *vault.Vault) { s.vault.Store(v) }

// Unstored returns how often a connection could not be stored.
func (s *Server) Unstored() uint64 { return s.unstored.Load() }

// Changed makes the server store the client anew before the reply to the running Call, which has changed what is to be
// kept of it. It is called from within that Call.
func (c *Client) Changed() { c.told = false }

// keep stores the connection, if that has to be done before a reply. Nothing here blocks.
func (c *Client) keep() {
	v := c.server.vault.Load()
	if c.told || v == nil || c.server.cfg.Describe == nil {
		return
	}
	c.told = true // whatever comes of it: not again with each request
	into := vault.Client{State: c.Save(), PIDFD: state.NoFD}
	c.server.cfg.Describe(c, &into)
	var err error
	if c.cell != nil {
		err = v.ReplaceClient(c.cell, &into)
	} else {
		c.cell, err = v.StoreClient(&into, c.request<<phaseBits|phaseReading)
	}
	if err != nil {
		c.server.unstored.Add(1)
		c.server.log.Error("a connection is not safe from a crash of this daemon", "client", c.id, "pid", c.pid, "error", err)
	}
}

// KeepAll stores the connections that are not stored yet, but for those whose request is being executed. The server is frozen.
func (s *Server) KeepAll() {
	for _, c := range s.Clients() {
		if c.state.Load()&stateActive != 0 {
			continue
		}
		c.keep()
		if len(c.in) == 0 && len(c.out) == 0 {
			c.phase(c.request, phaseIdle)
		}
	}
}

// LeaveVault forgets all cells, because the vault is about to be given up: no connection is stored from now on. The server is
// frozen, and no client is running.
func (s *Server) LeaveVault() {
	for _, c := range s.Clients() {
		c.cell, c.told = nil, false
	}
	s.vault.Store(nil)
}

// unkeep takes the connection out of the vault, so that the peer sees its end when we close it.
func (c *Client) unkeep() {
	if cell := c.cell; cell != nil {
		c.server.vault.Load().Release(cell)
		c.cell = nil
	}
}
