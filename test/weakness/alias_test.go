// SPDX-License-Identifier: LGPL-2.1-or-later

package weakness

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// resource is a name in a lockspace.
type resource struct{ lockspace, name string }

// alias is a second name of a file.
type alias struct {
	what       string
	first      resource
	second     resource
	path       string // of the file, by which its lock can be seen
	secondPath string // where the kernel's lock is another one; else ""
	make       func() error
}

func path(name string) string { return host.Data + "/" + name }

var aliases = []alias{
	{what: "hard link", first: resource{"", path("a")}, second: resource{"", path("b")}, path: path("a"),
		make: func() error { return os.Link(path("a"), path("b")) }},
	{what: "symbolic link", first: resource{"", path("a")}, second: resource{"", path("b")}, path: path("a"),
		make: func() error { return os.Symlink(path("a"), path("b")) }},
	{what: "symbolic link of a directory", first: resource{"", path("a")}, second: resource{"", "/tmp/link/a"}, path: path("a"),
		make: func() error { return os.Symlink(host.Data, "/tmp/link") }},
	{what: "bind mount of a directory", first: resource{"", path("a")}, second: resource{"", "/tmp/bind/a"}, path: path("a"),
		make: func() error {
			if err := os.Mkdir("/tmp/bind", 0o755); err != nil {
				return err
			}
			return unix.Mount(host.Data, "/tmp/bind", "", unix.MS_BIND, "")
		}},
	{what: "bind mount of a file", first: resource{"", path("a")}, second: resource{"", path("b")}, path: path("a"),
		make: func() error {
			if err := os.WriteFile(path("b"), nil, 0o600); err != nil {
				return err
			}
			return unix.Mount(path("a"), path("b"), "", unix.MS_BIND, "")
		}},
	{what: "two slashes", first: resource{"", path("a")}, second: resource{"", host.Data + "//a"}, path: path("a")},
	{what: "dot", first: resource{"", path("a")}, second: resource{"", host.Data + "/./a"}, path: path("a")},
	{what: "dot dot", first: resource{"", path("a")}, second: resource{"", host.Data + "/../vlv/a"}, path: path("a")},
	{what: "relative path", first: resource{"", path("a")}, second: resource{"", "../vlv/a"}, path: path("a")},
	{what: "lockspace with a slash", first: resource{path("ls"), "a"}, second: resource{path("ls/"), "a"}, path: path("ls/a")},
	{what: "lockspace by a link", first: resource{path("ls"), "a"}, second: resource{path("link"), "a"}, path: path("ls/a"),
		make: func() error { return os.Symlink(path("ls"), path("link")) }},
	{what: "default lockspace", first: resource{path("ls"), "a"}, second: resource{"", path("ls/a")}, path: path("ls/a")},
	{what: "second device node", first: resource{"", path("disk")}, second: resource{"", path("dev/disk")},
		path: path("disk"), secondPath: path("dev/disk"),
		make: func() error {
			if err := os.Mkdir(path("dev"), 0o755); err != nil {
				return err
			}
			return unix.Mknod(path("dev/disk"), unix.S_IFBLK|0o600, blockDevice)
		}},
}

// blockDevice is the first loop device, which needs no file behind it to be opened.
var blockDevice = int(unix.Mkdev(7, 0))

// set is a daemon with a file that has two names.
func (a alias) set(t *testing.T) (*host.Host, *host.Daemon) {
	t.Helper()
	h, d := start(t, host.Options{})
	h.Must(func() error {
		if a.secondPath != "" {
			if err := unix.Mknod(a.path, unix.S_IFBLK|0o600, blockDevice); err != nil {
				return err
			}
		} else {
			if err := os.MkdirAll(filepath.Dir(a.path), 0o755); err != nil {
				return err
			}
			if err := os.WriteFile(a.path, nil, 0o644); err != nil {
				return err
			}
		}
		if a.make == nil {
			return nil
		}
		return a.make()
	})
	c := d.Dial("lock")
	for _, r := range []resource{a.first, a.second} {
		must(t, c.CreateLockspace(r.lockspace))
	}
	return h, d
}

// free tells whether another host could lock the file.
func (a alias) free(h *host.Host, exclusive bool) bool {
	return h.Free(a.path, exclusive) && (a.secondPath == "" || h.Free(a.secondPath, exclusive))
}

// Whatever a held file is called, it has one owner.
func TestW05Exclusive(t *testing.T) {
	t.Parallel()
	for _, a := range aliases {
		t.Run(a.what, func(t *testing.T) {
			t.Parallel()
			h, d := a.set(t)
			one, other := d.Client(noOne), d.Client(noOneElse)
			for _, names := range [][2]resource{{a.first, a.second}, {a.second, a.first}} {
				held, asked := names[0], names[1]
				must(t, one.Acquire(held.lockspace, held.name, 0))
				for flags := range uint32(4) {
					refused(t, "another owner", other.Acquire(asked.lockspace, asked.name, flags))
					refused(t, "the same owner", one.Acquire(asked.lockspace, asked.name, flags))
					if a.free(h, false) {
						t.Fatal("refused request took the lock away")
					}
				}
				if err := other.Release(asked.lockspace, asked.name); !wire.IsNotLocked(err) {
					t.Errorf("RELEASE of what was refused: %v", err)
				}
				must(t, one.Release(held.lockspace, held.name))
				if !a.free(h, true) {
					t.Fatal("lock is left")
				}
			}
		})
	}
}

// Sharers share under any name, and the file is locked until the last of them has gone.
func TestW05Shared(t *testing.T) {
	t.Parallel()
	for _, a := range aliases {
		t.Run(a.what, func(t *testing.T) {
			t.Parallel()
			h, d := a.set(t)
			one, other := d.Client(noOne), d.Client(noOneElse)
			for _, releaseFirst := range []bool{true, false} {
				must(t, one.Acquire(a.first.lockspace, a.first.name, wire.Shared))
				must(t, other.Acquire(a.second.lockspace, a.second.name, wire.Shared))
				refused(t, "exclusive", one.Acquire(a.second.lockspace, a.second.name, 0))
				steps := []func() error{
					func() error { return one.Release(a.first.lockspace, a.first.name) },
					func() error { return other.Release(a.second.lockspace, a.second.name) },
				}
				left := a.second
				if !releaseFirst {
					steps[0], steps[1] = steps[1], steps[0]
					left = a.first
				}
				must(t, steps[0]())
				if h.Free(a.path, true) && (a.secondPath == "" || h.Free(a.secondPath, true)) {
					t.Error("lock ends with the first of two names")
				}
				gone := a.first
				if !releaseFirst {
					gone = a.second
				}
				refused(t, "exclusive, one sharer left", d.Client(noOne).Acquire(gone.lockspace, gone.name, 0))
				refused(t, "exclusive, under the sharer's name", d.Client(noOne).Acquire(left.lockspace, left.name, 0))
				must(t, steps[1]())
				if !a.free(h, true) {
					t.Fatal("lock is left")
				}
			}
		})
	}
}

// Nothing that anybody does with a second name of a held file takes its lock away.
func TestW06LockStays(t *testing.T) {
	t.Parallel()
	for _, a := range aliases {
		t.Run(a.what, func(t *testing.T) {
			t.Parallel()
			h, d := a.set(t)
			one, other := d.Client(noOne), d.Client(noOneElse)
			must(t, one.Acquire(a.first.lockspace, a.first.name, 0))
			r := a.second
			for _, c := range []struct {
				what string
				call func() error
			}{
				{"CREATE", func() error { return other.Create(r.lockspace, r.name) }},
				{"ACQUIRE", func() error { return other.Acquire(r.lockspace, r.name, 0) }},
				{"ACQUIRE SHARED AUTOCREATE", func() error { return other.Acquire(r.lockspace, r.name, 3) }},
				{"RELEASE", func() error { return other.Release(r.lockspace, r.name) }},
			} {
				if err := c.call(); err != nil && wire.AsError(err) == nil {
					t.Fatalf("%s: %v", c.what, err)
				}
				if h.Free(a.path, false) {
					t.Fatalf("%s took the lock away", c.what)
				}
			}
		})
	}
}

// CREATE does not even open a file that is there: that could hang, and closing it drops locks of the C daemon's kind.
func TestW06CreateOpensNothing(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	c := d.Client(noOne)
	h.Must(func() error {
		for _, err := range []error{
			unix.Mkfifo(path("fifo"), 0o600),
			unix.Mknod(path("nodevice"), unix.S_IFCHR|0o600, int(unix.Mkdev(240, 77))),
			os.Mkdir(path("readonly"), 0o755),
			os.WriteFile(path("readonly/file"), nil, 0o444),
			unix.Mount(path("readonly"), path("readonly"), "", unix.MS_BIND, ""),
			unix.Mount("", path("readonly"), "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""),
		} {
			if err != nil {
				return err
			}
		}
		return nil
	})
	for _, name := range []string{"readonly/file", "nodevice", "fifo"} {
		if err := c.Create("", path(name)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// DELETE under another name does not remove what is held.
func TestW15DeleteUnderAlias(t *testing.T) {
	t.Parallel()
	for _, a := range aliases {
		if a.what == "symbolic link" || a.what == "bind mount of a file" {
			continue // what would be removed is the link itself; a mount point can't be
		}
		t.Run(a.what, func(t *testing.T) {
			t.Parallel()
			h, d := a.set(t)
			one, other := d.Client(noOne), d.Client(noOneElse)
			must(t, one.Acquire(a.first.lockspace, a.first.name, 0))
			refused(t, "DELETE", other.Delete(a.second.lockspace, a.second.name))
			if !h.Exists(a.path) {
				t.Error("held file was removed")
			}
			must(t, one.Release(a.first.lockspace, a.first.name))
			must(t, other.Delete(a.second.lockspace, a.second.name))
		})
	}
}

// AUTOCREATE removes nothing at the end but a lease file of ours, however it ends.
func TestW14Autocreate(t *testing.T) {
	t.Parallel()
	a := path("a")
	for _, c := range []struct {
		what   string
		before func() error // the lock is taken
		during func() error // while it is held
		kept   bool
	}{
		{what: "own lease file", kept: false},
		{what: "file that was there, empty", before: func() error { return os.WriteFile(a, nil, 0o644) }, kept: false},
		{what: "data file", before: func() error { return os.WriteFile(a, []byte("data"), 0o644) }, kept: true},
		{what: "data written while held", during: func() error { return os.WriteFile(a, []byte("data"), 0o644) }, kept: true},
		{what: "file replaced while held", during: func() error {
			if err := os.Remove(a); err != nil {
				return err
			}
			return os.WriteFile(a, nil, 0o644)
		}, kept: true},
		{what: "file renamed over it while held", during: func() error {
			if err := os.WriteFile(path("new"), nil, 0o644); err != nil {
				return err
			}
			return os.Rename(path("new"), a)
		}, kept: true},
		{what: "symbolic link", before: func() error { return os.Symlink("target", a) }, kept: true},
		{what: "FIFO", before: func() error { return unix.Mkfifo(a, 0o644) }, kept: true},
		{what: "block device", before: func() error { return unix.Mknod(a, unix.S_IFBLK|0o600, blockDevice) }, kept: true},
	} {
		for _, end := range []string{"RELEASE", "owner's death", "SIGTERM"} {
			for _, flags := range []uint32{wire.Autocreate, wire.Autocreate | wire.Shared} {
				name := c.what + ", exclusive, " + end
				if flags&wire.Shared != 0 {
					name = c.what + ", shared, " + end
				}
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					h, d := start(t, host.Options{})
					if c.before != nil {
						h.Must(c.before)
					}
					p, vm := guest(t, h, d, host.ProcessOptions{}, a, flags)
					if c.during != nil {
						h.Must(c.during)
					}
					switch end {
					case "RELEASE":
						must(t, vm.Release("", a))
					case "owner's death":
						p.Kill()
						vm.Close()
						// Whatever happens to the file happens before the resource is free.
						other := d.Client(noOneElse)
						eventually(t, "resource is released", func() bool { return !wire.IsLocked(other.Acquire("", a, 0)) })
					case "SIGTERM":
						if got := d.Stop(); got != 0 {
							t.Errorf("exit status %d", got)
						}
					}
					if got := h.Exists(a); got != c.kept {
						t.Errorf("file exists: %v, want %v", got, c.kept)
					}
				})
			}
		}
	}
}

// No name leads out of the directory of its lockspace.
func TestW20Escape(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	c := d.Client(noOne)
	must(t, c.New(path("ls")))
	touch(h, path("victim"))
	h.Must(func() error { return os.Mkdir(path("ls/sub"), 0o755) })
	for _, name := range []string{"../victim", "..", "sub/../../victim", "sub/..", "/../victim", ".././victim", "./../victim"} {
		for what, err := range map[string]error{
			"CREATE":  c.Create(path("ls"), name),
			"ACQUIRE": c.Acquire(path("ls"), name, wire.Autocreate),
			"DELETE":  c.Delete(path("ls"), name),
		} {
			if e := wire.AsError(err); e == nil || e.Code != wire.CodeInvalidArg || e.Domain != wire.DomainLockspace {
				t.Errorf("%s of %q: %v", what, name, err)
			}
		}
	}
	if !h.Exists(path("victim")) || !h.Free(path("victim"), true) {
		t.Error("a file outside of the lockspace was touched")
	}
	// What only looks like it is an ordinary name.
	for _, name := range []string{"..x", "x..", "...", "sub/..x", "sub/x"} {
		must(t, c.Acquire(path("ls"), name, wire.Autocreate))
		must(t, c.Release(path("ls"), name))
	}
}
