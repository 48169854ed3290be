// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// wantFaults checks a lock.
func wantFaults(t *testing.T, l *Lock, want ...Fault) {
	t.Helper()
	p := l.Probe()
	found, err := p.Check(l.Mode() == Exclusive)
	if err != nil {
		t.Errorf("check: %v", err)
	}
	var got []Fault
	for _, f := range found {
		got = append(got, f.Fault)
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("found %v (%v), want %v", got, found, want)
	}
}

// unlockBehind drops a lock as nobody should.
func unlockBehind(t *testing.T, l *Lock) {
	t.Helper()
	fd := int(l.fd)
	if l.mount != "" {
		var errno error
		if fd, errno = lyingIn(fd); errno != nil {
			t.Fatal(errno)
		}
		defer unix.Close(fd)
	}
	var s scratch
	if errno := s.setLock(fd, unix.F_OFD_SETLK, unix.F_UNLCK); errno != 0 {
		t.Fatal(errno)
	}
}

func TestCheck(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, f *Files) {
		dir := t.TempDir()
		path := makeFile(t, filepath.Join(dir, "disk"), "content")
		l := mustLock(t, f, path, Exclusive, false)
		wantFaults(t, l)

		if err := os.Rename(path, path+".old"); err != nil {
			t.Fatal(err)
		}
		wantFaults(t, l, Deleted)
		makeFile(t, path, "another")
		wantFaults(t, l, Replaced)
		if err := os.Rename(path+".old", path); err != nil {
			t.Fatal(err)
		}
		wantFaults(t, l)
		// A link to it is it.
		if err := os.Rename(path, path+".real"); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("disk.real", path); err != nil {
			t.Fatal(err)
		}
		wantFaults(t, l)

		unlockBehind(t, l)
		wantFaults(t, l, Gone)
		// Another's lock on the file is not ours.
		for _, mode := range []Mode{Shared, Exclusive} {
			other := mustLock(t, f, path, mode, false)
			wantFaults(t, l, Gone)
			wantFaults(t, other)
			mustRelease(t, other, "")
		}
		mustRelease(t, l, "")

		// What is only shared is not enough where it should be exclusive.
		shared := mustLock(t, f, path, Shared, false)
		wantFaults(t, shared)
		p := shared.Probe()
		if found, err := p.Check(true); err != nil || len(found) != 1 || found[0].Fault != Gone {
			t.Errorf("a shared lock that should be exclusive: %v, %v", found, err)
		}
		mustRelease(t, shared, "")
	})
}

// A check of a lock that is only known to this process must not drop it.
func TestCheckPOSIX(t *testing.T) {
	if !apart(t) {
		return
	}
	path := makeFile(t, filepath.Join(t.TempDir(), "disk"), "content")
	f := newFiles(t, Config{})
	l := &Lock{files: f, path: path, fd: -1, mode: Exclusive, kind: POSIX}
	o := f.begin("lock", path)
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	info, _ := o.fstat(fd)
	l.id, l.fd = info.id, int32(fd)
	if errno := f.posix.lock(&o.scratch, l.id, fd, Exclusive); errno != 0 {
		t.Fatal(errno)
	}
	f.end(o)
	wantFaults(t, l)
	outsider := startRole(t, "locker")
	outsider.want(refusedText, "posix", "write", path)
	wantFaults(t, l)
	outsider.want(refusedText, "posix", "write", path)
	var s scratch
	s.setLock(fd, unix.F_SETLK, unix.F_UNLCK)
	wantFaults(t, l, Gone)
	mustRelease(t, l, "")
}

// A worker that dies, or can't be started, says nothing about the lock.
func TestCheckWithoutWorker(t *testing.T) {
	t.Parallel()
	f := newFiles(t, Config{})
	f.openat2 = false
	path := makeFile(t, filepath.Join(t.TempDir(), "disk"), "content")
	l := mustLock(t, f, path, Exclusive, false)
	p := l.Probe()
	mustRelease(t, l, "")
	f.Close()
	var failed *Error
	if found, err := p.Check(true); len(found) != 0 || !errors.As(err, &failed) || failed.Op != OpCheck || !errors.Is(err, ErrClosed) {
		t.Errorf("%v, %v", found, err)
	}
}
