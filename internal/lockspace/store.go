// SPDX-License-Identifier: LGPL-2.1-or-later

package lockspace

import (
	"cmp"
	"slices"

	"virtlockd/internal/events"
	"virtlockd/internal/filelock"
	"virtlockd/internal/owner"
	"virtlockd/internal/state"
	"virtlockd/internal/vault"
)

// SetVault says where from now on each hold and each lockspace is stored before anybody hears of it. nil: nowhere. It is
// called before the first request, or while the table is frozen.
func (t *Table) SetVault(v *vault.Vault) { t.vault.Store(v) }

// Unstored returns how often something could not be stored.
func (t *Table) Unstored() uint64 { return t.unstored.Load() }

// keep stores a hold of r, whose lock is taken, and returns its cell, or nil. The caller has r to itself. t.mu is held when it returns: what a
// hand-over, which has frozen the table, says of the lock is true until the process has become another binary, or goes on.
func (t *Table) keep(r *resource, o *owner.Owner, by vault.Origin, since int64) *vault.Cell {
	for {
		v := t.vault.Load()
		cell, err := t.store(v, r, o, by, since)
		t.mu.Lock()
		switch {
		case v != t.vault.Load(): // it was given up for the C daemon, which has not come
			t.mu.Unlock()
			continue
		case err != nil:
			t.unstored.Add(1)
			t.cfg.Logger.Error("a lock is held but not safe from a crash of this daemon", "path", r.space.path(r.name), "", o.Details(), "error", err)
		case cell != nil:
			r.lock.Stored(cell)
		}
		return cell
	}
}

// store is keep for one vault, which may be nil.
func (t *Table) store(v *vault.Vault, r *resource, o *owner.Owner, by vault.Origin, since int64) (*vault.Cell, error) {
	if v == nil {
		return nil, nil
	}
	h := vault.Hold{
		Origin: by, Since: since,
		Lockspace: r.space.dir, Name: r.name, Flags: r.flags,
		Owner: o.State(),
	}
	cell, err := v.Take()
	if err != nil {
		return nil, err
	}
	cell.Word().Store(wordOf(&h.Owner)) // first: who finds the record finds that, too, but for one that a worker process stores
	var b [512]byte
	if err := r.lock.Store(cell, h.Record(b[:0]), h.Owner.PIDFD); err != nil {
		v.Release(cell)
		return nil, err
	}
	return cell, nil
}

// wordOf returns what is noted beside each hold of an owner of what is being done to him.
func wordOf(o *state.Owner) uint64 {
	switch {
	case o.Ending:
		return vault.Ending
	case o.Stopped:
		return vault.Stopped
	}
	return 0
}

// NoteOwner notes beside the holds of an owner whether he is stopped or being ended, so that this is known after a crash.
func (t *Table) NoteOwner(o *owner.Owner) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, r := range t.byOwner[o] {
		for i := range r.holders {
			if h := &r.holders[i]; h.owner == o {
				h.note()
			}
		}
	}
}

// note is NoteOwner for one hold. It is called, too, when a hold was entered into the table: while it was being stored NoteOwner did not
// see it. Table.mu is held.
func (h *hold) note() {
	if h.cell == nil {
		return
	}
	s := h.owner.State()
	is := wordOf(&s)
	for _, was := range [...]uint64{0, vault.Stopped, vault.Ending} { // what is being done to a hold counts more
		if h.cell.Word().CompareAndSwap(was, is) {
			return
		}
	}
}

// dropSpare empties the spare cell of a hold that is stored elsewhere now, or has ended. t.mu is held.
func (t *Table) dropSpare(h *hold) {
	cell := h.spare
	if cell == nil {
		return
	}
	h.spare = nil
	cell.Word().Store(vault.Releasing)
	go t.vault.Load().Release(cell) // with the last description of a lock that was lost: its disk may hang
}

// unstore takes a hold, which is no longer among r's, out of its cell. That of the last one goes with the lock.
// t.mu is held; nothing here blocks.
func (t *Table) unstore(r *resource, cell *vault.Cell) {
	if len(r.holders) == 0 && r.cell == nil {
		r.cell = cell
		return
	}
	if cell == nil {
		return
	}
	if r.lock.Forget(cell, r.stored()) {
		t.vault.Load().Return(cell)
		return
	}
	// The file lies nowhere else: none of the other holds could be stored. In a crash they would be lost, so the lock goes with this one.
	cell.Word().Store(vault.Releasing)
	r.cell = cell
}

// stored returns a cell that has the file of r's lock in it, nil if there is none.
func (r *resource) stored() *vault.Cell {
	cell := r.cell
	for i := 0; i < len(r.holders) && cell == nil; i++ {
		cell = r.holders[i].cell
	}
	return cell
}

// StoredAgain is about a cell with a hold that was being stored when the binary before this one was replaced, so that nothing but its record tells
// of it. has says that the hold is in the table: its owner's number is the same, and since when he has it. If it was not stored there yet, this is
// its cell from now on, and taken says so; else the cell is not needed.
func (t *Table) StoredAgain(f *vault.Hold, cell *vault.Cell) (has, taken bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.lookup(f.Lockspace, f.Name)
	if r == nil || r.phase != held {
		return false, false
	}
	for i := range r.holders {
		h := &r.holders[i]
		if h.owner.PID != f.Owner.PID || h.since != f.Since {
			continue
		}
		has = true
		if h.cell == nil { // an owner may have several holds of which it is not known since when
			t.nowStored(r, nil, cell)
			h.cell = cell
			r.lock.Stored(cell)
			cell.Word().Store(0)
			h.note()
			t.dropSpare(h)
			return true, true
		}
	}
	return has, false
}

// LeftBehind is about a cell whose hold has ended in the binary before this one. others says that somebody holds the resource, and last that
// his lock's file lies nowhere else, see unstore: then the cell is the lock's, and goes with it.
func (t *Table) LeftBehind(lockspace, name string, cell *vault.Cell) (others, last bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.lookup(lockspace, name)
	if r == nil || r.lock == nil {
		return false, false
	}
	last = r.lock.In(cell)
	if last && r.phase == held { // else a worker process takes the file out of it just now
		r.lock.LiesIn(cell)
		r.cell = cell
	}
	return true, last
}

// ended counts a hold that has ended, and takes it out of its cell. t.mu is held.
func (t *Table) ended(r *resource, cell *vault.Cell) {
	t.dropped++
	t.nowStored(r, cell, nil)
	r.bare--
	t.nowStored(r, nil, nil)
	t.unstore(r, cell)
}

// storeSpace stores that there is a lockspace. Nothing here blocks.
func (t *Table) storeSpace(s *space) {
	v := t.vault.Load()
	if v == nil || s.dir == "" {
		return
	}
	var err error
	if s.cell, err = v.StoreLockspace(s.dir); err != nil {
		t.unstored.Add(1)
		t.cfg.Logger.Error("a lockspace will have to be made anew after a crash of this daemon", "lockspace", s.dir, "error", err)
	}
}

// StoreAll stores what is not stored yet: locks that were taken over from a daemon that has no vault, or that had just been taken again. It goes on when some
// can't be stored, and may block, if a file is on a disk that hangs. It returns how many holds it has stored.
func (t *Table) StoreAll() (n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range t.spaces {
		if s.cell == nil {
			t.storeSpace(s)
		}
	}
	var all []*resource
	for _, s := range t.spaces {
		for _, r := range s.resources {
			all = append(all, r)
		}
	}
	for _, r := range all {
		n += t.storeResource(r)
		// Requests come in between.
		t.mu.Unlock()
		t.mu.Lock()
	}
	return n
}

// storeResource stores those holds of r that are not stored. t.mu is held, but not all the time.
func (t *Table) storeResource(r *resource) (n int) {
	if r.phase != held || r.lock == nil || r.lock.Kind() != filelock.OFD {
		return 0 // what is being acquired now is stored by whoever acquires it
	}
	for i := range r.holders {
		if r.holders[i].cell != nil {
			continue
		}
		o := r.holders[i].owner
		t.begin(r, acquiring)
		t.mu.Unlock()
		cell := t.keep(r, o, vault.Origin{}, r.holders[i].since)
		t.nowStored(r, nil, cell)
		if r.holders[i].cell = cell; cell != nil {
			n++
			t.dropSpare(&r.holders[i])
		}
		r.holders[i].note()
		r.phase = held
		t.end(r)
	}
	return n
}

// cell returns the cell of a snapshot, nil if there is none.
func (t *Table) cell(index uint32) *vault.Cell {
	if v := t.vault.Load(); v != nil {
		return v.Cell(index)
	}
	return nil
}

// ReleaseStored gives up the hold that is stored in a cell, if there still is one: its acquisition was never answered, or
// its release was under way, in a process that died. Nobody is at work on the resource. It waits for local disks only; when it returns,
// a process that comes after this one finds that the hold is being released.
func (t *Table) ReleaseStored(lockspace, name string, cell uint32) error {
	last, err := t.dropOne(&Request{Lockspace: lockspace, Resource: name}, events.ClientGone, func(r *resource) int {
		return slices.IndexFunc(r.holders, func(h hold) bool { return cmp.Or(h.cell, h.spare).Index() == cell })
	})
	if last != nil {
		if last.cell != nil {
			last.cell.Word().Store(vault.Releasing)
		}
		t.giveUpAll([]*resource{last})
	}
	return err
}

// ReleaseAfter is ReleaseStored for a hold that a worker process of the process that died may still work on: nobody else touches
// the resource until wait returns. It must be the only one; a resource that has others is left alone.
func (t *Table) ReleaseAfter(lockspace, name string, cell uint32, wait func()) {
	t.mu.Lock()
	r := t.lookup(lockspace, name)
	if r == nil || r.phase != held || len(r.holders) != 1 || r.holders[0].cell.Index() != cell {
		t.mu.Unlock()
		return
	}
	t.dropHolder(r, 0, events.ClientGone)
	t.begin(r, releasing)
	t.mu.Unlock()
	go func() {
		wait()
		t.giveUp(r)
	}()
}

// LeaveVault forgets all cells, because the vault is about to be given up: nothing is stored from now on. The table is
// frozen, or not used yet. Files on disks that may hang are moved to cells of their own; if that is not possible, everything stays
// as it was.
func (t *Table) LeaveVault() error {
	left := map[*filelock.Lock]*vault.Cell{} // those that have left their cells, and would have to go back
	for _, s := range t.spaces {
		for _, r := range s.resources {
			if r.lock == nil || !r.lock.Remote() {
				continue
			}
			if err := r.lock.LeaveCell(); err != nil {
				for lock, cell := range left {
					lock.LiesIn(cell)
				}
				return err
			}
			if cell := r.stored(); cell != nil {
				left[r.lock] = cell
			}
		}
	}
	for _, s := range t.spaces {
		s.cell = nil
		for _, r := range s.resources {
			for i := range r.holders {
				t.nowStored(r, r.holders[i].cell, nil)
				r.holders[i].cell, r.holders[i].spare = nil, nil
			}
			if r.phase == held {
				r.cell = nil
			}
		}
	}
	t.vault.Store(nil)
	return nil
}

// nowStored counts that a hold of r which was stored in one cell is stored in another one now. nil: it is not. t.mu is held.
func (t *Table) nowStored(r *resource, before, now *vault.Cell) {
	n := count(now) - count(before)
	t.stored += n
	r.bare -= int32(n)
	if safe := r.bare == 0 && len(r.holders) > 0; safe != r.safe {
		r.safe = safe
		if safe {
			t.safe++
		} else {
			t.safe--
		}
	}
}

func count(cell *vault.Cell) int {
	if cell == nil {
		return 0
	}
	return 1
}

// Safe returns how many of the resources held are kept beyond the end of the process: all of their holds are stored.
func (t *Table) Safe() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.safe
}

// Stored returns how many holds are stored.
func (t *Table) Stored() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.stored
}

// Serial returns a number that is another one after each change of what is held.
func (t *Table) Serial() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.serial + t.dropped
}
