// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// posixLocked opens a file and locks it as the C daemon does, in this process.
func posixLocked(t *testing.T, path string, kind int16) int {
	t.Helper()
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if kind != unix.F_UNLCK {
		lk := unix.Flock_t{Type: kind, Len: 1}
		if err := unix.FcntlFlock(uintptr(fd), unix.F_SETLK, &lk); err != nil {
			t.Fatal(err)
		}
	}
	return fd
}

// kernelHas returns the type of a lock in the kernel that refuses a new write lock, and whether it
// belongs to a process (POSIX) or to a description (OFD).
func kernelHas(t *testing.T, path string) (kind int16, posix bool) {
	t.Helper()
	// To open and close the file would drop the POSIX locks of this process, so it is looked up by
	// its inode.
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile("/proc/locks")
	if err != nil {
		t.Fatal(err)
	}
	kind = unix.F_UNLCK
	for line := range strings.Lines(string(data)) {
		// 1: POSIX  ADVISORY  WRITE 123 fe:00:456 0 0
		f := strings.Fields(line)
		if len(f) != 8 || !strings.HasSuffix(f[5], fmt.Sprintf(":%d", st.Ino)) || f[6] != "0" || f[7] != "0" {
			continue
		}
		if kind = unix.F_RDLCK; f[3] == "WRITE" {
			kind = unix.F_WRLCK
		}
		posix = posix || f[1] == "POSIX"
	}
	return kind, posix
}

func TestTakeoverFromC(t *testing.T) {
	files := newFiles(t, Config{})
	for _, c := range []struct {
		name  string
		has   int16
		mode  Mode
		want  Finding
		after int16
	}{
		{"exclusive", unix.F_WRLCK, Exclusive, Kept, unix.F_WRLCK},
		{"shared", unix.F_RDLCK, Shared, Kept, unix.F_RDLCK},
		{"exclusive, lost", unix.F_UNLCK, Exclusive, Regained, unix.F_WRLCK},
		{"shared, lost", unix.F_UNLCK, Shared, Regained, unix.F_RDLCK},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk")
			fd := posixLocked(t, path, c.has)
			l, found, err := files.Takeover(0).C(path, fd, c.mode)
			if err != nil || found != c.want {
				t.Fatalf("found %v, error %v; want %v", found, err, c.want)
			}
			if kind, posix := kernelHas(t, path); kind != c.after || posix {
				t.Errorf("the kernel has type %d, posix %v", kind, posix)
			}
			if err := l.Release("", nil); err != nil {
				t.Error(err)
			}
			if kind, _ := kernelHas(t, path); kind != unix.F_UNLCK {
				t.Errorf("the kernel has type %d after the release", kind)
			}
		})
	}
}

// A lock that came from our own binary, went through the C daemon and comes back was never lost.
func TestTakeoverOfOFDLock(t *testing.T) {
	files := newFiles(t, Config{})
	for _, mode := range []Mode{Shared, Exclusive} {
		path := filepath.Join(t.TempDir(), "disk")
		l, err := files.Lock(path, mode, true, nil)
		if err != nil {
			t.Fatal(err)
		}
		fd, _ := l.State()
		l, found, err := files.Takeover(0).C(path, fd, mode)
		if err != nil || found != Kept {
			t.Errorf("mode %d: found %v, error %v", mode, found, err)
		}
		if err := l.Release("", nil); err != nil {
			t.Error(err)
		}
	}
}

// The C daemon lets two names own one file; the kernel has one lock for both, until both are released.
func TestTakeoverOfTwoOwners(t *testing.T) {
	files := newFiles(t, Config{})
	for _, c := range []struct {
		name          string
		first, second Mode
		after         int16
	}{
		{"both exclusive", Exclusive, Exclusive, unix.F_WRLCK},
		{"shared, then exclusive", Shared, Exclusive, unix.F_WRLCK},
		{"both shared", Shared, Shared, unix.F_RDLCK},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			disk, hard := filepath.Join(dir, "disk"), filepath.Join(dir, "hard")
			a := posixLocked(t, disk, lockType(c.first))
			if err := os.Link(disk, hard); err != nil {
				t.Fatal(err)
			}
			b := posixLocked(t, hard, lockType(c.second))
			take := files.Takeover(0)
			la, _, err := take.C(disk, a, c.first)
			if err != nil {
				t.Fatal(err)
			}
			lb, _, err := take.C(hard, b, c.second)
			if err != nil {
				t.Fatal(err)
			}
			// And once more, as the next upgrade finds them.
			take = files.Takeover(0)
			fdA, stateA := la.State()
			fdB, stateB := lb.State()
			if la, err = take.Ours(disk, fdA, la.mode, stateA); err != nil {
				t.Fatal(err)
			}
			if lb, err = take.Ours(hard, fdB, lb.mode, stateB); err != nil {
				t.Fatal(err)
			}
			for _, l := range []*Lock{la, lb} {
				if err := take.Rejoin(l); err != nil {
					t.Fatal(err)
				}
				if found := l.Confirm(); found != Kept {
					t.Errorf("%s: found %v", l.path, found)
				}
			}
			if kind, _ := kernelHas(t, disk); kind != c.after {
				t.Errorf("the kernel has type %d, want %d", kind, c.after)
			}
			la.Release("", nil)
			if kind, _ := kernelHas(t, disk); kind == unix.F_UNLCK {
				t.Error("the lock went with the first name's release")
			}
			lb.Release("", nil)
			if kind, _ := kernelHas(t, disk); kind != unix.F_UNLCK {
				t.Error("the lock outlived the last name's release")
			}
		})
	}
}

// What is not what the state says is never adopted.
func TestTakeoverRefuses(t *testing.T) {
	files := newFiles(t, Config{})
	dir := t.TempDir()
	l, err := files.Lock(filepath.Join(dir, "a"), Exclusive, true, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Release("", nil)
	fd, st := l.State()
	other, err := unix.Open(filepath.Join(dir, "b"), unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(other)
	take := files.Takeover(0)
	if _, err := take.Ours("a", other, Exclusive, st); err == nil {
		t.Error("another file was taken for the locked one")
	}
	if _, err := take.Ours("a", 19000, Exclusive, st); err == nil {
		t.Error("a descriptor that is not open was adopted")
	}
	st.Remote = true
	if _, err := take.Ours("a", fd, Exclusive, st); err == nil {
		t.Error("a file was taken for a cell")
	}
}

// A lock that was lost before a hand-over is found so, and taken as far as it is free.
func TestConfirm(t *testing.T) {
	files := newFiles(t, Config{})
	for _, c := range []struct {
		name  string
		other int16 // what somebody else has
		want  Finding
	}{
		{"nobody", unix.F_UNLCK, Kept},
		{"shared", unix.F_RDLCK, Weakened},
		{"exclusive", unix.F_WRLCK, Lost},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk")
			l, err := files.Lock(path, Exclusive, true, nil)
			if err != nil {
				t.Fatal(err)
			}
			fd, st := l.State()
			var fl unix.Flock_t
			setLock(&fl, fd, unix.F_OFD_SETLK, unix.F_UNLCK)
			other, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(other)
			setLock(&fl, other, unix.F_OFD_SETLK, c.other)
			if l, err = files.Takeover(0).Ours(path, fd, Exclusive, st); err != nil {
				t.Fatal(err)
			}
			defer l.Release("", nil)
			if found := l.Confirm(); found != c.want || l.Mode() == Exclusive != (c.want == Kept) {
				t.Errorf("found %v, mode %v; want %v", found, l.Mode(), c.want)
			}
			setLock(&fl, other, unix.F_OFD_SETLK, unix.F_UNLCK)
			if !l.Strengthen() {
				t.Error("not exclusive, though it is free now")
			}
		})
	}
}
