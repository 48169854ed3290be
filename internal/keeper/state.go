// SPDX-License-Identifier: LGPL-2.1-or-later

package keeper

import (
	"cmp"
	"fmt"
	"io"
	"math"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"virtlockd/internal/systemd"
)

// item is one stored descriptor.
type item struct {
	fd    int
	name  string
	given bool // by who started the keeper, not by the daemon
}

// state is what outlives an exec of the keeper. Descriptors are -1 where there is none.
type state struct {
	args, env []string // the daemon's, as it is started
	dir       string
	outer     string // who is told that the daemon is ready: NOTIFY_SOCKET of who started us
	report    int    // for the first daemon only

	notify  int    // the socket that the daemon notifies
	file    int    // of notify, by which it is reached
	address string // of notify, by way of file
	hello   int    // where the daemon that has started us waits for it

	pid, pidfd int    // the daemon
	child      bool   // it is ours
	ready      bool   // it has said READY=1
	stopping   bool   // it has said STOPPING=1, and not READY=1 since
	served     bool   // any daemon has said READY=1
	quick      int    // how many in a row have ended before they said it
	how        string // the last one ended
	pending    uint64 // signals that it is still to get, a set

	items []item
}

// maxState bounds a state, in bytes. Arguments and environment are bounded by the kernel to a quarter of the stack, usually 2 MiB.
const maxState = 64 << 20

func newState(c Config) *state {
	s := &state{args: c.Args, dir: c.Dir, report: -1, notify: -1, file: -1, hello: -1, pidfd: -1}
	for _, kv := range os.Environ() {
		switch key, _, _ := strings.Cut(kv, "="); key {
		case envNotify, envKeeper, "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "FDSTORE":
		default:
			s.env = append(s.env, kv)
		}
	}
	return s
}

// fields are all that have one value.
func (s *state) fields() []field {
	return []field{
		{"dir", &s.dir}, {"outer", &s.outer}, {"address", &s.address}, {"how", &s.how},
		{"report", &s.report}, {"notify", &s.notify}, {"file", &s.file}, {"hello", &s.hello}, {"pid", &s.pid}, {"pidfd", &s.pidfd},
		{"child", &s.child}, {"ready", &s.ready}, {"stopping", &s.stopping}, {"served", &s.served},
		{"quick", &s.quick}, {"pending", &s.pending},
	}
}

type field struct {
	key   string
	value any // a pointer
}

// encode writes KEY=VALUE, each with a NUL at its end, as in the environment: not everything there is text, so it can't be JSON. Another
// version ignores keys that it doesn't know.
func (s *state) encode() (b []byte) {
	for _, f := range s.fields() {
		var value any
		switch p := f.value.(type) {
		case *string:
			value = *p
		case *int:
			value = *p
		case *bool:
			value = *p
		case *uint64:
			value = *p
		}
		b = fmt.Appendf(b, "%s=%v\x00", f.key, value)
	}
	for _, arg := range s.args {
		b = fmt.Appendf(b, "arg=%s\x00", arg)
	}
	for _, env := range s.env {
		b = fmt.Appendf(b, "env=%s\x00", env)
	}
	for _, it := range s.items {
		b = fmt.Appendf(b, "item=%d %t %s\x00", it.fd, it.given, it.name)
	}
	return b
}

func decodeState(data string) (*state, error) {
	s := newState(Config{})
	s.env = nil
	fields := s.fields()
	for entry := range strings.SplitSeq(data, "\x00") {
		key, value, _ := strings.Cut(entry, "=")
		switch key {
		case "arg":
			s.args = append(s.args, value)
		case "env":
			s.env = append(s.env, value)
		case "item":
			var it item
			number, rest, _ := strings.Cut(value, " ")
			given, name, ok := strings.Cut(rest, " ")
			if _, err := fmt.Sscan(number+" "+given, &it.fd, &it.given); err != nil || !ok {
				return nil, fmt.Errorf("state of the keeper: %q", entry)
			}
			it.name = name
			s.items = append(s.items, it)
		}
		for _, f := range fields {
			if f.key != key {
				continue
			}
			if p, ok := f.value.(*string); ok {
				*p = value
			} else if _, err := fmt.Sscan(value, f.value); err != nil {
				return nil, fmt.Errorf("state of the keeper: %q: %w", entry, err)
			}
		}
	}
	if len(s.args) == 0 {
		return nil, fmt.Errorf("state of the keeper: %d bytes, without the daemon's command line", len(data))
	}
	return s, nil
}

// descriptors lists all that a keeper needs.
func (s *state) descriptors() (fds []int) {
	for _, fd := range []int{s.report, s.notify, s.file, s.hello, s.pidfd} {
		if fd >= 0 {
			fds = append(fds, fd)
		}
	}
	for _, it := range s.items {
		fds = append(fds, it.fd)
	}
	return fds
}

// save writes the state into a memory file.
func (s *state) save() (fd int, err error) {
	if fd, err = unix.MemfdCreate(name, unix.MFD_CLOEXEC); err != nil {
		return -1, os.NewSyscallError("memfd_create", err)
	}
	for data := s.encode(); len(data) > 0; {
		n, err := unix.Write(fd, data)
		if err != nil {
			unix.Close(fd)
			return -1, os.NewSyscallError("write", err)
		}
		data = data[n:]
	}
	return fd, nil
}

// loadState reads a state, closes its file, and sees to it that its descriptors are open, and closed in children.
func loadState(fd int) (*state, error) {
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("state of the keeper: %w", os.NewSyscallError("fstat", err))
	}
	if st.Size > maxState {
		return nil, fmt.Errorf("state of the keeper: %d bytes are too many", st.Size)
	}
	data := make([]byte, st.Size)
	if n, err := unix.Pread(fd, data, 0); err != nil || n < len(data) {
		return nil, fmt.Errorf("state of the keeper: %d of %d bytes are read: %w", n, len(data), cmp.Or(err, io.ErrUnexpectedEOF))
	}
	s, err := decodeState(string(data))
	if err != nil {
		return nil, err
	}
	for _, fd := range s.descriptors() {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
			return nil, fmt.Errorf("state of the keeper: descriptor %d is not open: %w", fd, os.NewSyscallError("fcntl", err))
		}
	}
	return s, nil
}

// become runs a keeper with this state in our place. It returns only if that didn't work. Nothing else in the process may start
// children meanwhile.
func (s *state) become(program string) error {
	fail := func(err error) error { return fmt.Errorf("run the keeper, %s: %w", program, err) }
	fd, err := s.save()
	if err != nil {
		return fail(err)
	}
	defer unix.Close(fd)
	// What our caller may have left open is not ours to keep. Before Linux 5.11 it stays open.
	_ = unix.CloseRange(systemd.FirstFD, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	inherit := func(fd int, flags int) error {
		_, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, flags)
		return os.NewSyscallError("fcntl", err)
	}
	fds := append(s.descriptors(), fd)
	defer func() {
		for _, fd := range fds {
			_ = inherit(fd, unix.FD_CLOEXEC)
		}
	}()
	for _, fd := range fds {
		if err := inherit(fd, 0); err != nil {
			return fail(fmt.Errorf("descriptor %d: %w", fd, err))
		}
	}
	return fail(os.NewSyscallError("execve", syscall.Exec(program, []string{name, argState + fmt.Sprint(fd)}, environment)))
}
