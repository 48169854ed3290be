// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/filelock"
	"virtlockd/internal/lockspace"
	"virtlockd/internal/owner"
	"virtlockd/internal/state"
	"virtlockd/internal/vault"
)

// A descriptor that nobody knows of stays open, for us and the next binary, and no child gets it.
func TestStrays(t *testing.T) {
	t.Parallel()
	fd, err := unix.MemfdCreate("stray", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	inherited := make(inheritance, fd+1)
	inherited[fd] = true
	d := &daemon{log: slog.New(slog.DiscardHandler)}
	d.dismissStrays(inherited)
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("flags %d, %v: a child would get it", flags, err)
	}
	if !slices.Contains(d.unknown, int32(fd)) {
		t.Errorf("strays %v, want %d", d.unknown, fd)
	}
}

// What was being stored when the binary before this one was replaced lies in a cell that no snapshot names. Where the hold has no other one, as
// when it comes from the C daemon, that is its cell: without it, a crash would lose the lock until the hold is stored again.
func TestStoredOnceMore(t *testing.T) {
	t.Parallel()
	for name, before := range map[string]bool{"already stored": true, "not stored yet": false} {
		for what, word := range map[string]uint64{"": 0, ", by a worker process": vault.Filling(os.Getpid())} {
			t.Run(name+what, func(t *testing.T) {
				t.Parallel()
				files, err := filelock.New(filelock.Config{})
				if err != nil {
					t.Fatal(err)
				}
				defer files.Close()
				path := filepath.Join(t.TempDir(), "disk")
				if err := os.WriteFile(path, nil, 0o600); err != nil {
					t.Fatal(err)
				}
				v, err := vault.New()
				if err != nil {
					t.Fatal(err)
				}
				defer v.GiveUp()
				log := slog.New(slog.DiscardHandler)
				table := lockspace.New(lockspace.Config{Locker: files, Logger: log})
				registry := owner.NewRegistry(owner.Config{Logger: log})
				defer registry.Close()
				o, err := registry.Named(&owner.Details{PID: 0x70000001, Name: "guest"}, false)
				if err != nil {
					t.Fatal(err)
				}
				defer o.Release()
				if before {
					table.SetVault(v)
				}
				if _, err := table.Acquire(lockspace.Request{Resource: path, Owner: o}); err != nil {
					t.Fatal(err)
				}
				table.SetVault(v)
				entries, _ := table.List(0, 1)
				since := entries[0].Holds[0].Since
				table.Freeze(time.Now())
				def, _ := table.Snapshot(func(*owner.Owner) int32 { return 0 })
				table.Thaw()
				h := vault.Hold{Since: since, Name: path, Owner: o.State()}
				record := h.Record(nil)
				vault.SetFile(record, def[0].File)
				copied, err := v.Store(record, int(def[0].FD))
				if err != nil {
					t.Fatal(err)
				}
				copied.Word().Store(word)

				d := &daemon{log: log, table: table}
				d.safety.vault = v
				strays, err := v.Claim(cellsOf(&state.Snapshot{Default: def}))
				if err != nil || len(strays) != 1 {
					t.Fatalf("%d strays, %v", len(strays), err)
				}
				d.settleStrays(strays)
				used := func(want int) {
					t.Helper()
					if !eventually(func() bool { _, n := v.Size(); return n == want }) {
						_, n := v.Size()
						t.Errorf("%d cells are in use, want %d", n, want)
					}
				}
				used(1)
				if n := table.Stored(); n != 1 {
					t.Errorf("%d holds are stored, want 1", n)
				}
				if n := table.StoreAll(); n != 0 {
					t.Errorf("%d holds were stored again", n)
				}
				if found, err := v.Contents(); err != nil || len(found) != 1 || found[0].Hold == nil || found[0].Cell.Word().Load() != 0 {
					t.Errorf("in the vault: %+v, %v", found, err)
				}
				if err := table.Release(lockspace.Request{Resource: path}, o.PID, true); err != nil {
					t.Error(err)
				}
				used(0)
			})
		}
	}
}

// eventually waits until something is so, and tells whether it is.
func eventually(ok func() bool) bool {
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if ok() {
			return true
		}
	}
	return ok()
}
