// SPDX-License-Identifier: LGPL-2.1-or-later

package upgrade

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"virtlockd/internal/inspectclient"
	"virtlockd/test/checker"
	"virtlockd/test/host"
	"virtlockd/test/wire"
)

func TestMain(m *testing.M) {
	checker.Init()
	if part := os.Getenv(partEnv); part != "" {
		os.Exit(playPart(part))
	}
	host.Main(m)
}

// partEnv tells a process that a test started what it is.
const partEnv = "VIRTLOCKD_UPGRADE_TEST_PART"

func playPart(part string) int {
	var err error
	switch part {
	case "giver":
		err = give()
	case "caller": // connects and ends
		_, err = wire.Dial(giverSocket, wire.LockProgram)
	default:
		err = fmt.Errorf("no part is called %q", part)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "part of a test: %v\n", err)
		return 1
	}
	return 0
}

const (
	link      = "/tmp/bin/virtlockd" // what the daemon execs: a symbolic link
	notify    = "/run/notify"
	stateFile = "/run/virtlockd-restart-exec.json"
	pidFile   = "/run/virtlockd.pid"
)

// Owners whose process ids belong to no process: the kernel gives none above 4194304.
const (
	noOne     = 0x70000001
	noOneElse = 0x70000002
)

// machine is a host with one daemon, whose binary is a link that can be turned.
type machine struct {
	*host.Host
	*host.Daemon
	t       testing.TB
	options host.Options
	isC     bool   // the running daemon is the C one
	kept    bool   // what the test has started is the daemon's keeper
	next    string // what the link leads to

	mu   sync.Mutex
	said []string // to systemd
}

// start starts a daemon. It logs everything but debug messages, unless o.Config says otherwise. With --keeper its locks are in a vault;
// else nobody keeps what it wants to store.
func start(t testing.TB, binary string, o host.Options) *machine {
	t.Helper()
	return startOn(t, host.New(t), binary, o)
}

func startOn(t testing.TB, h *host.Host, binary string, o host.Options) *machine {
	t.Helper()
	m := &machine{Host: h, t: t, kept: slices.Contains(o.Args, "--keeper")}
	h.Expose(host.Ours(t))
	m.turn(binary)
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: h.Path(notify), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		buf := make([]byte, 4096)
		for {
			n, err := socket.Read(buf)
			if err != nil {
				return
			}
			if said := string(buf[:n]); strings.HasPrefix(said, "FDSTORE") || said == "BARRIER=1" {
				continue // it asks for a store, which there is not
			}
			m.mu.Lock()
			m.said = append(m.said, string(buf[:n]))
			m.mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		socket.Close()
		<-ended
	})
	o.Argv0 = cmp.Or(o.Argv0, link)
	o.Config = "log_level = 2\nlog_filters = \"4:lock_daemon_dispatch\"\n" + o.Config
	o.Env = append(o.Env, "NOTIFY_SOCKET="+notify)
	m.options = o
	m.launch(binary)
	return m
}

// bothForms runs a test in parallel with a daemon that nobody keeps anything for, and with one that has a keeper, and so a vault. Where it is to
// begin as the C daemon, ours hands over to that first.
func bothForms(t *testing.T, binary string, args []string, test func(t *testing.T, m *machine)) {
	t.Parallel()
	t.Run("alone", func(t *testing.T) {
		t.Parallel()
		test(t, start(t, binary, host.Options{Args: args}))
	})
	t.Run("with a keeper", func(t *testing.T) {
		t.Parallel()
		m := startKept(t, args...)
		if binary != m.next {
			m.hop(binary)
		}
		test(t, m)
	})
}

// crash kills the daemon if it has a keeper, when all of its locks are stored, and waits for the next one.
func (m *machine) crash() {
	m.t.Helper()
	if !m.kept {
		return
	}
	c, err := inspectclient.Dial(m.t.Context(), m.Path(m.SocketPath("admin")), host.Patience)
	must(m.t, err)
	defer c.Close()
	eventually(m.t, "all locks are stored", func() bool {
		s, err := c.Status()
		must(m.t, err)
		return s.Locks.CrashSafe == s.Locks.Exclusive+s.Locks.Shared
	})
	m.killKept()
}

// again starts another daemon, with the same options, when the one before has ended.
func (m *machine) again(binary string) {
	m.t.Helper()
	m.turn(binary)
	m.launch(binary)
}

func (m *machine) launch(binary string) {
	m.t.Helper()
	said := m.things()
	d := m.Start(binary, m.options)
	m.Daemon, m.isC = d, binary == host.C(m.t)
	if m.kept {
		m.t.Cleanup(func() {
			m.EndKept()
			m.endOrphan()
		})
	}
	eventually(m.t, "the daemon says that it is ready", func() bool { return m.ready(said) })
	m.t.Cleanup(func() {
		if strings.Contains(d.Stderr(), "DATA RACE") { // with a binary that looks for them: VIRTLOCKD_BINARY
			m.t.Error("there is a data race")
		}
	})
}

// endOrphan ends a daemon that has outlived its keeper, and by now has another one, which ends with it.
func (m *machine) endOrphan() {
	b, err := os.ReadFile(m.Path(pidFile))
	if err != nil {
		return
	}
	pid, err := strconv.Atoi(string(b))
	if exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err == nil && exe == host.Ours(m.t) {
		_ = syscall.Kill(pid, syscall.SIGTERM)
	}
}

// turn makes the link lead to a binary.
func (m *machine) turn(binary string) {
	m.t.Helper()
	m.Link(binary, link)
	m.next = binary
}

// process is the process id of the daemon.
func (m *machine) process() int {
	m.t.Helper()
	if m.kept {
		return m.pidOf()
	}
	return m.PID()
}

// send sends a signal to the daemon, as an administrator does who reads the pid file.
func (m *machine) send(sig syscall.Signal) {
	m.t.Helper()
	must(m.t, syscall.Kill(m.process(), sig))
}

// mark is a moment in the life of a daemon.
type mark struct{ said, handed, taken, failed int }

// mark is now.
func (m *machine) mark() mark {
	m.t.Helper()
	return mark{m.things(), m.handed(), m.taken(), m.failures()}
}

// things is how many things it has said to systemd.
func (m *machine) things() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.said)
}

// ready tells whether the daemon has said so since it had said n things.
func (m *machine) ready(n int) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.ContainsFunc(m.said[n:], func(s string) bool { return strings.HasPrefix(s, "READY=1") })
}

// handed is how often the log says that everything is handed over to the next binary.
func (m *machine) handed() int { return strings.Count(m.Stderr(), execLine) }

// taken is how often the log says that one of ours has taken over. Where there is a keeper, it has followed by then.
func (m *machine) taken() int { return strings.Count(m.Stderr(), successLine) }

// upgraded tells whether another binary is ready.
func (m *machine) upgraded(since mark) bool {
	followed := !m.kept || m.next == host.C(m.t) || m.taken() > since.taken
	return m.ready(since.said) && (m.isC || m.handed() > since.handed) && followed
}

// hop upgrades to a binary and returns when that is ready.
func (m *machine) hop(binary string) {
	m.t.Helper()
	m.turn(binary)
	m.usr1()
	m.isC = binary == host.C(m.t)
}

// usr1 upgrades to what the link leads to.
func (m *machine) usr1() {
	m.t.Helper()
	mark := m.mark()
	m.send(syscall.SIGUSR1)
	m.await(mark)
}

func (m *machine) await(mark mark) {
	m.t.Helper()
	failed := func() bool { return m.failures() > mark.failed || !m.Alive() }
	if !host.Eventually(func() bool { return m.upgraded(mark) || failed() }) || failed() {
		m.t.Fatalf("no upgrade\n%s", host.Shorten(m.Stderr()))
	}
}

const (
	failureLine = "SIGUSR1: no live upgrade"
	execLine    = "the new binary takes over"
	successLine = "this binary has taken over"
)

func (m *machine) failures() int { return strings.Count(m.Stderr(), failureLine) }

// fails sends SIGUSR1 and expects no upgrade, for a reason that the log tells in one line.
func (m *machine) fails(reason string) {
	m.t.Helper()
	failed := m.failures()
	m.Signal(syscall.SIGUSR1)
	if !host.Eventually(func() bool { return m.failures() > failed || !m.Alive() }) || !m.Alive() {
		m.t.Fatalf("%s: no word of it\n%s", reason, host.Shorten(m.Stderr()))
	}
	log := m.Stderr()
	if strings.Contains(log[strings.LastIndex(log, "SIGUSR1: live upgrade begins"):], successLine) {
		m.t.Fatalf("%s: upgraded all the same", reason)
	}
	line := last(log, failureLine)
	if !strings.Contains(line, " error : ") || !strings.Contains(line, reason) {
		m.t.Errorf("the log does not say %q: %s", reason, line)
	}
}

// last returns the last line of a text that has a word in it.
func last(text, word string) string {
	found := ""
	for line := range strings.Lines(text) {
		if strings.Contains(line, word) {
			found = strings.TrimSpace(line)
		}
	}
	return found
}

// says fails the test if no line of the log has all these words.
func (m *machine) says(words ...string) {
	m.t.Helper()
	if !host.Eventually(func() bool { return m.countLines(words...) > 0 }) {
		m.t.Errorf("no line in the log has %q\n%s", words, host.Shorten(m.Stderr()))
	}
}

func (m *machine) countLines(words ...string) (n int) {
	for line := range strings.Lines(m.Stderr()) {
		if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
			n++
		}
	}
	return n
}

// TryDial connects as libvirt does, which waits while the queue of the socket is full. Go's connect(2) does not.
func (m *machine) TryDial(socket string) (c *wire.Conn, err error) {
	host.Eventually(func() bool {
		c, err = m.Daemon.TryDial(socket)
		return !errors.Is(err, syscall.EAGAIN)
	})
	return c, err
}

// Dial is TryDial for what can't fail. The connection is closed when the test ends.
func (m *machine) Dial(socket string) *wire.Conn {
	m.t.Helper()
	c, err := m.TryDial(socket)
	if err != nil {
		m.t.Fatalf("connect: %v\n%s", err, host.Shorten(m.Stderr()))
	}
	m.t.Cleanup(c.Close)
	return c
}

func (m *machine) touch(paths ...string) {
	m.t.Helper()
	for _, path := range paths {
		m.WriteFile(path, "", 0o644)
	}
}

// startChecker begins to watch locks of the machine that must never be free.
func (m *machine) startChecker(paths ...string) *checker.Checker {
	m.t.Helper()
	var seen []string
	for _, path := range paths {
		seen = append(seen, m.Path(path))
	}
	return checker.Start(m.t, seen...)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// refused checks for the answer that a resource is locked.
func refused(t testing.TB, what string, err error) {
	t.Helper()
	if !wire.IsLocked(err) {
		t.Errorf("%s: got %v, want 'is locked'", what, err)
	}
}

func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	if !host.Eventually(cond) {
		t.Fatalf("never: %s", what)
	}
}

func itoa(n uint32) string { return strconv.FormatUint(uint64(n), 10) }

// limit asks for the number of clients that the lock server may have.
func limit(t testing.TB, admin *wire.Conn) uint32 {
	t.Helper()
	m, err := admin.Call(wire.ProcAdminGetLimits, wire.Payload(nil).String(wire.LockServer).Uint32(0))
	must(t, err)
	must(t, m.Err())
	r := wire.NewReader(m.Payload)
	for n := r.Uint32(); n > 0; n-- {
		// A typed parameter: its name, its type, and, for all there are here, 32 bits.
		name := r.String()
		r.Uint32()
		if v := r.Uint32(); name == "nclients_max" {
			return v
		}
	}
	t.Fatalf("no limit in %x", m.Payload)
	return 0
}

// command returns this test binary as a process on the host that plays a part.
func (m *machine) command(part string, args ...string) *exec.Cmd {
	return &exec.Cmd{
		Path: "/proc/self/exe", Args: append([]string{"virtlockd-test-" + part}, args...),
		Env: append(os.Environ(), partEnv+"="+part), Dir: host.Cwd, Stderr: os.Stderr,
		SysProcAttr: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL},
	}
}
