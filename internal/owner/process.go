// SPDX-License-Identifier: LGPL-2.1-or-later

package owner

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/poll"
)

// A process is one process held by its pidfd (pidfd_open(2), Linux 5.3), so that
// neither a signal nor a question ever reaches another process that was given the same pid
// later. The descriptor has one owner, this type.
type process struct {
	pid  int32
	fd   int
	dead atomic.Bool
}

// openProcess returns the process that has the pid now in our pid namespace. The
// error is ESRCH, EINVAL or ENOENT (by kernel version) where no process has that pid.
func openProcess(pid int32) (*process, error) {
	fd, err := unix.PidfdOpen(int(pid), 0) // always close-on-exec
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	return &process{pid: pid, fd: fd}, nil
}

// noSuchProcess tells that err of openProcess means that nothing has the pid.
func noSuchProcess(err error) bool {
	return errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT)
}

// ended asks the kernel. A pidfd is readable as soon as the process has exited,
// also while it is a zombie: the number is then still taken, but it writes nothing any more.
func (p *process) ended() bool {
	if p.dead.Load() {
		return true
	}
	if poll.Ended(p.fd) {
		p.dead.Store(true)
	}
	return p.dead.Load()
}

// signal sends sig; a process that has ended is not an error.
func (p *process) signal(sig unix.Signal) error {
	if err := unix.PidfdSendSignal(p.fd, sig, nil, 0); err != nil && err != unix.ESRCH {
		return fmt.Errorf("cannot send %s to process %d: %w", unix.SignalName(sig), p.pid, os.NewSyscallError("pidfd_send_signal", err))
	}
	return nil
}

func (p *process) close() {
	unix.Close(p.fd)
	p.fd = -1
}

// pidNamespace returns the inode number that names the pid namespace of a process
// (namespaces(7), /proc/PID/ns/pid).
func pidNamespace(proc string) (uint64, error) {
	var st unix.Stat_t
	path := "/proc/" + proc + "/ns/pid"
	if err := unix.Stat(path, &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return st.Ino, nil
}

// InOurPIDNamespace tells whether numbers that the process names mean the same
// processes to us. A process that cannot be asked counts as a stranger: then no lock is
// given up by mistake.
func InOurPIDNamespace(pid int32) bool {
	if pid <= 0 {
		return false
	}
	theirs, err := pidNamespace(strconv.Itoa(int(pid)))
	if err != nil {
		return false
	}
	ours := ourNamespace.Load()
	if ours == 0 {
		if ours, err = pidNamespace("self"); err != nil {
			return false
		}
		ourNamespace.Store(ours)
	}
	return ours == theirs
}

// ourNamespace is this process's own, which never changes (pid_namespaces(7)); 0: not asked yet.
var ourNamespace atomic.Uint64

// The kill sequence of a guest that has hung up but still runs: the C daemon's
// times, so that management software sees what it is used to.
const (
	killAfter   = 1600 * time.Millisecond // SIGTERM at 0, SIGKILL then
	complainAge = 3 * time.Second         // where the C daemon gives up and we do not
)
