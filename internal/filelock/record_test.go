// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/internal/lease"
)

func newRecord(domain string) []byte {
	r := lease.Record{Host: "here", Domain: domain, UUID: "11111111-1111-1111-1111-111111111111", PID: 1}
	return r.Bytes()
}

func lockLease(t *testing.T, f *Files, path string, mode Mode, record []byte) *Lock {
	t.Helper()
	l, err := f.Lock(path, mode, true, record)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func wantContent(t *testing.T, path, want string) {
	t.Helper()
	if got, err := os.ReadFile(path); err != nil || string(got) != want {
		t.Errorf("%s has %.80q, %v; want %.80q", filepath.Base(path), got, err, want)
	}
}

// A lease says who holds it for as long as he does, and whoever is refused can read it.
func TestRecord(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, f *Files) {
		path := t.TempDir() + "/lease"
		l := lockLease(t, f, path, Exclusive, newRecord("first"))
		wantContent(t, path, string(newRecord("first")))
		for _, create := range []bool{true, false} {
			_, err := f.Lock(path, Shared, create, nil)
			var locked *LockedError
			if !errors.As(err, &locked) || !errors.Is(err, ErrLocked) || string(locked.Record) != string(newRecord("first")) || locked.File != l.ID() {
				t.Errorf("refused with %v: %+v", err, locked)
			}
		}
		mustRelease(t, l, path)
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the lease is left: %v", err)
		}
		// Emptied, too, where it is not removed because it has got another name.
		l = lockLease(t, f, path, Exclusive, newRecord("first"))
		if err := os.Rename(path, path+".moved"); err != nil {
			t.Fatal(err)
		}
		mustRelease(t, l, path)
		wantContent(t, path+".moved", "")
		// One that a dead host has left is overwritten, and one that nobody overwrites is removed.
		long := newRecord(strings.Repeat("x", 200))
		makeFile(t, path, string(long))
		l = lockLease(t, f, path, Exclusive, newRecord("next"))
		wantContent(t, path, string(newRecord("next")))
		mustRelease(t, l, path)
		makeFile(t, path, string(long))
		l = lockLease(t, f, path, Shared, nil)
		wantContent(t, path, "")
		mustRelease(t, l, path)
		makeFile(t, path, string(long))
		l = lockLease(t, f, path, Exclusive, nil)
		wantContent(t, path, "")
		mustRelease(t, l, path)
		// What is not to be made and removed is left alone.
		makeFile(t, path, string(long))
		l = mustLock(t, f, path, Exclusive, false)
		mustRelease(t, l, "")
		wantContent(t, path, string(long))
	})
}

// Nothing is ever written to what is not ours, nor is it removed.
func TestForeignContent(t *testing.T) {
	t.Parallel()
	record := string(newRecord("a"))
	both(t, func(t *testing.T, f *Files) {
		path := t.TempDir() + "/lease"
		for _, content := range []string{"x", "a disk image", record + "\n", record[:len(record)-1], "\n" + record, strings.Repeat("\x00", lease.Max), strings.Repeat("x", 1<<20)} {
			for _, mode := range []Mode{Exclusive, Shared} {
				makeFile(t, path, content)
				before, err := os.Stat(path)
				if err != nil {
					t.Fatal(err)
				}
				l := lockLease(t, f, path, mode, newRecord("first"))
				_, err = f.Lock(path, Exclusive, true, nil)
				var locked *LockedError
				if !errors.As(err, &locked) || locked.Record != nil {
					t.Errorf("refused with %v: %+v", err, locked)
				}
				mustRelease(t, l, path)
				wantContent(t, path, content)
				if after, err := os.Stat(path); err != nil || !after.ModTime().Equal(before.ModTime()) {
					t.Errorf("%.20q was written: %v", content, err)
				}
			}
			// It becomes foreign while it is locked.
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			l := lockLease(t, f, path, Exclusive, newRecord("first"))
			makeFile(t, path, content)
			mustRelease(t, l, path)
			wantContent(t, path, content)
		}
	})
}

// Nothing is written through a symbolic link, which may lead anywhere.
func TestRecordBehindLink(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, f *Files) {
		dir := t.TempDir()
		victim, path := makeFile(t, dir+"/victim", ""), mkdir(t, dir+"/leases")+"/lease"
		for _, target := range []string{"../victim", victim, "middle"} {
			if err := errors.Join(os.RemoveAll(path), os.RemoveAll(dir+"/leases/middle"), os.Symlink(target, path), os.Symlink(victim, dir+"/leases/middle")); err != nil {
				t.Fatal(err)
			}
			l := lockLease(t, f, path, Exclusive, newRecord("first"))
			wantContent(t, victim, "")
			mustRelease(t, l, path)
			if _, err := os.Lstat(path); err != nil {
				t.Errorf("the link: %v", err)
			}
		}
		// A link above the last place is the way to a lockspace.
		if err := os.Symlink("leases", dir+"/link"); err != nil {
			t.Fatal(err)
		}
		l := lockLease(t, f, dir+"/link/other", Exclusive, newRecord("first"))
		wantContent(t, dir+"/leases/other", string(newRecord("first")))
		mustRelease(t, l, dir+"/link/other")
	})
}

// A full disk costs the record, not the lock, and is told once.
func TestRecordOnFullDisk(t *testing.T) {
	if !apart(t) {
		return
	}
	dir := t.TempDir()
	mount(t, "tmpfs", dir, "tmpfs", 0, "size=64k")
	for _, name := range []string{"a", "b"} { // made before it is full
		makeFile(t, dir+"/"+name, "")
	}
	fill, err := os.Create(dir + "/fill")
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = fill.Write(make([]byte, 4096))
	}
	fill.Close()
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	for _, direct := range []bool{true, false} {
		var log bytes.Buffer
		f := newFiles(t, Config{Logger: slog.New(slog.NewTextHandler(&log, nil))})
		f.openat2 = direct
		for _, name := range []string{"/a", "/b"} {
			l := lockLease(t, f, dir+name, Exclusive, newRecord("first"))
			wantContent(t, dir+name, "")
			mustRelease(t, l, "")
		}
		if n := strings.Count(log.String(), "can't say by whom"); n != 1 || !strings.Contains(log.String(), "no space left") {
			t.Errorf("direct %v: %s", direct, &log)
		}
	}
}

// A lock that is handed over takes its record along: whoever has it then removes that with the release.
func TestRecordIsHandedOver(t *testing.T) {
	t.Parallel()
	f := newFiles(t, Config{})
	path := t.TempDir() + "/lease"
	l := lockLease(t, f, path, Exclusive, newRecord("first"))
	fd, state := l.State()
	take := newFiles(t, Config{}).Takeover(1)
	again, err := take.Ours(path, fd, Exclusive, state)
	if err != nil {
		t.Fatal(err)
	}
	wantContent(t, path, string(newRecord("first")))
	mustRelease(t, again, path)
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the lease is left: %v", err)
	}
}
