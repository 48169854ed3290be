// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/buildinfo"
	"virtlockd/internal/conf"
	"virtlockd/internal/filelock"
	"virtlockd/internal/lockspace"
	"virtlockd/internal/logging"
	"virtlockd/internal/rpc"
	"virtlockd/internal/state"
	"virtlockd/internal/verify"
)

const (
	// askTime is how long the new binary may take to tell its version. A binary that hangs then
	// would hang with all locks.
	askTime = 5 * time.Second
	// askOutput bounds what is read of its answer, in bytes.
	askOutput = 4 << 10
	// patience is how long a hand-over waits for requests that are being executed. Everybody waits
	// as long; a disk that takes longer is left to its worker process.
	patience = 300 * time.Millisecond
	// lastFlush bounds the wait for the last log lines, with everybody waiting.
	lastFlush = 20 * time.Millisecond
	// grace is how long a request that has just got its lock may take to answer.
	grace = 50 * time.Millisecond
	// stuck is how old a call on a local disk may be: exec(2) would wait for it.
	stuck = time.Second
)

// prepareUpgrade begins to replace the running binary by the one that is installed now, for SIGUSR1. Either that works and
// everything goes on there, or nothing has happened but a log line. nil: it has failed.
//
//	find the binary; ask it --version in a child: does it run, is it ours or the C daemon?
//	read the configuration: a bad file must not wait for the new binary
//	RELOADING=1
//	freeze: accept nobody, read nothing, let running requests end
//	write the state file, read it back
//	let the descriptors outlive exec; hold signals back
//	execve
//
// and, if a step fails, all of it backwards.
//
// What can take its time comes first and on a goroutine of its own, so that the daemon goes on meanwhile and can be ended. The
// freeze and what is after it is done by hand.
func (d *daemon) prepareUpgrade(ctx context.Context) *successor {
	d.log.Info("SIGUSR1: live upgrade begins")
	raiseFileLimit() // somebody may have lowered it; the C daemon would not raise it
	next, err := d.findSuccessor(ctx)
	var settings conf.Settings
	if err == nil {
		if settings, _, err = d.loadConfig(); err != nil {
			err = fmt.Errorf("the new binary could not read its configuration; mend it and try again: %w", err)
		}
	}
	if err == nil {
		err = d.noCallStuck()
	}
	if err == nil && next.reader == state.C {
		if err = d.mayLeaveVault(); err == nil {
			err = d.disksAnswer()
		}
	}
	if err != nil {
		if ctx.Err() == nil {
			d.upgradeFailed(err)
		}
		return nil
	}
	if err := d.flushLogs(flushTime); err != nil { // so that it takes no time later
		d.upgradeFailed(err)
		return nil
	}
	d.followConfig(settings)
	began() // is known from here on
	next.room = touched(state.Room(d.lock.Count(), d.table.Held()))
	return next
}

// touched returns memory that the kernel has given already: a page of 4 KiB takes it more than a microsecond, for which nobody is
// to wait.
func touched(size int) []byte {
	b := make([]byte, size)
	for i := 0; i < size; i += os.Getpagesize() {
		b[i] = 0
	}
	return b[:0]
}

func (d *daemon) upgradeFailed(err error) {
	d.log.Error("SIGUSR1: no live upgrade; every lock and client stays as it is", "error", err)
}

// errEnding says that there is nothing to go on with.
var errEnding = errors.New("the daemon was asked to end")

// successor is the program to go on with.
type successor struct {
	path   string
	reader state.Reader
	file   identity
	room   []byte // for what is written for it
}

func (d *daemon) findSuccessor(ctx context.Context) (*successor, error) {
	path, err := d.findBinary()
	if err != nil {
		return nil, err
	}
	file, err := identify(path)
	if err != nil {
		return nil, err
	}
	reader, err := ask(ctx, path)
	if err != nil {
		return nil, err
	}
	return &successor{path: path, reader: reader, file: file}, nil
}

// identity tells a program from another one that is put in its place, or written over it.
type identity struct {
	dev, ino     uint64
	size         int64
	mtime, ctime int64
}

func identify(path string) (identity, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return identity{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return identity{uint64(st.Dev), st.Ino, st.Size, st.Mtim.Nano(), st.Ctim.Nano()}, nil // other widths on other architectures
}

// errReplaced says that the program that was asked is not the one that is there now. That may be the C daemon, which
// could not go on with what was written for ours.
var errReplaced = errors.New("the program was replaced after it was asked who it is")

// handOver goes on with the successor. It returns only if that is not possible.
func (d *daemon) handOver(next *successor) {
	d.tellSystemd(fmt.Sprintf("RELOADING=1\nMONOTONIC_USEC=%d", monotonic()/1000))
	defer d.tellSystemd("READY=1") // not reached after exec: the new binary says it
	var err error
	for try := 1; ; try++ {
		err = d.frozen(func(s *state.Snapshot) error { return d.replace(next, s, try == maxTries) })
		if try == maxTries || !errors.Is(err, errHalf) && !errors.Is(err, errReload) && !errors.Is(err, errBusy) {
			break
		}
		d.log.Info("SIGUSR1: live upgrade is tried again in a moment", "reason", err)
		time.Sleep(retryPause)
	}
	if errors.Is(err, errReplaced) {
		d.log.Info("SIGUSR1: live upgrade begins anew", "reason", err)
		select {
		case d.signals.upgrade <- unix.SIGUSR1:
		default: // another one was asked for anyway
		}
		return
	}
	d.upgradeFailed(err)
}

// What keeps us from handing over at this very instant is mostly over in the next one.
const (
	maxTries   = 5
	retryPause = 20 * time.Millisecond
)

// errHalf says that the C daemon, which can't be given the half of a message, has to wait for the rest.
var errHalf = errors.New("a message is half received or half sent")

// flushLogs gives log outputs time to write what they have. One that is stuck loses it, as it does
// anyway; the error is about one that exec(2) would wait for.
func (d *daemon) flushLogs(limit time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if d.logs.Flush(ctx) == nil {
		return nil
	}
	for _, o := range d.logs.InWrite() {
		return fmt.Errorf("the log output %s waits for its disk, and the upgrade would wait too; try again when it has been written, or with another output", o)
	}
	return nil
}

func (d *daemon) tellSystemd(what string) {
	d.safety.mu.Lock()
	n := d.notify // another one after the death of a keeper
	d.safety.mu.Unlock()
	if err := n.Send(what); err != nil {
		d.log.Warn("systemd was not told of the daemon's state", "state", what, "error", err)
	}
}

// monotonic returns CLOCK_MONOTONIC in ns, which systemd wants to be told with RELOADING=1.
func monotonic() int64 {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &t) // always there
	return t.Nano()
}

// findBinary looks for the program as execvp(3) does with argv[0], like the C daemon. Where a name that is not absolute leads to
// nothing, as after a change of PATH, the file that we run from is taken.
func (d *daemon) findBinary() (string, error) {
	name := os.Args[0]
	if strings.Contains(name, "/") && !filepath.IsAbs(name) {
		name = filepath.Join(d.startDir, name)
	}
	path, err := exec.LookPath(name)
	if err == nil {
		return filepath.Abs(path)
	}
	if filepath.IsAbs(os.Args[0]) {
		return "", fmt.Errorf("there is no program to go on with: %w", err)
	}
	self, selfErr := os.Executable()
	if selfErr == nil {
		self = strings.TrimSuffix(self, " (deleted)") // replaced: the new one has its name
		if path, selfErr = exec.LookPath(self); selfErr == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("there is no program to go on with: %w", errors.Join(err, selfErr))
}

// ask runs the binary with --version and tells which daemon it is: only one that can say that much is
// given the locks. Ours has a second line, and a third one that tells what state file it reads.
func ask(ctx context.Context, path string) (state.Reader, error) {
	fail := func(err error) (state.Reader, error) {
		return 0, fmt.Errorf("the program %s is not fit to go on with: %w", path, err)
	}
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, "--version")
	cmd.Dir = "/"
	cmd.WaitDelay = time.Second // for one that leaves a child behind with its output
	var answer beginning
	cmd.Stdout = &answer
	if err := cmd.Start(); err != nil {
		return fail(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // a child in state D is reaped when its disk answers
	var err error
	select {
	case err = <-ended:
	case <-ctx.Done():
		return fail(fmt.Errorf("it did not answer --version within %v", askTime))
	}
	if err != nil {
		return fail(fmt.Errorf("asked for --version: %w", err))
	}
	lines := bufio.NewScanner(bytes.NewReader(answer.b))
	if !lines.Scan() || !strings.Contains(lines.Text(), " (libvirt) ") {
		return fail(fmt.Errorf("asked for --version it says '%.80s'", bytes.TrimSpace(answer.b)))
	}
	if lines.Scan() && strings.HasPrefix(lines.Text(), buildinfo.Product) {
		lines.Scan() // else the text is empty
		if err := readsOurs(lines.Text()); err != nil {
			return fail(err)
		}
		return state.Ours, nil
	}
	return state.C, nil
}

// beginning keeps the first askOutput bytes that are written to it.
type beginning struct{ b []byte }

func (w *beginning) Write(p []byte) (int, error) {
	w.b = append(w.b, p[:min(len(p), askOutput-len(w.b))]...)
	return len(p), nil
}

// noCallStuck tells of a call on a local disk that takes too long. exec(2) waits for each thread, also for one that sleeps
// uninterruptibly, and nobody would be served meanwhile. Calls that workers do don't count.
func (d *daemon) noCallStuck() error {
	for _, c := range d.files.InFlight() {
		if age := time.Since(c.Since); c.Worker == 0 && age > stuck {
			return fmt.Errorf("the call %q on %s has been waiting for its disk for %v, and the upgrade would wait too; try again when it has ended",
				c.Op, c.Path, age.Round(time.Millisecond))
		}
	}
	return nil
}

// disksAnswer tells of a disk that does not answer although a lock is held on it. The C daemon is given open files instead of cells, whose
// close may ask the disk, and so would we on the way back. It takes a second at most. A disk whose locks are all released meanwhile is nobody's
// business.
func (d *daemon) disksAnswer() error {
	asked := map[string]bool{}
	for from, more := 0, true; more; more = from != 0 {
		var entries []lockspace.Entry
		entries, from = d.table.List(from, 1024)
		for i := range entries {
			e := &entries[i]
			mount := e.Lock.Mount()
			if mount == "" || e.Lock.ID().Block || asked[mount] { // to close a block device that others have open asks nobody
				continue
			}
			answered, trouble := d.checker.Ask(e)
			switch {
			case answered:
				asked[mount] = true
			case trouble != nil && trouble.Kind == verify.NoAnswer:
				return fmt.Errorf("the C daemon would wait for the disk of %s with every lock: %s; try again when it answers", e.Path, trouble.Text)
			case trouble != nil:
				return fmt.Errorf("whether the disk of %s answers is not known, and the C daemon would wait for it with every lock: %s; try again", e.Path, trouble.Text)
			}
		}
	}
	return nil
}

// frozen calls do with a picture of everything while nothing changes. When do returns, everything goes on.
func (d *daemon) frozen(do func(*state.Snapshot) error) error {
	frozen := monotonic()
	debug.SetGCPercent(-1) // everybody waits, and mostly what is garbage now goes with the binary
	defer debug.SetGCPercent(gcPercent)
	// First that of the administrator, whose calls can close clients of the other, also those that rest already.
	servers := []*rpc.Server{d.admin, d.lock}
	running := make([][]*rpc.Client, len(servers))
	var deadline time.Time
	for i, s := range servers {
		deadline = time.Now().Add(patience) // for each: while the administrator's calls end, locks are given
		running[i] = s.Freeze(deadline)
		defer s.Thaw()
	}
	d.table.Freeze(deadline)
	defer d.table.Thaw()
	hung := make(map[*rpc.Client]bool)
	for i, s := range servers {
		if len(running[i]) == 0 {
			continue
		}
		// Some may have got what they wait for just now, and are about to answer. No other can before Thaw.
		for _, c := range s.StillRunning(running[i], time.Now().Add(grace)) {
			hung[c] = true
		}
	}
	d.owners.Freeze()
	defer d.owners.Thaw()
	if err := d.nothingElseHangs(hung); err != nil {
		return err
	}
	snapshot, err := d.snapshot(hung)
	if err != nil {
		return err
	}
	snapshot.Frozen = frozen
	for c := range hung {
		d.log.Warn("a request hangs on a disk that does not answer; its connection ends with the live upgrade, and what it asked for is undone",
			"client", c.ID(), "pid", c.PID())
	}
	return do(snapshot)
}

// nothingElseHangs tells whether exec would have to wait, or a client would lose its connection without need.
// Everything is frozen, so what is still under way hangs, or has had bad luck: that may be over the next time.
func (d *daemon) nothingElseHangs(hung map[*rpc.Client]bool) error {
	unanswered := make([]string, 0, len(hung))
	for c := range hung {
		if d.admin.Client(c.ID()) == c {
			// Most likely it opens a log file: that is no worker's business.
			return fmt.Errorf("a request of the administrator's client %d (pid %d) is being executed, %w", c.ID(), c.PID(), errBusy)
		}
		unanswered = append(unanswered, c.String())
	}
	slices.Sort(unanswered)
	left := false // to workers
	for _, c := range d.files.InFlight() {
		if c.Worker == 0 && c.Mount == "" {
			return fmt.Errorf("the call %q on %s waits for its disk (unanswered: %s), %w", c.Op, c.Path, strings.Join(unanswered, ", "), errBusy)
		}
		left = true
	}
	if len(hung) > 0 && !left {
		return fmt.Errorf("requests are being executed (%s), %w", strings.Join(unanswered, ", "), errBusy)
	}
	return nil
}

// errBusy says that exec would have to wait for a call.
var errBusy = errors.New("and the upgrade would wait too; try again when that has ended")

// snapshot puts together what every part says of itself. Everything is frozen.
func (d *daemon) snapshot(hung map[*rpc.Client]bool) (*state.Snapshot, error) {
	s := d.settings()
	s.PID, s.Began = int32(os.Getpid()), began()
	s.Upgrades++
	s.AnotherVault = d.safety.another
	d.safety.mu.Lock()
	if v := d.safety.vault; v != nil {
		s.Vault, s.VaultKept, s.Cell = int32(v.Root()), d.safety.why == nil, d.safety.cell.Index()
	}
	d.safety.mu.Unlock()
	clients := d.lock.Clients()
	listed := beside(len(clients), func() { s.Default, s.Lockspaces = d.table.Snapshot(d.owners.Place) })
	s.Lock.Clients = make([]state.Client, 0, len(clients))
	for _, c := range clients {
		if !hung[c] {
			saved := c.Save()
			d.locks.Save(c, d.owners.Place, &saved)
			s.Lock.Clients = append(s.Lock.Clients, saved)
		}
	}
	for _, c := range d.admin.Clients() {
		if !hung[c] {
			s.Admin.Clients = append(s.Admin.Clients, c.Save())
		}
	}
	listed()
	s.Owners = d.owners.Snapshot()
	epfd, gen := d.poller.State()
	s.Epoll = &state.Epoll{FD: int32(epfd), Generation: gen}
	if d.pidFile != nil {
		s.PIDFile = int32(d.pidFile.FD())
	}
	for r := range resources(s) {
		if r.File.POSIX {
			return nil, fmt.Errorf("%s has only a POSIX record lock, because its file system or kernel refuses better ones, and that is not handed over; try again when it is released", r.Path)
		}
	}
	return s, nil
}

// settings returns a snapshot with what the daemon knows of itself: no locks or clients, and of descriptors the listening sockets.
func (d *daemon) settings() *state.Snapshot {
	s := &state.Snapshot{
		PIDFile: state.NoFD, Vault: state.NoFD,
		StartTime: d.startTime, Upgrades: d.upgrades, Recoveries: d.recoveries,
	}
	limits := d.limits.Load()
	s.Configured = [2]uint32{limits.MaxClients, limits.AdminMaxClients}
	if d.options.detach {
		s.StartDir = d.startDir
	}
	if timeout := d.idle.timeoutSeconds(); timeout != uint32(d.options.timeout/time.Second) {
		s.Timeout = &timeout
	}
	d.saveLogSettings(s)
	s.Lock, s.Admin = d.lock.Snapshot(d.unlinksSocket), d.admin.Snapshot(d.unlinksSocket)
	s.Lock.PriorityWorkers = d.adminProgram.PriorityWorkers(d.lock)
	s.Admin.PriorityWorkers = d.adminProgram.PriorityWorkers(d.admin)
	return s
}

// resources yields those of all lockspaces.
func resources(s *state.Snapshot) iter.Seq[*state.Resource] {
	return func(yield func(*state.Resource) bool) {
		for i := range s.Default {
			if !yield(&s.Default[i]) {
				return
			}
		}
		for i := range s.Lockspaces {
			rs := s.Lockspaces[i].Resources
			for j := range rs {
				if !yield(&rs[j]) {
					return
				}
			}
		}
	}
}

func (d *daemon) unlinksSocket(fd int) bool {
	for _, s := range d.sockets.all() {
		if s.fd == fd {
			return s.bound
		}
	}
	return false
}

// replace writes the state file and runs the new binary in this process. It returns only if that did not work, and
// then everything is as it was.
//
// errHalf: the C daemon has to wait for the rest of a message, unless cut allows to cut it off.
func (d *daemon) replace(next *successor, s *state.Snapshot, cut bool) (err error) {
	var copies []int // of files in cells, which the C daemon knows nothing of
	defer func() {
		for _, fd := range copies {
			unix.Close(fd)
		}
	}()
	if next.reader == state.C {
		if copies, err = d.digest(s, cut); err != nil {
			return err
		}
	}
	if next.reader == state.C {
		if !d.safety.changing.TryLock() {
			return fmt.Errorf("the vault is just being given to whoever keeps it, %w", errBusy)
		}
		defer d.safety.changing.Unlock()
		defer func(had bool) { // not reached after exec
			if had && d.safety.vault == nil {
				d.returnToVault()
			}
		}(d.safety.vault != nil)
	}
	// A child that is forked from here on would keep locks alive.
	syscall.ForkLock.Lock()
	defer syscall.ForkLock.Unlock()
	fds := append(descriptors(s, next.reader), d.unknown...)
	var notPassed error
	passed := beside(len(fds), func() { notPassed = inheritable(fds, true) })
	defer func() {
		passed()
		err = errors.Join(err, inheritable(fds, false))
	}()

	data, err := state.AppendTo(next.room, s, next.reader)
	if err != nil {
		return err
	}
	if err := state.Write(d.paths.stateFile, data); err != nil {
		return err
	}
	defer func() {
		if err := state.Remove(d.paths.stateFile); err != nil {
			d.log.Warn("the state file of a live upgrade that failed was left behind", "error", err)
		}
	}()
	d.log.Info("live upgrade: everything is written, the new binary takes over",
		"binary", next.path, "locks", countLocks(s), "clients", len(s.Lock.Clients)+len(s.Admin.Clients), "bytes", len(data))
	if err := d.flushLogs(lastFlush); err != nil {
		return err
	}
	if next.reader == state.C {
		release, err := d.leaveNote() // nobody would keep it
		if err != nil {
			return err
		}
		defer release() // not reached after exec
		if err := d.leaveVault(); err != nil {
			return err
		}
	}
	if passed(); notPassed != nil {
		return notPassed
	}
	return d.execute(next)
}

func countLocks(s *state.Snapshot) int {
	n := len(s.Default)
	for i := range s.Lockspaces {
		n += len(s.Lockspaces[i].Resources)
	}
	return n
}

// digest makes of a snapshot one that the C daemon can go on with, or says why that is impossible.
func (d *daemon) digest(s *state.Snapshot, cut bool) (copies []int, err error) {
	for r := range resources(s) {
		if !r.File.Remote {
			continue
		}
		fd, err := filelock.PeekCell(int(r.FD))
		if err != nil {
			return copies, fmt.Errorf("the lock on %s cannot be handed over to the C daemon: %w", r.Path, err)
		}
		copies = append(copies, fd)
		r.FD = int32(fd)
	}
	s.PIDFile = state.NoFD // it locks the file anew, with a lock that ours would refuse
	for i := range s.Lock.Clients {
		// A name is for people to read; that of a resource, below, is not.
		o := &s.Lock.Clients[i].Owner
		o.Name = strings.ReplaceAll(strings.ToValidUTF8(o.Name, "\uFFFD"), "\x00", "\uFFFD")
	}
	obstacles, err := state.ForC(s)
	if err != nil {
		return copies, err
	}
	for _, o := range obstacles {
		switch {
		case !cut && (o.Hurdle == state.HalfRequest || o.Hurdle == state.HalfReply):
			return copies, errHalf
		case o.Hurdle.Blocks() && o.Client != 0:
			// Its connection ends; the C daemon would end with every lock.
			server := s.Lock
			if o.Server == adminServer {
				server = s.Admin
			}
			server.Clients = slices.DeleteFunc(server.Clients, func(c state.Client) bool { return c.ID == o.Client })
			d.log.Warn("live upgrade to the C daemon: a client's connection ends", "reason", o.Why)
		case o.Hurdle.Blocks():
			return copies, fmt.Errorf("the C daemon cannot take over: %s", o.Why)
		default:
			d.log.Warn("live upgrade to the C daemon: something is not kept", "reason", o.Why)
		}
	}
	return copies, nil
}

// descriptors lists those that the new binary needs.
func descriptors(s *state.Snapshot, reader state.Reader) (fds []int32) {
	add := func(fd int32) {
		if fd != state.NoFD {
			fds = append(fds, fd)
		}
	}
	add(s.PIDFile)
	for _, server := range []*state.Server{s.Lock, s.Admin} {
		for _, service := range server.Services {
			for _, socket := range service.Sockets {
				add(socket.FD)
			}
		}
		for i := range server.Clients {
			add(server.Clients[i].FD)
		}
	}
	for r := range resources(s) {
		add(r.FD)
	}
	if reader == state.Ours {
		if s.Epoll != nil {
			add(s.Epoll.FD)
		}
		add(s.Vault)
		for i := range s.Owners {
			add(s.Owners[i].PIDFD)
		}
	}
	return fds
}

// inheritable says whether descriptors outlive exec(2).
func inheritable(fds []int32, yes bool) error {
	flags := uintptr(unix.FD_CLOEXEC)
	if yes {
		flags = 0
	}
	var errs []error
	for _, fd := range fds {
		if _, _, errno := unix.RawSyscall(unix.SYS_FCNTL, uintptr(fd), unix.F_SETFD, flags); errno != 0 {
			errs = append(errs, fmt.Errorf("descriptor %d: %w", fd, os.NewSyscallError("fcntl(F_SETFD)", errno)))
		}
	}
	return errors.Join(errs...)
}

// execute runs the new binary in this process, with our arguments and environment.
func (d *daemon) execute(next *successor) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	undo, err := d.signals.prepareExec(next.reader == state.Ours)
	if err != nil {
		return err
	}
	defer undo()
	if next.reader == state.C && d.pidFile != nil {
		if err := d.pidFile.Yield(); err != nil {
			return err
		}
		defer func() {
			if err := d.pidFile.Regain(); err != nil {
				d.log.Error("the pid file is somebody else's now; locks are kept", "error", err)
			}
		}()
	}
	if d.adminProgram.Ending() || len(d.asked) > 0 {
		return errEnding
	}
	if now, err := identify(next.path); err == nil && now != next.file {
		return errReplaced
	}
	return fmt.Errorf("cannot run %s: %w", next.path, os.NewSyscallError("execve", syscall.Exec(next.path, argumentsFor(next.reader, os.Args), os.Environ())))
}

// saveLogSettings notes what was changed at run time, by the admin protocol.
func (d *daemon) saveLogSettings(s *state.Snapshot) {
	now, configured := d.logs.Settings(), d.configured.Load()
	note := func(to **string, now, configured string) {
		if now != configured {
			*to = &now
		}
	}
	note(&s.LogLevel, strconv.Itoa(int(now.Level)), strconv.Itoa(int(configured.Level)))
	note(&s.LogFilters, filters(now.Filters), filters(configured.Filters))
	note(&s.LogOutputs, logging.FormatOutputs(now.Outputs), logging.FormatOutputs(configured.Outputs))
}

// filters writes log filters so that they are the same when they are read again. What virt-admin shows would not be.
func filters(all []logging.Filter) string {
	words := make([]string, len(all))
	for i, f := range all {
		words[i] = fmt.Sprintf("%d:+%s", f.Level, f.Match)
	}
	return strings.Join(words, " ")
}

// restoreLogSettings is the other half of saveLogSettings.
func (d *daemon) restoreLogSettings(s *state.Snapshot) error {
	var errs []error
	if s.LogLevel != nil {
		level, err := strconv.Atoi(*s.LogLevel)
		if err == nil && level >= int(logging.Debug) && level <= int(logging.Error) {
			err = d.logs.SetLevel(logging.Level(level))
		}
		errs = append(errs, err)
	}
	if s.LogFilters != nil {
		errs = append(errs, d.logs.SetFilters(*s.LogFilters))
	}
	if s.LogOutputs != nil {
		errs = append(errs, d.logs.SetOutputs(*s.LogOutputs))
	}
	return errors.Join(errs...)
}
