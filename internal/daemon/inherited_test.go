// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/internal/fdtable"
)

// What is open and not close-on-exec was inherited; what is close-on-exec is ours.
func TestInheritance(t *testing.T) {
	var fds [3]int
	for i := range fds {
		var err error
		if fds[i], err = unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 700); err != nil { // beyond the first numbers
			t.Fatal(err)
		}
		defer unix.Close(fds[i])
	}
	inherited, ours, closed := fds[0], fds[1], fds[2]
	if _, err := unix.FcntlInt(uintptr(inherited), unix.F_SETFD, 0); err != nil {
		t.Fatal(err)
	}
	unix.Close(closed)
	set := findInherited(fdtable.Size())
	for fd, want := range map[int]bool{inherited: true, ours: false, closed: false, -1: false, 0: false, 1 << 30: false} {
		if set.has(fd) != want {
			t.Errorf("descriptor %d: %v", fd, !want)
		}
	}
	set.taken(inherited)
	if set.has(inherited) {
		t.Error("taken over, and still there")
	}
}
