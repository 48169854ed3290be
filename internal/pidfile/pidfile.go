// SPDX-License-Identifier: LGPL-2.1-or-later

// Package pidfile keeps a daemon's pid file: written under a lock that a second instance can't get,
// ours or the C daemon, which locks the same byte with a POSIX lock.
package pidfile

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"virtlockd/internal/strerror"
)

// maxContent is how much of somebody else's pid file is read: more than any pid needs.
const maxContent = 32

// File is a pid file that is ours until Remove or the end of the process.
type File struct {
	path     string
	fd       int
	dev, ino uint64
}

// LockedError says that another process holds the pid file.
type LockedError struct {
	Path string
	// PID is the holder as far as it can be told; 0: unknown.
	PID int
}

func (e *LockedError) Error() string {
	s := fmt.Sprintf("Failed to acquire pid file '%s': %s", e.Path, strerror.Text(unix.EAGAIN))
	if e.PID > 0 {
		return s + fmt.Sprintf(" (process %d is running with it; stop that one first, or name another file by --pid-file)", e.PID)
	}
	return s + " (another instance is running with it; stop that one first, or name another file by --pid-file)"
}

// Acquire opens or makes the pid file at path (mode 0644 less the umask), locks it and writes our pid
// into it: decimal, without a newline, as libvirt does. *LockedError: somebody else has it.
func Acquire(path string) (*File, error) {
	for {
		f, err := acquire(path)
		if !errors.Is(err, errReplaced) {
			return f, err
		}
	}
}

// Error is a system call on the pid file that failed. The text is the C daemon's.
type Error struct {
	Op   string // open, stat, acquire, write, remove
	Path string
	Err  error
}

func (e *Error) Error() string {
	cause := e.Err.Error()
	if errno, ok := e.Err.(syscall.Errno); ok {
		cause = strerror.Text(errno)
	}
	return fmt.Sprintf("Failed to %s pid file '%s': %s", e.Op, e.Path, cause)
}

func (e *Error) Unwrap() error { return e.Err }

var (
	errNotRegular = errors.New("it is not a regular file")
	errNotOurs    = errors.New("it was replaced by another one, which is left as it is")
)

// errReplaced: the file that was locked is no longer the one at the path.
var errReplaced = errors.New("pid file was replaced meanwhile")

func acquire(path string) (_ *File, err error) {
	// O_NONBLOCK: a FIFO at the path must not stop us.
	fd, err := openRetry(path, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY, 0o644)
	if err != nil {
		return nil, &Error{"open", path, err}
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	var st, at unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, &Error{"stat", path, err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, &Error{"open", path, errNotRegular}
	}

	lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET, Start: 0, Len: 1}
	switch err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lock); err {
	case nil:
	case unix.EAGAIN, unix.EACCES:
		return nil, &LockedError{path, holder(fd)}
	default:
		return nil, &Error{"acquire", path, err}
	}

	// Between open and lock the old owner may have removed the file at its end: then the lock is
	// one on a file that nobody else will find.
	switch err := unix.Stat(path, &at); {
	case err == unix.ENOENT:
		return nil, errReplaced
	case err != nil:
		return nil, &Error{"stat", path, err}
	case at.Dev != st.Dev || at.Ino != st.Ino:
		return nil, errReplaced
	}

	f := &File{path: path, fd: fd, dev: st.Dev, ino: st.Ino}
	if err := f.write(); err != nil {
		return nil, err
	}
	return f, nil
}

// write writes our pid into the file. Before it is cut to length, so that a reader never finds it empty.
func (f *File) write() error {
	pid := strconv.Itoa(os.Getpid())
	if _, err := unix.Pwrite(f.fd, []byte(pid), 0); err != nil {
		return &Error{"write", f.path, err}
	}
	if err := unix.Ftruncate(f.fd, int64(len(pid))); err != nil {
		return &Error{"write", f.path, err}
	}
	return nil
}

func openRetry(path string, flags int, mode uint32) (int, error) {
	for {
		fd, err := unix.Open(path, flags, mode)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// holder finds out who holds the lock: the kernel names the process of a POSIX lock, for an open file
// description lock (-1) the file itself says it.
func holder(fd int) int {
	lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET, Start: 0, Len: 1}
	if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &lock); err == nil && lock.Pid > 0 {
		return int(lock.Pid)
	}
	var buf [maxContent]byte
	n, err := unix.Pread(fd, buf[:], 0)
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(string(buf[:n]))
	if err != nil || pid <= 0 {
		return 0
	}
	return pid
}

// Remove unlinks the file if it is still ours and gives up the lock. The file isn't usable afterwards.
func (f *File) Remove() error {
	defer unix.Close(f.fd)
	var at unix.Stat_t
	switch err := unix.Stat(f.path, &at); {
	case err == unix.ENOENT:
		return nil
	case err != nil:
		return &Error{"remove", f.path, err}
	case at.Dev != f.dev || at.Ino != f.ino:
		return &Error{"remove", f.path, errNotOurs}
	}
	if err := unix.Unlink(f.path); err != nil && err != unix.ENOENT {
		return &Error{"remove", f.path, err}
	}
	return nil
}

// FD returns the descriptor that the lock is on, to be handed over to another binary in this process.
func (f *File) FD() int { return f.fd }

// Yield gives up the lock and keeps the file, for a binary in this process that locks it anew: the C daemon. To
// leave the unlocking to close(2) is not enough, since whoever looks at /proc/PID/fd just then keeps the file open
// for a moment.
func (f *File) Yield() error { return f.setLock(unix.F_UNLCK) }

// Regain takes back what Yield gave up, unless somebody else has it now: then the error is a *LockedError.
func (f *File) Regain() error { return f.setLock(unix.F_WRLCK) }

func (f *File) setLock(kind int16) error {
	lock := unix.Flock_t{Type: kind, Whence: unix.SEEK_SET, Start: 0, Len: 1}
	switch err := unix.FcntlFlock(uintptr(f.fd), unix.F_OFD_SETLK, &lock); err {
	case nil:
		return nil
	case unix.EAGAIN, unix.EACCES:
		return &LockedError{f.path, holder(f.fd)}
	default:
		return &Error{"acquire", f.path, err}
	}
}

// Adopt goes on with the pid file at path that has been locked with fd by another binary in this process, or by a process that has
// ended. If there is an error, fd is left as it is.
func Adopt(path string, fd int) (*File, error) {
	var st, at unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, &Error{"stat", path, err}
	}
	switch err := unix.Stat(path, &at); {
	case err != nil:
		return nil, &Error{"stat", path, err}
	case at.Dev != st.Dev || at.Ino != st.Ino:
		return nil, &Error{"acquire", path, errNotOurs}
	}
	// Granted at once if it is ours, as it should be.
	lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET, Start: 0, Len: 1}
	if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lock); err != nil {
		return nil, &LockedError{path, holder(fd)}
	}
	f := &File{path: path, fd: fd, dev: st.Dev, ino: st.Ino}
	if err := f.write(); err != nil {
		return nil, err
	}
	return f, nil
}
