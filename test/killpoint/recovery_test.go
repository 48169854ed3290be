// SPDX-License-Identifier: LGPL-2.1-or-later

package killpoint

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/manager"
	"virtlockd/test/wire"
)

// managed is a stage whose daemon is started by the test.
type managed struct {
	*stage
	manager *manager.Manager
}

var quiet = host.Options{Config: "log_level = 2\n"}

func startManaged(t testing.TB) *managed {
	t.Helper()
	m := newManaged(t)
	m.Daemon = m.manager.Start(quiet)
	m.populate(local)
	return m
}

// newManaged is a host with a manager, and no daemon yet.
func newManaged(t testing.TB) *managed {
	t.Helper()
	h := host.New(t)
	return &managed{&stage{Host: h, t: t}, manager.New(t, h)}
}

// goesOn starts the next daemon, which must have everything, and ends the test.
func (m *managed) goesOn(when string) {
	m.t.Helper()
	m.Daemon = m.manager.Start(quiet)
	must(m.t, m.bystand.Ping())
	m.holds(when)
	m.end()
}

// systemctl puts a script in the place of that program, and returns the environment in which it is found.
func (m *managed) systemctl(script string) []string {
	m.t.Helper()
	m.WriteFile("/tmp/stub/systemctl", "#!/bin/sh\n"+script, 0o755)
	return []string{"PATH=/tmp/stub:/usr/sbin:/usr/bin:/sbin:/bin"}
}

// kill ends the daemon, once it has nothing to do.
func (m *managed) kill() {
	m.t.Helper()
	host.Settled(m.t, m.PID())
	must(m.t, unix.Kill(m.PID(), unix.SIGKILL))
	m.Wait()
}

// gate starts a daemon that waits, as a shell, until it is traced.
const gate = "/tmp/gate"

// dies starts a daemon and kills it at one of its points, or when it has come to rest. It returns those that it has reached.
func (m *managed) dies(at int) []Point {
	t := m.t
	t.Helper()
	if !m.Exists(gate) {
		m.Must(func() error { return unix.Mkfifo(gate+".fifo", 0o600) })
		m.WriteFile(gate, fmt.Sprintf("#!/bin/sh\nread go < %s.fifo\nLISTEN_PID=$$; export LISTEN_PID; exec %s \"$@\"\n", gate, host.Ours(t)), 0o755)
	}
	ready := m.manager.Said("READY=1")
	o := m.manager.Options(quiet)
	o.NoWait = true
	d := m.Start(gate, o)
	trace, err := Attach(d.PID())
	must(t, err)
	trace.KillAfterExec(at)
	fifo, err := os.OpenFile(m.Path(gate+".fifo"), os.O_WRONLY, 0) // waits for the shell
	must(t, err)
	_, err = fifo.WriteString("go\n")
	must(t, errors.Join(err, fifo.Close()))
	must(t, trace.Finish(func() bool { return m.manager.Said("READY=1") > ready }))
	d.Wait()
	return trace.Points()
}

// A process that takes over from one that was killed is killed itself, and so is the next one, and the next: each a little later in its
// recovery, until one gets through it. What the first one had not answered is ended then, and everything else is there.
func TestRecovery(t *testing.T) {
	t.Parallel()
	// The call after which the first process is killed.
	last := map[string]int{
		"acquire lease": unix.SYS_SENDMSG, "acquire shared": unix.SYS_SENDMSG, "register first": unix.SYS_SENDMSG, // it is stored
		"release lease": unix.SYS_UNLINKAT, "release shared": unix.SYS_RECVMSG,
	}
	for n, r := range requests {
		if last[r.name] == 0 {
			continue
		}
		step := 12
		if r.name == "acquire lease" { // it has most to lose
			step = 4
		}
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			m := startManaged(t)
			m.kill()
			all := m.dies(Never)
			m.Daemon = m.manager.Start(quiet)
			c := m.guest.Dial(m.Daemon, "lock")
			args := r.args
			if r.unregistered {
				args = wire.RegisterArgs(wire.VM(m.guest.PID()))
			} else {
				must(t, c.Register(wire.VM(m.guest.PID())))
			}
			if r.before != nil {
				must(t, r.before(c))
			}
			trace, err := Attach(m.PID())
			must(t, err)
			trace.KillAfter(last[r.name])
			must(t, c.Send(wire.Request(r.proc, 7, args)))
			must(t, trace.Finish(func() bool { return false }))
			m.Wait()

			// From where it looks into the vault.
			begin := slices.IndexFunc(all, func(p Point) bool { return p.Call == unix.SYS_SETSOCKOPT })
			kills := 0
			at := begin + n%step
			for ; len(m.dies(at)) > at; at += step { // else it came to rest before
				kills++
				for _, w := range m.waiters {
					w.Asleep()
				}
			}
			m.Daemon = m.manager.Start(quiet)
			must(t, m.bystand.Ping())
			if m.recv(c, trace) {
				t.Error("a request is answered that was never executed")
			}
			if r.takes || r.gives {
				m.holds("after the recovery")
			}
			must(t, r.after(m.client()))
			m.holds("after another try")
			t.Logf("%d recoveries in a row were killed, each %d points later, from %d to %d", kills, step, begin, at)
			m.end()
		})
	}
}
