// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"virtlockd/internal/systemd"
)

// A Go program has threads from the start and so can't fork(2) itself into the background. It starts
// itself anew instead, with the same arguments and environment:
//
//	the caller's child   starts the go-between in a new session, waits for the report
//	the go-between       leads the session; starts the daemon and ends
//	the daemon           is nobody's child and leads no session, so that no terminal it opens
//	                     ever becomes its own; reports when it serves clients, or why it can't
//
// The report comes through a pipe: nothing but its end if the daemon died, else one byte, the exit
// code, and the reason.

// envDetach marks the two started processes: "STAGE:PIPE:PASSED", where PIPE is the descriptor of the
// pipe's writing end and PASSED is 1 if socket activation's descriptors, addressed to the process that
// we started from, are now meant for us. It is removed from the environment before anything else is done.
const envDetach = "VIRTLOCKD_DETACH"

const (
	goBetween = 1
	detached  = 2
)

// maxReport bounds what is read of a report.
const maxReport = 64 << 10

// reporter is the daemon's end of the pipe. nil: nobody waits.
type reporter struct{ fd int }

// report tells the waiting process how the start ended; only the first report counts.
func (r *reporter) report(code int, reason string) {
	if r == nil || r.fd < 0 {
		return
	}
	msg := append([]byte{byte(code)}, reason[:min(len(reason), maxReport-1)]...)
	for len(msg) > 0 {
		n, err := unix.Write(r.fd, msg)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			break // nobody waits any more
		}
		msg = msg[n:]
	}
	unix.Close(r.fd)
	r.fd = -1
}

// detachStage tells which of the processes above we are: 0, goBetween or detached.
func detachStage() (stage int, r *reporter) {
	mark, ok := os.LookupEnv(envDetach)
	if !ok {
		return 0, nil
	}
	os.Unsetenv(envDetach)
	var passed int
	fd := -1
	if n, err := fmt.Sscanf(mark, "%d:%d:%d", &stage, &fd, &passed); n != 3 || err != nil ||
		stage != goBetween && stage != detached || fd < systemd.FirstFD {
		return 0, nil
	}
	if !isPipe(fd) {
		return 0, nil
	}
	unix.CloseOnExec(fd)
	if passed == 1 {
		systemd.Readdress(os.Getpid())
	}
	return stage, &reporter{fd}
}

// isPipe tells whether a report can be written to what a variable of the environment names: one that strayed in must not make us write
// anywhere.
func isPipe(fd int) bool {
	var st unix.Stat_t
	return unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFIFO
}

// passedOn counts the descriptors of socket activation that a started process gets as well.
func passedOn(pid int) int {
	if !systemd.Passed(pid) {
		return 0
	}
	n, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if err != nil || n < 0 || n > 1024 {
		return 0 // wrong: the daemon will say so
	}
	return n
}

// startSelf starts this program again as the given stage. It gets the passed descriptors under their
// numbers, the pipe behind them, and nothing else that is open here.
func startSelf(args []string, stage, pipe int, attr *syscall.SysProcAttr) (pid int, err error) {
	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, &os.PathError{Op: "open", Path: "/dev/null", Err: err}
	}
	defer unix.Close(null)
	// What whoever started us left open is not ours to keep: a daemon that holds its caller's pipe
	// keeps the caller waiting for ever.
	keepFromChildren()
	files := []uintptr{uintptr(null), uintptr(null), uintptr(null)}
	passed := passedOn(os.Getpid())
	for i := range passed {
		files = append(files, uintptr(systemd.FirstFD+i))
	}
	mark := fmt.Sprintf("%s=%d:%d:%d", envDetach, stage, len(files), min(passed, 1))
	files = append(files, uintptr(pipe))

	self := selfPath()
	pid, err = syscall.ForkExec(self, args, &syscall.ProcAttr{
		Env:   append(os.Environ(), mark),
		Files: files,
		Sys:   attr,
	})
	if err != nil {
		return 0, &os.PathError{Op: "exec", Path: self, Err: err}
	}
	return pid, nil
}

// selfPath is where this program can be started again: its path, so that the process has the right name
// in ps(1), unless another file is there meanwhile.
func selfPath() string {
	const link = "/proc/self/exe"
	if path, err := os.Executable(); err == nil && sameFile(path, link) {
		return path
	}
	return link
}

func sameFile(a, b string) bool {
	sa, errA := os.Stat(a)
	sb, errB := os.Stat(b)
	return errA == nil && errB == nil && os.SameFile(sa, sb)
}

// detach starts the daemon in the background and waits until it serves clients.
func detach(args []string) error {
	fail := func(err error) error {
		return &startError{exitUsage, fmt.Errorf("cannot run in the background: %w", err)}
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return fail(os.NewSyscallError("pipe2", err))
	}
	pid, err := startSelf(args, goBetween, pipe[1], &syscall.SysProcAttr{Setsid: true})
	unix.Close(pipe[1])
	if err != nil {
		unix.Close(pipe[0])
		return fail(err)
	}
	r := os.NewFile(uintptr(pipe[0]), "report of the daemon's start")
	defer r.Close()
	err = awaitReport(r)
	for {
		if _, err := unix.Wait4(pid, nil, 0, nil); err != unix.EINTR {
			break
		}
	}
	return err
}

// awaitReport waits until the daemon serves clients, or has said why it can't, or has ended.
func awaitReport(r io.Reader) error {
	report, err := io.ReadAll(io.LimitReader(r, maxReport))
	switch {
	case err != nil:
		return &startError{exitUsage, fmt.Errorf("cannot tell whether the daemon runs in the background: %w", err)}
	case len(report) == 0:
		return &startError{exitUsage, errors.New("the daemon ended before it served clients; run it without --daemon to see why")}
	case report[0] == exitOK:
		return nil
	}
	return &startError{int(report[0]), errors.New(string(bytes.TrimSpace(report[1:])))}
}

// mediate is the go-between.
func mediate(args []string, r *reporter) int {
	if _, err := startSelf(args, detached, r.fd, nil); err != nil {
		r.report(exitUsage, "cannot run in the background: "+err.Error())
		return exitUsage
	}
	return 0
}
