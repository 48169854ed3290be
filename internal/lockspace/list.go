// SPDX-License-Identifier: LGPL-2.1-or-later

package lockspace

import (
	"cmp"
	"errors"
	"slices"

	"golang.org/x/sys/unix"

	"virtlockd/internal/events"
	"virtlockd/internal/filelock"
	"virtlockd/internal/owner"
	"virtlockd/internal/vault"
)

// slots has a place for each resource that is held, which does not change while it is: so the table can be
// listed in pieces, and nobody waits for longer than one piece.
type slots struct {
	all  []*resource // nil: free
	free []int32
}

func (s *slots) add(r *resource) {
	if n := len(s.free); n > 0 {
		r.slot = s.free[n-1]
		s.free = s.free[:n-1]
		s.all[r.slot] = r
		return
	}
	r.slot = int32(len(s.all))
	s.all = append(s.all, r)
}

func (s *slots) remove(r *resource) {
	s.all[r.slot] = nil
	s.free = append(s.free, r.slot)
	if len(s.free) == len(s.all) {
		*s = slots{}
	}
}

// Entry is a resource that is held, as List found it.
type Entry struct {
	Lockspace, Resource string
	Path                string // of its file
	Shared, AutoCreate  bool
	Exclusive           bool           // the kernel's lock is
	Lock                *filelock.Lock // for questions only
	Holds               []Holding
	Slot                int // where List goes on after it is Slot+1
}

// Holding is one acquisition.
type Holding struct {
	Owner *owner.Owner // without a reference: good for questions only
	Since int64        // Unix time in ns; 0: not known
	// Stored says that it is kept beyond the end of the process.
	Stored bool
}

// Stored tells whether all holds are kept beyond the end of the process.
func (e *Entry) Stored() bool {
	return !slices.ContainsFunc(e.Holds, func(h Holding) bool { return !h.Stored })
}

// List returns what is held in a part of the table: it looks at no more than limit places from the given one on,
// which is 0 at first, and returns where to go on, 0 at the end. A resource that is held all the time is listed just once;
// one that comes or goes meanwhile may be, or not. Others wait for no more than one such part.
func (t *Table) List(from, limit int) (entries []Entry, next int) {
	from, limit = max(from, 0), max(limit, 1)
	limit = min(limit, maxListed)
	entries, holds := make([]Entry, 0, limit), make([]Holding, 0, limit) // not with the mutex held
	t.mu.Lock()
	all := t.slots.all
	end := min(from+limit, len(all))
	for i := from; i < end; i++ {
		if r := all[i]; r != nil && r.isHeld() {
			var e Entry
			e, holds = r.entry(holds)
			entries = append(entries, e)
		}
	}
	if end > from && end < len(all) {
		next = end
	}
	t.mu.Unlock()
	for i := range entries {
		e := &entries[i]
		e.Path = (&space{dir: e.Lockspace}).path(e.Resource)
	}
	return entries, next
}

// maxListed bounds what is looked at in one go.
const maxListed = 1 << 12

// entry describes a resource that is held, but for its path. Its holds lie behind those that are there
// already. t.mu is held.
func (r *resource) entry(holds []Holding) (Entry, []Holding) {
	first := len(holds)
	for _, h := range r.holders {
		holds = append(holds, Holding{h.owner, h.since, h.cell != nil})
	}
	return Entry{
		Lockspace: r.space.dir, Resource: r.name,
		Shared: r.shared(), AutoCreate: r.flags&AutoCreate != 0,
		Exclusive: r.lock.Mode() == filelock.Exclusive,
		Lock:      r.lock,
		Holds:     slices.Clip(holds[first:]),
		Slot:      int(r.slot),
	}, holds
}

// isHeld tells whether somebody holds the resource, though its lock may just be taken again. t.mu is held.
func (r *resource) isHeld() bool {
	return r.phase == held || r.phase == acquiring && len(r.holders) > 0
}

// ErrBusy says that another request works on the lock, or that it is just being taken again.
var ErrBusy = errors.New("the lock is being worked on")

// Probe returns what the lock of an entry can be checked by. Errors: ErrNotLocked if it was given up meanwhile, ErrBusy.
func (t *Table) Probe(e *Entry) (p filelock.Probe, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.still(e)
	switch {
	case r == nil:
		return p, ErrNotLocked
	case r.phase != held:
		return p, ErrBusy
	}
	return r.lock.Probe(), nil
}

// still returns the resource of an entry, nil if it was given up meanwhile. t.mu is held.
func (t *Table) still(e *Entry) *resource {
	r := t.lookup(e.Lockspace, e.Resource)
	if r == nil || !r.isHeld() || r.lock != e.Lock {
		return nil
	}
	return r
}

// Current tells whether the resource is held by that very lock still, and returns its holds as they are now. Whoever found
// something wrong with an entry asks before he says so: it may have been released meanwhile.
func (t *Table) Current(e *Entry) (holds []Holding, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.still(e)
	if r == nil {
		return nil, false
	}
	_, holds = r.entry(nil)
	return holds, true
}

// Regain tries to take the lock of an entry again, which was found to be gone or unreadable: see filelock.Lock.Regain. Then the entry is
// about the lock that is held now. It may block as long as the disk hangs, and requests for the resource with it.
//
// Errors: ErrNotLocked if it was given up meanwhile, ErrBusy, or the Locker's: those of filelock.Lock.Regain.
func (t *Table) Regain(e *Entry, unreadable bool) error {
	fail := func(err error) error {
		return &Error{Op: "regain", Lockspace: e.Lockspace, Resource: e.Resource, Path: e.Path, Err: err}
	}
	t.mu.Lock()
	r := t.still(e)
	if r == nil {
		t.mu.Unlock()
		return fail(ErrNotLocked)
	}
	if r.phase != held {
		t.mu.Unlock()
		return fail(ErrBusy)
	}
	t.begin(r, acquiring)
	t.mu.Unlock()
	lock, err := r.lock.Regain(unreadable)
	if err == nil && lock != r.lock {
		t.move(r, lock)
		e.Lock = lock
	}
	if lock != nil && lock.Weak() {
		// It can't be said to be held before that.
		err = cmp.Or(lock.Harden(), err)
	}
	t.mu.Lock()
	r.phase = held
	t.end(r)
	t.mu.Unlock()
	if err != nil {
		return fail(err)
	}
	return nil
}

// move puts another lock on the same file in the place of r's, and each hold into a cell with it. The old lock goes with the last of
// its cells. The caller has r to itself.
func (t *Table) move(r *resource, lock *filelock.Lock) {
	old := r.lock
	t.mu.Lock() // whoever goes on in the midst of this knows which cells have the lock
	for i := range r.holders {
		if cell := r.holders[i].cell; cell != nil {
			cell.Word().Store(vault.Moving)
		}
	}
	r.lock = lock
	t.mu.Unlock()
	last := r.cell
	r.cell = nil
	for i := range r.holders {
		h := &r.holders[i]
		cell := t.keep(r, h.owner, vault.Origin{}, h.since)
		if cell != nil && h.cell != nil {
			h.cell.Word().Store(vault.Releasing) // in a crash, one of the two counts
		}
		if last != nil && h.cell != nil && old.Forget(last, h.cell) {
			t.vault.Load().Return(last)
		}
		last = cmp.Or(h.cell, last)
		t.nowStored(r, h.cell, cell)
		if h.cell = cell; cell != nil {
			t.dropSpare(h)
		}
		h.note()
		t.mu.Unlock()
	}
	if err := old.Release("", last); err != nil {
		t.cfg.Logger.Warn("what is left of a lock that was lost could not be given up", "path", r.space.path(r.name), "error", err)
	}
	if last != nil {
		t.vault.Load().Return(last)
	}
}

// ErrSeveral says that a resource is shared by several owners, one of whom has to be named.
var ErrSeveral = errors.New("several owners hold the resource")

// Break gives up all holds of one owner of a resource in spite of him, by an administrator's order: that of the given
// pid, or, if there is only one owner, of whoever it is, and only if he holds it since then (Unix time in ns, 0: whenever): the
// administrator may have thought about somebody who has released it meanwhile. It returns who has lost it, and how many holds
// are left. What may wait for the disk goes on without the caller: done is closed when it has ended.
//
// Errors: as for Release, and ErrSeveral.
func (t *Table) Break(req Request, pid *int32, since int64) (who *owner.Details, left int, done <-chan struct{}, err error) {
	ended := make(chan struct{})
	fail := func(err error) (*owner.Details, int, <-chan struct{}, error) {
		return nil, 0, nil, &Error{Op: "release", Lockspace: req.Lockspace, Resource: req.Resource, Err: err}
	}
	t.mu.Lock()
	_, r, err := t.find(&req)
	if err == nil && r == nil {
		err = ErrNotLocked
	}
	var o *owner.Owner
	if err == nil {
		o, err = r.ownerOf(pid, since)
	}
	if err != nil {
		t.mu.Unlock()
		return fail(err)
	}
	who = o.Details()
	for i := len(r.holders) - 1; i >= 0; i-- {
		if r.holders[i].owner == o {
			t.dropHolder(r, i, events.Administrator)
		}
	}
	if left = len(r.holders); left > 0 {
		t.mu.Unlock()
		close(ended)
		return who, left, ended, nil
	}
	t.begin(r, releasing)
	t.mu.Unlock()
	go func() {
		defer close(ended)
		t.giveUp(r)
	}()
	return who, 0, ended, nil
}

// ownerOf returns the holder with that pid, or the only one, if he has held it since then. t.mu is held.
func (r *resource) ownerOf(pid *int32, since int64) (*owner.Owner, error) {
	var found *owner.Owner
	for _, h := range r.holders {
		switch {
		case pid != nil && h.owner.PID != *pid || h.owner == found:
		case found != nil:
			return nil, ErrSeveral
		default:
			found = h.owner
		}
	}
	if found == nil || since != 0 && !slices.ContainsFunc(r.holders, func(h hold) bool { return h.owner == found && h.since == since }) {
		return nil, ErrNotOwner
	}
	return found, nil
}

// report tells of what happens to a hold. t.mu is held, so that the order of events is that of the table.
func (t *Table) report(kind events.Kind, why events.Reason, r *resource, o *owner.Owner, at int64) {
	if t.cfg.Events == nil {
		return
	}
	d := o.Details()
	t.cfg.Events.Add(events.Event{
		Time: at, Kind: kind, Reason: why, Shared: r.shared(),
		Lockspace: r.space.dir, Resource: r.name,
		Owner: d.Name, UUID: d.UUID, PID: o.PID,
	})
}

// reportRefusal tells why an owner did not get a resource.
func (t *Table) reportRefusal(req *Request, err error) {
	if t.cfg.Events == nil {
		return
	}
	e := events.Event{
		Kind: events.Refused, Reason: refusal(err), Shared: req.Flags&Shared != 0,
		Lockspace: req.Lockspace, Resource: req.Resource, Text: err.Error(),
	}
	if req.Owner != nil {
		d := req.Owner.Details()
		e.Owner, e.UUID, e.PID = d.Name, d.UUID, req.Owner.PID
	}
	t.cfg.Events.Add(e)
}

func refusal(err error) events.Reason {
	var hung *filelock.HungError
	switch {
	case errors.Is(err, ErrLocked):
		return events.Held
	case errors.Is(err, filelock.ErrLocked):
		return events.HeldOutside
	case errors.Is(err, ErrNoLockspace), errors.Is(err, unix.ENOENT):
		return events.Missing
	case errors.As(err, &hung):
		return events.Hung
	case errors.Is(err, ErrOwnerEnded):
		return events.OwnerEnded
	case errors.Is(err, ErrGone):
		return events.ClientGone
	}
	return events.Failed
}
