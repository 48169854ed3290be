// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"fmt"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"virtlockd/internal/vault"
)

// Lock is one held lock. It has one owner, who calls Release exactly once.
type Lock struct {
	files  *Files
	id     FileID
	path   string  // as given, for logs
	mount  string  // whom a worker works for; "" if it is direct
	holder *worker // whose process has the lock: only POSIX ones on remote files
	fd     int32   // the locked file; if it is remote, a cell that the file lies in
	mode   Mode
	kind   Kind
	// private: that cell is the Lock's own, not one that Store has put the file into.
	private bool
	weak    bool          // see Weak
	record  uint64        // the sum of the record that was written; 0: none, or it is not known
	shares  *atomic.Int32 // how many Locks share this one open file description; nil: it has it alone
}

// ID returns the identity of the locked file.
func (l *Lock) ID() FileID { return l.id }

// Kind returns the kind of the kernel's lock.
func (l *Lock) Kind() Kind { return l.kind }

// Remote reports whether workers work on the file, since it isn't on a known
// local file system. Then no descriptor of it is in this process.
func (l *Lock) Remote() bool { return l.mount != "" }

// Lock opens the file at path and locks its byte 0, without waiting for
// anybody who holds it. With create the file is made if it is missing (mode
// 0600 less the umask), and the lock is on the file that is at path once it
// is held: whoever removes a lease file locks it first. If such a file is empty, or says
// who held it, record is written to it, unless path is a symbolic link; nil: none.
//
// Errors are of type *Error: OpOpen with the errno of open(2), OpLock with
// ErrLocked or the errno of fcntl(2), OpStore or OpWorker.
func (f *Files) Lock(path string, mode Mode, create bool, record []byte) (*Lock, error) {
	o := f.begin("lock", path)
	defer f.end(o)
	abs, errno := f.absolute(path)
	if errno != 0 {
		return nil, &Error{OpOpen, path, errno}
	}
	l := &Lock{files: f, path: path, fd: -1, mode: mode}
	var (
		failed error
		device string
	)
	mount, ok, err := f.direct(o, abs, true, func(path string) (out outcome) {
		out, device, failed = l.lockDirect(o, path, create, record)
		return out
	})
	switch {
	case err != nil:
		failed = &Error{OpOpen, path, err}
	case !ok:
		if device != "" {
			mount = device
		}
		failed = l.lockRemote(o, mount, abs, create, record)
	case l.kind == POSIX:
		f.warnOnce(mount, "no open file description locks there; with POSIX locks a crash of this daemon gives them up")
	}
	if failed != nil {
		return nil, failed
	}
	return l, nil
}

// lockDirect tries it in this process. device names the block device that
// must not be opened here.
func (l *Lock) lockDirect(o *op, path string, create bool, record []byte) (out outcome, device string, err error) {
	dir, errno := o.openDir(path)
	if errno != 0 {
		return linkOrDone(errno), "", &Error{OpOpen, l.path, errno}
	}
	defer unix.Close(dir)
	for range 1000 {
		var fd int
		fd, out, device, err = l.openDirect(o, dir, create)
		if out != done || err != nil {
			return out, device, err
		}
		info, errno := o.fstat(fd)
		if errno != 0 {
			unix.Close(fd)
			return done, "", &Error{OpOpen, l.path, errno}
		}
		l.id = info.id
		if found, errno := l.take(o, fd, info); errno != 0 {
			return done, "", l.lockError(errno, found)
		}
		if create {
			// Whoever held the lock before may have removed the name.
			now, errno := o.statAt(dir)
			if errno != 0 || now.id != l.id {
				l.giveUp(o, nil, nil)
				continue
			}
			if !o.linked { // nothing is written to what a link leads to
				l.files.complainAbout(l.path, writeRecord(fd, now, record))
				if record != nil {
					l.record = sum(record)
				}
			}
		}
		return done, "", nil
	}
	return done, "", &Error{OpOpen, l.path, fmt.Errorf("it is replaced all the time: %w", unix.EAGAIN)}
}

// openDirect opens the file that is split in the scratch, in its directory.
func (l *Lock) openDirect(o *op, dir int, create bool) (fd int, out outcome, device string, err error) {
	var errno syscall.Errno
	flags := uintptr(0)
	if create {
		// A new one can't be a device, nor a link.
		flags = unix.O_CREAT
		if fd, errno = o.openAt(dir, unix.O_CREAT|unix.O_EXCL); errno == 0 {
			return fd, done, "", nil
		}
	}
	if !create || errno == unix.EEXIST {
		// To open a device may take for ever, so look first.
		var info fileInfo
		if info, errno = o.statAt(dir); errno == 0 {
			switch info.kind() {
			case unix.S_IFLNK:
				return -1, atLink, "", nil
			case unix.S_IFBLK:
				return -1, toWorker, deviceName(info.rdev), nil
			case unix.S_IFCHR:
				if unix.Major(info.rdev) != memMajor {
					return -1, toWorker, "", nil
				}
			}
			if l.files.posix.conflicts(info.id, l.mode) {
				l.id = info.id
				return -1, done, "", l.lockError(unix.EAGAIN, nil)
			}
		}
		if errno == 0 || create && errno == unix.ENOENT {
			fd, errno = o.openAt(dir, flags)
		}
	}
	switch errno {
	case 0:
		return fd, done, "", nil
	case unix.ELOOP:
		return -1, atLink, "", nil
	case unix.EAGAIN:
		return -1, toWorker, "", nil
	}
	return -1, done, "", &Error{OpOpen, l.path, errno}
}

// memMajor is the major number of /dev/null, /dev/zero and their like.
const memMajor = 1

func deviceName(rdev uint64) string {
	return fmt.Sprintf("block device %d:%d", unix.Major(rdev), unix.Minor(rdev))
}

// take locks fd. After an error fd is gone; record is what was found in it, if somebody else has it.
func (l *Lock) take(o *op, fd int, info fileInfo) (record []byte, errno syscall.Errno) {
	errno = o.setLock(fd, unix.F_OFD_SETLK, lockType(l.mode))
	switch errno {
	case 0:
		l.kind = OFD
	case unix.EINVAL:
		l.kind = POSIX
		record = readRecord(fd, info) // while fd is ours
		errno = l.files.posix.lock(&o.scratch, l.id, fd, l.mode)
	default:
		if refused(errno) {
			record = readRecord(fd, info)
		}
		unix.Close(fd)
	}
	if errno == 0 {
		l.fd = int32(fd)
	}
	return record, errno
}

func (l *Lock) lockError(errno syscall.Errno, record []byte) error {
	if refused(errno) {
		return &Error{OpLock, l.path, &LockedError{l.id, record}}
	}
	return &Error{OpLock, l.path, errno}
}

// giveUp gives up a direct lock. unlink, if not nil, is called before, while
// the lock is exclusive, or not at all: see Release. cell, if not nil, has the last copy of the
// descriptor.
func (l *Lock) giveUp(o *op, unlink func() error, cell *vault.Cell) (err error) {
	if l.kind == POSIX {
		err = l.files.posix.release(&o.scratch, l.id, int(l.fd), unlink)
	} else {
		if unlink != nil && o.setLock(int(l.fd), unix.F_OFD_SETLK, unix.F_WRLCK) == 0 {
			err = unlink()
		}
		// Explicitly, since another copy of the descriptor would keep it.
		o.setLock(int(l.fd), unix.F_OFD_SETLK, unix.F_UNLCK)
		if cell != nil {
			cell.Drop()
		}
		unix.Close(int(l.fd))
	}
	l.fd = -1
	return err
}

// Release gives the lock up, in any case; the error says what went wrong
// beside that, for the log. A lease file is emptied and removed on the way: what is
// at the path unlink (if not ""), if it is the locked file itself, regular and
// empty or a record, and nobody else holds it. The kernel is asked for an exclusive
// lock before that, also if it should have one: a lock that was lost may be somebody
// else's by now, and without his file the next one would get another one. If it is
// refused, nothing is removed.
//
// cell is the one that the last hold was stored in, nil if it was not. It is empty
// afterwards. In a process that dies in the midst of this, the cell still has the
// file until it is unlocked, so that the next one can release it again.
func (l *Lock) Release(unlink string, cell *vault.Cell) error {
	o := l.files.begin("release", l.path)
	defer l.files.end(o)
	if l.shares != nil && l.shares.Add(-1) > 0 {
		// The file or the cell: the kernel's lock is the others' too.
		if cell != nil {
			cell.Drop()
		}
		if l.mount == "" || l.private {
			unix.Close(int(l.fd))
		}
		l.fd = -1
		return nil
	}
	if cell != nil {
		cell.Word().Store(vault.Releasing)
	}
	if l.mount != "" {
		return l.releaseRemote(o, unlink, cell)
	}
	if unlink == "" {
		return l.giveUp(o, nil, cell)
	}
	return l.giveUp(o, func() error { return l.unlinkDirect(o, unlink) }, cell)
}

// unlinkDirect removes the lease file at path, or at least its record. The lock is exclusive.
func (l *Lock) unlinkDirect(o *op, path string) error {
	gone := false
	defer func() {
		if gone {
			return
		}
		// Even if it is somewhere else by now.
		if info, errno := o.fstat(int(l.fd)); errno == 0 {
			emptyRecord(int(l.fd), info, l.record)
		}
	}()
	abs, errno := l.files.absolute(path)
	if errno != 0 {
		return &Error{OpUnlink, path, errno}
	}
	// A link in the last place isn't our file, so it isn't followed.
	_, ok, err := l.files.direct(o, abs, false, func(path string) outcome {
		var dir int
		if dir, errno = o.openDir(path); errno != 0 {
			return linkOrDone(errno)
		}
		defer unix.Close(dir)
		var info fileInfo
		if info, errno = o.statAt(dir); errno == 0 {
			gone, errno = removeLease(int(l.fd), info, l.id, l.record, func() syscall.Errno { return o.unlinkAt(dir) })
		}
		return done
	})
	switch {
	case err != nil:
		return &Error{OpUnlink, path, err}
	case !ok:
		return &Error{OpUnlink, path, unix.EXDEV} // mounts changed: no name there is one of this file
	case errno != 0 && errno != unix.ENOENT:
		return &Error{OpUnlink, path, errno}
	}
	return nil
}
