// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/internal/systemd"
)

// Not parallel: the umask is the process's.
func TestBindSocketMode(t *testing.T) {
	for _, umask := range []int{0, 0o022, 0o777} {
		path := filepath.Join(t.TempDir(), "s")
		old := unix.Umask(umask)
		s, err := bindSocket(path)
		unix.Umask(old)
		if err != nil {
			t.Errorf("umask %#o: %v", umask, err)
			continue
		}
		if st, err := os.Stat(path); err != nil || st.Mode() != fs.ModeSocket|0o700 {
			t.Errorf("umask %#o: mode %v, %v; want a socket with 0700", umask, st.Mode(), err)
		}
		if flags, err := unix.FcntlInt(uintptr(s.fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("descriptor flags %#x, %v; want CLOEXEC", flags, err)
		}
		s.unlink(slog.New(slog.DiscardHandler))
		unix.Close(s.fd)
		if _, err := os.Lstat(path); err == nil {
			t.Error("the file is left")
		}
	}
}

func TestBindSocketInTheWay(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	stale := func(path string) error {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			return err
		}
		l.SetUnlinkOnClose(false)
		return l.Close()
	}
	live := func(network string) func(string) error {
		return func(path string) error {
			switch network {
			case "unix":
				l, err := net.Listen(network, path)
				if err == nil {
					t.Cleanup(func() { l.Close() })
				}
				return err
			default:
				c, err := net.ListenUnixgram(network, &net.UnixAddr{Name: path, Net: network})
				if err == nil {
					t.Cleanup(func() { c.Close() })
				}
				return err
			}
		}
	}
	for _, tt := range []struct {
		name string
		make func(path string) error
		err  string // with %s for the path; "" for success
	}{
		{"nothing", func(string) error { return nil }, ""},
		{"stale socket", stale, ""},
		{"regular file", func(p string) error { return os.WriteFile(p, nil, 0o600) }, ""},
		{"fifo", func(p string) error { return unix.Mkfifo(p, 0o600) }, ""},
		{"dangling link", func(p string) error { return os.Symlink("nowhere", p) }, ""},
		{"directory", func(p string) error { return os.Mkdir(p, 0o700) }, "Failed to bind socket to '%s': Address already in use"},
		{"live socket", live("unix"), fmt.Sprintf("process %d listens on socket '%%s' already", os.Getpid())},
		{"live datagram socket", live("unixgram"), "cannot tell whether socket '%s' is in use: Protocol wrong type for socket"},
		{"too long", func(string) error { return nil }, "path '%s' is too long for a UNIX socket"},
		{"no directory", func(string) error { return nil }, "Failed to bind socket to '%s': No such file or directory"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(dir, strings.ReplaceAll(tt.name, " ", "-"))
			switch tt.name {
			case "too long":
				path += strings.Repeat("x", maxSunPath+1-len(path))
			case "no directory":
				path = filepath.Join(path, "s")
			}
			if err := tt.make(path); err != nil {
				t.Fatal(err)
			}
			s, err := bindSocket(path)
			if tt.err == "" {
				if err != nil {
					t.Fatal(err)
				}
				defer unix.Close(s.fd)
				c, err := net.Dial("unix", path)
				if err != nil {
					t.Fatal(err)
				}
				c.Close()
				return
			}
			if want := strings.ReplaceAll(tt.err, "%s", path); err == nil || !strings.HasPrefix(err.Error(), want) || exitCode(err) != exitNetwork {
				t.Errorf("got %v (exit code %d); want %s (%d)", err, exitCode(err), want, exitNetwork)
			}
		})
	}
}

// The longest possible path works.
func TestBindSocketLongestPath(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "l")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	s, err := bindSocket(dir + "/" + strings.Repeat("x", maxSunPath-len(dir)-1))
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(s.fd)
}

func TestUnlinkLeavesOthersAlone(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "s")
	s, err := bindSocket(path)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(s.fd)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s.unlink(slog.New(slog.DiscardHandler))
	if _, err := os.Stat(path); err != nil {
		t.Errorf("another one's file: %v", err)
	}
}

func TestAdoptSockets(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	p := paths{lockSocket: dir + "/lock", adminSocket: dir + "/admin"}
	if err := os.Symlink(dir, dir+"/link"); err != nil {
		t.Fatal(err)
	}
	open := func(domain, kind int, path string, listens bool) int {
		fd, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		if path != "" {
			if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
				t.Fatal(err)
			}
		}
		if listens {
			if err := unix.Listen(fd, 5); err != nil {
				t.Fatal(err)
			}
		}
		return fd
	}
	lock := open(unix.AF_UNIX, unix.SOCK_STREAM, dir+"/lock", true)
	admin := open(unix.AF_UNIX, unix.SOCK_STREAM, dir+"/admin", false) // only bound
	other := open(unix.AF_UNIX, unix.SOCK_STREAM, dir+"/other", true)
	unbound := open(unix.AF_UNIX, unix.SOCK_STREAM, "", false)
	datagram := open(unix.AF_UNIX, unix.SOCK_DGRAM, dir+"/datagram", false)
	inet := open(unix.AF_INET, unix.SOCK_STREAM, "", true)
	file, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(file)

	for _, tt := range []struct {
		name        string
		passed      []systemd.Descriptor
		lock, admin int // -1: none
		err         string
	}{
		{"by name", []systemd.Descriptor{{FD: lock, Name: lockUnit}, {FD: admin, Name: adminUnit}}, lock, admin, ""},
		{"other order", []systemd.Descriptor{{FD: admin, Name: adminUnit}, {FD: lock, Name: lockUnit}}, lock, admin, ""},
		{"by path", []systemd.Descriptor{{FD: admin, Path: dir + "/admin"}, {FD: lock, Path: dir + "/lock"}}, lock, admin, ""},
		{"by path, other name", []systemd.Descriptor{{FD: lock, Name: "locks", Path: dir + "/lock"}}, lock, -1, ""},
		{"by path through a link", []systemd.Descriptor{{FD: lock, Path: dir + "/link/lock"}}, lock, -1, ""},
		{"a name beats a path", []systemd.Descriptor{{FD: lock, Name: adminUnit, Path: dir + "/lock"}}, -1, lock, ""},
		{"by name at another path", []systemd.Descriptor{{FD: other, Name: lockUnit, Path: dir + "/other"}}, other, -1, ""},
		{"lock only", []systemd.Descriptor{{FD: lock, Name: lockUnit}}, lock, -1, ""},
		{"admin only", []systemd.Descriptor{{FD: admin, Name: adminUnit}}, -1, admin, ""},
		{"unknown", []systemd.Descriptor{{FD: lock, Name: lockUnit}, {FD: other, Name: "x.socket", Path: dir + "/other"}}, -1, -1,
			`(name "x.socket", path "` + dir + `/other") was passed, which is neither the lock socket`},
		{"twice", []systemd.Descriptor{{FD: lock, Name: lockUnit}, {FD: other, Name: lockUnit}}, -1, -1, "is that socket already"},
		{"unbound", []systemd.Descriptor{{FD: unbound, Name: lockUnit}}, -1, -1, "is not bound"},
		{"datagram", []systemd.Descriptor{{FD: datagram, Name: lockUnit}}, -1, -1, "is not a UNIX stream socket"},
		{"inet", []systemd.Descriptor{{FD: inet, Name: lockUnit}}, -1, -1, "is not a UNIX stream socket"},
		{"file", []systemd.Descriptor{{FD: file, Name: lockUnit}}, -1, -1, "is not a socket"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := adoptSockets(p, tt.passed)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) || exitCode(err) != exitNetwork {
					t.Errorf("got %v (exit code %d); want ... %s", err, exitCode(err), tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			fd := func(s *socket) int {
				if s == nil {
					return -1
				}
				if s.bound {
					t.Error("a passed socket's file would be removed at the end")
				}
				return s.fd
			}
			if fd(got.lock) != tt.lock || fd(got.admin) != tt.admin {
				t.Errorf("got lock %d, admin %d; want %d, %d", fd(got.lock), fd(got.admin), tt.lock, tt.admin)
			}
			for _, s := range got.all() {
				if accepts, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || accepts != 1 {
					t.Errorf("descriptor %d doesn't listen: %d, %v", s.fd, accepts, err)
				}
				if flags, err := unix.FcntlInt(uintptr(s.fd), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK == 0 {
					t.Errorf("descriptor %d has flags %#x, %v; want O_NONBLOCK", s.fd, flags, err)
				}
			}
		})
	}
}
