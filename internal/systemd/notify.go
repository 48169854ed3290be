// SPDX-License-Identifier: LGPL-2.1-or-later

package systemd

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// notifyTimeout bounds how long a full queue of the receiver can hold us up, in seconds.
const notifyTimeout = 2

// Notifier sends state changes to who started us. The zero value sends nothing.
type Notifier struct {
	address string
	// receiver is the pidfd of who has the address, 0 if that isn't known.
	receiver int
}

// For returns a Notifier that sends to the process with this pidfd only. Once it has ended its address may be anybody's; systemd's
// is in a directory of its own, that of our keeper has its pid. The pidfd stays the caller's and has to stay open.
func (n Notifier) For(pidfd int) Notifier {
	n.receiver = pidfd
	return n
}

// NewNotifier takes the receiver's address from the environment variable NOTIFY_SOCKET. It stays in
// the environment: a re-exec of this process needs it again.
func NewNotifier() Notifier {
	return NotifierAt(os.Getenv("NOTIFY_SOCKET"))
}

// NotifierAt sends to this address, as NOTIFY_SOCKET has it; "": to nobody.
func NotifierAt(address string) Notifier { return Notifier{address: address} }

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
	if err := n.connect(fd); err != nil {
		return fmt.Errorf("notify systemd at %s: %w", n.address, os.NewSyscallError("connect", err))
	}
	// It lives, so it is the one that we are connected to: nobody else could have its address.
	if n.receiver > 0 {
		if ended, err := ready(n.receiver, unix.POLLIN, 0); err != nil {
			return fmt.Errorf("notify systemd at %s: %w", n.address, err)
		} else if ended {
			return fmt.Errorf("notify systemd at %s: the receiver has ended: %w", n.address, unix.ESRCH)
		}
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	err = retry(func() error { return unix.Sendmsg(fd, []byte(state), oob, nil, unix.MSG_NOSIGNAL) })
	if err != nil {
		return fmt.Errorf("notify systemd at %s: %w", n.address, os.NewSyscallError("sendmsg", err))
	}
	return nil
}

// connect connects a socket to the receiver. Our keeper's address is in /proc, and is not there for some milliseconds while the keeper
// goes on as another binary.
func (n Notifier) connect(fd int) error {
	for deadline := time.Now().Add(notifyTimeout * time.Second); ; time.Sleep(time.Millisecond) {
		err := retry(func() error { return unix.Connect(fd, &unix.SockaddrUnix{Name: n.address}) })
		if err != unix.ENOENT && err != unix.EACCES || n.receiver <= 0 || time.Now().After(deadline) {
			return err
		}
		if ended, readyErr := ready(n.receiver, unix.POLLIN, 0); ended || readyErr != nil {
			return err
		}
	}
}

// retry repeats a call that a signal interrupted.
func retry(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}

// ready waits until one of the events has come to fd, or its other end has hung up, for timeout at most.
func ready(fd int, events int16, timeout time.Duration) (bool, error) {
	deadline := time.Now().Add(timeout)
	fds := []unix.PollFd{{Fd: int32(fd), Events: events}}
	for {
		left := max(0, time.Until(deadline))
		n, err := unix.Poll(fds, int((left+time.Millisecond-1)/time.Millisecond))
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return false, os.NewSyscallError("poll", err)
		}
		return n > 0, nil
	}
}
