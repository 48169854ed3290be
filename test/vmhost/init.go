// SPDX-License-Identifier: LGPL-2.1-or-later

package vmhost

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const (
	initEnv   = "VMHOST_INIT" // set in the environment of a host's init
	initReady = "ready"       // what the init answers when all is mounted
)

// Init turns the process into a host's init and doesn't return, if it was started as one. Otherwise it does nothing.
func Init() {
	if os.Getenv(initEnv) == "" {
		return
	}
	signals := make(chan os.Signal, 1) // one is enough: each makes reap look for all
	signal.Notify(signals, unix.SIGCHLD)
	go reap(signals)
	control, status := os.NewFile(3, "control"), os.NewFile(4, "status")
	in := bufio.NewReader(control)
	if err := prepare(in); err != nil {
		fmt.Fprint(status, err)
		os.Exit(1)
	}
	fmt.Fprint(status, initReady)
	status.Close()
	io.Copy(io.Discard, in) // until the maker of this host is gone or closes it
	os.Exit(0)
}

// reap collects the processes whose parent has ended, one or more at each signal. Guests are among them: a lock daemon that asks
// kill(pid, 0) whether a guest is dead must not see a zombie.
func reap(signals <-chan os.Signal) {
	for range signals {
		for {
			if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); pid <= 0 && err != unix.EINTR {
				break
			}
		}
	}
}

// prepare makes the host's file systems, name and loopback interface.
func prepare(control io.Reader) error {
	var s setup
	if err := json.NewDecoder(control).Decode(&s); err != nil {
		return fmt.Errorf("read set-up: %w", err)
	}
	os.Unsetenv(initEnv)
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	// A sysfs of the own network namespace: libvirtd looks at all interfaces.
	if err := unix.Mount("sysfs", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /sys: %w", err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	if err := prepareDev(); err != nil {
		return err
	}
	for _, b := range s.Binds {
		if err := makeTarget(b); err != nil {
			return err
		}
		if err := unix.Mount(b.From, b.To, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("show %s at %s: %w", b.From, b.To, err)
		}
	}
	if err := unix.Sethostname([]byte(s.Name)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	return loopbackUp()
}

// makeTarget makes what a bind is mounted on. Only the host's private file systems may change, so elsewhere it must exist.
func makeTarget(b bind) error {
	if _, err := os.Stat(b.To); err == nil {
		return nil
	}
	private := false
	for _, dir := range []string{"/run/", "/etc/libvirt/", "/var/lib/libvirt/"} {
		private = private || (len(b.To) > len(dir) && b.To[:len(dir)] == dir)
	}
	if !private {
		return fmt.Errorf("%s does not exist: is libvirt installed?", b.To)
	}
	if fi, err := os.Stat(b.From); err != nil || fi.IsDir() {
		return os.MkdirAll(b.To, 0o755)
	}
	if err := os.MkdirAll(filepath.Dir(b.To), 0o755); err != nil {
		return err
	}
	return os.WriteFile(b.To, nil, 0o644)
}

// prepareDev mounts a /dev with the devices that every program expects and no other: no KVM, so that all machines behave the
// same, and no disks but those that Host.AddDevice makes.
func prepareDev() error {
	if err := unix.Mount("tmpfs", "/dev", "tmpfs", unix.MS_NOSUID, "mode=755"); err != nil {
		return fmt.Errorf("mount /dev: %w", err)
	}
	for _, d := range []struct {
		name         string
		major, minor uint32
	}{{"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0}} {
		if err := unix.Mknod("/dev/"+d.name, unix.S_IFCHR|0o666, int(unix.Mkdev(d.major, d.minor))); err != nil {
			return fmt.Errorf("make /dev/%s: %w", d.name, err)
		}
		if err := os.Chmod("/dev/"+d.name, 0o666); err != nil {
			return err
		}
	}
	for _, m := range []struct{ dir, kind, data string }{
		{"/dev/pts", "devpts", "newinstance,ptmxmode=0666,mode=620"},
		{"/dev/shm", "tmpfs", "mode=1777"},
	} {
		if err := os.Mkdir(m.dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.dir, m.kind, unix.MS_NOSUID|unix.MS_NOEXEC, m.data); err != nil {
			return fmt.Errorf("mount %s: %w", m.dir, err)
		}
	}
	for link, to := range map[string]string{
		"/dev/ptmx": "pts/ptmx", "/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0",
		"/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(to, link); err != nil {
			return err
		}
	}
	return nil
}

// loopbackUp switches the loopback interface on.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("switch the loopback interface on: %w", err)
	}
	return nil
}
