// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"log/slog"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// A descriptor that nobody knows of stays open, for us and the next binary, and no child gets it.
func TestStrays(t *testing.T) {
	t.Parallel()
	fd, err := unix.MemfdCreate("stray", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	inherited := make(inheritance, fd+1)
	inherited[fd] = true
	d := &daemon{log: slog.New(slog.DiscardHandler)}
	d.dismissStrays(inherited)
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("flags %d, %v: a child would get it", flags, err)
	}
	if !slices.Contains(d.unknown, int32(fd)) {
		t.Errorf("strays %v, want %d", d.unknown, fd)
	}
}
