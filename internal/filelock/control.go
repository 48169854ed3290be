// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// control is the daemon's end of a worker's control socket. Whoever waits for a message is a goroutine that sleeps. In a blocking
// system call it would have a thread, and, worse, until the run-time looks what it is doing, up to 10 ms, one of its few processors: some
// calls that hang would make everybody wait.
type control struct {
	file *os.File
	raw  syscall.RawConn
}

// newControl makes one of a socket, which it owns from then on.
func newControl(socket int) (*control, error) {
	err := os.NewSyscallError("fcntl(O_NONBLOCK)", unix.SetNonblock(socket, true))
	file := os.NewFile(uintptr(socket), "the control socket of a worker")
	if err == nil { // the run-time does not say that its poller could not take it, but then there are no deadlines
		err = file.SetReadDeadline(time.Time{})
	}
	if err == nil {
		var raw syscall.RawConn
		if raw, err = file.SyscallConn(); err == nil {
			return &control{file, raw}, nil
		}
	}
	_ = file.Close()
	return nil, err
}

// send sends one message with descriptors.
func (c *control) send(data []byte, fds ...int) (err error) {
	closed := c.raw.Write(func(fd uintptr) bool {
		err = sendMessage(int(fd), data, fds...)
		return err != unix.EAGAIN
	})
	if closed != nil {
		return closed
	}
	return err
}

// receive waits for a message. n 0: the worker is gone.
func (c *control) receive(data []byte) (n int, err error) {
	closed := c.raw.Read(func(fd uintptr) bool {
		n, _, err = receiveMessage(int(fd), data, nil)
		return err != unix.EAGAIN
	})
	if closed != nil {
		return 0, closed
	}
	return n, err
}

// await waits until there is a message, or the worker is gone, but no longer than limit.
func (c *control) await(limit time.Duration) {
	// Errors say that it is closed; then there is nothing to wait for.
	_ = c.file.SetReadDeadline(time.Now().Add(limit))
	_ = c.raw.Read(func(fd uintptr) bool {
		_, _, err := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK)
		return err != unix.EAGAIN && err != unix.EINTR
	})
	_ = c.file.SetReadDeadline(time.Time{})
}

// shutdown makes whoever waits for a message find that there will be none.
func (c *control) shutdown() {
	_ = c.raw.Control(func(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_RDWR) })
}

func (c *control) close() { _ = c.file.Close() }
