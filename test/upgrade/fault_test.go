// SPDX-License-Identifier: LGPL-2.1-or-later

package upgrade

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

const bad = "/tmp/bin/bad" // the binary of a test that is none

// script is a program that answers --version as ours does, and then something else.
func script(answer string) string { return "#!/bin/sh\n" + answer + "\n" }

const version = `echo "virtlockd (libvirt) 9.0.0"; echo "virtlockd (Go) 1"; `

// fault is a reason why no live upgrade is possible.
type fault struct {
	name  string
	cause func(t *testing.T, m *machine)
	cure  func(m *machine) // what the good binary needs besides; nil: nothing
	said  string           // in the log
	slow  bool             // the daemon has to wait for it, and must be in service meanwhile
}

func program(content string, mode os.FileMode) func(*testing.T, *machine) {
	return func(_ *testing.T, m *machine) {
		m.WriteFile(bad, content, mode)
		m.turn(bad)
	}
}

// image returns our own binary, changed.
func image(change func([]byte) []byte) func(*testing.T, *machine) {
	return func(t *testing.T, m *machine) {
		b, err := os.ReadFile(host.Ours(t))
		must(t, err)
		program(string(change(b)), 0o755)(t, m)
	}
}

func remount(flags uintptr, options string) func(*machine) {
	return func(m *machine) {
		m.Must(func() error { return unix.Mount("", "/run", "", flags, options) })
	}
}

var faults = []fault{
	{name: "missing", said: "no such file or directory",
		cause: func(_ *testing.T, m *machine) { m.turn("/tmp/bin/nowhere") }},
	{name: "not executable", said: "permission denied", cause: program(script("exit 0"), 0o644)},
	{name: "directory", said: "is a directory",
		cause: func(_ *testing.T, m *machine) { m.turn("/tmp") }},
	{name: "empty", said: "exec format error", cause: program("", 0o755)},
	{name: "truncated", said: "is not fit to go on with: asked for --version",
		cause: image(func(b []byte) []byte { return b[:len(b)/3] })},
	{name: "another architecture", said: "exec format error",
		cause: image(func(b []byte) []byte {
			const machine, s390 = 18, 22
			binary.NativeEndian.PutUint16(b[machine:], s390)
			return b
		})},
	{name: "being written", said: "text file busy",
		cause: func(t *testing.T, m *machine) {
			image(func(b []byte) []byte { return b })(t, m)
			f, err := os.OpenFile(m.Path(bad), os.O_RDWR, 0)
			must(t, err)
			t.Cleanup(func() { f.Close() })
		}},
	{name: "hanging", said: "it did not answer --version within 5s", slow: true, cause: program(script("exec sleep 1000"), 0o755)},
	{name: "hanging with a child", said: "it did not answer --version within 5s", slow: true,
		cause: program(script(version+"sleep 8 & exec sleep 7"), 0o755)},
	{name: "endless", said: "it did not answer --version within 5s", slow: true, cause: program(script("exec yes"), 0o755)},
	{name: "garbage", said: "it says 'ELF?'", cause: program(script("echo ELF?"), 0o755)},
	{name: "with an older state file", said: `it reads version \"0\" of our state file, this one writes version 1`,
		cause: program(script(version+"echo state file version 0"), 0o755)},
	{name: "silent", said: "it says ''", cause: program(script("exit 0"), 0o755)},
	{name: "failing", said: "exit status 3", cause: program(script(version+"exit 3"), 0o755)},
	{name: "gone when it is to run", said: "cannot run " + link + ": execve: no such file or directory",
		cause: program(script(version+"rm "+bad), 0o755)},
	{name: "without interpreter when it is to run", said: "is not fit to go on with: fork/exec " + link + ": no such file or directory",
		cause: program(script(version+"echo '#!/nowhere' > "+bad+".new; chmod 755 "+bad+".new; mv "+bad+".new "+bad), 0o755)},
	{name: "C, and gone when it is to run", said: "cannot run " + link + ": execve: no such file or directory",
		cause: program(script(`echo "virtlockd (libvirt) 9.0.0"; rm `+bad), 0o755)},
	{name: "no room", said: "no space left on device",
		cause: func(_ *testing.T, m *machine) {
			remount(unix.MS_REMOUNT, "size=64k")(m)
			m.Must(func() error {
				if err := os.WriteFile("/run/filler", make([]byte, 1<<20), 0o600); err == nil {
					return os.ErrExist
				}
				return nil
			})
		},
		cure: func(m *machine) { m.Must(func() error { return os.Remove("/run/filler") }) }},
	{name: "read-only", said: "read-only file system",
		cause: func(_ *testing.T, m *machine) {
			m.Must(func() error { return unix.Mount("/run", "/run", "", unix.MS_BIND, "") })
			remount(unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")(m)
		},
		cure: remount(unix.MS_REMOUNT|unix.MS_BIND, "")},
	{name: "something in the way", said: "cannot write the state file",
		cause: func(_ *testing.T, m *machine) {
			m.Must(func() error { return os.Mkdir(stateFile, 0o755) })
		},
		cure: func(m *machine) { m.Must(func() error { return os.Remove(stateFile) }) }},
	{name: "configuration", said: "mend it and try again",
		cause: func(_ *testing.T, m *machine) { m.WriteFile("/tmp/virtlockd.conf", "max_clients = \"many\"\n", 0o644) },
		cure:  func(m *machine) { m.WriteFile("/tmp/virtlockd.conf", m.options.Config, 0o644) }},
}

// Whatever is wrong with the new binary or the place for the state: nothing has happened but a line in the log, and the next
// live upgrade works.
func TestFaults(t *testing.T) {
	t.Parallel()
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			bothForms(t, host.Ours(t), nil, func(t *testing.T, m *machine) {
				locks := m.hold()
				unregistered := m.Dial("lock")
				half := m.Client(noOneElse)
				frame := wire.Request(wire.ProcAcquire, 7, wire.ResourceArgs("", host.Data+"/half", wire.Autocreate))
				must(t, half.Send(frame[:20]))
				outside := m.startChecker(locks.paths...)
				f.cause(t, m)
				if f.slow {
					done := make(chan struct{})
					go func() {
						defer close(done)
						m.fails(f.said)
					}()
					for slept := false; !slept; {
						select {
						case <-done:
							slept = true
						default:
							must(t, unregistered.Ping())
							time.Sleep(time.Millisecond)
						}
					}
				} else {
					m.fails(f.said)
				}
				locks.check(m)
				must(t, unregistered.Ping())
				m.Client(noOneElse).Close()
				if f.cure != nil {
					f.cure(m)
				}
				if m.Exists(stateFile) || m.Exists(stateFile+".new") {
					t.Error("a state file is left")
				}
				m.hop(host.Ours(t))
				locks.check(m)
				must(t, half.Send(frame[20:]))
				reply, err := half.Recv()
				must(t, err)
				must(t, reply.Err())
				must(t, half.Release("", host.Data+"/half"))
				must(t, unregistered.Ping())
				m.crash()
				locks.check(m)
				must(t, unregistered.Ping())
				outside.Quiet()
				if m.failures() != 1 {
					t.Errorf("%d failures in the log\n%s", m.failures(), host.Shorten(m.Stderr()))
				}
				locks.release(m)
				if code := m.Stop(); code != 0 {
					t.Errorf("exit code %d", code)
				}
			})
		})
	}
}

// Signals at any instant of a live upgrade neither end the daemon nor get lost.
func TestSignalsDuringUpgrades(t *testing.T) {
	bothForms(t, host.Ours(t), nil, signalsDuringUpgrades)
}

func signalsDuringUpgrades(t *testing.T, m *machine) {
	locks := m.hold()
	outside := m.startChecker(locks.paths...)
	l := m.startPairs(4)
	signals := []syscall.Signal{syscall.SIGUSR1, syscall.SIGUSR1, syscall.SIGUSR1, syscall.SIGHUP, syscall.SIGUSR2, syscall.SIGALRM, syscall.SIGPIPE}
	for range 300 {
		for range rand.IntN(4) {
			m.send(signals[rand.IntN(len(signals))])
		}
		time.Sleep(time.Duration(rand.IntN(5000)) * time.Microsecond)
	}
	l.end()
	outside.Quiet()
	// A SIGUSR1 of the storm may still be on its way. The next upgrade begins before the one before it is told, since that may wait
	// for the keeper.
	settle := func() {
		eventually(t, "no upgrade is under way", func() bool {
			host.Settled(t, m.process())
			said := m.Stderr()
			begun, exec, done := strings.LastIndex(said, "SIGUSR1: live upgrade begins"), strings.LastIndex(said, execLine), strings.LastIndex(said, successLine)
			return begun < exec && exec < done
		})
	}
	settle()
	m.usr1() // one that comes within an exec may mean that very upgrade
	locks.check(m)
	locks.release(m)
	if n := m.failures(); n > 0 {
		t.Errorf("%d upgrades failed: %s", n, last(m.Stderr(), failureLine))
	}
	t.Logf("%d upgrades", strings.Count(m.Stderr(), successLine))
	settle() // SIGTERM within an exec, of the daemon or of its keeper, is not an orderly end
	if code := m.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// SIGUSR1 again and again, until the C daemon runs, does not end it before it catches that signal. After that it would be an upgrade of its
// own, which can be deadly for it, so it gets none, but for one that may be late.
func TestSignalsDuringHopToC(t *testing.T) { bothForms(t, host.Ours(t), nil, signalsDuringHopToC) }

func signalsDuringHopToC(t *testing.T, m *machine) {
	locks := m.hold()
	outside := m.startChecker(locks.paths...)
	exe, sent := fmt.Sprintf("/proc/%d/exe", m.process()), 0
	for round := range 10 {
		m.turn(host.C(t))
		mark := m.mark()
		if !host.Eventually(func() bool {
			for range 1000 {
				if now, err := os.Readlink(exe); err != nil || now == host.C(t) {
					return true
				}
				m.send(syscall.SIGUSR1)
				sent++
			}
			return !m.Alive()
		}) {
			t.Fatalf("round %d: the C daemon does not run\n%s", round, host.Shorten(m.Stderr()))
		}
		eventually(t, "the C daemon is ready, or dead", func() bool { return m.ready(mark.said) || !m.Alive() })
		if !m.Alive() {
			t.Fatalf("round %d: it has ended: %d", round, m.Wait())
		}
		m.isC = true
		host.Settled(t, m.process())
		must(t, locks.conn.Ping())
		locks.check(m)
		m.hop(host.Ours(t))
		must(t, locks.conn.Ping())
		locks.check(m)
	}
	outside.Quiet()
	t.Logf("%d signals", sent)
	locks.release(m)
}

// SIGHUP that comes before an upgrade has its effect. One that comes in the middle has the same effect as the upgrade, which reads the
// configuration, too, but for the limits that are handed over.
func TestReloadWithUpgrade(t *testing.T) { bothForms(t, host.Ours(t), nil, reloadWithUpgrade) }

func reloadWithUpgrade(t *testing.T, m *machine) {
	admin := m.Dial("admin")
	must(t, admin.AdminOpen())
	for i := range 40 {
		want := uint32(100 + i)
		m.WriteFile("/tmp/virtlockd.conf", "log_level = 2\nmax_clients = "+itoa(want)+"\n", 0o644)
		mark := m.mark()
		if i%2 == 0 {
			m.send(syscall.SIGHUP)
			m.send(syscall.SIGUSR1)
			eventually(t, "upgrade", func() bool { return m.upgraded(mark) })
		} else {
			m.send(syscall.SIGUSR1)
			time.Sleep(time.Duration(rand.IntN(8000)) * time.Microsecond)
			m.send(syscall.SIGHUP)
			eventually(t, "upgrade", func() bool { return m.upgraded(mark) })
			must(t, admin.Ping())
			m.send(syscall.SIGHUP)
		}
		if !host.Eventually(func() bool { return limit(t, admin) == want }) {
			t.Fatalf("round %d: the limit is %d, want %d\n%s", i, limit(t, admin), want, host.Shorten(m.Stderr()))
		}
	}
}

// SIGTERM at any instant of a live upgrade ends the daemon: in order, but for the moment in which the new binary starts and
// the run-time of its language can't hold the signal back. What is left then is in nobody's way.
func TestTermDuringUpgrade(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	var m *machine
	deaths := 0
	const lease = host.Data + "/lease"
	for i := range 80 {
		if m == nil {
			m = startOn(t, h, host.Ours(t), host.Options{})
		} else {
			m.again(host.Ours(t))
		}
		c := m.Client(noOne)
		must(t, c.Acquire("", lease, wire.Autocreate))
		m.Signal(syscall.SIGUSR1)
		time.Sleep(time.Duration(i) * 125 * time.Microsecond)
		m.Signal(syscall.SIGTERM)
		switch code := m.Wait(); code {
		case 0:
			for _, path := range []string{lease, stateFile, pidFile, "/run/libvirt/virtlockd-sock"} {
				if m.Exists(path) {
					t.Fatalf("round %d: %s is left\n%s", i, path, host.Shorten(m.Stderr()))
				}
			}
		case -1 - int(syscall.SIGTERM):
			deaths++
		default:
			t.Fatalf("round %d: exit code %d\n%s", i, code, host.Shorten(m.Stderr()))
		}
	}
	t.Logf("%d deaths at the start of the new binary", deaths)
	m.again(host.Ours(t))
	if m.Exists(stateFile) {
		t.Error("a state file is left")
	}
	c := m.Client(noOne)
	must(t, c.Acquire("", lease, wire.Autocreate))
	must(t, c.Release("", lease))
	if m.Exists(lease) {
		t.Error("a lease file is left")
	}
}

// With a keeper it is always an end in order: if the signal was deadly, the next daemon takes over and gets it.
func TestTermDuringKeptUpgrade(t *testing.T) {
	t.Parallel()
	var m *machine
	const lease = host.Data + "/lease"
	deaths := 0
	for i := range 40 {
		if m == nil {
			m = startKept(t)
		} else {
			m.again(host.Ours(t))
		}
		c := m.Client(noOne)
		must(t, c.Acquire("", lease, wire.Autocreate))
		daemon := m.pidOf()
		must(t, unix.Kill(daemon, unix.SIGUSR1))
		if !host.Eventually(func() bool { return m.handed() > 0 }) {
			t.Fatal("no upgrade")
		}
		time.Sleep(time.Duration(i) * 50 * time.Microsecond)
		must(t, unix.Kill(daemon, unix.SIGTERM))
		if code := m.Wait(); code != 0 {
			t.Fatalf("round %d: exit code %d\n%s", i, code, host.Shorten(m.Stderr()))
		}
		for _, path := range []string{lease, stateFile, pidFile, "/run/libvirt/virtlockd-sock"} {
			if m.Exists(path) {
				t.Errorf("round %d: %s is left\n%s", i, path, host.Shorten(m.Stderr()))
			}
		}
		deaths += m.countLines("recovery: this process has taken over")
	}
	t.Logf("%d deaths at the start of the new binary", deaths)
}

// A program that takes the place of the one that was just asked is asked, too: it may be the C daemon, which can't go on with what
// was written for ours.
func TestReplacedMeanwhile(t *testing.T) { bothForms(t, host.Ours(t), nil, replacedMeanwhile) }

func replacedMeanwhile(t *testing.T, m *machine) {
	locks := m.hold()
	outside := m.startChecker(locks.paths...)
	// It answers as ours does, and is the C daemon afterwards.
	m.WriteFile(bad, script(version+"rm "+bad+"; ln -s "+host.C(t)+" "+bad), 0o755)
	m.turn(bad)
	exe := fmt.Sprintf("/proc/%d/exe", m.process())
	m.send(syscall.SIGUSR1)
	eventually(t, "the C daemon has taken over", func() bool {
		now, _ := os.Readlink(exe) // in the middle of an exec there is none
		return now == host.C(t)
	})
	m.isC = true
	must(t, m.Client(noOneElse).Ping())
	m.says("live upgrade begins anew", "was replaced")
	locks.check(m)
	for _, path := range locks.paths {
		if m.Free(path, true) {
			t.Errorf("%s is free", path)
		}
	}
	must(t, locks.conn.Acquire("", host.Data+"/more", wire.Autocreate))
	m.hop(host.Ours(t))
	locks.check(m)
	outside.Quiet()
}
