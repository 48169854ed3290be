// SPDX-License-Identifier: LGPL-2.1-or-later

package upgrade

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// installed is a daemon whose program is a file that a package manager replaces. Its log is a file, too: it may be a detached one.
type installed struct {
	*machine
}

const installedLog = "/tmp/daemon.log"

// install puts a program in the place of the one that is there.
func (m *machine) install(program string) {
	m.t.Helper()
	b, err := os.ReadFile(program)
	must(m.t, err)
	m.WriteFile(link+".new", string(b), 0o755)
	m.Must(func() error { return os.Rename(link+".new", link) })
}

// startInstalled starts a program by the path where it is installed, with the arguments given.
func startInstalled(t testing.TB, program string, args ...string) *installed {
	t.Helper()
	h := host.New(t)
	m := &installed{&machine{Host: h, t: t}}
	h.Expose(host.Ours(t)) // its worker processes
	m.Must(func() error { return os.MkdirAll("/tmp/bin", 0o755) })
	m.install(program)
	m.Daemon = h.Start("/proc/self/root"+link, host.Options{
		Argv0: link, Args: args, Config: "log_level = 2\nlog_filters = \"4:lock_daemon_dispatch\"\nlog_outputs = \"2:file:" + installedLog + "\"\n",
	})
	t.Cleanup(func() {
		m.EndKept()
		for _, pid := range h.Processes() {
			if name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); strings.HasPrefix(string(name), "virtlockd-keep") {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		}
		m.endOrphan()
		if t.Failed() && m.Exists(installedLog) {
			t.Log(host.Shorten(m.ReadFile(installedLog)))
		}
	})
	return m
}

// runs tells whether a process runs what is installed now.
func (m *installed) runs(pid int) bool {
	exe, err := os.Stat(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return false
	}
	now, err := os.Stat(m.Path(link))
	return err == nil && os.SameFile(exe, now)
}

// become has the daemon go on as another program, which is installed for that.
func (m *installed) become(program string, daemon int, c *wire.Conn) {
	m.t.Helper()
	m.install(program)
	must(m.t, unix.Kill(daemon, unix.SIGUSR1))
	eventually(m.t, "what is installed runs", func() bool { return m.runs(daemon) })
	must(m.t, c.Ping()) // only then it listens to signals
}

// successor waits for another daemon than the one given, and returns its process id.
func (m *installed) successor(daemon int) (pid int) {
	m.t.Helper()
	eventually(m.t, "there is another daemon", func() bool {
		b, _ := os.ReadFile(m.Path(pidFile))
		pid, _ = strconv.Atoi(string(b))
		return pid > 0 && pid != daemon && parentOf(pid) > 0
	})
	return pid
}

// startBesideC starts ours with a keeper, and has the C daemon take over, with a lock.
func startBesideC(t *testing.T, arg string) (m *installed, keeper, daemon int) {
	t.Helper()
	m = startInstalled(t, host.Ours(t), arg)
	daemon = m.pidOf()
	c := m.Client(noOne)
	must(t, c.Acquire("", host.Data+"/x", wire.Autocreate))
	m.become(host.C(t), daemon, c)
	return m, parentOf(daemon), daemon
}

// If the C daemon dies beside our keeper its locks are lost, as ever, but it is not the end: ours is started, which keeps what comes.
func TestCKilledBesideKeeper(t *testing.T) {
	t.Parallel()
	for _, arg := range []string{"--keeper", "-d"} {
		t.Run(arg, func(t *testing.T) {
			t.Parallel()
			m, keeper, daemon := startBesideC(t, arg)
			must(t, unix.Kill(daemon, unix.SIGKILL))
			next := m.successor(daemon)
			if parent := parentOf(next); parent != keeper {
				t.Errorf("the daemon is a child of %d, the keeper is %d", parent, keeper)
			}
			if m.runs(next) {
				t.Error("the C daemon was started")
			}
			eventually(t, "the log says that locks are lost", func() bool {
				return strings.Contains(m.ReadFile(installedLog), "so its locks are lost")
			})
			c := m.Client(noOneElse)
			must(t, c.Acquire("", host.Data+"/y", wire.Autocreate))
			host.Settled(t, next)
			must(t, unix.Kill(next, unix.SIGKILL))
			last := m.successor(next)
			must(t, c.Ping())
			must(t, c.Release("", host.Data+"/y"))
			must(t, unix.Kill(keeper, unix.SIGTERM))
			eventually(t, "both have ended", func() bool { return parentOf(keeper) == 0 && parentOf(last) == 0 })
		})
	}
}

// A stop of the keeper is one of the C daemon, too.
func TestCStoppedByKeeper(t *testing.T) {
	t.Parallel()
	for _, arg := range []string{"--keeper", "-d"} {
		t.Run(arg, func(t *testing.T) {
			t.Parallel()
			m, keeper, daemon := startBesideC(t, arg)
			must(t, unix.Kill(keeper, unix.SIGTERM))
			eventually(t, "both have ended", func() bool { return parentOf(keeper) == 0 && parentOf(daemon) == 0 })
			for _, path := range []string{pidFile, "/run/libvirt/virtlockd-sock"} {
				if m.Exists(path) {
					t.Errorf("%s is left", path)
				}
			}
			if arg == "--keeper" {
				if code := m.Wait(); code != 0 {
					t.Errorf("exit code %d", code)
				}
			}
		})
	}
}

// What a detached C daemon has left is safe as soon as it is converted: -d means a keeper, which ours starts.
func TestCrashAfterDetachedC(t *testing.T) {
	t.Parallel()
	m := startInstalled(t, host.C(t), "-d")
	locks := m.hold()
	outside := m.startChecker(locks.paths...)
	daemon := m.pidOf()
	m.become(host.Ours(t), daemon, locks.conn)
	logged := func(words string) bool { return strings.Contains(m.ReadFile(installedLog), words) }
	eventually(t, "the locks are stored", func() bool { return logged("locks from before are stored") })
	host.Settled(t, daemon)
	must(t, unix.Kill(daemon, unix.SIGKILL))
	next := m.successor(daemon)
	must(t, locks.conn.Ping())
	eventually(t, "the log says that it has taken over", func() bool { return logged("recovery: this process has taken over") })
	locks.check(m.machine)
	outside.Quiet()
	locks.release(m.machine)
	keeper := parentOf(next)
	if name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", keeper)); !strings.HasPrefix(string(name), "virtlockd-keep") {
		t.Errorf("the parent of the daemon is %q", name)
	}
	must(t, unix.Kill(keeper, unix.SIGTERM))
	eventually(t, "both have ended", func() bool { return parentOf(keeper) == 0 && parentOf(next) == 0 })
}
