// SPDX-License-Identifier: LGPL-2.1-or-later

package lockspace

import (
	"virtlockd/internal/filelock"
	"virtlockd/internal/owner"
	"virtlockd/internal/vault"
)

// SetVault says where from now on each hold and each lockspace is stored before anybody hears of it. nil: nowhere. It is
// called before the first request, or while the table is frozen.
func (t *Table) SetVault(v *vault.Vault) { t.vault.Store(v) }

// Unstored returns how often something could not be stored.
func (t *Table) Unstored() uint64 { return t.unstored.Load() }

// store stores a hold of r, whose lock is taken, and returns its cell, or nil. The caller has r to itself.
func (t *Table) store(r *resource, o *owner.Owner, by vault.Origin, since int64) *vault.Cell {
	v := t.vault.Load()
	if v == nil {
		return nil
	}
	h := vault.Hold{
		Origin: by, Since: since,
		Lockspace: r.space.dir, Name: r.name, Flags: r.flags,
		Owner: o.State(),
	}
	cell, err := v.Take()
	if err == nil {
		var b [512]byte
		if err = r.lock.Store(cell, h.Record(b[:0]), h.Owner.PIDFD); err == nil {
			return cell
		}
		v.Release(cell)
	}
	t.unstored.Add(1)
	t.cfg.Logger.Error("a lock is held but not safe from a crash of this daemon", "path", r.space.path(r.name), "", o.Details(), "error", err)
	return nil
}

// unstore takes a hold, which is no longer among r's, out of its cell. That of the last one goes with the lock.
// t.mu is held; nothing here blocks.
func (t *Table) unstore(r *resource, cell *vault.Cell) {
	switch {
	case cell == nil:
	case len(r.holders) == 0 && r.cell == nil:
		r.cell = cell
	case len(r.holders) == 0:
		r.lock.Forget(cell, r.cell)
		t.empty(cell)
	default:
		r.lock.Forget(cell, r.holders[0].cell)
		t.empty(cell)
	}
}

// empty gives a cell back, which may be nil.
func (t *Table) empty(cell *vault.Cell) {
	if cell != nil {
		t.vault.Load().Release(cell)
	}
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

// StoreAll stores what is not stored yet: locks that were taken over from a daemon that has no vault. It goes on when some
// can't be stored, and may block, if a file is on a disk that hangs.
func (t *Table) StoreAll() {
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
		t.storeResource(r)
		// Requests come in between.
		t.mu.Unlock()
		t.mu.Lock()
	}
}

// storeResource stores those holds of r that are not stored. t.mu is held, but not all the time.
func (t *Table) storeResource(r *resource) {
	if r.phase != held || r.lock == nil || r.lock.Kind() != filelock.OFD {
		return // what is being acquired now is stored by whoever acquires it
	}
	for i := range r.holders {
		if r.holders[i].cell != nil {
			continue
		}
		o := r.holders[i].owner
		t.begin(r, acquiring)
		t.mu.Unlock()
		cell := t.store(r, o, vault.Origin{}, r.holders[i].since)
		t.mu.Lock()
		r.holders[i].cell = cell
		r.phase = held
		t.end(r)
	}
}
