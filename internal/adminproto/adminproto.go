// SPDX-License-Identifier: LGPL-2.1-or-later

// Package adminproto serves libvirt's admin protocol, program 0x06900690 version 1, as virt-admin
// speaks it: it decodes a call, does it on the daemon's servers and logs, and words the answer as
// the C daemon does.
package adminproto

import (
	"context"
	"log/slog"
	"sync"

	"virtlockd/internal/logging"
	"virtlockd/internal/owner"
	"virtlockd/internal/rpc"
	"virtlockd/internal/xdr"
)

// The program's numbers on the wire.
const (
	ProgramID = 0x06900690
	Version   = 1
)

const (
	// maxString bounds each string of a message, in bytes: the protocol's own limit.
	maxString = 4 << 20
	// maxParams bounds the typed parameters of a message: the protocol's own limit.
	maxParams = 32
	// maxList bounds the clients in a reply, because the peer refuses more: the protocol's own limit.
	maxList = 16384
	// MaxMessage bounds what is kept of a call, in bytes. The largest that makes sense has one string.
	MaxMessage = maxString + 512<<10
)

// preserve is the flag of DAEMON_SHUTDOWN that wants everything to be kept (libvirt 11.2).
const preserve = 1 << 0

// layout says which arguments a procedure has, in the order of the wire.
type layout struct {
	server  bool
	client  bool // its number, and a time stamp and a transport that nobody looks at
	id      bool // its number alone
	results bool // whether a list is wanted, or its length alone
	params  bool
	text    bool
	seconds bool
	flags   bool
}

// procedure is one call of the protocol.
type procedure struct {
	// function of the C daemon, which an error for unknown flags names. "": the flags are ignored.
	function string
	layout   layout
	flags    uint32 // those that it knows
	changes  bool   // something: refused to clients that can only look
	notFound wording
	run      func(p *Program, c *rpc.Client, a *args, out []byte) ([]byte, error)
}

// procedures by their number on the wire.
var procedures = [...]procedure{
	1:  {function: "adminDispatchConnectOpen", layout: layout{flags: true}, run: (*Program).open},
	2:  {run: (*Program).close},
	3:  {run: (*Program).libVersion},
	4:  {function: "adminConnectListServers", layout: layout{results: true, flags: true}, run: (*Program).listServers},
	5:  {layout: layout{server: true, flags: true}, run: (*Program).lookupServer},
	6:  {function: "adminServerGetThreadPoolParameters", layout: layout{server: true, flags: true}, run: (*Program).threadPool},
	7:  {function: "adminServerSetThreadPoolParameters", changes: true, layout: layout{server: true, params: true, flags: true}, notFound: reworded, run: (*Program).setThreadPool},
	8:  {function: "adminServerListClients", layout: layout{server: true, results: true, flags: true}, run: (*Program).listClients},
	9:  {function: "adminServerLookupClient", layout: layout{server: true, id: true, flags: true}, run: (*Program).lookupClient},
	10: {function: "adminClientGetInfo", layout: layout{server: true, client: true, flags: true}, notFound: reworded, run: (*Program).clientInfo},
	11: {function: "adminClientClose", changes: true, layout: layout{server: true, client: true, flags: true}, run: (*Program).closeClient},
	12: {function: "adminServerGetClientLimits", layout: layout{server: true, flags: true}, run: (*Program).limits},
	13: {function: "adminServerSetClientLimits", changes: true, layout: layout{server: true, params: true, flags: true}, notFound: reworded, run: (*Program).setLimits},
	14: {function: "adminConnectGetLoggingOutputs", layout: layout{flags: true}, run: (*Program).outputs},
	15: {function: "adminConnectGetLoggingFilters", layout: layout{flags: true}, run: (*Program).filters},
	16: {function: "adminConnectSetLoggingOutputs", changes: true, layout: layout{text: true, flags: true}, run: (*Program).setOutputs},
	17: {function: "adminConnectSetLoggingFilters", changes: true, layout: layout{text: true, flags: true}, run: (*Program).setFilters},
	18: {function: "adminServerUpdateTlsFiles", changes: true, layout: layout{server: true, flags: true}, run: (*Program).updateTLS},
	19: {function: "adminConnectSetDaemonTimeout", changes: true, layout: layout{seconds: true, flags: true}, run: (*Program).setTimeout},
	20: {function: "adminConnectDaemonShutdown", changes: true, layout: layout{flags: true}, flags: preserve, run: (*Program).shutdown},
}

type args struct {
	serverName string
	id         uint64
	results    bool
	params     []param
	text       string // "" for an absent one too
	seconds    uint32
	flags      uint32

	// Found by resolve.
	server *rpc.Server
	client *rpc.Client
}

func (l layout) decode(payload []byte) (a args, err error) {
	d, ok := xdr.NewDecoder(payload), true
	if l.server {
		a.serverName = d.String(maxString)
	}
	if l.client || l.id {
		a.id = d.Uint64()
	}
	if l.client {
		d.Int64()
		d.Uint32()
	}
	if l.results {
		a.results = d.Bool()
	}
	if l.params {
		a.params, ok = decodeParams(&d)
	}
	if l.text {
		if text := d.OptionalString(maxString); text != nil {
			a.text = *text
		}
	}
	if l.seconds {
		a.seconds = d.Uint32()
	}
	if l.flags {
		a.flags = d.Uint32()
	}
	if !ok || d.Err() != nil {
		return a, rpc.ErrDecode
	}
	return a, nil
}

// Logs are the daemon's logging settings: *logging.Logs.
type Logs interface {
	// Filters and Outputs return what is in force as virt-admin shows it, and how many there are.
	Filters() (string, int)
	Outputs() (string, int)
	// SetFilters and SetOutputs change all of them at once, or nothing. "" goes back to the
	// default. Errors: *logging.InvalidError, *logging.OpenError.
	SetFilters(string) error
	SetOutputs(string) error
}

var _ Logs = (*logging.Logs)(nil)

// Config of a Program. Every field is needed.
type Config struct {
	// Servers returns the daemon's servers, always in the same order.
	Servers func() []*rpc.Server
	Logs    Logs
	// Guards names the guest whose own connection this is and who holds locks; nil for any other
	// client.
	Guards func(*rpc.Client) *owner.Details
	// SetTimeout makes the daemon end when it has had nothing to do for so many seconds. 0: never.
	SetTimeout func(seconds uint32)
	// Shutdown says whether the daemon may end, and returns what makes it end, which must not
	// block. That is called when the administrator has been answered. preserve: all that the
	// daemon holds has to outlive it. Without preserve it is refused while locks are held
	// (*LocksHeldError).
	Shutdown func(preserve bool) (begin func(), err error)
	// Changed is called when settings were changed, before the administrator is answered. nil: nobody cares.
	Changed func()
	// LibVersion is the version of libvirt that we stand in for: 1,000,000 * major + 1,000 *
	// minor + release.
	LibVersion uint64
	Logger     *slog.Logger
}

// Program is an rpc.Program.
type Program struct {
	cfg Config

	mu sync.Mutex // makes each change of settings, which are read and merged first, one step
	// priorityWorkers by server. There are no workers; but what was set is shown again.
	priorityWorkers map[string]uint32
	// ends has what makes the daemon end, by the client that asked for it and is being answered.
	ends map[*rpc.Client]func()
}

var _ rpc.Program = (*Program)(nil)

// New returns the program on a daemon.
func New(cfg Config) *Program {
	return &Program{cfg: cfg, priorityWorkers: map[string]uint32{}, ends: map[*rpc.Client]func(){}}
}

// ID implements rpc.Program.
func (p *Program) ID() (program, version uint32) { return ProgramID, Version }

// Call implements rpc.Program. The order of the checks is part of the protocol: arguments, server,
// client, names of parameters, unknown flags. Nothing needs CONNECT_OPEN first.
func (p *Program) Call(c *rpc.Client, proc uint32, payload, out []byte) ([]byte, error) {
	if proc == 0 || proc >= uint32(len(procedures)) {
		return out, rpc.ErrNoProc
	}
	pr := &procedures[proc]
	a, err := pr.layout.decode(payload)
	if err != nil {
		return out, err
	}
	if err = p.admit(c, pr, &a); err == nil {
		out, err = pr.run(p, c, &a, out)
	}
	if err == nil {
		return out, nil
	}
	wire := wireError(err)
	p.cfg.Logger.LogAttrs(context.Background(), slog.LevelError, wire.Message, administrator(c))
	if len(wire.Message) > maxString {
		// Such a text can't be sent, since the peer refuses it. The C daemon closes the connection.
		c.Close()
	}
	return out, wire
}

func (p *Program) admit(c *rpc.Client, pr *procedure, a *args) error {
	if pr.changes && c.ReadOnly() {
		return errReadOnly
	}
	if err := p.resolve(pr, a); err != nil {
		return err
	}
	if err := checkNames(a.params); err != nil {
		return err
	}
	if unknown := a.flags &^ pr.flags; pr.function != "" && unknown != 0 {
		return rpc.BadFlags(pr.function, rpc.DomainAdmin, unknown)
	}
	return nil
}

// resolve finds the server and the client that the call is about.
func (p *Program) resolve(pr *procedure, a *args) error {
	if !pr.layout.server {
		return nil
	}
	for _, s := range p.cfg.Servers() {
		if s.Name() == a.serverName {
			a.server = s
		}
	}
	if a.server == nil {
		return pr.notFound.server(a.serverName)
	}
	if pr.layout.client {
		a.client = client(a.server, a.id)
		if a.client == nil {
			return pr.notFound.client(a.id)
		}
	}
	return nil
}

// administrator says in a log line who has asked.
func administrator(c *rpc.Client) slog.Attr {
	return slog.Group("administrator", slog.Int("pid", int(c.PID())), slog.Uint64("client", c.ID()))
}

// did logs what an administrator did.
func (p *Program) did(c *rpc.Client, what string, attrs ...slog.Attr) {
	p.cfg.Logger.LogAttrs(context.Background(), slog.LevelInfo, what, append(attrs, administrator(c))...)
}

// changed is did for settings. p.mu is not held.
func (p *Program) changed(c *rpc.Client, what string, attrs ...slog.Attr) {
	p.did(c, what, attrs...)
	if p.cfg.Changed != nil {
		p.cfg.Changed()
	}
}

// Undo implements rpc.Program. What an administrator has changed stays so, whether or not he heard
// of it.
func (p *Program) Undo(*rpc.Client) {}

// Closed implements rpc.Program. A daemon that was told to end does so now that the reply is out.
func (p *Program) Closed(c *rpc.Client, _ bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if begin := p.ends[c]; begin != nil {
		begin()
		delete(p.ends, c)
	}
}

// Ending reports whether the daemon was told to end, and only the reply has to be out before it does. That is no state to
// hand over.
func (p *Program) Ending() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.ends) > 0
}
