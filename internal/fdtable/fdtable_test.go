// SPDX-License-Identifier: LGPL-2.1-or-later

package fdtable

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func open(t *testing.T) int {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(files)
}

// The table is as large as it was asked for, within the limit of open files, and nothing is left open.
func TestReserve(t *testing.T) {
	before := open(t)
	size := Size()
	if size < before {
		t.Fatalf("the table's size is %d, and %d descriptors are open", size, before)
	}
	Reserve(2 * size)
	if now := Size(); now < 2*size {
		t.Errorf("the table's size is %d, want %d", now, 2*size)
	}
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	low := was
	low.Cur = uint64(4 * size)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
			t.Error(err)
		}
	}()
	if n := int(low.Cur) - (before - 1); !Room(n) || Room(n+1) { // open has counted its own
		t.Errorf("there is no room for %d, or for one more", n)
	}
	Reserve(1 << 30)
	if now := Size(); now != 4*size {
		t.Errorf("at a limit of %d the table's size is %d", low.Cur, now)
	}
	if n := open(t); n != before {
		t.Errorf("%d descriptors are open, there were %d", n, before)
	}
}

// Where nothing more can be opened, nothing happens.
func TestReserveFull(t *testing.T) {
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	size := Size()
	none := was
	none.Cur = 0
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	Reserve(2 * size)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if now := Size(); now != size {
		t.Errorf("the table's size is %d, it was %d", now, size)
	}
}
