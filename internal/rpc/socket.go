// SPDX-License-Identifier: LGPL-2.1-or-later

package rpc

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"virtlockd/internal/poll"
)

// receiver holds what recvmsg(2) needs. It is part of a reused object, because
// unix.Recvmsg allocates on each call.
type receiver struct {
	hdr unix.Msghdr
	vec unix.Iovec
}

// passRights is SO_PASSRIGHTS (asm-generic/socket.h), for which x/sys has no name yet. A variable for tests: to be
// like a kernel that does not know it.
var passRights = 83

// refuseDescriptors makes it an error, EPERM, for a peer of this socket to attach descriptors to what it sends. Nobody
// needs them, and the last close of one can hang as its file's disk does. A connection has it from its listening
// socket, unless it was made before that had it. Linux before 6.16 refuses none.
func refuseDescriptors(fd int) { _ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, passRights, 0) }

// recv reads what there is into p, which is not empty. It does not wait for more. n is 0 at the end of the stream.
//
// No room is given for control data, so the kernel drops descriptors that the
// peer has attached instead of installing them in our table, and reports that by
// MSG_CTRUNC. A read ends with the message that they were attached to
// (unix_stream_read_generic in the kernel's net/unix/af_unix.c), so attached
// then belongs to the end of what was read.
//
// The kernel closes here what it drops, so the scheduler has to know of the call: with a raw one, a disk that hangs
// would stop everybody at the next collection of garbage.
func (r *receiver) recv(fd int, p []byte) (n int, attached bool, errno unix.Errno) {
	r.vec.Base = &p[0]
	r.vec.SetLen(len(p))
	r.hdr = unix.Msghdr{Iov: &r.vec}
	r.hdr.SetIovlen(1)
	for {
		r1, _, e := unix.Syscall(unix.SYS_RECVMSG, uintptr(fd), uintptr(unsafe.Pointer(&r.hdr)), unix.MSG_DONTWAIT)
		switch e {
		case 0:
			return int(r1), r.hdr.Flags&unix.MSG_CTRUNC != 0, 0
		case unix.EINTR:
		default:
			return 0, false, e
		}
	}
}

// send writes as much of p, which is not empty, as the socket takes. It does not block, so the
// scheduler need not know (a raw system call). It raises no SIGPIPE.
func send(fd int, p []byte) (n int, errno unix.Errno) {
	for {
		r1, _, e := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)),
			unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
		switch e {
		case 0:
			return int(r1), 0
		case unix.EINTR:
		default:
			return 0, e
		}
	}
}

// accept takes one connection from the backlog without blocking.
func accept(fd int) (int, unix.Errno) {
	for {
		r1, _, e := unix.Syscall6(unix.SYS_ACCEPT4, uintptr(fd), 0, 0, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
		switch e {
		case 0:
			return int(r1), 0
		case unix.EINTR:
		default:
			return -1, e
		}
	}
}

// unread tells whether there is something to read, as far as that is known.
func unread(fd int) bool {
	n, err := unix.IoctlGetInt(fd, unix.TIOCINQ)
	return err != nil || n > 0
}

// hungUp tells whether the peer has closed its end of a connection, or shut it
// down in both directions.
func hungUp(fd int) bool { return poll.Now(fd, 0)&(unix.POLLHUP|unix.POLLERR) != 0 }
