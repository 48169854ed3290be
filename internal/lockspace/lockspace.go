// SPDX-License-Identifier: LGPL-2.1-or-later

// Package lockspace is the core: which owner holds which resource, in which mode.
//
// A lockspace is a directory of lease files, or the default one, in which a resource is named by
// its path. A resource that is held has a lock on its file, taken and given up by a Locker. The
// table's mutex is never held over a system call: a resource whose file is being worked on is in
// a phase of its own (acquiring, releasing), and only requests for that very resource wait.
package lockspace

import (
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"virtlockd/internal/events"
	"virtlockd/internal/filelock"
	"virtlockd/internal/owner"
	"virtlockd/internal/vault"
)

// Flags of an acquisition, with the values of the wire.
const (
	Shared     = 1 << 0 // several owners that all say so may hold the resource
	AutoCreate = 1 << 1 // the lease file is made, and removed with the last release
)

const (
	// Neither has a limit in the C daemon; a client in a loop must find one.
	maxLockspaces = 1 << 16
	maxHolders    = 1 << 12 // of one shared resource
)

// A Locker takes locks on files. *filelock.Files is the one for the disks of this host.
type Locker interface {
	Lock(path string, mode filelock.Mode, create bool, record []byte) (*filelock.Lock, error)
	MakeDir(path string) error
	Create(path string) error
	Delete(path string, held func(filelock.FileID) bool) error
}

// Config of a Table.
type Config struct {
	Locker Locker
	Logger *slog.Logger
	Events *events.Log // nil: nobody wants to know
	// Changed is called after the number of resources held has become zero, or ceased to be.
	Changed func()
	// Waiting is called when the calling goroutine is about to wait for another request's end. Default: none.
	Waiting func()
}

// phase of a resource. One that is not in the table is free.
type phase uint8

const (
	acquiring phase = iota // its lock is being taken, or it is being deleted
	held
	releasing
)

// resource is one name in one lockspace. All fields are owned by Table.mu, but a resource that
// is acquiring or releasing belongs to the goroutine that made it so.
type resource struct {
	space   *space
	name    string
	flags   uint32 // of the first acquisition
	phase   phase
	safe    bool // counted as such, see Table.safe
	lock    *filelock.Lock
	cell    *vault.Cell   // what a hold was stored in that has ended, if the lock's file lies there still; or nil. Releasing: of the last one
	holders []hold        // one for each acquisition
	settled chan struct{} // made by the first that waits for the end of a phase, closed then
	alias   *resource     // next in Table.files: another name of the same file
	slot    int32         // in Table.slots, while it is held or releasing
	bare    int32         // how many of holders are not stored
}

func (r *resource) shared() bool { return r.flags&Shared != 0 }

// hold is one acquisition by an owner. The serial number is never used again.
type hold struct {
	owner  *owner.Owner
	serial uint64
	since  int64       // Unix time in ns; 0: not known, from a C daemon
	cell   *vault.Cell // what it is stored in; nil: it ends with the process
	spare  *vault.Cell // where it lies with a lost lock that the resource's has replaced, until it is stored with that; or nil
}

// Hold names one acquisition, so that just this one can be undone. The zero value names none.
type Hold struct {
	Lockspace, Resource string
	serial              uint64
}

type space struct {
	dir       string // "": the default lockspace
	resources map[string]*resource
	cell      *vault.Cell // what it is stored in, or nil
}

// Path returns that of a resource's file, in the lockspace of a directory or in the default one, "". Exactly the C daemon's join, so that
// both mean the same file.
func Path(dir, name string) string {
	if dir == "" {
		return name
	}
	return dir + "/" + name
}

func (s *space) path(name string) string { return Path(s.dir, name) }

// Table holds all lockspaces.
type Table struct {
	cfg Config

	// vault is where holds are stored; nil: nowhere. It changes only while the table is frozen, or before it is used.
	vault    atomic.Pointer[vault.Vault]
	unstored atomic.Uint64 // how often it was not possible to store something

	mu       sync.Mutex
	spaces   map[string]*space
	files    map[filelock.FileID]*resource // held ones by their file, see resource.alias
	byOwner  map[*owner.Owner][]*resource  // held ones, once for each entry in holders
	deleting map[filelock.FileID]int       // files whose name is being removed: nobody acquires them meanwhile
	slots    slots                         // held ones, to be listed in pieces
	serial   uint64                        // of the last hold
	dropped  uint64                        // how many holds have ended
	held     int                           // names held
	shared   int                           // those of them that are held shared
	safe     int                           // and those all of whose holds are stored
	stored   int                           // holds that have a cell
	adopted  []*resource                   // whose locks the kernel was not asked for yet
	settles  sync.Cond                     // signalled when a phase ends
	retired  bool                          // see Retire
	busy     int                           // resources acquiring or releasing
}

// New returns a table with the default lockspace.
func New(cfg Config) *Table {
	t := &Table{
		cfg:      cfg,
		spaces:   map[string]*space{"": {resources: map[string]*resource{}}},
		files:    map[filelock.FileID]*resource{},
		byOwner:  map[*owner.Owner][]*resource{},
		deleting: map[filelock.FileID]int{},
	}
	t.settles.L = &t.mu
	return t
}

// Held returns how many resources are held.
func (t *Table) Held() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.held
}

// count counts a resource that is held from now on, or no longer. t.mu is held.
func (t *Table) count(r *resource, n int) {
	t.held += n
	if r.shared() {
		t.shared += n
	}
}

// Counts returns how many lockspaces there are, and how many resources are held exclusively and shared.
func (t *Table) Counts() (lockspaces, exclusive, shared int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.spaces), t.held - t.shared, t.shared
}

// Retire makes the table refuse to acquire anything from now on, if nothing is held or being acquired, so
// that the daemon can end without giving up a lock. Otherwise it returns how many there are.
func (t *Table) Retire() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n := max(t.held, t.busy); n > 0 {
		return n
	}
	t.retired = true
	return 0
}

// Lookup returns ErrNoLockspace if there is none at path. "" always exists.
func (t *Table) Lookup(path string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.spaces[path] == nil {
		return &Error{Op: "use", Lockspace: path, Err: ErrNoLockspace}
	}
	return nil
}

// Add makes a lockspace of a directory, which is made with its parents where it is missing.
// Lockspaces are told apart by their exact spelling, and live as long as the table.
//
// Errors: ErrExists, ErrDefaultExists, ErrTooMany, or why there is no directory.
func (t *Table) Add(dir string) error {
	fail := func(err error) error { return &Error{Op: "new", Lockspace: dir, Path: dir, Err: err} }
	if dir == "" {
		return fail(ErrDefaultExists)
	}
	room := func() error {
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.spaces[dir] != nil {
			return ErrExists
		}
		if len(t.spaces) >= maxLockspaces {
			return ErrTooMany
		}
		return nil
	}
	if err := room(); err != nil {
		return fail(err)
	}
	if err := t.cfg.Locker.MakeDir(dir); err != nil {
		return fail(err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.spaces[dir] != nil {
		return fail(ErrExists)
	}
	s := &space{dir: dir, resources: map[string]*resource{}}
	t.storeSpace(s)
	t.spaces[dir] = s
	return nil
}

// Request is one client's wish for a resource.
type Request struct {
	Lockspace string
	Resource  string
	Flags     uint32
	Owner     *owner.Owner // Acquire: for whom
	Origin    vault.Origin // Acquire: which request this is
	Client    Client       // who asks; nil waits for ever
}

// A Client waits for the answer to a request.
type Client interface {
	// Done is closed when it does not wait any more.
	Done() <-chan struct{}
}

// settle waits, with t.mu held, until r's phase has ended. It returns ErrGone when the client
// did not wait that long. The caller looks everything up anew.
func (t *Table) settle(r *resource, c Client) error {
	var gone <-chan struct{}
	if c != nil {
		gone = c.Done()
	}
	if r.settled == nil {
		r.settled = make(chan struct{})
	}
	settled := r.settled
	t.mu.Unlock()
	defer t.mu.Lock()
	if t.cfg.Waiting != nil {
		t.cfg.Waiting()
	}
	select {
	case <-settled:
		return nil
	case <-gone:
		return ErrGone
	}
}

// begin puts a resource into a phase that ends with end. t.mu is held.
func (t *Table) begin(r *resource, p phase) {
	r.phase = p
	t.busy++
}

func (t *Table) end(r *resource) {
	t.busy--
	if r.settled != nil {
		close(r.settled)
		r.settled = nil
	}
	t.settles.Broadcast()
}

// lookup returns the resource of that name in whatever phase, nil if there is none. t.mu is held.
func (t *Table) lookup(lockspace, name string) *resource {
	if s := t.spaces[lockspace]; s != nil {
		return s.resources[name]
	}
	return nil
}

// find returns the settled resource of that name, or nil, with its lockspace. t.mu is held.
func (t *Table) find(req *Request) (*space, *resource, error) {
	for {
		s := t.spaces[req.Lockspace]
		if s == nil {
			return nil, nil, ErrNoLockspace
		}
		r := s.resources[req.Resource]
		if r == nil || r.phase == held {
			return s, r, nil
		}
		if err := t.settle(r, req.Client); err != nil {
			return nil, nil, err
		}
	}
}

// Acquire takes a resource for an owner, or returns at once when it is held otherwise.
//
//	name free?  no: shared with shared, else ErrLocked
//	open, lock  by the Locker; the kernel refuses other hosts, other programs and other names of
//	            the same inode
//	same file?  held by us under another name that the kernel cannot know (a second device
//	            node, a POSIX lock): shared with shared, else ErrLocked
//
// Errors: ErrNoLockspace, ErrLocked, ErrOwnerEnded, ErrEscapes, ErrTooMany, ErrRetired, ErrGone, or the
// Locker's.
func (t *Table) Acquire(req Request) (Hold, error) {
	serial, path, err := t.acquire(&req)
	if err != nil {
		err = t.named(err)
		t.reportRefusal(&req, err)
		return Hold{}, &Error{Op: "acquire", Lockspace: req.Lockspace, Resource: req.Resource, Path: path, Err: err}
	}
	return Hold{req.Lockspace, req.Resource, serial}, nil
}

func (t *Table) acquire(req *Request) (serial uint64, path string, err error) {
	t.mu.Lock()
	s, r, err := t.find(req)
	if err != nil {
		t.mu.Unlock()
		return 0, "", err
	}
	path = s.path(req.Resource)
	if t.retired {
		t.mu.Unlock()
		return 0, path, ErrRetired
	}
	if r != nil {
		serial, err = t.join(r, req)
		t.mu.Unlock()
		return serial, path, err
	}
	if s.dir != "" && escapes(req.Resource) {
		t.mu.Unlock()
		return 0, path, ErrEscapes
	}
	r = &resource{space: s, name: req.Resource, flags: req.Flags}
	t.begin(r, acquiring)
	s.resources[r.name] = r
	t.mu.Unlock()

	mode := filelock.Exclusive
	if r.shared() {
		mode = filelock.Shared
	}
	lock, err := t.cfg.Locker.Lock(path, mode, r.flags&AutoCreate != 0, r.record(req.Owner))
	since := time.Now().UnixNano()
	if err == nil {
		r.lock = lock
		r.cell = t.keep(r, req.Owner, req.Origin, since)
		if err = t.admissible(r, req.Owner); err == nil {
			serial = t.hold(r, req.Owner, since)
			t.end(r)
			t.changed(1)
			return serial, path, nil
		}
		// The lock is not kept: whoever holds the file under another name stays its only owner.
		r.phase = releasing
		t.mu.Unlock()
		t.release(r)
	}
	t.mu.Lock()
	delete(s.resources, r.name)
	t.end(r)
	t.mu.Unlock()
	return 0, path, err
}

// escapes tells whether a name leads out of the directory it is joined to. Links inside the
// directory are its owner's business.
func escapes(name string) bool {
	return slices.Contains(strings.Split(name, "/"), "..")
}

// join adds an owner to a resource that is held. t.mu is held, but not all the time.
func (t *Table) join(r *resource, req *Request) (serial uint64, err error) {
	switch {
	case !r.shared() || req.Flags&Shared == 0:
		return 0, lockedBy(r)
	case req.Owner.Dead():
		return 0, ErrOwnerEnded
	case len(r.holders) >= maxHolders:
		return 0, ErrTooMany
	}
	// Only the C daemon lets somebody have the same file exclusively under another name.
	for other := t.files[r.lock.ID()]; other != nil; other = other.alias {
		if !other.shared() {
			return 0, lockedBy(other)
		}
	}
	now := time.Now().UnixNano()
	if t.vault.Load() == nil {
		return t.acquired(r, req.Owner, nil, now), nil
	}
	t.begin(r, acquiring)
	t.mu.Unlock()
	cell := t.keep(r, req.Owner, req.Origin, now)
	r.phase = held
	t.end(r)
	if req.Owner.Dead() { // and what it held was given up meanwhile
		t.unstore(r, cell)
		return 0, ErrOwnerEnded
	}
	return t.acquired(r, req.Owner, cell, now), nil
}

// admissible tells why a lock just taken can't be kept. t.mu is held.
func (t *Table) admissible(r *resource, o *owner.Owner) error {
	if o.Dead() {
		return ErrOwnerEnded
	}
	id := r.lock.ID()
	if t.deleting[id] > 0 {
		return ErrLocked
	}
	for other := t.files[id]; other != nil; other = other.alias {
		// One whose lock is being given up conflicts only where the kernel could not know. Elsewhere it has
		// given us the lock, so it is over: perhaps the file is gone, and a new one has its inode number.
		if other.phase == releasing && !id.Block {
			continue
		}
		if !r.shared() || !other.shared() {
			return lockedBy(other)
		}
	}
	return nil
}

// hold enters a resource whose lock was taken. t.mu is held.
func (t *Table) hold(r *resource, o *owner.Owner, since int64) (serial uint64) {
	r.phase = held
	id := r.lock.ID()
	r.alias = t.files[id]
	t.files[id] = r
	t.slots.add(r)
	t.count(r, 1)
	cell := r.cell
	r.cell = nil
	return t.acquired(r, o, cell, since)
}

// acquired adds a holder. t.mu is held.
func (t *Table) acquired(r *resource, o *owner.Owner, cell *vault.Cell, since int64) (serial uint64) {
	serial = t.addHolder(r, hold{owner: o, cell: cell, since: since})
	r.holders[len(r.holders)-1].note()
	t.report(events.Acquired, "", r, o, since)
	return serial
}

// addHolder enters a hold and numbers it. t.mu is held.
func (t *Table) addHolder(r *resource, h hold) (serial uint64) {
	h.owner.Retain()
	t.serial++
	h.serial = t.serial
	o := h.owner
	r.holders = append(r.holders, h)
	r.bare++
	t.nowStored(r, nil, h.cell)
	t.byOwner[o] = append(t.byOwner[o], r)
	return t.serial
}

// dropHolder removes the i-th entry of r's holders. t.mu is held.
func (t *Table) dropHolder(r *resource, i int, why events.Reason) {
	o, cell := r.holders[i].owner, r.holders[i].cell
	t.report(events.Released, why, r, o, 0)
	t.dropSpare(&r.holders[i])
	r.holders = slices.Delete(r.holders, i, i+1)
	t.ended(r, cell)
	of := t.byOwner[o]
	j := len(of) - 1
	for of[j] != r { // from the end: what was locked last is often released first
		j--
	}
	of[j] = of[len(of)-1]
	of[len(of)-1] = nil
	if of = of[:len(of)-1]; len(of) == 0 {
		delete(t.byOwner, o)
	} else {
		t.byOwner[o] = of
	}
	o.Release()
}

// unlist takes a resource whose lock was given up out of the index of files. t.mu is held.
func (t *Table) unlist(r *resource) {
	id := r.lock.ID()
	at := t.files[id]
	if at == r {
		if r.alias == nil {
			delete(t.files, id)
		} else {
			t.files[id] = r.alias
		}
	} else {
		for at.alias != r {
			at = at.alias
		}
		at.alias = r.alias
	}
	r.alias = nil
}

// Release gives up one hold of the owner with that pid. local says that the client is in our pid
// namespace; one that is not names other processes by the same numbers, so it reaches
// only locks of unverified owners.
//
// Errors: ErrNoLockspace, ErrNotLocked, ErrNotOwner, ErrGone.
func (t *Table) Release(req Request, pid int32, local bool) error {
	return t.releaseOne(&req, events.Asked, func(r *resource) int {
		// A process that we know before a mere number that is the same.
		if local {
			i := slices.IndexFunc(r.holders, func(h hold) bool { return h.owner.PID == pid && h.owner.Kind() != owner.Unverified })
			if i >= 0 {
				return i
			}
		}
		return slices.IndexFunc(r.holders, func(h hold) bool { return h.owner.PID == pid && h.owner.Kind() == owner.Unverified })
	})
}

// Undo gives up one acquisition, if nobody has released it yet.
//
// Errors: as for Release.
func (t *Table) Undo(h Hold) error {
	return t.releaseOne(&Request{Lockspace: h.Lockspace, Resource: h.Resource}, events.ClientGone, func(r *resource) int {
		return slices.IndexFunc(r.holders, func(held hold) bool { return held.serial == h.serial })
	})
}

// releaseOne gives up the hold whose place which returns, with t.mu held.
func (t *Table) releaseOne(req *Request, why events.Reason, which func(*resource) int) error {
	last, err := t.dropOne(req, why, which)
	if last != nil {
		t.giveUp(last)
	}
	return err
}

// dropOne is releaseOne, but for giving up the resource: it is returned if nobody holds it any more.
func (t *Table) dropOne(req *Request, why events.Reason, which func(*resource) int) (last *resource, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, r, err := t.find(req)
	if err == nil && r == nil {
		err = ErrNotLocked
	}
	i := -1
	if err == nil {
		if i = which(r); i < 0 {
			err = ErrNotOwner
		}
	}
	if err != nil {
		return nil, &Error{Op: "release", Lockspace: req.Lockspace, Resource: req.Resource, Err: err}
	}
	t.dropHolder(r, i, why)
	if len(r.holders) > 0 {
		return nil, nil
	}
	t.begin(r, releasing)
	return r, nil
}

// giveUp ends a resource without holders in phase releasing.
func (t *Table) giveUp(r *resource) {
	t.release(r)
	t.forget(r)
}

// forget takes a resource whose lock was given up out of the table.
func (t *Table) forget(r *resource) {
	t.mu.Lock()
	t.unlist(r)
	t.slots.remove(r)
	delete(r.space.resources, r.name)
	t.count(r, -1)
	t.end(r)
	t.changed(0)
}

// release gives the file's lock up and removes a lease file of ours.
func (t *Table) release(r *resource) {
	lease := ""
	if r.flags&AutoCreate != 0 {
		lease = r.space.path(r.name)
	}
	err := r.lock.Release(lease, r.cell)
	if r.cell != nil {
		t.vault.Load().Return(r.cell)
		r.cell = nil
	}
	if err != nil {
		t.cfg.Logger.Warn("the resource was released, but its lease file could not be removed",
			"path", lease, "error", err)
	}
}

// changed unlocks t.mu and reports when the number of resources held has just become n.
func (t *Table) changed(n int) {
	report := t.held == n && t.cfg.Changed != nil
	t.mu.Unlock()
	if report {
		t.cfg.Changed()
	}
}

// Holds tells whether the owner holds anything.
func (t *Table) Holds(o *owner.Owner) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.byOwner[o]) > 0
}

// ReleaseOwner gives up all that an owner holds, because its process has ended. It waits for local disks only: what may wait
// for another one, or for the end of a phase that does, goes on without the caller.
func (t *Table) ReleaseOwner(o *owner.Owner) {
	t.mu.Lock()
	var last []*resource
	for _, r := range slices.Backward(slices.Clone(t.byOwner[o])) {
		switch {
		case len(r.holders) == 0: // for the second time here
		case r.phase != held:
			go t.releaseSettled(r, o)
		case t.dropOwner(r, o):
			last = append(last, r)
		}
	}
	t.mu.Unlock()
	t.giveUpAll(last)
}

// releaseSettled is ReleaseOwner for a resource on which somebody is at work.
func (t *Table) releaseSettled(r *resource, o *owner.Owner) {
	t.mu.Lock()
	for r.phase != held {
		if len(r.holders) == 0 {
			t.mu.Unlock()
			return // nobody's any more
		}
		_ = t.settle(r, nil) // nobody's patience ends
	}
	last := t.dropOwner(r, o)
	t.mu.Unlock()
	if last {
		t.giveUp(r)
	}
}

// dropOwner removes a dead owner from r's holders, and tells whether he was the last one: then r is to be given up. t.mu is held.
func (t *Table) dropOwner(r *resource, o *owner.Owner) (last bool) {
	n := len(r.holders)
	for i := n - 1; i >= 0; i-- {
		if r.holders[i].owner == o {
			t.dropHolder(r, i, events.OwnerEnded)
		}
	}
	if len(r.holders) == n {
		return false
	}
	t.cfg.Logger.Info("lock released: its owner has ended", "path", r.space.path(r.name), "", o.Details())
	if len(r.holders) > 0 {
		return false
	}
	t.begin(r, releasing)
	return true
}

// giveUpAll gives up local locks one after the other, and remote ones without the caller.
func (t *Table) giveUpAll(rs []*resource) {
	for _, r := range rs {
		if r.lock.Remote() {
			go t.giveUp(r)
		}
	}
	for _, r := range rs {
		if !r.lock.Remote() {
			t.giveUp(r)
		}
	}
}

// Create makes a resource's file. One that is there already is fine and stays as it is.
//
// Errors: ErrNoLockspace, ErrLocked (held in this lockspace under this name), ErrEscapes, ErrGone,
// or the Locker's.
func (t *Table) Create(req Request) error {
	return t.onFile("create", &req, t.cfg.Locker.Create)
}

// Delete removes a resource's file. One that is not there is fine.
//
// Errors: as for Create; ErrLocked also where we hold the file under another name.
func (t *Table) Delete(req Request) error {
	return t.onFile("delete", &req, func(path string) error {
		var found []filelock.FileID
		err := t.cfg.Locker.Delete(path, func(id filelock.FileID) bool {
			t.mu.Lock()
			defer t.mu.Unlock()
			if t.files[id] != nil {
				return true
			}
			// Until the name is gone nobody acquires the file under another one.
			t.deleting[id]++
			found = append(found, id)
			return false
		})
		t.mu.Lock()
		defer t.mu.Unlock()
		for _, id := range found {
			if t.deleting[id]--; t.deleting[id] == 0 {
				delete(t.deleting, id)
			}
		}
		return err
	})
}

// onFile does something with the file of a resource that nobody holds; meanwhile nobody can acquire it.
func (t *Table) onFile(op string, req *Request, do func(path string) error) error {
	fail := func(path string, err error) error {
		return &Error{Op: op, Lockspace: req.Lockspace, Resource: req.Resource, Path: path, Err: err}
	}
	t.mu.Lock()
	s, r, err := t.find(req)
	if err != nil {
		t.mu.Unlock()
		return fail("", err)
	}
	path := s.path(req.Resource)
	if r != nil {
		err = lockedBy(r)
	}
	if r != nil || s.dir != "" && escapes(req.Resource) {
		t.mu.Unlock()
		if r != nil {
			return fail(path, err)
		}
		return fail(path, ErrEscapes)
	}
	r = &resource{space: s, name: req.Resource}
	t.begin(r, acquiring)
	s.resources[r.name] = r
	t.mu.Unlock()

	err = do(path)

	t.mu.Lock()
	delete(s.resources, r.name)
	t.end(r)
	t.mu.Unlock()
	if err != nil {
		return fail(path, err)
	}
	return nil
}

// Close gives up everything, because the daemon is told to stop: one log line for each lock.
// Call it when no request can come any more. What is under way is given up when it has ended: a
// disk that hangs keeps Close from returning, but no other lock held.
func (t *Table) Close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for {
		all := t.abandon()
		switch {
		case len(all) > 0:
			t.mu.Unlock()
			t.giveUpAll(all)
			t.mu.Lock()
		case t.busy > 0:
			t.settles.Wait()
		default:
			return
		}
	}
}

// abandon takes all resources that are held from their holders and returns them, to be given up.
// t.mu is held.
func (t *Table) abandon() []*resource {
	var all []*resource
	for _, s := range t.spaces {
		for _, r := range s.resources {
			if r.phase != held {
				continue
			}
			for _, h := range r.holders {
				t.cfg.Logger.Warn("lock given up because the daemon stops; the guest goes on without protection",
					"path", s.path(r.name), "", h.owner.Details())
			}
			for len(r.holders) > 0 {
				t.dropHolder(r, 0, events.Stopped)
			}
			t.begin(r, releasing)
			all = append(all, r)
		}
	}
	return all
}
