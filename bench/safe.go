// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
)

// kept starts our daemon with a keeper, which is the process that the subject's daemon stands for.
func (b *bench) kept(s *scope, pinned bool) *subject {
	t := b.startOn(host.New(s), s, ours, pinned, host.Options{Args: []string{"--keeper"}})
	// In order: each of the two would start the other again.
	s.Cleanup(func() { t.d.Stop() })
	t.addGuest()
	t.kept = t.daemon()
	return t
}

// daemon returns the process that the keeper has started.
func (t *subject) daemon() int {
	var pids []int
	if !host.Eventually(func() bool { pids = host.Children(t.d.PID()); return len(pids) == 1 }) {
		t.s.Fatalf("the keeper has the children %v", pids)
	}
	return pids[0]
}

// safety is what it costs that a crash loses nothing.
func (b *bench) safety(s *scope) {
	b.results.section("with crash safety (a keeper), one client, daemon and client on one processor")
	base := b.start(s, ours, true)
	subjects := b.withKeeper(s, true)
	for _, p := range b.places() {
		if !b.full && !p.disk {
			continue
		}
		rows := []*row{
			b.results.row(p.name+", p50", seconds, both(atMostC(0.8), atMostBase(1.3, "without a keeper"))),
			b.results.row(p.name+", daemon's CPU per pair", seconds, atMostC(0.8)),
		}
		if !b.full {
			rows = rows[:1] // its rounds are too short for a CPU time that tells something
		}
		workers := map[kind]*client{}
		for k, t := range subjects {
			workers[k] = b.workers(t, p.place, 1)[0]
		}
		without := b.workers(base, p.place, 1)[0]
		measure := func(t *subject, c *client) []float64 {
			v := t.measured(func() (*samples, error) { return repeat(b.cpu, b.span(), c.pair) })
			return []float64{v[0], v[2]}[:len(rows)]
		}
		b.alternate(b.kinds(), b.rounds(), func(k kind) []float64 {
			if k == ours {
				for i, v := range measure(base, without) {
					rows[i].Base = append(rows[i].Base, v)
				}
			}
			return measure(subjects[k], workers[k])
		}, rows...)
	}
	if b.full {
		b.manySafe(s)
	}
}

// manySafe: eight clients at a time, wherever the scheduler puts them.
func (b *bench) manySafe(s *scope) {
	const n = 8
	b.results.section(fmt.Sprintf("with crash safety, %d clients", n))
	subjects := b.withKeeper(s, false)
	for _, p := range b.places() {
		if p.indirect {
			continue
		}
		workers := map[kind][]*client{}
		for k, t := range subjects {
			workers[k] = b.workers(t, p.place, n)
		}
		rows := []*row{
			b.results.row(p.name+", pairs/s", perSecond, atLeastC(1/0.8)), // 0.8 of the time
			b.results.row(p.name+", daemon's CPU per pair", seconds, goal{}),
		}
		b.alternate(b.kinds(), b.rounds(), func(k kind) []float64 {
			v := subjects[k].measured(func() (*samples, error) { return closedLoop(workers[k], b.span()) })
			return []float64{v[4], v[2]}
		}, rows...)
	}
}

// withKeeper starts one of each kind, ours with a keeper.
func (b *bench) withKeeper(s *scope, pinned bool) map[kind]*subject {
	subjects := map[kind]*subject{}
	for _, k := range b.kinds() {
		if k != ours {
			subjects[k] = b.start(s, k, pinned)
			continue
		}
		subjects[k] = b.kept(s, pinned)
	}
	return subjects
}

// recovery: from kill -9 to the first reply on a connection that was there before.
func (b *bench) recovery(s *scope) {
	b.results.section("kill -9")
	row := b.results.row("5000 locks, 1000 clients: start of the next process to the first reply", seconds, atMost(150e-3))
	whole := b.results.row("the same from the kill on", seconds, goal{})
	const locks, clients = 5000, 1000
	for range b.pick(3, 5) {
		v, err := install(locks, clients)
		s.must(err)
		row.add(bare, v)
		s.part(func(s *scope) {
			t := b.kept(s, false)
			t.lock(locks)
			t.connect(clients)
			c := t.client()
			request := owner(t.guest.PID())
			s.must(c.call(request))
			time.Sleep(200 * time.Millisecond) // so that the keeper starts it again at once
			before := t.daemon()
			started := make(chan int64, 1)
			begin := clock()
			s.must(unix.Kill(before, unix.SIGKILL))
			go func() {
				for {
					if now := host.Children(t.d.PID()); len(now) == 1 && now[0] != before {
						started <- clock()
						return
					}
				}
			}()
			s.must(c.call(request))
			end := clock()
			row.add(ours, float64(end-<-started)/1e9)
			whole.add(ours, float64(end-begin)/1e9)
		})
	}
}

// install is the floor of a recovery: the time to read a queue for each lock and client and to install the descriptor that lies in it, and to
// wait for the clients. The start of a process, a row of its own, is not in it, nor are the records.
func install(locks, clients int) (float64, error) {
	var open []int
	defer func() {
		for _, fd := range open {
			unix.Close(fd)
		}
	}()
	var queues [][2]int
	for range locks + clients {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return 0, os.NewSyscallError("socketpair", err)
		}
		open = append(open, pair[0], pair[1])
		queues = append(queues, pair)
		if err := unix.Sendmsg(pair[0], []byte{0}, unix.UnixRights(pair[0]), nil, 0); err != nil {
			return 0, os.NewSyscallError("sendmsg", err)
		}
	}
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return 0, os.NewSyscallError("epoll_create1", err)
	}
	open = append(open, epfd)
	var record [512]byte
	oob := make([]byte, unix.CmsgSpace(4))
	begin := clock()
	for i, q := range queues {
		if _, _, _, _, err := unix.Recvmsg(q[1], record[:], oob, unix.MSG_PEEK|unix.MSG_CMSG_CLOEXEC); err != nil {
			return 0, os.NewSyscallError("recvmsg", err)
		}
		fd := int(binary.NativeEndian.Uint32(oob[unix.CmsgLen(0):]))
		open = append(open, fd)
		if i < clients {
			ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}
			if err := unix.EpollCtl(epfd, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
				return 0, os.NewSyscallError("epoll_ctl", err)
			}
		}
	}
	return float64(clock()-begin) / 1e9, nil
}

// listing: somebody looks at 10,000 locks again and again while others lock. It takes a processor, so the floor has its own pairs beside that.
func (b *bench) listing(s *scope) {
	const locks = 10000
	tool := filepath.Join(filepath.Dir(b.ours), "virtlockctl")
	if _, err := os.Stat(tool); err != nil {
		fmt.Fprintf(os.Stderr, "bench: no tool: %v\n", err)
		return
	}
	b.results.section("while virtlockctl lists the locks")
	row := b.results.row(fmt.Sprintf("pair beside %d locks, p99", locks), seconds, atMostBase(1.2, "without a list"))
	without := b.results.row("pair without a list, p99", seconds, goal{})
	took := b.results.row("one such list", seconds, goal{})
	t, machine := b.start(s, ours, false), b.start(s, bare, false)
	t.lock(locks)
	c, other := b.workers(t, place{}, 1)[0], b.workers(machine, place{}, 1)[0]
	span := time.Duration(b.pick(200, 1000)) * time.Millisecond
	p99 := func(c *client) float64 {
		all, err := repeat(-1, span, c.pair)
		s.must(err)
		return all.quantile(0.99)
	}
	list := func() error {
		cmd := exec.Command(tool, "list")
		begin := clock()
		if err := t.h.Do(cmd.Start); err != nil {
			return err
		}
		if err := cmd.Wait(); err != nil {
			return fmt.Errorf("virtlockctl list: %w", err)
		}
		took.add(ours, float64(clock()-begin)/1e9)
		return nil
	}
	for range b.pick(3, 9) {
		alone := p99(c)
		row.Base = append(row.Base, alone)
		without.add(ours, alone)
		without.add(bare, p99(other))
		enough, done := make(chan struct{}), make(chan error, 1)
		go func() {
			for {
				if err := list(); err != nil {
					done <- err
					return
				}
				select {
				case <-enough:
					done <- nil
					return
				default:
				}
			}
		}()
		row.add(ours, p99(c))
		row.add(bare, p99(other))
		close(enough)
		s.must(<-done)
	}
}
