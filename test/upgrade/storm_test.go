// SPDX-License-Identifier: LGPL-2.1-or-later

package upgrade

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"virtlockd/test/checker"
	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// held are locks that somebody has for the whole time.
type held struct {
	conn  *wire.Conn
	paths []string
}

// hold takes locks of all kinds, for an owner that does not exist.
func (m *machine) hold() held {
	m.t.Helper()
	c := m.Client(noOne)
	h := held{conn: c}
	for i, flags := range []uint32{0, wire.Shared, wire.Autocreate, 0, 0, wire.Shared | wire.Autocreate} {
		path := fmt.Sprint(host.Data, "/held", i)
		if flags&wire.Autocreate == 0 {
			m.touch(path)
		}
		must(m.t, c.Acquire("", path, flags))
		h.paths = append(h.paths, path)
	}
	must(m.t, c.CreateLockspace(host.Data+"/space"))
	must(m.t, c.Acquire(host.Data+"/space", "lease", wire.Autocreate))
	h.paths = append(h.paths, host.Data+"/space/lease")
	return h
}

// check looks from inside and outside whether all is as it was.
func (h *held) check(m *machine) {
	m.t.Helper()
	other := m.Client(noOneElse)
	defer other.Close()
	for _, path := range h.paths {
		space, name := "", path
		if strings.HasPrefix(path, host.Data+"/space/") {
			space, name = filepath.Dir(path), filepath.Base(path)
		}
		refused(m.t, path, other.Acquire(space, name, wire.Autocreate))
		if m.Free(path, true) {
			m.t.Errorf("%s is free in the kernel", path)
		}
	}
}

// release gives everything up, and all has to be free then.
func (h *held) release(m *machine) {
	m.t.Helper()
	for _, path := range h.paths {
		if space, ok := strings.CutSuffix(path, "/space/lease"); ok {
			must(m.t, h.conn.Release(space+"/space", "lease"))
		} else {
			must(m.t, h.conn.Release("", path))
		}
		if !m.Free(path, true) {
			m.t.Errorf("%s is released and locked in the kernel", path)
		}
	}
}

// load is a number of clients that never rest. Each checks that each of its requests gets one answer, its own.
type load struct {
	m        *machine
	ctx      context.Context
	stop     context.CancelFunc
	clients  sync.WaitGroup
	requests atomic.Int64
	longest  atomic.Int64 // ns that an answer took
}

// client runs work again and again on a connection.
func (l *load) client(name string, work func(c *wire.Conn, i int) error) {
	l.m.t.Helper()
	c := l.m.Dial("lock")
	l.clients.Go(func() {
		for i := 0; l.ctx.Err() == nil; i++ {
			if err := work(c, i); err != nil {
				l.m.t.Errorf("%s, round %d: %v", name, i, err)
				return
			}
		}
		// Nothing is left over.
		if err := c.Ping(); err != nil {
			l.m.t.Errorf("%s at the end: %v", name, err)
		}
		c.Close()
	})
}

// once notes one request.
func (l *load) once(call func() error) error {
	start := time.Now()
	err := call()
	l.requests.Add(1)
	took := time.Since(start).Nanoseconds()
	for {
		longest := l.longest.Load()
		if took <= longest || l.longest.CompareAndSwap(longest, took) {
			return err
		}
	}
}

func registered(c *wire.Conn, i, number int) error {
	if i > 0 {
		return nil
	}
	return c.Register(wire.VM(noOne + 100 + number))
}

// pair acquires and releases.
func (l *load) pair(c *wire.Conn, path string) error {
	return errors.Join(
		l.once(func() error { return c.Acquire("", path, wire.Autocreate) }),
		l.once(func() error { return c.Release("", path) }))
}

// drip sends a request in pieces with pauses, byte by byte in the end.
func (l *load) drip(c *wire.Conn, serial uint32, path string) error {
	frame := wire.Request(wire.ProcAcquire, serial, wire.ResourceArgs("", path, wire.Autocreate))
	frame = append(frame, wire.Request(wire.ProcRelease, serial+1, wire.ResourceArgs("", path, 0))...)
	for len(frame) > 0 {
		n := 1 + rand.IntN(3)
		if len(frame) > 40 {
			n = 1 + rand.IntN(40)
		}
		n = min(n, len(frame))
		if err := c.Send(frame[:n]); err != nil {
			return err
		}
		frame = frame[n:]
		time.Sleep(time.Duration(rand.IntN(1000)) * time.Microsecond)
	}
	return l.answers(c, serial, 2)
}

// answers reads that many replies, in order.
func (l *load) answers(c *wire.Conn, serial uint32, n int) error {
	for i := range n {
		m, err := c.Recv()
		if err != nil {
			return fmt.Errorf("reply %d of %d: %w", i, n, err)
		}
		if m.Serial != serial+uint32(i) || m.Type != wire.TypeReply {
			return fmt.Errorf("reply %d is %s, want serial %d", i, m, serial+uint32(i))
		}
		if err := m.Err(); err != nil {
			return fmt.Errorf("reply %d: %w", i, err)
		}
		l.requests.Add(1)
	}
	return nil
}

// pipeline sends many requests at once.
func (l *load) pipeline(c *wire.Conn, serial uint32, path string) error {
	const pairs = 10
	var frames []byte
	for i := range uint32(pairs) {
		frames = append(frames, wire.Request(wire.ProcAcquire, serial+2*i, wire.ResourceArgs("", path, wire.Autocreate))...)
		frames = append(frames, wire.Request(wire.ProcRelease, serial+2*i+1, wire.ResourceArgs("", path, 0))...)
	}
	if err := c.Send(frames); err != nil {
		return err
	}
	return l.answers(c, serial, 2*pairs)
}

// sluggish sends more than fits into the buffers and does not read the answers for a while.
func (l *load) sluggish(c *wire.Conn, serial uint32) error {
	const requests = 1500
	var frames []byte
	for i := range uint32(requests) {
		frames = append(frames, wire.Request(wire.ProcCreateLockspace, serial+i, wire.LockspaceArgs(host.Data+"/space"))...)
	}
	sent := make(chan error, 1)
	go func() { sent <- c.Send(frames) }()
	time.Sleep(time.Duration(rand.IntN(60)) * time.Millisecond)
	err := l.answers(c, serial, requests)
	return errors.Join(err, <-sent)
}

func (m *machine) newLoad() *load {
	ctx, stop := context.WithCancel(context.Background())
	m.t.Cleanup(stop)
	return &load{m: m, ctx: ctx, stop: stop}
}

// startPairs starts clients that acquire and release.
func (m *machine) startPairs(n int) *load {
	m.t.Helper()
	l := m.newLoad()
	for k := range n {
		l.client(fmt.Sprint("pairs ", k), func(c *wire.Conn, i int) error {
			return errors.Join(registered(c, i, k), l.pair(c, fmt.Sprint(host.Data, "/load", k)))
		})
	}
	return l
}

// startLoad starts 64 clients of all kinds.
func (m *machine) startLoad() *load {
	m.t.Helper()
	l := m.newLoad()
	number := 0
	many := func(n int, name string, work func(c *wire.Conn, i, number int, path string) error) {
		for range n {
			number++
			k, path := number, fmt.Sprint(host.Data, "/load", number)
			l.client(fmt.Sprint(name, " ", k), func(c *wire.Conn, i int) error { return work(c, i, k, path) })
		}
	}
	many(38, "pairs", func(c *wire.Conn, i, k int, path string) error {
		return errors.Join(registered(c, i, k), l.pair(c, path))
	})
	many(8, "pieces", func(c *wire.Conn, i, k int, path string) error {
		return errors.Join(registered(c, i, k), l.drip(c, uint32(2*i+1), path))
	})
	many(6, "pipeline", func(c *wire.Conn, i, k int, path string) error {
		return errors.Join(registered(c, i, k), l.pipeline(c, uint32(20*i+1), path))
	})
	many(4, "sluggish", func(c *wire.Conn, i, k int, _ string) error {
		return errors.Join(registered(c, i, k), l.sluggish(c, uint32(1500*i+1)))
	})
	many(4, "unregistered", func(c *wire.Conn, _, _ int, _ string) error {
		time.Sleep(time.Millisecond)
		return l.once(c.Ping)
	})
	many(2, "new connections", func(_ *wire.Conn, _, k int, path string) error {
		c, err := m.TryDial("lock")
		if err != nil {
			return err
		}
		defer c.Close()
		return errors.Join(registered(c, 0, k), l.pair(c, path))
	})
	for range 2 {
		admin := m.Dial("admin")
		must(m.t, admin.AdminOpen())
		before, err := admin.AdminClients(wire.LockServer)
		must(m.t, err)
		l.clients.Go(func() {
			defer admin.Close()
			for l.ctx.Err() == nil {
				now, err := admin.AdminClients(wire.LockServer)
				if err != nil {
					m.t.Errorf("administrator: %v", err)
					return
				}
				// Those that were there have their numbers and times; others come and go.
				if i := slices.IndexFunc(before[:30], func(c wire.AdminClient) bool { return !slices.Contains(now, c) }); i >= 0 {
					m.t.Errorf("administrator: client %+v is not there any more", before[i])
					return
				}
				time.Sleep(time.Millisecond)
			}
		})
	}
	return l
}

// end stops the clients, and nothing of theirs may be left.
func (l *load) end() {
	l.m.t.Helper()
	l.stop()
	l.clients.Wait()
	entries, err := os.ReadDir(l.m.Path(host.Data))
	must(l.m.t, err)
	for _, e := range entries {
		// A lease file that is there is held.
		if strings.HasPrefix(e.Name(), "load") {
			l.m.t.Errorf("lock %s is held for nobody", e.Name())
		}
	}
}

// descriptors are those that the daemon has open, each with what it is of.
func (m *machine) descriptors() (names []string) {
	m.t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", m.process())
	entries, err := os.ReadDir(dir)
	must(m.t, err)
	for _, e := range entries {
		name, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err == nil { // it is still open
			names = append(names, e.Name()+" "+name)
		}
	}
	return names
}

// children are the daemon's: its workers, and a program that it asks for its version.
func (m *machine) children() []int {
	m.t.Helper()
	return host.Children(m.process())
}

// Upgrades under full load lose no lock, no client and no request, with a vault and without one.
func TestStorm(t *testing.T) {
	n := host.Number(t, "UPGRADES", 100)
	t.Run("alone", func(t *testing.T) { storm(t, start(t, host.Ours(t), host.Options{}), n/2) })
	t.Run("with a keeper", func(t *testing.T) { storm(t, startKept(t), n-n/2) })
}

func storm(t *testing.T, m *machine, n int) {
	keeper := m.PID() // if it has one
	locks := m.hold()
	spare := 0
	if m.kept { // free cells stay for a while, of some peaks more than of others; still not one for each upgrade
		l := m.startLoad()
		m.usr1()
		l.end()
		spare = n / 2
	}
	m.usr1()
	locks.check(m) // the first that wants a lock leaves libvirtd's pidfd, and we are libvirtd here
	host.Settled(t, m.process())
	before := m.descriptors()
	outside := m.startChecker(locks.paths...)
	l := m.startLoad()
	begin := time.Now()
	for range n {
		m.usr1()
		time.Sleep(time.Duration(rand.IntN(20)) * time.Millisecond)
		if t.Failed() {
			break
		}
	}
	took := time.Since(begin)
	l.end()
	polls := outside.Quiet()
	t.Logf("%d upgrades in %v, %d requests meanwhile, the longest took %v; %d looks from outside", n, took.Round(time.Millisecond),
		l.requests.Load(), time.Duration(l.longest.Load()).Round(10*time.Microsecond), polls)
	t.Logf("the daemon itself says that everybody had to wait for %s", pauses(m.Stderr()))
	locks.check(m)
	if !host.Eventually(func() bool { return len(m.descriptors()) <= len(before)+spare }) {
		t.Errorf("these descriptors were open before: %q, these are now: %q", before, m.descriptors())
	}
	if c := m.children(); len(c) > 0 {
		t.Errorf("children are left: %v", c)
	}
	if got := m.countLines(" error : "); got > 0 {
		// Refusals that the load provokes are errors, too.
		for line := range strings.Lines(m.Stderr()) {
			if strings.Contains(line, " error : ") && !strings.Contains(line, "is not locked") && !strings.Contains(line, "is locked") {
				t.Errorf("in the log: %s", line)
				break
			}
		}
	}
	if m.kept {
		// What the upgrades have left in the vault is what there is.
		if parent := parentOf(m.process()); parent != keeper {
			t.Errorf("the keeper is %d, was %d", parent, keeper)
		}
		m.killKept()
		must(t, locks.conn.Ping())
		locks.check(m)
	}
	locks.release(m)
	if code := m.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if n := m.countLines("lock given up because the daemon stops"); n != 0 {
		t.Errorf("%d locks were held for nobody", n)
	}
}

var pause = regexp.MustCompile(successLine + `.* pause=(\S+)`)

// pauses sums up what the log of our daemon says of its upgrades.
func pauses(log string) string {
	var all []time.Duration
	for _, found := range pause.FindAllStringSubmatch(log, -1) {
		if d, err := time.ParseDuration(found[1]); err == nil {
			all = append(all, d)
		}
	}
	slices.Sort(all)
	if len(all) == 0 {
		return "an unknown time"
	}
	return fmt.Sprintf("%v in the median, %v at most", all[len(all)/2], all[len(all)-1])
}

// gapped builds a binary of which each lock is free for an instant while it is taken over, for a host.
func gapped(t *testing.T, h *host.Host) string {
	t.Helper()
	built := filepath.Join(t.TempDir(), "virtlockd")
	cmd := exec.Command("go", "build", "-tags", "gap", "-o", built, "virtlockd/cmd/virtlockd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	h.Expose(built)
	return built
}

// The checker of the storms is able to see a lock that is free for 100 us: in a live upgrade, and while a daemon takes over from one that
// was killed.
func TestCheckerSeesGap(t *testing.T) {
	t.Run("live upgrade", func(t *testing.T) {
		m := start(t, host.Ours(t), host.Options{})
		gap := gapped(t, m.Host)
		seesGap(m, func() { m.hop(gap) })
	})
	t.Run("recovery", func(t *testing.T) {
		h := host.New(t)
		m := startKeptOn(t, h, gapped(t, h))
		seesGap(m, m.killKept)
	})
}

// seesGap fails the test unless both of the checker's ways show what happens to the locks.
func seesGap(m *machine, happens func()) {
	m.t.Helper()
	locks := m.hold()
	outside := m.startChecker(locks.paths...)
	// Once would be enough, if nobody else wanted the processor just then.
	for range 5 {
		happens()
		must(m.t, locks.conn.Ping())
	}
	seen, polls := outside.End()
	for _, how := range []string{checker.Woke, checker.Free} {
		if !slices.ContainsFunc(seen, func(s string) bool { return strings.HasPrefix(s, how) }) {
			m.t.Errorf("in %d looks the checker has seen %q: nothing that begins with %q", polls, seen, how)
		}
	}
}
