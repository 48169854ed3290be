// SPDX-License-Identifier: LGPL-2.1-or-later

package systemd

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// notifyTimeout bounds how long a full queue of the receiver can hold us up, in seconds.
const notifyTimeout = 2

// Notifier sends state changes to who started us. The zero value sends nothing.
type Notifier struct {
	address string
}

// NewNotifier takes the receiver's address from the environment variable NOTIFY_SOCKET. It stays in
// the environment: a re-exec of this process needs it again.
func NewNotifier() Notifier {
	return Notifier{os.Getenv("NOTIFY_SOCKET")}
}

// Send sends one message, for example "READY=1", with descriptors if there are any. It does nothing
// if nobody asked for it.
func (n Notifier) Send(state string, fds ...int) error {
	if n.address == "" {
		return nil
	}
	// x/sys takes a leading '@' for an abstract address, as systemd writes it.
	if n.address[0] != '/' && n.address[0] != '@' {
		return fmt.Errorf("notify systemd: NOTIFY_SOCKET=%q is neither a path nor an abstract address", n.address)
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("notify systemd: %w", os.NewSyscallError("socket", err))
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Sec: notifyTimeout}); err != nil {
		return fmt.Errorf("notify systemd: %w", os.NewSyscallError("setsockopt", err))
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	for {
		err = unix.Sendmsg(fd, []byte(state), oob, &unix.SockaddrUnix{Name: n.address}, unix.MSG_NOSIGNAL)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("notify systemd at %s: %w", n.address, os.NewSyscallError("sendmsg", err))
	}
	return nil
}
