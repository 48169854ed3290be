// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// posixTable makes POSIX record locks (F_SETLK) behave like OFD locks within
// this process, for file systems that refuse OFD locks. POSIX locks know only
// the process: a second one on the same file is granted at once, and all of
// them go when any descriptor of the file is closed. So the table decides
// about conflicts itself, and a descriptor is closed only while nothing is
// locked; until then it is parked.
type posixTable struct {
	used  atomic.Bool // ever
	mu    sync.Mutex
	files map[FileID]*posixFile
}

type posixFile struct {
	shared    int           // how many hold it shared
	exclusive bool          // one holds it exclusively
	parked    []int         // to be closed when the lock goes
	busy      chan struct{} // closed when the one who changes the kernel's lock is done; nil: nobody does
}

// conflicts reports whether a lock of that mode would surely be refused. It is
// asked before the file is opened, so that refused callers park nothing.
func (t *posixTable) conflicts(id FileID, mode Mode) bool {
	if !t.used.Load() {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	file := t.files[id]
	return file != nil && (file.exclusive || file.shared > 0 && mode == Exclusive)
}

// enter waits until nobody else changes the file's lock in the kernel, and
// returns with the mutex held.
func (t *posixTable) enter(id FileID) *posixFile {
	t.mu.Lock()
	for {
		file := t.files[id]
		if file == nil {
			file = &posixFile{}
			if t.files == nil {
				t.files = map[FileID]*posixFile{}
			}
			t.files[id] = file
		}
		if file.busy == nil {
			return file
		}
		wait := file.busy
		t.mu.Unlock()
		<-wait
		t.mu.Lock()
	}
}

// change runs do without the mutex, and nobody else's change meanwhile.
func (t *posixTable) change(file *posixFile, do func()) {
	file.busy = make(chan struct{})
	t.mu.Unlock()
	do()
	t.mu.Lock()
	close(file.busy)
	file.busy = nil
}

func (t *posixTable) leave(id FileID, file *posixFile) {
	if file.shared == 0 && !file.exclusive {
		delete(t.files, id)
	}
	t.mu.Unlock()
}

// lock takes the lock on fd, an open descriptor of the file id. After an
// error, fd belongs to the table.
func (t *posixTable) lock(s *scratch, id FileID, fd int, mode Mode) (errno syscall.Errno) {
	t.used.Store(true)
	file := t.enter(id)
	defer t.leave(id, file)
	switch {
	case file.exclusive || file.shared > 0 && mode == Exclusive:
		file.parked = append(file.parked, fd)
		return unix.EAGAIN
	case file.shared > 0:
		file.shared++
		return 0
	}
	t.change(file, func() {
		if errno = s.setLock(fd, unix.F_SETLK, lockType(mode)); errno != 0 {
			unix.Close(fd)
		}
	})
	if errno == 0 {
		file.exclusive = mode == Exclusive
		if mode == Shared {
			file.shared = 1
		}
	}
	return errno
}

// release gives up one lock and fd. If it is the last one, and exclusive still or
// can be made so, unlink (which may be nil) is called before.
func (t *posixTable) release(s *scratch, id FileID, fd int, unlink func() error) (err error) {
	file := t.enter(id)
	defer t.leave(id, file)
	if file.shared > 1 {
		file.shared--
		file.parked = append(file.parked, fd)
		return nil
	}
	t.change(file, func() {
		if unlink != nil && s.setLock(fd, unix.F_SETLK, unix.F_WRLCK) == 0 {
			err = unlink()
		}
		s.setLock(fd, unix.F_SETLK, unix.F_UNLCK)
		unix.Close(fd)
		for _, other := range file.parked {
			unix.Close(other)
		}
	})
	file.parked, file.shared, file.exclusive = nil, 0, false
	return err
}
