// SPDX-License-Identifier: LGPL-2.1-or-later

package killpoint

import (
	"bytes"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"virtlockd/test/host"
	"virtlockd/test/manager"
	"virtlockd/test/wire"
)

const vaultName = "virtlockd-vault"

// says fails the test if no line of the daemon's log has all these words.
func says(t testing.TB, d *host.Daemon, words ...string) {
	t.Helper()
	found := func() bool {
	lines:
		for line := range strings.Lines(d.Stderr()) {
			for _, w := range words {
				if !strings.Contains(line, w) {
					continue lines
				}
			}
			return true
		}
		return false
	}
	if !host.Eventually(found) {
		t.Errorf("no line in the log has %q\n%s", words, host.Shorten(d.Stderr()))
	}
}

// status is what virtlockctl says of the daemon.
func status(t testing.TB, h *host.Host) string {
	t.Helper()
	return tool(t, h, nil, nil, "status")
}

// tool runs virtlockctl, as a user, and returns what it prints.
func tool(t testing.TB, h *host.Host, user *syscall.Credential, env []string, args ...string) string {
	t.Helper()
	path := host.Ctl(t)
	h.Expose(path)
	cmd := &exec.Cmd{
		Path: path, Args: append([]string{"virtlockctl"}, args...), Env: append([]string{"LANG=C"}, env...), Dir: host.Cwd,
		SysProcAttr: &syscall.SysProcAttr{Credential: user},
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	h.Must(cmd.Start)
	if err := cmd.Wait(); err != nil {
		t.Logf("virtlockctl %s: %v", args, err) // its exit code says that something is not as it should be
	}
	return out.String()
}

// A manager that refuses to keep anything, does not answer in time, or is not there: the daemon says so and serves.
func TestStoreRefuses(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		do   func(m *manager.Manager)
		said string
	}{
		{"refuses the probe", func(m *manager.Manager) { m.Refuse("probe") }, "thrown away"},
		{"answers too late", func(m *manager.Manager) { m.Pause() }, "did not answer"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h := host.New(t)
			m := manager.New(t, h)
			tt.do(m)
			d := h.Start(host.Ours(t), m.Options(quiet))
			if tt.name == "answers too late" {
				m.Continue()
			}
			says(t, d, " warning : ", "locks are lost if this daemon crashes", tt.said)
			if s := status(t, h); !strings.Contains(s, tt.said) {
				t.Errorf("status:\n%s", s)
			}
			c := d.Client(noOne)
			must(t, c.Acquire("", host.Data+"/x", wire.Autocreate))
			must(t, c.Release("", host.Data+"/x"))
			if m.Kept(vaultName) != 0 {
				t.Error("a vault is kept that the daemon does not use")
			}
			if code := d.Stop(); code != 0 {
				t.Errorf("exit code %d", code)
			}
		})
	}
}

// A process that has taken a vault over goes on with it when the store has no answer for it: what is stored there is stored, and given up
// with it before the C daemon takes over.
func TestStoreTooLateForRecovery(t *testing.T) {
	t.Parallel()
	m := startManaged(t)
	m.kill()
	m.manager.Pause()
	d := m.manager.Launch(quiet)
	says(t, d, "did not answer")
	m.manager.Continue()
	m.Daemon = d
	must(t, m.bystand.Ping())
	c := m.client()
	must(t, c.Acquire("", disk, 0))
	// What was stored meanwhile is in the vault all the same.
	m.kill()
	m.Daemon = m.manager.Start(quiet)
	must(t, c.Ping())
	if m.Free(disk, true) {
		t.Error("the lock was lost")
	}
	must(t, c.Release("", disk))
	m.holds("after a store that was too late")
	m.end()
}

// While the manager does not answer, a live upgrade loses nothing.
func TestStorePausedDuringUpgrade(t *testing.T) {
	t.Parallel()
	m := startManaged(t)
	m.manager.Pause()
	m.Signal(syscall.SIGUSR1)
	says(t, m.Daemon, "this binary has taken over")
	must(t, m.bystand.Ping())
	m.manager.Continue()
	m.kill()
	m.Daemon = m.manager.Start(quiet)
	must(t, m.bystand.Ping())
	m.holds("after an upgrade")
	m.end()
}
