// SPDX-License-Identifier: LGPL-2.1-or-later

package rpc

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"virtlockd/internal/poll"
)

// ErrNoPeerPID is returned by Client.PeerPIDFD for a peer whose pid namespace is
// neither ours nor below ours: it has no number here.
var ErrNoPeerPID = errors.New("the peer is in a pid namespace that cannot be seen from ours")

// ErrPeerGone is returned by Client.PeerPIDFD when the process that connected
// does not exist any more, whoever has its number or its connection now.
var ErrPeerGone = errors.New("the process that connected has ended")

// PeerPIDFD returns a new descriptor (pidfd_open(2)) of the process that
// connected. The caller owns it. It may be called from Opened and Call only.
//
// The kernel hands it out itself since 6.5 (SO_PEERPIDFD). On older ones the
// process that has the number now is taken if it has started before the
// connection was accepted and the connection is still open.
func (c *Client) PeerPIDFD() (int, error) {
	if c.pid == 0 {
		return -1, fmt.Errorf("rpc: client %d: %w", c.id, ErrNoPeerPID)
	}
	fd, err := unix.GetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	switch err {
	case nil:
		return fd, nil
	case unix.ENOPROTOOPT:
		fd, err = openPeer(c.pid, c.uptime, c.fd)
	case unix.ESRCH, unix.EINVAL, unix.ENODATA:
		err = ErrPeerGone
	default:
		err = os.NewSyscallError("getsockopt(SO_PEERPIDFD)", err)
	}
	if err != nil {
		return -1, fmt.Errorf("rpc: %s: %w", c, err)
	}
	return fd, nil
}

// maxLabel bounds a security label, in bytes. SELinux, whose labels are the longest, has no limit of
// its own; /proc shows 4 KiB.
const maxLabel = 4 << 10

// Label returns the label that the security module of the kernel (SELinux, say) had for the peer
// when it connected (SO_PEERSEC, unix(7)). "": there is none, or the connection has ended. It may be
// called from any goroutine.
func (c *Client) Label() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd < 0 {
		return ""
	}
	var b [maxLabel]byte
	n := uint32(len(b))
	// It does not block.
	if _, _, errno := unix.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(c.fd), unix.SOL_SOCKET, unix.SO_PEERSEC,
		uintptr(unsafe.Pointer(&b)), uintptr(unsafe.Pointer(&n)), 0); errno != 0 {
		return ""
	}
	label, _, _ := bytes.Cut(b[:n], []byte{0}) // some modules count a NUL at the end
	return string(label)
}

// openPeer opens the process that has the number pid, if it is the one that
// connected: it started no later than accepted (ns since boot) and conn is not
// hung up.
func openPeer(pid int32, accepted int64, conn int) (int, error) {
	fd, err := unix.PidfdOpen(int(pid), 0)
	if err == unix.ESRCH {
		return -1, ErrPeerGone
	}
	if err != nil {
		return -1, os.NewSyscallError("pidfd_open", err)
	}
	started, err := startTime(pid)
	switch {
	case err != nil:
	// Only while the process of the descriptor lives is the number surely its
	// own, and what /proc said about the number was about this process.
	case poll.Ended(fd), hungUp(conn), started > accepted:
		err = ErrPeerGone
	default:
		return fd, nil
	}
	unix.Close(fd)
	return -1, err
}

// clockTick is the unit of times in /proc/PID/stat: USER_HZ, 100 on every Linux
// that Go runs on.
const clockTick = int64(time.Second / 100)

// startTime returns when a process started, in ns since boot, rounded down to a
// clock tick (proc_pid_stat(5), field 22).
func startTime(pid int32) (int64, error) {
	path := fmt.Sprintf("/proc/%d/stat", pid)
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return 0, ErrPeerGone
	}
	if err != nil {
		return 0, err
	}
	// The name in field 2 may contain anything, but no field after it has a ")".
	_, rest, _ := bytes.Cut(b[bytes.LastIndexByte(b, ')')+1:], []byte(" "))
	fields := bytes.Fields(rest)
	const field = 22 - 3 // rest begins with field 3
	if len(fields) <= field {
		return 0, fmt.Errorf("%s has only %d fields", path, len(fields)+2)
	}
	ticks, err := strconv.ParseInt(string(fields[field]), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s: start time: %w", path, err)
	}
	return ticks * clockTick, nil
}

// uptime returns the time in ns since boot, time asleep included.
func uptime() (int64, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0, os.NewSyscallError("clock_gettime", err)
	}
	return ts.Nano(), nil
}
