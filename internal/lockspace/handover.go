// SPDX-License-Identifier: LGPL-2.1-or-later

package lockspace

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"virtlockd/internal/filelock"
	"virtlockd/internal/owner"
	"virtlockd/internal/state"
	"virtlockd/internal/vault"
)

// Freeze stops every change of the table until Thaw, for the time of a hand-over. It first lets what is under way
// come to its end, but does not wait beyond the deadline for disks that do not answer: those
// resources are not part of the snapshot, and whoever works on them undoes it.
func (t *Table) Freeze(deadline time.Time) {
	expired := false
	timer := time.AfterFunc(time.Until(deadline), func() {
		t.mu.Lock()
		expired = true
		t.mu.Unlock()
		t.settles.Broadcast()
	})
	defer timer.Stop()
	t.mu.Lock()
	for t.busy > 0 && !expired {
		t.settles.Wait()
	}
}

// Thaw ends Freeze.
func (t *Table) Thaw() { t.mu.Unlock() }

// Snapshot returns all that is held, while the table is frozen. place says where an
// owner stands in the snapshot. The order is the same for the same content.
func (t *Table) Snapshot(place func(*owner.Owner) int32) (def []state.Resource, others []state.Lockspace) {
	places := make([]int32, 0, t.held) // of owners; mostly each resource has one
	for _, dir := range slices.Sorted(maps.Keys(t.spaces)) {
		s := t.spaces[dir]
		resources := make([]state.Resource, 0, len(s.resources))
		for _, r := range s.resources {
			if r.phase == held || r.phase == acquiring && len(r.holders) > 0 { // another hold of it is being stored
				start := len(places)
				for _, h := range r.holders {
					places = append(places, place(h.owner))
				}
				resources = append(resources, r.snapshot(slices.Clip(places[start:])))
			}
		}
		if dir == "" {
			def = resources
		} else {
			others = append(others, state.Lockspace{Dir: dir, Resources: resources, Cell: s.cell.Index()})
		}
	}
	return def, others
}

func (r *resource) snapshot(owners []int32) state.Resource {
	fd, file := r.lock.State()
	res := state.Resource{
		Name: r.name, Path: r.space.path(r.name),
		FD: int32(fd), Held: true, Flags: r.flags, File: file,
		Owners: owners,
		Since:  make([]int64, len(r.holders)),
	}
	for i, h := range r.holders {
		res.Since[i] = h.since
		if cell := cmp.Or(h.cell, h.spare); cell != nil {
			if res.Cells == nil {
				res.Cells = make([]uint32, len(r.holders))
			}
			res.Cells[i] = cell.Index()
		}
	}
	return res
}

// Restore adds a lockspace whose directory need not be made, before any request comes, or tells that the default one will have n
// resources, too. cell is what it is stored in, 0: nothing.
func (t *Table) Restore(dir string, n int, cell uint32) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if dir != "" && t.spaces[dir] != nil {
		return &Error{Op: "restore", Lockspace: dir, Err: ErrExists}
	}
	t.spaces[dir] = &space{dir: dir, resources: make(map[string]*resource, n), cell: t.cell(cell)}
	if len(t.files) == 0 {
		t.files = make(map[filelock.FileID]*resource, n)
	}
	return nil
}

// Adopt enters a resource of a snapshot, whose lock was taken over, before any request comes. Conflicts in the
// snapshot are not resolved here: an owner that believed to hold a resource keeps it, and nobody
// else gets in. Those that hold the same file under another name, though one of the two is
// exclusive, are returned.
func (t *Table) Adopt(dir string, res *state.Resource, owners []*owner.Owner, lock *filelock.Lock) (rivals []*owner.Owner, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	fail := func(err error) ([]*owner.Owner, error) {
		return nil, &Error{Op: "take over", Lockspace: dir, Resource: res.Name, Path: res.Path, Err: err}
	}
	s := t.spaces[dir]
	switch {
	case s == nil:
		return fail(ErrNoLockspace)
	case s.resources[res.Name] != nil:
		return fail(ErrExists)
	case len(owners) == 0:
		return fail(errors.New("nobody holds it"))
	case s.path(res.Name) != res.Path:
		return fail(fmt.Errorf("its path would be %q", s.path(res.Name)))
	}
	r := &resource{space: s, name: res.Name, flags: res.Flags, lock: lock, phase: held}
	s.resources[r.name] = r
	for other := t.files[lock.ID()]; other != nil; other = other.alias {
		if !r.shared() || !other.shared() {
			for _, h := range other.holders {
				rivals = append(rivals, h.owner)
			}
		}
	}
	r.alias = t.files[lock.ID()]
	t.files[lock.ID()] = r
	t.slots.add(r)
	lies := false // in a cell, the file of a lock that may hang
	for i, o := range owners {
		h := hold{owner: o}
		if i < len(res.Since) {
			h.since = res.Since[i]
		}
		if i < len(res.Cells) {
			h.cell = t.cell(res.Cells[i])
		}
		if h.cell != nil && h.cell.Word().Load() == vault.Moving && !lock.In(h.cell) {
			h.cell, h.spare = nil, h.cell // it was being moved: what lies there was lost, and the lock is another one
		}
		if !lies && h.cell != nil {
			lies = true
			lock.LiesIn(h.cell)
		}
		t.addHolder(r, h)
	}
	t.count(r, 1)
	if res.File != (state.File{}) { // the C daemon's are asked for as they are converted
		t.adopted = append(t.adopted, r)
	}
	return rivals, nil
}

// Confirm asks the kernel for all locks that were adopted unasked, and reports those that had been lost before. Requests may
// come meanwhile.
func (t *Table) Confirm(report func(path string, holder *owner.Owner, found filelock.Finding)) {
	const batch = 64 // how many a request may have to wait for
	for more := true; more; {
		t.mu.Lock() // held over fcntl(2) on local files, which does not block
		now := t.adopted[:min(batch, len(t.adopted))]
		t.adopted = t.adopted[len(now):]
		if more = len(t.adopted) > 0; !more {
			t.adopted = nil
		}
		type loss struct {
			path   string
			holder *owner.Owner
			found  filelock.Finding
		}
		var losses []loss
		for _, r := range now {
			if r.phase != held {
				continue // released meanwhile
			}
			if found := r.lock.Confirm(); found != filelock.Kept {
				losses = append(losses, loss{r.space.path(r.name), r.holders[0].owner, found})
			}
		}
		t.mu.Unlock()
		for _, l := range losses {
			report(l.path, l.holder, l.found)
		}
	}
}

// Find returns the last acquisition of a resource by the owner with that pid, for an Undo that was
// handed over; the zero value if there is none.
func (t *Table) Find(lockspace, name string, pid int32) Hold {
	t.mu.Lock()
	defer t.mu.Unlock()
	if r := t.lookup(lockspace, name); r != nil {
		for _, h := range slices.Backward(r.holders) {
			if h.owner.PID == pid {
				return Hold{lockspace, name, h.serial}
			}
		}
	}
	return Hold{}
}

// Strengthen tries once to make those locks exclusive that should be and are not, after a take-over that
// could not keep them so. It returns how many are left. Files on disks that may hang are left as they
// are: shared, until they are released.
func (t *Table) Strengthen() (left int) {
	t.mu.Lock()
	defer t.mu.Unlock() // held over fcntl(2) on local files, which does not block
	for _, s := range t.spaces {
		for _, r := range s.resources {
			if r.phase != held || r.shared() || r.lock.Mode() == filelock.Exclusive || r.lock.Remote() {
				continue
			}
			if r.lock.Strengthen() {
				t.cfg.Logger.Warn("a lock is exclusive again", "path", s.path(r.name))
			} else {
				left++
			}
		}
	}
	return left
}
