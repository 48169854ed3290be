// SPDX-License-Identifier: LGPL-2.1-or-later

// Package systemd boots the machine's real systemd as PID 1 of private namespaces, with a lock daemon and its units
// installed as "make install" does it, or with Debian's packages as they are.
//
// A Machine sees the files of the real one through an overlay file system in memory: whatever systemd, its journal and
// the daemons write goes there. /dev, /run, /tmp, /var/log, the network and the process ids are its own too, and all
// its control groups are below one that is made for it. Only units that a lock daemon needs are started. Nothing of
// the real machine is changed; when the test, or the process that runs it, ends, the machine's PID 1 is killed and
// nothing is left.
//
// It takes root, systemd, util-linux (nsenter) and a kernel with namespaces, overlayfs and control groups version 2
// (mounted or not); for its test with guests libvirt and QEMU too. Where that is not given a test fails with the reason. Only what needs
// a memory controller is skipped without one.
//
// A test binary that uses the package calls Main from its TestMain.
package systemd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// The units of the lock daemon.
const (
	Service     = "virtlockd.service"
	LockSocket  = "virtlockd.socket"
	AdminSocket = "virtlockd-admin.socket"
)

// Where things are on a machine.
const (
	Binary = "/usr/sbin/virtlockd"
	Config = "/etc/libvirt/virtlockd.conf"
	// UnitDir is where the administrator's units go, which beat the installed ones.
	UnitDir = "/etc/systemd/system"
	// Data is an empty directory in memory for what is locked.
	Data = "/tmp/vlv"
)

// bootTarget is what the machine boots to.
const bootTarget = "basic.target"

// commandTime bounds each command on a machine. It only matters to a failing test.
const commandTime = 45 * time.Second

// Options say what a machine is like. All of it may be empty.
type Options struct {
	// Debian leaves the lock daemon as Debian's package has it: binary, units and configuration.
	Debian bool
	// Files are written before the machine boots: path to content.
	Files map[string]string
}

// Machine is a running systemd and all that it started.
type Machine struct {
	t       testing.TB
	keeper  *exec.Cmd
	control *os.File // the keeper ends the machine when this is closed
	pid     int      // of the machine's PID 1, outside
}

// Boot starts a machine and waits until systemd has started what belongs to its boot. No unit of the lock daemon is
// active by then. The machine ends with the test.
func Boot(t testing.TB, o Options) *Machine {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("systemd in private namespaces needs root")
	}
	files := map[string]string{
		// The real machine's settings are not meant for this one.
		"/etc/default/virtlockd": "",
		"/etc/fstab":             "",
		"/etc/machine-id":        "76697274000000000000006c6f636b64\n",
		"/etc/hostname":          "virtlockd-test\n",
	}
	dir, err := os.MkdirTemp("", dirPrefix)
	if err != nil {
		t.Fatal(err)
	}
	s := setup{Dir: dir, Files: files}
	if o.Debian {
		host.C(t)
		files[Config] = ""
	} else {
		s.Installed = filepath.Join(dir, "installed")
		if err := install(host.Ours(t), host.Ctl(t), s.Installed); err != nil {
			os.RemoveAll(dir)
			t.Fatal(err)
		}
	}
	maps.Copy(files, o.Files)

	m, err := start(s)
	if err != nil {
		t.Fatalf("systemd can't be booted in private namespaces: %v", err)
	}
	m.t = t
	t.Cleanup(m.close)
	// The socket is there a moment before it can be connected to.
	up := func() bool {
		c, err := net.Dial("unix", m.Path("/run/systemd/private"))
		if err != nil {
			return false
		}
		c.Close()
		return true
	}
	if !host.Eventually(up) {
		t.Fatal("systemd does not come up")
	}
	// Waits for the job that boots the machine.
	m.Systemctl("start", bootTarget)
	return m
}

// start starts a keeper, which starts a machine. The directory is the keeper's to remove.
func start(s setup) (*Machine, error) {
	m := &Machine{}
	control, controlW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer control.Close()
	status, statusW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer status.Close()
	m.control = controlW
	m.keeper = &exec.Cmd{
		Path:       "/proc/self/exe",
		Args:       []string{"virtlockd-test-keeper"},
		Env:        append(os.Environ(), partEnv+"="+keeperPart),
		Stderr:     os.Stderr,
		ExtraFiles: []*os.File{control, statusW},
		SysProcAttr: &syscall.SysProcAttr{
			Cloneflags: unix.CLONE_NEWNS,
			// An interrupt at the terminal is the test's, whose end the keeper notices.
			Setsid: true,
		},
	}
	err = m.keeper.Start()
	statusW.Close()
	if err != nil {
		os.RemoveAll(s.Dir)
		return nil, fmt.Errorf("a mount namespace can't be made: %w", err)
	}
	fail := func(err error) (*Machine, error) {
		return nil, errors.Join(err, m.end())
	}
	if err := json.NewEncoder(controlW).Encode(s); err != nil {
		return fail(err)
	}
	answer, err := io.ReadAll(status)
	if err != nil {
		return fail(err)
	}
	if m.pid, err = strconv.Atoi(string(answer)); err != nil {
		return fail(fmt.Errorf("%s", answer))
	}
	return m, nil
}

// end ends the machine and waits until nothing is left of it.
func (m *Machine) end() error {
	m.control.Close()
	if err := m.keeper.Wait(); err != nil {
		return fmt.Errorf("the machine has not ended as it should: %w", err)
	}
	return nil
}

func (m *Machine) close() {
	if m.t.Failed() {
		out, err := m.Run("journalctl", "--no-pager", "--output=short-monotonic", "--lines=200")
		m.t.Logf("journal of the machine (%v):\n%s", err, out)
	}
	if err := m.end(); err != nil {
		m.t.Error(err)
	}
}

// PID1 is the process id, outside, of the machine's systemd.
func (m *Machine) PID1() int { return m.pid }

// Path returns a name for a path of the machine that is valid outside. Absolute symbolic links on the way would lead
// out of the machine.
func (m *Machine) Path(path string) string {
	return "/proc/" + strconv.Itoa(m.pid) + "/root" + path
}

// Exists tells whether there is anything at path on the machine.
func (m *Machine) Exists(path string) bool {
	_, err := os.Lstat(m.Path(path))
	return err == nil
}

// ReadFile returns the content of a file on the machine.
func (m *Machine) ReadFile(path string) string {
	m.t.Helper()
	b, err := os.ReadFile(m.Path(path))
	if err != nil {
		m.t.Fatalf("machine: %v", err)
	}
	return string(b)
}

// WriteFile creates or replaces a file on the machine, at one blow.
func (m *Machine) WriteFile(path, content string, mode os.FileMode) {
	m.t.Helper()
	path = m.Path(path)
	if err := writeFile(path+".new", content, mode); err != nil {
		m.t.Fatalf("machine: %v", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		m.t.Fatalf("machine: %v", err)
	}
}

// CopyIn puts a file of the real machine on this one, as a package manager does it: at one blow, with mode 0755.
func (m *Machine) CopyIn(from, to string) {
	m.t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		m.t.Fatalf("machine: %v", err)
	}
	m.WriteFile(to, string(b), 0o755)
}

// DropIn adds settings to a unit and makes systemd read them.
func (m *Machine) DropIn(unit, content string) {
	m.t.Helper()
	m.WriteFile(UnitDir+"/"+unit+".d/test.conf", content, 0o644)
	m.Systemctl("daemon-reload")
}

// Run runs a command on the machine, as root, and returns what it printed to both of its outputs.
func (m *Machine) Run(argv ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), commandTime)
	defer cancel()
	cmd := m.command(ctx, argv)
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", strings.Join(argv, " "), err)
	}
	return strings.TrimSpace(string(out)), err
}

func (m *Machine) command(ctx context.Context, argv []string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--target", strconv.Itoa(m.pid), "--all", "--"}, argv...)...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8", "SYSTEMD_COLORS=0"}
	cmd.WaitDelay = time.Second // for what a command leaves behind with its output
	return cmd
}

// TrySystemctl runs systemctl on the machine and returns what it printed.
func (m *Machine) TrySystemctl(args ...string) (string, error) {
	return m.Run(append([]string{"systemctl", "--no-pager"}, args...)...)
}

// Systemctl is TrySystemctl for what can't fail.
func (m *Machine) Systemctl(args ...string) string {
	m.t.Helper()
	out, err := m.TrySystemctl(args...)
	if err != nil {
		m.t.Fatalf("%v\n%s", err, out)
	}
	return out
}

// Show returns a property of a unit, as systemctl show prints it.
func (m *Machine) Show(unit, property string) string {
	m.t.Helper()
	return m.Systemctl("show", "--value", "--property="+property, unit)
}

// ShowInt is Show for a number.
func (m *Machine) ShowInt(unit, property string) int {
	m.t.Helper()
	text := m.Show(unit, property)
	n, err := strconv.Atoi(text)
	if err != nil {
		m.t.Fatalf("%s of %s is %q", property, unit, text)
	}
	return n
}

// MainPID is the process id, on the machine, of the lock daemon's process; 0 if there is none.
func (m *Machine) MainPID() int {
	m.t.Helper()
	return m.ShowInt(Service, "MainPID")
}

// State is the state of a unit, such as active, inactive, activating or failed.
func (m *Machine) State(unit string) string {
	m.t.Helper()
	return m.Show(unit, "ActiveState")
}

// WaitState waits until a unit is in a state.
func (m *Machine) WaitState(unit, state string) {
	m.t.Helper()
	if !host.Eventually(func() bool { return m.State(unit) == state }) {
		m.t.Fatalf("%s is %s, want %s", unit, m.State(unit), state)
	}
}

// Signal sends a signal ("KILL", "USR1" ...) to the lock daemon's main process.
func (m *Machine) Signal(name string) {
	m.t.Helper()
	m.Systemctl("kill", "--kill-whom=main", "--signal="+name, Service)
}

// Alive tells whether a process of the machine exists and has not ended.
func (m *Machine) Alive(pid int) bool {
	b, err := os.ReadFile(m.Path("/proc/" + strconv.Itoa(pid) + "/stat"))
	return err == nil && !strings.Contains(string(b[strings.LastIndexByte(string(b), ')')+1:]), " Z")
}

// Exe is the path, on the machine, of the program that a process runs.
func (m *Machine) Exe(pid int) string {
	m.t.Helper()
	path, err := os.Readlink(m.Path("/proc/" + strconv.Itoa(pid) + "/exe"))
	if err != nil {
		m.t.Fatalf("machine: %v", err)
	}
	return path
}

// Locked tells whether byte 0 of a file on the machine is locked, so that nobody else can lock it exclusively.
func (m *Machine) Locked(path string) bool {
	m.t.Helper()
	f, err := os.OpenFile(m.Path(path), os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return false
	}
	if err != nil {
		m.t.Fatalf("machine: %v", err)
	}
	defer f.Close() // a POSIX lock of the test process is none that this could drop
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET, Start: 0, Len: 1}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l); err != nil {
		m.t.Fatalf("F_OFD_GETLK on %s: %v", path, err)
	}
	return l.Type != unix.F_UNLCK
}

// Do runs f on a thread that lives in the machine's mount namespace. f must not end the goroutine (t.Fatal).
func (m *Machine) Do(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for ever: the thread ends with the goroutine
		done <- m.inside(f)
	}()
	return <-done
}

// inside moves the thread into the machine's mount namespace.
func (m *Machine) inside(f func() error) error {
	ns, err := os.Open("/proc/" + strconv.Itoa(m.pid) + "/ns/mnt")
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS); err != nil {
		return os.NewSyscallError("setns", err)
	}
	return f()
}

// Must is Do for steps of a test that can't fail.
func (m *Machine) Must(f func() error) {
	m.t.Helper()
	if err := m.Do(f); err != nil {
		m.t.Fatalf("machine: %v", err)
	}
}

// Wait begins to wait, outside, for a lock that somebody on the machine holds.
func (m *Machine) Wait(path string) *host.Waiter {
	m.t.Helper()
	return host.Wait(m.t, m.Path(path))
}

// socketPath is the path of the "lock" or "admin" socket on the machine, and the program that is spoken there.
func socketPath(socket string) (string, uint32) {
	if socket == "admin" {
		return "/run/libvirt/virtlockd-admin-sock", wire.AdminProgram
	}
	return "/run/libvirt/virtlockd-sock", wire.LockProgram
}

// Dial connects to the "lock" or "admin" socket from outside: the daemon sees a peer without a process id, as that of
// another container. See Guest for one with. The connection is closed when the test ends.
func (m *Machine) Dial(socket string) *wire.Conn {
	m.t.Helper()
	path, program := socketPath(socket)
	c, err := wire.Dial(m.Path(path), program)
	if err != nil {
		m.t.Fatalf("connect: %v", err)
	}
	m.t.Cleanup(c.Close)
	return c
}
