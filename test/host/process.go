// SPDX-License-Identifier: LGPL-2.1-or-later

package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/test/wire"
)

// partEnv tells a process that a test started which part it plays.
const partEnv = "VIRTLOCKD_TEST_PART"

// Descriptors that a started process finds.
const (
	controlFD = 3 // orders, of an agent
	lifeFD    = 4 // end of file when the test lets it go
	heldFD    = 5 // what a holder holds
)

// ProcessOptions say how a process is started.
type ProcessOptions struct {
	// PID is a process id to get; it must not be in use. 0: any.
	PID int
	// NewPIDNamespace starts it as the first process of a process id namespace.
	NewPIDNamespace bool
	// Zombie leaves it unreaped when it ends, until Reap.
	Zombie bool
	// Credential makes it somebody else's. It does not go with PID.
	Credential *syscall.Credential
}

// Process is a process in a host's namespace that plays the part of a virtual machine, a libvirtd, or an outsider
// that locks files. It dies of SIGTERM unless it is told to ignore it, and with the test in any case.
type Process struct {
	h       *Host
	t       testing.TB
	pid     int
	pidfd   int
	control int
	life    *os.File // write side; children of the process live as long
	cmd     *exec.Cmd
	zombie  bool // nobody reaps it yet
	reaped  chan struct{}
	closed  bool
}

type order struct {
	Op, Path, Kind string
	Start, Len     int64
}

type answer struct {
	Error string
	PID   int
}

// Spawn starts a process.
func (h *Host) Spawn(o ProcessOptions) *Process {
	h.t.Helper()
	t := h.t
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("socketpair: %v", err)
	}
	tv := unix.NsecToTimeval(Patience.Nanoseconds())
	if err := unix.SetsockoptTimeval(pair[0], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		t.Fatalf("setsockopt: %v", err)
	}
	lifeR, lifeW, err := os.Pipe()
	if err != nil {
		t.Fatalf("pipe: %v", err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "control")
	p := &Process{h: h, t: t, control: pair[0], life: lifeW, reaped: make(chan struct{})}
	p.cmd = &exec.Cmd{
		// The path of the test binary may be hidden in the namespace; this one always works.
		Path:        "/proc/self/exe",
		Args:        []string{"virtlockd-test-agent"},
		Env:         append(os.Environ(), partEnv+"=agent"),
		Dir:         Cwd,
		Stdout:      os.Stderr,
		Stderr:      os.Stderr,
		ExtraFiles:  []*os.File{theirs, lifeR},
		SysProcAttr: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Credential: o.Credential},
	}
	if o.NewPIDNamespace {
		p.cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWPID
	}
	h.Must(func() error {
		if o.PID != 0 {
			return p.startAs(o.PID)
		}
		if err := p.cmd.Start(); err != nil {
			return err
		}
		p.pid = p.cmd.Process.Pid
		return nil
	})
	theirs.Close()
	lifeR.Close()
	if p.pidfd, err = unix.PidfdOpen(p.pid, 0); err != nil {
		t.Fatalf("pidfd_open: %v", err)
	}
	if p.zombie = o.Zombie; !o.Zombie {
		go p.reap()
	}
	t.Cleanup(p.Close)
	if _, _, err := p.receive(); err != nil {
		t.Fatalf("process does not start: %v", err)
	}
	return p
}

func (p *Process) reap() {
	// How it ended does not matter.
	_ = p.cmd.Wait()
	close(p.reaped)
}

// Reap collects a zombie, once it has ended.
func (p *Process) Reap() {
	p.zombie = false
	p.reap()
}

// PID is the process id.
func (p *Process) PID() int { return p.pid }

// Dead tells whether the process has ended; a zombie has.
func (p *Process) Dead() bool {
	fds := []unix.PollFd{{Fd: int32(p.pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if err != unix.EINTR {
			return n > 0
		}
	}
}

// Signal sends a signal; one to a process that has ended has no effect.
func (p *Process) Signal(sig syscall.Signal) {
	p.t.Helper()
	if err := unix.PidfdSendSignal(p.pidfd, sig, nil, 0); err != nil && err != unix.ESRCH {
		p.t.Fatalf("%s to process %d: %v", sig, p.pid, err)
	}
}

// Kill ends the process at once and waits until it is dead (and reaped, unless it is to stay a zombie).
func (p *Process) Kill() {
	p.t.Helper()
	p.Signal(syscall.SIGKILL)
	if !Eventually(p.Dead) {
		p.t.Fatalf("process %d survives SIGKILL", p.pid)
	}
}

// Gone waits until the process is dead and reaped.
func (p *Process) Gone() {
	p.t.Helper()
	select {
	case <-p.reaped:
	case <-time.After(Patience):
		p.t.Fatalf("process %d is still there", p.pid)
	}
}

// Close ends the process and what it started.
func (p *Process) Close() {
	if p.closed {
		return
	}
	p.closed = true
	_ = unix.PidfdSendSignal(p.pidfd, unix.SIGKILL, nil, 0)
	if !Eventually(p.Dead) {
		p.t.Errorf("process %d survives SIGKILL", p.pid)
		return
	}
	if p.zombie {
		p.Reap()
	}
	<-p.reaped
	p.life.Close()
	_ = unix.Close(p.control)
	_ = unix.Close(p.pidfd)
}

// IgnoreTerm makes the process ignore SIGTERM.
func (p *Process) IgnoreTerm() { p.do(order{Op: "ignore"}) }

// Lock takes a POSIX lock on a range of a file, as another lock manager would; the file is made (0644) if it is
// missing. Kind is "R" or "W". It lasts until Unlock, or as long as the process.
func (p *Process) Lock(path, kind string, start, length int64) {
	p.t.Helper()
	p.do(order{Op: "lock", Path: path, Kind: kind, Start: start, Len: length})
}

// Open makes the process open a file, and does not wait for that, which may hang: it is the last thing that the process is told.
func (p *Process) Open(path string) {
	p.t.Helper()
	p.send(order{Op: "open", Path: path})
}

// Unlock gives up all locks of the process.
func (p *Process) Unlock() {
	p.t.Helper()
	p.do(order{Op: "unlock"})
}

// Dial makes the process connect to a daemon's "lock" or "admin" socket. The connection is used and closed by
// the test; the process, whose it is for the daemon, keeps no copy.
func (p *Process) Dial(d *Daemon, socket string) *wire.Conn {
	p.t.Helper()
	return p.dial("connect", d, socket)
}

// DialAndPassOn is Dial, with the difference that the process keeps a copy of the connection and starts a child
// that has one too, as QEMU's children may. The child outlives the process; its process id is returned.
func (p *Process) DialAndPassOn(d *Daemon, socket string) (*wire.Conn, int) {
	p.t.Helper()
	c := p.dial("connect-keep", d, socket)
	_, pid := p.do(order{Op: "child"})
	return c, pid
}

func (p *Process) dial(op string, d *Daemon, socket string) *wire.Conn {
	p.t.Helper()
	f, _ := p.do(order{Op: op, Path: d.SocketPath(socket)})
	if f == nil {
		p.t.Fatalf("process %d: no connection came", p.pid)
	}
	c, err := wire.FromFile(f, program(socket))
	if err != nil {
		p.t.Fatalf("connection of process %d: %v", p.pid, err)
	}
	p.t.Cleanup(c.Close)
	return c
}

// do sends an order and waits until it is carried out.
func (p *Process) do(o order) (*os.File, int) {
	p.t.Helper()
	p.send(o)
	a, f, err := p.receive()
	if err == nil && a.Error != "" {
		err = errors.New(a.Error)
	}
	if err != nil {
		p.t.Fatalf("process %d: %s %s: %v", p.pid, o.Op, o.Path, err)
	}
	return f, a.PID
}

func (p *Process) send(o order) {
	p.t.Helper()
	b, err := json.Marshal(o)
	if err != nil {
		p.t.Fatal(err)
	}
	if err := unix.Send(p.control, b, unix.MSG_NOSIGNAL); err != nil {
		p.t.Fatalf("process %d: order %s: %v", p.pid, o.Op, err)
	}
}

func (p *Process) receive() (answer, *os.File, error) {
	var a answer
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := unix.Recvmsg(p.control, buf, oob, unix.MSG_CMSG_CLOEXEC)
	for err == unix.EINTR { // Go interrupts threads that stay long
		n, oobn, _, _, err = unix.Recvmsg(p.control, buf, oob, unix.MSG_CMSG_CLOEXEC)
	}
	if err != nil {
		return a, nil, os.NewSyscallError("recvmsg", err)
	}
	if n == 0 {
		return a, nil, errors.New("it has ended")
	}
	if err := json.Unmarshal(buf[:n], &a); err != nil {
		return a, nil, err
	}
	if oobn == 0 {
		return a, nil, nil
	}
	fd, err := passed(oob[:oobn])
	if err != nil {
		return a, nil, err
	}
	return a, os.NewFile(uintptr(fd), "connection"), nil
}

// passed returns the descriptor that came with a message.
func passed(oob []byte) (int, error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return -1, err
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil {
		return -1, err
	}
	return fds[0], nil
}

// play is what a started process does. It returns its exit status.
func play() int {
	var err error
	switch part := os.Getenv(partEnv); part {
	case "agent":
		err = agent()
	case "holder":
		err = untilReleased()
	case "reaper":
		err = reap()
	default:
		err = fmt.Errorf("no part is called %q", part)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "process of a test: %v\n", err)
		return 1
	}
	return 0
}

// untilReleased waits until the test closes its side of the pipe, or ends.
func untilReleased() error {
	var b [1]byte
	for {
		n, err := unix.Read(lifeFD, b[:])
		if err == unix.EINTR {
			continue
		}
		if n == 0 || err != nil {
			return err
		}
	}
}

// agent carries out orders until the test goes away.
func agent() error {
	unix.CloseOnExec(controlFD)
	unix.CloseOnExec(lifeFD)
	if err := reply(answer{PID: os.Getpid()}, -1); err != nil {
		return err
	}
	kept := -1
	var locked []int
	buf := make([]byte, 4096)
	for {
		n, err := unix.Read(controlFD, buf)
		if err == unix.EINTR {
			continue
		}
		if n == 0 || err != nil {
			return err
		}
		var o order
		if err := json.Unmarshal(buf[:n], &o); err != nil {
			return err
		}
		var a answer
		fd := -1
		switch o.Op {
		case "ignore":
			signal.Ignore(syscall.SIGTERM)
		case "open":
			_, err = unix.Open(o.Path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		case "lock":
			var file int
			if file, err = lock(o); err == nil {
				locked = append(locked, file)
			}
		case "unlock":
			for _, file := range locked {
				_ = unix.Close(file)
			}
			locked = nil
		case "connect", "connect-keep":
			fd, err = connect(o.Path)
		case "child":
			a.PID, err = child(kept)
		default:
			err = fmt.Errorf("no order is called %q", o.Op)
		}
		if err != nil {
			a.Error = err.Error()
		}
		if err := reply(a, fd); err != nil {
			return err
		}
		if o.Op == "connect-keep" {
			kept = fd
		} else if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

func reply(a answer, fd int) error {
	b, err := json.Marshal(a)
	if err != nil {
		return err
	}
	var oob []byte
	if fd >= 0 {
		oob = unix.UnixRights(fd)
	}
	return unix.Sendmsg(controlFD, b, oob, nil, unix.MSG_NOSIGNAL)
}

func connect(path string) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	for end := time.Now().Add(Patience); ; time.Sleep(Poll) {
		err = unix.Connect(fd, &unix.SockaddrUnix{Name: path})
		if err == nil {
			return fd, nil
		}
		// The admin socket may come a moment after the lock socket.
		if err != unix.ENOENT && err != unix.ECONNREFUSED && err != unix.EINTR || time.Now().After(end) {
			_ = unix.Close(fd)
			return -1, os.NewSyscallError("connect", err)
		}
	}
}

// lock returns the descriptor whose closing ends the lock.
func lock(o order) (int, error) {
	fd, err := unix.Open(o.Path, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return -1, os.NewSyscallError("open", err)
	}
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET, Start: o.Start, Len: o.Len}
	if o.Kind == "R" {
		l.Type = unix.F_RDLCK
	}
	if err := unix.FcntlFlock(uintptr(fd), unix.F_SETLK, &l); err != nil {
		_ = unix.Close(fd)
		return -1, os.NewSyscallError("fcntl", err)
	}
	return fd, nil
}

func child(fd int) (int, error) {
	if fd < 0 {
		return 0, errors.New("there is no connection to pass on")
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	dup := func(fd int, name string) (*os.File, error) {
		n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 10)
		return os.NewFile(uintptr(n), name), err
	}
	life, err := dup(lifeFD, "life")
	if err != nil {
		return 0, err
	}
	defer life.Close()
	held, err := dup(fd, "connection")
	if err != nil {
		return 0, err
	}
	defer held.Close()
	files := make([]*os.File, heldFD-2)
	files[controlFD-3], files[lifeFD-3], files[heldFD-3] = null, life, held
	cmd := &exec.Cmd{
		Path:       "/proc/self/exe",
		Args:       []string{"virtlockd-test-holder"},
		Env:        append(os.Environ(), partEnv+"=holder"),
		ExtraFiles: files,
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	return cmd.Process.Pid, nil
}

// startAs starts the process with a process id of the test's choice. It runs on the namespace's thread.
func (p *Process) startAs(pid int) error {
	// Descriptors are copied out of the way of those that the new process is to have.
	var fds [2]int
	for i, f := range p.cmd.ExtraFiles {
		n, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 100)
		if err != nil {
			return os.NewSyscallError("fcntl", err)
		}
		defer unix.Close(n)
		fds[i] = n
	}
	if err := forkExec(pid, p.cmd.Path, p.cmd.Args, p.cmd.Env, fds); err != nil {
		return fmt.Errorf("process with id %s: %w", strconv.Itoa(pid), err)
	}
	proc, err := os.FindProcess(pid)
	if err != nil {
		return err
	}
	p.pid, p.cmd.Process = pid, proc
	return nil
}
