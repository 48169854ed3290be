// SPDX-License-Identifier: LGPL-2.1-or-later

package systemd

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
)

// Waiter waits outside the machine, in F_OFD_SETLKW, for a lock that somebody on the machine holds. The kernel wakes it when the lock
// is free for however short a time.
type Waiter struct {
	m    *Machine
	path string
	woke chan error
}

// Wait begins to wait for a file's lock, which must be held. What is left of it ends with the machine, whose locks end too.
func (m *Machine) Wait(path string) *Waiter {
	m.t.Helper()
	f, err := os.OpenFile(m.Path(path), os.O_RDWR, 0)
	if err != nil {
		m.t.Fatalf("machine: %v", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		m.t.Fatalf("machine: %v", err)
	}
	w := &Waiter{m: m, path: path, woke: make(chan error, 1)}
	go func() {
		defer f.Close()
		for {
			err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLKW, &unix.Flock_t{Type: unix.F_WRLCK, Len: 1})
			if err != unix.EINTR { // Go interrupts threads that stay long
				w.woke <- err
				return
			}
		}
	}()
	file := fmt.Sprintf(" %02x:%02x:%d ", unix.Major(uint64(st.Dev)), unix.Minor(uint64(st.Dev)), st.Ino)
	waits := func() bool {
		locks, err := os.ReadFile("/proc/locks")
		if err != nil {
			m.t.Fatal(err)
		}
		for line := range strings.Lines(string(locks)) {
			if strings.Contains(line, "-> OFDLCK") && strings.Contains(line, file) {
				return true
			}
		}
		return false
	}
	if !host.Eventually(waits) {
		m.t.Fatalf("%s is not locked: there is nothing to wait for", path)
	}
	return w
}

// Asleep fails the test if the lock was free since Wait.
func (w *Waiter) Asleep() {
	w.m.t.Helper()
	select {
	case err := <-w.woke:
		w.m.t.Fatalf("%s was free for a moment (%v)", w.path, err)
	default:
	}
}

// Wakes waits until the lock is free.
func (w *Waiter) Wakes() {
	w.m.t.Helper()
	free := func() bool {
		select {
		case err := <-w.woke:
			if err != nil {
				w.m.t.Errorf("F_OFD_SETLKW on %s: %v", w.path, err)
			}
			return true
		default:
			return false
		}
	}
	if !host.Eventually(free) {
		w.m.t.Errorf("%s is locked for nobody", w.path)
	}
}
