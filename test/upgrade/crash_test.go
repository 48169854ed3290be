// SPDX-License-Identifier: LGPL-2.1-or-later

package upgrade

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/survivor"
	"virtlockd/test/wire"
)

// startKept starts a daemon with a keeper, which is the process that the test knows.
func startKept(t testing.TB, args ...string) *machine {
	t.Helper()
	return startKeptOn(t, host.New(t), host.Ours(t), args...)
}

func startKeptOn(t testing.TB, h *host.Host, binary string, args ...string) *machine {
	t.Helper()
	return startOn(t, h, binary, host.Options{
		Args: append([]string{"--keeper"}, args...), Config: "log_filters = \"4:lock_daemon_dispatch 3:rpc\"\n",
	})
}

// A daemon that ends by itself is not started again: its keeper ends too. So it is in a session, where libvirt gives it a timeout.
func TestKeptTimeout(t *testing.T) {
	t.Parallel()
	m := startKept(t, "--timeout", "5") // time enough for its first client
	locks := m.hold()
	m.killKept()
	locks.release(m)
	locks.conn.Close()
	if code := m.Wait(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if m.Exists(pidFile) || m.Exists(m.SocketPath("lock")) {
		t.Error("the pid file or the socket is left behind")
	}
}

// Kills at any instant lose no lock and no answer, and leave no lock for nobody.
func TestKillStorm(t *testing.T) {
	m := startKept(t)
	locks := m.hold()
	outside := m.startChecker(locks.paths...)
	clients := survivor.Start(32, noOne+200, func() (*wire.Conn, error) { return m.TryDial("lock") },
		func(k int) string { return fmt.Sprint(host.Data, "/load", k) })
	n, begin := host.Number(t, "KILLS", 300), time.Now()
	must(t, clients.Storm(n, m.Kept, func(pid int) error { return unix.Kill(pid, unix.SIGKILL) }))
	took := time.Since(begin)
	must(t, clients.Stop())
	polls := outside.Quiet()
	t.Logf("%d kills in %v; %v; %d looks from outside", n, took.Round(time.Millisecond), clients, polls)
	// Over the connection that it was acquired by.
	if err := locks.conn.Ping(); err != nil {
		t.Errorf("an idle connection did not outlive the kills: %v", err)
	}
	locks.check(m)
	entries, err := os.ReadDir(m.Path(host.Data))
	must(t, err)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "load") {
			t.Errorf("lock %s is held for nobody, or its lease was left", e.Name())
		}
	}
	locks.release(m)
	if code := m.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	for _, bad := range []string{"lock given up because the daemon stops", "not safe from a crash", "is not kept", "not understood"} {
		if n := m.countLines(bad); n != 0 {
			t.Errorf("the log says %d times %q: %s", n, bad, last(m.Stderr(), bad))
		}
	}
}

// pidOf reads the pid file, which names the daemon, not its keeper.
func (m *machine) pidOf() int {
	m.t.Helper()
	pid, err := strconv.Atoi(m.ReadFile(pidFile))
	must(m.t, err)
	return pid
}

// parentOf returns the parent of a process, 0 if there is no such process.
func parentOf(pid int) int {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	var parent int
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(fields) > 1 {
		parent, _ = strconv.Atoi(fields[1])
	}
	return parent
}

// A daemon whose keeper is killed has another one, and that one keeps everything too.
func TestKeeperKilled(t *testing.T) {
	t.Parallel()
	m := startKept(t)
	locks := m.hold()
	outside := m.startChecker(locks.paths...)
	daemon := m.pidOf()
	keepers := m.countLines("a keeper has everything now")
	must(t, unix.Kill(m.PID(), unix.SIGKILL))
	eventually(t, "there is another keeper", func() bool { return m.countLines("a keeper has everything now") > keepers })
	m.says(" error : ", "the keeper has ended")
	must(t, locks.conn.Ping())
	host.Settled(t, daemon)
	must(t, unix.Kill(daemon, unix.SIGKILL))
	eventually(t, "there is another daemon", func() bool {
		b, err := os.ReadFile(m.Path(pidFile))
		return err == nil && string(b) != strconv.Itoa(daemon) && m.countLines("recovery: this process has taken over") == 1
	})
	must(t, locks.conn.Ping())
	locks.check(m)
	outside.Quiet()
	locks.release(m)
	// In order: it is the keeper's child now, and that ends with it.
	daemon = m.pidOf()
	keeper := parentOf(daemon)
	must(t, unix.Kill(keeper, unix.SIGTERM))
	eventually(t, "both have ended", func() bool { return parentOf(keeper) == 0 && parentOf(daemon) == 0 })
}

// A guest that has hung up and ignores SIGTERM is ended by the next daemon, if the one that has begun with that is killed; also if its
// only lock was taken by somebody else, before it proved who it is.
func TestKillRuleOutlivesCrash(t *testing.T) {
	t.Parallel()
	for name, named := range map[string]bool{"by itself": false, "by its manager": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			killRuleOutlivesCrash(t, named)
		})
	}
}

func killRuleOutlivesCrash(t *testing.T, named bool) {
	m := startKept(t)
	locks := m.hold()
	outside := m.startChecker(locks.paths...)
	g := m.Spawn(host.ProcessOptions{})
	g.IgnoreTerm()
	acquire := func(c *wire.Conn) { must(t, c.Acquire("", host.Data+"/guest", wire.Autocreate)) }
	if named {
		acquire(m.Client(g.PID()))
	}
	c := g.Dial(m.Daemon, "lock")
	must(t, c.Register(wire.VM(g.PID())))
	if !named {
		acquire(c)
	}
	daemon := m.Kept()
	host.Settled(t, daemon)
	c.Close()
	m.says("it is asked to end (SIGTERM)")
	host.Settled(t, daemon)
	must(t, unix.Kill(daemon, unix.SIGKILL))
	eventually(t, "there is another daemon", func() bool { return m.countLines("recovery: this process has taken over") == 1 })
	late := m.countLines("ignores SIGTERM; it is killed") > 0 // on a slow machine the first one has done everything
	eventually(t, "the end of the guest", g.Dead)
	eventually(t, "the end of its lock", func() bool { return !m.Exists(host.Data + "/guest") })
	if n := m.countLines("it is asked to end (SIGTERM)"); n != 2 && !late {
		t.Errorf("it was asked to end %d times, want 2", n)
	}
	locks.check(m)
	outside.Quiet()
}

// Log settings that are too long to be stored are left out, and said to be; the other ones outlive a crash, and so does all else.
func TestLongSettingsOutliveCrash(t *testing.T) {
	t.Parallel()
	m := startKept(t)
	locks := m.hold()
	admin := m.Dial("admin")
	var filters []string
	for i := range 1000 {
		filters = append(filters, fmt.Sprintf("4:part%d%s", i, strings.Repeat("x", 120)))
	}
	setLog(t, admin, setLogFilters, strings.Join(filters, " "))
	reply, err := admin.Call(setTimeout, wire.Payload(nil).Uint32(1).Uint32(0))
	must(t, errors.Join(err, reply.Err()))
	m.says(" error : ", "too long to outlive a crash")
	m.killKept()
	must(t, locks.conn.Ping())
	locks.check(m)
	locks.release(m)
	locks.conn.Close()
	admin.Close()
	if code := m.Wait(); code != 0 { // by the timeout
		t.Errorf("exit code %d", code)
	}
}

// The keeper goes on as the program that the daemon was upgraded to, also if that was installed by another link.
func TestKeeperFollowsLink(t *testing.T) {
	t.Parallel()
	m := startKept(t)
	locks := m.hold()
	program, err := os.ReadFile(host.Ours(t))
	must(t, err)
	const next = "/tmp/next-version"
	m.WriteFile(next, string(program), 0o755)
	m.turn(next)
	must(t, unix.Kill(m.pidOf(), unix.SIGUSR1))
	m.says(" info : ", "live upgrade: this binary has taken over")
	runs := func(pid int) bool {
		link, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		return err == nil && strings.HasSuffix(link, next)
	}
	eventually(t, "the keeper is the new program", func() bool { return runs(m.PID()) })
	m.killKept()
	must(t, locks.conn.Ping())
	if daemon := m.pidOf(); !runs(daemon) {
		t.Error("after a crash another program goes on")
	}
	locks.check(m)
	locks.release(m)
	if code := m.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// A live upgrade is told when the keeper has followed, so that who waits for that can stop the daemon, by whichever of the two.
func TestStopAfterUpgrade(t *testing.T) {
	t.Parallel()
	for range 5 {
		m := startKept(t)
		locks := m.hold()
		must(t, unix.Kill(m.pidOf(), unix.SIGUSR1))
		m.says(" info : ", "live upgrade: this binary has taken over")
		if code := m.Stop(); code != 0 {
			t.Errorf("the keeper ends with %d\n%s", code, host.Shorten(m.Stderr()))
		}
		if m.Exists(pidFile) || !m.Free(locks.paths[0], true) {
			t.Errorf("the daemon goes on\n%s", host.Shorten(m.Stderr()))
		}
	}
}

// lost requires that the daemon tells of each of these locks by an event, and counts it.
func (m *machine) lost(paths ...string) {
	m.t.Helper()
	ask := func(args ...string) string {
		path := host.Ctl(m.t)
		m.Expose(path)
		var out bytes.Buffer
		cmd := exec.Command(path, args...)
		cmd.Dir, cmd.Stdout, cmd.Stderr = host.Cwd, &out, &out
		must(m.t, m.Do(cmd.Start))
		if err := cmd.Wait(); err != nil {
			m.t.Fatalf("virtlockctl %q: %v\n%s", args, err, out.String())
		}
		return out.String()
	}
	all := ask("events", "--kind", "lost")
	for _, path := range paths {
		if !strings.Contains(all, path) {
			m.t.Errorf("no event tells that the lock on %s was lost:\n%s", path, all)
		}
	}
	if count := fmt.Sprintf("virtlockd_locks_lost_total{reason=\"lock-gone\"} %d\n", len(paths)); !strings.Contains(ask("metrics"), count) {
		m.t.Errorf("the metrics do not say %s", count)
	}
}

// If both are killed at once the locks are lost, and the next daemon says which.
func TestBothKilled(t *testing.T) {
	t.Parallel()
	m := startKept(t)
	locks := m.hold()
	eventually(t, "there is a note", func() bool {
		b, err := os.ReadFile(m.Path("/run/libvirt/virtlockd-locks.note"))
		return err == nil && strings.Count(string(b), "\n") == len(locks.paths)
	})
	daemon := m.pidOf()
	must(t, unix.Kill(daemon, unix.SIGSTOP))
	must(t, unix.Kill(m.PID(), unix.SIGKILL))
	must(t, unix.Kill(daemon, unix.SIGKILL))
	m.Wait()
	eventually(t, "the daemon has ended", func() bool { return m.Free(locks.paths[0], true) })
	m.Daemon = m.Start(host.Ours(t), host.Options{Argv0: link})
	for _, path := range locks.paths {
		m.says(" error : ", "a lock was lost", path, wire.VM(noOne).Name)
	}
	if m.Exists("/run/libvirt/virtlockd-locks.note") {
		t.Error("the note is left")
	}
	m.lost(locks.paths...)
	if code := m.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// From the C daemon and back to it with a vault: what it had is safe from then on, and what it releases afterwards is free.
func TestVaultBesideC(t *testing.T) {
	t.Parallel()
	m := startKept(t)
	locks := m.hold()
	if code := m.countLines("locks are lost if this daemon crashes"); code != 0 {
		t.Error("there is no vault")
	}
	daemon := m.pidOf()
	m.turn(host.C(t))
	must(t, unix.Kill(daemon, unix.SIGUSR1))
	exe := func() string {
		link, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", daemon))
		return link
	}
	eventually(t, "the C daemon runs", func() bool { return exe() == host.C(t) })
	// C holds and releases; a copy in a vault would keep the lock.
	locks.release(m)
	must(t, locks.conn.Acquire("", locks.paths[0], 0))
	m.turn(host.Ours(t))
	must(t, unix.Kill(daemon, unix.SIGUSR1))
	eventually(t, "ours runs", func() bool { return exe() != host.C(t) && m.countLines("this binary has taken over") > 0 })
	must(t, locks.conn.Ping())
	// It is stored while everybody is served; this request comes behind it.
	eventually(t, "the lock is stored", func() bool { return m.countLines("locks from before are stored") > 0 })
	host.Settled(t, daemon)
	must(t, unix.Kill(daemon, unix.SIGKILL))
	eventually(t, "there is another daemon", func() bool { return m.countLines("recovery: this process has taken over") == 1 })
	must(t, locks.conn.Ping())
	if m.Free(locks.paths[0], true) {
		t.Error("the lock was lost")
	}
	must(t, locks.conn.Release("", locks.paths[0]))
	if !m.Free(locks.paths[0], true) {
		t.Error("the lock outlives its release")
	}
	if code := m.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// handTo has the daemon go on as this program, the C daemon or ours, and asks again when it refuses.
func (m *machine) handTo(daemon int, program string, c *wire.Conn) {
	m.t.Helper()
	m.turn(program)
	asked, refused := 0, m.countLines("no live upgrade")
	eventually(m.t, "the other program runs", func() bool {
		running, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", daemon))
		if err == nil && (running == host.C(m.t)) == (program == host.C(m.t)) {
			return true
		}
		if m.countLines("no live upgrade") == refused+asked {
			asked++
			must(m.t, unix.Kill(daemon, unix.SIGUSR1))
		}
		return false
	})
	must(m.t, c.Ping()) // only then it listens to signals
}

// survives kills the daemon, which has come back from the C daemon and has another keeper, and then ends both.
func (m *machine) survives(locks held, daemon int) {
	t := m.t
	t.Helper()
	eventually(t, "the locks are stored", func() bool { return m.countLines("locks from before are stored") > 0 })
	host.Settled(t, daemon)
	must(t, unix.Kill(daemon, unix.SIGKILL))
	eventually(t, "there is another daemon", func() bool { return m.countLines("recovery: this process has taken over") == 1 })
	must(t, locks.conn.Ping())
	locks.check(m)
	locks.release(m)
	daemon = m.pidOf()
	keeper := parentOf(daemon)
	must(t, unix.Kill(keeper, unix.SIGTERM))
	eventually(t, "both have ended", func() bool { return parentOf(keeper) == 0 && parentOf(daemon) == 0 })
}

// The keeper is killed while the C daemon runs: ours has another one when it comes back, and everything is safe again.
func TestKeeperKilledBesideC(t *testing.T) {
	t.Parallel()
	m := startKept(t)
	locks := m.hold()
	daemon := m.pidOf()
	m.handTo(daemon, host.C(t), locks.conn)
	must(t, unix.Kill(m.PID(), unix.SIGKILL))
	m.Wait()
	m.handTo(daemon, host.Ours(t), locks.conn)
	m.survives(locks, daemon)
}

// A hand-over to the C daemon that fails at the very end, when the vault is given up already, is followed by another vault, which has the guests'
// own connections, too.
func TestVaultAfterFailedHandOver(t *testing.T) {
	t.Parallel()
	m := startKept(t)
	locks := m.hold()
	guest := m.Spawn(host.ProcessOptions{})
	own := guest.Dial(m.Daemon, "lock")
	must(t, own.Register(wire.VM(guest.PID())))
	must(t, own.Acquire("", host.Data+"/own", wire.Autocreate))
	daemon := m.pidOf()
	program(script(`echo "virtlockd (libvirt) 9.0.0"; rm `+bad), 0o755)(t, m)
	must(t, unix.Kill(daemon, unix.SIGUSR1))
	m.says(" error : ", "no live upgrade", "cannot run")
	m.says("a keeper has everything now")
	must(t, locks.conn.Ping())
	m.turn(host.Ours(t))
	eventually(t, "the locks are stored", func() bool { return m.countLines("locks from before are stored") > 0 })
	m.killKept()
	must(t, locks.conn.Ping())
	locks.check(m)
	must(t, own.Ping())
	must(t, own.Release("", host.Data+"/own"))
	locks.release(m)
	if code := m.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// If there is no memory for another vault then, the daemon says that nothing is safe, and goes on with all locks; the next live upgrade tries
// again. A limit of the size of files is one of memory files, too.
func TestNoVaultAfterFailedHandOver(t *testing.T) {
	t.Parallel()
	m := startKept(t)
	locks := m.hold()
	outside := m.startChecker(locks.paths...)
	daemon := m.pidOf()
	var usual unix.Rlimit
	must(t, unix.Prlimit(daemon, unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 1 << 20, Max: unix.RLIM_INFINITY}, &usual))
	program(script(`echo "virtlockd (libvirt) 9.0.0"; rm `+bad), 0o755)(t, m)
	must(t, unix.Kill(daemon, unix.SIGUSR1))
	m.says(" error : ", "no live upgrade", "cannot run")
	m.says(" error : ", "locks are lost if this daemon crashes", "make a vault")
	must(t, locks.conn.Acquire("", host.Data+"/more", wire.Autocreate))
	must(t, locks.conn.Release("", host.Data+"/more"))
	locks.check(m)
	must(t, unix.Prlimit(daemon, unix.RLIMIT_FSIZE, &usual, nil))
	m.hop(host.Ours(t))
	m.crash()
	must(t, locks.conn.Ping())
	locks.check(m)
	outside.Quiet()
	locks.release(m)
	if code := m.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// A keeper that can't be replaced at once is replaced later, and a live upgrade to the C daemon doesn't suffer from that.
func TestKeeperReplacedLater(t *testing.T) {
	t.Parallel()
	m := startKept(t)
	locks := m.hold()
	daemon := m.pidOf()
	var usual unix.Rlimit
	must(t, unix.Prlimit(daemon, unix.RLIMIT_NOFILE, nil, &usual))
	must(t, unix.Prlimit(daemon, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: usual.Max}, nil)) // it can't open anything
	must(t, unix.Kill(m.PID(), unix.SIGKILL))
	m.Wait()
	m.says(" error : ", "locks are lost if this daemon crashes")
	must(t, unix.Prlimit(daemon, unix.RLIMIT_NOFILE, &usual, nil))
	m.handTo(daemon, host.C(t), locks.conn)
	m.handTo(daemon, host.Ours(t), locks.conn)
	m.survives(locks, daemon)
}
