// SPDX-License-Identifier: LGPL-2.1-or-later

// Package poll is the one epoll set of the daemon: it calls a handler when a
// descriptor becomes ready.
//
// The goroutine that gets an event calls the handler itself, so no hand-over to
// another one is on the way of a request. Mostly there is only one: if a second
// one waited beside it, the kernel would wake that for the next event, which is
// a thread switch for nothing. But a handler may block, and that must delay
// nobody. So another goroutine is made to wait for events
//
//   - when a handler says that it is about to wait: [Poller.Waiting];
//   - when for a millisecond or two nobody has waited for events and no handler
//     was called: they hang. A watcher sees that; it sleeps while nothing happens;
//   - for a while after that before each handler is called, for where one has
//     hung others will;
//   - when events come faster than they are worked off, and there are processors
//     for more.
//
// The kernel is given a slot and its generation, never a descriptor or a
// pointer. An event that was on its way while its descriptor was removed finds
// another generation in the slot and is dropped, also when the descriptor's
// number has been given to something else meanwhile (epoll(7), questions and
// answers 6 and following).
package poll

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// ErrClosed is returned by calls on a Poller that has been closed.
var ErrClosed = errors.New("poll: the poller is closed")

// Handler is called when its descriptor is ready.
type Handler interface {
	// Ready is given the EPOLL* bits that the kernel reported. It runs on a
	// goroutine of the poller and may block. Unless the descriptor is
	// registered with EPOLLONESHOT, it is called for the next event whether or
	// not the call for the last one has returned.
	Ready(events uint32)
}

// Token names one registration: a slot and its generation.
type Token struct{ slot, gen int32 }

// slot is one entry of the table. gen counts how often it was given away, so
// that no two registrations ever have the same token (until it wraps, after 2^32
// uses of one slot).
type slot struct {
	h   Handler // nil: free
	gen int32
}

// Poller is an epoll set with the goroutines that wait on it.
type Poller struct {
	epfd   int
	wakefd int // eventfd, readable once the poller is stopped; level-triggered, so it wakes every waiter

	loops   sync.WaitGroup // all goroutines
	workers atomic.Int32   // those that wait for events or call handlers
	waiting atomic.Int32   // those in epoll_wait, or on their way to it
	handled atomic.Uint32  // events for which a handler was called

	ticks   atomic.Int64 // the watcher's clock; it stands still while it rests
	wary    atomic.Int64 // until then handlers are expected to hang
	crowded atomic.Int64 // until then more than one may wait for events
	resting atomic.Bool  // the watcher sleeps until it gets wake
	wake    chan struct{}

	// Of a set that was inherited. Until it runs, what is registered is mostly in it already.
	inherited bool
	resuming  atomic.Bool
	oldest    int32 // generations up to this one were given away before

	mu      sync.Mutex // guards what follows; never held over a system call that can block
	slots   []slot
	free    []int32
	running bool
	stopped bool
	err     error // why epoll_wait failed

	stopping chan struct{} // closed when stopped is set
	done     chan struct{} // closed when the last goroutine has ended

	// life keeps epfd from being closed, and its number from being given to
	// something else, while epoll_ctl uses it. epoll_ctl does not block.
	life   sync.RWMutex
	closed bool
}

// slotWake is the slot of wakefd.
const slotWake = 0

// tick is how often the watcher looks.
const tick = time.Millisecond

// In ticks.
const (
	restAfter = 10 // without events the watcher sleeps
	waryFor   = 50 // after handlers have hung
	crowdFor  = 20 // after events have had to wait
	slice     = 6  // see loop
)

// sample is how many events a goroutine works off until it looks again whether
// others have to wait for it.
const sample = 16

// most is how many goroutines may wait for events at a time.
const most = 2

// maxCrowd is how many goroutines there may be because there are many events.
var maxCrowd = int32(min(runtime.NumCPU(), 4))

// New returns a poller that does not wait for events yet: see Run.
func New() (*Poller, error) {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("poll: %w", os.NewSyscallError("epoll_create1", err))
	}
	p, err := on(epfd)
	if err != nil {
		unix.Close(epfd)
	}
	return p, err
}

// on returns a poller on an epoll set.
func on(epfd int) (*Poller, error) {
	wakefd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("poll: %w", os.NewSyscallError("eventfd2", err))
	}
	ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: slotWake}
	if err := unix.EpollCtl(epfd, unix.EPOLL_CTL_ADD, wakefd, &ev); err != nil {
		unix.Close(wakefd)
		return nil, fmt.Errorf("poll: %w", os.NewSyscallError("epoll_ctl", err))
	}
	return &Poller{
		epfd:     epfd,
		wakefd:   wakefd,
		slots:    make([]slot, 1, 64), // slot 0 is slotWake
		wake:     make(chan struct{}, 1),
		stopping: make(chan struct{}),
		done:     make(chan struct{}),
	}, nil
}

// State returns what another binary in this process needs to go on with the epoll set: its descriptor, and a
// generation that no registration has had.
func (p *Poller) State() (epfd int, gen int32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	gen = p.oldest
	for i := range p.slots {
		gen = max(gen, p.slots[i].gen)
	}
	return p.epfd, gen + 1
}

// Inherit returns a poller on the epoll set that another binary in this process had, by its State: to take 10,000
// descriptors out of one set and put them into another takes the kernel 25 ms. Nothing in the set is believed. What is
// registered here replaces what it says of that descriptor, as if it came new, and events of all else are
// dropped for their generation. If there is an error, epfd is still the caller's.
func Inherit(epfd int, gen int32) (*Poller, error) {
	p, err := on(epfd)
	if err != nil {
		return nil, err
	}
	p.oldest = gen
	p.inherited = true
	p.resuming.Store(true)
	return p, nil
}

// Add registers a descriptor for the given EPOLL* events. The handler may be
// called before Add returns; one that needs its token uses Reserve and Start.
func (p *Poller) Add(fd int, events uint32, h Handler) (Token, error) {
	t, err := p.Reserve(h)
	if err != nil {
		return Token{}, err
	}
	if err := p.Start(t, fd, events); err != nil {
		return Token{}, err
	}
	return t, nil
}

// Reserve returns the token of a registration that does not exist yet: Start
// completes it, Remove drops it.
func (p *Poller) Reserve(h Handler) (Token, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped {
		return Token{}, ErrClosed
	}
	var i int32
	if n := len(p.free); n > 0 {
		i = p.free[n-1]
		p.free = p.free[:n-1]
	} else {
		i = int32(len(p.slots))
		p.slots = append(p.slots, slot{gen: p.oldest})
	}
	s := &p.slots[i]
	s.h = h
	s.gen++
	return Token{i, s.gen}, nil
}

// Start registers a descriptor under a reserved token, in place of what an inherited set
// has of it. After an error the token is no longer reserved.
func (p *Poller) Start(t Token, fd int, events uint32) error {
	first, second, otherwise := unix.EPOLL_CTL_ADD, unix.EPOLL_CTL_MOD, unix.EEXIST
	if p.resuming.Load() {
		first, second, otherwise = second, first, unix.ENOENT
	}
	err := p.ctl(first, t, fd, events)
	if p.inherited && errors.Is(err, otherwise) {
		err = p.ctl(second, t, fd, events)
	}
	if err != nil {
		p.release(t)
	}
	return err
}

// Modify changes the events of a registration. If one of them holds already,
// the handler is called for it, with EPOLLET and EPOLLONESHOT too.
func (p *Poller) Modify(t Token, fd int, events uint32) error {
	return p.ctl(unix.EPOLL_CTL_MOD, t, fd, events)
}

// Remove ends a registration. It is called before the descriptor is closed.
// Events that are on their way are dropped; a call of the handler that has
// begun goes on. Removing twice is harmless.
func (p *Poller) Remove(t Token, fd int) error {
	if !p.release(t) {
		return nil
	}
	return p.ctl(unix.EPOLL_CTL_DEL, t, fd, 0)
}

// release gives the slot of t back and reports whether t was registered.
func (p *Poller) release(t Token) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if t.slot == slotWake || int(t.slot) >= len(p.slots) {
		return false
	}
	s := &p.slots[t.slot]
	if s.gen != t.gen || s.h == nil {
		return false
	}
	s.h = nil
	p.free = append(p.free, t.slot)
	return true
}

func (p *Poller) ctl(op int, t Token, fd int, events uint32) error {
	p.life.RLock()
	defer p.life.RUnlock()
	if p.closed {
		return ErrClosed
	}
	ev := unix.EpollEvent{Events: events, Fd: t.slot, Pad: t.gen}
	if err := unix.EpollCtl(p.epfd, op, fd, &ev); err != nil {
		return fmt.Errorf("poll: descriptor %d: %w", fd, os.NewSyscallError("epoll_ctl", err))
	}
	return nil
}

// Run waits for events and calls handlers until ctx is done or Close is called,
// and returns nil when all goroutines have ended, the handlers they run included.
// An error says that waiting is impossible, and comes at once: a handler that
// hangs does not keep it. Run may be called once.
func (p *Poller) Run(ctx context.Context) error {
	p.mu.Lock()
	if p.stopped || p.running {
		p.mu.Unlock()
		return ErrClosed
	}
	p.running = true
	p.resuming.Store(false)
	// Begun under the mutex: Close waits for them.
	p.another()
	p.loops.Go(p.watch)
	p.mu.Unlock()

	stopWatching := context.AfterFunc(ctx, p.stop)
	defer stopWatching()
	go func() {
		p.loops.Wait()
		close(p.done)
	}()
	<-p.stopping
	p.mu.Lock()
	err := p.err
	p.mu.Unlock()
	if err == nil {
		<-p.done
	}
	return err
}

// Close ends the goroutines, waits for them and for the handlers they run, and
// frees the descriptors. Handlers must not call it. Registered descriptors stay
// open: they belong to their owners.
func (p *Poller) Close() {
	p.stop()
	p.mu.Lock()
	running := p.running
	p.mu.Unlock()
	if running {
		<-p.done
	}
	p.life.Lock()
	defer p.life.Unlock()
	if !p.closed {
		p.closed = true
		unix.Close(p.epfd)
		unix.Close(p.wakefd)
	}
}

// stop makes every goroutine leave its loop.
func (p *Poller) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped {
		return
	}
	p.stopped = true
	close(p.stopping)
	// Writing to an eventfd fails only at 2^64-1.
	_, _ = unix.Write(p.wakefd, binary.NativeEndian.AppendUint64(nil, 1))
}

// Waiting says that the calling goroutine, which may be in a handler, is about
// to wait for something that may take long. Everybody else is served meanwhile in
// any case, but with this none of them waits until the watcher sees the need.
func (p *Poller) Waiting() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.running && !p.stopped && p.waiting.Load() == 0 {
		p.another()
	}
}

// another makes one more goroutine wait for events. The caller is one itself, or
// holds mu, and the poller is not stopped: loops can't be waited for meanwhile.
func (p *Poller) another() {
	p.waiting.Add(1)
	p.workers.Add(1)
	p.loops.Go(p.loop)
}

// loop waits for one event at a time.
func (p *Poller) loop() {
	defer p.workers.Add(-1)
	// One event per call: a second one would wait for the first one's handler.
	events := make([]unix.EpollEvent, 1)
	begin := p.ticks.Load()
	for i := 0; ; i++ {
		n, err := unix.EpollWait(p.epfd, events, -1)
		if err == unix.EINTR || (err == nil && n == 0) {
			continue
		}
		if err != nil {
			p.fail(fmt.Errorf("poll: %w", os.NewSyscallError("epoll_wait", err)))
			return
		}
		ev := &events[0]
		if ev.Fd == slotWake {
			return
		}
		h := p.lookup(ev.Fd, ev.Pad)
		if h == nil {
			continue
		}

		p.handled.Add(1)
		if p.waiting.Add(-1) == 0 && (p.before(&p.wary) || i%sample == 0 && p.crowd()) {
			p.another()
		}
		if p.resting.Load() && p.resting.CompareAndSwap(true, false) {
			p.wake <- struct{}{}
		}
		h.Ready(ev.Events)
		if !p.waitAgain() {
			return
		}
		// A goroutine that has had its processor of the run-time for 10 ms loses
		// it when it is found in a system call, and once that has happened, the
		// run-time looks for more every 20 us: a tenth of our time, measured. To
		// begin a new time slice before costs little.
		if now := p.ticks.Load(); now-begin >= slice {
			runtime.Gosched()
			begin = now
		}
	}
}

// before tells whether the watcher's clock has not reached t yet.
func (p *Poller) before(t *atomic.Int64) bool { return p.ticks.Load() < t.Load() }

// crowd tells whether one more goroutine is worth it: events are waiting while
// nobody waits for them.
func (p *Poller) crowd() bool {
	if p.workers.Load() >= maxCrowd {
		return false
	}
	if Now(p.epfd, unix.POLLIN)&unix.POLLIN == 0 {
		return false
	}
	p.crowded.Store(p.ticks.Load() + crowdFor)
	return true
}

// waitAgain counts this goroutine as waiting, unless enough others wait.
func (p *Poller) waitAgain() bool {
	enough := int32(1)
	if p.before(&p.wary) || p.before(&p.crowded) {
		enough = most
	}
	for {
		n := p.waiting.Load()
		if n >= enough {
			return false
		}
		if p.waiting.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// watch sees to it that somebody waits for events when all handlers hang.
func (p *Poller) watch() {
	pause := unix.NsecToTimespec(tick.Nanoseconds())
	handled, quiet := p.handled.Load(), 0
	for {
		// No timer: that would cost the run-time several thread switches.
		_ = unix.Nanosleep(&pause, nil)
		select {
		case <-p.stopping:
			return
		default:
		}
		if p.ticks.Add(1)%slice == 0 {
			runtime.Gosched() // see loop
		}
		switch now := p.handled.Load(); {
		case now != handled:
			handled, quiet = now, 0
		case p.waiting.Load() == 0:
			p.wary.Store(p.ticks.Load() + waryFor)
			p.Waiting()
		case quiet < restAfter:
			quiet++
		default:
			p.rest(handled)
		}
	}
}

// rest returns when there has been another event than those counted, or the
// poller is stopped.
func (p *Poller) rest(handled uint32) {
	p.resting.Store(true)
	// Whoever has counted his event before this has not seen that we rest.
	if p.handled.Load() != handled && p.resting.CompareAndSwap(true, false) {
		return
	}
	select {
	case <-p.wake:
		p.ticks.Add(slice) // the run-time has taken the processors back long ago
	case <-p.stopping:
	}
}

// lookup returns the handler that an event is for, nil if its registration is
// gone.
func (p *Poller) lookup(slot, gen int32) Handler {
	p.mu.Lock()
	defer p.mu.Unlock()
	if slot < int32(len(p.slots)) && p.slots[slot].gen == gen {
		return p.slots[slot].h
	}
	return nil // also what an inherited set has of descriptors that nobody has taken over
}

// fail stops the poller because of err.
func (p *Poller) fail(err error) {
	p.mu.Lock()
	if p.err == nil {
		p.err = err
	}
	p.mu.Unlock()
	p.stop()
}
