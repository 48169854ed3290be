// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"fmt"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/systemd"
)

const (
	// socketMode lets only the daemon's own user connect; clients of other users don't even
	// reach the check of their credentials.
	socketMode = 0o700
	// backlog is how many clients can wait to be accepted, as with the C daemon; those above it
	// block in connect(2).
	backlog = 30
	// maxSunPath is the longest path that fits sockaddr_un with its final NUL (unix(7)).
	maxSunPath = 107
)

// socket is a listening UNIX socket. Its descriptor is given to a server, which closes it.
type socket struct {
	fd   int
	path string // "": passed to us without a path of the file system

	// bound: we made the file, so we remove it, if it is still this one.
	bound    bool
	dev, ino uint64
}

// bindSocket makes a listening socket at path. A file that nobody listens on is replaced; a living
// daemon's socket isn't, even if it has another pid file.
func bindSocket(path string) (_ *socket, err error) {
	defer func() {
		if err != nil {
			err = &startError{exitNetwork, err}
		}
	}()
	if len(path) > maxSunPath {
		return nil, fmt.Errorf("path '%s' is too long for a UNIX socket: %d bytes, at most %d are possible; choose a shorter directory (XDG_RUNTIME_DIR)", path, len(path), maxSunPath)
	}
	if err := probeSocket(path); err != nil {
		return nil, err
	}
	if err := unix.Unlink(path); err != nil && err != unix.ENOENT && err != unix.EISDIR {
		return nil, fmt.Errorf("cannot remove the old socket '%s': %s", path, errnoText(err))
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot create a socket: %s", errnoText(err))
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	// bind(2) takes the file's mode from the socket's own inode, less the umask, so there is no
	// moment in which the file is open to others, and the umask of the process stays as it is.
	if err := unix.Fchmod(fd, socketMode); err != nil {
		return nil, fmt.Errorf("cannot set the mode of a socket: %s", errnoText(err))
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return nil, fmt.Errorf("Failed to bind socket to '%s': %s", path, errnoText(err)) //lint:ignore ST1005 the C daemon's text
	}
	s := &socket{fd: fd, path: path, bound: true}
	defer func() {
		if err != nil {
			unix.Unlink(path)
		}
	}()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return nil, fmt.Errorf("cannot stat socket '%s': %s", path, errnoText(err))
	}
	s.dev, s.ino = st.Dev, st.Ino
	if st.Mode&0o777 != socketMode { // a umask that keeps things from ourselves
		if err := unix.Chmod(path, socketMode); err != nil {
			return nil, fmt.Errorf("cannot set the mode of socket '%s': %s", path, errnoText(err))
		}
	}
	// At once, so that another instance that probes the path sees somebody alive.
	if err := unix.Listen(fd, backlog); err != nil {
		return nil, fmt.Errorf("cannot listen on socket '%s': %s", path, errnoText(err))
	}
	return s, nil
}

// probeSocket returns nil if nobody listens at path, so that what is there may be replaced.
func probeSocket(path string) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("cannot create a socket: %s", errnoText(err))
	}
	defer unix.Close(fd)
	switch err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err {
	case unix.ENOENT, unix.ECONNREFUSED, unix.ENOTDIR:
		return nil // bind says it if the path itself is impossible
	case nil, unix.EAGAIN: // EAGAIN: alive, with a full backlog
		by := "another process"
		if cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil && cred.Pid > 0 {
			by = fmt.Sprintf("process %d", cred.Pid)
		}
		return fmt.Errorf("%s listens on socket '%s' already; stop it first (if it is systemd: stop the socket unit, or let systemd start the service)", by, path)
	default:
		return fmt.Errorf("cannot tell whether socket '%s' is in use: %s", path, errnoText(err))
	}
}

// unlink removes the socket's file if we made it and it is still ours. It is called while we still
// listen: an instance that starts at this moment would take a file without listener for a stale one,
// and then we would remove the other one's.
func (s *socket) unlink(log *slog.Logger) {
	if !s.bound {
		return
	}
	s.bound = false
	var st unix.Stat_t
	err := unix.Lstat(s.path, &st)
	switch {
	case err == unix.ENOENT:
		return
	case err == nil && (st.Dev != s.dev || st.Ino != s.ino):
		log.Warn("a socket file is no longer ours, it is left as it is", "path", s.path)
		return
	case err == nil:
		err = unix.Unlink(s.path)
	}
	if err != nil {
		log.Warn("cannot remove a socket file", "path", s.path, "error", err)
	}
}

// sockets are what the daemon listens on; one that is nil isn't served.
type sockets struct {
	lock, admin *socket
}

func (s *sockets) all() []*socket {
	var all []*socket
	for _, one := range []*socket{s.lock, s.admin} {
		if one != nil {
			all = append(all, one)
		}
	}
	return all
}

// Names of the sockets that systemd passes: those of the socket units.
const (
	lockUnit  = "virtlockd.socket"
	adminUnit = "virtlockd-admin.socket"
)

// openSockets takes over the sockets that we were passed or, if there were none, makes our own. With
// passed ones it makes none besides: an administrator who enabled only the lock socket doesn't want the
// other one.
func openSockets(p paths, passed []systemd.Descriptor) (s sockets, err error) {
	if len(passed) > 0 {
		return adoptSockets(p, passed)
	}
	defer serialize(p.runDir)()
	if s.lock, err = bindSocket(p.lockSocket); err != nil {
		return sockets{}, err
	}
	if s.admin, err = bindSocket(p.adminSocket); err != nil {
		unix.Unlink(s.lock.path)
		unix.Close(s.lock.fd)
		return sockets{}, err
	}
	return s, nil
}

// serialize keeps two instances that start in the same moment, with pid files of their own, from taking each
// other's new socket for a stale one. It returns what ends that. Whoever may read the directory may lock it
// too, so it is not waited for long, and not depended on.
func serialize(dir string) (end func()) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return func() {} // bind says it, if it matters
	}
	for deadline := time.Now().Add(time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if err != unix.EWOULDBLOCK && err != unix.EINTR || time.Now().After(deadline) {
			return func() { unix.Close(fd) }
		}
	}
}

// adoptSockets finds out which of the passed descriptors is which: by its name or, if that says
// nothing, by its path.
func adoptSockets(p paths, passed []systemd.Descriptor) (s sockets, err error) {
	for _, d := range passed {
		var slot **socket
		switch {
		case d.Name == lockUnit, d.Name != adminUnit && samePath(d.Path, p.lockSocket):
			slot = &s.lock
		case d.Name == adminUnit, samePath(d.Path, p.adminSocket):
			slot = &s.admin
		default:
			return sockets{}, &startError{exitNetwork, fmt.Errorf("socket activation: %v was passed, which is neither the lock socket (name %q or path %q) nor the admin socket (name %q or path %q)",
				d, lockUnit, p.lockSocket, adminUnit, p.adminSocket)}
		}
		if *slot != nil {
			return sockets{}, &startError{exitNetwork, fmt.Errorf("socket activation: %v was passed, but descriptor %d is that socket already; set one ListenStream= in each socket unit", d, (*slot).fd)}
		}
		if err := usable(d); err != nil {
			return sockets{}, &startError{exitNetwork, err}
		}
		*slot = &socket{fd: d.FD, path: d.Path}
	}
	return s, nil
}

// samePath tells whether two paths lead to one file, as /run and /var/run do.
func samePath(a, b string) bool {
	if a == "" || b == "" {
		return false
	}
	if a == b {
		return true
	}
	var sa, sb unix.Stat_t
	return unix.Stat(a, &sa) == nil && unix.Stat(b, &sb) == nil && sa.Dev == sb.Dev && sa.Ino == sb.Ino
}

// usable checks that clients can be accepted on a passed descriptor, and prepares it.
func usable(d systemd.Descriptor) error {
	domain, err := unix.GetsockoptInt(d.FD, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return fmt.Errorf("socket activation: %v is not a socket: %w", d, os.NewSyscallError("getsockopt", err))
	}
	kind, err := unix.GetsockoptInt(d.FD, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return fmt.Errorf("socket activation: %v: %w", d, os.NewSyscallError("getsockopt", err))
	}
	if domain != unix.AF_UNIX || kind != unix.SOCK_STREAM {
		return fmt.Errorf("socket activation: %v is not a UNIX stream socket; use ListenStream= with a path in the socket unit", d)
	}
	if err := unix.SetNonblock(d.FD, true); err != nil {
		return fmt.Errorf("socket activation: %v: %w", d, os.NewSyscallError("fcntl", err))
	}
	accepts, err := unix.GetsockoptInt(d.FD, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil {
		return fmt.Errorf("socket activation: %v: %w", d, os.NewSyscallError("getsockopt", err))
	}
	if accepts == 0 { // only bound, which is fine; else it can't be made to listen
		if err := unix.Listen(d.FD, backlog); err != nil {
			return fmt.Errorf("socket activation: %v is not bound, or it is a connection; use Accept=no in the socket unit: %w", d, os.NewSyscallError("listen", err))
		}
	}
	return nil
}
