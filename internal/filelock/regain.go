// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"errors"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrUnreadable says that a file can't be read, though its lock is held: whoever decides about locks has just said so.
var ErrUnreadable = errors.New("the lock is held, but the file can't be read")

// ErrReplaced says that the path leads to another file than the locked one.
var ErrReplaced = errors.New("another file is at its path")

// Regain tries to take a lock again that was found to be gone, or on a file that was found to be unreadable, on the file that it was on,
// if that is at its path still. It returns the lock that is held then: l itself, or one that stands in for it. That one has no
// hold stored, and l is to be released, without a path; after that, Strengthen the new one, if it is Weak.
//
// Nothing that may be held still is given up before something in its place is held. A local file is locked by the descriptor
// that is there: no local file system forgets one, and a second one could not be closed where locks are POSIX ones. A remote
// file is opened afresh, since a server may not know the old description any more. If that fails, it may be because of our own
// old lock, so that one is asked for once more, in place. If it is granted, nobody else has had the file. It stays, unless the file can be
// read by a fresh description and not by the old one, as on NFS after the server has forgotten us: the kernel goes on to
// believe in that lock and refuses another one. Then both are shared for a moment, in which nobody gets in who wants to write.
//
// Errors: ErrUnreadable, also if nobody could be asked about the lock of a file that can't be read; of type *Error, with ErrLocked where
// somebody else has the lock and ErrReplaced or ENOENT where its path leads elsewhere; any other says nothing about who has the lock.
// Nobody may be releasing the lock meanwhile. It may block as long as the disk hangs.
func (l *Lock) Regain(unreadable bool) (*Lock, error) {
	if l.mount == "" {
		return l, l.regainDirect()
	}
	if l.shares == nil { // else other resources have the same description
		fresh, err := l.fresh(l.mode)
		var hung *HungError
		switch {
		case err == nil:
			return fresh, nil
		case errors.Is(err, ErrReplaced):
			return nil, err
		case errors.Is(err, ErrLocked): // perhaps by our own lock
		case unreadable:
			return l, ErrUnreadable
		case errors.Is(err, unix.ENOENT), errors.As(err, &hung):
			return nil, err
		}
	}
	if err := l.again(l.mode); err != nil {
		if unreadable && !errors.Is(err, ErrLocked) {
			return l, ErrUnreadable
		}
		return nil, err
	}
	l.weak = false
	if !unreadable || l.readable(l.cells()) {
		return l, nil
	}
	if l.shares != nil || l.holder != nil || !l.readable(nil) {
		return l, ErrUnreadable
	}
	if l.mode == Exclusive {
		l.weak = true // until it is known to be exclusive
		if l.again(Shared) != nil {
			return l, ErrUnreadable
		}
	}
	fresh, err := l.fresh(Shared)
	if err != nil {
		return l, ErrUnreadable
	}
	fresh.mode, fresh.weak = l.mode, l.mode == Exclusive
	return fresh, nil
}

// Weak tells that the kernel's lock is shared, though it should be exclusive: see Regain.
func (l *Lock) Weak() bool { return l.weak }

// Harden makes a weak lock exclusive. ErrLocked: somebody else shares it. It may block as long as the disk hangs.
func (l *Lock) Harden() error {
	err := l.again(l.mode)
	l.weak = err != nil
	return err
}

func (l *Lock) regainDirect() error {
	o := l.files.begin("lock", l.path)
	defer l.files.end(o)
	id, err := l.files.stat(o, l.path)
	if err == nil && id != l.id {
		err = ErrReplaced
	}
	if err != nil {
		return wrap(OpLock, l.path, err)
	}
	cmd := unix.F_OFD_SETLK
	if l.kind == POSIX {
		cmd = unix.F_SETLK
	}
	if errno := o.setLock(int(l.fd), cmd, lockType(l.mode)); errno != 0 {
		return l.lockError(errno, nil)
	}
	return nil
}

// fresh locks the file by a description of its own.
func (l *Lock) fresh(mode Mode) (*Lock, error) {
	fresh, err := l.files.Lock(l.path, mode, false, nil)
	if err == nil && fresh.id != l.id {
		_ = fresh.Release("", nil) // it removes nothing
		return nil, wrap(OpLock, l.path, ErrReplaced)
	}
	return fresh, err
}

// cells is what a worker gets to find the file.
func (l *Lock) cells() []int {
	if l.holder != nil {
		return nil
	}
	return []int{int(l.fd)}
}

// again asks for a remote lock once more, in place. ErrLocked: somebody else has it.
func (l *Lock) again(mode Mode) error {
	o := l.files.begin("lock", l.path)
	defer l.files.end(o)
	answer, err := l.files.pool.call(o, l.mount, l.holder, request{op: workAgain, mode: mode, fds: l.cells()})
	switch {
	case err == nil:
		return nil
	case refused(answer.errno):
		return l.lockError(answer.errno, nil)
	}
	return wrap(OpLock, l.path, err)
}

// readable tells whether what lies in a cell can be read, or, without one, what is at the path.
func (l *Lock) readable(cells []int) bool {
	o := l.files.begin("check", l.path)
	defer l.files.end(o)
	r := request{op: workCheck, fds: cells}
	if len(cells) == 0 {
		var errno syscall.Errno
		if r.path, errno = l.files.absolute(l.path); errno != 0 {
			return false
		}
	}
	_, err := l.files.pool.call(o, l.mount, nil, r)
	return err == nil
}

// again asks for the lock on what lies in the cell, or on what the worker itself has locked, once more.
func (w *work) again(r request) reply {
	fd, cmd := w.held, unix.F_SETLK
	if len(r.fds) > 0 {
		var err error
		if fd, err = lyingIn(r.fds[0]); err != nil {
			return other(unix.EBADF)
		}
		defer unix.Close(fd)
		cmd = unix.F_OFD_SETLK
	}
	answer := other(w.setLock(fd, cmd, lockType(r.mode)))
	answer.posix = w.held >= 0
	return answer
}
