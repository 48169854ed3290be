// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/keeper"
	"virtlockd/internal/state"
	"virtlockd/internal/systemd"
	"virtlockd/internal/vault"
)

const (
	// vaultName is what the root of the vault is called in the descriptor store.
	vaultName = "virtlockd-vault"
	// probeName is that of the descriptor that shows whether the store is one.
	probeName = "virtlockd-probe"
	// storeTime bounds the wait for the store. systemd is slow while it boots a host.
	storeTime = 5 * time.Second
	// leaveTime is the same with everybody frozen, after it has answered.
	leaveTime = time.Second
	// keptPID stands for the process id in the settings that are stored: they are read by another process.
	keptPID = 1
)

const (
	// A store that has not answered is asked again after this time, each time after twice as long.
	askFirst = time.Second
	askMost  = time.Minute
)

// safety keeps everything that matters alive beyond this process: the vault, and who keeps that.
//
// Which vault there is changes at the start and while everything is frozen; who keeps it at the start and in guard.
type safety struct {
	// changing is held while the vault is given to somebody, which can take long, or given up: whoever must not wait tries.
	changing sync.Mutex
	again    chan struct{} // guard is to look at once
	wanted   bool          // that a keeper of ours keeps it; does not change after the start
	// What is kept beside the locks that we know, and would be given up by a daemon that knows nothing of it. Neither changes after the start.
	another bool // there is another vault, which is not used
	orphans int  // holds in ours that could not be taken over

	mu     sync.Mutex // of what follows; never held over a system call that can block
	store  systemd.Notifier
	proved bool         // the store is known to be one
	stale  bool         // it may have another vault by the name of ours
	link   *keeper.Link // to our keeper; nil: there is none
	vault  *vault.Vault // nil: there is none
	why    error        // why nobody keeps it, as far as is known; nil: somebody does
	cell   *vault.Cell  // with the daemon's own settings
}

var (
	// errNoStore says that nobody would keep the vault.
	errNoStore = errors.New("nobody keeps locks beyond this process: it is run neither by systemd with FileDescriptorStoreMax= in the unit, nor by a keeper (--keeper)")
	// errNotYet says that somebody will, most likely.
	errNotYet = errors.New("whoever is to keep locks beyond this process has not been asked yet")
)

// makeSafe makes a vault and has it kept. Nobody is served before, so that no answer is given that a crash could take back. A store
// that refuses does so for good, and then there is no vault. One that does not answer in time is asked again while everybody
// is served, see guard; what is stored until then is in the vault already.
func (d *daemon) makeSafe() {
	var v *vault.Vault
	err := errNoStore
	if d.safety.store != (systemd.Notifier{}) || d.safety.wanted {
		if v, err = d.newVault(); err == nil {
			err = d.keep(v)
		}
		if errors.Is(err, systemd.ErrNoStore) {
			v.GiveUp()
			v = nil
		}
	}
	d.use(v, err)
	if err != nil {
		level := slog.LevelWarn
		if errors.Is(err, errNoStore) {
			level = slog.LevelInfo // nobody has asked for more
		}
		d.log.Log(context.Background(), level, "locks are lost if this daemon crashes or is restarted", "reason", err)
	}
}

// newVault makes one that nobody keeps yet.
func (d *daemon) newVault() (*vault.Vault, error) {
	d.safety.mu.Lock()
	d.safety.stale = true
	d.safety.mu.Unlock()
	return vault.New()
}

// use has everything stored in this vault from now on; why says why nobody keeps it.
func (d *daemon) use(v *vault.Vault, why error) {
	d.safety.mu.Lock()
	d.safety.vault, d.safety.why = v, why
	d.safety.mu.Unlock()
	if v == nil {
		return
	}
	d.table.SetVault(v)
	for _, s := range d.servers() {
		s.SetVault(v)
	}
}

// keep gives the vault to whoever is to keep it, and returns why that did not work, or is not known to have. The vault is not
// given up meanwhile.
func (d *daemon) keep(v *vault.Vault) error {
	s := &d.safety
	if s.keeper() == nil && d.safety.wanted {
		if err := d.startKeeper(); err != nil {
			return err
		}
	}
	s.mu.Lock()
	store, stale, proved := s.store, s.stale, s.proved
	s.mu.Unlock()
	if stale && !s.another { // which has the same name
		// Of two by one name the next process would not know which one counts.
		err := store.Remove(vaultName)
		if s.keeper() == nil && (errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOENT)) {
			return fmt.Errorf("%w: nobody listens there: %w", systemd.ErrNoStore, err)
		}
		if err != nil {
			return err
		}
	}
	var silent error
	if !proved {
		if silent = store.ProbeStore(probeName, storeTime); errors.Is(silent, systemd.ErrNoStore) {
			return silent
		}
	}
	s.mu.Lock()
	s.stale, s.proved = false, silent == nil
	s.mu.Unlock()
	// Also to one that has not answered: it works this off when it does. What it has already it ignores.
	if err := store.Store(vaultName, v.Root()); silent != nil || err != nil {
		return cmp.Or(silent, err)
	}
	return store.Barrier(storeTime)
}

// guard sees to it that somebody keeps the vault, until ctx ends: it asks again whoever has not answered, and starts another keeper when
// ours has ended.
func (d *daemon) guard(ctx context.Context) {
	pause := askFirst
	for ctx.Err() == nil {
		var later <-chan time.Time
		if err := d.keepAgain(); err != nil {
			later = time.After(pause)
			pause = min(2*pause, askMost)
		} else {
			pause = askFirst
		}
		link := d.safety.keeper()
		ended, unwatch := d.watchKeeper(link)
		lost := false
		select {
		case <-ctx.Done():
		case <-later:
		case <-d.safety.again:
		case <-ended:
			lost = true
		}
		unwatch() // first: the number of a pidfd that is closed may be another descriptor's
		if lost {
			d.loseKeeper(link)
		}
	}
}

// keepAgain has the vault kept if nobody does. It returns why it is to be tried again.
func (d *daemon) keepAgain() error {
	s := &d.safety
	s.changing.Lock()
	defer s.changing.Unlock()
	s.mu.Lock()
	v, was := s.vault, s.why
	s.mu.Unlock()
	if v == nil || was == nil || errors.Is(was, systemd.ErrNoStore) {
		return nil
	}
	err := d.keep(v)
	s.mu.Lock()
	s.why = err
	s.mu.Unlock()
	switch link := s.keeper(); {
	case err != nil:
		d.log.Error("locks are lost if this daemon crashes", "error", err)
	case link != nil:
		d.log.Info("a keeper has everything now", "keeper", link.PID)
	default:
		d.log.Info("the descriptor store has the vault now: locks outlive a crash of this daemon")
	}
	if errors.Is(err, systemd.ErrNoStore) {
		return nil // for good
	}
	return err
}

// unkept notes that nobody may keep the vault, and has guard see to it.
func (s *safety) unkept(why error) {
	s.mu.Lock()
	s.why = why
	s.mu.Unlock()
	select {
	case s.again <- struct{}{}:
	default: // it will look anyway
	}
}

// storeEverything stores what was taken over from a daemon without vault. Connections are stored at once; the servers are
// frozen. Locks follow while everybody is served.
func (d *daemon) storeEverything() {
	if d.safety.vault == nil {
		return
	}
	for _, s := range d.servers() {
		s.KeepAll()
	}
	go func() {
		if n := d.table.StoreAll(); n > 0 {
			d.log.Info("locks from before are stored, so that a crash loses none", "holds", n)
		}
	}()
}

// storeSettings stores the daemon's own settings, at the start and whenever they have changed.
func (d *daemon) storeSettings() {
	d.safety.mu.Lock()
	defer d.safety.mu.Unlock()
	v := d.safety.vault
	if v == nil {
		return
	}
	s, fds := d.ownState()
	store := func() error {
		data, err := state.Encode(s, state.Ours)
		if err == nil {
			d.safety.cell, err = v.StoreDaemon(d.safety.cell, &vault.Daemon{State: data, FDs: fds})
		}
		return err
	}
	err := store()
	if errors.Is(err, unix.EMSGSIZE) && (s.LogFilters != nil || s.LogOutputs != nil) {
		// They alone can be of any length.
		d.log.Error("log filters and outputs set at run time are too long to outlive a crash of this daemon; set shorter ones, or put them into the configuration", "error", err)
		s.LogFilters, s.LogOutputs = nil, nil
		err = store()
	}
	if err != nil {
		d.log.Error("settings made at run time are not safe from a crash of this daemon", "error", err)
	}
}

// firstPlace is the descriptor in stored settings that stands for the first one that lies beside them.
const firstPlace = 3

// ownState returns the daemon's own settings as a snapshot, whose descriptors are places among fds.
func (d *daemon) ownState() (s *state.Snapshot, fds []int) {
	place := func(fd int) int32 {
		fds = append(fds, fd)
		return int32(firstPlace + len(fds) - 1)
	}
	s = d.settings()
	s.PID = keptPID
	if d.pidFile != nil {
		s.PIDFile = place(d.pidFile.FD())
	}
	for _, server := range []*state.Server{s.Lock, s.Admin} {
		server.Services = nil // systemd passes its own again
	}
	for _, own := range []struct {
		*state.Server
		*socket
	}{{s.Lock, d.sockets.lock}, {s.Admin, d.sockets.admin}} {
		if own.socket != nil && own.socket.bound {
			own.Services = []state.Service{{MaxRequests: 1, Sockets: []state.Socket{{FD: place(own.socket.fd), Unlink: true}}}}
		}
	}
	return s, fds
}

// mayLeaveVault tells why the vault can't be given up: something in it is a lock, as far as can be told, that nobody else would go on with;
// or whoever keeps it does not answer, and everybody would wait for that.
func (d *daemon) mayLeaveVault() error {
	s := &d.safety
	s.mu.Lock()
	v, store := s.vault, s.store
	s.mu.Unlock()
	switch {
	case s.another:
		return errors.New("there is another vault, and the locks in it would be given up; see the log of the recovery")
	case s.orphans > 0:
		return fmt.Errorf("%d locks in the vault could not be taken over, and would be given up; see the log of the recovery or the upgrade before, or stop the service", s.orphans)
	case v == nil:
		return nil
	case v.Unknown() > 0:
		return fmt.Errorf("%d records in the vault are not understood, and the locks that they stand for would be given up; go on with the version that has written them, or stop the service", v.Unknown())
	}
	if err := store.Barrier(storeTime); err != nil {
		return fmt.Errorf("the descriptor store that has the vault does not answer; try again when it does: %w", err)
	}
	return nil
}

// leaveVault gives the vault up, because the binary that comes next knows nothing of it: the C daemon releases a lock by
// closing its descriptor, which a copy in the vault would keep for ever. Everything is frozen, and changing is held.
//
// First the store lets go of it, else that would be passed to the C daemon at its next start, which does not know it and ends. After an
// error before that the vault is in use as ever.
func (d *daemon) leaveVault() error {
	s := &d.safety
	s.mu.Lock()
	v, store, why := s.vault, s.store, s.why
	s.mu.Unlock()
	if v == nil {
		return nil
	}
	if why != nil && store != (systemd.Notifier{}) && !errors.Is(why, systemd.ErrNoStore) {
		return fmt.Errorf("the descriptor store may have the vault, and can't be asked for it: %w", why)
	}
	err := store.Remove(vaultName)
	if err == nil {
		err = store.Barrier(leaveTime)
	}
	if err != nil {
		s.unkept(err) // what was sent may be worked off yet
		return fmt.Errorf("the descriptor store may still have the vault: %w", err)
	}
	if err := d.table.LeaveVault(); err != nil {
		s.unkept(errNotYet)
		return fmt.Errorf("locks cannot be taken out of the vault: %w", err)
	}
	for _, server := range d.servers() {
		server.LeaveVault()
	}
	s.mu.Lock()
	s.vault, s.cell = nil, nil
	s.mu.Unlock()
	v.GiveUp()
	return nil
}

// returnToVault makes a new one, when the binary that was to come next has not come. Everything is frozen, so it is guard that has
// it kept.
func (d *daemon) returnToVault() {
	v, err := d.newVault()
	if err != nil {
		d.log.Error("locks are lost if this daemon crashes", "error", err)
		d.use(nil, err)
		return
	}
	d.use(v, errNotYet)
	d.storeEverything()
	d.storeSettings()
	d.safety.unkept(errNotYet)
}

// safe tells whether locks outlive a crash, why not, and how many do.
func (d *daemon) safe() (on bool, why string, locks int) {
	if err := d.safety.flaw(); err != nil {
		return false, err.Error(), 0
	}
	return true, "", d.table.Safe()
}

// flaw tells why locks do not outlive this process; nil: they do.
func (s *safety) flaw() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.why == nil && s.vault == nil {
		return errNoStore
	}
	return s.why
}

// keeper returns the link to our keeper, nil if there is none.
func (s *safety) keeper() *keeper.Link {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.link
}

// forsake makes whoever keeps the vault let go of it, because the daemon ends for good.
func (d *daemon) forsake() {
	d.safety.mu.Lock()
	store := d.safety.store
	d.safety.mu.Unlock()
	if err := store.Remove(vaultName); err != nil {
		d.log.Warn("the vault stays in the descriptor store", "error", err)
	}
}

// askEndTime bounds how long systemd may take to say why we are to end.
const askEndTime = 3 * time.Second

// leave prepares the end of a process that the next one takes over from, and tells whether it is that: the service is started again, or
// descriptors outlive its stop. Only a job to stop the unit ends locks; in doubt they stay.
func (d *daemon) leave() bool {
	if !d.safety.outlivesStop() {
		return false
	}
	why := "an administrator wants them preserved"
	if !d.preserve.Load() {
		unit := systemd.Unit()
		end, err := systemd.AskEnd(unit, !d.paths.system, askEndTime)
		switch {
		case err != nil:
			why = "systemd does not say whether the service is to stop: " + err.Error()
		case end.Job == "stop" && !end.Preserved:
			return false
		case end.Job == "stop":
			why = "the unit preserves them (FileDescriptorStorePreserve=yes)"
		case end.Job == "":
			why = "the service is not to stop, so it is started again"
		default:
			why = "the service is to " + end.Job
		}
	}
	d.log.Info("locks, leases and connections are left to the next process, in systemd's descriptor store", "holds", d.table.Stored(), "reason", why)
	d.tellSystemd("STOPPING=1")
	// The next process takes limits from us, also those of a configuration that it is started anew for.
	if settings, _, err := d.loadConfig(); err == nil {
		d.followConfig(settings)
	}
	deadline := time.Now().Add(patience)
	for _, s := range d.servers() {
		s.Freeze(deadline) // what is being answered is answered
		s.KeepAll()        // those that have not asked for anything yet
	}
	d.leaves = true
	return true
}

// outlivesCrash tells whether a process that starts when this one has ended may get the vault. Where that is not known locks stay.
func (s *safety) outlivesCrash() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.vault != nil && !errors.Is(s.why, systemd.ErrNoStore)
}

// outlivesStop tells whether the vault is where the next process gets it from, also after an orderly end of this one. A store that has
// not answered counts: it has been told.
func (s *safety) outlivesStop() bool {
	if !s.outlivesCrash() {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.link == nil && s.store != (systemd.Notifier{})
}

// vaultPassed tells whether the process was started with what one before it has left.
func vaultPassed() bool {
	return systemd.Passed(os.Getpid()) && slices.Contains(strings.Split(os.Getenv("LISTEN_FDNAMES"), ":"), vaultName)
}

// storeNotifier returns where descriptors can be stored. A service that the C daemon began, which systemd had started without
// NOTIFY_SOCKET, finds systemd's own address, if it is in a service's control group.
func storeNotifier(n systemd.Notifier, p paths) systemd.Notifier {
	if n != (systemd.Notifier{}) {
		return n
	}
	dir := "/run"
	if !p.system {
		dir = os.Getenv("XDG_RUNTIME_DIR")
	}
	address := dir + "/systemd/notify"
	if _, err := os.Stat(address); err != nil || systemd.Unit() == "" {
		return n
	}
	return systemd.NotifierAt(address)
}

// vaultRoots takes the roots of vaults out of the descriptors that were passed; there is at most one, unless something went wrong.
func vaultRoots(passed []systemd.Descriptor) (roots []int, others []systemd.Descriptor) {
	others = slices.DeleteFunc(passed, func(p systemd.Descriptor) bool {
		switch p.Name {
		case vaultName:
			roots = append(roots, p.FD)
		case probeName: // of a process that was killed before it could take it back
			unix.Close(p.FD)
		default:
			return false
		}
		return true
	})
	return roots, others
}
