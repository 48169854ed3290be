// SPDX-License-Identifier: LGPL-2.1-or-later

package host

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/test/wire"
)

// Options say how a daemon is started.
type Options struct {
	// Args follow the program's name.
	Args []string
	// Config is the content of a configuration file that -f names. Without NoConfig an empty one is made.
	Config   string
	NoConfig bool
	// Env is added to a small fixed environment.
	Env []string
	// Argv0 is the program's name, the binary's path by default.
	Argv0 string
	// Dir is the working directory, Cwd by default.
	Dir string
	// Files become descriptors 3 and up. With Activate the variables of systemd's socket activation go with
	// them: these are the names for LISTEN_FDNAMES.
	Files    []*os.File
	Activate []string
	// Credential runs the daemon as somebody else.
	Credential *syscall.Credential
	// RunDir is where its sockets will be, /run/libvirt by default.
	RunDir string
	// NoWait returns before the daemon serves, for one that must fail to start.
	NoWait bool
}

// Daemon is a running lock daemon, or one that has ended.
type Daemon struct {
	h      *Host
	t      testing.TB
	cmd    *exec.Cmd
	runDir string
	stderr *os.File // a memory file
	exited chan struct{}
}

// Start runs a daemon and waits until it serves: its lock socket then has had one client, which is gone. The
// daemon is killed when the test ends.
func (h *Host) Start(binary string, o Options) *Daemon {
	h.t.Helper()
	t := h.t
	fd, err := unix.MemfdCreate("stderr", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatalf("memfd_create: %v", err)
	}
	d := &Daemon{h: h, t: t, runDir: o.RunDir, stderr: os.NewFile(uintptr(fd), "stderr"), exited: make(chan struct{})}
	if d.runDir == "" {
		d.runDir = "/run/libvirt"
	}
	args := o.Args
	if !o.NoConfig {
		const path = "/tmp/virtlockd.conf"
		h.WriteFile(path, o.Config, 0o644)
		args = append([]string{"-f", path}, args...)
	}
	argv0 := o.Argv0
	if argv0 == "" {
		argv0 = binary
	}
	env := append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C"}, o.Env...)
	if o.Activate != nil {
		// Only the process itself knows its id before it runs.
		env = append(env, fmt.Sprintf("LISTEN_FDS=%d", len(o.Files)), "LISTEN_FDNAMES="+strings.Join(o.Activate, ":"))
		args = append([]string{"-c", `LISTEN_PID=$$; export LISTEN_PID; exec "$@"`, "sh", binary}, args...)
		binary, argv0 = "/bin/sh", "sh"
	}
	dir := o.Dir
	if dir == "" {
		dir = Cwd
	}
	pidfd := -1
	d.cmd = &exec.Cmd{
		Path:        binary,
		Args:        append([]string{argv0}, args...),
		Env:         env,
		Dir:         dir,
		Stdout:      d.stderr,
		Stderr:      d.stderr,
		ExtraFiles:  o.Files,
		SysProcAttr: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Credential: o.Credential, PidFD: &pidfd},
	}
	h.Must(func() error {
		if err := h.expose(filepath.Dir(binaryOf(d.cmd))); err != nil {
			return err
		}
		return d.cmd.Start()
	})
	go func() {
		defer close(d.exited)
		// Not Wait before it has ended: that would take each stop from a thread of the test that traces it (ptrace(2)).
		for fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}; ; {
			if _, err := unix.Poll(fds, -1); err != unix.EINTR {
				break
			}
		}
		unix.Close(pidfd)
		// How it ended is in ProcessState.
		_ = d.cmd.Wait()
	}()
	t.Cleanup(d.kill)
	if o.NoWait {
		return d
	}
	c, err := d.TryDial("lock")
	if err != nil {
		t.Fatalf("daemon does not serve: %v\n%s", err, Shorten(d.Stderr()))
	}
	defer c.Close()
	// The daemon closes its side when it has seen the end of ours.
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if m, err := c.Recv(); !errors.Is(err, wire.ErrClosed) {
		t.Fatalf("daemon answers a closed connection: %v %v", m, err)
	}
	return d
}

// binaryOf finds the daemon's path also behind the shell that sets LISTEN_PID.
func binaryOf(cmd *exec.Cmd) string {
	if cmd.Path == "/bin/sh" && len(cmd.Args) > 4 {
		return cmd.Args[4]
	}
	return cmd.Path
}

// PID is the daemon's process id.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// SocketPath is the path of its "lock" or "admin" socket in the namespace.
func (d *Daemon) SocketPath(socket string) string {
	switch socket {
	case "lock":
		return d.runDir + "/virtlockd-sock"
	case "admin":
		return d.runDir + "/virtlockd-admin-sock"
	default:
		d.t.Fatalf("no socket is called %q", socket)
		return ""
	}
}

// program tells what is spoken on a socket.
func program(socket string) uint32 {
	if socket == "admin" {
		return wire.AdminProgram
	}
	return wire.LockProgram
}

// TryDial connects to the "lock" or "admin" socket. It waits for a socket that isn't there yet, but not for a
// daemon that has ended.
func (d *Daemon) TryDial(socket string) (*wire.Conn, error) {
	path := d.h.Path(d.SocketPath(socket))
	for end := time.Now().Add(Patience); ; time.Sleep(Poll) {
		alive := d.Alive() // one that detaches itself serves when its parent has ended
		c, err := wire.Dial(path, program(socket))
		if err == nil {
			return c, nil
		}
		if !errors.Is(err, syscall.ENOENT) && !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, err
		}
		if !alive {
			return nil, fmt.Errorf("daemon has ended (%s): %w", d.cmd.ProcessState, err)
		}
		if time.Now().After(end) {
			return nil, err
		}
	}
}

// Dial connects to the "lock" or "admin" socket. The connection is closed when the test ends.
func (d *Daemon) Dial(socket string) *wire.Conn {
	d.t.Helper()
	c, err := d.TryDial(socket)
	if err != nil {
		d.t.Fatalf("connect: %v\n%s", err, Shorten(d.Stderr()))
	}
	d.t.Cleanup(c.Close)
	return c
}

// Client connects to the lock socket and registers an owner with a process id.
func (d *Daemon) Client(pid int) *wire.Conn {
	d.t.Helper()
	c := d.Dial("lock")
	if err := c.Register(wire.VM(pid)); err != nil {
		d.t.Fatalf("REGISTER: %v", err)
	}
	return c
}

// Stderr is all that the daemon wrote to its standard output and error so far.
func (d *Daemon) Stderr() string {
	st, err := d.stderr.Stat()
	if err != nil {
		d.t.Fatalf("output of the daemon: %v", err)
	}
	b := make([]byte, st.Size())
	n, _ := d.stderr.ReadAt(b, 0)
	return string(b[:n])
}

// AllowDescriptors lets clients that are connected attach descriptors to what they send, as they could before Linux 6.16.
func (d *Daemon) AllowDescriptors() {
	d.t.Helper()
	const soPassRights = 83 // asm-generic/socket.h
	pidfd, err := unix.PidfdOpen(d.PID(), 0)
	if err != nil {
		d.t.Fatal(err)
	}
	defer unix.Close(pidfd)
	dir := fmt.Sprintf("/proc/%d/fd", d.PID())
	entries, err := os.ReadDir(dir)
	if err != nil {
		d.t.Fatal(err)
	}
	for _, e := range entries {
		if link, _ := os.Readlink(dir + "/" + e.Name()); !strings.HasPrefix(link, "socket:") {
			continue
		}
		n, _ := strconv.Atoi(e.Name())
		if fd, err := unix.PidfdGetfd(pidfd, n, 0); err == nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, soPassRights, 1) // not known before
			unix.Close(fd)
		}
	}
}

// Alive tells whether the daemon's process is still running.
func (d *Daemon) Alive() bool {
	select {
	case <-d.exited:
		return false
	default:
		return true
	}
}

// Signal sends a signal to the daemon.
func (d *Daemon) Signal(sig syscall.Signal) {
	d.t.Helper()
	if err := d.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		d.t.Fatalf("%s to the daemon: %v", sig, err)
	}
}

// Pause stops the daemon by SIGSTOP and returns when it stands still.
func (d *Daemon) Pause() {
	d.t.Helper()
	d.Signal(syscall.SIGSTOP)
	if !Eventually(func() bool { return InState(d.PID(), 'T') }) {
		d.t.Fatalf("daemon %d does not stop", d.PID())
	}
}

// Continue ends a pause.
func (d *Daemon) Continue() {
	d.t.Helper()
	d.Signal(syscall.SIGCONT)
}

// Wait waits for the daemon's end and returns how it ended: the exit status, or -1 minus the signal that killed it.
func (d *Daemon) Wait() int {
	d.t.Helper()
	select {
	case <-d.exited:
	case <-time.After(Patience):
		d.t.Fatalf("daemon %d does not end\n%s", d.PID(), Shorten(d.Stderr()))
	}
	ws, ok := d.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if ok && ws.Signaled() {
		return -1 - int(ws.Signal())
	}
	return d.cmd.ProcessState.ExitCode()
}

// Stop ends the daemon by SIGTERM and returns how it ended, as Wait does.
func (d *Daemon) Stop() int {
	d.t.Helper()
	d.Signal(syscall.SIGTERM)
	return d.Wait()
}

// Kept returns the daemon that this one, a keeper, has started; 0 if there is none just now.
func (d *Daemon) Kept() int {
	if children := Children(d.PID()); len(children) > 0 {
		return children[0]
	}
	return 0
}

// Children returns the children of a process, zombies included.
func Children(pid int) (pids []int) {
	// A child is that of the thread that made it, which may have ended.
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, name := range threads {
		b, _ := os.ReadFile(name)
		for _, field := range strings.Fields(string(b)) {
			if child, err := strconv.Atoi(field); err == nil {
				pids = append(pids, child)
			}
		}
	}
	slices.Sort(pids)
	return pids
}

// EndKept kills a keeper and its daemon, in an order in which neither starts the other again. It is for the end of a test.
func (d *Daemon) EndKept() {
	// Not the daemon, while the keeper is killed: when the parent of a process that is stopped ends, the kernel may continue that (setpgid(2)).
	_ = d.cmd.Process.Signal(unix.SIGSTOP)
	Eventually(func() bool { return InState(d.PID(), 'T') || !d.Alive() })
	if pid := d.Kept(); pid > 0 {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	_ = d.cmd.Process.Kill()
}

// kill makes sure that the daemon is gone at the end of the test.
func (d *Daemon) kill() {
	if d.Alive() {
		_ = d.cmd.Process.Kill()
	}
	select {
	case <-d.exited:
	case <-time.After(Patience):
		d.t.Errorf("daemon %d survives SIGKILL", d.PID())
	}
	if d.t.Failed() {
		d.t.Logf("output of daemon %d:\n%s", d.PID(), Shorten(d.Stderr()))
	}
	d.stderr.Close()
}

// Shorten makes a text readable in the output of a failed test: long lines lose their ends, a long text its middle.
func Shorten(text string) string {
	const width, height = 300, 60
	lines := strings.Split(text, "\n")
	for i, l := range lines {
		if len(l) > width {
			lines[i] = fmt.Sprintf("%s... (%d bytes)", l[:width], len(l))
		}
	}
	if n := len(lines) - height; n > 0 {
		lines = slices.Concat(lines[:height/2], []string{fmt.Sprintf("... (%d lines)", n)}, lines[len(lines)-height/2:])
	}
	return strings.Join(lines, "\n")
}
