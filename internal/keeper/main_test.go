// SPDX-License-Identifier: LGPL-2.1-or-later

package keeper

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/systemd"
)

// The test binary plays all parts: the keeper itself, who starts it, and the daemon, which does what the test says on a connection.
const (
	roleVar    = "KEEPER_TEST_ROLE"
	controlVar = "KEEPER_TEST_CONTROL"
)

// patience is how long anything may take on a busy machine.
const patience = 30 * time.Second

func TestMain(m *testing.M) {
	if IsKeeper() {
		Main()
	}
	switch os.Getenv(roleVar) {
	case "":
		os.Exit(m.Run())
	case "daemon":
		if os.Getenv(envKeeper) != "" {
			os.Exit(daemonMain())
		}
		if os.Getenv("LISTEN_FDS") != "" {
			systemd.Readdress(os.Getpid())
		}
		report := -1
		if text := os.Getenv("KEEPER_TEST_REPORT"); text != "" {
			report, _ = strconv.Atoi(text)
		}
		dir, _ := os.Getwd()
		fmt.Fprintln(os.Stderr, Run(Config{Args: os.Args, Dir: dir, Report: report}))
		os.Exit(99)
	case "stranger":
		fmt.Println(strangerMain())
	}
}

// hello is what a daemon says first on its connection.
type hello struct {
	PID, Keeper int
	Alive       bool // the keeper
	Report      int
	Died, Dir   string
	Env, Args   []string
	Names       []string
	Inodes      []uint64 // of the descriptors
	Nice        bool     // all of them are close-on-exec
}

func inode(fd int) uint64 {
	var st unix.Stat_t
	unix.Fstat(fd, &st)
	return st.Ino
}

func daemonMain() int {
	link := Kept()
	descriptors, err := systemd.Descriptors(os.Getpid())
	conn, dialErr := net.Dial("unix", os.Getenv(controlVar))
	if link == nil || err != nil || dialErr != nil {
		fmt.Fprintln(os.Stderr, "daemon:", link, err, dialErr)
		return 98
	}
	h := hello{PID: os.Getpid(), Keeper: link.PID, Alive: link.PIDFD >= 0, Report: link.Report, Died: link.Died, Env: os.Environ(), Args: os.Args, Nice: true}
	h.Dir, _ = os.Getwd()
	for _, d := range descriptors {
		h.Names, h.Inodes = append(h.Names, d.Name), append(h.Inodes, inode(d.FD))
		flags, err := unix.FcntlInt(uintptr(d.FD), unix.F_GETFD, 0)
		h.Nice = h.Nice && err == nil && flags&unix.FD_CLOEXEC != 0
	}
	out := json.NewEncoder(conn)
	out.Encode(h)
	in := bufio.NewScanner(conn)
	for in.Scan() {
		verb, arg, _ := strings.Cut(in.Text(), " ")
		n := link.Notifier()
		answer, err := "", error(nil)
		switch verb {
		case "send":
			arg, err = strconv.Unquote(arg)
			err = errors.Join(err, n.Send(arg))
		case "store": // NAME FILE, with a lock on the file
			name, path, _ := strings.Cut(arg, " ")
			var fd int
			if fd, err = unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o600); err == nil {
				err = errors.Join(unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Len: 1}), n.Store(name, fd, fd))
				answer = fmt.Sprint(inode(fd))
			}
		case "many": // so many pipes in one message
			count, _ := strconv.Atoi(arg)
			var fds []int
			for range count {
				var pipe [2]int
				unix.Pipe2(pipe[:], unix.O_CLOEXEC)
				fds = append(fds, pipe[0])
			}
			err = n.Store("many", fds...)
		case "remove":
			err = n.Remove(arg)
		case "probe":
			err = n.ProbeStore("probe", patience)
		case "reexec":
			err = link.Reexec()
		case "adopt":
			link.Close()
			if link, err = Adopt(Config{Args: os.Args, Dir: h.Dir}, patience); err == nil {
				answer = fmt.Sprint(link.PID)
			}
		case "upgrade": // go on in place, as a live upgrade does
			err = unix.Exec("/proc/self/exe", os.Args, os.Environ())
		case "leave": // in order, right after the wish for another binary
			if err := errors.Join(link.Reexec(), n.Send("STOPPING=1")); err != nil {
				fmt.Fprintln(os.Stderr, "daemon:", err)
				return 96
			}
			return 0
		case "exit":
			code, _ := strconv.Atoi(arg)
			return code
		}
		if err == nil && link.PIDFD >= 0 {
			err = link.Notifier().Barrier(patience)
		}
		if err != nil {
			answer = "error: " + err.Error()
		}
		out.Encode(answer)
	}
	return 97 // the test is over
}

// strangerMain is another process that knows the address.
func strangerMain() error {
	n := systemd.NewNotifier()
	return errors.Join(n.Store("stranger", 0), n.Send("STOPPING=1\nREADY=1"), n.Send("KEEPER_REEXEC=1"), n.Remove("a"),
		n.Send(strings.Repeat("x", 10000), 0))
}

// host is one keeper with what it keeps.
type host struct {
	t      *testing.T
	dir    string
	listen *net.UnixListener
	cmd    *exec.Cmd
	ended  chan struct{} // the keeper that the test has started
	stderr strings.Builder
	conns  []net.Conn
	pids   []int // all that the test has heard of
}

// daemon is one that runs, or did.
type daemon struct {
	hello
	t    *testing.T
	conn net.Conn
	in   *json.Decoder
}

// newHost starts a keeper. prepare may change how.
func newHost(t *testing.T, prepare func(h *host)) *host {
	t.Helper()
	t.Parallel()
	h := &host{t: t, dir: t.TempDir(), ended: make(chan struct{})}
	var err error
	if h.listen, err = net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(h.dir, "control"), Net: "unix"}); err != nil {
		t.Fatal(err)
	}
	h.cmd = exec.Command("/proc/self/exe", "-d", "with space")
	h.cmd.Dir = h.dir
	h.cmd.Env = []string{roleVar + "=daemon", controlVar + "=" + h.listen.Addr().String(), "GORACE=atexit_sleep_ms=0", "ODD=\xff\x01=\n", "GOGC=77"}
	h.cmd.Stderr = &h.stderr
	if prepare != nil {
		prepare(h)
	}
	if err := h.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	h.pids = append(h.pids, h.cmd.Process.Pid)
	go func() {
		h.cmd.Wait()
		close(h.ended)
	}()
	t.Cleanup(h.close)
	return h
}

// close ends everything: the keepers first, which would start a daemon again, and the daemons by their connections.
func (h *host) close() {
	h.listen.Close()
	for _, pid := range h.pids {
		if ours(pid) {
			unix.Kill(pid, unix.SIGKILL)
		}
	}
	for _, conn := range h.conns {
		conn.Close()
	}
	<-h.ended
	for _, pid := range h.pids {
		h.eventually(fmt.Sprintf("process %d ends", pid), func() bool { return !ours(pid) })
	}
	if h.t.Failed() {
		h.t.Log(h.stderr.String())
	}
}

// ours tells whether a process that lives is one of the test binary.
func ours(pid int) bool {
	path, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	self, _ := os.Executable()
	return err == nil && filepath.Base(filepath.Dir(path)) == filepath.Base(filepath.Dir(self)) ||
		err == nil && strings.Contains(path, "keeper-test-program")
}

func (h *host) eventually(what string, ok func() bool) {
	h.t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			h.t.Errorf("waited in vain: %s", what)
			return
		}
	}
}

// next waits for the next daemon.
func (h *host) next() *daemon {
	h.t.Helper()
	h.listen.SetDeadline(time.Now().Add(patience))
	conn, err := h.listen.Accept()
	if err != nil {
		h.t.Fatalf("no daemon came: %v\n%s", err, h.stderr.String())
	}
	h.conns = append(h.conns, conn)
	d := &daemon{t: h.t, conn: conn, in: json.NewDecoder(conn)}
	conn.SetDeadline(time.Now().Add(patience))
	if err := d.in.Decode(&d.hello); err != nil {
		h.t.Fatal(err)
	}
	h.pids = append(h.pids, d.PID, d.Keeper)
	return d
}

// exit waits for the end of the keeper that the test has started, and returns its exit code, -1 if it was killed.
func (h *host) exit() int {
	h.t.Helper()
	select {
	case <-h.ended:
	case <-time.After(patience):
		h.t.Fatal("the keeper does not end")
	}
	return h.cmd.ProcessState.ExitCode()
}

func (d *daemon) tell(format string, args ...any) string {
	d.t.Helper()
	fmt.Fprintf(d.conn, format+"\n", args...)
	var answer string
	if err := d.in.Decode(&answer); err != nil {
		d.t.Fatalf("%s: %v", fmt.Sprintf(format, args...), err)
	}
	if strings.HasPrefix(answer, "error") {
		d.t.Fatalf("%s: %s", fmt.Sprintf(format, args...), answer)
	}
	return answer
}

// say sends a notification.
func (d *daemon) say(message string) { d.t.Helper(); d.tell("send %q", message) }

func (d *daemon) kill() {
	d.t.Helper()
	if err := unix.Kill(d.PID, unix.SIGKILL); err != nil {
		d.t.Fatal(err)
	}
}

func (d *daemon) exit(code int) { fmt.Fprintf(d.conn, "exit %d\n", code) }

// descriptorsIn lists what the descriptors of a process lead to.
func descriptorsIn(t *testing.T, pid int) (links []string) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if link, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil {
			links = append(links, link)
		}
	}
	return links
}

func has(t *testing.T, pid int, path string) bool {
	t.Helper()
	return slices.Contains(descriptorsIn(t, pid), path)
}
