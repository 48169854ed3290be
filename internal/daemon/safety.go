// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
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
	// keptPID stands for the process id in the settings that are stored: they are read by another process.
	keptPID = 1
)

// safety keeps everything that matters alive beyond this process: the vault, and who keeps that.
type safety struct {
	mu    sync.Mutex // once clients are served
	store systemd.Notifier
	vault *vault.Vault // nil: there is none
	why   error        // why there is none, or nobody keeps it
	link  *keeper.Link // to our keeper; nil: there is none
	cell  *vault.Cell  // with the daemon's own settings
}

// errNoStore says that nobody would keep the vault.
var errNoStore = errors.New("nobody keeps locks beyond this process: it is run neither by systemd with FileDescriptorStoreMax= in the unit, nor by a keeper (--keeper)")

// makeSafe sees to it that the vault outlives this process, and makes one if there is none yet. Nobody is served before, so that
// no answer is given that a crash could take back.
func (d *daemon) makeSafe() {
	v, err := d.openVault()
	d.safety.mu.Lock()
	d.safety.why = err
	if err == nil {
		d.safety.vault = v
	}
	d.safety.mu.Unlock()
	if err != nil {
		level := slog.LevelWarn
		if errors.Is(err, errNoStore) {
			level = slog.LevelInfo // nobody has asked for more
		}
		d.log.Log(context.Background(), level, "locks are lost if this daemon crashes or is restarted", "reason", err)
		return
	}
	d.table.SetVault(v)
	for _, s := range d.servers() {
		s.SetVault(v)
	}
}

// openVault returns the vault, an own new one if there was none, after its root was given to the store.
func (d *daemon) openVault() (_ *vault.Vault, err error) {
	if d.safety.link == nil && d.options.wantsKeeper() {
		if err := d.startKeeper(); err != nil {
			return nil, err
		}
	}
	if d.safety.store == (systemd.Notifier{}) {
		return nil, errNoStore
	}
	if err := d.safety.store.ProbeStore(probeName, storeTime); err != nil {
		return nil, err
	}
	v := d.safety.vault
	if v == nil {
		if v, err = vault.New(); err != nil {
			return nil, err
		}
		defer func() {
			if err != nil {
				v.GiveUp()
			}
		}()
	}
	if err := entrust(d.safety.store, v); err != nil {
		return nil, err
	}
	return v, nil
}

// entrust gives the root of the vault to a store, which ignores what it has already.
func entrust(store systemd.Notifier, v *vault.Vault) error {
	if err := store.Store(vaultName, v.Root()); err != nil {
		return err
	}
	return store.Barrier(storeTime)
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
	data, err := state.Encode(s, state.Ours)
	if err == nil {
		d.safety.cell, err = v.StoreDaemon(d.safety.cell, &vault.Daemon{State: data, FDs: fds})
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

// leaveVault gives the vault up, because the binary that comes next knows nothing of it: the C daemon releases a lock by
// closing its descriptor, which a copy in the vault would keep for ever. Everything is frozen.
func (d *daemon) leaveVault() error {
	v := d.safety.vault
	if v == nil {
		return nil
	}
	if err := d.table.LeaveVault(); err != nil {
		return fmt.Errorf("locks cannot be taken out of the vault: %w", err)
	}
	for _, s := range d.servers() {
		s.LeaveVault()
	}
	// Else it would be passed to the C daemon at its next start, which does not know it and ends.
	err := d.safety.store.Remove(vaultName)
	if err == nil {
		err = d.safety.store.Barrier(storeTime)
	}
	d.safety.mu.Lock()
	d.safety.vault, d.safety.cell = nil, nil
	d.safety.mu.Unlock()
	v.GiveUp()
	if err != nil {
		return fmt.Errorf("the descriptor store still has the vault: %w", err)
	}
	return nil
}

// returnToVault makes a new one, when the binary that was to come next has not come.
func (d *daemon) returnToVault() {
	d.makeSafe()
	d.storeEverything()
	d.storeSettings()
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
	v, store := d.safety.vault, d.safety.store
	d.safety.mu.Unlock()
	if v == nil {
		return
	}
	if err := store.Remove(vaultName); err != nil {
		d.log.Warn("the vault stays in the descriptor store", "error", err)
	}
}

// askEndTime bounds how long systemd may take to say why we are to end.
const askEndTime = 3 * time.Second

// leave prepares the end of a process that the next one takes over from, and tells whether it is that: the service is started again, or
// descriptors outlive its stop. Only a job to stop the unit ends locks; in doubt they stay.
func (d *daemon) leave() bool {
	if d.safety.flaw() != nil || d.safety.keeper() != nil {
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

// vaultRoot takes the root of the vault out of the descriptors that were passed, -1 if it is not among them.
func vaultRoot(passed []systemd.Descriptor) (root int, others []systemd.Descriptor) {
	root = -1
	others = slices.DeleteFunc(passed, func(p systemd.Descriptor) bool {
		switch p.Name {
		case vaultName:
			root = p.FD
		case probeName: // of a process that was killed before it could take it back
			unix.Close(p.FD)
		default:
			return false
		}
		return true
	})
	return root, others
}
