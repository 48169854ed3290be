// SPDX-License-Identifier: LGPL-2.1-or-later

package systemd

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// program is what becomes the machine's PID 1.
const program = "/lib/systemd/systemd"

// agent is where the test binary is on a machine.
const agent = "/run/virtlockd-test-agent"

// vendorUnits is where packages install units, on a system whose /lib is a link to usr/lib.
const vendorUnits = "/usr/lib/systemd/system"

// wanted are the links that stay of those by which packages make units part of the boot. Everything else would only
// take time, and some of it (kernel modules, auditing) concerns the real machine.
var wanted = map[string][]string{
	"sysinit.target.wants": {"systemd-journald.service", "systemd-tmpfiles-setup.service"},
	"sockets.target.wants": {"systemd-journald.socket", "systemd-journald-dev-log.socket"},
}

// masked are units that others pull in: the kernel's auditing is the real machine's.
var masked = []string{"systemd-journald-audit.socket", "systemd-remount-fs.service"}

// opaque are directories of which a machine sees nothing but what it gets itself.
var opaque = []string{"/etc/systemd", "/etc/libvirt", "/var/lib/libvirt", "/var/lib/systemd", "/usr/local/lib/systemd"}

// boot runs as the first process in the machine's namespaces. It makes the file systems and becomes systemd; it
// returns only with an error.
func boot() error {
	// The control group namespace is the thread's, and so is the process's after exec.
	runtime.LockOSThread()
	unix.CloseOnExec(controlFD)
	unix.CloseOnExec(statusFD)
	var s setup
	if err := json.NewDecoder(os.NewFile(controlFD, "control")).Decode(&s); err != nil {
		return fmt.Errorf("read what to set up: %w", err)
	}
	syscall.Umask(0o022)
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("make a control group namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	root, err := makeRoot(s)
	if err != nil {
		return err
	}
	if err := mountIn(root); err != nil {
		return err
	}
	if err := enter(root); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte("virtlockd-test")); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	for fd := range 3 {
		if err := unix.Dup2(int(null.Fd()), fd); err != nil {
			return err
		}
	}
	argv := []string{program, "--system", "--unit=" + bootTarget, "--log-target=journal"}
	env := []string{"container=lxc", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TERM=dumb"}
	return fmt.Errorf("execute %s: %w", program, syscall.Exec(program, argv, env))
}

// makeRoot mounts an overlay over the real machine's files and returns where.
func makeRoot(s setup) (string, error) {
	dir := s.Dir + "/files"
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	if err := unix.Mount("virtlockd-test", dir, "tmpfs", 0, "mode=755"); err != nil {
		return "", fmt.Errorf("mount tmpfs: %w", err)
	}
	upper, work, root := dir+"/upper", dir+"/work", dir+"/root"
	for _, dir := range []string{upper, work, root} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return "", err
		}
	}
	for _, dir := range opaque {
		if err := hide(upper + dir); err != nil {
			return "", err
		}
	}
	if err := hideWants(upper); err != nil {
		return "", err
	}
	if s.Installed != "" {
		if err := os.CopyFS(upper, os.DirFS(s.Installed)); err != nil {
			return "", fmt.Errorf("copy what is installed: %w", err)
		}
	}
	for _, unit := range masked {
		if err := os.MkdirAll(upper+UnitDir, 0o755); err != nil {
			return "", err
		}
		if err := os.Symlink(os.DevNull, filepath.Join(upper, UnitDir, unit)); err != nil {
			return "", err
		}
	}
	for path, content := range s.Files {
		if err := writeFile(upper+path, content, 0o644); err != nil {
			return "", err
		}
	}
	opts := fmt.Sprintf("lowerdir=/,upperdir=%s,workdir=%s", upper, work)
	if err := unix.Mount("overlay", root, "overlay", 0, opts); err != nil {
		return "", fmt.Errorf("mount an overlay over / (the kernel needs overlayfs, also for the file system of /): %w", err)
	}
	for _, path := range []string{program, vendorUnits + "/" + bootTarget} {
		if _, err := os.Stat(root + path); err != nil {
			return "", fmt.Errorf("the package systemd is not there, or not on the file system of /: %w", err)
		}
	}
	return root, nil
}

// hide makes a directory of the overlay's upper side that nothing of the lower side shines through.
func hide(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Setxattr(dir, "trusted.overlay.opaque", []byte("y"), 0); err != nil {
		return fmt.Errorf("hide what is in %s (tmpfs needs CONFIG_TMPFS_XATTR): %w", dir, err)
	}
	return nil
}

// hideWants leaves only wanted links of the directories by which units pull in others.
func hideWants(upper string) error {
	entries, err := os.ReadDir(vendorUnits)
	if err != nil {
		return fmt.Errorf("the package systemd is not there: %w", err)
	}
	for _, e := range entries {
		if ext := filepath.Ext(e.Name()); ext != ".wants" && ext != ".requires" {
			continue
		}
		if err := hide(filepath.Join(upper, vendorUnits, e.Name())); err != nil {
			return err
		}
		for _, unit := range wanted[e.Name()] {
			if err := os.Symlink("../"+unit, filepath.Join(upper, vendorUnits, e.Name(), unit)); err != nil {
				return err
			}
		}
	}
	return nil
}

// mountIn mounts what is not a matter of files below the new root.
func mountIn(root string) error {
	const safe = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	for _, m := range []struct {
		path, kind, data string
		flags            uintptr
	}{
		{"/proc", "proc", "", safe},
		// systemd takes a read-only /sys for a container's, in which it leaves the hardware alone.
		{"/sys", "sysfs", "", safe | unix.MS_RDONLY},
		{"/sys/fs/cgroup", "cgroup2", "", safe},
		{"/dev", "tmpfs", "mode=755", unix.MS_NOSUID},
		{"/run", "tmpfs", "mode=755", unix.MS_NOSUID | unix.MS_NODEV},
		{"/tmp", "tmpfs", "mode=1777", unix.MS_NOSUID | unix.MS_NODEV},
		{"/var/tmp", "tmpfs", "mode=1777", unix.MS_NOSUID | unix.MS_NODEV},
		{"/var/log", "tmpfs", "mode=755", unix.MS_NOSUID | unix.MS_NODEV},
	} {
		if err := os.MkdirAll(root+m.path, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, root+m.path, m.kind, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s: %w", m.path, err)
		}
	}
	// systemd would set it: the length of journald's queue. With the kernel's 10, PID 1, which doesn't wait for long,
	// would lose messages. It is the network namespace's own.
	const queue = "/proc/sys/net/unix/max_dgram_qlen"
	if err := os.WriteFile(root+queue, []byte("4096"), 0); err != nil {
		return err
	}
	// What else is set there is set for the real machine.
	if err := bind(root+"/proc/sys", root+"/proc/sys"); err != nil {
		return err
	}
	if err := unix.Mount("", root+"/proc/sys", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("make /proc/sys read-only: %w", err)
	}
	for _, dir := range []string{"/dev/pts", "/dev/shm", "/var/log/libvirt", "/run/libvirt", Data} {
		if err := os.Mkdir(root+dir, 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount("devpts", root+"/dev/pts", "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620"); err != nil {
		return fmt.Errorf("mount /dev/pts: %w", err)
	}
	if err := os.Symlink("pts/ptmx", root+"/dev/ptmx"); err != nil {
		return err
	}
	self, err := os.Executable() // /proc/self/exe belongs to another mount namespace
	if err != nil {
		return err
	}
	binds := map[string]string{"/dev/console": "/dev/null", agent: self}
	for _, name := range []string{"null", "zero", "full", "random", "urandom", "tty", "fuse"} {
		if _, err := os.Stat("/dev/" + name); err == nil {
			binds["/dev/"+name] = "/dev/" + name
		}
	}
	for to, from := range binds {
		if err := os.WriteFile(root+to, nil, 0o644); err != nil {
			return err
		}
		if err := bind(from, root+to); err != nil {
			return err
		}
	}
	return nil
}

func bind(from, to string) error {
	if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("show %s at %s: %w", from, to, err)
	}
	return nil
}

// enter makes root the root directory and drops everything that is not in it.
func enter(root string) error {
	if err := os.Chdir(root); err != nil {
		return err
	}
	// The old root lands on top of the new one and is taken off (pivot_root(2)).
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root (an initramfs as root file system can't be left): %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount the old root: %w", err)
	}
	return os.Chdir("/")
}

// writeFile makes the directories of a file too.
func writeFile(path, content string, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		return err
	}
	return os.Chmod(path, mode)
}
