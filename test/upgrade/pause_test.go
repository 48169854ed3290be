// SPDX-License-Identifier: LGPL-2.1-or-later

package upgrade

import (
	"fmt"
	"math/rand/v2"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/inspectclient"
	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// size is how much a daemon has when it is upgraded.
type size struct{ locks, clients int }

// reserve is how many descriptors a process needs besides one for each lock and client.
const reserve = 400

// fill gives the daemon locks and idle clients, and returns these. Each is registered and restricted, like a guest's.
func (m *machine) fill(s size) []*wire.Conn {
	m.t.Helper()
	const space = host.Data + "/many"
	if s.locks > 0 {
		c := m.Client(noOne)
		must(m.t, c.CreateLockspace(space))
		for i := range s.locks {
			must(m.t, c.Acquire(space, lockName(i), wire.Autocreate))
		}
		c.Close()
	}
	all := make([]*wire.Conn, s.clients)
	for i := range all {
		all[i] = m.Client(noOne + i)
		must(m.t, all[i].Restrict())
	}
	return all
}

// lockName is as long as libvirt's names of disks.
func lockName(i int) string { return fmt.Sprintf("%064x", i) }

// pause upgrades while a client takes and gives up a lock all the time, and returns how long that had to wait at most. The C daemon forgets
// a request that it has half read: then it is asked on another connection.
func (m *machine) pause(binary string) time.Duration {
	m.t.Helper()
	m.turn(binary)
	mark := m.mark()
	var longest time.Duration
	signalled := time.Time{}
	c := m.Client(noOneElse)
	path := host.Data + "/pair"
	last := time.Now()
	for i := 0; ; i++ {
		err := c.Send(wire.Request(wire.ProcAcquire+uint32(i%2), uint32(i), wire.ResourceArgs("", path, uint32(1-i%2)*wire.Autocreate)))
		must(m.t, err)
		if _, err = c.RecvWithin(60 * time.Millisecond); err != nil {
			c.Close()
			c = m.Client(noOneElse)
			i &^= 1 // whichever it was, it is released next, and that may fail
		}
		now := time.Now()
		longest = max(longest, now.Sub(last))
		last = now
		switch {
		case i == 200:
			m.Signal(syscall.SIGUSR1)
			signalled = now
		case i > 200 && i%2 == 1 && m.upgraded(mark) && now.Sub(signalled) > 50*time.Millisecond:
			c.Close()
			return longest
		case i > 200 && (m.failures() > 0 || now.Sub(signalled) > host.Patience):
			m.t.Fatalf("no upgrade\n%s", host.Shorten(m.Stderr()))
		}
	}
}

// Live upgrades with many locks and clients lose none of them, and the log of the test says how long everybody else had to wait, beside the C
// daemon where that does not take minutes to get so many clients (with SCALE_C in the environment: everywhere).
func TestScale(t *testing.T) {
	var limit unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	for _, s := range []size{{0, 0}, {1000, 1000}, {10000, 4096}, {10000, 9500}} {
		t.Run(fmt.Sprintf("%d locks, %d clients", s.locks, s.clients), func(t *testing.T) {
			if testing.Short() && s.locks > 1000 {
				t.Skip("takes long")
			}
			if need := uint64(s.locks + s.clients + reserve); limit.Max < need {
				t.Skipf("at most %d files can be open, this needs %d", limit.Max, need)
			}
			binaries := map[string]string{"ours": host.Ours(t)}
			if s.clients <= 1000 || os.Getenv("SCALE_C") != "" {
				binaries["C"] = host.C(t)
			}
			for name, binary := range binaries {
				m := start(t, binary, host.Options{Config: "max_clients = 20000\n"})
				clients := m.fill(s)
				var pauses []time.Duration
				for range 3 {
					pauses = append(pauses, m.pause(binary).Round(10*time.Microsecond))
				}
				cpu := func() time.Duration {
					var ts unix.Timespec
					must(t, unix.ClockGettime(int32(^m.PID()<<3|2), &ts)) // the process' own clock, see clock_getcpuclockid(3)
					return time.Duration(ts.Nano())
				}
				begin := cpu()
				m.usr1()
				t.Logf("%s: pauses of %v; an upgrade takes %v of CPU time", name, pauses, (cpu() - begin).Round(10*time.Microsecond))
				other := m.Client(noOneElse)
				for range 20 {
					if s.clients > 0 {
						must(t, clients[rand.IntN(s.clients)].Ping())
					}
					if s.locks > 0 {
						i := rand.IntN(s.locks)
						refused(t, lockName(i), other.Acquire(host.Data+"/many", lockName(i), wire.Autocreate))
						if m.Free(host.Data+"/many/"+lockName(i), true) {
							t.Errorf("%s: lock %d is free", name, i)
						}
					}
				}
				for _, c := range clients {
					must(t, c.Ping())
					c.Close()
				}
				if name == "ours" { // not by the log, which does not wait for a slow reader of 10,000 lines
					c, err := inspectclient.Dial(t.Context(), m.Path(m.SocketPath("admin")), host.Patience)
					must(t, err)
					status, err := c.Status()
					must(t, err)
					c.Close()
					if n := status.Locks.Exclusive; n != s.locks {
						t.Errorf("%d locks are held at the end, want %d", n, s.locks)
					}
				}
				if code := m.Stop(); code != 0 {
					t.Errorf("exit code %d", code)
				}
			}
		})
	}
}
