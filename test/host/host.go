// SPDX-License-Identifier: LGPL-2.1-or-later

// Package host gives a test a small private machine to run a lock daemon on, the C one or ours: a mount namespace
// with its own /run, /tmp, /etc/libvirt and /var/{lib,log,cache}/libvirt. Process ids, devices and the kernel's
// lock table are the real ones, so that peer credentials and /proc/locks mean what they mean in production.
// Nothing of the machine's own libvirt is seen or touched, any number of hosts can exist at the same time, and
// nothing is left when the test ends.
//
// A test binary that uses the package calls Main from its TestMain, because the processes that a test needs
// besides the daemon are the test binary itself, started again.
package host

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Patience bounds every wait for something that must happen. It only matters to a failing test.
const Patience = 15 * time.Second

// Poll is the pause between two looks at a condition.
const Poll = 2 * time.Millisecond

// Data is an empty directory for lock files on every host, Cwd the directory in which daemons start.
const (
	Data = "/tmp/vlv"
	Cwd  = "/tmp/cwd"
)

// private lists the directories that a host has for itself.
var private = []struct {
	path string
	mode uint32
}{
	{"/tmp", 0o1777},
	{"/run", 0o755},
	{"/etc/libvirt", 0o755},
	{"/var/lib/libvirt", 0o755},
	{"/var/log/libvirt", 0o700},
	{"/var/cache/libvirt", 0o755},
}

// Host is a mount namespace and the thread that lives in it.
type Host struct {
	t       testing.TB
	calls   chan func()
	ended   chan struct{}
	root    int            // O_PATH descriptor of the namespace's /
	ns      uint64         // number of the namespace
	hidden  map[string]int // what lies beneath a private directory, as O_PATH descriptor
	exposed map[string]bool
	files   []int
}

// New makes a host that ends with the test. It needs root; the test is skipped for anybody else.
func New(t testing.TB) *Host {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a private mount namespace needs root")
	}
	h := &Host{
		t:       t,
		calls:   make(chan func()),
		ended:   make(chan struct{}),
		hidden:  map[string]int{},
		exposed: map[string]bool{},
	}
	ready := make(chan error)
	go h.thread(ready, make(chan struct{}))
	if err := <-ready; err != nil {
		t.Fatalf("host: %v", err)
	}
	t.Cleanup(h.close)
	return h
}

// thread is the goroutine that lives in the namespace. It never unlocks its thread, so the thread ends with it
// (and sends the parent death signal to what it started). locked is closed when it has its thread.
func (h *Host) thread(ready chan<- error, locked chan<- struct{}) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// /proc/self shows the main thread, so that one has to stay where it is. While this goroutine sits
		// on it, another one gets another thread.
		next := make(chan struct{})
		go h.thread(ready, next)
		<-next
		runtime.UnlockOSThread()
		close(locked)
		return
	}
	close(locked)
	h.live(ready)
}

func (h *Host) live(ready chan<- error) {
	defer close(h.ended)
	err := h.setup()
	ready <- err
	if err != nil {
		return
	}
	for f := range h.calls {
		f()
	}
}

// setup runs on the namespace's thread.
func (h *Host) setup() error {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	unix.Umask(0o022)
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	for _, p := range private {
		fd, err := unix.Open(p.path, unix.O_PATH|unix.O_CLOEXEC|unix.O_DIRECTORY, 0)
		switch {
		case err == nil:
			h.hidden[p.path] = fd
			h.files = append(h.files, fd)
		case errors.Is(err, unix.ENOENT):
			if err := overlayFor(p.path); err != nil {
				return err
			}
		default:
			return fmt.Errorf("open %s: %w", p.path, err)
		}
		if err := unix.Mount("virtlockd-test", p.path, "tmpfs", 0, fmt.Sprintf("mode=%o", p.mode)); err != nil {
			return fmt.Errorf("mount tmpfs on %s: %w", p.path, err)
		}
	}
	for _, d := range []string{Data, Cwd} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	root, err := unix.Open("/", unix.O_PATH|unix.O_CLOEXEC|unix.O_DIRECTORY, 0)
	if err != nil {
		return fmt.Errorf("open /: %w", err)
	}
	h.root = root
	h.files = append(h.files, root)
	h.ns, err = guard()
	return err
}

// overlayFor makes a directory that the machine does not have, without making it there: its nearest existing
// parent gets an overlay whose upper side is in the private /tmp, which is mounted first.
func overlayFor(path string) error {
	parent := filepath.Dir(path)
	for {
		if _, err := os.Stat(parent); err == nil {
			break
		}
		parent = filepath.Dir(parent)
	}
	dir, err := os.MkdirTemp("/tmp", ".overlay-*")
	if err != nil {
		return err
	}
	for _, d := range []string{"upper", "work"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	opts := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", parent, dir, dir)
	if err := unix.Mount("overlay", parent, "overlay", 0, opts); err != nil {
		return fmt.Errorf("mount overlay on %s: %w", parent, err)
	}
	return os.MkdirAll(path, 0o755)
}

// Do runs f on the thread that lives in the namespace: there paths mean what they mean to the daemon, mounts are
// possible, and processes start in the namespace. f must not block for long and must not end the goroutine
// (t.Fatal).
func (h *Host) Do(f func() error) error {
	done := make(chan error)
	h.calls <- func() { done <- f() }
	return <-done
}

// Must is Do for steps of a test that can't fail.
func (h *Host) Must(f func() error) {
	h.t.Helper()
	if err := h.Do(f); err != nil {
		h.t.Fatalf("host: %v", err)
	}
}

// Path returns a name for a path of the namespace that is valid on any thread of the test process. Relative
// paths are taken from Cwd. Absolute symbolic links on the way would lead out of the namespace: for those use Do.
func (h *Host) Path(path string) string {
	if !filepath.IsAbs(path) {
		path = Cwd + "/" + path
	}
	return "/proc/self/fd/" + strconv.Itoa(h.root) + path
}

// Link makes the symbolic link path lead to target, whatever it led to before; at no instant is there none.
func (h *Host) Link(target, path string) {
	h.t.Helper()
	h.Must(func() error {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.Symlink(target, path+".new"); err != nil {
			return err
		}
		return os.Rename(path+".new", path)
	})
}

// WriteFile creates or replaces a file in the namespace.
func (h *Host) WriteFile(path, content string, mode os.FileMode) {
	h.t.Helper()
	h.Must(func() error {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if mode&0o111 != 0 {
			// A process that another test starts meanwhile would have the file open for writing until it executes
			// its own program, and so long this one could not be executed (ETXTBSY).
			syscall.ForkLock.RLock()
			defer syscall.ForkLock.RUnlock()
		}
		if err := os.WriteFile(path, []byte(content), mode); err != nil {
			return err
		}
		return os.Chmod(path, mode)
	})
}

// ReadFile returns the content of a file in the namespace.
func (h *Host) ReadFile(path string) string {
	h.t.Helper()
	var b []byte
	h.Must(func() (err error) {
		b, err = os.ReadFile(path)
		return err
	})
	return string(b)
}

// Exists tells whether there is anything at path; a dangling symbolic link counts.
func (h *Host) Exists(path string) bool {
	_, err := os.Lstat(h.Path(path))
	return err == nil
}

// Expose makes a program of the machine visible on the host, at its path, for a daemon that executes it.
func (h *Host) Expose(program string) {
	h.t.Helper()
	h.Must(func() error { return h.expose(filepath.Dir(program)) })
}

// expose makes a directory of the machine that a private one hides visible again, read-only at the same path: the
// one with the daemon's binary. It runs on the namespace's thread.
func (h *Host) expose(dir string) error {
	for top, fd := range h.hidden {
		rel, ok := strings.CutPrefix(dir, top+"/")
		if !ok || h.exposed[dir] {
			continue
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		from := fmt.Sprintf("/proc/self/fd/%d/%s", fd, rel)
		if err := unix.Mount(from, dir, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind mount of %s: %w", dir, err)
		}
		if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
			return fmt.Errorf("bind mount of %s: %w", dir, err)
		}
		h.exposed[dir] = true
	}
	return nil
}

// Processes returns the ids of all processes in the namespace, by /proc: also of those that a daemon started.
func (h *Host) Processes() (pids []int) {
	for _, pid := range processes() {
		if in(pid, h.ns) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// close runs after the clean-up of everything that the test started here.
func (h *Host) close() {
	// What is still there was started by a daemon: it has to go when the daemon goes.
	if !Eventually(func() bool { return len(h.Processes()) == 0 }) {
		for _, pid := range h.Processes() {
			cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			h.t.Errorf("process %d is left behind: %q", pid, cmdline)
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
	if err := unguard(h.ns); err != nil {
		h.t.Errorf("host: %v", err)
	}
	close(h.calls)
	<-h.ended
	for _, fd := range h.files {
		_ = unix.Close(fd)
	}
}

// Eventually looks at a condition until it holds or the patience ends.
func Eventually(cond func() bool) bool { return Within(Patience, cond) }

// Within is Eventually with another patience, for what is expected not to happen.
func Within(d time.Duration, cond func() bool) bool {
	for end := time.Now().Add(d); ; time.Sleep(Poll) {
		if cond() {
			return true
		}
		if time.Now().After(end) {
			return cond()
		}
	}
}

// Number returns the number in the environment variable name, or usual without one: how long a test is to go on.
func Number(t testing.TB, name string, usual int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return usual
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// Share shows a directory of this host on another one, at the same path, as a shared file system would.
func (h *Host) Share(dir string, with *Host) {
	h.t.Helper()
	tree := -1
	h.Must(func() (err error) {
		tree, err = unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		return os.NewSyscallError("open_tree", err)
	})
	defer unix.Close(tree)
	with.Must(func() error {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		return os.NewSyscallError("move_mount", unix.MoveMount(tree, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH))
	})
}
