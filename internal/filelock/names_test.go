// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func errnoOf(err error) error {
	var e *Error
	if errors.As(err, &e) && e.Errno() != 0 {
		return e.Errno()
	}
	return err
}

func wantMode(t *testing.T, path string, want os.FileMode) {
	t.Helper()
	if info, err := os.Lstat(path); err != nil || info.Mode() != want {
		t.Errorf("%s: %v, %v; want mode %v", path, info, err, want)
	}
}

func TestMakeDir(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, f *Files) {
		dir := t.TempDir()
		makeFile(t, dir+"/file", "")
		mkdir(t, dir+"/there")
		os.Symlink("there", dir+"/link")
		os.Symlink("nowhere", dir+"/dangling")
		os.Symlink("file", dir+"/filelink")
		os.Symlink("loop", dir+"/loop")
		for _, test := range []struct {
			path string
			want error
		}{
			{"/", nil},
			{"", unix.ENOENT},
			{dir + "/a/b/c", nil},
			{dir + "/a/b/c/", nil},
			{dir + "//a/./d//", nil},
			{dir + "/a/../e", nil},
			{dir + "/there", nil},
			{dir + "/link", nil},
			{dir + "/link/below/it", nil},
			{dir + "/file", ErrNotDir},
			{dir + "/filelink", ErrNotDir},
			{dir + "/file/below", unix.ENOTDIR},
			{dir + "/dangling", unix.ENOTDIR},
			{dir + "/dangling/below", unix.ENOENT},
			{dir + "/loop/x", unix.ELOOP},
			{"/proc/self/x", unix.ENOENT},
		} {
			err := f.MakeDir(test.path)
			if !errors.Is(errnoOf(err), test.want) {
				t.Errorf("%s: %v, want %v", test.path, err, test.want)
			}
		}
		for _, name := range []string{"/a", "/a/b", "/a/b/c", "/a/d", "/e", "/there/below", "/there/below/it"} {
			wantMode(t, dir+name, os.ModeDir|0o700)
		}
		wantMode(t, dir+"/there", os.ModeDir|0o755)
	})
}

func TestCreate(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, f *Files) {
		dir := t.TempDir()
		makeFile(t, dir+"/there", "data")
		os.Chmod(dir+"/there", 0o444)
		os.Symlink("there", dir+"/link")
		os.Symlink("target", dir+"/dangling")
		for _, test := range []struct {
			path string
			want error
		}{
			{dir + "/new", nil},
			{dir + "/./newer", nil},
			{dir + "/there", nil},
			{dir + "/link", nil},
			{dir + "/dangling", nil},
			{dir, unix.EISDIR},
			{"", unix.ENOENT},
			{dir + "/missing/new", unix.ENOENT},
			{dir + "/there/new", unix.ENOTDIR},
		} {
			if err := f.Create(test.path); errnoOf(err) != test.want {
				t.Errorf("%s: %v, want %v", test.path, err, test.want)
			}
		}
		for _, name := range []string{"/new", "/newer", "/target"} {
			wantMode(t, dir+name, 0o600)
		}
		wantMode(t, dir+"/there", 0o444)
		if data, _ := os.ReadFile(dir + "/there"); string(data) != "data" {
			t.Errorf("the existing file has %q", data)
		}
	})
}

func TestDelete(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, f *Files) {
		dir := t.TempDir()
		held := makeFile(t, dir+"/held", "")
		makeFile(t, dir+"/other", "")
		makeFile(t, dir+"/data", "data")
		os.Link(held, dir+"/hard")
		os.Symlink("held", dir+"/link")
		os.Symlink("other", dir+"/otherlink")
		os.Symlink("nowhere", dir+"/dangling")
		os.Symlink(".", dir+"/dir")
		mkdir(t, dir+"/directory")
		l := mustLock(t, f, held, Exclusive, false)
		defer l.Release("", nil)
		foreign := startRole(t, "locker")
		foreign.want("ok", "posix", "write", dir+"/data")
		for _, test := range []struct {
			path string
			want error
			gone bool
		}{
			{dir + "/held", ErrLocked, false},
			{dir + "/hard", ErrLocked, false},
			{dir + "/link", ErrLocked, false},
			{dir + "/dir/dir/held", ErrLocked, false},
			{dir + "/dir/otherlink", nil, true},
			{dir + "/dangling", nil, true},
			{dir + "/other", nil, true},
			{dir + "/data", nil, true}, // locked by somebody else only
			{dir + "/missing", nil, true},
			{dir + "/missing/below", nil, true},
			{"", nil, true},
			{dir + "/directory", unix.EISDIR, false},
			{dir + "/held/below", unix.ENOTDIR, true},
		} {
			err := f.Delete(test.path, func(id FileID) bool { return id == l.ID() })
			if !errors.Is(errnoOf(err), test.want) {
				t.Errorf("%s: %v, want %v", test.path, err, test.want)
			}
			if _, err := os.Lstat(test.path); (err != nil) != test.gone {
				t.Errorf("%s afterwards: %v", test.path, err)
			}
		}
	})
}

func TestRelativePaths(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	direct, worker := newFiles(t, Config{Dir: dir}), newFiles(t, Config{Dir: dir})
	worker.openat2 = false
	for _, f := range []*Files{direct, worker} {
		mustRelease(t, mustLock(t, f, "./lease", Exclusive, true), "lease")
		if err := f.MakeDir("sub/dir"); err != nil {
			t.Error(err)
		}
		l := mustLock(t, f, "sub/dir/lease", Shared, true)
		wantMode(t, dir+"/sub/dir/lease", 0o600)
		mustRelease(t, l, "sub/dir/lease")
		if names, _ := filepath.Glob(dir + "/sub/dir/*"); len(names) > 0 {
			t.Errorf("left: %v", names)
		}
	}
}

// In a directory like /tmp the kernel doesn't follow everybody's links, so it
// is left to the kernel, in a worker, to follow them.
func TestLinkInStickyDirectory(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	makeFile(t, dir+"/disk", "")
	sticky := mkdir(t, dir+"/sticky")
	for _, name := range []string{"/ours", "/theirs"} {
		if err := os.Symlink("../disk", sticky+name); err != nil {
			t.Fatal(err)
		}
	}
	f := newFiles(t, Config{})
	for _, test := range []struct {
		mode   os.FileMode
		remote bool
	}{{0o777, false}, {0o755 | os.ModeSticky, false}, {0o777 | os.ModeSticky, true}} {
		if err := os.Chmod(sticky, test.mode); err != nil {
			t.Fatal(err)
		}
		l := mustLock(t, f, sticky+"/ours", Exclusive, false)
		if l.Remote() != test.remote {
			t.Errorf("in a directory of mode %v: remote %t", test.mode, l.Remote())
		}
		mustRelease(t, l, "")
	}
	if data, _ := os.ReadFile("/proc/sys/fs/protected_symlinks"); os.Geteuid() != 0 || string(data) != "1\n" {
		t.Logf("not tried: a link of somebody else (fs.protected_symlinks is %q)", data)
		return
	}
	if err := os.Lchown(sticky+"/theirs", 12345, 12345); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Lock(sticky+"/theirs", Exclusive, false, nil); errnoOf(err) != unix.EACCES {
		t.Errorf("a link of somebody else: %v", err)
	}
}
