// SPDX-License-Identifier: LGPL-2.1-or-later

// Package owner knows the processes in whose name locks are held: who they are, when
// they end, and how a guest that has lost its connection is ended.
//
// A lock belongs to a process, and libvirt names it by a number. A number is not a
// process: it is used again. So every owner that we can see is held by a pidfd, and its death is
// an event of the kernel, not a guess.
package owner

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/events"
	"virtlockd/internal/poll"
)

// Details is what a client said of an owner at REGISTER.
type Details struct {
	Name string
	UUID [16]byte
	ID   uint32 // libvirt's number of the running domain
	PID  int32  // as it was sent: any 32 bits
}

// UUIDString returns the UUID in its usual form of 36 characters.
func (d *Details) UUIDString() string {
	u := d.UUID
	b := make([]byte, 0, 36)
	for i, part := range [...][]byte{u[0:4], u[4:6], u[6:8], u[8:10], u[10:16]} {
		if i > 0 {
			b = append(b, '-')
		}
		b = hex.AppendEncode(b, part)
	}
	return string(b)
}

// LogValue names the domain in a log line.
func (d *Details) LogValue() slog.Value {
	return slog.GroupValue(
		slog.String("domain", d.Name),
		slog.String("uuid", d.UUIDString()),
		slog.Int("pid", int(d.PID)),
	)
}

// Kind says how much we know of an owner, which decides when its locks end.
type Kind uint8

const (
	// Unverified owners are only a number: pid 0, a process that does not exist, or one that a
	// client in another pid namespace named. Their locks are never given up by us.
	Unverified Kind = iota
	// Watched owners were named by another process of our pid namespace. Their locks are given
	// up when they have ended.
	Watched
	// Verified owners have registered themselves: the kernel told us that the peer of the
	// connection is that process. Besides, their hang-up ends them (see Registry.HangUp).
	Verified
)

func (k Kind) String() string {
	return [...]string{"unverified", "watched", "verified"}[k]
}

// An Owner is one process (or one bare number) in whose name locks are held.
type Owner struct {
	PID int32

	details atomic.Pointer[Details] // by the latest registration
	reg     *Registry
	proc    *process // nil: unverified
	token   poll.Token

	// Owned by Registry.mu.
	kind   Kind
	refs   int // registrations, locks and calls that use it
	ending bool
	// stopped: by Stop, and not continued since.
	stopped bool
	died    chan struct{} // closed when the process has ended; nil: unverified

	place atomic.Int32 // in the snapshot while the registry is frozen, from 1; else 0
}

// Details of the owner by its latest registration.
func (o *Owner) Details() *Details { return o.details.Load() }

// Kind of the owner now; it only ever rises.
func (o *Owner) Kind() Kind {
	o.reg.mu.Lock()
	defer o.reg.mu.Unlock()
	return o.kind
}

// Fate is what the kernel says of an owner's process.
type Fate uint8

// The fates of a process.
const (
	Alive   Fate = iota
	Ended        // its locks are about to be released
	Missing      // an unverified owner's number is nobody's, as far as can be seen from here
)

// Ask asks the kernel about the owner's process. It needs no reference to the owner. A number that means nothing
// here, 0, counts as alive.
func (o *Owner) Ask() Fate {
	o.reg.mu.Lock()
	defer o.reg.mu.Unlock()
	switch {
	case o.proc == nil && (o.PID <= 0 || unix.Kill(int(o.PID), 0) != unix.ESRCH):
		return Alive
	case o.proc == nil:
		return Missing
	case o.refs == 0 || o.proc.ended(): // without references the pidfd is closed
		return Ended
	}
	return Alive
}

// Dead tells that the owner's process has ended. It is never true of an unverified one.
func (o *Owner) Dead() bool {
	return o.proc != nil && o.proc.dead.Load()
}

// Ready is the kernel's word that the process has ended (poll.Handler on the pidfd).
func (o *Owner) Ready(uint32) { o.reg.ended(o) }

// Config of a Registry.
type Config struct {
	Poller *poll.Poller
	Logger *slog.Logger
	Events *events.Log // nil: nobody wants to know
	// Died gives up the locks of an owner that has ended. It is called once for each owner with a
	// process, by whoever sees first that this has ended. That may be on behalf of a client, so it
	// does not wait for a disk that may hang.
	Died func(*Owner)
}

// A Registry holds every owner that something refers to.
type Registry struct {
	cfg Config
	ctx context.Context // ends kill sequences at shutdown, not guests
	end context.CancelFunc
	run sync.WaitGroup

	mu      sync.Mutex
	byPID   map[int32]*Owner    // with a process that lives
	numbers map[int32]*Owner    // unverified
	lately  map[int32]time.Time // numbers of processes that have ended, see remember
	placing sync.Mutex          // while frozen it guards placed
	placed  []*Owner            // while frozen: the snapshot
}

// NewRegistry returns an empty one.
func NewRegistry(cfg Config) *Registry {
	ctx, end := context.WithCancel(context.Background())
	return &Registry{cfg: cfg, ctx: ctx, end: end, byPID: map[int32]*Owner{}, numbers: map[int32]*Owner{}, lately: map[int32]time.Time{}}
}

// Close ends kill sequences that are under way, without another signal, and returns when
// their goroutines have ended. Guests are never ended because we stop.
func (r *Registry) Close() {
	r.end()
	r.run.Wait()
}

// Self returns the owner that registered itself: pidfd is its own, as the kernel names the
// peer of the connection, and belongs to the registry from now on. Release it when done.
func (r *Registry) Self(d *Details, pidfd int) (*Owner, error) {
	return r.adopt(d, &process{pid: d.PID, fd: pidfd}, Verified)
}

// Named returns the owner that another process speaks for. local says that this process is in
// our pid namespace, so that the number means something. Release it when done.
//
// Errors: ErrDead, also for an owner that has ended lately, or what pidfd_open says but for "no such
// process", which makes an unverified owner.
func (r *Registry) Named(d *Details, local bool) (*Owner, error) {
	if !local || d.PID <= 0 {
		return r.number(d), nil
	}
	r.mu.Lock()
	o := r.byPID[d.PID]
	if o != nil {
		o.refs++
	}
	r.mu.Unlock()
	if o != nil {
		if !o.proc.ended() {
			o.details.Store(d)
			return o, nil
		}
		// The number may already be somebody else's: his locks must not go with the
		// dead one's.
		r.ended(o)
		o.Release()
	}
	p, err := openProcess(d.PID)
	if err != nil {
		if noSuchProcess(err) {
			if r.endedLately(d.PID) {
				return nil, ErrDead
			}
			return r.number(d), nil
		}
		return nil, fmt.Errorf("cannot watch process %d, the owner of domain %q: %w", d.PID, d.Name, err)
	}
	return r.adopt(d, p, Watched)
}

// ErrDead says that the owner's process has ended, so nothing can be held for it.
var ErrDead = errors.New("the owner's process has ended")

func (r *Registry) number(d *Details) *Owner {
	r.mu.Lock()
	defer r.mu.Unlock()
	o := r.numbers[d.PID]
	if o == nil {
		o = &Owner{PID: d.PID, reg: r}
		r.numbers[d.PID] = o
	}
	o.details.Store(d)
	o.refs++
	return o
}

// adopt finds or makes the owner of a process; p is closed where it is known already.
func (r *Registry) adopt(d *Details, p *process, kind Kind) (*Owner, error) {
	if p.ended() {
		p.close()
		return nil, ErrDead
	}
	o, err := r.enter(d, p, kind)
	if err != nil {
		p.close()
	}
	return o, err
}

// enter is adopt for a process that may have ended. If there is an error, p is still the caller's.
func (r *Registry) enter(d *Details, p *process, kind Kind) (*Owner, error) {
	r.mu.Lock()
	known := r.byPID[d.PID]
	if known != nil && known.proc.ended() {
		// p lives and has the same number, so the known one is another process.
		r.mu.Unlock()
		r.ended(known)
		r.mu.Lock()
		known = r.byPID[d.PID]
	}
	if known != nil && p.ended() {
		// Nobody is to join the one that lives, whose number this one had before. Its owner is dead from the beginning.
		r.mu.Unlock()
		o := &Owner{PID: d.PID, reg: r, proc: p, kind: kind, refs: 1, died: make(chan struct{})}
		o.details.Store(d)
		close(o.died)
		return o, nil
	}
	if known != nil {
		// Two processes that live at the same time do not share a number.
		known.refs++
		known.kind = max(known.kind, kind)
		known.details.Store(d)
		r.mu.Unlock()
		p.close()
		return known, nil
	}
	o := &Owner{PID: d.PID, reg: r, proc: p, kind: kind, refs: 1, died: make(chan struct{})}
	o.details.Store(d)
	// EPOLL_CTL_ADD does not block. Once only: a pidfd stays readable.
	token, err := r.cfg.Poller.Add(p.fd, unix.EPOLLIN|unix.EPOLLONESHOT, o)
	if err != nil {
		r.mu.Unlock()
		return nil, fmt.Errorf("cannot watch process %d, the owner of domain %q: %w", d.PID, d.Name, err)
	}
	o.token = token
	r.byPID[d.PID] = o
	r.mu.Unlock()
	return o, nil
}

// Retain adds a reference, for a lock held by the owner.
func (o *Owner) Retain() {
	o.reg.mu.Lock()
	o.refs++
	o.reg.mu.Unlock()
}

// Release drops a reference. The last one ends the watch.
func (o *Owner) Release() {
	r := o.reg
	r.mu.Lock()
	defer r.mu.Unlock()
	if o.refs--; o.refs > 0 {
		return
	}
	if o.proc == nil {
		delete(r.numbers, o.PID)
		return
	}
	if r.byPID[o.PID] == o {
		delete(r.byPID, o.PID)
	}
	r.cfg.Poller.Remove(o.token, o.proc.fd)
	o.proc.close()
}

// ended is called when the process is known to have ended, by whoever sees it first.
func (r *Registry) ended(o *Owner) {
	r.mu.Lock()
	if o.refs == 0 || r.byPID[o.PID] != o {
		r.mu.Unlock()
		return
	}
	o.refs++ // until its locks are given up
	o.proc.dead.Store(true)
	delete(r.byPID, o.PID)
	close(o.died)
	r.remember(o.PID)
	r.mu.Unlock()
	r.cfg.Died(o)
	o.Release()
}

// An owner that has just ended is still named by a libvirtd that does not know it yet. Held for a mere
// number, a lock would be nobody's.
const (
	rememberFor = time.Minute
	rememberMax = 4096
)

// remember notes that the process of that number has ended. r.mu is held.
func (r *Registry) remember(pid int32) {
	now := time.Now()
	if len(r.lately) >= rememberMax {
		maps.DeleteFunc(r.lately, func(_ int32, at time.Time) bool { return now.Sub(at) > rememberFor })
	}
	if len(r.lately) < rememberMax {
		r.lately[pid] = now
	}
}

// endedLately tells whether the number was an owner's that has ended not long ago.
func (r *Registry) endedLately(pid int32) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	at, ok := r.lately[pid]
	return ok && time.Since(at) <= rememberFor
}

// HangUp applies the kill rule: the connection of a verified owner was closed by its peer
// while it holds locks. A guest that lost the daemon's protection must not go on writing, so
// its process is given SIGTERM at once and SIGKILL after 1.6 s; its locks stay held until it
// is dead. Nearly always the guest has just ended, and nothing is left to do.
func (r *Registry) HangUp(o *Owner) {
	r.mu.Lock()
	if o.ending || o.Dead() || o.kind != Verified || r.ctx.Err() != nil {
		r.mu.Unlock()
		return
	}
	o.ending = true
	o.refs++
	r.run.Add(1)
	r.mu.Unlock()
	go func() {
		defer r.run.Done()
		defer o.Release()
		r.kill(o)
	}()
}

func (r *Registry) kill(o *Owner) {
	log := r.cfg.Logger.With(slog.Any("", o.Details()))
	log.Info("the owner closed its connection while it holds locks; it is asked to end (SIGTERM)")
	r.report(o, events.Terminate)
	if err := o.proc.signal(unix.SIGTERM); err != nil {
		log.Error("an owner without connection goes on", "error", err)
	}
	if r.wait(o, killAfter) {
		return
	}
	log.Warn("the owner closed its connection while it holds locks and ignores SIGTERM; it is killed")
	r.report(o, events.Kill)
	if err := o.proc.signal(unix.SIGKILL); err != nil {
		log.Error("an owner without connection goes on", "error", err)
	}
	if r.wait(o, complainAge-killAfter) {
		return
	}
	log.Error("the killed owner does not end, probably it waits for a disk; its locks stay held until it does")
	r.report(o, events.Stuck)
	r.wait(o, 0)
}

// report tells of a step of the kill sequence.
func (r *Registry) report(o *Owner, step events.Reason) {
	d := o.Details()
	r.cfg.Events.Add(events.Event{Kind: events.Killed, Reason: step, Owner: d.Name, UUID: d.UUID, PID: o.PID})
}

// ErrUnseen says that an owner is only a number: no process is known that could be sent a signal.
var ErrUnseen = errors.New("the owner's process cannot be seen from here")

// Stop stops the owner's process (SIGSTOP), so that it does nothing more until Continue. It needs no reference.
//
// Errors: ErrUnseen, ErrDead, or what the kernel says.
func (o *Owner) Stop() error {
	err := o.send(unix.SIGSTOP, events.Stop)
	if err == nil {
		o.setStopped(true)
	}
	return err
}

// ErrNotStopped says that it was not us who stopped an owner, if anybody did.
var ErrNotStopped = errors.New("this daemon has not stopped it; whoever did can continue it")

// Continue ends Stop.
//
// Errors: as for Stop, and ErrNotStopped.
func (o *Owner) Continue() error {
	if !o.Stopped() {
		return ErrNotStopped
	}
	err := o.send(unix.SIGCONT, events.Continue)
	if err == nil {
		o.setStopped(false)
	}
	return err
}

// Stopped tells that Stop has stopped the owner's process, in this process or in one that has handed over to it.
func (o *Owner) Stopped() bool {
	o.reg.mu.Lock()
	defer o.reg.mu.Unlock()
	return o.stopped
}

func (o *Owner) setStopped(is bool) {
	o.reg.mu.Lock()
	defer o.reg.mu.Unlock()
	o.stopped = is
}

// Kill ends the owner's process at once. Asked to end, it would go on writing for a while.
func (o *Owner) Kill() error { return o.send(unix.SIGKILL, events.Kill) }

func (o *Owner) send(sig unix.Signal, step events.Reason) error {
	o.reg.mu.Lock()
	defer o.reg.mu.Unlock()
	switch {
	case o.proc == nil:
		return ErrUnseen
	case o.refs == 0 || o.proc.ended(): // without references the pidfd is closed
		return ErrDead
	}
	err := o.proc.signal(sig)
	if err == nil {
		o.reg.report(o, step)
	}
	return err
}

// wait returns true when the owner has ended, or nobody cares any more; false after d.
// Zero is for ever.
func (r *Registry) wait(o *Owner, d time.Duration) bool {
	var timeout <-chan time.Time
	if d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		timeout = t.C
	}
	select {
	case <-o.died:
		return true
	case <-r.ctx.Done():
		return true
	case <-timeout:
		return false
	}
}
