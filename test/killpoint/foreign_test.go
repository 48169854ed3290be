// SPDX-License-Identifier: LGPL-2.1-or-later

package killpoint

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/internal/vault"
	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// foreign is a record as the next version of this program, or a fault, may leave it: version, kind, and whether its checksum is right.
func foreign(version uint16, kind byte, right bool) []byte {
	b := binary.BigEndian.AppendUint32(nil, 0x764C636B)
	b = binary.BigEndian.AppendUint16(b, version)
	b = append(b, kind, 1, 0, 0, 0, 0) // one descriptor; no checksum yet
	b = append(b, "what only its writer understands"...)
	sum := crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli))
	if !right {
		sum++
	}
	binary.BigEndian.PutUint32(b[8:], sum)
	return b
}

// freeCells returns copies of that many cells of the vault in which nothing lies. The daemon takes others first.
func freeCells(root, n int) (free []int, err error) {
	peekFrom := func(at int) error { return unix.SetsockoptInt(root, unix.SOL_SOCKET, unix.SO_PEEK_OFF, at) }
	if err := peekFrom(0); err != nil { // each look moves it on
		return nil, err
	}
	defer peekFrom(-1) // as it was
	for data, oob := make([]byte, vault.MaxRecord), make([]byte, unix.CmsgSpace(4*vault.MaxFDs)); ; {
		_, size, _, _, err := unix.Recvmsg(root, data, oob, unix.MSG_PEEK|unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
		if err == unix.EAGAIN {
			break
		}
		if err != nil {
			return nil, err
		}
		for _, fd := range vault.Passed(oob[:size]) {
			// The memory file, which is no socket, is among them.
			if _, _, err := unix.Recvfrom(fd, make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT); err == unix.EAGAIN {
				free = append(free, fd)
			} else {
				unix.Close(fd)
			}
		}
	}
	for len(free) > n {
		unix.Close(free[0])
		free = free[1:]
	}
	if len(free) < n {
		return nil, fmt.Errorf("%d cells are free, want %d", len(free), n)
	}
	return free, nil
}

// lockedFD makes a file and locks it. Whoever has a copy of the descriptor has the lock.
func (m *managed) lockedFD(path string) (fd int) {
	m.t.Helper()
	m.WriteFile(path, "", 0o644)
	return m.lockFD(path)
}

// lockFD is lockedFD for a file that is there.
func (m *managed) lockFD(path string) (fd int) {
	m.t.Helper()
	m.Must(func() (err error) {
		if fd, err = unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Len: 1})
	})
	return fd
}

// A record that a daemon does not understand keeps its file locked through whatever comes, however much the daemon needs room, and
// everybody else is served.
func TestForeignRecords(t *testing.T) {
	t.Parallel()
	m := startManaged(t)
	records := map[string][]byte{
		host.Data + "/later":   foreign(2, byte(vault.KindHold), true),
		host.Data + "/kind":    foreign(1, 200, true),
		host.Data + "/damaged": foreign(1, byte(vault.KindHold), false),
	}
	host.Settled(t, m.PID())
	must(t, m.manager.Use(vaultName, func(root int) error {
		cells, err := freeCells(root, len(records))
		if err != nil {
			return err
		}
		for path, record := range records {
			fd := m.lockedFD(path)
			if err := vault.At(cells[0]).Put(record, fd); err != nil {
				return err
			}
			unix.Close(fd) // without F_UNLCK: the copy has it
			unix.Close(cells[0])
			cells = cells[1:]
			m.waiters = append(m.waiters, host.Wait(t, m.Path(path)))
		}
		return nil
	}))
	const notUnderstood = "something in the vault is not understood"
	log := ""
	told := func(when string) {
		t.Helper()
		now := func() string { return strings.TrimPrefix(m.Stderr(), log) }
		if !host.Eventually(func() bool { return strings.Count(now(), notUnderstood) == len(records) }) {
			t.Errorf("%s: the log says %d times that %s, want %d\n%s", when, strings.Count(now(), notUnderstood), notUnderstood, len(records), host.Shorten(m.Stderr()))
		}
		log = m.Stderr()
		must(t, m.bystand.Ping())
		m.holds(when)
	}
	restart := func(when string) {
		t.Helper()
		m.kill()
		m.Daemon = m.manager.Start(quiet)
		log = ""
		told(when)
	}
	restart("after a kill")
	// More than what there are free cells for: theirs are given to nobody.
	c := m.client()
	const many = 200
	for i := range many {
		must(t, c.Acquire("", fmt.Sprint(host.Data, "/many", i), wire.Autocreate))
	}
	m.Signal(syscall.SIGUSR1)
	says(t, m.Daemon, "this binary has taken over")
	told("after a live upgrade")
	restart("after that and a kill")
	for i := range many {
		must(t, c.Release("", fmt.Sprint(host.Data, "/many", i)))
	}
	restart("after another kill")
	for path := range records {
		if err := c.Acquire("", path, 0); !wire.IsLocked(err) {
			t.Errorf("ACQUIRE of %s, which somebody unknown has locked: %v", path, err)
		}
	}
	must(t, c.Acquire("", m.disk, 0))
	must(t, c.Release("", m.disk))
	m.mustLive()
	c.Close()
	m.Stop()
}
