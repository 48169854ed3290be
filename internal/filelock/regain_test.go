// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/internal/vault"
)

func TestRegain(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, f *Files) {
		path := makeFile(t, t.TempDir()+"/disk", "data")
		other := newFiles(t, Config{})
		regain := func(l *Lock, unreadable bool) *Lock {
			t.Helper()
			again, err := l.Regain(unreadable)
			if err != nil {
				t.Fatal(err)
			}
			if again != l {
				mustRelease(t, l, "")
			}
			probe := again.Probe()
			if found, err := probe.Check(true); err != nil || len(found) > 0 {
				t.Errorf("found %v, %v", found, err)
			}
			if _, err := other.Lock(path, Shared, false, nil); !errors.Is(err, ErrLocked) {
				t.Errorf("somebody else: %v", err)
			}
			return again
		}
		l := mustLock(t, f, path, Exclusive, false)
		unlockBehind(t, l)
		l = regain(l, false)
		// The kernel believes in the lock, the server does not.
		l = regain(l, true)

		// Somebody else was faster.
		unlockBehind(t, l)
		stranger := mustLock(t, other, path, Exclusive, false)
		if _, err := l.Regain(false); !errors.Is(err, ErrLocked) {
			t.Errorf("while somebody else has it: %v", err)
		}
		mustRelease(t, stranger, "")
		l = regain(l, false)

		// Another file is not the lock's, and is not locked.
		unlockBehind(t, l)
		if err := os.Rename(path, path+".old"); err != nil {
			t.Fatal(err)
		}
		if _, err := l.Regain(false); !errors.Is(err, unix.ENOENT) {
			t.Errorf("without file: %v", err)
		}
		makeFile(t, path, "")
		if _, err := l.Regain(false); !errors.Is(err, ErrReplaced) {
			t.Errorf("of another file: %v", err)
		}
		mustRelease(t, mustLock(t, other, path, Exclusive, false), "")
		mustRelease(t, l, "")
	})
}

// A lock that could only be had shared is not what it should be, as long as that is so.
func TestWeakLock(t *testing.T) {
	t.Parallel()
	f := newFiles(t, Config{})
	f.openat2 = false
	path := makeFile(t, t.TempDir()+"/disk", "data")
	l := mustLock(t, f, path, Exclusive, false)
	if err := l.again(Shared); err != nil {
		t.Fatal(err)
	}
	l.weak = true
	wantFaults(t, l, Gone)
	stranger := mustLock(t, newFiles(t, Config{}), path, Shared, false)
	wantFaults(t, l, Gone)
	if _, err := l.Regain(false); !errors.Is(err, ErrLocked) || !l.Weak() {
		t.Errorf("while somebody shares it: %v", err)
	}
	mustRelease(t, stranger, "")
	wantFaults(t, l, Gone)
	if again, err := l.Regain(false); err != nil || again != l || l.Weak() {
		t.Errorf("when nobody shares it: %v", err)
	}
	wantFaults(t, l)
	mustRelease(t, l, "")
}

// vaultCell returns an empty cell of a vault that is given up when the test ends.
func vaultCell(t *testing.T) *vault.Cell {
	t.Helper()
	v, err := vault.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.GiveUp)
	cell, err := v.Take()
	if err != nil {
		t.Fatal(err)
	}
	return cell
}

// A cell that holds are stored in is emptied when the lost lock is released.
func TestRegainStored(t *testing.T) {
	t.Parallel()
	f := newFiles(t, Config{})
	f.openat2 = false
	path := makeFile(t, t.TempDir()+"/disk", "data")
	cell := vaultCell(t)
	l := mustLock(t, f, path, Exclusive, false)
	hold := vault.Hold{Name: path}
	if err := l.Store(cell, hold.Record(nil), -1); err != nil {
		t.Fatal(err)
	}
	l.Stored(cell)
	unlockBehind(t, l)
	again, err := l.Regain(false)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Release("", cell); err != nil {
		t.Error(err)
	}
	if _, err := cell.All(); !errors.Is(err, vault.ErrEmpty) {
		t.Errorf("in the old cell: %v", err)
	}
	if _, err := newFiles(t, Config{}).Lock(path, Shared, false, nil); !errors.Is(err, ErrLocked) {
		t.Errorf("somebody else: %v", err)
	}
	mustRelease(t, again, "")
}

// A cell in which nothing lies can't be stored from: whoever is told that it was stored closes it.
func TestStoreFromEmptyCell(t *testing.T) {
	t.Parallel()
	f := newFiles(t, Config{})
	f.openat2 = false
	path := makeFile(t, t.TempDir()+"/disk", "data")
	cell := vaultCell(t)
	l := mustLock(t, f, path, Exclusive, false)
	vault.At(int(l.fd)).Empty()
	hold := vault.Hold{Name: path}
	if err := l.Store(cell, hold.Record(nil), -1); !errors.Is(err, unix.ENODATA) || !l.private {
		t.Errorf("stored from an empty cell: %v; the lock has a cell of its own: %t", err, l.private)
	}
	if cell.Drop() {
		t.Error("something was stored")
	}
	mustRelease(t, l, "")
}

// A POSIX lock is taken again through the descriptor that is there: another one could not be closed.
func TestRegainPOSIX(t *testing.T) {
	if !apart(t) {
		return
	}
	refuseOFD(t)
	f := newFiles(t, Config{})
	path := makeFile(t, t.TempDir()+"/disk", "data")
	l := mustLock(t, f, path, Exclusive, false)
	if l.Kind() != POSIX {
		t.Fatal("no POSIX lock")
	}
	opens, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(opens)
	before := len(openFiles(t))
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(fd) // the lock goes with it
	if _, err := unix.InotifyAddWatch(opens, path, unix.IN_OPEN|unix.IN_CLOSE); err != nil {
		t.Fatal(err)
	}
	probe := l.Probe()
	if found, err := probe.Check(true); err != nil || len(found) != 1 || found[0].Fault != Gone {
		t.Fatalf("found %v, %v", found, err)
	}
	if again, err := l.Regain(false); err != nil || again != l {
		t.Fatal(err)
	}
	if found, err := probe.Check(true); err != nil || len(found) > 0 || len(openFiles(t)) != before {
		t.Errorf("found %v, %v", found, err)
	}
	var events [4096]byte
	if n, err := unix.Read(opens, events[:]); err != unix.EAGAIN {
		t.Errorf("it was opened: %d bytes of events, %v", n, err)
	}
	mustRelease(t, l, "")
}
