// SPDX-License-Identifier: LGPL-2.1-or-later

package upgrade

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"virtlockd/test/admin"
	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// moment is how long something is watched that must not happen.
const moment = 300 * time.Millisecond

// What an administrator sees and has set is the same afterwards.
func TestCarriesSettings(t *testing.T) { bothForms(t, host.Ours(t), nil, carriesSettings) }

func carriesSettings(t *testing.T, m *machine) {
	a := admin.Admin{Host: m.Host, URI: admin.System}
	m.Client(noOne)
	m.Dial("lock").Close() // a number that is used up
	restricted := m.Client(noOneElse)
	must(t, restricted.Restrict())
	own := m.Dial("admin")
	must(t, own.AdminOpen())
	for _, args := range [][]string{
		{"server-clients-set", "virtlockd", "--max-clients", "77", "--max-unauth-clients", "66"},
		{"server-clients-set", "admin", "--max-clients", "9", "--max-unauth-clients", "9"},
		{"server-threadpool-set", "virtlockd", "--priority-workers", "3"},
		{"daemon-log-filters", "--filters", "1:rpc.nothing 4:lock_daemon_dispatch"},
		{"daemon-log-outputs", "--outputs", "1:file:/tmp/own.log 2:stderr"},
	} {
		if r := a.Run(t, args...); r.Exit != 0 {
			t.Fatalf("%q: %v", args, r)
		}
	}
	view := func() (s string) {
		for _, args := range [][]string{
			{"server-list"}, {"client-list", "virtlockd"}, {"client-info", "virtlockd", "2"}, {"client-info", "virtlockd", "4"}, {"client-info", "admin", "1"},
			{"server-clients-info", "virtlockd"}, {"server-clients-info", "admin"}, {"server-threadpool-info", "virtlockd"},
			{"daemon-log-filters"}, {"daemon-log-outputs"},
		} {
			r := a.Run(t, args...)
			if r.Exit != 0 {
				t.Fatalf("%q: %v", args, r)
			}
			s += fmt.Sprintf("%q:\n%s", args, r.Stdout)
		}
		return s
	}
	before := view()
	for range 3 {
		m.usr1()
		if after := view(); after != before {
			t.Fatalf("-before +after:\n%s", gocmp.Diff(before, after))
		}
	}
	m.crash()
	if after := view(); after != before {
		t.Errorf("after a crash: -before +after:\n%s", gocmp.Diff(before, after))
	}
	must(t, own.Ping())
	if err := wire.AsError(restricted.Acquire("", host.Data+"/x", wire.Autocreate)); err == nil {
		t.Error("a restricted client is not any more")
	}
	if n := strings.Count(m.ReadFile("/tmp/own.log"), successLine); n != 3 {
		t.Errorf("%d upgrades in the log file, want 3", n)
	}
	// The next client has the next number.
	list := func() (ids []uint64) {
		clients, err := own.AdminClients(wire.LockServer)
		must(t, err)
		for _, c := range clients {
			ids = append(ids, c.ID)
		}
		return ids
	}
	last := list()
	m.Client(noOne)
	if now := list(); !slices.Equal(now, append(last, last[len(last)-1]+1)) {
		t.Errorf("clients are %v, were %v", now, last)
	}
}

// A guest holds its locks by its own connection: its end is noticed after an upgrade as before, and so is a hang-up.
func TestCarriesGuests(t *testing.T) { bothForms(t, host.Ours(t), nil, carriesGuests) }

func carriesGuests(t *testing.T, m *machine) {
	guest := func(name string, o host.ProcessOptions) (*host.Process, *wire.Conn, string) {
		p := m.Spawn(o)
		c := p.Dial(m.Daemon, "lock")
		must(t, c.Register(wire.VM(p.PID())))
		path := host.Data + "/" + name
		must(t, c.Acquire("", path, wire.Autocreate))
		must(t, c.Restrict())
		return p, c, path
	}
	dies, _, diesPath := guest("dies", host.ProcessOptions{})
	_, hangsUp, hangsUpPath := guest("hangs-up", host.ProcessOptions{})
	hangsUpDuring, hangsUpDuringConn, hangsUpDuringPath := guest("hangs-up-during", host.ProcessOptions{})
	stubborn, stubbornConn, stubbornPath := guest("stubborn", host.ProcessOptions{})
	stubborn.IgnoreTerm()
	stays, staysConn, staysPath := guest("stays", host.ProcessOptions{})
	// libvirtd speaks for another one.
	named := m.Spawn(host.ProcessOptions{})
	libvirtd := m.Client(named.PID())
	namedPath := host.Data + "/named"
	must(t, libvirtd.Acquire("", namedPath, wire.Autocreate))
	libvirtd.Close()
	// An end and a hang-up at the very moment of the upgrade.
	diesDuring, _, diesDuringPath := guest("dies-during", host.ProcessOptions{})

	// The kill sequence of this one is cut in two.
	stubbornConn.Close()
	eventually(t, "SIGTERM for the stubborn one", func() bool {
		return m.countLines("it is asked to end (SIGTERM)", fmt.Sprint("pid=", stubborn.PID())) == 1
	})
	m.send(syscall.SIGUSR1)
	hangsUpDuringConn.Close()
	diesDuring.Kill()
	m.usr1()
	eventually(t, "the end of who hung up during the upgrade", func() bool { return hangsUpDuring.Dead() && !m.Exists(hangsUpDuringPath) })
	eventually(t, "the release of who died during the upgrade", func() bool { return !m.Exists(diesDuringPath) })
	if stubborn.Dead() {
		t.Error("the kill sequence was over before the upgrade: nothing was tested")
	}
	if m.Free(stubbornPath, true) {
		t.Error("the lock of a guest that does not end is free")
	}
	eventually(t, "SIGKILL for the stubborn one", func() bool { return stubborn.Dead() && !m.Exists(stubbornPath) })

	dies.Kill()
	eventually(t, "release", func() bool { return !m.Exists(diesPath) })
	hangsUp.Close()
	eventually(t, "the end of who hung up", func() bool { return !m.Exists(hangsUpPath) })
	if named.Dead() || m.Free(namedPath, true) {
		t.Error("libvirtd's guest is dead or has lost its lock")
	}
	named.Kill()
	eventually(t, "release", func() bool { return !m.Exists(namedPath) })

	if stays.Dead() || m.Free(staysPath, true) {
		t.Error("the guest that stays is dead or has lost its lock")
	}
	if err := wire.AsError(staysConn.Release("", staysPath)); err == nil {
		t.Error("its connection is not restricted any more")
	}
	for range 3 {
		m.usr1()
	}
	m.crash()
	if host.Within(moment, stays.Dead) || m.Free(staysPath, true) {
		t.Error("the guest that stays is dead or has lost its lock")
	}
	staysConn.Close()
	eventually(t, "the end of the last one", func() bool { return stays.Dead() && !m.Exists(staysPath) })
	if c := m.children(); len(c) > 0 {
		t.Errorf("children: %v", c)
	}
}

// The pid file stays locked and true: nobody can get it for an instant.
func TestCarriesPIDFile(t *testing.T) { bothForms(t, host.Ours(t), nil, carriesPIDFile) }

func carriesPIDFile(t *testing.T, m *machine) {
	outside := m.startChecker(pidFile)
	daemon := m.PID
	if m.kept {
		daemon = m.Kept
	}
	for range 5 {
		m.usr1()
		if got := m.ReadFile(pidFile); got != fmt.Sprint(daemon()) {
			t.Errorf("the pid file says %q, want %d", got, daemon())
		}
	}
	m.crash()
	if got := m.ReadFile(pidFile); got != fmt.Sprint(daemon()) {
		t.Errorf("the pid file says %q, want %d", got, daemon())
	}
	outside.Quiet()
}

// A descriptor that nobody knows of, and the lock on it, stays over any number of live upgrades.
func TestCarriesUnknown(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	path := host.Data + "/unknown"
	h.WriteFile(path, "", 0o600)
	var file *os.File
	h.Must(func() (err error) {
		file, err = os.OpenFile(path, os.O_RDWR, 0)
		return err
	})
	defer file.Close()
	must(t, unix.FcntlFlock(file.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Len: 1}))
	m := startOn(t, h, host.Ours(t), host.Options{Files: []*os.File{file}})
	must(t, file.Close())
	for i := range 4 {
		if m.Free(path, true) {
			t.Fatalf("after %d live upgrades its lock is given away", i)
		}
		m.usr1()
	}
	m.Stop()
	if !m.Free(path, true) {
		t.Error("its lock outlives the daemon")
	}
}

// systemd is told in the right order.
func TestNotifies(t *testing.T) { bothForms(t, host.Ours(t), nil, notifies) }

func notifies(t *testing.T, m *machine) {
	for range 2 {
		m.usr1()
	}
	m.turn("/nowhere")
	m.fails("no such file or directory")
	const gone = "/tmp/bin/gone"
	m.WriteFile(gone, script(version+"rm "+gone), 0o755)
	m.turn(gone)
	m.fails("cannot run")
	m.Stop()
	// The third is the one that fails late.
	const want = "READY=1 RELOADING=1 READY=1 RELOADING=1 READY=1 RELOADING=1 READY=1 STOPPING=1"
	var got string
	if !host.Eventually(func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		var words []string
		for _, s := range m.said {
			first, rest, _ := strings.Cut(s, "\n")
			words = append(words, first)
			if first == "RELOADING=1" && !strings.HasPrefix(rest, "MONOTONIC_USEC=") {
				t.Errorf("RELOADING=1 comes with %q", rest)
			}
		}
		got = strings.Join(words, " ")
		return got == want
	}) {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// A detached daemon is not detached again, and finds its files although it has left the directory that their names count from.
func TestCarriesCommandLine(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	h.WriteFile(host.Cwd+"/conf/own.conf", "log_level = 2\nlog_outputs = \"2:file:/tmp/own.log\"\nmax_clients = 55\n", 0o644)
	d := h.Start(host.Ours(t), host.Options{
		Args: []string{"-d", "--no-keeper", "-f", "conf/own.conf", "-p", "own.pid", "--timeout", "3600", "x"}, NoConfig: true,
		Env: []string{"ODD=a b\nc", "GODEBUG=x=y", "LISTEN_FDNAMES=z"}, Argv0: "bin/daemon",
	})
	if code := d.Wait(); code != 0 {
		t.Fatalf("exit code %d\n%s", code, d.Stderr())
	}
	var pid int
	_, err := fmt.Sscan(h.ReadFile(host.Cwd+"/own.pid"), &pid)
	must(t, err)
	t.Cleanup(func() { _ = unix.Kill(pid, unix.SIGKILL) })
	of := func(name string) string {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
		must(t, err)
		return string(b)
	}
	c, err := d.TryDial("lock")
	must(t, err)
	defer c.Close()
	must(t, c.Register(wire.VM(noOne)))
	must(t, c.Acquire("", host.Data+"/x", wire.Autocreate))
	cmdline, environ := of("cmdline"), of("environ")
	for i := 1; i <= 3; i++ {
		must(t, unix.Kill(pid, unix.SIGUSR1))
		eventually(t, "upgrade", func() bool { return strings.Count(h.ReadFile("/tmp/own.log"), successLine) == i })
		must(t, c.Ping())
		if after := of("cmdline"); after != cmdline {
			t.Errorf("the command line is %q, was %q", after, cmdline)
		}
		// What the kernel shows is the environment that the program was started with, not what it has made of it.
		if after := of("environ"); i > 1 && after != environ || !strings.HasPrefix(environ, after) || !strings.Contains(after, "ODD=a b\nc\x00") {
			t.Errorf("the environment is %q, was %q", after, environ)
		}
		environ = of("environ")
		if got := h.ReadFile(host.Cwd + "/own.pid"); got != fmt.Sprint(pid) {
			t.Errorf("the pid file says %q, want %d", got, pid)
		}
	}
	if strings.Contains(h.ReadFile("/tmp/own.log"), " error : ") || h.Exists("/own.pid") {
		t.Errorf("errors, or another pid file:\n%s", h.ReadFile("/tmp/own.log"))
	}
	must(t, c.Release("", host.Data+"/x"))
	must(t, unix.Kill(pid, unix.SIGTERM))
	eventually(t, "end", func() bool { return errors.Is(unix.Kill(pid, 0), unix.ESRCH) || !h.Exists(host.Cwd+"/own.pid") })
}

// The directory that it was started in may be gone. That is no reason to end with every lock.
func TestWorkingDirectoryIsGone(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	const dir = "/tmp/started-here"
	h.Must(func() error { return os.Mkdir(dir, 0o755) })
	m := startOn(t, h, host.Ours(t), host.Options{Dir: dir})
	c := m.Client(noOne)
	must(t, c.Acquire("", host.Data+"/a", wire.Autocreate))
	h.Must(func() error { return os.Remove(dir) })
	m.hop(host.Ours(t))
	must(t, c.Release("", host.Data+"/a"))
	must(t, c.Acquire("", host.Data+"/a", wire.Autocreate))
}

// A timeout that was set at run time goes on.
func TestCarriesTimeout(t *testing.T) {
	bothForms(t, host.Ours(t), []string{"-t", "3600"}, carriesTimeout)
}

func carriesTimeout(t *testing.T, m *machine) {
	c := m.Client(noOne)
	must(t, c.Acquire("", host.Data+"/x", wire.Autocreate))
	control := m.Dial("admin")
	must(t, control.AdminOpen())
	reply, err := control.Call(19, wire.Payload(nil).Uint32(1).Uint32(0)) // SET_DAEMON_TIMEOUT
	must(t, err)
	must(t, reply.Err())
	m.usr1()
	m.crash()
	control.Close()
	c.Close()
	if host.Within(1500*time.Millisecond, func() bool { return !m.Alive() }) {
		t.Fatal("it ends although a lock is held")
	}
	c = m.Client(noOne)
	must(t, c.Release("", host.Data+"/x"))
	c.Close()
	if code := m.Wait(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// Settings made at run time that the C daemon has no place for do not keep it from taking over. The log says which are as configured
// from then on; the others go on.
func TestSettingsForC(t *testing.T) { bothForms(t, host.Ours(t), []string{"-t", "3600"}, settingsForC) }

func settingsForC(t *testing.T, m *machine) {
	a := admin.Admin{Host: m.Host, URI: admin.System}
	run := func(args ...string) string {
		r := a.Run(t, args...)
		if r.Exit != 0 {
			t.Fatalf("%q: %v", args, r)
		}
		return string(r.Stdout)
	}
	locks := m.hold()
	outside := m.startChecker(locks.paths...)
	configured := run("daemon-log-filters")
	run("server-clients-set", "virtlockd", "--max-clients", "77", "--max-unauth-clients", "66")
	run("daemon-log-filters", "--filters", "1:rpc.nothing 4:lock_daemon_dispatch")
	run("daemon-log-outputs", "--outputs", "1:file:/tmp/own.log 2:stderr")
	control := m.Dial("admin")
	must(t, control.AdminOpen())
	reply, err := control.Call(19, wire.Payload(nil).Uint32(1000).Uint32(0)) // SET_DAEMON_TIMEOUT
	must(t, err)
	must(t, reply.Err())
	limits := run("server-clients-info", "virtlockd")

	m.hop(host.C(t))
	for _, what := range []string{"timeout", "log filters", "log outputs"} {
		if n := m.countLines(" warning : ", "something is not kept", what); n != 1 {
			t.Errorf("the log says %d times that the %s is not kept, want once", n, what)
		}
	}
	if n := m.countLines("something is not kept"); n != 3 {
		t.Errorf("%d things are not kept, want 3", n)
	}
	if now := run("server-clients-info", "virtlockd"); now != limits {
		t.Errorf("limits: -before +after:\n%s", gocmp.Diff(limits, now))
	}
	if now := run("daemon-log-filters"); now != configured {
		t.Errorf("filters: -configured +now:\n%s", gocmp.Diff(configured, now))
	}
	must(t, control.Ping())
	locks.check(m)
	outside.Quiet()
	locks.release(m)
}
