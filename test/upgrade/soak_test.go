// SPDX-License-Identifier: LGPL-2.1-or-later

package upgrade

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"virtlockd/internal/inspect"
	"virtlockd/internal/inspectclient"
	"virtlockd/test/host"
	"virtlockd/test/slowdisk"
	"virtlockd/test/wire"
)

// counts are what must not grow with work done. Cells are not among the descriptors: as many are kept as were needed lately.
type counts struct{ descriptors, cells, threads, privateKiB int }

// cellName is a name that the kernel has given to a socket (unix(7), autobind), as only cells have one.
var cellName = regexp.MustCompile(`^@[0-9a-f]{5}$`)

// cellsOf returns the inodes of all such sockets.
func cellsOf(pid int) (cells map[string]bool, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/unix", pid))
	cells = map[string]bool{}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 8 && cellName.MatchString(f[7]) {
			cells["socket:["+f[6]+"]"] = true
		}
	}
	return cells, err
}

func countsOf(pid int) (c counts, err error) {
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return c, err
	}
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return c, err
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return c, err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && strings.HasPrefix(f[0], "Private_") {
			n, _ := strconv.Atoi(f[1])
			c.privateKiB += n
		}
	}
	cells, err := cellsOf(pid)
	for _, fd := range fds {
		if to, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, fd.Name())); cells[to] {
			c.cells++
		} else {
			c.descriptors++
		}
	}
	c.threads = len(tasks)
	return c, err
}

// Paths of a soak: two disks for worker processes, of which one is made to hang.
const (
	soakDisk  = "/tmp/soak"
	soakStuck = "/tmp/stuck"
)

// soaked is a daemon that is worked with.
type soaked struct {
	*machine
	stuck *slowdisk.Disk
	asks  *inspectclient.Conn // the same all the time: one that has just been closed would be one descriptor more
}

func startSoaked(t *testing.T) *soaked {
	t.Helper()
	m := &soaked{machine: startKept(t)}
	slowdisk.Mount(t, m.Host, soakDisk, slowdisk.Options{})
	m.stuck = slowdisk.Mount(t, m.Host, soakStuck, slowdisk.Options{Locks: true})
	m.stuck.Add("file")
	var err error
	m.asks, err = inspectclient.Dial(t.Context(), m.Path(m.SocketPath("admin")), host.Patience)
	must(t, err)
	t.Cleanup(func() { m.asks.Close() })
	return m
}

// status is what the daemon says of itself.
func (m *soaked) status() *inspect.Status {
	m.t.Helper()
	s, err := m.asks.Status()
	must(m.t, err)
	return s
}

// goroutines is how many the daemon has at rest. Some wait for events only as long as there are many, which the next events show.
func (m *soaked) goroutines() int {
	m.t.Helper()
	least := m.status().Goroutines
	for range 20 {
		host.Settled(m.t, m.process())
		least = min(least, m.status().Goroutines)
	}
	return least
}

// work has clients acquire and release so many pairs, one of ten on the disk for worker processes, and kills guests.
func (m *soaked) work(pairs int) {
	m.pairs(pairs)
	for i := range max(20, pairs/500) {
		m.killHolder(i)
	}
	for i := range max(20, pairs/2000) {
		m.killAsking(i)
	}
}

func (m *soaked) pairs(pairs int) {
	const clients = 8
	var all sync.WaitGroup
	for k := range clients {
		all.Go(func() {
			local, remote := fmt.Sprint(host.Data, "/soak", k), fmt.Sprint(soakDisk, "/soak", k)
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
						m.t.Errorf("connect: %v", err)
						return
					}
				}
				path := local
				if i%10 == k {
					path = remote
				}
				if err := c.Acquire("", path, wire.Autocreate); err != nil {
					m.t.Errorf("pair %d: %v", i, err)
					break
				}
				if err := c.Release("", path); err != nil {
					m.t.Errorf("pair %d: %v", i, err)
					break
				}
			}
			c.Close()
		})
	}
	all.Wait()
}

// killHolder kills a guest that has locks.
func (m *soaked) killHolder(i int) {
	p := m.Spawn(host.ProcessOptions{})
	defer p.Close()
	conn := p.Dial(m.Daemon, "lock")
	must(m.t, conn.Register(wire.VM(p.PID())))
	local, remote := fmt.Sprint(host.Data, "/owner", i), soakDisk+"/owner"
	m.touch(local)
	must(m.t, conn.Acquire("", local, 0))
	must(m.t, conn.Acquire("", remote, wire.Autocreate))
	p.Kill()
	eventually(m.t, "the locks of a guest that was killed are free", func() bool { return m.Free(local, true) && m.Free(remote, true) })
	conn.Close() // we have it, too
	must(m.t, os.Remove(m.Path(local)))
}

// killAsking kills a guest whose request is at a worker: one that waits for the disk, or is about to be done.
func (m *soaked) killAsking(i int) {
	const lease, file = soakStuck + "/lease", soakStuck + "/file"
	kinds := []struct {
		op    slowdisk.Op
		proc  uint32
		path  string
		flags uint32
	}{
		{slowdisk.Open, wire.ProcAcquire, file, 0},
		{slowdisk.Lock, wire.ProcAcquire, file, 0},
		{slowdisk.Create, wire.ProcAcquire, lease, wire.Autocreate},
		{slowdisk.Unlink, wire.ProcRelease, lease, 0},
	}
	kind, hangs := kinds[i%len(kinds)], i/len(kinds)%2 == 0
	p := m.Spawn(host.ProcessOptions{})
	defer p.Close()
	conn := p.Dial(m.Daemon, "lock")
	must(m.t, conn.Register(wire.VM(p.PID())))
	if kind.proc == wire.ProcRelease {
		must(m.t, conn.Acquire("", kind.path, wire.Autocreate))
	}
	if hangs {
		m.stuck.Hang(kind.op)
	}
	must(m.t, conn.Send(wire.Request(kind.proc, 99, wire.ResourceArgs("", kind.path, kind.flags))))
	if hangs {
		m.stuck.AwaitHang(kind.op)
	} else {
		time.Sleep(time.Duration(i%50) * 20 * time.Microsecond)
	}
	p.Kill()
	conn.Close()
	m.stuck.Resume(kind.op)
	eventually(m.t, fmt.Sprintf("nothing is left of a guest that was killed within %s", kind.op), func() bool {
		return !m.stuck.Has("lease") && !m.stuck.Locked("file")
	})
}

// rest is what there is when there is nothing to do.
type rest struct {
	goroutines int // of the daemon
	heapKiB    int // what is alive of the daemon's
	daemon     counts
	keeper     counts
	workers    int
	largest    counts // of the workers, each by itself
}

// atRest waits until no worker is busy, and none is a zombie. The descriptors of the daemon are without those that it has for its workers,
// one for each.
func (m *soaked) atRest() (r rest) {
	m.t.Helper()
	eventually(m.t, "no worker is busy or a zombie, and none comes or goes", func() bool {
		workers := m.children()
		r = rest{workers: len(workers), goroutines: m.goroutines()}
		for _, pid := range workers {
			c, err := countsOf(pid)
			if err != nil || host.InState(pid, 'Z') {
				return false
			}
			r.largest.descriptors = max(r.largest.descriptors, c.descriptors)
			r.largest.threads = max(r.largest.threads, c.threads)
			r.largest.privateKiB = max(r.largest.privateKiB, c.privateKiB)
		}
		var err error
		r.daemon, err = countsOf(m.process())
		must(m.t, err)
		r.keeper, err = countsOf(m.PID())
		must(m.t, err)
		r.daemon.descriptors -= len(workers)
		s := m.status()
		r.heapKiB = int(s.HeapLive >> 10)
		return s.Workers.Busy == 0 && s.Workers.All == len(workers) && slices.Equal(workers, m.children())
	})
	return r
}

// like tells whether nothing has come since before. So many free cells the vault keeps, and gives up the others after some seconds, and so
// many workers the daemon. A thread may be made late, when all others are in the kernel, and the heap is as large as it happens to be; a
// descriptor or goroutine may not, but in a worker, whose run-time opens two files when it needs its first timer.
func (r rest) like(before rest) bool {
	const cells, threads, workers = 64, 4, 8
	within := func(now, before counts) bool {
		return now.cells <= cells && now.threads <= before.threads+threads && now.privateKiB <= before.privateKiB*5/4+1024
	}
	return r.goroutines == before.goroutines &&
		r.daemon.descriptors == before.daemon.descriptors && within(r.daemon, before.daemon) &&
		r.keeper.descriptors == before.keeper.descriptors && within(r.keeper, before.keeper) &&
		r.workers <= workers && r.largest.descriptors <= max(before.largest.descriptors, workerFiles) && within(r.largest, before.largest)
}

// memory is how much the daemon and its keeper have, in KiB. What is alive tells of a leak that the free room in the heap would hide.
func (r rest) memory() map[string]int {
	return map[string]int{
		"daemon's live heap": r.heapKiB, "daemon's private memory": r.daemon.privateKiB, "keeper's private memory": r.keeper.privateKiB,
	}
}

// growth compares the second half of what was measured after equal pieces of work with the first one: by how much it is more on average, and
// how much of that may be chance, as one differs from the next.
func growth(kib []int) (by, chance int) {
	const buffers = 256 // such as there is one more of when more clients than ever are served at a time
	half := len(kib) / 2
	for i, n := range kib {
		if i < half {
			by -= n
		} else {
			by += n
		}
		if i > 0 {
			chance += max(n-kib[i-1], kib[i-1]-n)
		}
	}
	return by / half, max(buffers, 2*chance/(len(kib)-1))
}

func TestGrowth(t *testing.T) {
	t.Parallel()
	// Of a daemon, 12,500 pairs from one to the next.
	rests := []int{6992, 6804, 7028, 7156, 7032, 7076, 7284, 7332, 7048, 7252, 7000, 7624, 7300, 7340, 7156, 7016}
	for leak := range 201 {
		kib := slices.Clone(rests)
		for i := range kib {
			kib[i] += leak * i
		}
		by, chance := growth(kib)
		if leak == 0 && by > chance || leak >= 50 && by <= chance {
			t.Errorf("with %d KiB more each time: grows by %d, of which %d may be chance", leak, by, chance)
		}
	}
	if by, chance := growth(make([]int, 16)); by != 0 || chance > 256 {
		t.Errorf("of nothing: grows by %d, of which %d may be chance", by, chance)
	}
}

// workerFiles is how many descriptors a worker has, with the two of its run-time.
const workerFiles = 6

// Work leaves nothing behind: pairs, connections that come and go, owners that are killed with their locks or within a request, on local
// disks and on one for worker processes, crash safety on. SOAK is the number of pairs: of a million a byte shows that each leaves behind.
func TestSoak(t *testing.T) {
	const usual = 20_000
	pairs := host.Number(t, "SOAK", usual)
	m := startSoaked(t)
	m.work(usual) // what is made once is made, threads above all: as many as ever waited in the kernel at a time
	before := m.atRest()
	begin := time.Now()
	pieces := 1
	if pairs > usual {
		pieces = 16
	}
	memory := map[string][]int{} // in KiB, after each
	for range pieces {
		m.work(pairs / pieces)
		for of, kib := range m.atRest().memory() {
			memory[of] = append(memory[of], kib)
		}
	}
	t.Logf("%d pairs took %v", pairs, time.Since(begin).Round(time.Second))
	var now rest
	same := host.Eventually(func() bool { now = m.atRest(); return now.like(before) })
	t.Logf("before: %+v", before)
	t.Logf("now:    %+v", now)
	if !same {
		t.Error("something is left")
	}
	if pairs > usual {
		for of, kib := range memory {
			by, chance := growth(kib)
			t.Logf("KiB of the %s: %v; grows by %d, of which %d may be chance", of, kib, by, chance)
			if by > chance {
				t.Errorf("the %s grows", of)
			}
		}
		const idleFor = 30 * time.Second // the daemon's patience with them
		if !host.Within(idleFor+host.Patience, func() bool { now = m.atRest(); return now.workers == 0 && now.like(before) }) {
			t.Error("workers stay although there is no work for them, or leave something")
		}
		t.Logf("idle:   %+v", now)
	}
	for dir, want := range map[string]int{host.Data: 0, soakDisk: 0, soakStuck: 1} {
		left, err := os.ReadDir(m.Path(dir))
		must(t, err)
		if len(left) != want {
			t.Errorf("in %s are left: %q", dir, left)
		}
	}
	if code := m.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
