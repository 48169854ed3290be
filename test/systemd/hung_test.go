// SPDX-License-Identifier: LGPL-2.1-or-later

package systemd

import (
	"errors"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/slowdisk"
	"virtlockd/test/wire"
)

// rig is a place with a daemon that somebody starts again.
type rig struct {
	slowdisk.Place
	path  func(string) string // as the test sees it
	guest func() (alive func() bool, conn *wire.Conn)
	pid   func() int // of the daemon
	ends  []end
}

// end is a way in which the daemon ends.
type end struct {
	how string
	do  func()
}

// With calls that hang on a disk, whose server has read them and sits on them, a daemon that dies or is restarted is followed by one
// that serves everybody else while they hang. When the disk answers, nothing of what was asked for stays.
func TestCrashWithHungDisk(t *testing.T) {
	t.Parallel()
	t.Run("systemd", func(t *testing.T) {
		t.Parallel()
		m := Boot(t, Options{})
		m.Systemctl("start", Service)
		crashWithHungDisk(t, rig{
			Place: m, path: m.Path, pid: m.MainPID,
			guest: func() (func() bool, *wire.Conn) {
				g := m.Guest()
				return g.Alive, g.Client()
			},
			ends: []end{
				{"kill", func() { m.Signal("KILL") }},
				{"restart", func() { m.Systemctl("restart", Service) }},
				// As memory that has run out does with OOMPolicy=kill. It comes last, since it leaves no worker process that could undo anything.
				{"kill of all", func() { m.Systemctl("kill", "--kill-whom=all", "--signal=KILL", Service) }},
			},
		})
	})
	t.Run("keeper", func(t *testing.T) {
		t.Parallel()
		h := host.New(t)
		d := h.Start(host.Ours(t), host.Options{Args: []string{"--keeper"}})
		t.Cleanup(func() {
			// To kill the keeper would make the daemon start another one.
			if code := d.Stop(); code != 0 {
				t.Errorf("the keeper ended with %d", code)
			}
		})
		pid := func() int {
			n, err := strconv.Atoi(strings.TrimSpace(h.ReadFile("/run/virtlockd.pid")))
			if err != nil || n <= 1 {
				t.Fatalf("pid file: %d, %v", n, err)
			}
			return n
		}
		crashWithHungDisk(t, rig{
			Place: h, path: h.Path, pid: pid,
			guest: func() (func() bool, *wire.Conn) {
				p := h.Spawn(host.ProcessOptions{})
				c := p.Dial(d, "lock")
				if err := c.Register(wire.VM(p.PID())); err != nil {
					t.Fatal(err)
				}
				return func() bool { return !p.Dead() }, c
			},
			ends: []end{{"kill", func() {
				host.Settled(t, pid())
				if err := unix.Kill(pid(), unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
			}}},
		})
	})
}

func crashWithHungDisk(t *testing.T, r rig) {
	const (
		dir     = "/tmp/slow/"
		other   = Data + "/other"   // of the guest whose connection hangs
		another = Data + "/another" // of one who has nothing to do with it
	)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	r.Must(func() error { return os.MkdirAll(Data, 0o755) })
	// One disk for each kind of call, since the kernel lets none pass another one in a directory.
	disks := map[slowdisk.Op]*slowdisk.Disk{}
	for _, op := range []slowdisk.Op{slowdisk.Lock, slowdisk.Unlink, slowdisk.Open, slowdisk.Create} {
		disks[op] = slowdisk.Mount(t, r, dir+string(op), slowdisk.Options{Locks: true})
	}
	disks[slowdisk.Lock].Add("x")
	disks[slowdisk.Open].Add("x")
	// A lock on such a disk stays held, too.
	slowdisk.Mount(t, r, dir+"kept", slowdisk.Options{}).Add("x")
	_, bystander := r.guest()
	must(bystander.Acquire("", another, wire.Autocreate))
	must(bystander.Acquire("", dir+"kept/x", 0))
	alive, opens := r.guest()
	must(opens.Acquire("", other, wire.Autocreate))
	_, locks := r.guest()
	_, creates := r.guest()
	_, releases := r.guest()
	must(releases.Acquire("", dir+"unlink/x", wire.Autocreate))
	kept := host.Wait(t, r.path(dir+"kept/x"))
	waiters := []*host.Waiter{host.Wait(t, r.path(other)), host.Wait(t, r.path(another))}
	hung := map[slowdisk.Op]*wire.Conn{slowdisk.Lock: locks, slowdisk.Unlink: releases, slowdisk.Open: opens, slowdisk.Create: creates}
	for op, conn := range hung {
		proc, flags := wire.ProcAcquire, uint32(0)
		switch op {
		case slowdisk.Unlink:
			proc = wire.ProcRelease
		case slowdisk.Create:
			flags = wire.Autocreate
		}
		disks[op].Hang(op)
		must(conn.Send(wire.Request(proc, 99, wire.ResourceArgs("", dir+string(op)+"/x", flags))))
		disks[op].AwaitHang(op)
	}

	for _, end := range r.ends {
		how := end.how
		for range 2 {
			before, begin := r.pid(), time.Now()
			end.do()
			if !host.Eventually(func() bool { now := r.pid(); return now != 0 && now != before }) {
				t.Fatalf("%s: there is no process after %d", how, before)
			}
			must(bystander.Ping())
			_, one := r.guest()
			must(one.Acquire("", Data+"/one", wire.Autocreate))
			must(one.Release("", Data+"/one"))
			t.Logf("%s: somebody else is served after %v", how, time.Since(begin).Round(time.Millisecond))
			for op, disk := range disks {
				if disk.Waiting(op) == 0 {
					t.Errorf("%s: %s does not hang any more", how, op)
				}
			}
			kept.Asleep()
			for _, w := range waiters {
				w.Asleep()
			}
		}
	}
	for op, conn := range hung {
		// Whose request was read and not answered sees the end of the connection, not silence.
		if _, err := conn.Recv(); !errors.Is(err, wire.ErrClosed) {
			t.Errorf("whose %s hangs: %v, want an end", op, err)
		}
	}
	_, next := r.guest()
	if err := next.Acquire("", dir+"kept/x", 0); !wire.IsLocked(err) {
		t.Errorf("the lock on the slow disk: %v", err)
	}
	for op, disk := range disks {
		disk.Resume(op)
		path := dir + string(op) + "/x"
		var err error
		if !host.Eventually(func() bool { err = next.Acquire("", path, wire.Autocreate); return err == nil }) {
			t.Errorf("%s is held for nobody: %v", path, err)
			continue
		}
		must(next.Release("", path))
	}
	must(bystander.Release("", dir+"kept/x"))
	kept.Wakes()
	must(next.Acquire("", dir+"kept/x", 0))
	if !alive() {
		t.Error("the guest whose request hung was killed")
	}
	for _, w := range waiters {
		w.Asleep()
	}
}
