// SPDX-License-Identifier: LGPL-2.1-or-later

package wire

import "fmt"

// Procedures of the admin program that tests of locking need.
const (
	ProcAdminOpen        uint32 = 1
	ProcAdminClose       uint32 = 2
	ProcAdminListServers uint32 = 4
	ProcAdminListClients uint32 = 8
	ProcAdminClientClose uint32 = 11
	ProcAdminGetLimits   uint32 = 12
)

// LockServer is the name of the server behind the lock socket.
const LockServer = "virtlockd"

// AdminOpen calls CONNECT_OPEN.
func (c *Conn) AdminOpen() error { return c.call(ProcAdminOpen, FlagsArgs(0)) }

// AdminClient is one entry of SERVER_LIST_CLIENTS: its number, when it connected (seconds since 1970) and its
// transport (0 is a UNIX socket).
type AdminClient struct {
	ID        uint64
	Timestamp int64
	Transport uint32
}

// AdminClients calls SERVER_LIST_CLIENTS.
func (c *Conn) AdminClients(server string) ([]AdminClient, error) {
	m, err := c.Call(ProcAdminListClients, Payload(nil).String(server).Uint32(1).Uint32(0))
	if err != nil {
		return nil, err
	}
	if err := m.Err(); err != nil {
		return nil, err
	}
	r := NewReader(m.Payload)
	var list []AdminClient
	for n := r.Uint32(); n > 0 && r.err == nil; n-- {
		if s := r.String(); s != server {
			return nil, fmt.Errorf("asked for clients of %q, got one of %q", server, s)
		}
		list = append(list, AdminClient{ID: r.Uint64(), Timestamp: int64(r.Uint64()), Transport: r.Uint32()})
	}
	if n := r.Uint32(); int(n) != len(list) {
		return nil, fmt.Errorf("list of %d clients is said to have %d", len(list), n)
	}
	return list, r.Done()
}

// AdminClientClose calls CLIENT_CLOSE.
func (c *Conn) AdminClientClose(server string, id uint64) error {
	// The client is named by its server, its number, and a time stamp and a transport that nobody looks at.
	return c.call(ProcAdminClientClose, Payload(nil).String(server).Uint64(id).Uint64(0).Uint32(0).Uint32(0))
}
