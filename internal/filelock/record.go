// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/lease"
)

// A lease file is empty or has a record of its holder in it: see package lease. Nothing here is done to any other file,
// and no failure here costs a lock.

// readRecord returns the record in an open file; nil: there is none. Only small regular files are read, which can't block for
// ever where the file is not remote.
func readRecord(fd int, info fileInfo) []byte {
	if info.kind() != unix.S_IFREG || info.size == 0 || info.size > lease.Max {
		return nil
	}
	var b [lease.Max + 1]byte // more than a record: then it is none
	n := 0
	errno := retry(func() (err error) { n, err = unix.Pread(fd, b[:], 0); return err })
	if errno != 0 || n <= 0 {
		return nil
	}
	if _, ok := lease.Parse(b[:n]); !ok {
		return nil
	}
	return append([]byte(nil), b[:n]...)
}

// writeRecord says in a lease file, which is at its path and was locked before info was asked for, who holds it. A record that is
// there is of a host that has died. A shared lease has none: nil.
func writeRecord(fd int, info fileInfo, record []byte) syscall.Errno {
	switch {
	case info.kind() != unix.S_IFREG:
		return 0
	case info.size > 0:
		if ours, errno := emptyRecord(fd, info); !ours || errno != 0 {
			return errno
		}
	}
	if record == nil {
		return 0
	}
	n := 0
	errno := retry(func() (err error) { n, err = unix.Pwrite(fd, record, 0); return err })
	if errno == 0 && n < len(record) {
		errno = unix.ENOSPC
	}
	if errno != 0 && n > 0 {
		truncate(fd) // part of a record is none, and the file would not be a lease any more
	}
	return errno
}

// emptyRecord removes the record from a locked file. ours says that it had one.
func emptyRecord(fd int, info fileInfo) (ours bool, errno syscall.Errno) {
	if readRecord(fd, info) == nil {
		return false, 0
	}
	return true, truncate(fd)
}

func truncate(fd int) syscall.Errno { return retry(func() error { return unix.Ftruncate(fd, 0) }) }

// complainAbout tells that a lease has no record, once a minute at most: on a full disk that is so of each.
func (f *Files) complainAbout(path string, errno syscall.Errno) {
	if errno == 0 {
		return
	}
	now := time.Now()
	f.mu.Lock()
	due := now.Sub(f.complained) >= time.Minute
	if due {
		f.complained = now
	}
	f.mu.Unlock()
	if due {
		f.log.Warn("a lease is held, but its file can't say by whom; other hosts can't tell who holds it", "path", path, "error", errno)
	}
}
