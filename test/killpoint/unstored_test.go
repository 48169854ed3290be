// SPDX-License-Identifier: LGPL-2.1-or-later

package killpoint

import (
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/slowdisk"
	"virtlockd/test/wire"
)

// sharedPath is on a disk for worker processes.
const sharedPath = "/tmp/shared/x"

// full is a daemon with a vault that has no room left for the first holder of sharedPath, who shares it.
type full struct {
	*managed
	first, filler *wire.Conn
	others        []*wire.Conn // connected, and stored, while there was room
	n             int          // how many locks of the filler take the room
}

func startFull(t *testing.T, others int) *full {
	t.Helper()
	m := &full{managed: startManaged(t)}
	slowdisk.Mount(t, m.Host, "/tmp/shared", slowdisk.Options{}).Add("x")
	must(t, m.manager.Use(vaultName, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 1) }))
	m.first, m.filler = m.Client(noOne+1), m.client()
	for i := range others {
		m.others = append(m.others, m.Client(noOne+2+i))
	}
	unsafe := func() string { return tool(t, m.Host, nil, nil, "list", "--unsafe") }
	for ; !strings.Contains(unsafe(), "/fill"); m.n++ {
		must(t, m.filler.Acquire("", fillPath(m.n), wire.Autocreate))
	}
	must(t, m.first.Acquire("", sharedPath, wire.Shared))
	if !strings.Contains(unsafe(), sharedPath) {
		t.Fatalf("there is room:\n%s", unsafe())
	}
	return m
}

func fillPath(i int) string { return fmt.Sprint(host.Data, "/fill", i) }

// empty makes the room of some of the filler's locks free.
func (m *full) empty(from, to int) {
	m.t.Helper()
	for i := from; i < to; i++ {
		must(m.t, m.filler.Release("", fillPath(i)))
	}
}

// A lock on a disk for worker processes is shared by one whose hold could not be stored, for lack of room, and by others, who give
// theirs up: then no crash brings these back, and no cell is left.
func TestUnstoredHolder(t *testing.T) {
	t.Parallel()
	const path = sharedPath
	for name, tt := range map[string]struct {
		others int  // who share it, and are stored
		crash  bool // before the last but one of them, and the one who is not stored, give it up
	}{
		"one other": {1, false}, "one other, and a crash": {1, true}, "two others": {2, false}, "two others, and a crash": {2, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := startFull(t, tt.others)
			others := m.others
			m.empty(0, m.n)
			for _, c := range others {
				must(t, c.Acquire("", path, wire.Shared))
			}
			must(t, others[0].Release("", path))
			if tt.crash {
				m.kill()
				m.Daemon = m.manager.Start(quiet)
				must(t, m.bystand.Ping())
			} else {
				must(t, m.first.Release("", path))
			}
			for _, c := range others[1:] {
				if m.Free(path, true) {
					t.Error("the lock is lost")
				}
				must(t, c.Release("", path))
			}
			if !host.Eventually(func() bool { return m.Free(path, true) }) {
				t.Errorf("the lock is held for nobody\n%s", tool(t, m.Host, nil, nil, "list"))
			}
			m.kill()
			m.Daemon = m.manager.Start(quiet)
			must(t, m.bystand.Ping())
			if !m.Free(path, true) {
				t.Error("the lock is held again")
			}
			m.holds("after all that")
			m.end()
		})
	}
}

// One who shares a lock could not be stored, and the one in whose cell the file lies gives it up: after a live upgrade nothing of him is
// left over, and after a crash nobody else is let in for his sake.
func TestUnstoredHolderUpgraded(t *testing.T) {
	t.Parallel()
	const path = sharedPath
	for name, room := range map[string]bool{"room": true, "no room": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := startFull(t, 1)
			other := m.others[0]
			released := 1 // for the other
			if room {
				released = m.n
			}
			m.empty(0, released)
			must(t, other.Acquire("", path, wire.Shared))
			must(t, other.Release("", path))
			m.upgrade()
			if strings.Contains(m.Stderr(), "belongs to nobody") {
				t.Errorf("a stray:\n%s", host.Shorten(m.Stderr()))
			}
			if m.Free(path, true) {
				t.Error("the lock is lost")
			}
			must(t, m.first.Release("", path))
			if !host.Eventually(func() bool { return m.Free(path, true) }) {
				t.Errorf("the lock is held for nobody\n%s", tool(t, m.Host, nil, nil, "list"))
			}
			m.empty(released, m.n)
			must(t, other.Acquire("", path, 0))
			m.kill()
			m.Daemon = m.manager.Start(quiet)
			must(t, m.bystand.Ping())
			if m.Client(noOne+3).Acquire("", path, wire.Shared) == nil {
				t.Error("an exclusive lock is shared after a crash")
			}
			if m.Free(path, true) {
				t.Error("the exclusive lock is lost")
			}
			must(t, m.Client(noOne+2).Release("", path))
			if !host.Eventually(func() bool { return m.Free(path, true) }) {
				t.Errorf("the lock is held for nobody\n%s", tool(t, m.Host, nil, nil, "list"))
			}
			m.holds("after all that")
			m.Stop()
		})
	}
}
