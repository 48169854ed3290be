// SPDX-License-Identifier: LGPL-2.1-or-later

package systemd

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/test/checker"
	"virtlockd/test/host"
)

// bootedPart is this test binary with a machine, until it is killed.
const bootedPart = "booted"

func TestMain(m *testing.M) {
	checker.Init()
	if os.Getenv(partEnv) != bootedPart {
		Main(m)
		return
	}
	dir, err := os.MkdirTemp("", dirPrefix)
	if err == nil {
		var b *Machine
		if b, err = start(setup{Dir: dir}); err == nil {
			fmt.Println(dir, b.pid, b.keeper.Process.Pid)
			select {}
		}
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// A test that is killed leaves neither processes nor files nor control groups.
func TestKilledTestLeavesNothing(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Fatal("systemd in private namespaces needs root")
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), partEnv+"="+bootedPart)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var dir string
	var pid, keeper int
	_, err = fmt.Fscan(bufio.NewReader(out), &dir, &pid, &keeper)
	if err != nil {
		cmd.Process.Kill()
		cmd.Wait()
		t.Fatalf("no machine: %v", err)
	}
	group := "/" + filepath.Base(dir)
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid)); err != nil || !strings.Contains(string(b), group) {
		t.Errorf("control groups of the machine's PID 1: %q, %v; want %s", b, err, group)
	}
	groups := controlGroups(t)
	if !slices.ContainsFunc(groups, func(s string) bool { return strings.HasSuffix(s, group) }) {
		t.Errorf("control groups: %q; want %s among them", groups, group)
	}
	watch, err := unix.PidfdOpen(keeper, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(watch)
	cmd.Process.Kill()
	cmd.Wait()

	ended := func() bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(watch), Events: unix.POLLIN}}, 0)
		return err == nil && n == 1
	}
	if !host.Eventually(ended) {
		t.Fatal("the keeper does not end")
	}
	if _, err := os.Lstat(dir); err == nil {
		t.Errorf("%s is left", dir)
	}
	if _, err := os.Stat("/proc/" + strconv.Itoa(pid)); err == nil {
		t.Errorf("systemd (%d) is left", pid)
	}
	for _, g := range controlGroups(t) {
		if strings.HasSuffix(g, group) || strings.Contains(g, group+"/") {
			t.Errorf("control group %s is left", g)
		}
	}
}

// controlGroups returns all groups below the one that the test is in.
func controlGroups(t *testing.T) []string {
	h := host.New(t)
	var list []string
	h.Must(func() error {
		// On the thread of the host, which ends with it.
		if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
			return err
		}
		if err := os.MkdirAll("/tmp/cgroup", 0o755); err != nil {
			return err
		}
		if err := unix.Mount("cgroup2", "/tmp/cgroup", "cgroup2", 0, ""); err != nil {
			return err
		}
		entries, err := os.ReadDir("/tmp/cgroup")
		for _, e := range entries {
			if e.IsDir() {
				list = append(list, "/"+e.Name())
			}
		}
		return err
	})
	return list
}

// What is written, mounted and named on the machine stays there.
func TestMachineIsPrivate(t *testing.T) {
	t.Parallel()
	m := Boot(t, Options{Files: map[string]string{"/usr/share/virtlockd-test/a": "a"}})
	if got := m.ReadFile("/usr/share/virtlockd-test/a"); got != "a" {
		t.Errorf("file: %q", got)
	}
	for _, dir := range []string{"/etc", "/usr/share/virtlockd-test", "/var/lib", "/root", "/run", "/tmp", "/var/log", "/dev"} {
		path := dir + "/virtlockd-systemd-private"
		m.WriteFile(path, "x", 0o644)
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s is on the real machine too", path)
			os.Remove(path)
		}
	}
	for _, ns := range []string{"mnt", "pid", "net", "uts", "ipc", "cgroup"} {
		ours, err := os.Readlink("/proc/self/ns/" + ns)
		if err != nil {
			t.Fatal(err)
		}
		theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", m.PID1(), ns))
		if err != nil {
			t.Fatal(err)
		}
		if ours == theirs {
			t.Errorf("namespace %s is that of the real machine", ns)
		}
	}
	for _, path := range []string{"/proc/sys/kernel/printk", "/sys/kernel/profiling"} {
		if out, err := m.Run("sh", "-c", ": >"+path); err == nil || !strings.Contains(out, "Read-only file system") {
			t.Errorf("%s can be opened for writing: %q, %v", path, out, err)
		}
	}
	if got := m.Systemctl("is-system-running"); got != "running" {
		t.Errorf("systemd is %s\n%s", got, m.Systemctl("--failed"))
	}
	// Nothing runs that could get in the way of anything.
	services := m.Systemctl("list-units", "--plain", "--no-legend", "--type=service", "--state=running")
	if lines := strings.Split(services, "\n"); len(lines) != 1 || !strings.HasPrefix(services, "systemd-journald.service") {
		t.Errorf("running services:\n%s", services)
	}
}
