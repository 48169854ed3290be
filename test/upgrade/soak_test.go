// SPDX-License-Identifier: LGPL-2.1-or-later

package upgrade

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// counts are what must not grow with work done.
type counts struct{ descriptors, threads, privateKiB int }

func countsOf(t testing.TB, pid int) (c counts) {
	t.Helper()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	must(t, err)
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	must(t, err)
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	must(t, err)
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && strings.HasPrefix(f[0], "Private_") {
			n, _ := strconv.Atoi(f[1])
			c.privateKiB += n
		}
	}
	c.descriptors, c.threads = len(fds), len(tasks)
	return c
}

// Work leaves nothing behind: pairs, connections that come and go, owners that are killed with their locks, crash safety on. SOAK is the number
// of pairs.
func TestSoak(t *testing.T) {
	pairs := host.Number(t, "SOAK", 20_000)
	m := startKept(t)
	const clients = 8
	run := func(pairs int) {
		var all sync.WaitGroup
		for k := range clients {
			all.Go(func() {
				path := fmt.Sprint(host.Data, "/soak", k)
				var c *wire.Conn
				for i := range pairs / clients {
					if i%50 == 0 { // a connection of libvirtd's does not live long
						if c != nil {
							c.Close()
						}
						var err error
						if c, err = m.TryDial("lock"); err == nil {
							err = c.Register(wire.VM(noOne + k))
						}
						if err != nil {
							t.Errorf("connect: %v", err)
							return
						}
					}
					if err := c.Acquire("", path, wire.Autocreate); err != nil {
						t.Errorf("pair %d: %v", i, err)
						break
					}
					if err := c.Release("", path); err != nil {
						t.Errorf("pair %d: %v", i, err)
						break
					}
				}
				c.Close()
			})
		}
		all.Wait()
		for i := range 20 {
			p := m.Spawn(host.ProcessOptions{})
			conn := p.Dial(m.Daemon, "lock")
			must(t, conn.Register(wire.VM(p.PID())))
			path := fmt.Sprint(host.Data, "/owner", i)
			m.touch(path)
			must(t, conn.Acquire("", path, 0))
			p.Kill()
			eventually(t, "the lock of a guest that was killed is free", func() bool { return m.Free(path, true) })
			conn.Close() // we have it, too
		}
	}
	run(20_000) // what is made once is made, threads above all: as many as ever waited in the kernel at a time
	daemon, keeper := m.Kept(), m.PID()
	before, keeperBefore := countsOf(t, daemon), countsOf(t, keeper)
	run(pairs)
	// So many free cells the vault keeps, and gives up the others after some seconds.
	const cells = 64
	within := func(now, before counts) bool {
		return now.descriptors <= before.descriptors+cells && now.threads <= before.threads+4 && now.privateKiB <= before.privateKiB*5/4+1024
	}
	var now counts
	if !host.Eventually(func() bool { now = countsOf(t, daemon); return within(now, before) }) {
		t.Errorf("the daemon has %+v, had %+v", now, before)
	}
	if now := countsOf(t, keeper); !within(now, keeperBefore) {
		t.Errorf("the keeper has %+v, had %+v", now, keeperBefore)
	}
	t.Logf("%d pairs: %+v, before %+v", pairs, now, before)
	if left, _ := filepath.Glob(m.Path(host.Data) + "/soak*"); len(left) > 0 {
		t.Errorf("leases are left: %q", left)
	}
	if code := m.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
