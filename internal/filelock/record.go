// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"bytes"
	"hash/maphash"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/lease"
)

// A lease file is empty or has a record of its holder in it: see package lease. Nothing here is done to any other file,
// and no failure here costs a lock.

// readRecord returns the record in an open file; nil: there is none.
func readRecord(fd int, info fileInfo) []byte {
	var buf [lease.Max + 1]byte // more than a record: then it is none
	b := readLease(fd, info, &buf)
	if _, ok := lease.Parse(b); !ok {
		return nil
	}
	return append([]byte(nil), b...)
}

// readLease reads what a lease file has. Only small regular files are read, which can't block for ever where the file is not remote.
func readLease(fd int, info fileInfo, buf *[lease.Max + 1]byte) []byte {
	if info.kind() != unix.S_IFREG || info.size == 0 || info.size > lease.Max {
		return nil
	}
	for {
		n, err := unix.Pread(fd, buf[:], 0)
		if err != unix.EINTR {
			return buf[:max(n, 0)]
		}
	}
}

// recordSeed makes it impossible to guess which other content has the sum of a record.
var recordSeed = maphash.MakeSeed()

// sum is what a record is told by that this process itself has written, so that it need not be parsed again. Never 0.
func sum(record []byte) uint64 { return maphash.Bytes(recordSeed, record) | 1 }

// hasRecord tells whether a file has a record in it, and nothing else. own is the sum of the one that was written; 0: it is not known.
func hasRecord(fd int, info fileInfo, own uint64) bool {
	var buf [lease.Max + 1]byte
	b := readLease(fd, info, &buf)
	if len(b) == 0 {
		return false
	}
	if own != 0 && sum(b) == own {
		return true
	}
	_, ok := lease.Parse(bytes.Clone(b)) // else buf would not lie on the stack
	return ok
}

// writeRecord says in a lease file, which is at its path and was locked before info was asked for, who holds it. A record that is
// there is of a host that has died. A shared lease has none: nil.
func writeRecord(fd int, info fileInfo, record []byte) syscall.Errno {
	switch {
	case info.kind() != unix.S_IFREG:
		return 0
	case info.size > 0:
		if !hasRecord(fd, info, 0) {
			return 0
		}
		if errno := truncate(fd); errno != 0 {
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

// emptyRecord removes the record from a locked file, if it has one.
func emptyRecord(fd int, info fileInfo, own uint64) {
	if hasRecord(fd, info, own) {
		truncate(fd)
	}
}

// removeLease removes the name of a locked file, if what it leads to is that file and a lease: empty or with a record. Only a file that
// then has other names, or that keeps this one, has to be emptied. info is of the name.
func removeLease(fd int, info fileInfo, locked FileID, own uint64, unlink func() syscall.Errno) (gone bool, errno syscall.Errno) {
	if info.id != locked || info.kind() != unix.S_IFREG || info.size > 0 && !hasRecord(fd, info, own) {
		return false, 0
	}
	errno = unlink()
	return errno == 0 && info.links == 1, errno
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
