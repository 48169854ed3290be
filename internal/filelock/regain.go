// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Regain tries to take a lock again that was found to be gone, on the file that it was on, if that is at its path still. It returns the
// lock that is held then: l itself, or one that stands in for it. That one has no hold stored, and l is to be released, without
// a path.
//
// A local file is locked by the descriptor that is there: no local file system forgets one, and a second one could not be closed
// where locks are POSIX ones. A remote file is opened afresh, since a server may not know the old description any more. unreadable
// says that it was found out by that: then the kernel may believe in the old lock still, and it is dropped first.
//
// Nobody may be releasing the lock meanwhile. It may block as long as the disk hangs.
func (l *Lock) Regain(unreadable bool) (*Lock, error) {
	o := l.files.begin("lock", l.path)
	defer l.files.end(o)
	fail := func(err error) (*Lock, error) { return nil, wrap(OpLock, l.path, err) }
	if l.mount == "" {
		if id, err := l.files.stat(o, l.path); err != nil {
			return fail(err)
		} else if id != l.id {
			return fail(errReplaced)
		}
		cmd := unix.F_OFD_SETLK
		if l.kind == POSIX {
			cmd = unix.F_SETLK
		}
		if errno := o.setLock(int(l.fd), cmd, lockType(l.mode)); errno != 0 {
			return nil, l.lockError(errno, nil)
		}
		return l, nil
	}
	if l.shares != nil {
		return fail(errors.New("it is the lock of several resources"))
	}
	if unreadable && !l.id.Block && l.holder == nil {
		if _, err := l.files.pool.call(o, l.mount, nil, request{op: workUnlock, fds: []int{int(l.fd)}}); err != nil {
			return fail(err)
		}
	}
	fresh, err := l.files.Lock(l.path, l.mode, false, nil)
	if err != nil {
		return nil, err
	}
	if fresh.id != l.id {
		_ = fresh.Release("", nil) // it removes nothing
		return fail(errReplaced)
	}
	return fresh, nil
}

var errReplaced = errors.New("another file is at its path")

// unlock is what Regain does first where a server has taken the lock away.
func (w *work) unlock(r request) reply {
	if len(r.fds) == 0 {
		return other(unix.EINVAL)
	}
	fd, err := lyingIn(r.fds[0])
	if err != nil {
		return other(cellErrno(err))
	}
	defer unix.Close(fd)
	w.setLock(fd, unix.F_OFD_SETLK, unix.F_UNLCK) // it fails where the server says what we know
	return reply{}
}
