// SPDX-License-Identifier: LGPL-2.1-or-later

package vmhost

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// makerEnv makes the test binary a process that makes a host and is killed then.
const makerEnv = "VMHOST_TEST_MAKER"

func TestMain(m *testing.M) {
	Init()
	if os.Getenv(makerEnv) != "" {
		os.Exit(maker())
	}
	os.Exit(m.Run())
}

// maker makes a host with a process in it, tells the init's pid, and waits for its end.
func maker() int {
	h, err := Start(Options{Name: "orphan"})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	if _, err := h.Run(context.Background(), "sh", "-c", "sleep 1000 >/dev/null 2>&1 &"); err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println(h.dir, h.init.Process.Pid)
	select {}
}

// eventually waits for a condition that has to come true soon.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := Poll(ctx, func() (bool, error) { return cond(), nil }); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

func TestPrivate(t *testing.T) {
	t.Parallel()
	h, err := Start(Options{Name: "alone", Files: map[string]string{"/etc/libvirt/x/y": "private", "/etc/passwd": "nobody here\n"}})
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	for _, c := range []struct{ command, want string }{
		{"uname -n", "alone"},
		{"cat /etc/libvirt/x/y", "private"},
		{"cat /etc/passwd", "nobody here"},
		{"ls /run /var/lib/libvirt/images /var/log/libvirt", "/run:\n\n/var/lib/libvirt/images:\n\n/var/log/libvirt:"},
		{"ls /sys/class/net", "lo"},
		{"ls /dev/loop0 2>/dev/null || echo none", "none"},
		{"mkdir -p /run/libvirt && echo text > /var/lib/libvirt/vmhost-test && cat /var/lib/libvirt/vmhost-test", "text"},
	} {
		r, err := h.Run(t.Context(), "sh", "-c", c.command)
		if err != nil || r.Out != c.want {
			t.Errorf("%s: %q, %v; want %q", c.command, r.Out, err, c.want)
		}
	}
	for _, path := range []string{"/etc/libvirt/x", "/var/lib/libvirt/vmhost-test"} {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s on the machine: %v", path, err)
		}
	}
	if _, err := h.Run(t.Context(), "sh", "-c", "echo reason >&2; exit 3"); err == nil || !strings.Contains(err.Error(), "reason") {
		t.Errorf("a failing command's error is %v", err)
	}
	if err := h.StartDaemon(t.Context(), Lockd, "/bin/false"); err == nil || !strings.Contains(err.Error(), "ended at start") {
		t.Errorf("a daemon that doesn't start: %v", err)
	}
	if err := h.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(h.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("host's directory after Close: %v", err)
	}
}

// A host ends with the process that made it, even if that is killed.
func TestEndsWithMaker(t *testing.T) {
	t.Parallel()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), makerEnv+"=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var dir string
	var pid int
	_, err = fmt.Fscan(out, &dir, &pid)
	cmd.Process.Kill()
	cmd.Wait()
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	eventually(t, "init to end", func() bool { return unix.Kill(pid, 0) == unix.ESRCH })
}

func TestLocks(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	set := func(name string, cmd int, typ int16, start int64) {
		t.Helper()
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		if err := unix.FcntlFlock(f.Fd(), cmd, &unix.Flock_t{Type: typ, Whence: io.SeekStart, Start: start, Len: 1}); err != nil {
			t.Fatal(err)
		}
	}
	set("posix", unix.F_SETLK, unix.F_WRLCK, 0)
	set("ofd", unix.F_OFD_SETLK, unix.F_RDLCK, 0)
	set("elsewhere", unix.F_OFD_SETLK, unix.F_WRLCK, 1)
	table, err := ReadLocks()
	if err != nil {
		t.Fatal(err)
	}
	got, err := table.Below(dir)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string][]Lock{"posix": {{"POSIX", true, os.Getpid()}}, "ofd": {{"OFDLCK", false, -1}}}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("locks %v, want %v", got, want)
	}
}

func TestLoop(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, BootDisk(), 0o600); err != nil {
		t.Fatal(err)
	}
	loop, err := AttachLoop(file)
	if err != nil {
		t.Fatal(err)
	}
	defer loop.Close()
	h, err := Start(Options{Name: "loop"})
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if err := h.AddDevice(loop, "/dev/disk"); err != nil {
		t.Fatal(err)
	}
	r, err := h.Run(t.Context(), "sh", "-c", "tail -c 514 /dev/disk | wc -c; head -c 512 /dev/disk | tail -c 2 | od -An -tx1")
	if err != nil || strings.Join(strings.Fields(r.Out), " ") != "514 55 aa" {
		t.Errorf("the disk on the host: %q, %v", r.Out, err)
	}
	name := loop.device.Name()
	loop.Close()
	eventually(t, name+" to be detached", func() bool {
		back, err := os.ReadFile("/sys/block/" + filepath.Base(name) + "/loop/backing_file")
		return err != nil || strings.TrimSpace(string(back)) != file
	})
}
