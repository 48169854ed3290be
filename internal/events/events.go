// SPDX-License-Identifier: LGPL-2.1-or-later

// Package events keeps what has happened to locks lately, and counts it, for those who look at the daemon
// from outside.
//
// The last events are kept in a ring. Whoever reports one never waits for a reader, wakes nobody, and
// allocates nothing: a reader asks again.
package events

import (
	"strings"
	"sync"
	"time"
)

// Kind says what has happened.
type Kind uint8

// The kinds of events.
const (
	Acquired  Kind = iota // a lock was acquired
	Released              // a lock was given up; Reason says why
	Refused               // a lock was not given; Reason says why
	Killed                // an owner was sent a signal because it hung up while it held locks, or a lock was lost; Reason names it
	Upgraded              // another binary has taken over in the same process
	Recovered             // the daemon has started again and found its locks
	Lost                  // a lock that an owner holds was lost beneath it; Reason is what was found
	Faulty                // the file of a lock can't be read, though the lock is held; Reason is what was found
	kinds                 // how many there are
)

func (k Kind) String() string {
	return [...]string{"acquired", "released", "refused", "killed", "upgraded", "recovered", "lost", "faulty"}[k]
}

// Reason says why, in words that are the same for all events with the same cause, so that they can be
// counted: a metric's label.
type Reason string

// Reasons of Refused.
const (
	Held        Reason = "held"       // by an owner whom this daemon knows
	HeldOutside Reason = "outside"    // in the kernel: by another host, daemon or program, or under another name
	Missing     Reason = "missing"    // there is no such file or lockspace
	Hung        Reason = "hung"       // its disk does not answer
	OwnerEnded  Reason = "owner-dead" // the owner has ended meanwhile
	ClientGone  Reason = "gone"       // the client did not wait for the answer
	Failed      Reason = "failed"     // a system call failed, or a limit is reached
)

// Reasons of Released. OwnerEnded and ClientGone are others.
const (
	Asked         Reason = "request"       // by RELEASE
	Administrator Reason = "administrator" // by virtlockctl release
	Stopped       Reason = "stop"          // the daemon was told to end
)

// Reasons of Killed.
const (
	Terminate Reason = "SIGTERM"
	Kill      Reason = "SIGKILL"
	Stuck     Reason = "stuck" // it does not end although it was killed
	Stop      Reason = "SIGSTOP"
	Continue  Reason = "SIGCONT"
)

// Reasons of Lost and Faulty: kinds of findings of package verify.
const (
	Gone       Reason = "lock-gone"
	Replaced   Reason = "replaced"
	Deleted    Reason = "deleted"
	Unreadable Reason = "read-error"
)

// Reasons returns those that an event of a kind can have, so that each is counted from zero on.
func (k Kind) Reasons() []Reason {
	switch k {
	case Released:
		return []Reason{Asked, OwnerEnded, ClientGone, Administrator, Stopped}
	case Refused:
		return []Reason{Held, HeldOutside, Missing, Hung, OwnerEnded, ClientGone, Failed}
	case Killed:
		return []Reason{Terminate, Kill, Stuck, Stop, Continue}
	case Lost:
		return []Reason{Gone, Replaced, Deleted, Unreadable}
	case Faulty:
		return []Reason{Unreadable}
	}
	return []Reason{""}
}

// Event is one thing that has happened. Fields that say nothing are zero.
type Event struct {
	Seq    uint64 // set by Add: greater than that of each event before, also over a live upgrade
	Time   int64  // Unix time in ns; set by Add unless it is set
	Kind   Kind
	Shared bool
	Reason Reason

	Lockspace, Resource string // "" is the default lockspace
	Owner               string // the domain's name
	UUID                [16]byte
	PID                 int32

	// Text says more, for people.
	Text string
}

const (
	// capacity of the ring: some seconds of a host that starts all of its guests.
	capacity = 1024
	// maxText bounds what is kept of each text of an event, so that the ring is never large.
	maxText = 1024
	// batch is how many events are copied without letting others in.
	batch = 64
)

// Log is the ring and the counters. A nil *Log takes events and forgets them. It is safe for concurrent use.
type Log struct {
	mu     sync.Mutex
	base   uint64  // number before the first event
	last   uint64  // number of the last event
	ring   []Event // the event number n is at (n-base-1) % capacity
	counts [kinds]map[Reason]uint64
}

// New returns an empty log. Its numbers begin with the time, so that they are greater than those of the
// binary before this one in the same process: nobody acquires a lock each microsecond.
func New() *Log {
	now := uint64(time.Now().UnixMicro())
	l := &Log{base: now, last: now}
	for k := range l.counts {
		l.counts[k] = map[Reason]uint64{}
		for _, r := range Kind(k).Reasons() {
			l.counts[k][r] = 0
		}
	}
	return l
}

// Add enters an event. It never blocks for longer than a few dozen others need.
func (l *Log) Add(e Event) {
	if l == nil {
		return
	}
	if e.Time == 0 {
		e.Time = time.Now().UnixNano()
	}
	for _, text := range []*string{&e.Lockspace, &e.Resource, &e.Owner, &e.Text} {
		if len(*text) > maxText {
			*text = strings.Clone((*text)[:maxText]) // not a part of what is larger
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.counts[e.Kind][e.Reason]++
	l.last++
	e.Seq = l.last
	if len(l.ring) < capacity {
		l.ring = append(l.ring, e)
	} else {
		l.ring[(e.Seq-l.base-1)%capacity] = e
	}
}

// Since appends events with a number greater than after to into, the oldest first, limit at most. next is
// the number to ask with the next time. missed is how many of those that are
// asked for have left the ring already; who asks with zero wants what there is and has missed nothing.
func (l *Log) Since(into []Event, after uint64, limit int) (events []Event, next, missed uint64) {
	next = after
	if last := l.Last(); after > last {
		// From a binary before this one whose clock was ahead: everything here is new.
		next, after = l.base, 1
	}
	for first := true; ; first = false {
		l.mu.Lock()
		// A number of an earlier binary: everything here is new.
		oldest := l.last - uint64(len(l.ring))
		if known := max(next, l.base); known < oldest && (after != 0 || !first) {
			missed += oldest - known
		}
		next = max(next, oldest)
		n := 0
		for ; n < batch && limit > 0 && next < l.last; n++ {
			into = append(into, l.ring[(next-l.base)%capacity])
			next++
			limit--
		}
		l.mu.Unlock()
		if n < batch {
			return into, next, missed
		}
	}
}

// Last returns the number of the last event, or the one before the first.
func (l *Log) Last() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}

// Count is how often something has happened since this binary runs.
type Count struct {
	Kind   Kind
	Reason Reason
	N      uint64
}

// Counts returns all counters.
func (l *Log) Counts() []Count {
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []Count
	for k := range kinds {
		for _, r := range k.Reasons() {
			all = append(all, Count{k, r, l.counts[k][r]})
		}
	}
	return all
}
