// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"bytes"
	"errors"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// Fault is something that is wrong with a lock that is held.
type Fault uint8

// The faults.
const (
	Gone       Fault = iota // the kernel has no such lock
	Replaced                // another file is at the path
	Deleted                 // nothing is at the path
	Invisible               // the path can't be looked at
	Unreadable              // the locked file can't be read
)

// A FaultError is a Fault and its circumstances.
type FaultError struct {
	Fault Fault
	Err   error // the system's; nil: none
}

func (e *FaultError) Error() string {
	text := [...]string{"the kernel does not have the lock any more", "the path leads to another file now", "the path leads nowhere now",
		"the path can't be looked at", "the locked file can't be read"}[e.Fault]
	if e.Err != nil {
		text += ": " + e.Err.Error()
	}
	return text
}

func (e *FaultError) Unwrap() error { return e.Err }

// Mount returns which mount, or block device, a worker works for who works on the file; "" if none does.
func (l *Lock) Mount() string { return l.mount }

// Workers returns how many worker processes there are, and how many of them are at work.
func (f *Files) Workers() (all, busy int) {
	f.pool.mu.Lock()
	defer f.pool.mu.Unlock()
	return len(f.pool.busy) + len(f.pool.idle), len(f.pool.busy)
}

// Probe is a lock as it was at one moment, by which it can be checked while its owner does what he likes.
type Probe struct{ lock Lock }

// Probe returns a picture of the lock, which nobody may be releasing in this moment.
func (l *Lock) Probe() Probe { return Probe{*l} }

// Check looks whether a lock is what it is believed to be: held by the kernel, exclusively if so said, on the
// file that is at its path, which can be read. It takes no reference and keeps nobody from releasing the lock
// meanwhile; then what it finds means nothing, and the caller has to see to that.
//
// An error says that it could not look. It may block as long as the disk hangs.
//
// No file is opened in this process: closing it again would drop a POSIX lock on it.
func (p *Probe) Check(exclusive bool) (found []*FaultError, err error) {
	l := &p.lock
	o := l.files.begin("check", l.path)
	defer l.files.end(o)
	if l.mount != "" {
		found, err = l.checkRemote(o, exclusive)
	} else {
		found, err = l.checkDirect(exclusive)
	}
	if err != nil {
		return nil, wrap(OpCheck, l.path, err)
	}
	id, err := l.files.stat(o, l.path)
	var noWorker *Error
	switch {
	case errors.As(err, &noWorker) || errors.Is(err, ErrClosed):
		return nil, wrap(OpCheck, l.path, err)
	case errors.Is(err, unix.ENOENT):
		found = append(found, &FaultError{Fault: Deleted})
	case err != nil:
		found = append(found, &FaultError{Invisible, err})
	case id != l.id:
		found = append(found, &FaultError{Fault: Replaced})
	}
	return found, nil
}

// errWeak says in which way a lock that should be exclusive is gone.
var errWeak = errors.New("it is shared, though it should be exclusive")

func (l *Lock) checkDirect(exclusive bool) ([]*FaultError, error) {
	typ, err := lockHeld(int(l.fd))
	switch {
	case err != nil:
		return nil, err
	case typ == unix.F_UNLCK:
		return []*FaultError{{Fault: Gone}}, nil
	case typ == unix.F_RDLCK && exclusive:
		return []*FaultError{{Gone, errWeak}}, nil
	}
	return nil, nil
}

// lockHeld returns which lock on byte 0 an open file description has, or, a POSIX lock, this process: F_WRLCK, F_RDLCK or
// F_UNLCK. The kernel lists such locks, and no others, with the descriptor (proc_pid_fdinfo(5)):
//
//	lock:	1: OFDLCK ADVISORY  WRITE -1 00:2f:17 0 0
func lockHeld(fd int) (typ int16, err error) {
	info, err := os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(fd))
	if err != nil {
		return unix.F_UNLCK, err
	}
	for line := range bytes.Lines(info) {
		f := bytes.Fields(line)
		if len(f) < 9 || string(f[0]) != "lock:" {
			continue
		}
		kind, mode, start := string(f[2]), string(f[4]), string(f[7])
		if (kind == "OFDLCK" || kind == "POSIX") && start == "0" {
			if mode == "WRITE" {
				return unix.F_WRLCK, nil
			}
			return unix.F_RDLCK, nil
		}
	}
	return unix.F_UNLCK, nil
}

// checkRemote asks a worker. A POSIX lock is its holder's: another one looks at it, by its path.
func (l *Lock) checkRemote(o *op, exclusive bool) (found []*FaultError, err error) {
	r := request{op: workCheck, mode: Shared}
	if exclusive {
		r.mode = Exclusive
		if l.weak { // the worker can't always see that
			found = append(found, &FaultError{Gone, errWeak})
		}
	}
	if l.holder == nil {
		r.fds = []int{int(l.fd)}
	} else {
		var errno syscall.Errno
		if r.path, errno = l.files.absolute(l.path); errno != 0 {
			return nil, errno
		}
	}
	answer, err := l.files.pool.call(o, l.mount, nil, r)
	var noWorker *Error
	switch {
	case errors.As(err, &noWorker):
		return nil, noWorker.Err
	case answer.step == stepOther: // it was being released, or the file was replaced: the path says so
		return found, nil
	case answer.step == stepOpen:
		return append(found, &FaultError{Unreadable, err}), nil
	}
	if answer.step == stepGone && len(found) == 0 {
		found = append(found, &FaultError{Fault: Gone})
	}
	if answer.errno != 0 {
		found = append(found, &FaultError{Unreadable, answer.errno})
	}
	return found, nil
}

// check is Check of what is in the cell, or of the file at the path. stepGone says that the lock is, and the
// errno is that of a read.
func (w *work) check(r request) reply {
	var fd int
	var errno syscall.Errno
	if len(r.fds) > 0 {
		var err error
		if fd, err = lyingIn(r.fds[0]); err != nil {
			return other(cellErrno(err))
		}
	} else if fd, errno = openToLook(r.path); errno != 0 {
		return reply{errno: errno, step: stepOpen}
	}
	defer unix.Close(fd)
	info, errno := w.fstat(fd)
	if errno != 0 {
		return reply{errno: errno}
	}
	answer := reply{id: info.id}
	if !w.locked(fd, r) {
		answer.step = stepGone
	}
	if kind := info.kind(); kind == unix.S_IFREG || kind == unix.S_IFBLK {
		answer.errno = readThrough(fd)
	}
	return answer
}

// openToLook opens a file for reading, in a way that no device acts upon.
func openToLook(path string) (fd int, errno syscall.Errno) {
	errno = retry(func() (err error) {
		fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
		return err
	})
	return fd, errno
}

// locked tells whether the lock is there. Where the file system keeps its locks to itself, it is asked: what is in the way of the
// locked description is somebody else's, so this one has lost its lock. If nothing is, then whatever is in the way of a description
// that has no lock is the one meant. What can't be asked says nothing about the lock.
func (w *work) locked(fd int, r request) bool {
	if len(r.fds) == 0 {
		other, errno := w.blocker(fd, unix.F_GETLK, unix.F_WRLCK)
		return errno != 0 || other.Type != unix.F_UNLCK
	}
	typ, err := lockHeld(fd)
	switch {
	case err != nil:
		return true
	case typ != unix.F_UNLCK:
		return typ == unix.F_WRLCK || r.mode == Shared
	}
	other, errno := w.blocker(fd, unix.F_OFD_GETLK, lockType(r.mode))
	if errno != 0 || other.Type != unix.F_UNLCK {
		return errno != 0
	}
	fresh, errno := openToLook("/proc/self/fd/" + strconv.Itoa(fd))
	if errno != 0 {
		return true
	}
	defer unix.Close(fresh)
	other, errno = w.blocker(fresh, unix.F_OFD_GETLK, unix.F_WRLCK)
	return errno != 0 || other.Type != unix.F_UNLCK
}

// readThrough reads from the beginning of a file, from the disk and not from memory if the kernel can be brought
// to it. Through the locked description it fails where the server has taken the lock away.
func readThrough(fd int) syscall.Errno {
	const page = 4096
	_ = unix.Fadvise(fd, 0, page, unix.FADV_DONTNEED) // then it is read from memory
	var b [1]byte
	return retry(func() error {
		_, err := unix.Pread(fd, b[:], 0)
		return err
	})
}
