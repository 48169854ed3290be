// SPDX-License-Identifier: LGPL-2.1-or-later

package host

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"virtlockd/internal/lease"
)

// Lock is one line of /proc/locks.
type Lock struct {
	Kind       string // POSIX or OFDLCK
	Type       string // READ or WRITE
	PID        int    // -1 for OFDLCK
	Start, End string
}

// fileID is how /proc/locks names a file: device and inode.
type fileID struct {
	major, minor uint32
	inode        uint64
}

// Locks returns the record locks on the file at path (in the namespace, a symbolic link is not followed) that
// are the daemon's: POSIX ones of its process, and open file description locks, which belong to no process; the
// tests take none of that kind. Several locks of the same type and range count as one.
func (h *Host) Locks(d *Daemon, path string) []Lock {
	h.t.Helper()
	out, err := h.LocksOf(d, path)
	if err != nil {
		h.t.Fatalf("locks of %s: %v", path, err)
	}
	return out
}

// LocksOf is Locks for a file that may not be there.
func (h *Host) LocksOf(d *Daemon, path string) ([]Lock, error) {
	all, err := h.locks(path)
	if err != nil {
		return nil, err
	}
	var out []Lock
	for _, l := range all {
		if (l.Kind == "OFDLCK" || l.PID == d.PID()) && !slices.Contains(out, l) {
			out = append(out, l)
		}
	}
	return out, nil
}

func (h *Host) locks(path string) ([]Lock, error) {
	fi, err := os.Lstat(h.Path(path))
	if err != nil {
		return nil, err
	}
	st := fi.Sys().(*syscall.Stat_t)
	want := fileID{unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino}
	// The kernel counts on from where the last read ended. Where others have unlocked something meanwhile, it passes over a lock
	// that is held all the time, so once is not enough.
	var before []Lock
	for first := true; ; first = false {
		b, err := os.ReadFile("/proc/locks")
		if err != nil {
			return nil, err
		}
		now, err := parseLocks(string(b), want)
		if err != nil || !first && slices.Equal(now, before) {
			return now, err
		}
		before = now
	}
}

// parseLocks reads lines such as
//
//	12: OFDLCK ADVISORY  WRITE -1 00:2f:17 0 0
//
// with the device in hexadecimal. Lines with an arrow are waiters, not locks.
func parseLocks(text string, want fileID) ([]Lock, error) {
	var out []Lock
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 8 || f[1] == "->" || f[1] != "POSIX" && f[1] != "OFDLCK" {
			continue
		}
		id := strings.Split(f[5], ":")
		if len(id) != 3 {
			return nil, fmt.Errorf("/proc/locks has the line %q", line)
		}
		major, err1 := strconv.ParseUint(id[0], 16, 32)
		minor, err2 := strconv.ParseUint(id[1], 16, 32)
		inode, err3 := strconv.ParseUint(id[2], 10, 64)
		pid, err4 := strconv.Atoi(f[4])
		if err1 != nil || err2 != nil || err3 != nil || err4 != nil {
			return nil, fmt.Errorf("/proc/locks has the line %q", line)
		}
		if (fileID{uint32(major), uint32(minor), inode}) == want {
			out = append(out, Lock{Kind: f[1], Type: f[3], PID: pid, Start: f[6], End: f[7]})
		}
	}
	return out, nil
}

// Free tells whether another host or process could lock byte 0 of a file now, exclusively or shared, without
// taking the lock. A file that does not exist is free. Symbolic links are followed.
func (h *Host) Free(path string, exclusive bool) bool {
	h.t.Helper()
	free := true
	h.Must(func() error {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err == unix.ENOENT {
			return nil
		}
		if err != nil {
			return fmt.Errorf("open %s: %w", path, err)
		}
		// The test process has no POSIX locks that this close could drop.
		defer unix.Close(fd)
		l := unix.Flock_t{Type: unix.F_RDLCK, Whence: unix.SEEK_SET, Start: 0, Len: 1}
		if exclusive {
			l.Type = unix.F_WRLCK
		}
		if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &l); err != nil {
			return fmt.Errorf("F_OFD_GETLK on %s: %w", path, err)
		}
		free = l.Type == unix.F_UNLCK
		return nil
	})
	return free
}

// SizeWithoutRecord returns the size of a file, 0 if a lease's holder is told in it: only while the daemon has it exclusively.
func (h *Host) SizeWithoutRecord(d *Daemon, path string, fi os.FileInfo) int64 {
	if !fi.Mode().IsRegular() || fi.Size() == 0 || fi.Size() > lease.Max {
		return fi.Size()
	}
	content, err := os.ReadFile(h.Path(path))
	if _, ok := lease.Parse(content); err != nil || !ok {
		return fi.Size()
	}
	locks, _ := h.LocksOf(d, path)
	if len(locks) != 1 || locks[0].Type != "WRITE" {
		return fi.Size()
	}
	return 0
}
