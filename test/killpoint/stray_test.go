// SPDX-License-Identifier: LGPL-2.1-or-later

package killpoint

import (
	"errors"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/internal/rpc"
	"virtlockd/internal/state"
	"virtlockd/internal/vault"
	"virtlockd/test/host"
	"virtlockd/test/slowdisk"
	"virtlockd/test/wire"
)

// A disk answers between the instant up to which a live upgrade waits for it and exec: the lock is stored, and whoever asked for it has
// lost its connection. The new binary undoes it, and so does the next process if that is killed when it has closed the connection.
func TestStoredWhileFrozen(t *testing.T) {
	t.Parallel()
	for place, p := range map[string]string{"on a local disk": local.lease, "on a disk for worker processes": remote.lease} {
		for what, dies := range map[string]bool{"": false, ", and a kill": true} {
			t.Run(place+what, func(t *testing.T) {
				t.Parallel()
				m := startManaged(t)
				d := slowdisk.Mount(t, m.Host, "/tmp/slow", slowdisk.Options{})
				d.Add("x")
				if p == local.lease {
					m.WriteFile(p, "", 0o644)
				} else {
					d.Add("lease")
				}
				fd := m.lockFD(p)
				c := m.client()
				d.Hang(slowdisk.Open)
				must(t, c.Send(wire.Request(wire.ProcAcquire, 1, resource("/tmp/slow/x", 0))))
				d.AwaitHang(slowdisk.Open)
				host.Settled(t, m.PID())
				must(t, m.manager.Use(vaultName, func(root int) error { return storeFor(root, p, fd) }))
				unix.Close(fd) // without F_UNLCK: the copy has it
				if dies {
					trace, err := Attach(m.PID())
					must(t, err)
					trace.KillAfter(unix.SYS_SHUTDOWN)
					m.Signal(syscall.SIGUSR1)
					must(t, trace.Finish(func() bool { return false }))
					m.Wait()
					m.Daemon = m.manager.Start(quiet)
				} else {
					m.upgrade()
				}
				d.Resume(slowdisk.Open)
				if _, err := c.Recv(); !errors.Is(err, wire.ErrClosed) {
					t.Errorf("who asked for the lock: %v, want an end", err)
				}
				if !host.Eventually(func() bool { return m.Free(p, true) && !m.Exists(p) }) {
					t.Errorf("it is held for nobody, or the lease file is left\n%s", tool(t, m.Host, nil, nil, "list"))
				}
				if strings.Contains(m.Stderr(), "belongs to nobody") {
					t.Errorf("a stray:\n%s", host.Shorten(m.Stderr()))
				}
				m.kill()
				m.goesOn("after all that")
			})
		}
	}
}

// storeFor puts the hold of a lease file into a cell of the vault, as acquired by the request that hangs.
func storeFor(root int, path string, fd int) error {
	origin, err := hanging(root)
	if err != nil {
		return err
	}
	cells, err := freeCells(root, 1)
	if err != nil {
		return err
	}
	defer unix.Close(cells[0])
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	h := vault.Hold{
		Origin: origin, Since: 1, Name: path, Flags: wire.Autocreate,
		Owner: state.Owner{Details: state.Details{Name: "somebody", PID: noOne + 7}, Kind: state.Unverified, PIDFD: state.NoFD},
	}
	record := h.Record(nil)
	vault.SetFile(record, state.File{Dev: st.Dev, Ino: st.Ino, Exclusive: true, Remote: path == remote.lease})
	return vault.At(cells[0]).Put(record, fd)
}

// open opens the vault besides the daemon.
func open(root int) (*vault.Vault, error) {
	own, err := unix.FcntlInt(uintptr(root), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	v, err := vault.Open(own)
	if err != nil {
		unix.Close(own)
	}
	return v, err
}

// hanging returns the only request that is being executed.
func hanging(root int) (vault.Origin, error) {
	v, err := open(root)
	if err != nil {
		return vault.Origin{}, err
	}
	defer v.Close()
	found, err := v.Contents()
	for i := range found {
		if f := &found[i]; f.Client != nil {
			if p := rpc.ProgressOf(f.Cell.Word().Load()); !p.Idle {
				return vault.Origin{Client: f.Client.State.ID, Request: p.Request}, nil
			}
		}
	}
	return vault.Origin{}, errors.Join(errors.New("no request hangs"), err)
}

// A hold is being stored once more, and lies in a cell that the snapshot does not
// name: the one that it names counts.
func TestStoredOnceMoreWhileFrozen(t *testing.T) {
	t.Parallel()
	m := startManaged(t)
	host.Settled(t, m.PID())
	must(t, m.manager.Use(vaultName, copyHold))
	m.upgrade()
	if strings.Contains(m.Stderr(), "belongs to nobody") {
		t.Errorf("a stray:\n%s", host.Shorten(m.Stderr()))
	}
	m.holds("after a live upgrade")
	m.kill()
	m.Daemon = m.manager.Start(quiet)
	if n := strings.Count(tool(t, m.Host, nil, nil, "list"), m.shared); n != 1 {
		t.Errorf("%d owners of %s, want 1", n, m.shared)
	}
	must(t, m.bystand.Ping())
	m.holds("after all that")
	m.end()
}

// copyHold puts the hold of the shared lock into a second cell.
func copyHold(root int) error {
	v, err := open(root)
	if err != nil {
		return err
	}
	defer v.Close()
	cells, err := freeCells(root, 1)
	if err != nil {
		return err
	}
	defer unix.Close(cells[0])
	found, err := v.Contents()
	if err != nil {
		return err
	}
	for i := range found {
		h := found[i].Hold
		if h == nil || h.Name != local.shared {
			continue
		}
		fds, err := found[i].Descriptors()
		if err != nil {
			return err
		}
		h.Origin = vault.Origin{}
		record := h.Record(nil)
		vault.SetFile(record, h.File)
		err = vault.At(cells[0]).Put(record, fds...)
		for _, fd := range fds {
			unix.Close(fd)
		}
		return err
	}
	return errors.New("there is no such hold")
}
