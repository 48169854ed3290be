// SPDX-License-Identifier: LGPL-2.1-or-later

package differential

import (
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// Every procedure in every state of a connection, with flags known and unknown, lockspaces known and unknown.
func TestStates(t *testing.T) {
	t.Parallel()
	p := newPair(t, host.Options{})
	p.connect("setup")
	p.calls("setup", createLockspace(data+"/ls"))
	for _, state := range []string{"new", "registered", "restricted", "restricted without registration"} {
		p.connect("A")
		switch state {
		case "registered":
			p.calls("A", register(ownerA))
		case "restricted":
			p.calls("A", register(ownerA), request{proc: wire.ProcRestrict})
		case "restricted without registration":
			p.calls("A", request{proc: wire.ProcRestrict})
		}
		for _, lockspace := range []string{"", data + "/ls", "/nowhere"} {
			for proc := wire.ProcNew; proc <= wire.ProcCreateLockspace; proc++ {
				for _, flags := range []uint32{0, 1, 2, 3, 4, 7, 8, 1 << 31, 1<<32 - 1} {
					name := "x"
					if lockspace == "" {
						name = data + "/x"
					}
					if proc == wire.ProcCreateLockspace && lockspace == "/nowhere" {
						continue // would make it
					}
					if proc == wire.ProcNew && lockspace == "/nowhere" && flags == 0 && state == "registered" {
						continue
					}
					p.call("A", request{proc: proc, lockspace: lockspace, name: name, flags: flags})
				}
			}
		}
		p.same()
	}
	p.connect("B")
	for _, flags := range []uint32{0, 1, 2, 1<<32 - 1, 0} {
		r := register(ownerA)
		r.owner.Flags = flags
		p.calls("B", r)
	}
	for _, flags := range []uint32{1, 1 << 16, 0, 0, 1} {
		p.calls("B", request{proc: wire.ProcRestrict, flags: flags})
	}
}

// Arguments that end anywhere, go on, have bad padding or lengths.
func TestArguments(t *testing.T) {
	t.Parallel()
	p := newPair(t, host.Options{})
	p.connect("A")
	p.calls("A", register(ownerA), createLockspace(data+"/ls"))
	valid := []request{
		register(ownerA),
		{proc: wire.ProcNew, lockspace: data + "/ls"},
		create(data+"/ls", "a"),
		acquire(data+"/ls", "a", 0),
		release(data+"/ls", "a"),
		remove(data+"/ls", "a"),
		createLockspace(data + "/ls"),
	}
	valid[0].owner.Name = "guest" // with padding
	for _, r := range valid {
		args := r.args()
		for n := range args {
			p.send("A", fmt.Sprintf("%s, first %d bytes", r, n), wire.Request(r.proc, uint32(n), args[:n]), 1)
		}
		for _, more := range []int{1, 3, 4, 100, 70000} {
			p.send("A", fmt.Sprintf("%s and %d bytes", r, more), wire.Request(r.proc, 7, append(args[:len(args):len(args)], make([]byte, more)...)), 1)
		}
		// Each word in turn becomes something else. Where it is a length most of them run past the end.
		for i := 0; i+4 <= len(args); i += 4 {
			for _, v := range []uint32{1<<32 - 1, 1 << 31, 1<<31 - 1, 65536, 65537} {
				if r.proc == wire.ProcRegister && i >= 16+4+8 || r.proc != wire.ProcRegister && i >= len(args)-4 {
					continue // id, process id and flags have their own tests
				}
				bad := append([]byte(nil), args...)
				if binary.BigEndian.Uint32(bad[i:]) > 64 {
					continue // not a length: another uuid or name would be another request
				}
				binary.BigEndian.PutUint32(bad[i:], v)
				p.send("A", fmt.Sprintf("%s, word %d is %#x", r, i/4, v), wire.Request(r.proc, 9, bad), 1)
			}
		}
	}
	pad := wire.RegisterArgs(valid[0].owner)
	copy(pad[16+4+5:], "\x01\xff\x7f")
	p.send("A", "REGISTER with padding that is not zero", wire.Request(wire.ProcRegister, 1, pad), 1)
	p.send("A", "RESTRICT without flags", wire.Request(wire.ProcRestrict, 1, nil), 1)
	p.same()
}

// Names with all kinds of bytes, short and long.
func TestNames(t *testing.T) {
	t.Parallel()
	p := newPair(t, host.Options{})
	p.connect("A", "B")
	p.calls("A", register(ownerA), newLockspace(data+"/ls"))
	p.calls("B", register(ownerB))
	names := []string{
		"a", "with blank", "percent %s %d %n", "quote ' and \"", "back\\slash", "new\nline", "\x1b[31mred", "\xff\xfe\x80", "ü€😀",
		".hidden", "...", "..x", "-", "~", "*", "a\x00b", "\x00", strings.Repeat("n", 255), strings.Repeat("n", 256), strings.Repeat("n", 4096),
		strings.Repeat("n", 65535), strings.Repeat("n", 65536), strings.Repeat("n", 65537), "sub/x", "/abs", "",
	}
	for _, name := range names {
		for _, r := range []request{
			acquire(data+"/ls", name, 0),
			create(data+"/ls", name),
			acquire(data+"/ls", name, wire.Autocreate),
			release(data+"/ls", name),
			remove(data+"/ls", name),
		} {
			p.call("A", r)
			p.call("B", release(data+"/ls", name))
		}
		p.same()
	}
	paths := []string{data, data + "/", data + "/deep/er/and/deeper", "/proc/x", "/sys/x", "/dev/null", "/dev/null/x", "relative",
		data + "/missing/" + strings.Repeat("n", 256), data + "/" + strings.Repeat("d/", 1000)}
	for _, name := range names {
		paths = append(paths, data+"/"+name)
	}
	for _, path := range paths {
		p.calls("B", createLockspace(path), createLockspace(path), acquire(path, "lease", wire.Autocreate), release(path, "lease"))
		r := register(ownerA)
		r.owner.Name = path
		p.calls("B", r, register(ownerB))
	}
	p.same()
}

// Owners with odd identities, and who may release what.
func TestOwners(t *testing.T) {
	t.Parallel()
	p := newPair(t, host.Options{})
	p.connect("A", "B", "C")
	a := data + "/a"
	owner := func(pid, id uint32, name string) request {
		return request{proc: wire.ProcRegister, owner: wire.Owner{PID: pid, ID: id, Name: name}}
	}
	pids := []uint32{0, 1 << 31, 1<<31 - 1, 1<<32 - 1, 1<<32 - 2, ownerA, ownerB}
	for _, one := range pids {
		for _, other := range pids {
			p.calls("A", owner(one, 1, "a"))
			p.calls("B", owner(other, 2, ""))
			for flags := range uint32(4) {
				p.calls("A", acquire("", a, flags|wire.Autocreate))
				p.calls("B", acquire("", a, flags|wire.Autocreate), release("", a), release("", a))
				p.calls("A", release("", a), release("", a))
			}
		}
	}
	// An id of zero registers nobody, and keeps what was.
	p.calls("C", owner(ownerC, 0, "c"), acquire("", a, 2), owner(ownerC, 1, "c"), acquire("", a, 2), owner(ownerA, 0, "c"), release("", a))
	// Another registration: the locks stay with the old one.
	p.calls("C", acquire("", a, 2), owner(ownerB, 1, "b"), release("", a), acquire("", a, 2), owner(ownerC, 1<<32-1, "c"), release("", a))
	p.same()
}

// All that can be found at a path.
func TestFiles(t *testing.T) {
	t.Parallel()
	p := newPair(t, host.Options{})
	p.connect("A")
	p.calls("A", register(ownerA), newLockspace(data+"/ls"))
	p.fs("files", func() error {
		steps := []error{
			os.WriteFile(data+"/file", nil, 0o644),
			os.WriteFile(data+"/data", []byte("data"), 0o640),
			os.WriteFile(data+"/none", nil, 0),
			os.Chmod(data+"/none", 0),
			os.Mkdir(data+"/dir", 0o755),
			os.Symlink("data", data+"/link"),
			os.Symlink("dir", data+"/dirlink"),
			os.Symlink("loop", data+"/loop"),
			os.Symlink("missing/x", data+"/dangling"),
			unix.Mkfifo(data+"/fifo", 0o600),
			unix.Mknod(data+"/null", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))),
			unix.Mknod(data+"/nodevice", unix.S_IFCHR|0o600, int(unix.Mkdev(240, 77))),
			os.Mkdir(data+"/readonly", 0o755),
			os.WriteFile(data+"/readonly/file", nil, 0o644),
			unix.Mount(data+"/readonly", data+"/readonly", "", unix.MS_BIND, ""),
			unix.Mount("", data+"/readonly", "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""),
			os.Mkdir(data+"/mounted", 0o755),
			unix.Mount("tmpfs", data+"/mounted", "tmpfs", 0, "size=4k,nr_inodes=1"),
		}
		for i, err := range steps {
			if err != nil {
				return fmt.Errorf("step %d: %w", i, err)
			}
		}
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Bind(fd, &unix.SockaddrUnix{Name: data + "/socket"})
	})
	for _, name := range []string{
		"file", "data", "none", "dir", "dir/", "dir/x", "file/x", "file/", "link", "link/", "link/x", "dirlink/x", "loop", "loop/x", "missing/x", "missing/",
		"fifo", "null", "nodevice", "socket", "readonly/file", "readonly/x", "mounted/x", "mounted",
	} {
		path := data + "/" + name
		// A data file is kept by ours where it was locked with AUTOCREATE: those are in test/vectors.
		list := []request{acquire("", path, 0), release("", path), acquire("", path, wire.Shared), release("", path)}
		switch name {
		case "data", "link", "fifo", "null":
		default:
			list = append(list, acquire("", path, wire.Autocreate), release("", path), acquire("", path, wire.Autocreate|wire.Shared), release("", path))
		}
		p.calls("A", list...)
		p.same()
	}
	for _, name := range []string{
		"file", "data", "none", "dir", "dir/", "dir/x", "file/x", "link", "link/x", "dirlink/x", "loop/x", "missing/x", "missing/",
		"null", "readonly/x", "mounted/x", "mounted",
	} {
		p.calls("A", create("", data+"/"+name), remove("", data+"/"+name))
		p.same()
	}
	// Ours does not open what is there, if only to create it; the C daemon does, and hangs at the FIFO.
	for _, name := range []string{"fifo", "readonly/file", "loop", "nodevice", "socket", "dirlink", "dangling"} {
		p.calls("A", remove("", data+"/"+name))
		p.same()
	}
	// A program that runs can't be opened for writing.
	p.both("program", func(w *world) error {
		return w.h.Do(func() error { return os.Symlink(fmt.Sprintf("/proc/%d/exe", w.d.PID()), data+"/running") })
	})
	p.calls("A", acquire("", data+"/running", 0), acquire("", data+"/running", wire.Autocreate))
}

// Several clients with every pair of flags, and who sees what of whom.
func TestModes(t *testing.T) {
	t.Parallel()
	p := newPair(t, host.Options{})
	p.connect("A", "B", "A2")
	p.calls("A", register(ownerA), newLockspace(data+"/ls"))
	p.calls("B", register(ownerB))
	p.calls("A2", register(ownerA))
	for first := range uint32(4) {
		for second := range uint32(4) {
			for third := range uint32(4) {
				name := fmt.Sprintf("%d%d%d", first, second, third)
				p.touch(data + "/ls/" + name)
				p.calls("A", acquire(data+"/ls", name, first))
				p.calls("B", acquire(data+"/ls", name, second))
				p.calls("A2", acquire(data+"/ls", name, third), create(data+"/ls", name), remove(data+"/ls", name))
				p.same()
				for range 2 {
					for _, client := range []string{"A2", "A", "B"} {
						p.calls(client, release(data+"/ls", name))
					}
				}
				p.same()
			}
		}
	}
}

// Locks of other programs, on byte 0 and elsewhere.
func TestOutsiders(t *testing.T) {
	t.Parallel()
	p := newPair(t, host.Options{})
	p.connect("A", "B")
	p.calls("A", register(ownerA))
	p.calls("B", register(ownerB))
	for _, w := range []*world{p.c, p.ours} {
		w.procs["outsider"] = w.h.Spawn(host.ProcessOptions{})
	}
	for _, kind := range []string{"R", "W"} {
		for _, at := range [][2]int64{{0, 1}, {0, 0}, {1, 1}, {100, 104}} {
			for flags := range uint32(4) {
				path := fmt.Sprintf("%s/%s-%d-%d-%d", data, kind, at[0], at[1], flags)
				p.both("outsider locks "+path, func(w *world) error {
					w.procs["outsider"].Lock(path, kind, at[0], at[1])
					return nil
				})
				p.calls("A", acquire("", path, flags))
				p.calls("B", acquire("", path, flags|wire.Shared))
				p.same()
				p.calls("A", create("", path), release("", path))
				p.calls("B", release("", path))
				p.same()
				p.calls("A", acquire("", path, flags))
				p.both("outsider unlocks", func(w *world) error {
					w.procs["outsider"].Unlock()
					return nil
				})
				p.calls("B", acquire("", path, flags))
				p.calls("A", release("", path), remove("", path))
				p.calls("B", release("", path))
				p.same()
			}
		}
	}
}

// The umask counts for what a daemon makes, directories and files that are there stay as they are.
func TestModesOfFiles(t *testing.T) {
	t.Parallel()
	p := newPair(t, host.Options{})
	p.connect("A")
	p.fs("directories", func() error {
		for _, d := range []string{"/a", "/b"} {
			if err := os.Mkdir(data+d, 0o777); err != nil {
				return err
			}
			if err := os.Chmod(data+d, 0o1777); err != nil {
				return err
			}
		}
		return nil
	})
	p.calls("A", register(ownerA), newLockspace(data+"/a"), createLockspace(data+"/b"), createLockspace(data+"/b/c/d"), newLockspace(data+"/e/f/"))
	for _, ls := range []string{data + "/a", data + "/b/c/d", data + "/e/f/"} {
		p.calls("A", create(ls, "x"), acquire(ls, "x", 0), acquire(ls, "y", wire.Autocreate), acquire(ls, "z", wire.Autocreate|wire.Shared))
	}
	p.same()
}

// What becomes of locks, files and processes when guests go.
func TestGuests(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		run  func(p *pair)
	}{
		{"registered only", func(p *pair) {
			p.guest("G")
			p.registerGuest("G", "G")
			p.close("G")
			p.stays("G")
		}},
		{"not registered", func(p *pair) {
			p.guest("G")
			p.calls("G", createLockspace(data+"/ls"))
			p.close("G")
			p.stays("G")
		}},
		{"own locks", func(p *pair) {
			p.guest("G")
			p.registerGuest("G", "G")
			p.touch(data + "/plain")
			p.calls("G", newLockspace(data+"/ls"), acquire("", data+"/a", 2), acquire("", data+"/plain", 0), acquire(data+"/ls", "s", 3), acquire(data+"/ls", "x", 2))
			p.same()
			p.close("G")
			p.ends("G")
		}},
		{"locks by libvirtd", func(p *pair) {
			p.guest("G")
			p.registerGuest("G", "G")
			p.calls("G", request{proc: wire.ProcRestrict}, acquire("", data+"/a", 2))
			p.connect("L")
			p.registerGuest("L", "G")
			p.calls("L", acquire("", data+"/a", 2), acquire("", data+"/b", 3))
			p.close("L")
			p.connect("M")
			p.calls("M", register(ownerA), acquire("", data+"/b", 3), acquire("", data+"/a", 2))
			p.same()
			p.close("G")
			p.ends("G")
			p.calls("M", acquire("", data+"/a", 2), release("", data+"/b"))
		}},
		{"released before", func(p *pair) {
			p.guest("G")
			p.registerGuest("G", "G")
			p.calls("G", acquire("", data+"/a", 2), release("", data+"/a"))
			p.close("G")
			p.stays("G")
		}},
		{"released by another", func(p *pair) {
			p.guest("G")
			p.registerGuest("G", "G")
			p.calls("G", acquire("", data+"/a", 2))
			p.connect("L")
			p.registerGuest("L", "G")
			p.calls("L", release("", data+"/a"))
			p.close("G")
			p.stays("G")
		}},
		{"locks for somebody else", func(p *pair) {
			p.guest("G")
			p.calls("G", register(ownerA), acquire("", data+"/a", 2))
			p.close("G")
			p.stays("G")
			p.connect("L")
			p.calls("L", register(ownerA), acquire("", data+"/a", 2), release("", data+"/a"))
		}},
		{"first itself, then somebody else", func(p *pair) {
			p.guest("G")
			p.registerGuest("G", "G")
			p.calls("G", acquire("", data+"/a", 2), register(ownerA))
			p.close("G")
			p.stays("G")
		}},
		{"first somebody else, then itself", func(p *pair) {
			p.guest("G")
			p.calls("G", register(ownerA), acquire("", data+"/a", 2))
			p.registerGuest("G", "G")
			p.calls("G", acquire("", data+"/b", 2))
			p.close("G")
			p.ends("G")
		}},
		{"two guests", func(p *pair) {
			p.guest("G")
			p.guest("H")
			p.registerGuest("G", "G")
			p.registerGuest("H", "H")
			p.calls("G", acquire("", data+"/shared", 3), acquire("", data+"/g", 2))
			p.calls("H", acquire("", data+"/shared", 3), acquire("", data+"/h", 2), acquire("", data+"/g", 2))
			p.close("G")
			p.ends("G")
			p.calls("H", acquire("", data+"/g", 2), release("", data+"/shared"))
			p.same()
		}},
		{"killed", func(p *pair) {
			p.guest("G")
			p.registerGuest("G", "G")
			p.calls("G", acquire("", data+"/a", 2), acquire("", data+"/b", 3))
			p.both("kill G", func(w *world) error {
				w.procs["G"].Kill()
				w.conns["G"].Close()
				return nil
			})
			p.ends("G")
		}},
		{"stubborn", func(p *pair) {
			p.guest("G")
			p.registerGuest("G", "G")
			p.calls("G", acquire("", data+"/a", 2))
			p.both("G ignores SIGTERM", func(w *world) error {
				w.procs["G"].IgnoreTerm()
				return nil
			})
			p.close("G")
			p.ends("G")
		}},
		{"in the middle of a request", func(p *pair) {
			p.guest("G")
			p.registerGuest("G", "G")
			p.calls("G", acquire("", data+"/a", 2))
			f := acquire("", data+"/b", 2).frame()
			p.send("G", "half a request", f[:len(f)/2], 0)
			p.close("G")
			p.ends("G")
		}},
		{"end of its side only", func(p *pair) {
			p.guest("G")
			p.registerGuest("G", "G")
			p.calls("G", acquire("", data+"/a", 2))
			p.both("G ends its side", func(w *world) error { return w.conns["G"].CloseWrite() })
			p.send("G", "nothing", nil, 1)
			p.ends("G")
		}},
		{"one of two connections", func(p *pair) {
			p.guest("G")
			p.registerGuest("G", "G")
			p.both("G connects again", func(w *world) error {
				w.conns["second"] = w.procs["G"].Dial(w.d, "lock")
				return nil
			})
			p.registerGuest("second", "G")
			p.calls("second", acquire("", data+"/a", 2))
			p.close("G")
			p.ends("G")
		}},
		{"a connection that did not register", func(p *pair) {
			p.guest("G")
			p.registerGuest("G", "G")
			p.both("G connects again", func(w *world) error {
				w.conns["second"] = w.procs["G"].Dial(w.d, "lock")
				return nil
			})
			p.calls("G", acquire("", data+"/a", 2))
			p.close("second")
			p.stays("G")
			p.calls("G", release("", data+"/a"))
		}},
		{"another guest's RELEASE", func(p *pair) {
			p.guest("G")
			p.guest("H")
			p.registerGuest("G", "G")
			p.registerGuest("H", "H")
			p.calls("G", acquire("", data+"/a", 2))
			p.calls("H", release("", data+"/a"), release("", data+"/b"))
			p.calls("G", release("", data+"/a"))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p := newPair(t, host.Options{})
			c.run(p)
			p.same()
		})
	}
}

// registerGuest makes a client speak for a guest.
func (p *pair) registerGuest(client, guest string) {
	p.t.Helper()
	p.exchange(client, "REGISTER guest "+guest, func(w *world) [][]byte {
		return [][]byte{register(w.procs[guest].PID()).frame()}
	}, 1)
}

// stays checks that a guest is not killed.
func (p *pair) stays(guest string) {
	p.t.Helper()
	p.both(guest+" stays", func(w *world) error {
		if host.Within(moment, w.procs[guest].Dead) {
			return fmt.Errorf("it was killed")
		}
		return nil
	})
	p.same()
}

// ends checks that a guest is dead, whether it was before or was killed.
func (p *pair) ends(guest string) {
	p.t.Helper()
	p.both(guest+" ends", func(w *world) error {
		w.procs[guest].Gone()
		return nil
	})
	p.same()
}
