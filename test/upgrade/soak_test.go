// SPDX-License-Identifier: LGPL-2.1-or-later

package upgrade

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// counts are what must not grow with work done. Cells are not among the descriptors: as many are kept as were needed lately.
type counts struct{ descriptors, cells, threads, privateKiB int }

// cellName is a name that the kernel has given to a socket (unix(7), autobind), as only cells have one.
var cellName = regexp.MustCompile(`^@[0-9a-f]{5}$`)

// cellsOf returns the inodes of all such sockets.
func cellsOf(t testing.TB, pid int) map[string]bool {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/unix", pid))
	must(t, err)
	cells := map[string]bool{}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 8 && cellName.MatchString(f[7]) {
			cells["socket:["+f[6]+"]"] = true
		}
	}
	return cells
}

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
	cells := cellsOf(t, pid)
	for _, fd := range fds {
		if to, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, fd.Name())); cells[to] {
			c.cells++
		} else {
			c.descriptors++
		}
	}
	c.threads = len(tasks)
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
		for i := range max(20, pairs/500) {
			p := m.Spawn(host.ProcessOptions{})
			conn := p.Dial(m.Daemon, "lock")
			must(t, conn.Register(wire.VM(p.PID())))
			path := fmt.Sprint(host.Data, "/owner", i)
			m.touch(path)
			must(t, conn.Acquire("", path, 0))
			p.Kill()
			eventually(t, "the lock of a guest that was killed is free", func() bool { return m.Free(path, true) })
			conn.Close() // we have it, too
			p.Close()
			must(t, os.Remove(m.Path(path)))
		}
	}
	run(20_000) // what is made once is made, threads above all: as many as ever waited in the kernel at a time
	daemon, keeper := m.Kept(), m.PID()
	host.Settled(t, daemon)
	before, keeperBefore := countsOf(t, daemon), countsOf(t, keeper)
	run(pairs)
	// So many free cells the vault keeps, and gives up the others after some seconds. A thread may be made late, when all others are in the
	// kernel, and the heap is as large as it happens to be; a descriptor may not.
	const cells, threads = 64, 4
	within := func(now, before counts) bool {
		return now.descriptors == before.descriptors && now.cells <= cells && now.threads <= before.threads+threads &&
			now.privateKiB <= before.privateKiB*5/4+1024
	}
	for _, p := range []struct {
		name   string
		pid    int
		before counts
	}{{"daemon", daemon, before}, {"keeper", keeper, keeperBefore}} {
		var now counts
		if !host.Eventually(func() bool { now = countsOf(t, p.pid); return within(now, p.before) }) {
			t.Errorf("the %s has %+v, had %+v", p.name, now, p.before)
		}
		t.Logf("%d pairs: the %s has %+v, had %+v", pairs, p.name, now, p.before)
	}
	if left, _ := filepath.Glob(m.Path(host.Data) + "/soak*"); len(left) > 0 {
		t.Errorf("leases are left: %q", left)
	}
	if code := m.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
