// SPDX-License-Identifier: LGPL-2.1-or-later

// Package poll is the one epoll set of the daemon: it calls a handler when a
// descriptor becomes ready.
//
// The goroutines of a [Poller] take turns as leader and followers: whoever gets
// an event first makes sure that another goroutine waits for the next one, and
// then calls the handler itself. So no hand-over to another goroutine is on the
// way of a request, and a handler that blocks delays nobody.
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
	"sync"
	"sync/atomic"

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

	waiting atomic.Int32   // goroutines in epoll_wait, or on their way to it
	loops   sync.WaitGroup // all goroutines

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

	done chan struct{} // closed when the last goroutine has ended

	// life keeps epfd from being closed, and its number from being given to
	// something else, while epoll_ctl uses it. epoll_ctl does not block.
	life   sync.RWMutex
	closed bool
}

const (
	// slotWake is the slot of wakefd.
	slotWake = 0

	// idle is how many goroutines may wait; one above it ends. With one the
	// second event of two at once would wait for a goroutine to be made. With
	// more than two they hold so many of the runtime's processors in a system
	// call that its monitor thread has to take them back all the time: a fifth
	// of the daemon's CPU time, measured.
	idle = 2
)

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
		epfd:   epfd,
		wakefd: wakefd,
		slots:  make([]slot, 1, 64), // slot 0 is slotWake
		done:   make(chan struct{}),
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
// and returns when all goroutines have ended, the handlers they run included.
// It returns nil then, or the error that made waiting impossible. It may be
// called once.
func (p *Poller) Run(ctx context.Context) error {
	p.mu.Lock()
	if p.stopped || p.running {
		p.mu.Unlock()
		return ErrClosed
	}
	p.running = true
	p.resuming.Store(false)
	// Counted under the mutex: Close waits for them.
	p.waiting.Store(idle)
	p.loops.Add(idle)
	p.mu.Unlock()

	stopWatching := context.AfterFunc(ctx, p.stop)
	defer stopWatching()
	for range idle {
		go p.loop()
	}
	p.loops.Wait()
	close(p.done)

	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
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
	// Writing to an eventfd fails only at 2^64-1.
	_, _ = unix.Write(p.wakefd, binary.NativeEndian.AppendUint64(nil, 1))
}

// loop waits for one event at a time. It is counted in waiting and loops by
// whoever starts it.
func (p *Poller) loop() {
	defer p.loops.Done()
	// One event per call: a second one would wait for the first one's handler.
	events := make([]unix.EpollEvent, 1)
	for {
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

		if p.waiting.Add(-1) == 0 {
			p.waiting.Add(1)
			p.loops.Add(1)
			go p.loop()
		}
		h.Ready(ev.Events)
		if !p.waitAgain() {
			return
		}
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

// waitAgain counts this goroutine as waiting, unless enough others wait.
func (p *Poller) waitAgain() bool {
	for {
		n := p.waiting.Load()
		if n >= idle {
			return false
		}
		if p.waiting.CompareAndSwap(n, n+1) {
			return true
		}
	}
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
