// SPDX-License-Identifier: LGPL-2.1-or-later

package vault

import (
	"testing"

	"golang.org/x/sys/unix"
)

// BenchmarkRecover opens a vault with a thousand holds, as the next process does.
func BenchmarkRecover(b *testing.B) {
	v := newVault(b)
	defer v.GiveUp()
	fd, _ := lockedFile(b, "disk")
	defer unix.Close(fd)
	for i := range 1000 {
		storeHold(b, v, hold(i), fd)
	}
	for b.Loop() {
		next := reopened(b, v)
		found, err := next.Contents()
		if err != nil || len(found) != 1000 {
			b.Fatalf("%d records, %v", len(found), err)
		}
		for i := range found {
			fds, err := found[i].Descriptors()
			if err != nil {
				b.Fatal(err)
			}
			unix.Close(fds[0])
		}
		closeTable(next)
	}
}
