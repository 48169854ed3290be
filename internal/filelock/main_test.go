// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"bufio"
	"bytes"
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

// The test binary plays several parts: worker of a Files, and the roles below,
// for what must be another process.
const roleVar = "FILELOCK_TEST_ROLE"

var roles map[string]func(args []string)

func init() {
	roles = map[string]func(args []string){"locker": lockerMain, "fuse": fuseMain, "holder": holderMain}
}

func TestMain(m *testing.M) {
	if IsWorker() {
		WorkerMain()
	}
	if role := os.Getenv(roleVar); role != "" {
		roles[role](os.Args[1:])
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// child is another process in one of the roles. It reads commands, a line
// each, and answers with a line each.
type child struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func startRole(t *testing.T, role string, args ...string) *child {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), roleVar+"="+role, "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c := &child{t: t, cmd: cmd, in: in, out: bufio.NewReader(out)}
	t.Cleanup(func() {
		in.Close()
		cmd.Process.Kill()
		cmd.Wait()
	})
	return c
}

// ask sends a command and returns the answer.
func (c *child) ask(command ...any) string {
	c.t.Helper()
	fmt.Fprintln(c.in, command...)
	line, err := c.out.ReadString('\n')
	if err != nil {
		c.t.Fatalf("%v: %v", command, err)
	}
	return strings.TrimSuffix(line, "\n")
}

func (c *child) want(want string, command ...any) {
	c.t.Helper()
	if got := c.ask(command...); got != want {
		c.t.Errorf("%v: got %q, want %q", command, got, want)
	}
}

// forCommands serves commands on the standard descriptors until they end.
func forCommands(do func(fields []string) string) {
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		fmt.Println(do(strings.Fields(in.Text())))
	}
}

// lockerMain locks files as others do: "posix|ofd read|write PATH", "close PATH".
func lockerMain([]string) {
	fds := map[string]int{}
	forCommands(func(f []string) string {
		if f[0] == "close" {
			unix.Close(fds[f[1]])
			return "ok"
		}
		cmd, typ := unix.F_SETLK, unix.F_WRLCK
		if f[0] == "ofd" {
			cmd = unix.F_OFD_SETLK
		}
		if f[1] == "read" {
			typ = unix.F_RDLCK
		}
		fd, err := unix.Open(f[2], unix.O_RDWR, 0)
		if err != nil {
			return err.Error()
		}
		if err := unix.FcntlFlock(uintptr(fd), cmd, &unix.Flock_t{Type: int16(typ), Len: 1}); err != nil {
			unix.Close(fd)
			return err.Error()
		}
		fds[f[2]] = fd
		return "ok"
	})
}

const refusedText = "resource temporarily unavailable"

func newFiles(t testing.TB, cfg Config) *Files {
	t.Helper()
	f, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.Close()
		if calls := f.InFlight(); len(calls) > 0 {
			t.Errorf("still in progress: %v", calls)
		}
	})
	return f
}

// both runs a test directly, and with everything through workers.
func both(t *testing.T, test func(t *testing.T, f *Files)) {
	t.Run("direct", func(t *testing.T) {
		t.Parallel()
		test(t, newFiles(t, Config{}))
	})
	t.Run("worker", func(t *testing.T) {
		t.Parallel()
		f := newFiles(t, Config{})
		f.openat2 = false
		test(t, f)
	})
}

func makeFile(t testing.TB, path, content string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func mustLock(t testing.TB, f *Files, path string, mode Mode, create bool) *Lock {
	t.Helper()
	l, err := f.Lock(path, mode, create, nil)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func mustRelease(t testing.TB, l *Lock, unlink string) {
	t.Helper()
	if err := l.Release(unlink, nil); err != nil {
		t.Error(err)
	}
}

// eventually waits for a condition.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

// workers returns the pids of this process's workers. A zombie, which has no
// arguments any more, counts too: it is known by its short name.
func workers() []string {
	var pids []string
	lists, _ := filepath.Glob("/proc/self/task/*/children")
	for _, list := range lists {
		data, _ := os.ReadFile(list)
		for pid := range strings.FieldsSeq(string(data)) {
			args, _ := os.ReadFile("/proc/" + pid + "/cmdline")
			stat, _ := os.ReadFile("/proc/" + pid + "/stat")
			if strings.HasPrefix(string(args), workerName+"\x00") || strings.Contains(string(stat), "("+workerComm+")") {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// apart runs the test in a process of its own, in a mount namespace of its
// own. It returns true in there.
func apart(t *testing.T) bool {
	t.Helper()
	const env = "FILELOCK_TEST_APART"
	if os.Getenv(env) == t.Name() {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			t.Fatal(err)
		}
		return true
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root for a mount namespace")
	}
	var parts []string
	for part := range strings.SplitSeq(t.Name(), "/") {
		parts = append(parts, "^"+part+"$")
	}
	cmd := exec.Command("/proc/self/exe", "-test.run="+strings.Join(parts, "/"), "-test.v", "-test.timeout=120s")
	cmd.Env = append(os.Environ(), env+"="+t.Name(), "GORACE=atexit_sleep_ms=0")
	cmd.SysProcAttr = &unix.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	ended := func(how string) bool { return bytes.Contains(out, []byte("--- "+how+": "+t.Name()+" ")) }
	switch {
	case err != nil:
		t.Errorf("%v\n%s", err, out)
	case ended("PASS"):
		t.Logf("%s", out)
	case ended("SKIP"):
		t.Skipf("%s", out)
	default:
		t.Errorf("nothing was tested:\n%s", out)
	}
	return false
}

func mount(t *testing.T, source, target, fstype string, flags uintptr, data string) {
	t.Helper()
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		t.Fatalf("mount %s on %s: %v", source, target, err)
	}
	t.Cleanup(func() { unix.Unmount(target, unix.MNT_DETACH) })
}

func mkdir(t testing.TB, path string) string {
	t.Helper()
	if err := os.MkdirAll(path, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// openFiles returns what the descriptors of this process refer to.
func openFiles(t testing.TB) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		if name, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			names = append(names, name)
		}
	}
	return names
}
