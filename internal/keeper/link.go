// SPDX-License-Identifier: LGPL-2.1-or-later

package keeper

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/systemd"
)

// The environment of a daemon that is kept.
const (
	envNotify = "NOTIFY_SOCKET"
	envKeeper = "VIRTLOCKD_KEEPER" // a mark
)

// mark says who keeps whom. It stays in the daemon's environment, so that it is still known after a live upgrade.
type mark struct {
	keeper int    // a pid
	start  uint64 // when it was started, which tells it from a later process with that pid; see startTime
	daemon int    // a pid; 0: the first process that reads it
	report int    // a descriptor, -1: none
	died   string // how the daemon before ended
}

func (m mark) String() string {
	return fmt.Sprintf("%d:%d:%d:%d:%s", m.keeper, m.start, m.daemon, m.report, m.died)
}

func parseMark(text string) (m mark, err error) {
	parts := strings.SplitN(text, ":", 5)
	if len(parts) != 5 {
		return m, fmt.Errorf("%s=%q: %d parts", envKeeper, text, len(parts))
	}
	var errs [4]error
	m.keeper, errs[0] = strconv.Atoi(parts[0])
	m.start, errs[1] = strconv.ParseUint(parts[1], 10, 64)
	m.daemon, errs[2] = strconv.Atoi(parts[2])
	m.report, errs[3] = strconv.Atoi(parts[3])
	m.died = parts[4]
	return m, errors.Join(errs[:]...)
}

// Link is what a daemon knows of its keeper.
type Link struct {
	PID int
	// PIDFD becomes readable when the keeper has ended, see pidfd_open(2); -1: it has already. The daemon then needs a new one:
	// see Adopt.
	PIDFD int
	// Report is the descriptor of that name in Config, if this is the first daemon; -1 otherwise.
	Report int
	// Died says how the daemon before this one ended, "" if this is the first.
	Died string
}

// Kept tells a process that a keeper has started, or that has adopted one and was upgraded since, about that; nil: neither. It has to be
// called before systemd.Descriptors, for which it prepares what was stored, and once.
func Kept() *Link {
	text, ok := os.LookupEnv(envKeeper)
	if !ok {
		return nil
	}
	m, err := parseMark(text)
	pid := os.Getpid()
	if err != nil || m.daemon != 0 && m.daemon != pid {
		os.Unsetenv(envKeeper) // it strayed in
		return nil
	}
	if m.daemon == 0 && os.Getenv("LISTEN_FDS") != "" {
		systemd.Readdress(pid)
	}
	l := &Link{PID: m.keeper, PIDFD: openProcess(m.keeper, m.start), Report: -1, Died: m.died}
	if m.report >= 0 {
		if _, err := unix.FcntlInt(uintptr(m.report), unix.F_SETFD, unix.FD_CLOEXEC); err == nil {
			l.Report = m.report
		}
	}
	os.Setenv(envKeeper, mark{m.keeper, m.start, pid, -1, ""}.String())
	return l
}

// Notifier sends to the keeper, and to nobody else once that has ended.
func (l *Link) Notifier() systemd.Notifier {
	if l.PIDFD < 0 {
		return systemd.Notifier{}
	}
	return systemd.NewNotifier().For(l.PIDFD)
}

// Reexec asks the keeper to go on as the binary that is installed now, for example after a live upgrade of the daemon. It keeps
// everything, and its pid. If that binary can't be run it goes on as it is; if it can't keep, the keeper ends. A barrier sent afterwards
// is answered when that is over.
func (l *Link) Reexec() error { return l.Notifier().Send("KEEPER_REEXEC=1") }

// Close closes the pidfd.
func (l *Link) Close() {
	if l.PIDFD >= 0 {
		unix.Close(l.PIDFD)
		l.PIDFD = -1
	}
}

// openProcess returns a pidfd of the process with that pid and start time, or -1 if it has ended.
func openProcess(pid int, start uint64) int {
	fd, err := unix.PidfdOpen(pid, 0) // always close-on-exec
	if err != nil {
		return -1
	}
	if now, err := startTime(pid); err != nil || now != start {
		unix.Close(fd)
		return -1
	}
	return fd
}

// startTime returns when a process was started, in clock ticks since boot (proc_pid_stat(5)).
func startTime(pid int) (uint64, error) {
	path := fmt.Sprintf("/proc/%d/stat", pid)
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	// The name in parentheses is anything; it is the second of the fields, the time the 22nd.
	text := string(data)
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("%s is too short: %q", path, text)
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// Where a keeper that a daemon starts gets its descriptors.
const (
	adoptState = systemd.FirstFD + iota
	adoptPidfd
	adoptHello
)

// Adopt starts a keeper for this process, which had none, or one that has ended, and waits for it, for timeout at most. It is nobody's
// child. From then on the environment leads to it, and whatever is to be kept has to be stored there. The daemon counts as ready. What it
// is started with, should it die, is c, without Report.
func Adopt(c Config, timeout time.Duration) (*Link, error) {
	l, err := adopt(c, timeout)
	if err != nil {
		return nil, fmt.Errorf("start a keeper: %w", err)
	}
	return l, nil
}

func adopt(c Config, timeout time.Duration) (*Link, error) {
	pidfd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(pidfd)
	s := newState(c)
	s.pid, s.pidfd, s.hello = os.Getpid(), adoptPidfd, adoptHello
	s.ready, s.served = true, true
	state, err := s.save()
	if err != nil {
		return nil, err
	}
	defer unix.Close(state)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	defer unix.Close(pair[0])
	pid, err := forkKeeper(argFork, state, pidfd, pair[1])
	unix.Close(pair[1])
	if err != nil {
		return nil, err
	}
	for {
		if _, err := unix.Wait4(pid, nil, 0, nil); err != unix.EINTR {
			break
		}
	}
	return meet(pair[0], timeout)
}

// forkKeeper starts a keeper process. The descriptors get the numbers that the state has for them.
func forkKeeper(arg string, state, pidfd, hello int) (pid int, err error) {
	pid, err = syscall.ForkExec(self, []string{name, arg + strconv.Itoa(adoptState)}, &syscall.ProcAttr{
		Dir: "/", Env: environment,
		Files: []uintptr{0, 1, 2, uintptr(state), uintptr(pidfd), uintptr(hello)},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, &os.PathError{Op: "exec", Path: self, Err: err}
	}
	return pid, nil
}

// fork is the process between: its child is nobody's when it has ended. It returns the exit code.
func fork() int {
	if _, err := forkKeeper(argState, adoptState, adoptPidfd, adoptHello); err != nil {
		fmt.Fprintf(os.Stderr, "%s: error: %v\n", name, err)
		return 1
	}
	return 0
}

// greet tells the daemon that has started us where we are. Without its answer it doesn't count on us, and there may be another keeper by
// now, so we had better not be one.
func (k *keeper) greet() error {
	pid := os.Getpid()
	start, err := startTime(pid)
	if err != nil {
		return err
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(pidfd)
	text := k.address + " " + mark{pid, start, k.pid, -1, ""}.String()
	if err := unix.Sendmsg(k.hello, []byte(text), unix.UnixRights(pidfd), nil, unix.MSG_NOSIGNAL); err != nil {
		return fmt.Errorf("greet the daemon: %w", os.NewSyscallError("sendmsg", err))
	}
	for {
		n, err := unix.Read(k.hello, make([]byte, 1))
		switch {
		case err == unix.EINTR:
		case err != nil:
			return fmt.Errorf("greet the daemon: %w", os.NewSyscallError("read", err))
		case n == 0:
			return errors.New("greet the daemon: it does not want a keeper any more")
		default:
			return nil
		}
	}
}

// meet is the other side of greet.
func meet(hello int, timeout time.Duration) (*Link, error) {
	tv := unix.NsecToTimeval(int64(timeout))
	if err := unix.SetsockoptTimeval(hello, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return nil, os.NewSyscallError("setsockopt", err)
	}
	data, control := make([]byte, 256), make([]byte, unix.CmsgSpace(4))
	var n, controlled int
	err := error(unix.EINTR)
	for err == unix.EINTR {
		n, controlled, _, _, err = unix.Recvmsg(hello, data, control, unix.MSG_CMSG_CLOEXEC)
	}
	switch {
	case err == unix.EAGAIN:
		return nil, fmt.Errorf("it did not answer in %v: %w", timeout, os.ErrDeadlineExceeded)
	case err != nil:
		return nil, os.NewSyscallError("recvmsg", err)
	}
	fds := descriptorsOf(control[:controlled])
	address, text, ok := strings.Cut(string(data[:n]), " ")
	m, err := parseMark(text)
	if ok && err == nil && len(fds) == 1 {
		if _, err = unix.Write(hello, []byte{1}); err == nil {
			os.Setenv(envNotify, address)
			os.Setenv(envKeeper, text)
			return &Link{PID: m.keeper, PIDFD: fds[0], Report: -1}, nil
		}
	}
	for _, fd := range fds {
		unix.Close(fd)
	}
	return nil, fmt.Errorf("it ended, or said %q with %d descriptors", data[:n], len(fds))
}
