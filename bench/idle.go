// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// idleEnv makes this program a crowd of so many idle clients.
const idleEnv = "VIRTLOCKD_BENCH_IDLE"

// crowd is a process with idle clients. Each has its own, so that the limit of open files, which is a process's, holds for those of one server
// and not for all that are measured in turns.
type crowd struct {
	cmd *exec.Cmd
	in  io.Closer // its end makes the clients go
}

// connect makes idle clients: registered for their process and restricted, as a guest's own connection is.
func (t *subject) connect(n int) *crowd {
	t.s.Helper()
	c := &crowd{cmd: &exec.Cmd{
		Path:        "/proc/self/exe",
		Args:        []string{"virtlockd-bench-idle"},
		Env:         append(os.Environ(), fmt.Sprintf("%s=%d", idleEnv, n)),
		Stderr:      os.Stderr,
		SysProcAttr: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL},
	}}
	in, err := c.cmd.StdinPipe()
	t.s.must(err)
	out, err := c.cmd.StdoutPipe()
	t.s.must(err)
	c.in = in
	t.h.Must(c.cmd.Start) // in the namespace, where the socket is
	t.s.Cleanup(func() {
		_ = c.cmd.Process.Kill() // if it hasn't left
		_ = c.cmd.Wait()
	})
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.s.Fatalf("%d idle clients don't connect: %v\n%s", n, err, host.Shorten(t.d.Stderr()))
	}
	return c
}

// leave makes all clients disconnect at once, and waits until they have.
func (c *crowd) leave() {
	c.in.Close()
	_ = c.cmd.Wait()
}

// idle is the whole life of a crowd.
func idle() {
	raiseLimit()
	n, err := strconv.Atoi(os.Getenv(idleEnv))
	var fds []int
	if err == nil {
		fds, err = dialIdle("/run/libvirt/virtlockd-sock", n)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
	os.Stdout.Write([]byte{'\n'})
	os.Stdin.Read(make([]byte, 1))
	for _, fd := range fds {
		closeRaw(fd)
	}
	os.Exit(0)
}

// dialIdle connects n clients.
func dialIdle(sock string, n int) ([]int, error) {
	const batch = 24 // below the length of the queue of connections
	hello := append(owner(os.Getpid()), wire.Request(wire.ProcRestrict, 1, wire.FlagsArgs(0))...)
	fds := make([]int, 0, n)
	for len(fds) < n {
		var cs []*client
		for range min(batch, n-len(fds)) {
			c, err := dial(sock)
			if err != nil {
				return nil, fmt.Errorf("idle client %d: %w", len(fds), err)
			}
			fds = append(fds, c.fd)
			cs = append(cs, c)
			if err := c.send(hello); err != nil {
				return nil, fmt.Errorf("idle client %d: %w", len(fds), err)
			}
		}
		for _, c := range cs {
			for range 2 {
				if err := c.recv(); err != nil {
					return nil, fmt.Errorf("idle client %d: %w", len(fds), err)
				}
			}
		}
	}
	return fds, nil
}

// raiseLimit of open files as far as it goes.
func raiseLimit() {
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) == nil {
		l.Cur = l.Max
		unix.Setrlimit(unix.RLIMIT_NOFILE, &l)
	}
}
