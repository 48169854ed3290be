// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"virtlockd/internal/vault"
)

// lockRemote has a worker open and lock the file. What the worker opened goes
// into a cell and never into the descriptor table of this process: its
// close would ask the server, and could hang, at exec and exit too.
func (l *Lock) lockRemote(o *op, mount, path string, create bool, record []byte) error {
	pool := &l.files.pool
	if err := pool.takePlace(o, mount, false); err != nil {
		return wrap(OpWorker, l.path, err)
	}
	defer pool.freePlace(mount)
	return l.lockThere(o, mount, path, create, record)
}

// lockThere is lockRemote for who has a place on mount.
func (l *Lock) lockThere(o *op, mount, path string, create bool, record []byte) error {
	pool := &l.files.pool
	cell, err := vault.NewCell()
	if err != nil {
		return &Error{OpStore, l.path, fmt.Errorf("make a socket for the locked file: %w", err)}
	}
	r := request{op: workLock, mode: l.mode, create: create, record: record, path: path, fds: []int{cell.FD()}}
	answer, err := pool.callHere(o, mount, nil, r)
	if err == nil {
		l.files.complainAbout(l.path, answer.recordErrno)
	}
	switch {
	case err == nil && answer.posix:
		cell.Close()
		l.id, l.mount, l.kind, l.holder = answer.id, mount, POSIX, answer.holder
		l.files.warnOnce(mount, "no open file description locks there; each POSIX lock needs a process of its own, and a crash of this daemon gives them up")
		return nil
	case err == nil:
		l.id, l.mount, l.fd, l.private = answer.id, mount, int32(cell.FD()), true
		return nil
	}
	switch answer.step {
	case stepNone: // no answer
		if errors.Is(err, errDied) {
			// It may have stored the file before. If this fails too, closing
			// the cell gives the lock up.
			_, _ = pool.callHere(o, mount, nil, request{op: workRelease, fds: []int{cell.FD()}})
		}
		err = wrap(OpWorker, l.path, err)
	case stepOpen:
		err = &Error{OpOpen, l.path, err}
	case stepStore:
		if answer.errno == unix.ETOOMANYREFS {
			err = fmt.Errorf("too many descriptors in flight for this user; raise RLIMIT_NOFILE or give CAP_SYS_RESOURCE: %w", err)
		}
		err = &Error{OpStore, l.path, err}
	default:
		l.id = answer.id
		err = l.lockError(answer.errno, answer.record)
	}
	cell.Close()
	return err
}

// releaseRemote is Release for what lies in a cell or is held by a worker.
func (l *Lock) releaseRemote(o *op, unlink string, cell *vault.Cell) error {
	var err error
	if unlink != "" {
		abs, errno := l.files.absolute(unlink)
		if errno != 0 {
			err = &Error{OpUnlink, unlink, errno}
		}
		unlink = abs
	}
	r := request{op: workRelease, path: unlink}
	if l.holder == nil {
		r.fds = []int{int(l.fd)}
	}
	if cell != nil {
		r.busy = cell.Word()
	}
	_, failed := l.files.pool.call(o, l.mount, l.holder, r)
	if l.holder == nil {
		if errors.Is(failed, errDied) {
			// Once more, with another worker. If the cell is empty by now, the
			// first one was through.
			_, failed = l.files.pool.call(o, l.mount, nil, r)
		}
		// Should the file still be in there, then this gives the lock up.
		vault.At(int(l.fd)).Empty()
		if l.private {
			unix.Close(int(l.fd))
		}
		l.fd = -1
	}
	if failed != nil {
		err = wrap(OpUnlink, unlink, failed)
	}
	return err
}
