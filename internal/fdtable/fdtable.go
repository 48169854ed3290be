// SPDX-License-Identifier: LGPL-2.1-or-later

// Package fdtable is about the kernel's table of this process's descriptors.
package fdtable

import (
	"bytes"
	"math"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// Size returns the size of the table, which no open descriptor is beyond.
func Size() int {
	status, err := os.ReadFile("/proc/self/status")
	if err == nil {
		for line := range bytes.Lines(status) {
			if size, ok := bytes.CutPrefix(line, []byte("FDSize:")); ok {
				if n, err := strconv.Atoi(string(bytes.TrimSpace(size))); err == nil {
					return n
				}
			}
		}
	}
	// Without /proc it may be as large as the limit of open files.
	return int(min(limit(), math.MaxInt32))
}

// Reserve makes the table large enough for n descriptors, or for as many as may be open, in one step; the kernel takes 8 bytes for each.
//
// Else it grows when it is full, to twice its size. As this process has several threads, the kernel waits each time until all of them
// have seen that (synchronize_rcu in its fs/file.c): ten milliseconds or more, and whoever opens anything beyond the old size waits with it.
// So this is called while there is room, on a goroutine that may wait.
func Reserve(n int) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return // it grows as it is needed, if it may
	}
	defer unix.Close(fd)
	last, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, int(min(uint64(n), limit())-1))
	if err == nil {
		unix.Close(last)
	}
}

// Room tells whether so many descriptors can be opened now.
func Room(n int) bool {
	opened := make([]int, 0, n)
	defer func() {
		for _, fd := range opened {
			unix.Close(fd)
		}
	}()
	for range n {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
		if err != nil {
			return false
		}
		opened = append(opened, fd)
	}
	return true
}

// limit returns how many descriptors may be open.
func limit() uint64 {
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) != nil {
		return 1
	}
	return max(l.Cur, 1)
}
