// SPDX-License-Identifier: LGPL-2.1-or-later

package host

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Waiter waits in F_OFD_SETLKW for a lock that somebody holds. The kernel wakes it when the lock is free for however short a time.
type Waiter struct {
	t    testing.TB
	path string
	woke chan error
}

// Wait begins to wait for byte 0 of a file, which must be locked; path is as the test sees it. A Waiter that is not woken ends with the
// lock, so with whoever the test makes hold it.
func Wait(t testing.TB, path string) *Waiter {
	t.Helper()
	// Not by package os, which registers the file with the run-time's epoll set. On a FUSE file system that this process itself serves
	// the kernel asks us whether it can, while it keeps the set, and the run-time waits for the set: for ever, and no signal helps.
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("open %s: %v", path, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	w := &Waiter{t: t, path: path, woke: make(chan error, 1)}
	go func() {
		for {
			err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLKW, &unix.Flock_t{Type: unix.F_WRLCK, Len: 1})
			if err != unix.EINTR { // Go interrupts threads that stay long
				// Others may have it again. Explicitly, since a child that is just being started has a copy of the descriptor.
				unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_UNLCK, Len: 1})
				unix.Close(fd)
				w.woke <- err
				return
			}
		}
	}()
	file := fmt.Sprintf(" %02x:%02x:%d ", unix.Major(uint64(st.Dev)), unix.Minor(uint64(st.Dev)), st.Ino)
	waits := func() bool {
		locks, err := os.ReadFile("/proc/locks")
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(locks)) {
			if strings.Contains(line, "-> OFDLCK") && strings.Contains(line, file) {
				return true
			}
		}
		return false
	}
	if !Eventually(waits) {
		t.Fatalf("%s is not locked: there is nothing to wait for", path)
	}
	return w
}

// Asleep fails the test if the lock was free since Wait.
func (w *Waiter) Asleep() {
	w.t.Helper()
	select {
	case err := <-w.woke:
		w.t.Fatalf("%s was free for a moment (%v)", w.path, err)
	default:
	}
}

// Wakes waits until the lock is free.
func (w *Waiter) Wakes() {
	w.t.Helper()
	free := func() bool {
		select {
		case err := <-w.woke:
			if err != nil {
				w.t.Errorf("F_OFD_SETLKW on %s: %v", w.path, err)
			}
			return true
		default:
			return false
		}
	}
	if !Eventually(free) {
		w.t.Errorf("%s is locked for nobody", w.path)
	}
}
