// SPDX-License-Identifier: LGPL-2.1-or-later

package poll

import "golang.org/x/sys/unix"

// Now returns which of the POLL* events have come to a descriptor, and POLLHUP, POLLERR and POLLNVAL where they hold (poll(2)). It does not
// wait, but a signal to this process interrupts that, too.
func Now(fd int, events int16) int16 {
	p := [1]unix.PollFd{{Fd: int32(fd), Events: events}}
	for {
		switch _, err := unix.Poll(p[:], 0); err {
		case nil:
			return p[0].Revents
		case unix.EINTR:
		default:
			return unix.POLLNVAL
		}
	}
}

// HungUp tells whether the peer of a connection has closed it, or shut down both ends (poll(2), POLLHUP).
func HungUp(fd int) bool { return Now(fd, 0)&unix.POLLHUP != 0 }

// Ended tells whether the process of a pidfd has ended, as one has that is a zombie (pidfd_open(2)).
func Ended(pidfd int) bool { return Now(pidfd, unix.POLLIN)&unix.POLLIN != 0 }
