// SPDX-License-Identifier: LGPL-2.1-or-later

package killpoint

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/internal/vault"
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

// A manager that refuses to keep anything: the daemon says so and serves, without a vault.
func TestStoreRefuses(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	m := manager.New(t, h)
	m.Refuse("probe")
	d := h.Start(host.Ours(t), m.Options(quiet))
	says(t, d, " warning : ", "locks are lost if this daemon crashes", "thrown away")
	if s := status(t, h); !strings.Contains(s, "thrown away") {
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
}

// A manager that does not answer at the start, from the beginning or when it is given the vault: the daemon says so and serves, and
// when there is an answer everything is safe, also what was there before.
func TestStoreTooLate(t *testing.T) {
	t.Parallel()
	for name, stall := range map[string]func(*manager.Manager){
		"from the beginning": (*manager.Manager).Pause,
		"for the vault":      func(m *manager.Manager) { m.PauseAt(vaultName) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newManaged(t)
			stall(m.manager)
			m.Daemon = m.manager.Launch(quiet)
			says(t, m.Daemon, " warning : ", "locks are lost if this daemon crashes", "did not answer")
			if s := status(t, m.Host); !strings.Contains(s, "did not answer") {
				t.Errorf("status:\n%s", s)
			}
			m.populate(local)
			m.manager.Continue()
			says(t, m.Daemon, "the descriptor store has the vault now")
			if n := m.manager.Kept(vaultName); n != 1 {
				t.Errorf("%d vaults are kept", n)
			}
			m.kill()
			m.goesOn("after a store that was too late")
		})
	}
}

// A live upgrade does not take a store that has not answered yet for one that has the vault: the new binary goes on asking.
func TestStoreTooLateForUpgrade(t *testing.T) {
	t.Parallel()
	m := newManaged(t)
	m.manager.Pause()
	m.Daemon = m.manager.Launch(quiet)
	says(t, m.Daemon, " warning : ", "locks are lost if this daemon crashes", "did not answer")
	m.populate(local)
	m.upgrade()
	if s := status(t, m.Host); !strings.Contains(s, "has not been asked yet") && !strings.Contains(s, "did not answer") {
		t.Errorf("status:\n%s", s)
	}
	m.manager.Continue()
	says(t, m.Daemon, "the descriptor store has the vault now")
	m.kill()
	m.goesOn("after a store that was too late")
}

// A process that has taken a vault over needs no answer of the store: what was passed to it is kept. Also a restart afterwards leaves
// everything held.
func TestStoreTooLateForRecovery(t *testing.T) {
	t.Parallel()
	m := startManaged(t)
	m.kill()
	m.manager.Pause()
	o := quiet
	o.Env = m.systemctl("") // there is no job
	m.Daemon = m.manager.Launch(o)
	must(t, m.bystand.Ping())
	m.manager.Continue()
	c := m.client()
	must(t, c.Acquire("", disk, 0))
	if code := m.Daemon.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	says(t, m.Daemon, "are left to the next process")
	m.Daemon = m.manager.Start(quiet)
	must(t, c.Ping())
	if m.Free(disk, true) {
		t.Error("the lock was lost")
	}
	must(t, c.Release("", disk))
	m.holds("after a store that was too late")
	m.end()
}

// A vault that was given up but stayed in the store holds nothing, and keeps no daemon from starting.
func TestEmptyVaultPassed(t *testing.T) {
	t.Parallel()
	m := newManaged(t)
	m.manager.Keep(vaultName, rootOf(t, (*vault.Vault).GiveUp), true)
	m.Daemon = m.manager.Start(quiet)
	says(t, m.Daemon, " error : ", "it holds nothing")
	m.populate(local)
	if n := m.manager.Kept(vaultName); n != 1 {
		t.Errorf("%d vaults are kept", n)
	}
	m.kill()
	m.goesOn("after a vault that was empty")
}

// Of two vaults that are passed the one is used that locks and clients are in, whichever comes first.
func TestTwoVaultsPassed(t *testing.T) {
	t.Parallel()
	for _, last := range []bool{false, true} {
		for name, end := range map[string]func(*vault.Vault){"empty": (*vault.Vault).GiveUp, "old": (*vault.Vault).Close} {
			t.Run(fmt.Sprint(name, " ", last), func(t *testing.T) {
				t.Parallel()
				m := startManaged(t)
				m.kill()
				m.manager.Keep(vaultName, rootOf(t, end), last)
				m.Daemon = m.manager.Start(quiet)
				says(t, m.Daemon, " error : ", "passed")
				must(t, m.bystand.Ping())
				m.holds("after two vaults")
				m.end()
			})
		}
	}
}

// rootOf returns the root of a new vault, after this was done to it.
func rootOf(t testing.TB, do func(*vault.Vault)) *os.File {
	t.Helper()
	v, err := vault.New()
	must(t, err)
	root, err := unix.FcntlInt(uintptr(v.Root()), unix.F_DUPFD_CLOEXEC, 0)
	must(t, err)
	do(v)
	return os.NewFile(uintptr(root), "root")
}

// A live upgrade that can't open its vault goes on with a new one, and only that is kept.
func TestUpgradeWithBrokenVault(t *testing.T) {
	t.Parallel()
	m := startManaged(t)
	must(t, m.manager.Use(vaultName, func(root int) error { return vault.At(root).Put([]byte("of a later version")) }))
	c := m.client()
	must(t, c.Acquire("", disk, 0))
	m.Signal(syscall.SIGUSR1)
	says(t, m.Daemon, " error : ", "the vault is made anew")
	says(t, m.Daemon, " error : ", "descriptors that nobody knows of stay open")
	says(t, m.Daemon, "locks from before are stored")
	if n := m.manager.Kept(vaultName); n != 1 {
		t.Errorf("%d vaults are kept", n)
	}
	must(t, c.Release("", disk))
	m.kill()
	m.Daemon = m.manager.Start(quiet)
	must(t, m.bystand.Ping())
	m.holds("after an upgrade")
	if strings.Contains(m.Stderr(), "can't be opened") {
		t.Errorf("the broken vault is kept\n%s", host.Shorten(m.Stderr()))
	}
	c.Close()
	m.Daemon.Stop()
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
