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

// recv reads what there is into p, which is not empty. It does not block, so the
// scheduler need not know (a raw system call). n is 0 at the end of the stream.
//
// No room is given for control data, so the kernel drops descriptors that the
// peer has attached instead of installing them in our table, and reports that by
// MSG_CTRUNC. A read ends with the message that they were attached to
// (unix_stream_read_generic in the kernel's net/unix/af_unix.c), so attached
// then belongs to the end of what was read.
func (r *receiver) recv(fd int, p []byte) (n int, attached bool, errno unix.Errno) {
	r.vec.Base = &p[0]
	r.vec.SetLen(len(p))
	r.hdr = unix.Msghdr{Iov: &r.vec}
	r.hdr.SetIovlen(1)
	for {
		r1, _, e := unix.RawSyscall(unix.SYS_RECVMSG, uintptr(fd), uintptr(unsafe.Pointer(&r.hdr)), unix.MSG_DONTWAIT)
		switch e {
		case 0:
			return int(r1), r.hdr.Flags&unix.MSG_CTRUNC != 0, 0
		case unix.EINTR:
		default:
			return 0, false, e
		}
	}
}

// send writes as much of p, which is not empty, as the socket takes. Like recv it
// does not block. It raises no SIGPIPE.
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

// hungUp tells whether the peer has closed its end of a connection, or shut it
// down in both directions.
func hungUp(fd int) bool { return poll.Now(fd, 0)&(unix.POLLHUP|unix.POLLERR) != 0 }
