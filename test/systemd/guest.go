// SPDX-License-Identifier: LGPL-2.1-or-later

package systemd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// Guest is a process on the machine that plays the part of a virtual machine: it has a process id there, and its
// connections are its own for the daemon. It dies of SIGTERM, and with the test.
type Guest struct {
	m       *Machine
	t       testing.TB
	cmd     *exec.Cmd
	control int
	pid     int
	ended   chan struct{}
	end     func()
}

// Guest starts a process.
func (m *Machine) Guest() *Guest {
	m.t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		m.t.Fatalf("socketpair: %v", err)
	}
	tv := unix.NsecToTimeval(host.Patience.Nanoseconds())
	if err := unix.SetsockoptTimeval(pair[0], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		m.t.Fatalf("setsockopt: %v", err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "control")
	defer theirs.Close()
	ctx, cancel := context.WithCancel(context.Background())
	g := &Guest{m: m, t: m.t, control: pair[0], ended: make(chan struct{})}
	g.cmd = m.command(ctx, []string{agent})
	g.cmd.Env = append(g.cmd.Env, partEnv+"="+guestPart)
	g.cmd.Stderr = os.Stderr
	g.cmd.ExtraFiles = []*os.File{theirs}
	if err := g.cmd.Start(); err != nil {
		cancel()
		m.t.Fatalf("guest: %v", err)
	}
	go func() {
		_ = g.cmd.Wait() // how it ended does not matter
		close(g.ended)
	}()
	g.end = sync.OnceFunc(func() {
		_ = unix.Close(g.control) // it ends then
		<-g.ended
		cancel()
	})
	m.t.Cleanup(g.end)
	text, _, err := receive(g.control)
	if err != nil {
		m.t.Fatalf("guest: %v", err)
	}
	if g.pid, err = strconv.Atoi(text); err != nil {
		m.t.Fatalf("guest: %v", err)
	}
	return g
}

// PID is its process id on the machine.
func (g *Guest) PID() int { return g.pid }

// Alive tells whether it is still running.
func (g *Guest) Alive() bool {
	select {
	case <-g.ended:
		return false
	default:
		return g.m.Alive(g.pid)
	}
}

// Kill ends it and waits for its end.
func (g *Guest) Kill() {
	g.t.Helper()
	if out, err := g.m.Run("kill", "-KILL", strconv.Itoa(g.pid)); err != nil {
		g.t.Fatalf("%v\n%s", err, out)
	}
	<-g.ended
}

// Dial connects to the lock daemon's "lock" or "admin" socket. The connection is used and closed by the test; the
// guest keeps no copy of it.
func (g *Guest) Dial(socket string) *wire.Conn {
	g.t.Helper()
	path, program := socketPath(socket)
	if err := unix.Send(g.control, []byte(path), unix.MSG_NOSIGNAL); err != nil {
		g.t.Fatalf("guest: %v", err)
	}
	text, f, err := receive(g.control)
	if err == nil && f == nil {
		err = errors.New(text)
	}
	if err != nil {
		g.t.Fatalf("guest: connect: %v", err)
	}
	c, err := wire.FromFile(f, program)
	if err != nil {
		g.t.Fatalf("guest: %v", err)
	}
	g.t.Cleanup(c.Close)
	return c
}

// Client connects to the lock socket and registers the guest as owner.
func (g *Guest) Client() *wire.Conn {
	g.t.Helper()
	c := g.Dial("lock")
	if err := c.Register(wire.VM(g.pid)); err != nil {
		g.t.Fatalf("REGISTER: %v", err)
	}
	return c
}

// receive returns one message and the descriptor that came with it.
func receive(control int) (string, *os.File, error) {
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := unix.Recvmsg(control, buf, oob, unix.MSG_CMSG_CLOEXEC)
	for err == unix.EINTR { // Go interrupts threads that stay long
		n, oobn, _, _, err = unix.Recvmsg(control, buf, oob, unix.MSG_CMSG_CLOEXEC)
	}
	if err != nil {
		return "", nil, os.NewSyscallError("recvmsg", err)
	}
	if n == 0 {
		return "", nil, errors.New("it has ended")
	}
	text := string(buf[:n])
	if oobn == 0 {
		return text, nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return "", nil, err
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil {
		return "", nil, err
	}
	return text, os.NewFile(uintptr(fds[0]), "connection"), nil
}

// guest is what a guest's process does: it connects where it is told to, until the test closes its side.
func guest() error {
	unix.CloseOnExec(controlFD)
	if err := unix.Send(controlFD, []byte(strconv.Itoa(os.Getpid())), unix.MSG_NOSIGNAL); err != nil {
		return os.NewSyscallError("send", err)
	}
	for {
		path, _, err := receive(controlFD)
		if err != nil {
			return nil // the test has ended
		}
		if err := connect(path); err != nil {
			if err := unix.Send(controlFD, []byte(err.Error()), unix.MSG_NOSIGNAL); err != nil {
				return os.NewSyscallError("send", err)
			}
		}
	}
}

// connect makes a connection and sends it to the test.
func connect(path string) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	for {
		err = unix.Connect(fd, &unix.SockaddrUnix{Name: path})
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, os.NewSyscallError("connect", err))
	}
	return unix.Sendmsg(controlFD, []byte("connected"), unix.UnixRights(fd), nil, unix.MSG_NOSIGNAL)
}
