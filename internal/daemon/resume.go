// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/buildinfo"
	"virtlockd/internal/events"
	"virtlockd/internal/fdtable"
	"virtlockd/internal/filelock"
	"virtlockd/internal/lockspace"
	"virtlockd/internal/owner"
	"virtlockd/internal/pidfile"
	"virtlockd/internal/poll"
	"virtlockd/internal/rpc"
	"virtlockd/internal/state"
	"virtlockd/internal/systemd"
	"virtlockd/internal/vault"
)

// retryWeak is how often it is tried to make a lock exclusive again that is not.
const retryWeak = 100 * time.Millisecond

// legacy is what another binary has left in this process: ours or the C daemon's, which both write a state file
// and then exec the one that is installed now.
type legacy struct {
	snapshot *state.Snapshot // nil: nothing, or nothing that can be used
	problems []state.Problem
	err      error // why there is nothing that can be used
	// served says that this process was a daemon before: it may have locks, and had better not end.
	served bool
	// inherited is what there was to take over, set with snapshot.
	inherited inheritance
}

// findLegacy reads the state file and removes it: what it says is true now or never. A file of another process was
// left by one that died, or is just being handed over there: then it is left alone.
func findLegacy(p paths) legacy {
	data, release, err := state.Map(p.stateFile)
	if errors.Is(err, fs.ErrNotExist) {
		return legacy{}
	}
	defer func() { beside(len(data)/os.Getpagesize(), release) }() // for a large file that takes longer than to read it did
	var l legacy
	if err == nil {
		size := fdtable.Size()
		looked := beside(size, func() { l.inherited = findInherited(size) })
		l.snapshot, l.problems, err = state.Decode(data, int32(os.Getpid()))
		looked()
		if err == nil && l.snapshot.Began != 0 && l.snapshot.Began != began() {
			l.snapshot, l.problems = nil, nil
			err = errors.New("it is of an earlier process that had the same process id")
		}
	}
	if err == nil {
		keepFromChildren()
	}
	var magic *state.MagicError
	if errors.As(err, &magic) && lives(magic.Got) {
		l.err = fmt.Errorf("%w; that one lives, so the file is left to it", err)
		return l
	}
	l.err = errors.Join(err, state.Remove(p.stateFile))
	l.served = l.snapshot != nil || ownSockets(p)
	return l
}

// began returns when this process started, in clock ticks after boot, 0 if that is not known.
var began = sync.OnceValue(func() uint64 {
	stat, err := os.ReadFile("/proc/self/stat")
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	const starttime = 22 - 3 // proc_pid_stat(5); the first field here is the third
	if err != nil || len(fields) <= starttime {
		return 0
	}
	ticks, _ := strconv.ParseUint(fields[starttime], 10, 64) // 0 with an error
	return ticks
})

// lives tells whether there is a process with that number.
func lives(pid string) bool {
	n, err := strconv.ParseInt(pid, 10, 32)
	return err == nil && n > 0 && unix.Kill(int(n), 0) != unix.ESRCH
}

// notInherited says that a descriptor of a snapshot is not open, or is something that we have opened ourselves.
func notInherited(fd int32) error {
	return fmt.Errorf("descriptor %d was not handed over to this program", fd)
}

// ofSocket returns which of our paths a descriptor is a socket or a connection at, "" if it is none.
func (p paths) ofSocket(fd int) string {
	name, err := unix.Getsockname(fd)
	at, ok := name.(*unix.SockaddrUnix)
	if err != nil || !ok || at.Name != p.lockSocket && at.Name != p.adminSocket {
		return ""
	}
	return at.Name
}

// dismissStrays looks for descriptors that were inherited and that nobody has taken over. A socket of ours is closed, so that
// whoever is at its other end learns of it. Anything else stays open: it may hold a lock, and then its file is
// safe at least until the daemon ends. Each binary to come gets it, and no child does: one that outlives us would keep the file
// locked. So this is done after each live upgrade; it is told only where something has just gone wrong.
func (d *daemon) dismissStrays(inherited inheritance) {
	tell := d.left.err != nil || d.strays
	var left []string
	for fd := range inherited {
		if !inherited.has(fd) {
			continue
		}
		if path := d.paths.ofSocket(fd); path != "" {
			d.log.Error("a connection or socket of the program before this one was not taken over, it is closed", "descriptor", fd, "path", path)
			_ = unix.Shutdown(fd, unix.SHUT_RDWR) // a copy elsewhere must not keep the other end waiting
			unix.Close(fd)
			continue
		}
		if d.found == nil { // else it was opened here, and lies in the vault as well
			unix.CloseOnExec(fd)
			d.unknown = append(d.unknown, int32(fd))
		}
		if tell {
			link, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
			left = append(left, fmt.Sprintf("%d: %s", fd, link))
		}
	}
	if len(left) > 0 {
		d.log.Error("descriptors that nobody knows of stay open until the daemon ends, so files that they may lock stay locked", "descriptors", left)
	}
}

// takeOver goes on with what another binary in this process has left. Nothing of it ends the
// daemon: what can't be kept is told, and everything else is kept.
//
//	owners first: locks and clients refer to them
//	sockets last: nobody new is accepted by a daemon that does not have everything
func (d *daemon) takeOver(s *state.Snapshot, problems []state.Problem) {
	start := time.Now()
	d.strays = d.strays || len(problems) > 0
	for _, p := range problems {
		d.log.Error(d.cause+"the state file has a fault", "fault", p.String(), "descriptors", p.FDs)
	}
	if s.StartTime != 0 {
		d.startTime = s.StartTime
	}
	d.upgrades, d.recoveries = s.Upgrades, s.Recoveries
	d.reapStrays()
	strays := d.adoptVault(s)
	owners := d.adoptOwners(s)
	take, heirs := d.inheritLocks(s)
	// Independent of each other, and everybody waits for the slower one.
	var locks, misfits int
	entered := beside(len(heirs), func() { locks, misfits = d.adoptLocks(take, heirs, owners) })
	clients := d.adoptClients(s, owners)
	entered()
	d.strays = d.strays || misfits > 0
	if d.found != nil {
		d.settleRecovery(d.found, owners) // before anything else works on what a worker process may still be at
	}
	d.settleStrays(strays) // before anything is released, or stored once more, of which a copy is there
	for i, o := range owners {
		// One that was found dead while owners were taken over had no locks yet.
		if o.Dead() || endedMeanwhile(s, &s.Owners[i], o) {
			d.log.Info(d.cause+"a guest has ended meanwhile, its locks are released", "", o.Details())
			d.table.ReleaseOwner(o)
		}
	}
	if d.safety.vault == nil {
		d.makeSafe()
	}
	d.storeEverything()
	for _, o := range owners {
		o.Release()
	}
	// Now that every lock is there, requests may come that were read by the binary before us.
	d.lock.Thaw()
	d.admin.Thaw()
	d.adoptSettings(s)
	args := []any{"version", buildinfo.Version, "locks", locks, "clients", clients, "took", time.Since(start).Round(time.Microsecond)}
	if s.Frozen != 0 {
		args = append(args, "pause", time.Duration(monotonic()-s.Frozen).Round(time.Microsecond))
	}
	if d.found != nil {
		d.log.Warn("recovery: this process has taken over from one that had ended", args...)
		d.reportRecovery(locks, clients)
		return
	}
	d.reportUpgrade(locks, clients)
	told := func() { d.log.Info("live upgrade: this binary has taken over", args...) }
	l, store := d.safety.link, d.safety.store
	if l == nil || s.Frozen == 0 { // the C daemon had none
		told()
		return
	}
	// An operator who waits for this line may stop the daemon then, which is not to meet a keeper that is about to hear nothing.
	err := l.Reexec()
	go func() {
		if err == nil {
			err = store.Barrier(storeTime)
		}
		if err != nil {
			d.log.Warn("live upgrade: the keeper goes on as the binary that it was, or is not there yet", "error", err)
		}
		told()
	}()
}

// reapStrays waits for the children that the program before this one has left: workers, most of which have ended with
// it. Nobody else would.
func (d *daemon) reapStrays() {
	pid := strconv.Itoa(os.Getpid())
	children, err := os.ReadFile("/proc/self/task/" + pid + "/children")
	if err != nil {
		d.log.Debug("children of the program before this one stay as zombies when they end", "error", err)
		return
	}
	for _, child := range strings.Fields(string(children)) {
		if n, err := strconv.Atoi(child); err == nil {
			go func() {
				for {
					if _, err := unix.Wait4(n, nil, 0, nil); err != unix.EINTR {
						return
					}
				}
			}()
		}
	}
}

// adoptOwners returns them in the order of the snapshot. One that can't be watched is kept as a number: its locks
// stay until they are released, which is safe.
func (d *daemon) adoptOwners(s *state.Snapshot) []*owner.Owner {
	owners := make([]*owner.Owner, len(s.Owners))
	for i := range s.Owners {
		from := s.Owners[i]
		if from.PIDFD != state.NoFD && !d.left.inherited.has(int(from.PIDFD)) {
			d.log.Error(d.cause+"whoever has the process id of an owner now is watched in its place, and never killed", "pid", from.PID, "error", notInherited(from.PIDFD))
			from.PIDFD, from.Kind = state.NoFD, min(from.Kind, state.Watched)
			d.strays = true
		}
		pidfd := from.PIDFD
		o, err := d.owners.Adopt(&from)
		if err == nil && pidfd != state.NoFD {
			d.left.inherited.taken(int(pidfd))
		}
		if err != nil {
			d.log.Error(d.cause+"the end of an owner can't be noticed, its locks are kept until they are released", "error", err)
			from.Kind, from.PIDFD = state.Unverified, state.NoFD
			if o, err = d.owners.Adopt(&from); err != nil {
				panic(err) // a number can't fail
			}
		}
		if from.Kind == state.Unknown && from.PID > 0 && o.Kind() == owner.Unverified {
			d.log.Warn(d.cause+"locks are held for a process that there is not; they are kept until they are released", "pid", from.PID)
		}
		owners[i] = o
	}
	return owners
}

// endedMeanwhile tells whether an owner that the C daemon knew by its own connection has ended before we could watch it:
// there is no such process, and the connection that the kernel says was that process's is hung up. The C daemon would
// have noticed, and nobody else will.
func endedMeanwhile(s *state.Snapshot, from *state.Owner, o *owner.Owner) bool {
	if from.Kind != state.Unknown || from.PID <= 0 || o.Kind() != owner.Unverified || s.Lock == nil {
		return false
	}
	return slices.ContainsFunc(s.Lock.Clients, func(c state.Client) bool {
		if !c.Registered || c.Owner.PID != from.PID {
			return false
		}
		cred, err := unix.GetsockoptUcred(int(c.FD), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil || cred.Pid != from.PID {
			return false
		}
		return poll.HungUp(int(c.FD))
	})
}

// ownSockets tells whether a socket at one of our paths was inherited, and systemd has not passed it: then this process was a
// daemon before, and may have locks.
func ownSockets(p paths) bool {
	if os.Getenv("LISTEN_PID") == strconv.Itoa(os.Getpid()) {
		return false
	}
	inherited := findInherited(fdtable.Size())
	for fd := range inherited {
		if inherited.has(fd) && p.ofSocket(fd) != "" {
			return true
		}
	}
	return false
}

// heir is a lock that is being taken over.
type heir struct {
	dir   string
	res   *state.Resource
	done  bool
	lock  *filelock.Lock
	found filelock.Finding
	rival int32 // the process that has it instead, if it is lost and that is known
	err   error
}

// inheritLocks takes over those of our own locks whose descriptors are what the snapshot says. What the C daemon has left is
// more than a question to the kernel, and one after the other.
func (d *daemon) inheritLocks(s *state.Snapshot) (*filelock.Takeover, []heir) {
	heirs := make([]heir, 0, countLocks(s))
	add := func(dir string, rs []state.Resource, cell uint32) {
		if err := d.table.Restore(dir, len(rs), cell); err != nil {
			d.log.Error(d.cause+"a lockspace is not kept", "error", err)
			d.strays = d.strays || len(rs) > 0
			return
		}
		for i := range rs {
			heirs = append(heirs, heir{dir: dir, res: &rs[i]})
		}
	}
	add("", s.Default, 0)
	for i := range s.Lockspaces {
		add(s.Lockspaces[i].Dir, s.Lockspaces[i].Resources, s.Lockspaces[i].Cell)
	}

	take := d.files.Takeover(len(heirs))
	sideBySide(heirs, func(part []heir) {
		take := take.Another()
		for i := range part {
			if h := &part[i]; h.res.File != (state.File{}) {
				d.inherit(take, h)
			}
		}
	})
	return take, heirs
}

// adoptLocks takes over the other locks and enters all into the table: n of them. Those that could not be inherited, misfits, are taken
// anew.
func (d *daemon) adoptLocks(take *filelock.Takeover, heirs []heir, owners []*owner.Owner) (n, misfits int) {
	for i := range heirs {
		if h := &heirs[i]; h.lock != nil {
			if err := take.Rejoin(h.lock); err != nil {
				h.lock, h.err = nil, err
			}
		}
	}
	for i := range heirs {
		if !heirs[i].done {
			d.inherit(take, &heirs[i])
		}
		if heirs[i].lock != nil {
			d.left.inherited.taken(int(heirs[i].res.FD))
		}
	}
	// Not before all others are converted: to open a file and close it again drops a POSIX lock that
	// this process has on it under another name.
	for i := range heirs {
		h := &heirs[i]
		if h.lock == nil {
			misfits++
			d.lockAnew(h)
		}
		if d.adoptLock(h, owners) {
			n++
		} else {
			d.safety.orphans += stored(h.res)
		}
	}
	return n, misfits
}

// stored counts the holds of a resource that lie in the vault.
func stored(res *state.Resource) (n int) {
	for _, cell := range res.Cells {
		if cell != 0 {
			n++
		}
	}
	return n
}

// adoptLock goes on with one resource. Whoever believes to hold it does so afterwards, and nobody
// else gets it.
func (d *daemon) adoptLock(h *heir, owners []*owner.Owner) bool {
	holders := make([]*owner.Owner, len(h.res.Owners))
	for i, place := range h.res.Owners {
		holders[i] = owners[place]
	}
	tell := func(level slog.Level, text string, more ...any) {
		args := []any{"path", h.res.Path}
		if len(holders) > 0 {
			args = append(args, "", holders[0].Details())
		}
		d.log.Log(context.Background(), level, text, append(args, more...)...)
	}
	if h.lock == nil {
		tell(slog.LevelError, d.cause+"a lock is not kept: its descriptor can't be used and its file can't be locked anew; stop the guest or make sure that nobody else uses the disk", "error", h.err)
		d.reportLoss(h.res.Path, holders, "it is not kept by the daemon that has taken over: "+h.err.Error())
		return false
	}
	if h.err != nil {
		tell(slog.LevelError, d.cause+"the descriptor of a lock can't be used, so its file was locked anew", "error", h.err)
		d.reportLoss(h.res.Path, holders, "taken again; how long it was free is not known: "+h.err.Error())
	}
	rivals, err := d.table.Adopt(h.dir, h.res, holders, h.lock)
	if err != nil {
		tell(slog.LevelError, d.cause+"a lock is kept, but nobody can release it", "error", err)
		if stored(h.res) == 0 { // else the vault keeps it, also over the next live upgrade
			fd, _ := h.lock.State()
			d.unknown = append(d.unknown, int32(fd))
		}
		return false
	}
	for _, rival := range rivals {
		tell(slog.LevelError, "two guests own one file under different names: the binary before this one let them; stop one of them",
			"other", rival.Details().Name, "other_uuid", rival.Details().UUIDString(), "other_pid", rival.PID)
	}
	switch {
	case h.err != nil:
	case h.found == filelock.Weakened && h.lock.Remote():
		tell(slog.LevelWarn, d.cause+"somebody else took a shared lock while this one was converted; its disk may hang, so it stays shared until it is released")
	default:
		d.tellFinding(h.res.Path, holders[0], h.found, h.rival)
	}
	return true
}

// tellFinding says what became of a lock that was taken over, if it was not as it should be. rival has it if it is lost; 0: not known.
func (d *daemon) tellFinding(path string, holder *owner.Owner, found filelock.Finding, rival int32) {
	args := []any{"path", path, "", holder.Details()}
	if rival > 0 {
		args = append(args, "other_pid", rival)
	}
	switch found {
	case filelock.Regained:
		d.log.Error(d.cause+"a lock had been lost while its owner held it, and was taken again; how long somebody else could have had it is not known", args...)
		d.reportLoss(path, []*owner.Owner{holder}, "it had been lost before the daemon took over; taken again")
	case filelock.Lost:
		d.log.Error(d.cause+"a lock had been lost while its owner held it, and somebody else has it now; nobody is let in besides; stop one of the two", args...)
	case filelock.Weakened:
		d.log.Warn(d.cause+"somebody else took a shared lock while this one was converted; it is tried until it is exclusive again", args...)
	}
}

// reportLoss tells those who look at us of a lock that its owner did not have all the time. Where somebody else has it now, the watcher
// tells.
func (d *daemon) reportLoss(path string, holders []*owner.Owner, text string) {
	e := events.Event{Kind: events.Lost, Reason: events.Gone, Resource: path, Text: text}
	if len(holders) > 0 {
		o := holders[0].Details()
		e.Owner, e.UUID, e.PID = o.Name, o.UUID, holders[0].PID
	}
	d.events.Add(e)
}

// inherit takes the lock over by its descriptor, or says in err why that is not what the state says.
func (d *daemon) inherit(take *filelock.Takeover, h *heir) {
	h.done = true
	res := h.res
	mode := modeOf(res)
	switch {
	case res.FD == state.NoFD:
		h.err = errors.New("there is none")
	case !d.left.inherited.has(int(res.FD)):
		h.err = notInherited(res.FD)
	case res.File == (state.File{}): // the C daemon knows nothing of its files
		h.lock, h.found, h.err = take.C(res.Path, int(res.FD), mode)
		h.rival = take.Rival()
	default:
		h.lock, h.err = take.Ours(res.Path, int(res.FD), mode, res.File)
	}
	if h.err != nil {
		h.lock = nil
	}
}

// lockAnew takes a lock that could not be inherited; h.err says why.
func (d *daemon) lockAnew(h *heir) {
	lock, err := d.files.Lock(h.res.Path, modeOf(h.res), false, nil)
	if err != nil {
		h.err = errors.Join(h.err, err)
		return
	}
	h.lock, h.found = lock, filelock.Regained
}

func modeOf(res *state.Resource) filelock.Mode {
	if res.Flags&lockspace.Shared != 0 {
		return filelock.Shared
	}
	return filelock.Exclusive
}

func (d *daemon) adoptClients(s *state.Snapshot, owners []*owner.Owner) (n int) {
	for _, from := range []struct {
		*state.Server
		server *rpc.Server
	}{{s.Lock, d.lock}, {s.Admin, d.admin}} {
		if from.Server == nil {
			continue
		}
		from.server.Resume(from.Server)
		d.adminProgram.SetPriorityWorkers(from.server, from.PriorityWorkers)
		var kept, strays atomic.Int32
		sideBySide(from.Clients, func(part []state.Client) {
			for i := range part {
				if d.adoptClient(from.server, &part[i], owners) {
					kept.Add(1)
				} else {
					strays.Add(1)
				}
			}
		})
		n += int(kept.Load())
		d.strays = d.strays || strays.Load() > 0
	}
	return n
}

// worthwhile is for how many locks, clients, descriptors or pages it pays to work on several goroutines: to wake a thread takes some 50 us.
const worthwhile = 250

// beside calls do on a goroutine of its own if it or what goes on beside it is about n of them, and here if that is few. done returns
// when do has.
func beside(n int, do func()) (done func()) {
	if n < worthwhile {
		do()
		return func() {}
	}
	var one sync.WaitGroup
	one.Go(do)
	return one.Wait
}

// sideBySide calls do with parts of a list, each on a goroutine of its own, or with a short one here.
func sideBySide[T any](all []T, do func(part []T)) {
	if len(all) < worthwhile {
		do(all)
		return
	}
	var parts sync.WaitGroup
	for part := range slices.Chunk(all, len(all)/runtime.GOMAXPROCS(0)+1) {
		parts.Go(func() { do(part) })
	}
	parts.Wait()
}

// adoptClient goes on with one connection, or says why not. Others are adopted at the same time.
func (d *daemon) adoptClient(server *rpc.Server, c *state.Client, owners []*owner.Owner) bool {
	fd := int(c.FD)
	if !d.left.inherited.has(fd) {
		d.log.Error(d.cause+"a client is not kept", "client", c.ID, "server", server.Name(), "error", notInherited(c.FD))
		return false
	}
	err := server.Adopt(c, func(client *rpc.Client) error {
		if server != d.lock {
			return nil
		}
		if err := d.locks.Restore(client, c, owners); err != nil {
			d.log.Warn(d.cause+"a connection is kept, but its end does not tell that of the guest", "error", err)
		}
		return nil
	})
	if err == nil {
		d.left.inherited.taken(fd)
		return true
	}
	d.log.Error(d.cause+"a client is not kept; its connection is closed", "error", err)
	// Only a connected socket can be shut down: nothing else is ever closed by mistake.
	if unix.Shutdown(fd, unix.SHUT_RDWR) == nil {
		d.left.inherited.taken(fd)
		unix.Close(fd)
	}
	return false
}

// adoptSettings restores what was changed at run time.
func (d *daemon) adoptSettings(s *state.Snapshot) {
	if s.Timeout != nil {
		d.idle.setTimeout(time.Duration(*s.Timeout) * time.Second)
	}
	if err := d.restoreLogSettings(s); err != nil {
		d.log.Error(d.cause+"log settings made at run time are not kept", "error", err)
	}
}

// adoptListeners goes on listening on the sockets of the snapshot, and makes those that it does not have. A daemon
// without socket still keeps its locks.
func (d *daemon) adoptListeners(s *state.Snapshot, passed []systemd.Descriptor) {
	if len(passed) > 0 {
		// Of a service that was started again, whose sockets may be new ones.
		var err error
		if d.sockets, err = adoptSockets(d.paths, passed); err == nil {
			return
		}
		d.log.Error("recovery: the sockets of socket activation can't be served", "error", err)
	}
	for _, l := range []struct {
		from *state.Server
		path string
		to   **socket
	}{{s.Lock, d.paths.lockSocket, &d.sockets.lock}, {s.Admin, d.paths.adminSocket, &d.sockets.admin}} {
		if *l.to = d.inheritSocket(l.from); *l.to != nil {
			continue
		}
		var err error
		if *l.to, err = bindSocket(l.path); err != nil {
			d.log.Error(d.cause+"a socket can't be served, new clients have to wait for a restart; locks are kept", "path", l.path, "error", err)
		}
	}
}

// inheritSocket returns the server's listening socket; nil if it has none.
func (d *daemon) inheritSocket(s *state.Server) (out *socket) {
	if s == nil {
		return nil
	}
	for _, service := range s.Services {
		for _, from := range service.Sockets {
			one, err := inheritOne(from, d.left.inherited)
			d.strays = d.strays || err != nil
			if err == nil && out != nil {
				err = fmt.Errorf("path %q: there is one already, and no more are served; set one ListenStream= in each socket unit", one.path)
			}
			if err != nil {
				d.log.Error(d.cause+"a listening socket is not kept", "descriptor", from.FD, "error", err)
				continue
			}
			out = one
		}
	}
	return out
}

func inheritOne(from state.Socket, inherited inheritance) (*socket, error) {
	fd := int(from.FD)
	if !inherited.has(fd) {
		return nil, notInherited(from.FD)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		return nil, os.NewSyscallError("getsockname", err)
	}
	at, ok := name.(*unix.SockaddrUnix)
	listens, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil {
		return nil, os.NewSyscallError("getsockopt(SO_ACCEPTCONN)", err)
	}
	kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return nil, os.NewSyscallError("getsockopt(SO_TYPE)", err)
	}
	if !ok || listens == 0 || kind != unix.SOCK_STREAM {
		return nil, errors.New("it is not a listening UNIX stream socket")
	}
	inherited.taken(fd)
	out := &socket{fd: fd, path: at.Name}
	var st unix.Stat_t
	if from.Unlink && out.path != "" && unix.Lstat(out.path, &st) == nil {
		out.bound, out.dev, out.ino = true, st.Dev, st.Ino
	}
	return out, nil
}

// adoptPIDFile keeps the pid file locked. The C daemon's lock has ended with its binary, so there it
// is taken anew.
func (d *daemon) adoptPIDFile(s *state.Snapshot) {
	path := d.pidFilePath()
	if path == "" {
		return
	}
	var err error
	if s.PIDFile != state.NoFD && d.left.inherited.has(int(s.PIDFile)) {
		if d.pidFile, err = pidfile.Adopt(path, int(s.PIDFile)); err == nil {
			d.left.inherited.taken(int(s.PIDFile))
			return
		}
		d.log.Error(d.cause+"the pid file is locked anew", "error", err)
	}
	if d.pidFile, err = pidfile.Acquire(path); err != nil {
		d.log.Error(d.cause+"the pid file is not ours; locks are kept", "error", err)
	}
}

// adoptVault opens the vault of the binary or process before this one, so that locks and clients find their cells. It
// returns what lies in cells that nobody is left to use.
func (d *daemon) adoptVault(s *state.Snapshot) (strays []vault.Found) {
	var v *vault.Vault
	d.safety.another = d.safety.another || s.AnotherVault
	switch {
	case d.found != nil:
		v = d.found.vault
	case s.Vault == state.NoFD:
		return nil
	case !d.left.inherited.has(int(s.Vault)):
		d.log.Error(d.cause+"the vault is made anew", "error", notInherited(s.Vault))
		d.strays = true
		return nil
	default:
		var err error
		if v, err = vault.Open(int(s.Vault)); err == nil {
			strays, err = v.Claim(cellsOf(s))
		}
		if err != nil {
			d.log.Error(d.cause+"the vault is made anew", "error", err)
			d.strays = true // its root, with all that it keeps open
			return nil
		}
	}
	d.left.inherited.taken(int(s.Vault))
	d.safety.cell = v.Cell(s.Cell)
	// If somebody has passed it to us, or has kept it for the binary before, no more proof is needed that it is kept. Else guard sees to it.
	var why error
	switch {
	case d.safety.link == nil && d.safety.wanted:
		why = errKeeperEnded
	case d.found == nil && !s.VaultKept:
		why = errNotYet
	}
	d.use(v, why)
	return strays
}

// cellsOf lists those that a snapshot names.
func cellsOf(s *state.Snapshot) []uint32 {
	used := []uint32{s.Cell}
	for i := range s.Lockspaces {
		used = append(used, s.Lockspaces[i].Cell)
	}
	for r := range resources(s) {
		used = append(used, r.Cells...)
	}
	for _, server := range []*state.Server{s.Lock, s.Admin} {
		if server == nil {
			continue
		}
		for i := range server.Clients {
			used = append(used, server.Clients[i].Cell)
		}
	}
	return used
}

// settleStrays empties the cells of clients that were left behind with a request that hangs, so that their peers see the end
// of the connection, and undoes what was acquired for them after the snapshot. What was being stored once more is the hold's cell, or goes. What a
// worker process still works on is left to it.
func (d *daemon) settleStrays(strays []vault.Found) {
	v := d.safety.vault
	unanswered := map[vault.Origin]bool{}
	for i := range strays {
		f := &strays[i]
		if p := rpc.ProgressOf(f.Cell.Word().Load()); f.Client != nil && !f.Client.Admin && !p.Idle && !p.Replying {
			unanswered[vault.Origin{Client: f.Client.State.ID, Request: p.Request}] = true
		}
	}
	for i := range strays {
		f := &strays[i]
		if f.Hold != nil && vault.Releaser(f.Cell.Word().Load()) == 0 && unanswered[f.Hold.Origin] {
			// As long as its client's cell is there that tells of it, too. A process that comes after this one, should it die here, finds only this.
			f.Cell.Word().Store(vault.Releasing)
		}
	}
	for i := range strays {
		f := &strays[i]
		worker := vault.Worker(f.Cell.Word().Load())
		switch {
		case f.Client != nil:
			fds, err := f.Descriptors()
			if err != nil {
				v.Release(f.Cell) // its end comes with the last copy
				continue
			}
			if f.HasPIDFD() && poll.HungUp(fds[0]) {
				// The peer has hung up, and the binary before this one waited for the end of his request before it did anything about that.
				details := owner.Details(f.Client.State.Owner)
				if self, err := d.owners.Self(&details, fds[1]); err == nil { // else he has ended
					d.locks.HungUp(self)
					self.Release()
				}
				fds = fds[:1]
			}
			hangUp(v, f.Cell, fds[0])
			for _, fd := range fds[1:] {
				unix.Close(fd)
			}
		case f.Err != nil:
			d.log.Error(d.cause+"something in the vault is not understood; it stays there", "cell", f.Cell.Index(), "error", f.Err)
		case d.settleCopy(v, f):
		case worker != 0:
			returnAfter(v, f.Cell, worker)
		case f.Hold != nil && f.Cell.Word().Load() == vault.Releasing:
			d.settleReleased(v, f)
		default:
			d.log.Error(d.cause+"something in the vault belongs to nobody; it stays there, so a file that it locks stays locked", "cell", f.Cell.Index())
			if f.Hold != nil {
				d.safety.orphans++
			}
		}
	}
}

// settleCopy goes on with a hold of the table that was being stored once more, and tells whether that is what lies in the cell. A copy that is the
// only one in the vault is kept: until the hold is stored again, which may wait for other disks, a crash would lose it.
func (d *daemon) settleCopy(v *vault.Vault, f *vault.Found) bool {
	if f.Hold == nil || f.Hold.Origin != (vault.Origin{}) {
		return false
	}
	if word := f.Cell.Word().Load(); word == vault.Releasing || vault.Releaser(word) != 0 {
		return false
	}
	has, taken := d.table.StoredAgain(f.Hold, f.Cell)
	if has && !taken {
		f.Cell.Word().Store(vault.Moving) // until it is empty, whoever finds both takes the other one
		returnAfter(v, f.Cell, 0)
	}
	return has
}

// settleReleased ends a hold that was being released: its acquisition was not answered, it waited for a place at its disk, or the file of a lock
// lies there that others hold, who could not be stored.
func (d *daemon) settleReleased(v *vault.Vault, f *vault.Found) {
	h := f.Hold
	switch others, last := d.table.LeftBehind(h.Lockspace, h.Name, f.Cell); {
	case last: // it goes with the lock
	case others: // the lock is not in there alone, or was lost and replaced
		returnAfter(v, f.Cell, 0)
	default:
		path := lockspace.Path(h.Lockspace, h.Name)
		lock, err := d.lockIn(f, path)
		if err != nil {
			d.log.Error(d.cause+"a lock that was being released stays", "path", path, "error", err)
			d.safety.orphans++
			return
		}
		lease := ""
		if h.Flags&lockspace.AutoCreate != 0 {
			lease = path
		}
		go func() { // it may wait for the disk
			if err := lock.Release(lease, f.Cell); err != nil {
				d.log.Warn(d.cause+"a lock that was being released is, but its lease file could not be removed", "path", lease, "error", err)
			}
			v.Return(f.Cell)
		}()
	}
}

// lockIn takes the lock over whose file lies in the cell of a hold, and nowhere else.
func (d *daemon) lockIn(f *vault.Found, path string) (*filelock.Lock, error) {
	h := f.Hold
	var fd int
	if h.File.Remote {
		// A descriptor of its own, which is good also when the vault is given up meanwhile.
		var err error
		if fd, err = unix.FcntlInt(uintptr(f.Cell.FD()), unix.F_DUPFD_CLOEXEC, 0); err != nil {
			return nil, os.NewSyscallError("fcntl(F_DUPFD_CLOEXEC)", err)
		}
	} else {
		fds, err := f.Descriptors()
		if err != nil {
			return nil, err
		}
		fd = fds[len(fds)-1]
		for _, pidfd := range fds[:len(fds)-1] {
			unix.Close(pidfd)
		}
	}
	lock, err := d.files.Takeover(1).Ours(path, fd, modeOf(&state.Resource{Flags: h.Flags}), h.File)
	if err != nil {
		unix.Close(fd) // the cell has it
	}
	return lock, err
}

// adoptPoller goes on with the epoll set of the binary before this one.
func (d *daemon) adoptPoller(s *state.Snapshot) (*poll.Poller, error) {
	if s == nil || s.Epoll == nil {
		return poll.New()
	}
	fd, err := int(s.Epoll.FD), notInherited(s.Epoll.FD)
	if d.left.inherited.has(fd) {
		var p *poll.Poller
		if p, err = poll.Inherit(fd, s.Epoll.Generation); err == nil {
			d.left.inherited.taken(fd)
			return p, nil
		}
	}
	d.log.Error(d.cause+"the epoll set is made anew", "error", err)
	d.strays = true
	return poll.New()
}

// strengthen tries to make those locks exclusive again that a take-over could not keep so, until none is left or
// stop is closed.
func (d *daemon) strengthen(stop <-chan struct{}) {
	tick := time.NewTicker(retryWeak)
	defer tick.Stop()
	for d.table.Strengthen() > 0 {
		select {
		case <-stop:
			return
		case <-tick.C:
		}
	}
}
