// SPDX-License-Identifier: LGPL-2.1-or-later

// Package vmhost makes private virtual machine hosts for tests and for the demonstration: a mount, pid, network, UTS and IPC
// namespace with /run, /dev, /etc/libvirt and /var/{lib,log,cache}/libvirt of its own, in which a lock daemon, libvirtd and QEMU
// guests run. Several hosts can share directories and block devices, as hosts on one SAN do.
//
// Nothing of the machine's own libvirt, /run or /dev is touched. A host ends with the process that made it, however that
// process ends: the host's init sees its control pipe close and exits, and the kernel kills all that runs in the pid namespace.
//
// The caller's main (or TestMain) calls Init first, because a host's init is the caller's own executable.
// It takes root, util-linux (nsenter), libvirt and QEMU.
package vmhost

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Where a host's shared directories are mounted in it. The paths are the same in all hosts, so that a disk has the same name,
// and an indirect lockspace the same lease file, everywhere.
const (
	ImagesDir = "/var/lib/libvirt/images"      // disk images
	LeasesDir = "/var/lib/libvirt/lockd/files" // indirect lockspace
	SharedDir = "/var/lib/libvirt/shared"      // sockets, saved guests, whatever else hosts exchange
)

// commandTimeout bounds every command that is run in a host. It is far above what any of them takes: a deadline for tests
// that hang, no measure of anything.
const commandTimeout = 90 * time.Second

// Options say what a host is like.
type Options struct {
	Name      string // host name, also libvirt's
	UUID      string // libvirt's host UUID; hosts that migrate to each other need different ones
	Images    string // the machine's directory to show at ImagesDir; empty: a private one
	Leases    string // the same for LeasesDir
	Shared    string // the same for SharedDir
	Cache     string // libvirt's cache (QEMU's capabilities); hosts that share it start sooner
	QEMULockd string // contents of qemu-lockd.conf
	Lockd     string // contents of virtlockd.conf

	// Files are more files of the host: path in the host to contents. Paths are made as needed below the private
	// directories; an existing file of the machine is hidden, not changed.
	Files map[string]string
}

// A Host is a running private host. Its methods may be called from several goroutines.
type Host struct {
	opts    Options
	dir     string // scratch directory on the machine; removed by Close
	init    *exec.Cmd
	control io.WriteCloser // the init ends when this is closed

	mu      sync.Mutex
	daemons map[string]*daemon // by name; running or ended, until started anew

	closing   sync.Once
	closeErr  error
	ended     chan struct{} // closed when the init has been reaped
	commandWG sync.WaitGroup
}

// setup is what the init is told to mount.
type setup struct {
	Name  string
	Binds []bind
}

// A bind shows the machine's From at the host's To.
type bind struct{ From, To string }

// Start makes a host without any daemon in it; see StartAll. It has to be closed.
func Start(opts Options) (_ *Host, err error) {
	dir, err := os.MkdirTemp("", "vmhost-")
	if err != nil {
		return nil, fmt.Errorf("make directory for host %s: %w", opts.Name, err)
	}
	h := &Host{opts: opts, dir: dir, daemons: map[string]*daemon{}, ended: make(chan struct{})}
	defer func() {
		if err != nil {
			h.Close()
		}
	}()
	// A session daemon of an ordinary user has to get to its files.
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, err
	}
	s := setup{Name: opts.Name}
	for _, m := range []struct{ from, to string }{
		{"", "/etc/libvirt"},
		{"", "/var/lib/libvirt"},
		{"", "/var/log/libvirt"},
		{opts.Cache, "/var/cache/libvirt"},
		{opts.Images, ImagesDir},
		{opts.Leases, LeasesDir},
		{opts.Shared, SharedDir},
	} {
		if m.from == "" {
			m.from = filepath.Join(dir, strings.ReplaceAll(m.to[1:], "/", "-"))
		}
		if err := os.MkdirAll(m.from, 0o755); err != nil {
			return nil, err
		}
		s.Binds = append(s.Binds, bind{m.from, m.to})
	}
	if opts.Shared != "" {
		// Other hosts are to reach this libvirtd; see SharedSocket.
		run := filepath.Join(opts.Shared, "run-"+opts.Name)
		if err := os.MkdirAll(run, 0o755); err != nil {
			return nil, err
		}
		s.Binds = append(s.Binds, bind{run, "/run/libvirt"})
	}
	n := 0
	for path, text := range opts.Configuration() {
		if rest, ok := strings.CutPrefix(path, "/etc/libvirt/"); ok {
			err = writeFile(filepath.Join(s.Binds[0].From, rest), text)
		} else {
			n++
			from := filepath.Join(dir, "file-"+strconv.Itoa(n))
			err = writeFile(from, text)
			s.Binds = append(s.Binds, bind{from, path})
		}
		if err != nil {
			return nil, err
		}
	}
	if err := h.startInit(s); err != nil {
		return nil, fmt.Errorf("start host %s: %w", opts.Name, err)
	}
	return h, nil
}

// Configuration returns the files that configure libvirt for guests in bare namespaces, and Files: path to contents.
func (opts Options) Configuration() map[string]string {
	// Guests write their logs themselves. With virtlogd, libvirtd tells why one was not started by what that has already read, which may be
	// nothing yet.
	files := map[string]string{
		"/etc/libvirt/qemu.conf": "lock_manager = \"lockd\"\nuser = \"root\"\ngroup = \"root\"\nsecurity_driver = \"none\"\n" +
			"cgroup_controllers = []\nnamespaces = []\nstdio_handler = \"file\"\n",
		"/etc/libvirt/qemu-lockd.conf": opts.QEMULockd,
		"/etc/libvirt/virtlockd.conf":  opts.Lockd,
		"/etc/libvirt/libvirt.conf":    "",
		"/etc/libvirt/libvirtd.conf": fmt.Sprintf("host_uuid = %q\nauth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\n"+
			"log_outputs = \"2:file:/var/log/libvirt/libvirtd.log\"\n", opts.UUID),
	}
	for path, text := range opts.Files {
		files[path] = text
	}
	return files
}

func writeFile(path, text string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(text), 0o644)
}

// startInit starts the init in its namespaces and waits until it has mounted everything.
func (h *Host) startInit(s setup) error {
	control, controlW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer control.Close()
	status, statusW, err := os.Pipe()
	if err != nil {
		controlW.Close()
		return err
	}
	defer status.Close()
	h.control = controlW
	h.init = exec.Command("/proc/self/exe")
	h.init.Env = append(os.Environ(), initEnv+"=1")
	h.init.ExtraFiles = []*os.File{control, statusW}
	h.init.Stderr = os.Stderr
	h.init.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC,
		Setsid:     true, // an interrupt at the terminal is the caller's, who then closes the host in order
	}
	err = h.init.Start()
	statusW.Close()
	if err != nil {
		h.init = nil
		return fmt.Errorf("make namespaces (this takes root): %w", err)
	}
	go func() {
		h.init.Wait()
		close(h.ended)
	}()
	if err := json.NewEncoder(controlW).Encode(s); err != nil {
		return fmt.Errorf("tell the init what to mount: %w", err)
	}
	answer, err := io.ReadAll(status)
	if err != nil {
		return err
	}
	if string(answer) != initReady {
		return fmt.Errorf("init: %s", bytes.TrimSpace(answer))
	}
	return nil
}

// Name returns the host's name.
func (h *Host) Name() string { return h.opts.Name }

// Path returns the name by which a process outside of the host reaches a file of the host.
func (h *Host) Path(path string) string {
	return fmt.Sprintf("/proc/%d/root%s", h.init.Process.Pid, path)
}

// SharedSocket returns the path of libvirtd's socket as hosts see it that share the directory Options.Shared with this one.
func (h *Host) SharedSocket() string { return SharedDir + "/run-" + h.opts.Name + "/libvirt-sock" }

// Close ends the host: all its processes are killed. It may be called more than once.
func (h *Host) Close() error {
	h.closing.Do(func() {
		if h.init != nil {
			h.control.Close()
			h.init.Process.Kill()
			<-h.ended
		}
		h.mu.Lock()
		for _, d := range h.daemons {
			<-d.ended
		}
		h.mu.Unlock()
		h.commandWG.Wait()
		h.closeErr = os.RemoveAll(h.dir)
	})
	return h.closeErr
}

// A Result is what a command in a host has answered.
type Result struct {
	Out string // stdout, without surrounding white space
	Err string // stderr, the same
}

// Run runs a command in the host and waits for it. The error contains what it wrote to stderr.
func (h *Host) Run(ctx context.Context, argv ...string) (Result, error) {
	return h.run(ctx, nil, nil, argv)
}

// RunAs is Run as an ordinary user with nothing but the environment env.
func (h *Host) RunAs(ctx context.Context, uid, gid int, env []string, argv ...string) (Result, error) {
	return h.run(ctx, []string{"--setuid", strconv.Itoa(uid), "--setgid", strconv.Itoa(gid)}, env, argv)
}

func (h *Host) run(ctx context.Context, flags, env, argv []string) (Result, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	cmd := h.command(ctx, flags, argv)
	if env != nil {
		cmd.Env = env
	}
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	// A daemon that a command leaves behind keeps the pipes open: don't wait for it.
	cmd.WaitDelay = time.Second
	h.commandWG.Add(1)
	defer h.commandWG.Done()
	err := cmd.Run()
	r := Result{strings.TrimSpace(out.String()), strings.TrimSpace(errs.String())}
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil
	}
	if ctx.Err() != nil && err != nil {
		err = fmt.Errorf("%w (%w)", err, ctx.Err())
	}
	if err != nil {
		return r, fmt.Errorf("%s: %s: %w: %s", h.opts.Name, strings.Join(argv, " "), err, r.Err)
	}
	return r, nil
}

// command returns argv as a command that will run in the host.
func (h *Host) command(ctx context.Context, flags, argv []string) *exec.Cmd {
	args := []string{"--target", strconv.Itoa(h.init.Process.Pid), "--mount", "--pid", "--net", "--uts", "--ipc"}
	args = append(append(append(args, flags...), "--"), argv...)
	cmd := exec.CommandContext(ctx, "nsenter", args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // as for the init: an interrupt at the terminal is the caller's
	return cmd
}

// Virsh runs virsh on the host's libvirtd and returns what it printed.
func (h *Host) Virsh(ctx context.Context, args ...string) (string, error) {
	r, err := h.Run(ctx, append([]string{"virsh", "--quiet", "--connect", "qemu:///system"}, args...)...)
	return r.Out, err
}

// Signal sends a signal (a name such as "KILL") to a process of the host by its pid there.
func (h *Host) Signal(ctx context.Context, signal string, pid int) error {
	// The shell's own kill: a small Debian has no other.
	_, err := h.Run(ctx, "sh", "-c", `kill -s "$1" "$2"`, "sh", signal, strconv.Itoa(pid))
	return err
}

// ReadPID reads a pid file of the host.
func (h *Host) ReadPID(path string) (int, error) {
	text, err := os.ReadFile(h.Path(path))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
}

// GuestPID returns the pid, in the host, of a running guest of the system's libvirtd.
func (h *Host) GuestPID(guest string) (int, error) {
	return h.ReadPID("/run/libvirt/qemu/" + guest + ".pid")
}
