// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"virtlockd/test/host"
	"virtlockd/test/slowdisk"
	"virtlockd/test/wire"
)

// alternate measures each kind once per round, in turns. measure returns one value for each row.
func (b *bench) alternate(kinds []kind, rounds int, measure func(k kind) []float64, rows ...*row) {
	b.alternateFew(kinds, rounds, rounds, measure, rows...)
}

// alternateFew is alternate with fewer rounds of the C daemon, where each takes long and is like the others.
func (b *bench) alternateFew(kinds []kind, rounds, roundsOfC int, measure func(k kind) []float64, rows ...*row) {
	for r := range rounds {
		for i := range kinds {
			k := kinds[(i+r)%len(kinds)]
			if k == cOne && r >= roundsOfC {
				continue
			}
			for j, v := range measure(k) {
				rows[j].add(k, v)
			}
		}
	}
}

// pairRows are what is told of pairs.
func (b *bench) pairRows(what string, p50, cpu goal) []*row {
	return []*row{
		b.results.row(what+", p50", seconds, p50),
		b.results.row(what+", p99", seconds, goal{}),
		b.results.row(what+", daemon's CPU per pair", seconds, cpu),
		b.results.row(what+", daemon's context switches per pair", count, goal{}),
	}
}

// measured returns the values of pairRows.
func (t *subject) measured(load func() (*samples, error)) []float64 {
	pid := t.process()
	before, err := cpuTime(pid)
	t.s.must(err)
	switches := contextSwitches(pid)
	s, err := load()
	if err != nil {
		t.s.Fatalf("%v\n%s", err, host.Shorten(t.d.Stderr()))
	}
	after, err := cpuTime(pid)
	t.s.must(err)
	n := float64(len(s.ns))
	return []float64{s.quantile(0.5), s.quantile(0.99), (after - before) / n, (contextSwitches(pid) - switches) / n, s.rate()}
}

// places of the pairs, with their goals against C.
func (b *bench) places() []struct {
	name string
	place
	goal float64
} {
	return []struct {
		name string
		place
		goal float64
	}{
		{"default, " + b.disk, place{disk: true}, 0.6},
		{"default, tmpfs", place{}, 0.6},
		{"indirect, " + b.disk, place{indirect: true, disk: true}, 0.7},
		{"indirect, tmpfs", place{indirect: true}, 0.65},
	}
}

// pairs: one client makes pairs, daemon and client on one processor.
func (b *bench) pairs(s *scope) {
	b.results.section("acquire + release, one client, daemon and client on one processor")
	subjects := map[kind]*subject{}
	for _, k := range b.kinds() {
		subjects[k] = b.start(s, k, true)
	}
	for _, p := range b.places() {
		workers := map[kind]*client{}
		for k, t := range subjects {
			workers[k] = b.workers(t, p.place, 1)[0]
		}
		b.alternate(b.kinds(), b.rounds(), func(k kind) []float64 {
			return subjects[k].measured(func() (*samples, error) {
				return repeat(b.cpu, b.span(), workers[k].pair)
			})[:4]
		}, b.pairRows(p.name, atMostC(p.goal), atMostC(p.goal))...)
	}
}

// manyClients: several clients at a time, wherever the scheduler puts them.
func (b *bench) manyClients(s *scope) {
	b.results.section("acquire + release, several clients")
	subjects := map[kind]*subject{}
	for _, k := range b.kinds() {
		subjects[k] = b.start(s, k, false)
	}
	for _, p := range b.places() {
		if !b.full && (!p.disk || p.indirect) {
			continue
		}
		for _, n := range []int{8, 64} {
			workers := map[kind][]*client{}
			for k, t := range subjects {
				workers[k] = b.workers(t, p.place, n)
			}
			what := fmt.Sprintf("%s, %d clients", p.name, n)
			rate := goal{}
			if !p.indirect {
				rate = atLeastC(2)
			}
			rows := append(b.pairRows(what, goal{}, goal{}), b.results.row(what+", pairs/s", perSecond, rate))
			b.alternate(b.kinds(), b.rounds(), func(k kind) []float64 {
				return subjects[k].measured(func() (*samples, error) { return closedLoop(workers[k], b.span()) })
			}, rows...)
		}
	}
}

// session is one connection with what is asked on it.
func session(t *subject, requests ...[]byte) error {
	c, err := dial(t.sock)
	if err != nil {
		return err
	}
	defer c.close()
	for _, r := range requests {
		if err := c.call(r); err != nil {
			return err
		}
	}
	return nil
}

// connect: clients that come and go, daemon and client on one processor.
func (b *bench) connect(s *scope) {
	b.results.section("clients that come and go, on one processor")
	subjects, workers := map[kind]*subject{}, map[kind]*client{}
	for _, k := range b.kinds() {
		subjects[k] = b.start(s, k, true)
		workers[k] = b.workers(subjects[k], place{}, 1)[0]
	}
	b.alternate(b.kinds(), b.rounds(), func(k kind) []float64 {
		t := subjects[k]
		register := owner(t.guest.PID())
		return t.measured(func() (*samples, error) {
			return repeat(b.cpu, b.span(), func() error { return session(t, register) })
		})[:4]
	}, b.pairRows("connect, REGISTER, close", atMostC(0.5), goal{})...)
	b.alternate(b.kinds(), b.rounds(), func(k kind) []float64 {
		t := subjects[k]
		register := owner(t.guest.PID())
		return t.measured(func() (*samples, error) {
			return repeat(b.cpu, b.span(), func() error {
				if err := session(t, register, workers[k].acquire); err != nil {
					return err
				}
				return session(t, register, workers[k].release)
			})
		})[:4]
	}, b.pairRows("pair as libvirtd makes it, each call on a connection of its own", goal{}, goal{})...)
}

// curve is a cost against a load. load starts a server with that much of it, unless that takes a kind too long. All kinds have their load at
// once, and are measured in turns, ours also without it.
func (b *bench) curve(s *scope, name string, points []int, load func(s *scope, k kind, n int) *subject) {
	unloaded := b.start(s, ours, true)
	base := b.workers(unloaded, place{}, 1)[0]
	// measure returns the medians of pairs and of connections.
	measure := func(t *subject, c *client) []float64 {
		pairs, err := repeat(b.cpu, b.span(), c.pair)
		s.must(err)
		register := owner(t.guest.PID())
		connects, err := repeat(b.cpu, b.span(), func() error { return session(t, register) })
		s.must(err)
		return []float64{pairs.quantile(0.5), connects.quantile(0.5)}
	}
	for _, n := range points {
		flat := atMostBase(1.1, "at 0")
		if n == 0 {
			flat = goal{}
		}
		pair := b.results.row(fmt.Sprintf("pair, %d %s", n, name), seconds, flat)
		connect := b.results.row(fmt.Sprintf("connect + REGISTER, %d %s", n, name), seconds, flat)
		pair.Curve, connect.Curve = name, name
		pair.Load, connect.Load = n, n
		s.part(func(s *scope) {
			var kinds []kind
			subjects, workers := map[kind]*subject{}, map[kind]*client{}
			for _, k := range b.kinds() {
				if t := load(s, k, n); t != nil {
					kinds = append(kinds, k)
					subjects[k], workers[k] = t, b.workers(t, place{}, 1)[0]
				}
			}
			b.alternate(kinds, b.pick(3, 10), func(k kind) []float64 {
				if k == ours && n > 0 {
					v := measure(unloaded, base)
					pair.Base, connect.Base = append(pair.Base, v[0]), append(connect.Base, v[1])
				}
				return measure(subjects[k], workers[k])
			}, pair, connect)
			for _, t := range subjects {
				t.stop()
			}
		})
	}
}

// idleClients: what clients that never say anything cost the others.
func (b *bench) idleClients(s *scope) {
	b.results.section("beside idle clients, p50 on one processor")
	points := []int{0, 1000, 4000}
	if b.full {
		points = []int{0, 100, 1000, 4000, 10000, 16000, 19000}
	}
	b.curve(s, "idle clients", points, func(s *scope, k kind, n int) *subject {
		if k == cOne && n > 16000 {
			// With more its state file is too large for itself, and to connect to it takes minutes.
			return nil
		}
		t, _ := b.loaded(s, k, true, n, 0)
		return t
	})
}

// heldLocks: what locks that are held cost.
func (b *bench) heldLocks(s *scope) {
	b.results.section("beside held locks, p50 on one processor")
	points := []int{0, 10000}
	if b.full {
		points = []int{0, 1000, 10000, 19000}
	}
	b.curve(s, "held locks", points, func(s *scope, k kind, n int) *subject {
		t := b.start(s, k, true)
		t.lock(n)
		return t
	})
}

// startUp: from before fork to the first reply.
func (b *bench) startUp(s *scope) {
	b.results.section("start")
	row := b.results.row("start to first reply", seconds, both(atMost(10e-3), atMostC(0.5)))
	b.alternate(b.kinds(), b.pick(5, 11), func(k kind) []float64 {
		var took float64
		s.part(func(s *scope) {
			h := host.New(s)
			begin := clock()
			t := b.startOn(h, s, k, false, host.Options{NoWait: true})
			var c *client
			for end := begin + int64(patience); ; time.Sleep(50 * time.Microsecond) {
				var err error
				if c, err = dial(t.sock); err == nil {
					break
				}
				if clock() > end {
					s.Fatal(err)
				}
			}
			s.must(c.call(owner(1)))
			took = float64(clock()-begin) / 1e9
			c.close()
			t.stop()
		})
		return []float64{took}
	}, row)
}

// upgrade: how long a client waits when the daemon starts itself again.
func (b *bench) upgrade(s *scope) {
	b.results.section("SIGUSR1, longest wait of a client")
	for _, load := range []struct{ locks, clients int }{{0, 0}, {1000, 1000}, {10000, 4096}, {10000, 9500}} {
		if !b.full && load.clients != 0 && load.clients != 4096 {
			continue
		}
		row := b.results.row(fmt.Sprintf("%d locks, %d clients", load.locks, load.clients), seconds, atMostC(0.2))
		s.part(func(s *scope) {
			subjects := map[kind]*subject{}
			kinds := b.daemons()
			if load.locks == 0 { // the floor takes none over
				kinds = b.kinds()
			}
			for _, k := range kinds {
				subjects[k], _ = b.loaded(s, k, false, load.clients, load.locks)
			}
			b.alternate(kinds, b.pick(5, 9), func(k kind) []float64 { return []float64{subjects[k].pause()} }, row)
			for _, t := range subjects {
				t.stop()
			}
		})
	}
	b.exchange(s)
}

// exchange measures the way from one daemon to the other, and back.
func (b *bench) exchange(s *scope) {
	if b.c == "" {
		return
	}
	const locks, clients = 1000, 1000
	link := filepath.Join(b.dir, "virtlockd")
	turn := func(to string) {
		s.must(os.Symlink(to, link+".new"))
		s.must(os.Rename(link+".new", link))
	}
	turn(b.ours)
	t := b.startOn(host.New(s), s, ours, false, host.Options{Argv0: link})
	t.addGuest()
	t.lock(locks)
	t.connect(clients)
	away := b.results.row(fmt.Sprintf("%d locks, %d clients, from ours to C", locks, clients), seconds, goal{})
	back := b.results.row(fmt.Sprintf("%d locks, %d clients, from C to ours", locks, clients), seconds, goal{})
	for range b.pick(3, 5) {
		turn(b.c)
		away.add(ours, t.pause())
		turn(b.ours)
		back.add(ours, t.pause())
	}
	t.stop()
}

// stall is the longest wait of a client that makes pairs, while something happens to others: until event returns, and for a while at least.
func (b *bench) stall(t *subject, c *client, event func()) float64 {
	// Some pairs come first, so that nothing is done for the first time.
	if _, err := repeat(-1, 20*time.Millisecond, c.pair); err != nil {
		t.s.Fatal(err)
	}
	var over atomic.Bool
	wait := t.s.beside(func() {
		defer over.Store(true)
		event()
	})
	longest := int64(0)
	pair := func() error {
		begin := clock()
		err := c.pair()
		longest = max(longest, clock()-begin)
		return err
	}
	var err error
	for last := false; err == nil && !last; {
		last = over.Load() // there is one span more, of what comes after
		_, err = repeat(-1, time.Duration(b.pick(60, 300))*time.Millisecond, pair)
	}
	wait()
	if err != nil {
		t.s.Fatalf("%v\n%s", err, host.Shorten(t.d.Stderr()))
	}
	return float64(longest) / 1e9
}

// others is what storm, hangs and deaths measure.
const others = "longest pair of another client"

// storm: many clients go at once.
func (b *bench) storm(s *scope) {
	const clients = 4000
	b.results.section(others)
	row := b.results.row(fmt.Sprintf("while %d clients disconnect at once", clients), seconds, atMost(10e-3))
	b.alternateFew(b.kinds(), b.pick(2, 5), b.pick(1, 5), func(k kind) (v []float64) {
		s.part(func(s *scope) {
			t, idle := b.loaded(s, k, false, clients, 0)
			c := b.workers(t, place{}, 1)[0]
			v = []float64{b.stall(t, c, idle.leave)}
			t.stop()
		})
		return v
	}, row)
}

// hangs: disks do not answer.
func (b *bench) hangs(s *scope) {
	b.results.section(others)
	for _, c := range []struct {
		what  string
		op    slowdisk.Op
		calls int
		disks int
		hung  int // of the calls, so many at the disks; the others wait for their turn
	}{
		{"while an open() hangs", slowdisk.Open, 1, 1, 1},
		{"while a lock call hangs", slowdisk.Lock, 1, 1, 1},
		{"while 200 requests wait for a disk that hangs", slowdisk.Open, 200, 1, 32},
		{"while 200 calls hang, at 7 disks", slowdisk.Open, 200, 7, 200},
	} {
		stalls := b.results.row(c.what, seconds, atMost(5e-3))
		stalls.Note = "C: as long as the disk hangs"
		long := time.Duration(b.pick(150, 500)) * time.Millisecond
		b.alternateFew(b.kinds(), b.pick(2, 5), b.pick(1, 5), func(k kind) (v []float64) {
			s.part(func(s *scope) {
				t := b.start(s, k, false)
				if k == bare {
					// It would hang, too: this is the machine's own delay.
					v = []float64{b.stall(t, b.workers(t, place{}, 1)[0], func() { time.Sleep(long) })}
					return
				}
				var disks []*slowdisk.Disk
				for i := range c.disks {
					disks = append(disks, slowdisk.Mount(s, t.h, fmt.Sprint("/tmp/slow", i), slowdisk.Options{Locks: c.op == slowdisk.Lock}))
				}
				probe := b.workers(t, place{}, 1)[0]
				var hung []*client
				for i := range c.calls {
					name := fmt.Sprint("disk", i)
					disks[i%c.disks].Add(name)
					h := t.client()
					h.resource("", fmt.Sprintf("/tmp/slow%d/%s", i%c.disks, name), 0)
					hung = append(hung, h)
				}
				for _, d := range disks {
					d.Hang(c.op)
				}
				want := c.hung
				if k == cOne {
					want = 1 // it does one thing at a time
				}
				v = []float64{b.stall(t, probe, func() {
					for _, h := range hung {
						s.must(h.send(h.acquire))
					}
					got := 0
					if !host.Eventually(func() bool {
						got = 0
						for _, d := range disks {
							got += d.Waiting(c.op)
						}
						return got >= want
					}) {
						s.Fatalf("%d calls hang; want %d", got, want)
					}
					time.Sleep(long)
					for _, d := range disks {
						d.Resume(c.op)
					}
				})}
				for _, h := range hung {
					s.must(h.recv())
					s.must(h.call(h.release))
				}
			})
			return v
		}, stalls)
	}
	b.idleWorkers(s)
}

// idleWorkers: what the processes need that have worked for a slow disk, and wait for more to do.
func (b *bench) idleWorkers(s *scope) {
	row := b.results.row("memory of a worker process, private", bytesUnit, atMost(1.5*(1<<20)))
	s.part(func(s *scope) {
		t := b.start(s, ours, false)
		disk := slowdisk.Mount(s, t.h, "/tmp/slow", slowdisk.Options{})
		var cs []*client
		disk.Hang(slowdisk.Open)
		for i := range enough {
			disk.Add(fmt.Sprint(i))
			c := t.client()
			c.resource("", fmt.Sprint("/tmp/slow/", i), 0)
			s.must(c.send(c.acquire))
			cs = append(cs, c)
		}
		if !host.Eventually(func() bool { return disk.Waiting(slowdisk.Open) == enough }) {
			s.Fatalf("%d calls hang; want %d", disk.Waiting(slowdisk.Open), enough)
		}
		disk.Resume(slowdisk.Open)
		for _, c := range cs {
			s.must(c.recv())
		}
		b.rest()
		for _, pid := range host.Children(t.d.PID()) {
			u, err := memoryOf(pid)
			s.must(err)
			row.add(ours, u.private)
		}
		for _, c := range cs {
			s.must(c.call(c.release))
		}
	})
	if n := len(row.Values[ours]); n != enough {
		s.Fatalf("there are %d worker processes; want %d", n, enough)
	}
}

// deaths: a guest that has lost its connection is ended. It is measured until its lock is free, or, with the floor, as long as that takes in
// the full form. The quick one has no time for that.
func (b *bench) deaths(s *scope) {
	const file = host.Data + "/theirs"
	b.results.section(others)
	for _, c := range []struct {
		what    string
		options host.ProcessOptions
		ignores bool
	}{
		{"obeys SIGTERM", host.ProcessOptions{}, false},
		{"ignores SIGTERM", host.ProcessOptions{}, true},
		{"becomes a zombie", host.ProcessOptions{Zombie: true}, false},
	} {
		var took time.Duration // with ours, which comes before the floor first
		row := b.results.row("while a dying owner "+c.what, seconds, atMost(5e-3))
		roundsOfC := b.pick(1, 5)
		if c.options.Zombie {
			roundsOfC = b.pick(0, 5) // of 3 s each
		}
		b.alternateFew(b.kinds(), b.pick(2, 5), roundsOfC, func(k kind) (v []float64) {
			s.part(func(s *scope) {
				t := b.start(s, k, false)
				probe := b.workers(t, place{}, 1)[0]
				if k == bare {
					v = []float64{b.stall(t, probe, func() {
						if b.full {
							time.Sleep(took)
						}
					})}
					return
				}
				p := t.h.Spawn(c.options)
				conn := p.Dial(t.d, "lock")
				s.must(conn.Register(wire.VM(p.PID())))
				t.h.WriteFile(file, "", 0o600)
				s.must(conn.Acquire("", file, 0))
				if c.ignores {
					p.IgnoreTerm()
				}
				over := false
				v = []float64{b.stall(t, probe, func() {
					begin := clock()
					conn.Close()
					over = host.Eventually(func() bool { return p.Dead() && t.h.Free(file, true) })
					if k == ours {
						took = time.Duration(clock() - begin)
					}
				})}
				if !over {
					s.Fatalf("an owner that %s does not end, or its lock is never free", c.what)
				}
			})
			return v
		}, row)
	}
}
