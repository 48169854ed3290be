// SPDX-License-Identifier: LGPL-2.1-or-later

package adminproto

import (
	"log/slog"
	"os/user"
	"slices"
	"strconv"
	"sync"
	"time"

	"virtlockd/internal/rpc"
	"virtlockd/internal/xdr"
)

func (p *Program) open(_ *rpc.Client, _ *args, out []byte) ([]byte, error) { return out, nil }

// close ends the connection once its reply is out.
func (p *Program) close(c *rpc.Client, _ *args, out []byte) ([]byte, error) {
	c.CloseAfterReply()
	return out, nil
}

func (p *Program) libVersion(_ *rpc.Client, _ *args, out []byte) ([]byte, error) {
	return xdr.AppendUint64(out, p.cfg.LibVersion), nil
}

func (p *Program) listServers(_ *rpc.Client, a *args, out []byte) ([]byte, error) {
	servers := p.cfg.Servers()
	n := uint32(len(servers))
	if !a.results {
		servers = nil
	}
	out = xdr.AppendUint32(out, uint32(len(servers)))
	for _, s := range servers {
		out = xdr.AppendString(out, s.Name())
	}
	return xdr.AppendUint32(out, n), nil
}

func (p *Program) lookupServer(_ *rpc.Client, a *args, out []byte) ([]byte, error) {
	return xdr.AppendString(out, a.server.Name()), nil
}

// Names of the parameters of a thread pool.
const (
	minWorkers  = "minWorkers"
	maxWorkers  = "maxWorkers"
	prioWorkers = "prioWorkers"
)

// PriorityWorkers returns the number that was set for a server. It has no effect but to be shown, and to
// be handed over to the next binary.
func (p *Program) PriorityWorkers(s *rpc.Server) uint32 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.priorityWorkers[s.Name()]
}

// SetPriorityWorkers sets what PriorityWorkers returns.
func (p *Program) SetPriorityWorkers(s *rpc.Server, n uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.priorityWorkers[s.Name()] = n
}

// threadPool describes a pool of no threads: requests are served without one.
func (p *Program) threadPool(_ *rpc.Client, a *args, out []byte) ([]byte, error) {
	prio := p.PriorityWorkers(a.server)
	return appendUints(out,
		param{field: minWorkers},
		param{field: maxWorkers},
		param{field: "nWorkers"},
		param{field: "freeWorkers"},
		param{field: prioWorkers, value: prio},
		param{field: "jobQueueDepth"}), nil
}

func (p *Program) setThreadPool(c *rpc.Client, a *args, out []byte) ([]byte, error) {
	v, err := values(a.params, minWorkers, maxWorkers, prioWorkers)
	switch {
	case err != nil:
		return out, err
	case v[minWorkers] > v[maxWorkers]:
		return out, errMinAboveM
	case v[maxWorkers] > 0:
		return out, errNoPool
	}
	if prio, set := v[prioWorkers]; set {
		p.SetPriorityWorkers(a.server, prio)
		p.changed(c, "the number of priority workers was set; it has no effect, since there are no worker threads",
			slog.String("server", a.server.Name()), slog.Uint64("prio_workers", uint64(prio)))
	}
	return out, nil
}

// clients returns those that are connected. One that was disconnected is not shown any more, even if
// a request of it is still under way.
func clients(s *rpc.Server) []*rpc.Client {
	return slices.DeleteFunc(s.Clients(), (*rpc.Client).Over)
}

// client returns the one with the number, nil if there is none.
func client(s *rpc.Server, id uint64) *rpc.Client {
	c := s.Client(id)
	if c == nil || c.Over() {
		return nil
	}
	return c
}

func (p *Program) listClients(_ *rpc.Client, a *args, out []byte) ([]byte, error) {
	clients := clients(a.server)
	if !a.results {
		out = xdr.AppendUint32(out, 0)
		return xdr.AppendUint32(out, uint32(len(clients))), nil
	}
	if len(clients) > maxList {
		return out, tooManyClients(len(clients))
	}
	out = xdr.AppendUint32(out, uint32(len(clients)))
	for _, c := range clients {
		out = appendClient(out, a.server, c)
	}
	return xdr.AppendUint32(out, uint32(len(clients))), nil
}

func (p *Program) lookupClient(_ *rpc.Client, a *args, out []byte) ([]byte, error) {
	// Here flags are looked at before the client, so it is not found by resolve.
	c := client(a.server, a.id)
	if c == nil {
		return out, handedOn.client(a.id)
	}
	return appendClient(out, a.server, c), nil
}

func appendClient(b []byte, s *rpc.Server, c *rpc.Client) []byte {
	const unixSocket = 0
	b = xdr.AppendString(b, s.Name())
	b = xdr.AppendUint64(b, c.ID())
	b = xdr.AppendInt64(b, c.ConnectTime().Unix())
	return xdr.AppendUint32(b, unixSocket)
}

// clientInfo tells who a client is. A name that the system does not have is left out.
func (p *Program) clientInfo(_ *rpc.Client, a *args, out []byte) ([]byte, error) {
	n := uint32(0)
	start := len(out)
	out = xdr.AppendUint32(out, n)
	add := func(field string, k kind) {
		n++
		out = appendField(out, field, k)
	}
	integer := func(field string, v int32) {
		add(field, kindInt)
		out = xdr.AppendInt32(out, v)
	}
	text := func(field, v string) {
		add(field, kindString)
		out = xdr.AppendString(out, v)
	}

	c := a.client
	add("readonly", kindBoolean)
	out = xdr.AppendBool(out, c.ReadOnly())
	uid, gid := strconv.FormatUint(uint64(c.UID()), 10), strconv.FormatUint(uint64(c.GID()), 10)
	integer("unix_user_id", int32(c.UID()))
	if u, err := user.LookupId(uid); err == nil {
		text("unix_user_name", u.Username)
	}
	integer("unix_group_id", int32(c.GID()))
	if g, err := user.LookupGroupId(gid); err == nil {
		text("unix_group_name", g.Name)
	}
	integer("unix_process_id", c.PID())
	if label := c.Label(); label != "" {
		text("selinux_context", label)
	}
	xdr.AppendUint32(out[:start], n)
	return out, nil
}

// closeClient disconnects a client. It is not taken for the client's own hang-up, so no guest ends. A
// guest's own connection stays all the same, as long as it holds locks: the guest, or who started
// it, relies on it.
func (p *Program) closeClient(c *rpc.Client, a *args, out []byte) ([]byte, error) {
	if guest := p.cfg.Guards(a.client); guest != nil {
		return out, guardedError(a.id, guest)
	}
	p.did(c, "a client is disconnected", slog.String("server", a.server.Name()),
		slog.Uint64("client", a.id), slog.Int("pid", int(a.client.PID())))
	a.client.Close()
	return out, nil
}

// Names of the limits of a server.
const (
	maxClients = "nclients_max"
	maxUnauth  = "nclients_unauth_max"
)

// limits describes the limits in force. Nobody waits for authentication: the kernel has told who a
// client is when it is accepted.
func (p *Program) limits(_ *rpc.Client, a *args, out []byte) ([]byte, error) {
	l := a.server.Limits()
	return appendUints(out,
		param{field: maxClients, value: l.MaxClients},
		param{field: "nclients", value: uint32(len(clients(a.server)))},
		param{field: maxUnauth, value: l.MaxUnauth},
		param{field: "nclients_unauth"}), nil
}

func (p *Program) setLimits(c *rpc.Client, a *args, out []byte) ([]byte, error) {
	v, err := values(a.params, maxClients, maxUnauth)
	if err != nil {
		return out, err
	}
	l, err := p.mergeLimits(a.server, v)
	if err != nil {
		return out, err
	}
	p.changed(c, "the limits of a server were set", slog.String("server", a.server.Name()),
		slog.Uint64(maxClients, uint64(l.MaxClients)), slog.Uint64(maxUnauth, uint64(l.MaxUnauth)))
	return out, nil
}

// mergeLimits sets those limits that are given.
func (p *Program) mergeLimits(s *rpc.Server, v map[string]uint32) (rpc.Limits, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := s.Limits()
	if n, set := v[maxClients]; set {
		l.MaxClients = n
	}
	if n, set := v[maxUnauth]; set {
		l.MaxUnauth = n
	}
	if l.MaxClients < l.MaxUnauth {
		return l, errUnauthAboveMax
	}
	s.SetLimits(l)
	return l, nil
}

func (p *Program) outputs(_ *rpc.Client, _ *args, out []byte) ([]byte, error) {
	s, n := p.cfg.Logs.Outputs()
	if len(s) > maxString {
		return out, errTooLong
	}
	return xdr.AppendUint32(xdr.AppendString(out, s), uint32(n)), nil
}

func (p *Program) filters(_ *rpc.Client, _ *args, out []byte) ([]byte, error) {
	s, n := p.cfg.Logs.Filters()
	if len(s) > maxString {
		return out, errTooLong
	}
	var text *string
	if n > 0 {
		text = &s
	}
	return xdr.AppendUint32(xdr.AppendOptionalString(out, text), uint32(n)), nil
}

func (p *Program) setOutputs(c *rpc.Client, a *args, out []byte) ([]byte, error) {
	if err := p.cfg.Logs.SetOutputs(a.text); err != nil {
		return out, err
	}
	p.changed(c, "the log outputs were set", slog.String("outputs", a.text))
	return out, nil
}

func (p *Program) setFilters(c *rpc.Client, a *args, out []byte) ([]byte, error) {
	if err := p.cfg.Logs.SetFilters(a.text); err != nil {
		return out, err
	}
	p.changed(c, "the log filters were set", slog.String("filters", a.text))
	return out, nil
}

// updateTLS is for servers on the network.
func (p *Program) updateTLS(*rpc.Client, *args, []byte) ([]byte, error) { return nil, errNoTLS }

func (p *Program) setTimeout(c *rpc.Client, a *args, out []byte) ([]byte, error) {
	p.cfg.SetTimeout(a.seconds)
	p.changed(c, "the daemon's timeout was set", slog.Uint64("seconds", uint64(a.seconds)))
	return out, nil
}

// replyTime is how long the daemon's end waits for the reply to be out.
const replyTime = 2 * time.Second

// shutdown ends the daemon after its reply, and the connection with it.
func (p *Program) shutdown(c *rpc.Client, a *args, out []byte) ([]byte, error) {
	keep := a.flags&preserve != 0
	begin, err := p.cfg.Shutdown(keep)
	if err != nil {
		return out, err
	}
	p.changed(c, "the daemon shuts down", slog.Bool("preserve", keep))
	begin = sync.OnceFunc(begin)
	p.mu.Lock()
	p.ends[c] = begin
	p.mu.Unlock()
	c.CloseAfterReply()
	// Nothing is locked any more from here on, so an administrator who does not read his reply is not
	// waited for.
	time.AfterFunc(replyTime, begin)
	return out, nil
}
