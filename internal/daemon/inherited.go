// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"math"

	"golang.org/x/sys/unix"

	"virtlockd/internal/fdtable"
	"virtlockd/internal/state"
	"virtlockd/internal/systemd"
)

// inheritance says by number which descriptors were open before this program started and have not been taken over
// yet. All that is opened here is close-on-exec; the first three are not for us to hand over. Several goroutines may
// use it, each for descriptors of its own.
type inheritance []bool

// findInherited looks at every descriptor of a table of that size. It is called before any of those that were inherited is made
// close-on-exec.
func findInherited(size int) inheritance {
	fds := make(inheritance, size)
	for fd := systemd.FirstFD; fd < len(fds); fd++ {
		// Neither this nor any other RawSyscall of a hand-over blocks; there are tens of thousands.
		flags, _, errno := unix.RawSyscall(unix.SYS_FCNTL, uintptr(fd), unix.F_GETFD, 0)
		fds[fd] = errno == 0 && flags&unix.FD_CLOEXEC == 0
	}
	return fds
}

// has tells whether a descriptor was inherited and is nobody's yet.
func (fds inheritance) has(fd int) bool { return 0 <= fd && fd < len(fds) && fds[fd] }

// taken notes that a descriptor that was inherited belongs to somebody, or is closed.
func (fds inheritance) taken(fd int) { fds[fd] = false }

// keepFromChildren makes all descriptors but the first three close-on-exec, as if we had opened those that
// were inherited.
func keepFromChildren() {
	if unix.CloseRange(systemd.FirstFD, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC) == nil {
		return
	}
	for fd := range fdtable.Size() { // before Linux 5.11
		if fd >= systemd.FirstFD {
			unix.CloseOnExec(fd)
		}
	}
}

// opened returns what there is to take over of a snapshot whose descriptors were opened here.
func opened(s *state.Snapshot) inheritance {
	fds := make(inheritance, fdtable.Size())
	for _, fd := range descriptors(s, state.Ours) {
		if int(fd) < len(fds) {
			fds[fd] = true
		}
	}
	return fds
}
