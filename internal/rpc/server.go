// SPDX-License-Identifier: LGPL-2.1-or-later

// Package rpc serves libvirt's remote procedure call protocol on Unix sockets:
// listeners, clients and their credentials, limits, framing, keepalive, and
// dispatch by program.
//
// A [Server] hands the calls of its clients to its [Program]s, one call of a
// client at a time and in order, different clients in parallel. A call is
// executed on the goroutine that got the event from the poller, so nothing is
// handed over on its way. An idle client costs one small struct.
package rpc

import (
	"cmp"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/poll"
	"virtlockd/internal/vault"
)

const (
	// backlog is the length of the queue of connections that are not accepted
	// yet (listen(2)), the C daemon's.
	backlog = 30

	defaultMaxKept = 64 << 20

	// defaultMaxMessage is enough for each request of the lock protocol.
	defaultMaxMessage = 256 << 10

	// acceptRetry is how long accepting rests after it failed for lack of
	// descriptors or memory, if no client leaves before.
	acceptRetry = time.Second

	// sayAgain is how long a state that goes on, or comes back and back, is not
	// logged again.
	sayAgain = time.Minute

	// endBatch is how many disconnects are worked off at a stretch before other
	// goroutines get their turn.
	endBatch = 4
)

// Config says what a Server is.
type Config struct {
	Name string // "virtlockd" or "admin", for logs

	// MaxClients is how many clients are served at a time; others wait in the
	// listening socket's queue. MaxUnauth is the limit for those that have not
	// authenticated yet: a number to be shown and set, since on a Unix socket
	// there are none.
	MaxClients, MaxUnauth uint32

	// Setting names the configuration key of MaxClients, for the log line that
	// says that the limit is reached. Default: max_clients.
	Setting string

	// MaxMessage is how many bytes of a message are kept, its header included.
	// It must be enough for any valid message: the rest is received and
	// dropped, because bytes behind the arguments have no meaning. Default:
	// 256 KiB.
	MaxMessage int

	// MaxKept is how many bytes all clients together can make the server keep:
	// unfinished requests, and replies that they do not read. A client that
	// would make it more is closed. Default: 64 MiB.
	MaxKept int64

	AllowUID uint32 // who may connect

	Programs []Program

	// Logger gets a line for each client that is refused or breaks the
	// protocol. Default: none.
	Logger *slog.Logger

	// Changed is called after the number of clients has changed. It must not
	// block.
	Changed func()

	// Describe adds to what is stored of a client in a vault what its session has. It must not
	// block. nil: no client is ever stored.
	Describe func(c *Client, into *vault.Client)
}

// Limits are the limits of a server that can be changed at run time.
type Limits struct {
	MaxClients, MaxUnauth uint32 // as in Config
}

// Server serves programs to the clients of its sockets.
type Server struct {
	cfg      Config
	poller   *poll.Poller
	log      *slog.Logger
	programs []programEntry

	kept atomic.Int64 // bytes that count against MaxKept

	vault    atomic.Pointer[vault.Vault] // see SetVault
	unstored atomic.Uint64

	// mu guards what follows. It is taken after listener.mu, and not held while
	// anything of a program or a client is called.
	mu        sync.Mutex
	clients   map[uint64]*Client
	lastID    uint64
	live      uint32 // clients accepted, or about to be, and not ended: what the limit is about
	limits    Limits
	listeners []*listener
	fullSaid  time.Time // when the log said that the limit is reached
	emptySaid time.Time // when the log said that descriptors are used up
	retry     *time.Timer
	closing   bool
	gone      sync.Cond // live has become 0

	// See Freeze.
	freezing atomic.Bool
	rested   chan struct{} // a client has come to rest, or has ended, while freezing

	// Clients that are to be ended. One goroutine at a time works them off,
	// in order, so that many disconnects at once leave the others for requests. It leaves
	// those to others that may take long, see ended.
	endMu    sync.Mutex
	firstEnd *Client
	lastEnd  *Client
	ending   bool
}

type programEntry struct {
	program, version uint32
	Program
}

// NewServer returns a server without sockets.
func NewServer(p *poll.Poller, cfg Config) *Server {
	if cfg.Setting == "" {
		cfg.Setting = "max_clients"
	}
	if cfg.MaxMessage < headerSize {
		cfg.MaxMessage = defaultMaxMessage
	}
	if cfg.MaxKept <= 0 {
		cfg.MaxKept = defaultMaxKept
	}
	cfg.MaxMessage = min(cfg.MaxMessage, maxLength)
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{
		cfg:     cfg,
		poller:  p,
		log:     cfg.Logger,
		clients: make(map[uint64]*Client),
		limits:  Limits{cfg.MaxClients, cfg.MaxUnauth},
		rested:  make(chan struct{}, 1),
	}
	s.gone.L = &s.mu
	// Made now, although it is for later: with the first timer the runtime opens
	// descriptors of its own, and it ends the process if there are none left.
	s.retry = time.AfterFunc(time.Hour, s.resume)
	s.retry.Stop()
	for _, program := range cfg.Programs {
		number, version := program.ID()
		s.programs = append(s.programs, programEntry{number, version, program})
	}
	return s
}

// program returns the program with these numbers, nil if there is none.
func (s *Server) program(number, version uint32) Program {
	for i := range s.programs {
		if p := &s.programs[i]; p.program == number && p.version == version {
			return p.Program
		}
	}
	return nil
}

// Name returns the name from the configuration.
func (s *Server) Name() string { return s.cfg.Name }

// Clients returns all clients, ordered by id.
func (s *Server) Clients() []*Client {
	type entry struct { // so that to sort touches no client: there may be thousands
		id uint64
		*Client
	}
	s.mu.Lock()
	entries := make([]entry, 0, len(s.clients))
	for id, c := range s.clients {
		entries = append(entries, entry{id, c})
	}
	s.mu.Unlock()
	slices.SortFunc(entries, func(a, b entry) int { return cmp.Compare(a.id, b.id) })
	all := make([]*Client, len(entries))
	for i, e := range entries {
		all[i] = e.Client
	}
	return all
}

// Client returns the client with this id, nil if there is none.
func (s *Server) Client(id uint64) *Client {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.clients[id]
}

// Count returns how many clients are connected.
func (s *Server) Count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.clients)
}

// Limits returns the limits in force.
func (s *Server) Limits() Limits {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.limits
}

// SetLimits changes the limits at once. Clients that wait are let in as far as
// there is room now; nobody is disconnected.
func (s *Server) SetLimits(l Limits) {
	s.mu.Lock()
	s.limits = l
	s.fullSaid = time.Time{}
	awake := s.wake(restFull, restExhausted)
	s.mu.Unlock()
	arm(awake)
}

// Shutdown stops accepting, closes the listening sockets and all clients, and
// returns when the last one has ended. That takes as long as the longest call
// that runs.
func (s *Server) Shutdown() {
	s.mu.Lock()
	s.closing = true
	listeners := s.listeners
	s.listeners = nil
	s.retry.Stop()
	s.mu.Unlock()
	for _, l := range listeners {
		l.close()
	}
	for _, c := range s.Clients() {
		if c.requestClose() {
			c.run()
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.live > 0 {
		s.gone.Wait()
	}
}

// admit reserves room for one more client, or makes the listener rest until there
// is some.
func (s *Server) admit(l *listener) bool {
	s.mu.Lock()
	switch {
	case s.closing:
		s.mu.Unlock()
		return false
	case s.live < s.limits.MaxClients:
		s.live++
		s.mu.Unlock()
		return true
	}
	l.rest = restFull
	limit, say := s.limits.MaxClients, due(&s.fullSaid)
	s.mu.Unlock()
	if say {
		s.log.Warn(fmt.Sprintf("%s has its limit of %d clients: new ones have to wait until one leaves; raise %s to serve more at a time",
			s.cfg.Name, limit, s.cfg.Setting))
	}
	return false
}

// cancel gives room back that admit reserved and nobody used. A listener that
// rests for lack of descriptors is not woken: nothing has changed for it.
func (s *Server) cancel() {
	s.mu.Lock()
	s.live--
	awake := s.wake(restFull)
	s.mu.Unlock()
	arm(awake)
}

// leave gives room back that admit reserved.
func (s *Server) leave() {
	s.mu.Lock()
	s.live--
	if s.live == 0 {
		s.gone.Broadcast()
	}
	awake := s.wake(restFull, restExhausted)
	s.mu.Unlock()
	arm(awake)
}

// resume lets resting listeners go on if there is room.
func (s *Server) resume() {
	s.mu.Lock()
	awake := s.wake(restFull, restExhausted)
	s.mu.Unlock()
	arm(awake)
}

// wake returns the listeners that rest for one of these reasons and rest no
// longer, because there is room.
func (s *Server) wake(reasons ...rest) (awake []*listener) {
	if s.closing || s.live >= s.limits.MaxClients {
		return nil
	}
	for _, l := range s.listeners {
		if slices.Contains(reasons, l.rest) {
			l.rest = restNot
			awake = append(awake, l)
		}
	}
	return awake
}

// exhausted makes the listener rest because accept failed for lack of something.
func (s *Server) exhausted(l *listener, errno unix.Errno) {
	s.mu.Lock()
	l.rest = restExhausted
	say := due(&s.emptySaid)
	if !s.closing {
		s.retry.Reset(acceptRetry)
	}
	s.mu.Unlock()
	if say {
		s.log.Error(fmt.Sprintf("%s cannot accept clients: %v; they have to wait until one leaves or the limit of open files is raised (LimitNOFILE= in the unit)",
			s.cfg.Name, errno))
	}
}

// due tells whether something may be logged again that was logged at *last, and
// sets *last if so.
func due(last *time.Time) bool {
	now := time.Now()
	if now.Sub(*last) < sayAgain {
		return false
	}
	*last = now
	return true
}

// refuse closes a connection for which room was reserved, with all that came along, see ended. Until that is done it counts.
func (s *Server) refuse(fd int) {
	unix.Close(fd)
	s.leave()
}

// accepted makes a client of a connection, for which room is reserved. It is
// active. nil: the connection is closed.
func (s *Server) accepted(fd int) *Client {
	refuseDescriptors(fd) // it may have been made before its listening socket was ours
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		s.log.Error("cannot tell who has connected", "error", os.NewSyscallError("getsockopt(SO_PEERCRED)", err))
		go s.refuse(fd)
		return nil
	}
	up, err := uptime()
	if err != nil {
		s.log.Error("cannot accept a client", "error", err)
		go s.refuse(fd)
		return nil
	}
	c := &Client{
		server:   s,
		accepted: time.Now().UnixNano(),
		uptime:   up,
		pid:      cred.Pid,
		uid:      cred.Uid,
		gid:      cred.Gid,
		fd:       fd,
	}
	c.state.Store(stateActive) // nobody else runs it before it is complete
	allowed := cred.Uid == s.cfg.AllowUID
	s.mu.Lock()
	s.lastID++
	c.id = s.lastID
	s.mu.Unlock()
	if !allowed {
		s.log.Error(fmt.Sprintf("operation forbidden: Disallowing client %d with uid %d", cred.Pid, cred.Uid))
		go s.refuse(fd)
		return nil
	}

	for i := range s.programs {
		if o, ok := s.programs[i].Program.(Opener); ok {
			o.Opened(c)
		}
	}
	// Not before it has its session, which administrators ask about.
	s.mu.Lock()
	s.clients[c.id] = c
	s.mu.Unlock()
	if s.cfg.Changed != nil {
		s.cfg.Changed()
	}
	return c
}

// end takes leave of a client. Its goroutine is the only one that does, and stays
// active.
func (s *Server) end(c *Client) {
	s.endMu.Lock()
	if s.lastEnd == nil {
		s.firstEnd = c
	} else {
		s.lastEnd.next = c
	}
	s.lastEnd = c
	if s.ending {
		s.endMu.Unlock()
		return
	}
	s.ending = true
	for n := 1; s.firstEnd != nil; n++ {
		c := s.firstEnd
		if s.firstEnd = c.next; s.firstEnd == nil {
			s.lastEnd = nil
		}
		c.next = nil
		s.endMu.Unlock()
		s.ended(c)
		if n%endBatch == 0 {
			runtime.Gosched()
		}
		s.endMu.Lock()
	}
	s.ending = false
	s.endMu.Unlock()
}

// ended closes a client's connection and forgets it. What was not read of it may have descriptors attached, which the
// kernel closes with it: others are not to wait for their disks.
func (s *Server) ended(c *Client) {
	c.hangUp()
	if unread(c.fd) {
		go s.forget(c)
		return
	}
	s.forget(c)
}

func (s *Server) forget(c *Client) {
	c.closeDescriptor()
	c.in, c.out = nil, nil
	c.charge()
	s.mu.Lock()
	delete(s.clients, c.id)
	s.mu.Unlock()
	for i := range s.programs {
		s.programs[i].Closed(c, c.byPeer)
	}
	c.unkeep() // not before: after a crash the next process would not know that the peer has hung up
	if s.cfg.Changed != nil {
		s.cfg.Changed()
	}
	s.leave()
	if s.freezing.Load() {
		s.frozenRest()
	}
}
