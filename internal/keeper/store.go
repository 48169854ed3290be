// SPDX-License-Identifier: LGPL-2.1-or-later

package keeper

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"virtlockd/internal/buildinfo"
	"virtlockd/internal/systemd"
)

const (
	// maxStored bounds the descriptors of the store. The daemon needs a handful.
	maxStored = 64
	// maxMessage bounds a message, in bytes, as systemd does.
	maxMessage = 4096
	// maxRound bounds how many messages are worked off before something else gets its turn. No queue is longer (unix(7),
	// net.unix.max_dgram_qlen: 10, with systemd 512).
	maxRound = 1024
)

// message is what the daemon may tell, see sd_notify(3).
type message struct {
	store, remove           bool
	name                    string // of the descriptors
	ready, stopping, reexec bool
	outward                 string // what is passed on to who started the keeper
}

// parse understands a message; false: it makes no sense, and all of it is refused. Lines that nobody knows are ignored.
func parse(data []byte) (m message, ok bool) {
	if len(data) > maxMessage || bytes.IndexByte(data, 0) >= 0 {
		return message{}, false
	}
	m.name = "stored"
	for line := range strings.SplitSeq(string(data), "\n") {
		switch key, value, _ := strings.Cut(line, "="); {
		case line == "FDSTORE=1":
			m.store = true
		case line == "FDSTOREREMOVE=1":
			m.remove = true
		case line == "KEEPER_REEXEC=1":
			m.reexec = true
		case key == "FDNAME":
			m.name = value
		case key == "READY", key == "RELOADING", key == "STOPPING", key == "STATUS", key == "MONOTONIC_USEC":
			m.ready = m.ready || line == "READY=1"
			m.stopping = m.stopping || line == "STOPPING=1"
			m.outward += line + "\n"
		}
	}
	return m, systemd.ValidName(m.name)
}

// buffers are for one message at a time. One byte more tells that a message is too long.
type buffers struct {
	data    [maxMessage + 1]byte
	control []byte
}

// bind makes the socket that the daemon notifies. A stranger who could send there could attach a descriptor whose last close hangs, and
// it would be ours. So the socket's file is removed at once, and its address is our descriptor of it, which the kernel lets only those of our
// user follow (/proc/PID/fd, proc_pid_fd(5)). It outlives us by nothing.
func (k *keeper) bind() (err error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	dir, err := k.makeDir()
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	at, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(at)
	path := fmt.Sprintf("/proc/self/fd/%d/notify", at) // however long the directory's name is
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return fmt.Errorf("in %s: %w", dir, os.NewSyscallError("bind", err))
	}
	file, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	k.notify, k.file = fd, file
	k.address = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), file)
	return nil
}

// makeDir makes a directory that nobody else may enter, for a moment.
func (k *keeper) makeDir() (string, error) {
	places := []string{buildinfo.Runstatedir, os.TempDir()}
	for _, kv := range k.env { // the daemon's: ours is small
		if dir, ok := strings.CutPrefix(kv, "XDG_RUNTIME_DIR="); ok {
			places = append([]string{dir}, places...)
		}
	}
	var errs []error
	for _, place := range places {
		dir, err := os.MkdirTemp(place, name+"-")
		if err == nil {
			return dir, nil
		}
		errs = append(errs, err)
	}
	return "", errors.Join(errs...)
}

// receive works off the messages that have come. What is sent after the wish for another binary is that one's business: so a barrier
// behind it is answered when that binary works. Nobody waits for that if the daemon has ended.
func (k *keeper) receive(ended bool) {
	if k.in.control == nil {
		k.in.control = make([]byte, unix.CmsgSpace(unix.SizeofUcred)+unix.CmsgSpace(4*maxStored))
	}
	for i := 0; i < maxRound && (ended || !k.reexec); i++ {
		// Who sent it comes first: others of our user can send, too, and everybody to an address that an earlier version has made. Their
		// descriptors are never taken out.
		who := k.in.control[:unix.CmsgSpace(unix.SizeofUcred)]
		_, n, _, _, err := unix.Recvmsg(k.notify, k.in.data[:1], who, unix.MSG_PEEK)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return
		}
		control := k.in.control
		if !k.fromDaemon(who[:n]) {
			control = nil
		}
		n, controlled, flags, _, err := unix.Recvmsg(k.notify, k.in.data[:], control, unix.MSG_CMSG_CLOEXEC)
		if err != nil || control == nil {
			continue
		}
		fds := descriptorsOf(control[:controlled])
		if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) == 0 {
			if m, ok := parse(k.in.data[:n]); ok {
				fds = k.work(m, fds)
			}
		}
		// This also answers BARRIER=1: all that was sent before is done.
		for _, fd := range fds {
			unix.Close(fd)
		}
	}
}

// fromDaemon tells whether a message comes from the daemon that runs, by the kernel's word (SCM_CREDENTIALS, unix(7)).
func (k *keeper) fromDaemon(control []byte) bool {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil || len(messages) != 1 || k.pidfd < 0 {
		return false
	}
	cred, err := unix.ParseUnixCredentials(&messages[0])
	return err == nil && int(cred.Pid) == k.pid && int(cred.Uid) == os.Getuid()
}

// descriptorsOf returns the descriptors that came with a message.
func descriptorsOf(control []byte) (fds []int) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil
	}
	for i := range messages {
		if some, err := unix.ParseUnixRights(&messages[i]); err == nil {
			fds = append(fds, some...)
		}
	}
	return fds
}

// work does what a message says. It returns the descriptors that weren't stored.
func (k *keeper) work(m message, fds []int) []int {
	if m.remove {
		left := k.items[:0]
		for _, it := range k.items {
			if it.name == m.name {
				unix.Close(it.fd)
			} else {
				left = append(left, it)
			}
		}
		k.items = left
	}
	if m.store {
		refused := fds[:0]
		for _, fd := range fds {
			if len(k.items) >= maxStored || k.has(fd) {
				refused = append(refused, fd)
			} else {
				k.items = append(k.items, item{fd: fd, name: m.name})
			}
		}
		fds = refused
	}
	if m.ready {
		k.ready, k.served, k.stopping = true, true, false
	}
	k.stopping = k.stopping || m.stopping
	k.reexec = k.reexec || m.reexec
	if m.outward != "" {
		_ = k.outward.Send(m.outward) // who doesn't listen misses it
	}
	return fds
}

// stored counts what daemons have stored.
func (k *keeper) stored() (n int) {
	for _, it := range k.items {
		if !it.given {
			n++
		}
	}
	return n
}

// has tells whether the open file fd is stored already, under whatever name.
func (k *keeper) has(fd int) bool {
	for _, it := range k.items {
		if sameFile(it.fd, fd) {
			return true
		}
	}
	return false
}

// sameFile tells whether two descriptors are of one open file. Where kcmp(2) is missing or forbidden it can be told of sockets only;
// a file that is kept twice does no harm.
func sameFile(a, b int) bool {
	const kcmpFile = 0
	pid := uintptr(os.Getpid())
	order, _, errno := unix.Syscall6(unix.SYS_KCMP, pid, pid, kcmpFile, uintptr(a), uintptr(b), 0)
	if errno == 0 {
		return order == 0
	}
	var sa, sb unix.Stat_t
	return unix.Fstat(a, &sa) == nil && unix.Fstat(b, &sb) == nil &&
		sa.Mode&unix.S_IFMT == unix.S_IFSOCK && sa.Dev == sb.Dev && sa.Ino == sb.Ino
}
