// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// refuseOFD makes the kernel refuse OFD locks with EINVAL to this process and
// the ones that it starts.
func refuseOFD(t *testing.T) {
	t.Helper()
	const loadWord, jumpIfEqual, ret = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_RET | unix.BPF_K
	argument := uint32(24) // the low half of the second one
	if *(*byte)(unsafe.Pointer(&[]uint16{1}[0])) == 0 {
		argument += 4
	}
	filter := []unix.SockFilter{
		{Code: loadWord, K: 0},
		{Code: jumpIfEqual, K: unix.SYS_FCNTL, Jf: 3},
		{Code: loadWord, K: argument},
		{Code: jumpIfEqual, K: unix.F_OFD_SETLK, Jf: 1},
		{Code: ret, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EINVAL)},
		{Code: ret, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program)))
	if errno != 0 {
		t.Skip("seccomp:", errno)
	}
	fd, err := unix.Open(t.TempDir(), unix.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK, Len: 1}); err != unix.EINVAL {
		t.Fatalf("an OFD lock with the filter: %v", err)
	}
}

func TestPOSIXLocks(t *testing.T) {
	if !apart(t) {
		return
	}
	other := startRole(t, "locker")
	refuseOFD(t)
	for _, test := range []struct {
		name    string
		openat2 bool
		remote  bool
	}{{"direct", true, false}, {"worker", false, true}} {
		var logged bytes.Buffer
		f := newFiles(t, Config{Logger: slog.New(slog.NewTextHandler(&logged, nil))})
		f.openat2 = test.openat2
		dir := t.TempDir()
		path := makeFile(t, dir+"/disk", "data")
		if err := os.Link(path, dir+"/hard"); err != nil {
			t.Fatal(err)
		}
		before := len(openFiles(t))

		l := mustLock(t, f, path, Exclusive, false)
		if l.Kind() != POSIX || l.Remote() != test.remote {
			t.Errorf("%s: kind %v, remote %t", test.name, l.Kind(), l.Remote())
		}
		for range 50 { // none of which may drop the lock, nor keep anything open
			for _, name := range []string{path, dir + "/hard"} {
				if _, err := f.Lock(name, Shared, false, nil); !errors.Is(err, ErrLocked) {
					t.Errorf("%s: a second lock of %s: %v", test.name, name, err)
				}
			}
		}
		other.want(refusedText, "ofd", "read", path)
		mustRelease(t, l, "")
		other.want("ok", "ofd", "write", path)
		if _, err := f.Lock(path, Shared, false, nil); !errors.Is(err, ErrLocked) {
			t.Errorf("%s: locked by another process: %v", test.name, err)
		}
		other.want("ok", "close", path)

		first := mustLock(t, f, path, Shared, false)
		second := mustLock(t, f, dir+"/hard", Shared, false)
		third := mustLock(t, f, path, Shared, false)
		for _, l := range []*Lock{first, third} {
			if _, err := f.Lock(path, Exclusive, false, nil); !errors.Is(err, ErrLocked) {
				t.Errorf("%s: exclusively beside sharers: %v", test.name, err)
			}
			mustRelease(t, l, "")
			other.want(refusedText, "ofd", "write", path)
		}
		mustRelease(t, second, "")
		other.want("ok", "ofd", "write", path)
		other.want("ok", "close", path)

		lease := dir + "/lease"
		for _, mode := range []Mode{Shared, Exclusive} {
			mustRelease(t, mustLock(t, f, lease, mode, true), lease)
			if _, err := os.Stat(lease); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s: the lease file after the release: %v", test.name, err)
			}
		}
		first, second = mustLock(t, f, lease, Shared, true), mustLock(t, f, lease, Shared, true)
		mustRelease(t, first, lease)
		if _, err := os.Stat(lease); err != nil {
			t.Errorf("%s: the lease file of another sharer: %v", test.name, err)
		}
		mustRelease(t, second, lease)
		if _, err := os.Stat(lease); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: the lease file after the last release: %v", test.name, err)
		}
		if lines := strings.Count(logged.String(), "\n"); lines != 1 || !strings.Contains(logged.String(), "POSIX") {
			t.Errorf("%s: logged %q", test.name, logged.String())
		}
		f.Close()
		noWorkers(t)
		if after := openFiles(t); len(after) > before {
			t.Errorf("%s: %d files were open, now %v", test.name, before, after)
		}
	}
}

// Whatever threads do, the table lets nobody in beside an exclusive holder.
func TestPOSIXTableUnderLoad(t *testing.T) {
	if !apart(t) {
		return
	}
	refuseOFD(t)
	f := newFiles(t, Config{})
	path := t.TempDir() + "/lease"
	var mu sync.Mutex
	var holders, writers int
	var wg sync.WaitGroup
	for n := range 4 {
		wg.Go(func() {
			random := rand.New(rand.NewPCG(1, uint64(n)))
			for range 2000 {
				mode := Mode(random.IntN(2))
				l, err := f.Lock(path, mode, true, nil)
				if errors.Is(err, ErrLocked) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				holders++
				if mode == Exclusive {
					writers++
				}
				if writers > 0 && holders > 1 {
					t.Errorf("%d holders, %d exclusive", holders, writers)
				}
				mu.Unlock()
				runtime.Gosched()
				mu.Lock()
				holders--
				if mode == Exclusive {
					writers--
				}
				mu.Unlock()
				if err := l.Release([]string{"", path}[random.IntN(2)], nil); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if len(f.posix.files) != 0 {
		t.Errorf("left in the table: %v", f.posix.files)
	}
}

// A descriptor that meets a held lock is parked: closing it would drop the lock.
func TestPOSIXTableParks(t *testing.T) {
	t.Parallel()
	path := makeFile(t, t.TempDir()+"/disk", "")
	other := startRole(t, "locker")
	var (
		table posixTable
		s     scratch
		fds   []int
		id    FileID
	)
	for range 3 {
		fd, errno := open(path, 0)
		if errno != 0 {
			t.Fatal(errno)
		}
		info, _ := s.fstat(fd)
		fds, id = append(fds, fd), info.id
	}
	if errno := table.lock(&s, id, fds[0], Exclusive); errno != 0 {
		t.Fatal(errno)
	}
	for _, fd := range fds[1:] {
		if errno := table.lock(&s, id, fd, Shared); errno != unix.EAGAIN {
			t.Error(errno)
		}
	}
	other.want(refusedText, "posix", "read", path)
	if !table.conflicts(id, Shared) || table.conflicts(FileID{Dev: id.Dev, Ino: id.Ino + 1}, Exclusive) {
		t.Error("conflicts is wrong")
	}
	table.release(&s, id, fds[0], nil)
	other.want("ok", "posix", "write", path)
	for _, fd := range fds {
		if name, err := os.Readlink(fmt.Sprint("/proc/self/fd/", fd)); err == nil && name == path {
			t.Errorf("descriptor %d is still open", fd)
		}
	}
}
