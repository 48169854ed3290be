// SPDX-License-Identifier: LGPL-2.1-or-later

package lockspace

import (
	"fmt"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/internal/filelock"
	"virtlockd/internal/owner"
)

// Each lock that was adopted is looked at once, unless it was released meanwhile; one that was lost is reported.
func TestConfirm(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	o := f.number()
	const n = 200 // several batches
	for i := range n {
		f.want("acquire", f.acquire(f.touch(fmt.Sprint("disk", i)), 0, o), nil)
	}
	for _, r := range f.Table.spaces[""].resources {
		f.Table.adopted = append(f.Table.adopted, r)
	}
	set := func(fd int, kind int16) {
		t.Helper()
		lk := unix.Flock_t{Type: kind, Len: 1}
		if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lk); err != nil {
			t.Fatal(err)
		}
	}
	free, taken := f.path("disk7"), f.path("disk150")
	for _, path := range []string{free, taken} {
		fd, _ := f.Table.spaces[""].resources[path].lock.State()
		set(fd, unix.F_UNLCK)
	}
	other, err := unix.Open(taken, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(other)
	set(other, unix.F_WRLCK)
	f.want("release", f.release(f.path("disk1"), o), nil)

	var got []string
	f.Table.Confirm(func(path string, holder *owner.Owner, found filelock.Finding) {
		if holder != o {
			t.Errorf("%s: the holder is %v", path, holder)
		}
		got = append(got, path+" "+found.String())
	})
	if want := []string{taken + " lost"}; !slices.Equal(got, want) {
		t.Errorf("reported: %q, want %q", got, want)
	}
	if !f.kernelLocked(free) {
		t.Error("a lock that nobody had was not taken again")
	}
	if f.kernelLocked(f.path("disk1")) {
		t.Error("a lock that was released is held")
	}
	if f.Table.adopted != nil {
		t.Error("not all were looked at")
	}
}
