// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// benchDirs are an ordinary directory and one in memory.
func benchDirs(b *testing.B, bench func(b *testing.B, dir string)) {
	b.Run("tmp", func(b *testing.B) { bench(b, b.TempDir()) })
	b.Run("shm", func(b *testing.B) {
		dir, err := os.MkdirTemp("/dev/shm", "filelock")
		if err != nil {
			b.Skip(err)
		}
		defer os.RemoveAll(dir)
		bench(b, dir)
	})
}

// BenchmarkBare is the least that can be done: open, fstat, lock, unlock, close.
func BenchmarkBare(b *testing.B) {
	benchDirs(b, func(b *testing.B, dir string) {
		path := makeFile(b, dir+"/disk", "data")
		var st unix.Stat_t
		for b.Loop() {
			fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				b.Fatal(err)
			}
			unix.Fstat(fd, &st)
			unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Len: 1})
			unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_UNLCK, Len: 1})
			unix.Close(fd)
		}
	})
}

func benchLock(b *testing.B, f *Files, path string, create bool, record []byte) {
	b.ReportAllocs()
	unlink := ""
	if create {
		unlink = path
	}
	for b.Loop() {
		l, err := f.Lock(path, Exclusive, create, record)
		if err != nil {
			b.Fatal(err)
		}
		l.Release(unlink, nil)
	}
}

func BenchmarkLock(b *testing.B) {
	benchDirs(b, func(b *testing.B, dir string) {
		benchLock(b, newFiles(b, Config{}), makeFile(b, dir+"/disk", "data"), false, nil)
	})
}

func BenchmarkLockByLink(b *testing.B) {
	benchDirs(b, func(b *testing.B, dir string) {
		makeFile(b, dir+"/disk", "data")
		os.Symlink(dir, dir+"/link")
		benchLock(b, newFiles(b, Config{}), dir+"/link/disk", false, nil)
	})
}

// BenchmarkBareLease makes and removes the file too.
func BenchmarkBareLease(b *testing.B) {
	benchDirs(b, func(b *testing.B, dir string) {
		path := dir + "/lease"
		var st unix.Stat_t
		for b.Loop() {
			fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_CREAT, 0o600)
			if err != nil {
				b.Fatal(err)
			}
			unix.Fstat(fd, &st)
			unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Len: 1})
			unix.Stat(path, &st)
			unix.Unlink(path)
			unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_UNLCK, Len: 1})
			unix.Close(fd)
		}
	})
}

func BenchmarkLease(b *testing.B) {
	benchDirs(b, func(b *testing.B, dir string) {
		benchLock(b, newFiles(b, Config{}), dir+"/lease", true, nil)
	})
}

// BenchmarkLeaseWithRecord is what an exclusive holder pays.
func BenchmarkLeaseWithRecord(b *testing.B) {
	record := newRecord("a-domain-of-usual-length")
	benchDirs(b, func(b *testing.B, dir string) {
		benchLock(b, newFiles(b, Config{}), dir+"/lease", true, record)
	})
}

// BenchmarkBareRecord is the least that a record costs: to write it.
func BenchmarkBareRecord(b *testing.B) {
	record := newRecord("a-domain-of-usual-length")
	benchDirs(b, func(b *testing.B, dir string) {
		path := dir + "/lease"
		for b.Loop() {
			fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_CREAT, 0o600)
			if err != nil {
				b.Fatal(err)
			}
			unix.Pwrite(fd, record, 0)
			unix.Unlink(path)
			unix.Close(fd)
		}
	})
}

// BenchmarkBareEmpty is that without a record.
func BenchmarkBareEmpty(b *testing.B) {
	benchDirs(b, func(b *testing.B, dir string) {
		path := dir + "/lease"
		for b.Loop() {
			fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_CREAT, 0o600)
			if err != nil {
				b.Fatal(err)
			}
			unix.Unlink(path)
			unix.Close(fd)
		}
	})
}

func BenchmarkWorker(b *testing.B) {
	benchDirs(b, func(b *testing.B, dir string) {
		f := newFiles(b, Config{})
		f.openat2 = false
		benchLock(b, f, makeFile(b, dir+"/disk", "data"), false, nil)
	})
}

func BenchmarkMounts(b *testing.B) {
	f := newFiles(b, Config{})
	for b.Loop() {
		points, err := f.mounts.get()
		if err != nil {
			b.Fatal(err)
		}
		points.find("/var/lib/libvirt/images/disk.qcow2")
	}
}
