// SPDX-License-Identifier: LGPL-2.1-or-later

package rpc

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/poll"
)

// TestLimit: clients above the limit wait, are served in the order they came,
// and the log says so once.
func TestLimit(t *testing.T) {
	t.Parallel()
	b := serve(t, func(c *Config) { c.MaxClients = 2; c.Setting = "admin_max_clients" })
	var peers []*peer
	for i := range 8 {
		p := b.dial()
		p.send(request(procEcho, uint32(i), []byte{'0' + byte(i)}))
		if i < 2 {
			p.expect(reply(procEcho, uint32(i), []byte{'0' + byte(i)}))
		}
		peers = append(peers, p)
	}
	const line = "test has its limit of 2 clients: new ones have to wait until one leaves; raise admin_max_clients"
	eventually(t, "the log line", func() bool { return b.log.count(line) == 1 })
	peers[2].silence()
	peers[7].silence()
	if n := b.Count(); n != 2 {
		t.Errorf("%d clients", n)
	}
	for i := range 4 { // one goes, one comes
		peers[i].close()
		peers[i+2].expect(reply(procEcho, uint32(i+2), []byte{'0' + byte(i+2)}))
	}
	peers[6].silence()
	if n := b.log.count(line); n != 1 {
		t.Errorf("the log says %d times that the limit is reached", n)
	}
	if got := b.lab.executed(); got != "0 1 2 3 4 5" {
		t.Errorf("served in the order %s", got)
	}

	// Raising wakes, lowering disconnects nobody.
	b.SetLimits(Limits{MaxClients: 4, MaxUnauth: 9})
	peers[6].expect(reply(procEcho, 6, []byte("6")))
	peers[7].expect(reply(procEcho, 7, []byte("7")))
	b.SetLimits(Limits{MaxClients: 1, MaxUnauth: 1})
	if got := b.Limits(); got != (Limits{1, 1}) {
		t.Errorf("limits %v", got)
	}
	for _, p := range peers[4:] {
		p.call(procEcho, []byte("."))
	}
	late := b.dial()
	late.send(ping)
	for _, p := range peers[4:7] {
		p.close()
	}
	late.silence()
	peers[7].close()
	late.expect(pong)
}

func TestLimitZero(t *testing.T) {
	t.Parallel()
	b := serve(t, func(c *Config) { c.MaxClients = 0 })
	p := b.dial()
	p.send(ping)
	p.silence()
	eventually(t, "the log line", func() bool { return b.log.count("raise max_clients") == 1 })
	b.SetLimits(Limits{MaxClients: 1})
	p.expect(pong)
}

func TestWrongUser(t *testing.T) {
	t.Parallel()
	var changed atomic.Int32
	b := serve(t, func(c *Config) {
		c.AllowUID++
		c.MaxClients = 1
		c.Changed = func() { changed.Add(1) }
	})
	for range 3 {
		p := b.dial()
		p.trySend(ping)
		p.closed()
	}
	line := fmt.Sprintf("operation forbidden: Disallowing client %d with uid %d", os.Getpid(), os.Geteuid())
	eventually(t, "the log lines", func() bool { return b.log.count(line) == 3 })
	if len(b.lab.opened) != 0 || changed.Load() != 0 || b.lab.calls.Load() != 0 {
		t.Error("a foreign user became a client")
	}
}

// TestBlocked: calls that block delay nobody else, however many there are.
func TestBlocked(t *testing.T) {
	t.Parallel()
	b := serve(t, nil)
	var stuck []*peer
	for i := range 100 {
		p := b.dial()
		p.send(request(procBlock, uint32(i), nil))
		stuck = append(stuck, p)
	}
	for range stuck {
		b.blocked()
	}
	p := b.dial()
	for range 100 {
		p.call(procEcho, nil)
	}
	// Clients come and go meanwhile, too.
	q, c := b.client()
	q.close()
	b.lab.end(t, c.ID())
	close(b.lab.release)
	for i, p := range stuck {
		p.expect(reply(procBlock, uint32(i), nil))
	}
}

// TestMany: hundreds of clients, some of which break the rules, each get exactly
// the answers to their own requests.
func TestMany(t *testing.T) {
	t.Parallel()
	b := serve(t, nil)
	const clients, rounds = 300, 30
	gate := make(chan struct{}, 25) // the backlog is short, and connecting not what is tested
	var wg sync.WaitGroup
	for i := range uint32(clients) {
		wg.Go(func() {
			gate <- struct{}{}
			p := b.dial()
			<-gate
			defer p.close()
			for j := range uint32(rounds) {
				args := []byte(strings.Repeat(fmt.Sprintf("%d/%d ", i, j), int(j)*7))
				m := request(procEcho, i<<16|j, args)
				cut := int(j) * len(m) / rounds
				p.send(m[:cut])
				p.send(m[cut:])
				p.expect(reply(procEcho, i<<16|j, args))
			}
			switch i % 4 {
			case 0:
				p.trySend(u32(3)) // refused
				p.closed()
			case 1:
				p.trySend(request(procEcho, 0, nil)[:20]) // half a request
			case 2:
				p.trySend(request(procBig, 0, u32(1<<20))) // a reply that nobody reads
			}
		})
	}
	wg.Wait()
	for id := range uint64(clients) {
		b.lab.end(t, id+1)
	}
	eventually(t, "all to leave", func() bool { return b.Count() == 0 })
}

// TestStorm: many clients that leave at once do not hold up one that stays.
func TestStorm(t *testing.T) {
	t.Parallel()
	var changed atomic.Int32
	b := serve(t, func(c *Config) { c.Changed = func() { changed.Add(1) } })
	const n = 1000
	stay := b.dial()
	stay.call(procEcho, nil)
	peers := make([]*peer, n)
	for i := range peers {
		peers[i] = b.dial()
	}
	eventually(t, "all to be accepted", func() bool { return b.Count() == n+1 })
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		for _, p := range peers {
			p.close()
		}
	}()
	var worst time.Duration
	for b.Count() > 1 {
		start := time.Now()
		stay.call(procEcho, nil)
		worst = max(worst, time.Since(start))
	}
	<-gone
	t.Logf("longest of the other's calls: %v", worst)
	for id := range uint64(n) {
		if !b.lab.end(t, id+2) {
			t.Fatalf("client %d not closed by its peer", id+2)
		}
	}
	eventually(t, "the last change to be told", func() bool { return changed.Load() == 2*n+1 })
}

func TestShutdown(t *testing.T) {
	t.Parallel()
	b := serve(t, nil)
	var idle []*peer
	for range 200 {
		idle = append(idle, b.dial())
	}
	idle[0].call(procEcho, nil)
	idle[1].send(request(procEcho, 1, nil)[:9])
	idle[2].send(request(procBig, 1, u32(3<<20)))
	busy := b.dial()
	busy.send(request(procBlock, 1, nil))
	c := b.blocked()
	b.Shutdown()
	if !isClosed(c.Done()) {
		t.Error("a running call was not told")
	}
	if n := b.Count(); n != 0 {
		t.Errorf("%d clients are left", n)
	}
	b.lab.mu.Lock()
	for _, id := range b.lab.opened {
		if byPeer, ended := b.lab.closed[id]; byPeer || !ended {
			t.Errorf("client %d: by peer %v, ended %v", id, byPeer, ended)
		}
	}
	b.lab.mu.Unlock()
	busy.closed()
	idle[0].closed()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: b.path}); err != unix.ECONNREFUSED {
		t.Errorf("connecting after the end: %v", err)
	}
	b.SetLimits(Limits{MaxClients: 1}) // harmless
	l := listenAt(b.path + "2")
	defer unix.Close(l)
	if err := b.Listen(l); err == nil {
		t.Error("listening after the end")
	}
	b.Shutdown()
}

func TestListenErrors(t *testing.T) {
	t.Parallel()
	b := serve(t, nil)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	unbound, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(unbound)
	for name, fd := range map[string]int{"datagram": pair[0], "closed": -1, "unbound": unbound} {
		if err := b.Listen(fd); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	// A socket that listens already, a second one of the server.
	l := listenAt(b.path + "2")
	if err := unix.Listen(l, 1); err != nil {
		t.Fatal(err)
	}
	if err := b.Listen(l); err != nil {
		t.Fatal(err)
	}
	dial(t, b.path+"2").call(procEcho, nil)
	b.dial().call(procEcho, nil)
}

// TestFiles: without descriptors left clients wait, the server does not spin, and
// goes on when one leaves.
func TestFiles(t *testing.T) {
	const limit = 30
	path, pid, stop := startChild(t, limit)
	files := func() (all, sockets int) {
		for fd := range limit { // others may have been inherited
			to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd))
			if err == nil {
				all++
			}
			if strings.HasPrefix(to, "socket:") {
				sockets++
			}
		}
		return all, sockets
	}
	_, own := files()
	var peers []*peer
	for range 40 {
		p := dial(t, path)
		p.send(ping)
		peers = append(peers, p)
	}
	var served int
	eventually(t, "a server without descriptors left", func() bool {
		all, sockets := files()
		served = sockets - own
		return all == limit
	})
	if served < 10 || served >= limit {
		t.Fatalf("%d of 40 clients are served with %d descriptors", served, limit)
	}
	for _, p := range peers[:served] {
		p.expect(pong)
	}
	before, begin := cpuTime(t, pid), time.Now()
	for range 3 {
		peers[served].silence()
		peers[len(peers)-1].silence()
	}
	if used, of := cpuTime(t, pid)-before, time.Since(begin); used > of/4 {
		t.Errorf("%v of CPU time used for waiting %v", used, of)
	} else {
		t.Logf("%v of CPU time used for waiting %v, %d clients served", used, of, served)
	}
	for i := range 5 {
		peers[i].close()
		peers[served+i].expect(pong)
	}
	log := strings.Join(stop(), "\n")
	if n := strings.Count(log, "cannot accept clients: too many open files"); n != 1 {
		t.Errorf("%d lines in the log:\n%s", n, log)
	}
}

// cpuTime returns how long all threads of a process have been running on a CPU.
func cpuTime(t *testing.T, pid int) (d time.Duration) {
	t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil || len(threads) == 0 {
		t.Fatal("no threads: ", err)
	}
	for _, path := range threads {
		var ns int64
		if b, err := os.ReadFile(path); err == nil { // else the thread has ended
			if _, err := fmt.Sscan(string(b), &ns); err != nil {
				t.Fatal(err)
			}
		}
		d += time.Duration(ns)
	}
	return d
}

// raceDetector tells that it is built in, with its shadow memory.
var raceDetector bool

// TestIdleSize: an idle client costs a small struct, whatever it did before.
func TestIdleSize(t *testing.T) {
	path, pid, stop := startChild(t, 0)
	const n = 2000
	private := func() int64 {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			t.Skip(err)
		}
		var kib int64
		for line := range strings.Lines(string(data)) {
			var v int64
			if _, err := fmt.Sscanf(line, "Private_Dirty: %d", &v); err == nil {
				kib += v
			}
		}
		return kib << 10
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil || limit.Cur < n+500 {
		t.Skipf("limit of descriptors: %d", limit.Cur)
	}
	dial(t, path).call(procEcho, nil)
	before := private()
	for range n {
		dial(t, path).call(procEcho, make([]byte, 64))
	}
	each := (private() - before) / n
	t.Logf("%d bytes of private memory for each idle client", each)
	if each > 2560 && !raceDetector {
		t.Errorf("%d bytes for each idle client, want at most 2560", each)
	}
	stop()
}

// TestClosedPoller: a server whose poller has ended does not crash.
func TestClosedPoller(t *testing.T) {
	t.Parallel()
	p, err := poll.New()
	if err != nil {
		t.Fatal(err)
	}
	p.Close()
	s := NewServer(p, Config{})
	l := listenAt(t.TempDir() + "/s")
	defer unix.Close(l)
	if err := s.Listen(l); err == nil {
		t.Error("listening without poller")
	}
	s.Shutdown()
}
