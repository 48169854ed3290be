// SPDX-License-Identifier: LGPL-2.1-or-later

package upgrade

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/slowdisk"
	"virtlockd/test/wire"
)

// With calls that hang on a disk, whose server has read them and sits on them, an upgrade is done while they hang, and everybody else is
// served. Those who wait for the disk lose their connections, which nobody takes for their end, and when the disk answers nothing of what
// they asked for stays.
func TestHungDisk(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		next string
		kept bool
	}{
		"to ours": {host.Ours(t), false}, "to C": {host.C(t), false},
		"to ours, with a keeper": {host.Ours(t), true}, "to C, with a keeper": {host.C(t), true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			next := tt.next
			var m *machine
			if tt.kept {
				m = startKept(t)
			} else {
				m = start(t, host.Ours(t), host.Options{})
			}
			// One disk for each kind of call, since the kernel lets none pass another one in a directory.
			disks := map[slowdisk.Op]*slowdisk.Disk{}
			for _, op := range []slowdisk.Op{slowdisk.Lock, slowdisk.Unlink, slowdisk.Open, slowdisk.Create} {
				disks[op] = slowdisk.Mount(t, m.Host, "/tmp/slow/"+string(op), slowdisk.Options{Locks: true})
			}
			disks[slowdisk.Lock].Add("x")
			// Of a lock that the server of a FUSE file system keeps it hears nothing when the C daemon closes the file: so here the
			// kernel keeps it.
			slowdisk.Mount(t, m.Host, "/tmp/slow/kept", slowdisk.Options{}).Add("x")
			disks[slowdisk.Open].Add("x")
			locks := m.hold()
			outside := m.startChecker(locks.paths...)
			must(t, locks.conn.Acquire("", "/tmp/slow/kept/x", 0))

			// A guest whose own connection hangs, and who holds something else.
			g := m.Spawn(host.ProcessOptions{})
			opens := g.Dial(m.Daemon, "lock")
			must(t, opens.Register(wire.VM(g.PID())))
			must(t, opens.Acquire("", host.Data+"/guest", wire.Autocreate))
			lockers, creates, releases := m.Client(noOne), m.Client(noOne), m.Client(noOneElse)
			must(t, releases.Acquire("", "/tmp/slow/unlink/x", wire.Autocreate))
			for _, h := range []struct {
				op    slowdisk.Op
				conn  *wire.Conn
				proc  uint32
				flags uint32
			}{
				{slowdisk.Lock, lockers, wire.ProcAcquire, 0}, {slowdisk.Unlink, releases, wire.ProcRelease, 0},
				{slowdisk.Open, opens, wire.ProcAcquire, 0}, {slowdisk.Create, creates, wire.ProcAcquire, wire.Autocreate},
			} {
				disks[h.op].Hang(h.op)
				must(t, h.conn.Send(wire.Request(h.proc, 99, wire.ResourceArgs("", "/tmp/slow/"+string(h.op)+"/x", h.flags))))
				disks[h.op].AwaitHang(h.op)
			}

			l := m.startPairs(4)
			begin := time.Now()
			m.hop(next)
			took := time.Since(begin)
			for op, disk := range disks {
				if disk.Waiting(op) == 0 {
					t.Errorf("%s does not hang any more", op)
				}
			}
			l.end()
			t.Logf("it took %v, and others waited for %v at most", took.Round(time.Millisecond), time.Duration(l.longest.Load()).Round(time.Millisecond))
			for i, c := range []*wire.Conn{opens, lockers, creates, releases} {
				if _, err := c.Recv(); !errors.Is(err, wire.ErrClosed) {
					t.Errorf("hung client %d: %v, want an end", i, err)
				}
			}
			told := map[string]bool{} // more than once if the upgrade is tried again, as for the half of a message
			for line := range strings.Lines(m.Stderr()) {
				if _, client, ok := strings.Cut(line, "a request hangs on a disk that does not answer"); ok && strings.Contains(line, " warning : ") {
					told[client] = true
				}
			}
			if len(told) != 4 {
				t.Errorf("requests of %d clients are said to hang, want 4", len(told))
			}
			locks.check(m)
			if host.Within(moment, g.Dead) || m.Free(host.Data+"/guest", true) {
				t.Fatal("the guest whose request hangs was killed, or has lost its other lock")
			}
			must(t, locks.conn.Ping())
			if next == host.Ours(t) {
				// And again: whoever hangs now has done so since before the last upgrade, or asks for the same.
				again := m.Client(noOneElse)
				must(t, again.Send(wire.Request(wire.ProcAcquire, 1, wire.ResourceArgs("", "/tmp/slow/open/x", 0))))
				eventually(t, "another open", func() bool { return disks[slowdisk.Open].Waiting(slowdisk.Open) == 2 })
				m.usr1()
				if _, err := again.Recv(); !errors.Is(err, wire.ErrClosed) {
					t.Errorf("another hung client: %v, want an end", err)
				}
			}

			other := m.Client(noOneElse)
			for op, disk := range disks {
				disk.Resume(op)
				path := "/tmp/slow/" + string(op) + "/x"
				eventually(t, path+" is free", func() bool { return other.Acquire("", path, wire.Autocreate) == nil })
				must(t, other.Release("", path))
			}
			refused(t, "the lock on the slow disk", other.Acquire("", "/tmp/slow/kept/x", 0))
			must(t, locks.conn.Release("", "/tmp/slow/kept/x"))
			must(t, other.Acquire("", "/tmp/slow/kept/x", 0))
			if next == host.Ours(t) {
				m.usr1()
				eventually(t, "all workers are gone, none is a zombie", func() bool { return len(m.children()) == 0 })
			}
			// Its locks end with the guest all the same.
			g.Kill()
			if next == host.Ours(t) {
				eventually(t, "release", func() bool { return !m.Exists(host.Data + "/guest") })
			}
			outside.Quiet()
		})
	}
}

// guestBesideDisk returns a disk at /tmp/slow for worker processes, with a file x, and a guest on his own connection.
func (m *machine) guestBesideDisk() (*slowdisk.Disk, *host.Process, *wire.Conn) {
	m.t.Helper()
	disk := slowdisk.Mount(m.t, m.Host, "/tmp/slow", slowdisk.Options{})
	disk.Add("x")
	g := m.Spawn(host.ProcessOptions{})
	c := g.Dial(m.Daemon, "lock")
	must(m.t, c.Register(wire.VM(g.PID())))
	return disk, g, c
}

// A guest whose request hangs on a disk, and who hangs up and goes on, is ended after a live upgrade, too.
func TestHungGuestHangsUp(t *testing.T) {
	t.Parallel()
	m := startKept(t)
	locks := m.hold()
	disk, g, c := m.guestBesideDisk()
	must(t, c.Acquire("", host.Data+"/guest", wire.Autocreate))
	disk.Hang(slowdisk.Open)
	must(t, c.Send(wire.Request(wire.ProcAcquire, 1, wire.ResourceArgs("", "/tmp/slow/x", 0))))
	disk.AwaitHang(slowdisk.Open)
	c.Close()
	m.usr1()
	eventually(t, "the end of the guest", g.Dead)
	eventually(t, "the end of its lock", func() bool { return !m.Exists(host.Data + "/guest") })
	disk.Resume(slowdisk.Open)
	locks.check(m)
}

// A guest has ended, and the release of its lock waits for a place at a disk that does not answer. It is done after a live upgrade, and after
// a crash, which keep nobody else waiting.
func TestReleaseWaitsForPlace(t *testing.T) {
	t.Parallel()
	for name, next := range map[string]func(*machine){"live upgrade": (*machine).usr1, "crash": (*machine).killKept} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := startKept(t)
			locks := m.hold()
			disk, g, c := m.guestBesideDisk()
			must(t, c.Acquire("", "/tmp/slow/x", 0))
			const places = 32 // at one mount
			disk.Hang(slowdisk.Open)
			disk.Hang(slowdisk.Flush)
			for i := range places {
				name := fmt.Sprint("y", i)
				disk.Add(name)
				must(t, m.Client(noOne).Send(wire.Request(wire.ProcAcquire, 1, wire.ResourceArgs("", "/tmp/slow/"+name, 0))))
			}
			eventually(t, "no place", func() bool { return disk.Waiting(slowdisk.Open) == places })
			g.Kill()
			eventually(t, "the hang-up", func() bool { return m.countLines("its owner has ended") > 0 })
			next(m)
			must(t, locks.conn.Ping())
			disk.AwaitHang(slowdisk.Flush)
			disk.Resume(slowdisk.Open)
			disk.Resume(slowdisk.Flush)
			eventually(t, "the end of the lock", func() bool { return m.Free("/tmp/slow/x", true) })
			if n := m.countLines("belongs to nobody"); n != 0 {
				t.Errorf("%d strays", n)
			}
			locks.check(m)
		})
	}
}

// A guest has ended, and one of his disks does not answer: to the release of its lock there, or to somebody who is just joining him. Where
// another disk was just as busy, the lock there ends as soon as that one answers.
func TestReleaseBesideDeadDisk(t *testing.T) {
	t.Parallel()
	for name, joined := range map[string]bool{"its lock is released": false, "somebody joins": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := startKept(t)
			disk, g, c := m.guestBesideDisk()
			dead := slowdisk.Mount(t, m.Host, "/tmp/dead", slowdisk.Options{})
			dead.Add("x")
			must(t, c.Acquire("", "/tmp/slow/x", wire.Shared))
			must(t, c.Acquire("", "/tmp/dead/x", wire.Shared))
			// A worker that has put a second holder's copy of the file into his cell closes its own, for which the kernel asks the disk.
			join := func(disk *slowdisk.Disk, path string) *wire.Conn {
				disk.Hang(slowdisk.Flush)
				other := m.Client(noOne)
				must(t, other.Send(wire.Request(wire.ProcAcquire, 1, wire.ResourceArgs("", path, wire.Shared))))
				disk.AwaitHang(slowdisk.Flush)
				return other
			}
			joins := join(disk, "/tmp/slow/x")
			if joined {
				join(dead, "/tmp/dead/x")
			}
			dead.Hang(slowdisk.Flush)
			g.Kill()
			if !joined {
				dead.AwaitHang(slowdisk.Flush)
			}
			// Who asks for something in his name sees that he has ended, if nobody has before.
			if m.Client(g.PID()).Acquire("", host.Data+"/guest", wire.Autocreate) == nil {
				t.Error("the dead got a lock")
			}
			disk.Resume(slowdisk.Flush)
			_, err := joins.Recv()
			must(t, err)
			must(t, joins.Release("", "/tmp/slow/x"))
			other := m.Client(noOneElse)
			eventually(t, "the end of the lock", func() bool { return other.Acquire("", "/tmp/slow/x", 0) == nil })
			dead.Resume(slowdisk.Flush)
		})
	}
}

// The C daemon gets the files themselves, and a close of one asks its disk: while that does not answer, nothing is handed over, and
// everybody is served.
func TestDeadDiskToC(t *testing.T) {
	t.Parallel()
	m := startKept(t)
	locks := m.hold()
	outside := m.startChecker(locks.paths...)
	l := m.startPairs(2)
	disk := slowdisk.Mount(t, m.Host, "/tmp/slow", slowdisk.Options{})
	disk.Fill("x")
	must(t, locks.conn.Acquire("", "/tmp/slow/x", 0))
	disk.Hang(slowdisk.Flush)
	disk.Hang(slowdisk.Read)
	m.turn(host.C(t))
	m.fails("the C daemon would wait for the disk of /tmp/slow/x")
	disk.Resume(slowdisk.Flush)
	disk.Resume(slowdisk.Read)
	l.end()
	m.handTo(m.pidOf(), host.C(t), locks.conn)
	locks.check(m)
	must(t, locks.conn.Release("", "/tmp/slow/x"))
	if !m.Free("/tmp/slow/x", true) {
		t.Error("the file is not free after its release by the C daemon")
	}
	outside.Quiet()
}

// The first lock on a disk is released while another disk is being asked: then the disk is asked by its next lock.
func TestDeadDiskToCLater(t *testing.T) {
	t.Parallel()
	m := startKept(t)
	locks := m.hold()
	first := slowdisk.Mount(t, m.Host, "/tmp/first", slowdisk.Options{})
	second := slowdisk.Mount(t, m.Host, "/tmp/second", slowdisk.Options{})
	first.Fill("x")
	must(t, locks.conn.Acquire("", "/tmp/first/x", 0))
	for _, name := range []string{"x", "y"} {
		second.Fill(name)
		must(t, locks.conn.Acquire("", "/tmp/second/"+name, 0))
	}
	m.turn(host.C(t))
	for {
		first.Hang(slowdisk.Read)
		failed := m.failures()
		m.send(unix.SIGUSR1)
		first.AwaitHang(slowdisk.Read)
		must(t, locks.conn.Release("", "/tmp/second/x"))
		second.Hang(slowdisk.Flush)
		second.Hang(slowdisk.Read)
		first.Resume(slowdisk.Read)
		eventually(t, "no upgrade", func() bool { return m.failures() > failed })
		second.Resume(slowdisk.Flush)
		second.Resume(slowdisk.Read)
		line := last(m.Stderr(), failureLine)
		if strings.Contains(line, "the C daemon would wait for the disk of /tmp/second/y") {
			break
		}
		if !strings.Contains(line, "/tmp/first/x") { // we were slow
			t.Fatalf("the log says: %s", line)
		}
		must(t, locks.conn.Acquire("", "/tmp/second/x", 0))
		must(t, locks.conn.Release("", "/tmp/second/y"))
		must(t, locks.conn.Acquire("", "/tmp/second/y", 0)) // behind the other one
	}
	locks.check(m)
}

// A note of what is locked that is just being written would outlive the hand-over to the C daemon, and tell of losses that were none. Also,
// the disk may hang, and exec with it.
func TestNoteHangsForC(t *testing.T) {
	t.Parallel()
	m := start(t, host.Ours(t), host.Options{})
	locks := m.hold()
	run := slowdisk.Mount(t, m.Host, "/run/libvirt", slowdisk.Options{}) // over the sockets; connections go on
	run.Hang(slowdisk.Create)
	must(t, locks.conn.Acquire("", host.Data+"/noted", wire.Autocreate))
	run.AwaitHang(slowdisk.Create)
	m.turn(host.C(t))
	m.fails("the note of what is locked is just being written")
	must(t, locks.conn.Release("", host.Data+"/noted"))
	run.Resume(slowdisk.Create)
}

// A disk that can't be asked, since no worker process can be started, counts as one that does not answer.
func TestDiskNotAskedForC(t *testing.T) {
	t.Parallel()
	m := start(t, host.Ours(t), host.Options{})
	program, err := os.ReadFile(host.Ours(t))
	must(t, err)
	const own = "/tmp/own"
	m.WriteFile(own, string(program), 0o755)
	m.hop(own)
	locks := m.hold()
	slowdisk.Mount(t, m.Host, "/tmp/slow", slowdisk.Options{}).Fill("x")
	must(t, locks.conn.Acquire("", "/tmp/slow/x", 0))
	m.Must(func() error { return os.Chmod(own, 0o644) })
	for _, worker := range m.childrenOfAll() {
		must(t, unix.Kill(worker, unix.SIGKILL))
	}
	m.turn(host.C(t))
	m.fails("whether the disk of /tmp/slow/x answers is not known")
	m.Must(func() error { return os.Chmod(own, 0o755) })
	must(t, locks.conn.Release("", "/tmp/slow/x"))
	locks.check(m)
}

// A call on a local disk that is stuck can't be left behind: the upgrade is put off, until the disk answers.
func TestStuckLocalDisk(t *testing.T) {
	t.Parallel()
	m := start(t, host.Ours(t), host.Options{})
	const dir, image = "/tmp/disk", "/tmp/image"
	m.Must(func() error {
		if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(image, nil, 0o600), os.Truncate(image, 16<<20)); err != nil {
			return err
		}
		for _, args := range [][]string{{"mkfs.ext4", "-q", image}, {"mount", "-o", "loop", image, dir}} {
			if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
				return fmt.Errorf("%q: %w\n%s", args, err, out)
			}
		}
		return nil
	})
	var disk int
	m.Must(func() (err error) {
		disk, err = unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		return err
	})
	freeze := func(request uint) error { return unix.IoctlSetInt(disk, request, 0) }
	const fifreeze, fithaw = 0xc0045877, 0xc0045878 // ioctl_fsfreeze(2)
	thawed := false
	t.Cleanup(func() {
		if !thawed {
			_ = freeze(fithaw)
		}
		unix.Close(disk)
		_ = m.Do(func() error { return unix.Unmount(dir, unix.MNT_DETACH) }) // frees the loop device
	})
	locks := m.hold()
	must(t, freeze(fifreeze))
	c := m.Client(noOne)
	must(t, c.Send(wire.Request(wire.ProcAcquire, 5, wire.ResourceArgs("", dir+"/x", wire.Autocreate))))
	eventually(t, "a call that is stuck", func() bool {
		for _, task := range m.tasks() {
			if strings.Contains(task, "D (disk sleep)") {
				return true
			}
		}
		return false
	})
	m.fails(dir + "/x waits for its disk")
	m.says(failureLine, "unanswered: client ")
	must(t, m.Client(noOneElse).Ping())
	locks.check(m)
	time.Sleep(time.Second)
	m.fails(dir + "/x has been waiting for its disk")
	locks.check(m)
	must(t, freeze(fithaw))
	thawed = true
	reply, err := c.Recv()
	must(t, err)
	must(t, reply.Err())
	m.usr1()
	must(t, c.Release("", dir+"/x"))
	locks.check(m)
}

// childrenOfAll are those of all threads of the daemon.
func (m *machine) childrenOfAll() (all []int) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", m.process()))
	must(m.t, err)
	for _, task := range tasks {
		b, _ := os.ReadFile(task) // it may just have ended
		for _, child := range strings.Fields(string(b)) {
			pid, err := strconv.Atoi(child)
			must(m.t, err)
			all = append(all, pid)
		}
	}
	return all
}

// tasks tells what each thread of the daemon is doing.
func (m *machine) tasks() (all []string) {
	dir := fmt.Sprintf("/proc/%d/task", m.process())
	entries, err := os.ReadDir(dir)
	must(m.t, err)
	for _, e := range entries {
		status, _ := os.ReadFile(dir + "/" + e.Name() + "/status") // it may just have ended
		all = append(all, string(status))
	}
	return all
}
