// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"errors"

	"golang.org/x/sys/unix"

	"virtlockd/internal/state"
	"virtlockd/internal/vault"
)

// errPOSIX says why a lock cannot be stored.
var errPOSIX = errors.New("a POSIX record lock ends with the process: its file system or kernel refuses better ones")

// Store puts the locked file into a cell, with the record of a hold that lacks only what the file is, and the owner's
// pidfd if it is not state.NoFD: the lock then lives as long as the cell. A lock has one cell for each hold. Stored is to follow.
func (l *Lock) Store(cell *vault.Cell, record []byte, pidfd int32) error {
	if l.kind == POSIX {
		return &Error{OpStore, l.path, errPOSIX}
	}
	_, file := l.State()
	vault.SetFile(record, file)
	var fds []int
	if pidfd != state.NoFD {
		fds = append(fds, int(pidfd))
	}
	if l.mount == "" {
		if err := cell.Put(record, append(fds, int(l.fd))...); err != nil {
			return &Error{OpStore, l.path, err}
		}
		return nil
	}
	if err := l.storeRemote(cell, record, fds); err != nil {
		return &Error{OpStore, l.path, err}
	}
	return nil
}

// Stored says that Store has put the file into this cell: a remote lock that had a cell of its own needs that no more.
func (l *Lock) Stored(cell *vault.Cell) {
	if !l.private {
		return
	}
	own := int(l.fd)
	l.fd, l.private = int32(cell.FD()), false
	go unix.Close(own) // older kernels look through all sockets in flight for that, and the caller has others wait
}

func (l *Lock) storeRemote(cell *vault.Cell, record []byte, fds []int) error {
	if l.id.Block {
		// To close one of several descriptors of a block device asks nobody; a file system may be asked (flush in
		// the kernel's struct file_operations).
		file, err := lyingIn(int(l.fd))
		if err != nil {
			return err
		}
		defer unix.Close(file)
		return cell.Put(record, append(fds, file)...)
	}
	o := l.files.begin("store", l.path)
	defer l.files.end(o)
	r := request{op: workShare, path: string(record), fds: append([]int{int(l.fd), cell.FD()}, fds...), busy: cell.Word()}
	_, err := l.files.pool.call(o, l.mount, nil, r)
	cell.Word().Store(0)
	return err
}

// Forget takes one of several holds out of its cell, and tells whether the cell is empty now. other is the cell of another hold,
// nil if that was not stored: if the file lies nowhere else, it stays where it is.
func (l *Lock) Forget(cell, other *vault.Cell) bool {
	if l.mount != "" && !l.private && int(l.fd) == cell.FD() {
		if other == nil {
			return false
		}
		l.fd = int32(other.FD())
	}
	cell.Drop()
	return true
}

// In tells whether a lock that was taken over, and that is not said to lie in the cell of a hold yet, lies in this one.
func (l *Lock) In(cell *vault.Cell) bool {
	if l.mount == "" || !l.private {
		return false
	}
	var own, other unix.Stat_t
	return unix.Fstat(int(l.fd), &own) == nil && unix.Fstat(cell.FD(), &other) == nil && own.Dev == other.Dev && own.Ino == other.Ino
}

// LiesIn says that the file of a remote lock lies in this cell, that of a hold.
func (l *Lock) LiesIn(cell *vault.Cell) {
	if l.mount == "" {
		return
	}
	if int(l.fd) != cell.FD() {
		unix.Close(int(l.fd)) // another descriptor of that cell, or one that is not the last with the file in it
	}
	l.fd, l.private = int32(cell.FD()), false
}

// LeaveCell moves the file of a remote lock to a cell of its own, if it lies in that of a hold, which is about to be closed.
func (l *Lock) LeaveCell() error {
	if l.private || l.kind == POSIX {
		return nil
	}
	fail := func(err error) error { return &Error{OpStore, l.path, err} }
	file, err := lyingIn(int(l.fd))
	if err != nil {
		return fail(err)
	}
	defer unix.Close(file)
	own, err := vault.NewCell()
	if err != nil {
		return fail(err)
	}
	if err := own.Put([]byte{1}, file); err != nil {
		own.Close()
		return fail(err)
	}
	l.fd, l.private = int32(own.FD()), true
	return nil
}
