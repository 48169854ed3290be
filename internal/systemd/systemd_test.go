// SPDX-License-Identifier: LGPL-2.1-or-later

package systemd

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// TestMain lets the test binary be the started service: it prints what Descriptors returns, because
// descriptors from 3 on can be arranged freely only in a process of one's own.
func TestMain(m *testing.M) {
	if os.Getenv("SYSTEMD_TEST_CHILD") == "" {
		os.Exit(m.Run())
	}
	pid := os.Getpid()
	if os.Getenv(envPID) == "self" {
		Readdress(pid)
	}
	if limit := os.Getenv("SYSTEMD_TEST_LIMIT"); limit != "" {
		n, _ := strconv.ParseUint(limit, 10, 64)
		unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: n})
	}
	var out childResult
	var err error
	if out.FDs, err = Descriptors(pid); err != nil {
		out.Err = err.Error()
	}
	for _, d := range out.FDs {
		flags, _ := unix.FcntlInt(uintptr(d.FD), unix.F_GETFD, 0)
		out.Cloexec = append(out.Cloexec, flags&unix.FD_CLOEXEC != 0)
	}
	for _, kv := range os.Environ() {
		if strings.HasPrefix(kv, "LISTEN_") {
			out.Left = append(out.Left, kv)
		}
	}
	json.NewEncoder(os.Stdout).Encode(out)
	os.Exit(0)
}

type childResult struct {
	FDs     []Descriptor
	Cloexec []bool
	Left    []string
	Err     string
}

func TestDescriptors(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	open := func(name string) *os.File {
		l, err := net.Listen("unix", filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		f, err := l.(*net.UnixListener).File()
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
		t.Cleanup(func() { f.Close() })
		return f
	}
	a, b := open("a"), open("b")
	abstract, err := net.ListenUnix("unix", &net.UnixAddr{Name: "@" + dir, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer abstract.Close()
	abstractFile, err := abstract.File()
	if err != nil {
		t.Fatal(err)
	}
	defer abstractFile.Close()
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()

	pathA, pathB := dir+"/a", dir+"/b"
	for _, tt := range []struct {
		name  string
		env   string
		limit string
		files []*os.File
		want  []Descriptor
		err   string // substring
	}{
		{name: "two", env: "LISTEN_PID=self LISTEN_FDS=2 LISTEN_FDNAMES=x:y", files: []*os.File{a, b},
			want: []Descriptor{{3, "x", pathA}, {4, "y", pathB}}},
		{name: "no names", env: "LISTEN_PID=self LISTEN_FDS=1", files: []*os.File{a},
			want: []Descriptor{{3, "", pathA}}},
		{name: "too few names", env: "LISTEN_PID=self LISTEN_FDS=2 LISTEN_FDNAMES=x", files: []*os.File{a, b},
			want: []Descriptor{{3, "", pathA}, {4, "", pathB}}},
		{name: "too many names", env: "LISTEN_PID=self LISTEN_FDS=1 LISTEN_FDNAMES=x:y", files: []*os.File{a},
			want: []Descriptor{{3, "", pathA}}},
		{name: "no path", env: "LISTEN_PID=self LISTEN_FDS=2 LISTEN_FDNAMES=x:y", files: []*os.File{null, abstractFile},
			want: []Descriptor{{3, "x", ""}, {4, "y", ""}}},
		{name: "other pid", env: "LISTEN_PID=1 LISTEN_FDS=1", files: []*os.File{a}},
		{name: "pid is text", env: "LISTEN_PID=me LISTEN_FDS=1", files: []*os.File{a}},
		{name: "no pid", env: "LISTEN_FDS=1", files: []*os.File{a}},
		{name: "no count", env: "LISTEN_PID=self", files: []*os.File{a}},
		{name: "zero", env: "LISTEN_PID=self LISTEN_FDS=0 LISTEN_FDNAMES=x"},
		{name: "text", env: "LISTEN_PID=self LISTEN_FDS=one", files: []*os.File{a}, err: `LISTEN_FDS="one" is not a possible number`},
		{name: "negative", env: "LISTEN_PID=self LISTEN_FDS=-1", files: []*os.File{a}, err: `LISTEN_FDS="-1" is not a possible number`},
		{name: "beyond the limit", env: "LISTEN_PID=self LISTEN_FDS=98", limit: "100", files: []*os.File{a}, err: "the limit of open files is 100"},
		{name: "huge", env: "LISTEN_PID=self LISTEN_FDS=2147483647", files: []*os.File{a}, err: "is not a possible number"},
		{name: "not open", env: "LISTEN_PID=self LISTEN_FDS=60", limit: "100", files: []*os.File{a}, err: "is not open"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(strings.Fields(tt.env), "SYSTEMD_TEST_CHILD=1", "SYSTEMD_TEST_LIMIT="+tt.limit)
			cmd.ExtraFiles = tt.files
			var stdout, stderr bytes.Buffer
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			if err := cmd.Run(); err != nil {
				t.Fatalf("%v\n%s", err, &stderr)
			}
			var got childResult
			if err := json.Unmarshal(stdout.Bytes(), &got); err != nil {
				t.Fatalf("%v: %s", err, &stdout)
			}
			if diff := cmp.Diff(tt.want, got.FDs); diff != "" {
				t.Errorf("descriptors -want +got:\n%s", diff)
			}
			if (tt.err == "") != (got.Err == "") || !strings.Contains(got.Err, tt.err) {
				t.Errorf("error %q; want %q", got.Err, tt.err)
			}
			if len(got.Left) > 0 {
				t.Errorf("left in the environment: %v", got.Left)
			}
			for i, on := range got.Cloexec {
				if !on {
					t.Errorf("%v is not close-on-exec", got.FDs[i])
				}
			}
		})
	}
}

func TestNotify(t *testing.T) {
	for _, kind := range []string{"path", "abstract"} {
		t.Run(kind, func(t *testing.T) {
			address := filepath.Join(t.TempDir(), "notify")
			if kind == "abstract" {
				address = "@virtlockd-test" + address
			}
			conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: address, Net: "unixgram"})
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			t.Setenv("NOTIFY_SOCKET", address)
			n := NewNotifier()
			if err := n.Send("READY=1"); err != nil {
				t.Fatal(err)
			}
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if err := n.Send("FDSTORE=1", int(w.Fd())); err != nil {
				t.Fatal(err)
			}
			w.Close()

			buf, oob := make([]byte, 100), make([]byte, 100)
			size, ooblen, _, _, err := conn.ReadMsgUnix(buf, oob)
			if err != nil || string(buf[:size]) != "READY=1" || ooblen != 0 {
				t.Errorf("first: %q with %d bytes of control data, %v", buf[:size], ooblen, err)
			}
			size, ooblen, _, _, err = conn.ReadMsgUnix(buf, oob)
			if err != nil || string(buf[:size]) != "FDSTORE=1" {
				t.Errorf("second: %q, %v", buf[:size], err)
			}
			msgs, err := unix.ParseSocketControlMessage(oob[:ooblen])
			if err != nil || len(msgs) != 1 {
				t.Fatalf("control messages: %d, %v", len(msgs), err)
			}
			fds, err := unix.ParseUnixRights(&msgs[0])
			if err != nil || len(fds) != 1 {
				t.Fatalf("descriptors: %v, %v", fds, err)
			}
			// What came must be the pipe's other end.
			got := os.NewFile(uintptr(fds[0]), "passed")
			fmt.Fprint(got, "x")
			got.Close()
			if size, err := r.Read(buf); err != nil || string(buf[:size]) != "x" {
				t.Errorf("through the pipe: %q, %v", buf[:size], err)
			}
		})
	}
}

func TestNotifyNobody(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	if err := NewNotifier().Send("READY=1"); err != nil {
		t.Errorf("without NOTIFY_SOCKET: %v", err)
	}
	t.Setenv("NOTIFY_SOCKET", filepath.Join(t.TempDir(), "none"))
	if err := NewNotifier().Send("READY=1"); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("missing socket: %v; want ENOENT", err)
	}
	for _, bad := range []string{"vsock:2:1", "relative"} {
		t.Setenv("NOTIFY_SOCKET", bad)
		if err := NewNotifier().Send("READY=1"); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
	t.Setenv("NOTIFY_SOCKET", "/"+strings.Repeat("x", 200))
	if err := NewNotifier().Send("READY=1"); err == nil {
		t.Error("too long an address: no error")
	}
}

// A program that leaves a child behind with its output is not waited for.
func TestOutputOfChildLeftBehind(t *testing.T) {
	t.Parallel()
	left, hold, err := os.Pipe() // the child waits until the test has ended
	if err != nil {
		t.Fatal(err)
	}
	defer left.Close()
	defer hold.Close()
	cmd := exec.Command("sh", "-c", "cat <&3 & exit 0")
	cmd.ExtraFiles = []*os.File{left}
	if _, err := output(t.Context(), cmd); !errors.Is(err, exec.ErrWaitDelay) {
		t.Error(err)
	}
}
