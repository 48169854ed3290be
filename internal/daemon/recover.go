// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"virtlockd/internal/events"
	"virtlockd/internal/fdtable"
	"virtlockd/internal/filelock"
	"virtlockd/internal/lockspace"
	"virtlockd/internal/owner"
	"virtlockd/internal/poll"
	"virtlockd/internal/rpc"
	"virtlockd/internal/state"
	"virtlockd/internal/vault"
)

// recovery is what is found in the vault of a process that has died.
type recovery struct {
	vault    *vault.Vault
	snapshot *state.Snapshot

	owners    map[ownerKey]int32 // places in the snapshot
	ended     map[int32]bool     // of those places, whose process had ended when it was first seen
	resources map[resourceKey]*state.Resource
	progress  map[uint64]rpc.Progress // of the lock server's clients, by their id
	unseen    bool                    // there is a hold that is not understood, or a worker process may be about to store one
	alone     []*vault.Cell           // whose holds were being moved, with the lock that is taken over
	unsettled []unsettled
	dismissed []dismissed
}

// ownerKey is the number of an owner, and whether it is nothing else to us.
type ownerKey struct {
	pid    int32
	number bool
}

type resourceKey struct{ lockspace, name string }

// unsettled is a hold that ends with the recovery.
type unsettled struct {
	resourceKey
	cell   uint32
	worker int // that may still work on it; 0: none
	why    string
}

// dismissed is a connection that ends with the recovery.
type dismissed struct {
	cell   *vault.Cell
	fd     int
	id     uint64
	server string
	self   int32 // the place in the snapshot of the owner that the peer is, or state.None
}

// recoverVault makes a snapshot of what is in the vault, as a live upgrade would have left it. Nothing that counts in the vault is
// changed: a process that dies here leaves everything to the next one.
//
// An error says that not everything could be opened; then the daemon must not serve anybody, and locks stay held by the vault itself.
// Without error and recovery there was nothing.
func (d *daemon) recoverVault(roots []int) (*recovery, error) {
	v, found, err := d.openVault(roots)
	if err != nil {
		return nil, fmt.Errorf("what a daemon that has ended has left can't be taken over, and its locks stay held until it can: %w", err)
	}
	if v == nil {
		return nil, nil
	}
	return d.recoverContents(v, found)
}

// recoverContents is recoverVault for what was found in a vault.
func (d *daemon) recoverContents(v *vault.Vault, found []vault.Found) (*recovery, error) {
	r := &recovery{
		vault: v, owners: map[ownerKey]int32{}, ended: map[int32]bool{}, resources: map[resourceKey]*state.Resource{}, progress: map[uint64]rpc.Progress{},
		snapshot: &state.Snapshot{
			PIDFile: state.NoFD,
			Lock:    &state.Server{KeepaliveInterval: ^uint32(0)},
			Admin:   &state.Server{KeepaliveInterval: ^uint32(0)},
		},
	}
	// Settings first, everything else goes into their snapshot; clients before the holds that they have acquired; last what counts
	// only if there is nothing else of its resource.
	order := func(f vault.Found) int {
		switch {
		case f.Daemon != nil:
			return 0
		case f.Client != nil:
			return 1
		case f.Hold != nil && giving(f.Cell):
			return 3
		}
		return 2
	}
	slices.SortStableFunc(found, func(a, b vault.Found) int { return cmp.Compare(order(a), order(b)) })
	spaces := map[string]uint32{}
	for i := range found {
		f := &found[i]
		var err error
		switch {
		case f.Err != nil:
			r.unseen = true
			d.log.Error("recovery: something in the vault is not understood; it stays there, so a file that it locks stays locked", "cell", f.Cell.Index(), "error", f.Err)
		case f.Daemon != nil:
			err = d.recoverSettings(r, f)
		case f.Client != nil:
			err = r.client(f)
		case f.Hold != nil:
			err = r.hold(f)
		case f.Lockspace != nil:
			spaces[*f.Lockspace] = f.Cell.Index()
		default:
			worker := vault.Worker(f.Cell.Word().Load())
			r.unseen = r.unseen || worker != 0
			returnAfter(v, f.Cell, worker)
		}
		if errors.Is(err, vault.ErrTruncated) {
			return nil, fmt.Errorf("recovery: %w", err)
		}
		if err != nil {
			r.unseen = true
			d.log.Error("recovery: something in the vault can't be opened; it stays there, so a file that it locks stays locked", "error", err)
			if f.Hold != nil && !errors.Is(err, vault.ErrEmpty) { // as it is when a worker process has released it just now
				d.safety.orphans++
			}
		}
	}
	if !r.unseen { // else another cell may have the same hold, and this one is to lose
		for _, cell := range r.alone {
			cell.Word().Store(0) // for what is done to the owner
		}
	}
	r.complete(spaces)
	if !fdtable.Room(spare) {
		return nil, fmt.Errorf("what a daemon that has ended has left leaves no room to serve, and its locks stay held until there is some: %w", vault.ErrTruncated)
	}
	return r, nil
}

// spare is how many descriptors a daemon needs beside those that it takes over, at least.
const spare = 24

// openVault opens the vault of those roots, and reads its records. There is one root; if there are more after all, the vault that was used
// last is taken. nil: none holds anything.
func (d *daemon) openVault(roots []int) (v *vault.Vault, found []vault.Found, err error) {
	latest := int64(-1)
	for _, root := range roots {
		one, records, fault := readVault(root)
		switch age := takeovers(records); {
		case errors.Is(fault, vault.ErrEmpty):
			d.log.Error("recovery: a vault was passed that a daemon has given up; it holds nothing")
			unix.Close(root)
		case errors.Is(fault, vault.ErrTruncated):
			return nil, nil, fault // it may be the one
		case fault != nil:
			d.log.Error("recovery: a vault was passed that can't be opened", "descriptor", root, "error", fault)
			err = fault
		case v == nil:
			v, found, latest = one, records, age
		default:
			d.log.Error("recovery: two vaults were passed. That of which more daemons have taken over is used; what the other one has stays locked until the service is stopped",
				"takeovers", []int64{latest, age})
			if age > latest {
				v, one, found, latest = one, v, records, age
			}
			one.Close() // the store has it still
			d.safety.another = true
		}
	}
	if v == nil {
		return nil, nil, err
	}
	d.safety.another = d.safety.another || err != nil
	return v, found, nil
}

func readVault(root int) (*vault.Vault, []vault.Found, error) {
	v, err := vault.Open(root)
	if err != nil {
		return nil, nil, err
	}
	found, err := v.Contents()
	return v, found, err
}

// takeovers returns how many binaries and processes had taken over when the settings among those records were stored, -1 if there are none.
func takeovers(found []vault.Found) int64 {
	for i := range found {
		if f := &found[i]; f.Daemon != nil {
			if s, _, err := state.Decode(f.Daemon.State, keptPID); err == nil {
				return int64(s.Upgrades + s.Recoveries)
			}
		}
	}
	return -1
}

// recoverSettings takes the daemon's own settings over.
func (d *daemon) recoverSettings(r *recovery, f *vault.Found) error {
	fds, err := f.Descriptors()
	if err != nil {
		return err
	}
	s, problems, err := state.Decode(f.Daemon.State, keptPID)
	if err != nil {
		d.log.Error("recovery: the settings of the daemon that has ended are not understood; those of the configuration hold", "error", err)
		return nil
	}
	for _, p := range problems {
		d.log.Error("recovery: the settings have a fault", "fault", p.String())
	}
	place := func(fd *int32) {
		if i := int(*fd) - firstPlace; *fd != state.NoFD && i >= 0 && i < len(fds) {
			*fd = int32(fds[i])
		} else {
			*fd = state.NoFD
		}
	}
	place(&s.PIDFile)
	for _, server := range []*state.Server{s.Lock, s.Admin} {
		if server == nil {
			continue
		}
		for i := range server.Services {
			for j := range server.Services[i].Sockets {
				place(&server.Services[i].Sockets[j].FD)
			}
		}
	}
	s.Cell = f.Cell.Index()
	if s.Lock == nil {
		s.Lock = r.snapshot.Lock
	}
	if s.Admin == nil {
		s.Admin = r.snapshot.Admin
	}
	r.snapshot = s
	return nil
}

// owner returns the place of an owner, whose pidfd, or state.NoFD, is the snapshot's from now on.
func (r *recovery) owner(o state.Owner) int32 {
	key := ownerKey{o.PID, o.PIDFD == state.NoFD}
	ended := !key.number && poll.Ended(int(o.PIDFD))
	add := func() int32 {
		at := int32(len(r.snapshot.Owners))
		r.snapshot.Owners = append(r.snapshot.Owners, o)
		r.ended[at] = ended
		return at
	}
	at, known := r.owners[key]
	switch {
	case !known:
		at = add()
		r.owners[key] = at
	case key.number:
	case r.ended[at] && !ended:
		// Of two processes with one number at most one lives: that is the one that others are to join.
		at = add()
		r.owners[key] = at
	case !r.ended[at] && ended:
		at = add()
	default:
		is := &r.snapshot.Owners[at]
		is.Kind, is.Stopped, is.Ending = max(is.Kind, o.Kind), is.Stopped || o.Stopped, is.Ending || o.Ending
		unix.Close(int(o.PIDFD))
	}
	return at
}

// client takes a connection over, or notes that it ends: one whose last request is not answered, as far as can be told, is
// closed, so that its peer never waits for an answer that does not come. What lies unread in the peer's queue may be the answer to a
// request before that, so it tells nothing; the peer can still read it.
func (r *recovery) client(f *vault.Found) error {
	fds, err := f.Descriptors()
	if err != nil {
		return err
	}
	c := f.Client.State
	c.FD, c.Cell = int32(fds[0]), f.Cell.Index()
	server := r.snapshot.Lock
	name := lockServer
	if f.Client.Admin {
		server, name = r.snapshot.Admin, adminServer
	}
	server.NextClientID = max(server.NextClientID, c.ID+1)
	if f.HasPIDFD() {
		c.Self = r.owner(state.Owner{Details: c.Owner, Kind: state.Verified, PIDFD: int32(fds[1])})
	}
	progress := rpc.ProgressOf(f.Cell.Word().Load())
	if !f.Client.Admin {
		r.progress[c.ID] = progress
	}
	if !progress.Idle {
		r.dismissed = append(r.dismissed, dismissed{f.Cell, fds[0], c.ID, name, c.Self})
		return nil
	}
	server.Clients = append(server.Clients, c)
	return nil
}

// giving tells whether a hold's cell is given up, or will be if the hold lies in another one, too.
func giving(c *vault.Cell) bool {
	word := c.Word().Load()
	return word == vault.Moving || vault.Releaser(word) != 0
}

// hold takes one hold of a resource over.
func (r *recovery) hold(f *vault.Found) error {
	h := f.Hold
	word := f.Cell.Word().Load()
	worker := vault.Releaser(word)
	if worker != 0 && r.resources[resourceKey{h.Lockspace, h.Name}] != nil {
		// What it releases is the last of a lock that another one has replaced.
		returnAfter(r.vault, f.Cell, worker)
		return nil
	}
	fds, err := f.Descriptors()
	if err != nil {
		return err
	}
	cell := f.Cell.Index()
	r.snapshot.Lock.NextClientID = max(r.snapshot.Lock.NextClientID, h.Client+1)
	if f.HasPIDFD() {
		h.Owner.PIDFD = int32(fds[0])
		fds = fds[1:]
	}
	key := resourceKey{h.Lockspace, h.Name}
	res := r.resources[key]
	if res == nil {
		res = &state.Resource{Name: h.Name, Path: lockspace.Path(h.Lockspace, h.Name), FD: int32(f.Cell.FD()), Held: true, Flags: h.Flags, File: h.File}
		if len(fds) > 0 {
			res.FD = int32(fds[0])
			fds = fds[1:]
		}
		r.resources[key] = res
	}
	for _, fd := range fds { // the same open file description again
		unix.Close(fd)
	}
	h.Owner.Stopped, h.Owner.Ending = word == vault.Stopped, word == vault.Ending
	if h.Owner.Ending && h.Owner.PIDFD != state.NoFD {
		// Nobody else is ever ended: he has proven, when the hold was stored already, that he is the process of this pidfd.
		h.Owner.Kind = state.Verified
	}
	moved := word == vault.Moving && r.holds(res, h)
	if word == vault.Moving && !moved && (len(res.Cells) == 0 || slices.Contains(r.alone, r.vault.Cell(res.Cells[0]))) {
		r.alone = append(r.alone, f.Cell)
	}
	filled := worker == 0 && vault.Worker(word) != 0 // that process has nothing more to do here
	// That process is noted until whoever asked for the hold is answered. A live upgrade may have taken his connection away since.
	p, known := r.progress[h.Client]
	unanswered := known && p.Request == h.Request && !p.Idle && !p.Replying || filled && h.Origin != vault.Origin{}
	switch {
	case filled && unanswered:
		f.Cell.Word().Store(vault.Releasing)
	case filled:
		f.Cell.Word().Store(0) // for what is done to the owner
	}
	res.Owners = append(res.Owners, r.owner(h.Owner))
	res.Cells = append(res.Cells, cell)
	res.Since = append(res.Since, h.Since)

	switch {
	case worker != 0:
		r.unsettled = append(r.unsettled, unsettled{key, cell, worker, "a worker process may still work on it"})
	case moved:
		r.unsettled = append(r.unsettled, unsettled{key, cell, 0, "another lock on the file has taken its place"})
	case word == vault.Releasing:
		r.unsettled = append(r.unsettled, unsettled{key, cell, 0, "it was being released"})
	case unanswered:
		r.unsettled = append(r.unsettled, unsettled{key, cell, 0, "whoever asked for it was not answered"})
	}
	return nil
}

// holds tells whether a hold is among those of a resource that were taken over.
func (r *recovery) holds(res *state.Resource, h *vault.Hold) bool {
	for i, at := range res.Owners {
		if res.Since[i] == h.Since && r.snapshot.Owners[at].PID == h.Owner.PID {
			return true
		}
	}
	return false
}

// complete puts what was found into the snapshot.
func (r *recovery) complete(spaces map[string]uint32) {
	s := r.snapshot
	s.PID, s.Vault = int32(os.Getpid()), int32(r.vault.Root())
	s.Recoveries++
	at := map[string]int{}
	add := func(dir string) int {
		i, known := at[dir]
		if !known {
			i = len(s.Lockspaces)
			at[dir] = i
			s.Lockspaces = append(s.Lockspaces, state.Lockspace{Dir: dir, Cell: spaces[dir]})
		}
		return i
	}
	s.Default, s.Lockspaces = nil, nil
	for dir := range spaces {
		add(dir)
	}
	for key, res := range r.resources {
		if key.lockspace == "" {
			s.Default = append(s.Default, *res)
		} else {
			of := &s.Lockspaces[add(key.lockspace)]
			of.Resources = append(of.Resources, *res)
		}
	}
}

// settleRecovery ends what a recovery can't go on with. It is called when everything was taken over, and before anybody is served: no
// request meets a hold that nobody knows of.
//
// Connections come last: that the request of one was not answered is what tells a process that comes after this one, should it die here,
// to give up the hold.
//
// A peer that has hung up is seen to have done so before that: the process that died may have read the end of the stream, which looks as if it
// had read a request, and done nothing about it. Whatever lies in a cell was never shut down by us.
func (d *daemon) settleRecovery(r *recovery, owners []*owner.Owner) {
	for _, u := range r.unsettled {
		d.log.Info("recovery: a hold is given up", "lockspace", u.lockspace, "resource", u.name, "reason", u.why)
		if u.worker != 0 {
			d.table.ReleaseAfter(u.lockspace, u.name, u.cell, func() { filelock.AwaitWorker(u.worker) })
			continue
		}
		if err := d.table.ReleaseStored(u.lockspace, u.name, u.cell); err != nil {
			d.log.Error("recovery: a hold is not given up", "lockspace", u.lockspace, "resource", u.name, "error", err)
		}
	}
	for _, c := range r.dismissed {
		if c.self != state.None && poll.HungUp(c.fd) {
			d.locks.HungUp(owners[c.self])
		}
		d.log.Warn("recovery: a connection is closed, since its last request may not have been answered", "server", c.server, "client", c.id)
		hangUp(r.vault, c.cell, c.fd)
	}
}

// returnAfter takes a cell back when a worker process of an earlier daemon has ended, which may still put something into it.
func returnAfter(v *vault.Vault, cell *vault.Cell, worker int) {
	go func() {
		filelock.AwaitWorker(worker)
		v.Release(cell)
	}()
}

// hangUp ends a connection that nobody goes on with: its cell has a copy, which would keep the peer waiting.
func hangUp(v *vault.Vault, cell *vault.Cell, fd int) {
	v.Release(cell)
	_ = unix.Shutdown(fd, unix.SHUT_RDWR)
	unix.Close(fd)
}

// reportRecovery tells those who look at us that this process has taken over from one that has died.
func (d *daemon) reportRecovery(locks, clients int) {
	d.events.Add(events.Event{
		Kind: events.Recovered,
		Text: fmt.Sprintf("%d locks and %d clients of a daemon that had ended", locks, clients),
	})
}
