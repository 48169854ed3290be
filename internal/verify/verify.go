// SPDX-License-Identifier: LGPL-2.1-or-later

// Package verify finds out whether what the lock table believes is true: that the kernel has the lock, that the
// resource's path still leads to the locked file, that it can be read, and that the owner lives.
//
// A check may wait for a disk, so each runs on a goroutine of its own, one at a time on a mount. One that does
// not come back in time is left behind, and the mount is not asked again before it does.
package verify

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"virtlockd/internal/filelock"
	"virtlockd/internal/lockspace"
	"virtlockd/internal/owner"
)

// Kind is a kind of findings.
type Kind string

// The kinds of findings.
const (
	Gone       Kind = "lock-gone"   // the kernel does not have the lock any more
	Replaced   Kind = "replaced"    // another file is at the path
	Deleted    Kind = "deleted"     // nothing is at the path
	Invisible  Kind = "path-error"  // the path can't be looked at
	Unreadable Kind = "read-error"  // the locked file can't be read
	OwnerDead  Kind = "owner-dead"  // the owner's process has ended, and its lock is still held
	OwnerGone  Kind = "no-owner"    // the owner is only a number, and no process has it
	NoAnswer   Kind = "no-answer"   // the disk does not answer
	NotChecked Kind = "not-checked" // it could not be looked at
)

var faults = map[filelock.Fault]Kind{
	filelock.Gone:       Gone,
	filelock.Replaced:   Replaced,
	filelock.Deleted:    Deleted,
	filelock.Invisible:  Invisible,
	filelock.Unreadable: Unreadable,
}

// Finding is something that is wrong with a lock.
type Finding struct {
	Kind Kind
	Text string // for people
}

const (
	// patience is for how long one lock is waited for.
	patience = time.Second
	// maxHere and maxElsewhere bound the checks that run, most of which were left behind: in this process, where each has a thread,
	// and in worker processes.
	maxHere, maxElsewhere = 16, 256
	// deathTime is how long the release of a dead owner's locks may take.
	deathTime = time.Second
)

// Checker checks locks.
type Checker struct {
	table *lockspace.Table

	mu      sync.Mutex
	running map[string]*run // by where
	here    int             // how many of them run in this process
}

// run is a check that runs.
type run struct {
	since time.Time
	here  bool
	done  chan struct{}
}

// New returns a checker of the locks of a table.
func New(t *lockspace.Table) *Checker {
	return &Checker{table: t, running: map[string]*run{}}
}

// Check checks one lock. It takes a second at most, and says nothing of a lock that was released meanwhile.
func (c *Checker) Check(e *lockspace.Entry) []Finding {
	found := append(c.file(e), owners(e.Holds)...)
	if len(found) == 0 {
		return nil
	}
	holds, ok := c.table.Current(e)
	if !ok {
		return nil
	}
	return c.settled(e, found, holds)
}

// Ask finds out by a lock whether its disk answers: it has, or trouble says why that is not known. Neither says that the lock was
// released meanwhile, and so nothing. It takes as long as Check.
func (c *Checker) Ask(e *lockspace.Entry) (answered bool, trouble *Finding) {
	found := c.file(e)
	if _, ok := c.table.Current(e); !ok {
		return false, nil
	}
	for i := range found {
		if k := found[i].Kind; k == NoAnswer || k == NotChecked {
			return false, &found[i]
		}
	}
	return true, nil
}

// file checks the lock and its file.
func (c *Checker) file(e *lockspace.Entry) []Finding {
	where := e.Lock.Mount()
	here := where == ""
	if here {
		where = e.Path // what hangs there, if ever, is no reason to leave out others
	}
	if hung := c.enter(where, here); hung != nil {
		return hung
	}
	probe, err := c.table.Probe(e)
	for begin := time.Now(); errors.Is(err, lockspace.ErrBusy) && time.Since(begin) < patience; probe, err = c.table.Probe(e) {
		time.Sleep(5 * time.Millisecond)
	}
	if err != nil {
		c.leave(where)
		if errors.Is(err, lockspace.ErrBusy) {
			return []Finding{{NoAnswer, fmt.Sprintf("the lock is being worked on, and nothing came back from %s within %v", where, patience)}}
		}
		return nil
	}
	type answer struct {
		faults []*filelock.FaultError
		err    error
	}
	answers := make(chan answer, 1)
	go func() {
		defer c.leave(where)
		faults, err := probe.Check(e.Exclusive)
		answers <- answer{faults, err}
	}()
	timeout := time.NewTimer(patience)
	defer timeout.Stop()
	select {
	case <-timeout.C:
		return []Finding{{NoAnswer, fmt.Sprintf("nothing came back from %s within %v", where, patience)}}
	case a := <-answers:
		if a.err != nil {
			return []Finding{{NotChecked, a.err.Error()}}
		}
		var found []Finding
		for _, f := range a.faults {
			found = append(found, Finding{faults[f.Fault], f.Error()})
		}
		return found
	}
}

// enter begins a check, or returns why there is none.
func (c *Checker) enter(where string, here bool) []Finding {
	for {
		c.mu.Lock()
		other := c.running[where]
		running, most := len(c.running)-c.here, maxElsewhere
		if here {
			running, most = c.here, maxHere
		}
		switch {
		case other == nil && running >= most:
			c.mu.Unlock()
			return []Finding{{NotChecked, fmt.Sprintf("%d checks have had no answer yet", running)}}
		case other == nil:
			c.running[where] = &run{since: time.Now(), here: here, done: make(chan struct{})}
			if here {
				c.here++
			}
			c.mu.Unlock()
			return nil
		}
		c.mu.Unlock()
		select {
		case <-other.done:
		case <-time.After(patience - time.Since(other.since)):
			return []Finding{{NoAnswer, fmt.Sprintf("an earlier check of %s has had no answer for %v", where, time.Since(other.since).Round(time.Second))}}
		}
	}
}

func (c *Checker) leave(where string) {
	c.mu.Lock()
	r := c.running[where]
	close(r.done)
	delete(c.running, where)
	if r.here {
		c.here--
	}
	c.mu.Unlock()
}

// owners asks about the processes in whose name a lock is held.
func owners(holds []lockspace.Holding) (found []Finding) {
	said := map[*owner.Owner]bool{}
	for _, h := range holds {
		if said[h.Owner] {
			continue
		}
		said[h.Owner] = true
		switch h.Owner.Ask() {
		case owner.Ended:
			found = append(found, Finding{OwnerDead, fmt.Sprintf("process %d has ended, and its lock was not released", h.Owner.PID)})
		case owner.Missing:
			found = append(found, Finding{OwnerGone, fmt.Sprintf("there is no process %d as far as can be seen from here, so its end will not release the lock", h.Owner.PID)})
		}
	}
	return found
}

// settled leaves out that an owner is dead whose lock is just being released.
func (c *Checker) settled(e *lockspace.Entry, found []Finding, holds []lockspace.Holding) []Finding {
	dead := func() bool {
		for _, f := range owners(holds) {
			if f.Kind == OwnerDead {
				return true
			}
		}
		return false
	}
	ok := true
	for begin := time.Now(); ok && dead() && time.Since(begin) < deathTime; time.Sleep(5 * time.Millisecond) {
		holds, ok = c.table.Current(e)
	}
	if !ok {
		return nil
	}
	kept := found[:0]
	for _, f := range found {
		if f.Kind != OwnerDead && f.Kind != OwnerGone {
			kept = append(kept, f)
		}
	}
	return append(kept, owners(holds)...)
}
