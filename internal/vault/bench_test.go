// SPDX-License-Identifier: LGPL-2.1-or-later

package vault

import (
	"testing"
	"time"

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

// BenchmarkShrink gives up what a peak of ten thousand cells has left, of which each hundredth is in use.
func BenchmarkShrink(b *testing.B) {
	fd, _ := lockedFile(b, "disk")
	defer unix.Close(fd)
	var last []*Cell
	for b.Loop() {
		b.StopTimer()
		v := newVault(b)
		for i := range 10000 {
			last = append(last, storeHold(b, v, hold(i), fd))
		}
		for i, c := range last {
			if i%100 != 0 {
				v.Release(c)
			}
		}
		last = last[:0]
		v.unneeded()
		b.StartTimer()
		begin := time.Now()
		retired, err := v.retire()
		if err != nil || len(retired) == 0 {
			b.Fatalf("%d cells, %v", len(retired), err)
		}
		b.ReportMetric(float64(time.Since(begin).Microseconds()), "us/turn")
		for _, c := range retired {
			c.Close()
		}
		b.StopTimer()
		v.GiveUp()
		b.StartTimer()
	}
}
