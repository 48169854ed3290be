// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"bytes"
	"errors"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/internal/vault"
)

// What a worker is: a process with nothing of ours but its control socket.
func TestWorkerProcess(t *testing.T) {
	if !apart(t) {
		return
	}
	f := newFiles(t, Config{})
	f.openat2 = false
	path := makeFile(t, t.TempDir()+"/disk", "")
	stray, err := unix.Open(path, unix.O_RDONLY, 0) // without O_CLOEXEC
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(stray)
	for range 3 { // which one worker is enough for
		mustRelease(t, mustLock(t, f, path, Exclusive, false), "")
	}
	pids := workers()
	if len(pids) != 1 {
		t.Fatalf("workers: %v", pids)
	}
	proc := "/proc/" + pids[0]
	// After its answer it still closes the cell.
	var open []string
	eventually(t, "four descriptors", func() bool {
		open = nil
		entries, err := os.ReadDir(proc + "/fd")
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			name, _ := os.Readlink(proc + "/fd/" + e.Name())
			if !strings.HasPrefix(name, "anon_inode:") { // of the Go runtime
				open = append(open, e.Name()+" "+strings.TrimRight(name, "[]0123456789"))
			}
		}
		return len(open) == 4
	})
	if want := []string{"0 /dev/null", "1 /dev/null", "2 /dev/null", "3 socket:"}; !slices.Equal(open, want) {
		t.Errorf("its descriptors: %q", open)
	}
	if dir, _ := os.Readlink(proc + "/cwd"); dir != "/" {
		t.Errorf("its directory is %s", dir)
	}
	if comm, _ := os.ReadFile(proc + "/comm"); string(comm) != workerComm+"\n" {
		t.Errorf("its name is %q", comm)
	}
	if environ, _ := os.ReadFile(proc + "/environ"); bytes.Contains(environ, []byte("PATH")) {
		t.Errorf("its environment is %q", environ)
	}
	f.Close()
	if pids := workers(); len(pids) > 0 {
		t.Errorf("after Close: workers %v", pids)
	}
}

func TestWorkerCannotStart(t *testing.T) {
	t.Parallel()
	path := makeFile(t, t.TempDir()+"/disk", "")
	for _, self := range []string{"/bin/false", "/nonexistent", path} {
		f := newFiles(t, Config{Self: self})
		f.openat2 = false
		_, err := f.Lock(path, Exclusive, false, nil)
		var e *Error
		if !errors.As(err, &e) || e.Op != OpWorker || e.Path != path {
			t.Errorf("%s as worker: %v", self, err)
		}
		if err := f.Delete(path, func(FileID) bool { return false }); !errors.As(err, &e) || e.Op != OpWorker {
			t.Errorf("%s as worker: %v", self, err)
		}
	}
}

// A worker whose user may have no more descriptors in flight undoes the lock.
func TestTooManyInFlight(t *testing.T) {
	if !apart(t) {
		return
	}
	dir := t.TempDir()
	path := makeFile(t, dir+"/disk", "")
	for name := dir; name != "/tmp" && name != "/"; name = name[:strings.LastIndexByte(name, '/')] {
		os.Chown(name, 54321, 54321)
	}
	os.Chown(path, 54321, 54321)
	// Without capabilities, and with few descriptors allowed.
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 48, Max: 48}); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{unix.Setgid(54321), unix.Setuid(54321)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	f := newFiles(t, Config{})
	f.openat2 = false
	first := mustLock(t, f, path, Shared, false)
	cell, err := vault.NewCell()
	if err != nil {
		t.Fatal(err)
	}
	defer cell.Close()
	// The limit of the workers is 42 then, ours 48.
	if err := cell.Put([]byte{1}, make([]int, 43)...); err != nil {
		t.Fatal(err)
	}
	_, err = f.Lock(path, Shared, false, nil)
	var e *Error
	if !errors.As(err, &e) || e.Op != OpStore || e.Errno() != unix.ETOOMANYREFS {
		t.Errorf("beyond the limit: %v", err)
	}
	mustRelease(t, first, "") // there is a reserve for that
	startRole(t, "locker").want("ok", "ofd", "write", path)
}

func FuzzRequest(f *testing.F) {
	f.Add(appendRequest(nil, request{op: workLock, mode: Exclusive, create: true, path: "/x"}))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, ok := parseRequest(data)
		if !ok {
			return
		}
		again, ok := parseRequest(appendRequest(nil, r))
		if !ok || !reflect.DeepEqual(again, r) {
			t.Errorf("%v became %v", r, again)
		}
	})
}

func TestReply(t *testing.T) {
	t.Parallel()
	for _, want := range []reply{
		{},
		{errno: unix.ENOENT, step: stepOpen},
		{id: FileID{Dev: 1<<63 + 5, Ino: 7}, posix: true},
		{id: FileID{Dev: 3, Block: true}},
		{errno: unix.EAGAIN, step: stepLock, record: []byte("record"), recordErrno: unix.EDQUOT},
	} {
		b := appendReply(nil, want)
		if got, ok := parseReply(b); !ok || !reflect.DeepEqual(got, want) {
			t.Errorf("%+v became %+v, %t", want, got, ok)
		}
		for n := range replySize {
			if _, ok := parseReply(b[:n]); ok {
				t.Errorf("%d bytes of %d are taken for a reply", n, len(b))
			}
		}
	}
}
