// SPDX-License-Identifier: LGPL-2.1-or-later

package killpoint

import (
	"fmt"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/internal/state"
	"virtlockd/internal/vault"
	"virtlockd/test/host"
)

// program is what the daemon runs as, a link that can be turned.
const program = "/tmp/bin/virtlockd"

// turnable is how a daemon is started that runs as program.
func (m *managed) turnable() host.Options {
	m.Link(host.Ours(m.t), program)
	o := quiet
	o.Env = append(o.Env, "PROGRAM="+program)
	return o
}

// upgrade has the daemon replaced by ours.
func (m *managed) upgrade() {
	m.t.Helper()
	taken := func() int { return strings.Count(m.Stderr(), "live upgrade: this binary has taken over") }
	before := taken()
	m.Signal(syscall.SIGUSR1)
	if !host.Eventually(func() bool { return taken() > before }) {
		m.t.Fatalf("no upgrade\n%s", host.Shorten(m.Stderr()))
	}
}

// refusesC asks the daemon to let the C daemon take over, which it must not do.
func (m *managed) refusesC(reason string) {
	m.t.Helper()
	const c = "/tmp/bin/c-virtlockd" // as far as it is asked
	m.WriteFile(c, "#!/bin/sh\necho 'virtlockd (libvirt) 9.0.0'\n", 0o755)
	m.Link(c, program)
	said := func() int { return strings.Count(m.Stderr(), "SIGUSR1: no live upgrade") }
	before := said()
	m.Signal(syscall.SIGUSR1)
	if !host.Eventually(func() bool { return said() > before || !m.Alive() }) || !m.Alive() {
		m.t.Fatalf("the C daemon has taken over\n%s", host.Shorten(m.Stderr()))
	}
	says(m.t, m.Daemon, "SIGUSR1: no live upgrade", reason)
	must(m.t, m.bystand.Ping())
	m.Link(host.Ours(m.t), program)
}

// Beside the vault that is used another one is kept, or one that can't be opened. What it keeps locked stays so, and is not given up
// by a hand-over to the C daemon, also after live upgrades, of which the last one can't go on with the vault that was used.
func TestAnotherVault(t *testing.T) {
	t.Parallel()
	const elsewhere = host.Data + "/elsewhere"
	for name, spoil := range map[string]func(*vault.Vault) error{
		"older":            func(*vault.Vault) error { return nil },
		"not to be opened": func(v *vault.Vault) error { return vault.At(v.Root()).Put([]byte("of a later version")) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newManaged(t)
			m.Daemon = m.manager.Start(m.turnable())
			m.populate(local)
			m.kill()
			m.manager.Keep(vaultName, rootOf(t, func(v *vault.Vault) {
				fd := m.lockedFD(elsewhere)
				defer unix.Close(fd)
				_, err := v.Store(strayHold(elsewhere), fd)
				must(t, err)
				must(t, spoil(v))
				v.Close()
			}), false)
			m.waiters = append(m.waiters, host.Wait(t, m.Path(elsewhere)))
			m.Daemon = m.manager.Start(m.turnable())
			m.refusesC("there is another vault")
			m.upgrade()
			m.refusesC("there is another vault")
			m.breakVault()
			m.upgrade()
			says(t, m.Daemon, " error : ", "the vault is made anew")
			says(t, m.Daemon, "locks from before are stored")
			m.refusesC("there is another vault")
			m.holds("after all that")
			m.Stop()
		})
	}
}

// breakVault makes the vault that the daemon uses one that the next binary can't open. The last one that is kept is that.
func (m *managed) breakVault() {
	m.t.Helper()
	var roots []int
	for _, f := range m.manager.Options(host.Options{}).Files {
		roots = append(roots, int(f.Fd()))
	}
	must(m.t, vault.At(roots[len(roots)-1]).Put([]byte("of a later version")))
}

// strayHold is the record of a hold whose file is not the one that lies beside it.
func strayHold(path string) []byte {
	h := vault.Hold{
		Since: 1, Name: path,
		Owner: state.Owner{Details: state.Details{Name: "somebody", PID: noOne + 7}, Kind: state.Unverified, PIDFD: state.NoFD},
	}
	record := h.Record(nil)
	vault.SetFile(record, state.File{Dev: 1, Ino: 1, Exclusive: true})
	return record
}

// A lock that could not be taken over, and so is kept by the vault alone, is not given up by a hand-over to the C daemon.
func TestOrphans(t *testing.T) {
	t.Parallel()
	const path = host.Data + "/orphan"
	for name, next := range map[string]func(*managed){
		"by a live upgrade": (*managed).upgrade,
		"by a recovery": func(m *managed) {
			m.kill()
			m.Daemon = m.manager.Start(m.turnable())
			says(m.t, m.Daemon, " error : ", "a lock is not kept", path)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newManaged(t)
			m.Daemon = m.manager.Start(m.turnable())
			m.populate(local)
			host.Settled(t, m.PID())
			must(t, m.manager.Use(vaultName, func(root int) error {
				cells, err := freeCells(root, 1)
				if err != nil {
					return err
				}
				defer unix.Close(cells[0])
				fd := m.lockedFD(path)
				defer unix.Close(fd) // without F_UNLCK: the copy has it
				return vault.At(cells[0]).Put(strayHold(path), fd)
			}))
			m.waiters = append(m.waiters, host.Wait(t, m.Path(path)))
			next(m)
			const reason = "1 locks in the vault could not be taken over"
			m.refusesC(reason)
			m.upgrade()
			m.refusesC(reason)
			m.holds(fmt.Sprint("kept ", name))
			m.Stop()
		})
	}
}
