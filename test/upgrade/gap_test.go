// SPDX-License-Identifier: LGPL-2.1-or-later

package upgrade

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// Between a daemon that was killed and the next one, the keeper has the sockets and the lock on the pid file: whoever connects is served
// later, and no other daemon gets in.
func TestGap(t *testing.T) {
	t.Parallel()
	m := startKept(t)
	locks := m.hold()
	outside := m.startChecker(locks.paths...)
	daemon := m.pidOf()
	host.Settled(t, daemon)
	m.Pause() // the keeper
	must(t, unix.Kill(daemon, unix.SIGKILL))
	eventually(t, "the daemon is dead", func() bool { // and has let go of everything: a zombie has no descriptors
		fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", daemon))
		return err != nil || len(fds) == 0
	})

	// One connect(2), which does not wait and is not tried again.
	var waiting []*wire.Conn
	for socket, program := range map[string]uint32{"lock": wire.LockProgram, "admin": wire.AdminProgram} {
		c, err := wire.Dial(m.Path(m.SocketPath(socket)), program)
		if err != nil {
			t.Fatalf("connect to the %s socket while there is no daemon: %v", socket, err)
		}
		defer c.Close()
		must(t, c.Send(wire.Ping()))
		waiting = append(waiting, c)
	}
	for _, second := range []struct {
		what, binary string
		args         []string
		code         int
		said         string
	}{
		{"ours", host.Ours(t), nil, 1, "Failed to acquire pid file '" + pidFile + "'"},
		{"ours, with a keeper", host.Ours(t), []string{"--keeper"}, 1, "Failed to acquire pid file '" + pidFile + "'"},
		{"ours, with another pid file", host.Ours(t), []string{"-p", "/run/other.pid"}, 6, "listens on socket"},
		{"C", host.C(t), nil, 1, "pid file"}, // with another one it takes the sockets: W9
	} {
		d := m.Start(second.binary, host.Options{Config: m.options.Config, Args: second.args, NoWait: true})
		if code := d.Wait(); code != second.code {
			t.Errorf("%s: exit code %d, want %d", second.what, code, second.code)
		}
		if !strings.Contains(d.Stderr(), second.said) {
			t.Errorf("%s: it does not say %q: %s", second.what, second.said, d.Stderr())
		}
	}
	if m.Exists("/run/other.pid") {
		t.Error("the pid file of one that was refused is left")
	}
	m.Continue()
	for _, c := range waiting {
		answer, err := c.Recv()
		must(t, err)
		if string(answer.Raw) != string(wire.Pong()) {
			t.Errorf("the answer is %s", answer)
		}
	}
	if now := m.pidOf(); now == daemon || parentOf(now) != m.PID() {
		t.Errorf("the pid file says %d, the one before was %d", now, daemon)
	}
	must(t, locks.conn.Ping())
	locks.check(m)
	outside.Quiet()
	locks.release(m)
	if code := m.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
