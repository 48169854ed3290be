// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestLockExcludesOthers(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, f *Files) {
		path := makeFile(t, t.TempDir()+"/disk", "data")
		other := startRole(t, "locker")

		l := mustLock(t, f, path, Exclusive, false)
		for _, kind := range []string{"posix", "ofd"} {
			other.want(refusedText, kind, "read", path)
			other.want(refusedText, kind, "write", path)
		}
		mustRelease(t, l, "")

		l = mustLock(t, f, path, Shared, false)
		other.want(refusedText, "posix", "write", path)
		other.want("ok", "posix", "read", path)
		mustRelease(t, l, "")
		if _, err := f.Lock(path, Exclusive, false, nil); !errors.Is(err, ErrLocked) {
			t.Errorf("while another process holds it: %v", err)
		}
		other.want("ok", "close", path)
		mustRelease(t, mustLock(t, f, path, Exclusive, false), "")
		other.want("ok", "ofd", "write", path)
		if _, err := f.Lock(path, Shared, false, nil); !errors.Is(err, ErrLocked) {
			t.Errorf("while another process holds it: %v", err)
		}
		if data, err := os.ReadFile(path); string(data) != "data" || err != nil {
			t.Errorf("the file has now %q, %v", data, err)
		}
	})
}

func TestLockKnowsOtherNames(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, f *Files) {
		dir := t.TempDir()
		path := makeFile(t, dir+"/disk", "data")
		for _, err := range []error{
			os.Link(path, dir+"/hard"), os.Symlink("disk", dir+"/relative"), os.Symlink(path, dir+"/absolute"),
			os.Mkdir(dir+"/sub", 0o700), os.Symlink("../sub", dir+"/sub/loop"), os.Symlink(dir+"/sub/loop/../disk", dir+"/far"),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}
		names := []string{"/disk", "/hard", "/relative", "/absolute", "/far", "//./disk", "/sub/../disk", "/sub/loop/loop/../hard"}
		for _, name := range names {
			l := mustLock(t, f, dir+name, Exclusive, false)
			for _, other := range names {
				if _, err := f.Lock(dir+other, Shared, false, nil); !errors.Is(err, ErrLocked) {
					t.Errorf("%s while %s is locked: %v", other, name, err)
				}
				if id, err := f.Stat(dir + other); id != l.ID() || err != nil {
					t.Errorf("%s is %v, %v; want %v", other, id, err, l.ID())
				}
			}
			mustRelease(t, l, "")
		}
		first := mustLock(t, f, dir+"/disk", Shared, false)
		second := mustLock(t, f, dir+"/hard", Shared, false)
		mustRelease(t, first, "")
		if _, err := f.Lock(path, Exclusive, false, nil); !errors.Is(err, ErrLocked) {
			t.Errorf("while one of two sharers is left: %v", err)
		}
		mustRelease(t, second, "")
		mustRelease(t, mustLock(t, f, path, Exclusive, false), "")
	})
}

// Links among local files are followed without a worker.
func TestLinksStayDirect(t *testing.T) {
	t.Parallel()
	f := newFiles(t, Config{})
	dir := t.TempDir()
	makeFile(t, mkdir(t, dir+"/a/b")+"/disk", "")
	mkdir(t, dir+"/c/d")
	for name, target := range map[string]string{
		"/up": "a/../a/b/disk", "/c/d/far": "../../a/b/disk", "/c/d/dir": "../..//a/b", "/c/own": "d/far", "/absolute": dir + "/c/d/dir",
	} {
		if err := os.Symlink(target, dir+name); err != nil {
			t.Fatal(err)
		}
	}
	for path, direct := range map[string]bool{
		"/c/d/far": true, "/c/d/dir/disk": true, "/c/own": true, "/absolute/disk": true,
		"/up": false, "/c/../a/b/disk": false, // what ".." means there, the kernel has to say
	} {
		l := mustLock(t, f, dir+path, Exclusive, false)
		if l.Remote() == direct {
			t.Errorf("%s: remote %t", path, l.Remote())
		}
		mustRelease(t, l, "")
	}
}

func TestLockErrors(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, f *Files) {
		dir := t.TempDir()
		makeFile(t, dir+"/file", "")
		os.Symlink("loop", dir+"/loop")
		os.Symlink("nowhere", dir+"/dangling")
		long := make([]byte, 300)
		for i := range long {
			long[i] = 'x'
		}
		deep := dir
		for len(deep) < 5000 {
			deep += "/x"
		}
		for _, test := range []struct {
			path   string
			create bool
			want   error
		}{
			{"", false, unix.ENOENT},
			{"", true, unix.ENOENT},
			{dir + "/missing", false, unix.ENOENT},
			{dir + "/missing/file", true, unix.ENOENT},
			{dir + "/file/below", true, unix.ENOTDIR},
			{dir + "/file/", false, unix.ENOTDIR},
			{dir, false, unix.EISDIR},
			{dir, true, unix.EISDIR},
			{"/", false, unix.EISDIR},
			{dir + "/loop", false, unix.ELOOP},
			{dir + "/dangling", false, unix.ENOENT},
			{dir + "/" + string(long), true, unix.ENAMETOOLONG},
			{deep, true, unix.ENAMETOOLONG},
			{dir + "/nul\x00", true, unix.EINVAL},
		} {
			_, err := f.Lock(test.path, Exclusive, test.create, nil)
			var e *Error
			if !errors.As(err, &e) || e.Op != OpOpen || e.Path != test.path || e.Errno() != test.want {
				t.Errorf("%.100q, create %t: %v, want %v", test.path, test.create, err, test.want)
			}
		}
	})
}

func TestLockOtherKinds(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, f *Files) {
		fifo := t.TempDir() + "/fifo"
		if err := unix.Mkfifo(fifo, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{fifo, "/dev/null"} {
			mustRelease(t, mustLock(t, f, path, Shared, false), "")
		}
	})
}

func TestLockCreates(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, f *Files) {
		dir := t.TempDir()
		os.Symlink("target", dir+"/dangling")
		for _, name := range []string{"/new", "/dangling"} {
			l := mustLock(t, f, dir+name, Exclusive, true)
			info, err := os.Stat(dir + name)
			if err != nil || info.Mode() != 0o600 || info.Size() != 0 {
				t.Errorf("made %v, %v", info, err)
			}
			mustRelease(t, l, "")
		}
		if _, err := os.Stat(dir + "/target"); err != nil {
			t.Error(err)
		}
	})
}

// Whoever removes a lease file locks it first, so whoever gets the lock must
// have the file that is there.
func TestLockRechecks(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, f *Files) {
		path := t.TempDir() + "/lease"
		other := newFiles(t, Config{})
		stop := make(chan struct{})
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			for {
				select {
				case <-stop:
					return
				default:
				}
				if l, err := other.Lock(path, Exclusive, true, nil); err == nil {
					l.Release(path, nil)
				}
			}
		}()
		got := 0
		for n := 0; n < 20000 && got < 200; n++ {
			l, err := f.Lock(path, Exclusive, true, nil)
			if errors.Is(err, ErrLocked) {
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			got++
			if id, err := f.Stat(path); err != nil || id != l.ID() {
				t.Fatalf("locked %v, but at the path is %v, %v", l.ID(), id, err)
			}
			mustRelease(t, l, path)
		}
		close(stop)
		<-ended
		if got == 0 {
			t.Error("never got the lock")
		}
	})
}

func TestReleaseUnlinks(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, f *Files) {
		for _, test := range []struct {
			name    string
			mode    Mode
			prepare func(t *testing.T, path string) // before the lock
			during  func(t *testing.T, path string)
			want    bool // the name is still there
		}{
			{name: "empty lease", mode: Exclusive},
			{name: "empty lease, shared", mode: Shared},
			{name: "data file", mode: Exclusive, want: true, prepare: func(t *testing.T, path string) { makeFile(t, path, "data") }},
			{name: "data written meanwhile", mode: Exclusive, want: true, during: func(t *testing.T, path string) { makeFile(t, path, "data") }},
			{name: "replaced", mode: Exclusive, want: true, during: func(t *testing.T, path string) {
				os.Remove(path)
				makeFile(t, path, "")
			}},
			{name: "gone", mode: Exclusive, during: func(t *testing.T, path string) { os.Remove(path) }},
			{name: "symlink", mode: Exclusive, want: true, prepare: func(t *testing.T, path string) {
				makeFile(t, path+".target", "")
				os.Symlink(filepath.Base(path)+".target", path)
			}},
			{name: "a fifo", mode: Exclusive, want: true, prepare: func(t *testing.T, path string) { unix.Mkfifo(path, 0o600) }},
			{name: "shared with others", mode: Shared, want: true, during: func(t *testing.T, path string) {
				startRole(t, "locker").want("ok", "posix", "read", path)
			}},
			{name: "directory by a link", mode: Exclusive, prepare: func(t *testing.T, path string) {
				mkdir(t, filepath.Dir(path)+".real")
				os.Remove(filepath.Dir(path))
				os.Symlink(filepath.Base(filepath.Dir(path))+".real", filepath.Dir(path))
			}},
		} {
			t.Run(test.name, func(t *testing.T) {
				path := mkdir(t, t.TempDir()+"/dir") + "/lease"
				if test.prepare != nil {
					test.prepare(t, path)
				}
				l := mustLock(t, f, path, test.mode, true)
				if test.during != nil {
					test.during(t, path)
				}
				mustRelease(t, l, path)
				if _, err := os.Lstat(path); (err == nil) != test.want {
					t.Errorf("afterwards: %v", err)
				}
				for _, name := range []string{path, path + ".target"} {
					if _, err := os.Stat(name); err == nil && test.name != "shared with others" {
						mustRelease(t, mustLock(t, f, name, Exclusive, false), "")
					}
				}
			})
		}
	})
}

// A process that has a lease on a file is given /proc/sys/fs/lease-break-time to give it back, and who opens
// the file waits for that. It must not be this process.
func TestLeasedFile(t *testing.T) {
	t.Parallel()
	for _, create := range []bool{false, true} {
		f := newFiles(t, Config{})
		path := makeFile(t, t.TempDir()+"/disk", "")
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
			t.Fatal(err)
		}
		locked := make(chan *Lock)
		go func() {
			l, err := f.Lock(path, Exclusive, create, nil)
			if err != nil {
				t.Error(err)
			}
			locked <- l
		}()
		eventually(t, "a worker waits for the lease", func() bool {
			calls := f.InFlight()
			return len(calls) == 1 && calls[0].Worker != 0
		})
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_UNLCK); err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
		if l := <-locked; l != nil {
			mustRelease(t, l, "")
		}
	}
}
