// SPDX-License-Identifier: LGPL-2.1-or-later

package state

import (
	"bytes"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestWriteRead(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "state.json")
	if _, err := Read(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
	if err := Remove(path); err != nil {
		t.Errorf("removing a missing file: %v", err)
	}
	for _, data := range [][]byte{nil, []byte("first"), bytes.Repeat([]byte("x"), 3<<20), []byte("last")} {
		if err := Write(path, data); err != nil {
			t.Fatal(err)
		}
		fi, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		if fi.Mode() != 0o600 {
			t.Errorf("mode is %v", fi.Mode())
		}
		got, err := Read(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, data) {
			t.Errorf("%d bytes are read, %d were written", len(got), len(data))
		}
	}
	if err := Remove(path); err != nil {
		t.Fatal(err)
	}
	onlyIs(t, dir)
}

// onlyIs tells which names a directory must have.
func onlyIs(t *testing.T, dir string, names ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if strings.Join(got, " ") != strings.Join(names, " ") {
		t.Errorf("%s has %q, want %q", dir, got, names)
	}
}

// What lies at the path, or where it is made first, is replaced and never followed.
func TestWriteOverLinks(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	victim := filepath.Join(t.TempDir(), "victim")
	if err := os.WriteFile(victim, []byte("precious"), 0o644); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "state.json")
	for _, name := range []string{path, path + ".new"} {
		if err := os.Symlink(victim, name); err != nil {
			t.Fatal(err)
		}
	}
	if err := Write(path, []byte("{}")); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(victim); err != nil || string(got) != "precious" {
		t.Errorf("the link's target is %q (%v)", got, err)
	}
	onlyIs(t, dir, "state.json")
	if fi, err := os.Lstat(path); err != nil || !fi.Mode().IsRegular() {
		t.Errorf("the file is %v (%v)", fi.Mode(), err)
	}
}

func TestWriteFails(t *testing.T) {
	t.Parallel()
	t.Run("no directory", func(t *testing.T) {
		t.Parallel()
		if err := Write(filepath.Join(t.TempDir(), "none", "state.json"), []byte("{}")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("error is %v", err)
		}
	})
	t.Run("a directory is there", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		path := filepath.Join(dir, "state.json")
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := Write(path, []byte("{}")); err == nil {
			t.Error("no error")
		}
		onlyIs(t, dir, "state.json")
	})
	t.Run("a directory is where it is made", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		path := filepath.Join(dir, "state.json")
		if err := os.Mkdir(path+".new", 0o700); err != nil {
			t.Fatal(err)
		}
		if err := Write(path, []byte("{}")); !errors.Is(err, unix.EISDIR) {
			t.Errorf("error is %v, want EISDIR", err)
		}
		onlyIs(t, dir, "state.json.new")
	})
	t.Run("no room", func(t *testing.T) {
		t.Parallel()
		if os.Geteuid() != 0 {
			t.Skip("a small file system needs root")
		}
		dir := t.TempDir()
		if err := unix.Mount("virtlockd-test", dir, "tmpfs", 0, "size=64k,mode=700"); err != nil {
			t.Skipf("mount: %v", err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(dir, 0); err != nil {
				t.Errorf("unmount: %v", err)
			}
		})
		path := filepath.Join(dir, "state.json")
		if err := Write(path, []byte("old")); err != nil {
			t.Fatal(err)
		}
		if err := Write(path, make([]byte, 128<<10)); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("error is %v, want ENOSPC", err)
		}
		onlyIs(t, dir, "state.json")
		if got, err := Read(path); err != nil || string(got) != "old" {
			t.Errorf("the file has become %q (%v)", got, err)
		}
	})
}

func TestReadRefuses(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		make func(path string) error
		want string
	}{
		{"symbolic link", func(path string) error {
			if err := os.WriteFile(path+".real", []byte("{}"), 0o600); err != nil {
				return err
			}
			return os.Symlink(path+".real", path)
		}, "too many levels of symbolic links"},
		{"directory", func(path string) error { return os.Mkdir(path, 0o700) }, "not a regular file"},
		{"FIFO", func(path string) error { return unix.Mkfifo(path, 0o600) }, "not a regular file"},
		{"socket", func(path string) error {
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
			if err != nil {
				return err
			}
			l.SetUnlinkOnClose(false)
			return l.Close()
		}, "no such device or address"},
		{"writable for others", func(path string) error {
			if err := os.WriteFile(path, []byte("{}"), 0o600); err != nil {
				return err
			}
			return os.Chmod(path, 0o622)
		}, "others may write to it (mode 0622)"},
		{"too big", func(path string) error {
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				return err
			}
			return os.Truncate(path, MaxFile+1) // no more than a hole
		}, "more than 1073741824"},
		{"somebody else's", func(path string) error {
			if err := os.WriteFile(path, []byte("{}"), 0o600); err != nil {
				return err
			}
			return os.Chown(path, 65534, 65534)
		}, "belongs to user 65534"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if tt.name == "somebody else's" && os.Geteuid() != 0 {
				t.Skip("to give a file away needs root")
			}
			// Short, for the socket.
			path := filepath.Join(t.TempDir(), "s")
			if err := tt.make(path); err != nil {
				t.Fatal(err)
			}
			data, err := Read(path)
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("error is %v, want one that says %q", err, tt.want)
			}
			if data != nil {
				t.Errorf("%d bytes are returned with an error", len(data))
			}
		})
	}
}

// The C daemon's own file has mode 0700.
func TestReadModeOfC(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "state.json")
	if err := os.WriteFile(path, []byte("{}"), 0o700); err != nil {
		t.Fatal(err)
	}
	if got, err := Read(path); err != nil || string(got) != "{}" {
		t.Errorf("%q is read (%v)", got, err)
	}
}
