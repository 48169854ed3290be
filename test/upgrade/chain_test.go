// SPDX-License-Identifier: LGPL-2.1-or-later

package upgrade

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/slowdisk"
	"virtlockd/test/wire"
)

// owner registers under a name.
func (m *machine) owner(pid int, name string) *wire.Conn {
	m.t.Helper()
	c := m.Dial("lock")
	o := wire.VM(pid)
	o.Name = name
	must(m.t, c.Register(o))
	return c
}

// guest is a process that holds a lock by its own restricted connection.
type guest struct {
	*host.Process
	conn *wire.Conn
	path string
}

func (m *machine) guest(name string, flags uint32) guest {
	m.t.Helper()
	g := guest{Process: m.Spawn(host.ProcessOptions{}), path: host.Data + "/" + name}
	g.conn = g.Dial(m.Daemon, "lock")
	o := wire.VM(g.PID())
	o.Name = name
	must(m.t, g.conn.Register(o))
	must(m.t, g.conn.Acquire("", g.path, flags))
	must(m.t, g.conn.Restrict())
	return g
}

// From the C daemon to ours and back, again and again: everybody keeps his locks, which are never free in between, and owners that
// end are noticed by whoever is in charge.
func TestChain(t *testing.T) { bothForms(t, host.C(t), nil, chain) }

func chain(t *testing.T, m *machine) {
	locks := m.hold()
	var guests []guest
	for i := range 6 {
		guests = append(guests, m.guest(fmt.Sprint("guest", i), wire.Autocreate))
	}
	sharers := []guest{m.guest("disk", wire.Autocreate|wire.Shared), m.guest("disk", wire.Autocreate|wire.Shared)}
	admin := m.Dial("admin")
	must(t, admin.AdminOpen())
	outside := m.startChecker(locks.paths...)
	clients, err := admin.AdminClients(wire.LockServer)
	must(t, err)

	for i, binary := range []string{host.Ours(t), host.C(t), host.Ours(t), host.Ours(t), host.C(t), host.Ours(t)} {
		ours := binary == host.Ours(t)
		if !ours {
			// One that would end the C daemon if it were handed over as it is.
			c := m.Dial("lock")
			must(t, c.Ping())
			defer func() {
				must(t, c.Register(wire.VM(noOneElse)))
			}()
		}
		m.hop(binary)
		locks.check(m)
		for _, path := range locks.paths {
			for _, l := range m.Locks(m.Daemon, path) {
				if want := map[bool]string{true: "OFDLCK"}[ours]; ours && l.Kind != want {
					t.Errorf("hop %d: %s is locked by a lock of kind %s", i, path, l.Kind)
				}
			}
		}
		now, err := admin.AdminClients(wire.LockServer)
		must(t, err)
		if len(now) < len(clients)-i || now[0] != clients[0] {
			t.Errorf("hop %d: clients are %v, were %v", i, now, clients)
		}
		// One guest of those that are left ends, one by itself and the next by hanging up.
		g := guests[i]
		if i%2 == 0 {
			g.Kill()
		}
		g.conn.Close()
		eventually(t, "the end of a guest", func() bool { return g.Dead() && !m.Exists(g.path) })
		for _, rest := range guests[i+1:] {
			if rest.Dead() || m.Free(rest.path, true) {
				t.Errorf("hop %d: %s is dead or has lost its lock", i, rest.path)
			}
		}
		if m.Free(sharers[0].path, true) || !m.Free(sharers[0].path, false) {
			t.Errorf("hop %d: the shared disk is free, or exclusive", i)
		}
	}
	m.crash()
	locks.check(m)
	outside.Quiet()
	sharers[0].Kill()
	sharers[1].Kill()
	eventually(t, "the end of those who shared", func() bool { return !m.Exists(sharers[0].path) })
	locks.release(m)
	if n := m.countLines(" error : ", "live upgrade"); n > 0 {
		t.Errorf("%d errors, one is: %s", n, last(m.Stderr(), "live upgrade"))
	}
}

// What the C daemon releases of what it got from us is free in the kernel.
func TestReleaseByC(t *testing.T) { bothForms(t, host.Ours(t), nil, releaseByC) }

func releaseByC(t *testing.T, m *machine) {
	disk := slowdisk.Mount(t, m.Host, "/tmp/slow", slowdisk.Options{})
	disk.Add("remote")
	locks := m.hold()
	must(t, locks.conn.Acquire("", "/tmp/slow/remote", 0))
	must(t, locks.conn.Acquire("", "/tmp/slow/remote-lease", wire.Autocreate))
	locks.paths = append(locks.paths, "/tmp/slow/remote", "/tmp/slow/remote-lease")
	m.hop(host.C(t))
	locks.check(m)
	locks.release(m)
	// And the other way round, from a fresh start: files that are remote for us.
	for _, path := range locks.paths[len(locks.paths)-2:] {
		must(t, locks.conn.Acquire("", path, wire.Autocreate))
	}
	m.hop(host.Ours(t))
	for _, path := range []string{"/tmp/slow/remote", "/tmp/slow/remote-lease"} {
		if m.Free(path, true) {
			t.Errorf("%s is free", path)
		}
	}
	for _, fd := range m.open("/tmp/slow") {
		t.Errorf("descriptor %s of a file on a disk that may hang is open", fd)
	}
	must(t, locks.conn.Release("", "/tmp/slow/remote"))
	if !m.Free("/tmp/slow/remote", true) {
		t.Error("the remote file is not free")
	}
}

// open returns the links of descriptors that the daemon has open below a path.
func (m *machine) open(below string) (found []string) {
	m.t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd/", m.process())
	entries, err := os.ReadDir(dir)
	must(m.t, err)
	for _, e := range entries {
		if link, err := os.Readlink(dir + e.Name()); err == nil && strings.HasPrefix(link, below) {
			found = append(found, e.Name()+": "+link)
		}
	}
	return found
}

// The C daemon looks at nothing before it hands over. A configuration that is broken by then costs no lock: limits come with the state,
// the rest is as by default until the file is mended.
func TestBrokenConfigurationAfterC(t *testing.T) {
	t.Parallel()
	for name, broken := range map[string]string{"no configuration": "max_clients = \n{", "out of range": "max_clients = 0\n", "of another type": "log_level = \"x\"\n"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := start(t, host.C(t), host.Options{Config: "max_clients = 123\n"})
			locks := m.hold()
			outside := m.startChecker(locks.paths...)
			g := m.guest("guest", wire.Autocreate)
			admin := m.Dial("admin")
			must(t, admin.AdminOpen())
			m.WriteFile("/tmp/virtlockd.conf", broken, 0o644)
			m.hop(host.Ours(t))
			m.says(" error : ", "goes on for the sake of its locks", "/tmp/virtlockd.conf")
			must(t, locks.conn.Ping())
			locks.check(m)
			if now := limit(t, admin); now != 123 {
				t.Errorf("the limit is %d, was 123", now)
			}
			outside.Quiet()
			m.turn(host.Ours(t))
			m.Signal(syscall.SIGHUP) // is no way to end it, either
			m.Signal(syscall.SIGUSR1)
			m.says(" error : ", failureLine)
			m.WriteFile("/tmp/virtlockd.conf", "max_clients = 321\nlog_level = 2\n", 0o644)
			m.Signal(syscall.SIGHUP)
			if !host.Eventually(func() bool { return limit(t, admin) == 321 }) {
				t.Errorf("the limit is %d when the configuration is mended, want 321", limit(t, admin))
			}
			m.usr1()
			g.Kill()
			eventually(t, "release", func() bool { return !m.Exists(g.path) })
			locks.release(m)
		})
	}
}

// W5: the C daemon lets two guests own one file under two names. Both are kept, nobody else is let in, and the log names both.
func TestW05TwoOwners(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name        string
		first, next uint32
	}{{"exclusive", 0, 0}, {"shared, then exclusive", wire.Shared, 0}, {"exclusive, then shared", 0, wire.Shared}} {
		t.Run(tt.name, func(t *testing.T) {
			bothForms(t, host.C(t), nil, func(t *testing.T, m *machine) {
				a, b, third := host.Data+"/a", host.Data+"/b", host.Data+"/third"
				m.touch(a)
				m.Must(func() error { return errors.Join(os.Link(a, b), os.Link(a, third)) })
				one, two := m.guestOn("one", a, tt.first), m.guestOn("two", b, tt.next)
				m.hop(host.Ours(t))
				m.says(" error : ", "two guests own one file", "one", "two", fmt.Sprint("pid=", one.PID()), fmt.Sprint("pid=", two.PID()))
				if n := m.countLines(" error : "); n != 1 {
					t.Errorf("%d errors, want 1", n)
				}
				other := m.owner(noOne, "other")
				for _, path := range []string{a, b, third} {
					refused(t, path, other.Acquire("", path, 0))
					refused(t, path+", shared", other.Acquire("", path, wire.Shared))
				}
				if host.Within(moment, func() bool { return one.Dead() || two.Dead() }) {
					t.Fatal("somebody was killed")
				}
				if tt.first == 0 && m.Free(a, false) {
					t.Error("the file is free for sharers")
				}
				m.usr1() // they stay so
				m.crash()
				// When one has ended the other one still has it, alone.
				one.Kill()
				eventually(t, "release of the first", func() bool { return m.countLines("lock released: its owner has ended", a) == 1 })
				if m.Free(a, true) || two.Dead() {
					t.Error("the other one is dead or has lost the lock")
				}
				refused(t, "the name that is left", other.Acquire("", b, 0))
				refused(t, "the name that was released", other.Acquire("", a, 0))
				two.Kill()
				eventually(t, "release of the second", func() bool { return m.Free(a, true) })
				must(t, other.Acquire("", third, 0))
			})
		})
	}
}

// guestOn is guest for a file that is there.
func (m *machine) guestOn(name, path string, flags uint32) guest {
	m.t.Helper()
	g := guest{Process: m.Spawn(host.ProcessOptions{}), path: path}
	g.conn = g.Dial(m.Daemon, "lock")
	o := wire.VM(g.PID())
	o.Name = name
	must(m.t, g.conn.Register(o))
	must(m.t, g.conn.Acquire("", path, flags))
	return g
}

// W6: the C daemon loses a lock when it closes another descriptor of the file. If nobody has it yet it is taken again; if somebody has
// it the loser is told of in the log and gets it when it is free. Nobody else is let in.
func TestW06LostLock(t *testing.T) {
	t.Parallel()
	for _, taken := range []bool{false, true} {
		t.Run(fmt.Sprintf("taken %t", taken), func(t *testing.T) {
			bothForms(t, host.C(t), nil, func(t *testing.T, m *machine) {
				a, alias := host.Data+"/a", host.Data+"/alias"
				m.touch(a)
				m.Must(func() error { return os.Link(a, alias) })
				loser := m.guestOn("loser", a, 0)
				must(t, m.owner(noOne, "x").Create("", alias))
				if !m.Free(a, true) {
					t.Fatal("the C daemon has not lost it")
				}
				var stranger *host.Process
				if taken {
					stranger = m.Spawn(host.ProcessOptions{})
					stranger.Lock(a, "W", 0, 1)
				}
				m.hop(host.Ours(t))
				if taken {
					m.says(" error : ", "somebody else has it now", a, "loser", fmt.Sprint("pid=", loser.PID()), fmt.Sprint("other_pid=", stranger.PID()))
				} else {
					m.says(" error : ", "was taken again", a, "loser")
					m.lost(a)
				}
				if host.Within(moment, func() bool { return m.countLines(" error : ") > 1 }) {
					t.Error("it is told more than once")
				}
				other := m.owner(noOneElse, "other")
				refused(t, "another owner", other.Acquire("", a, 0))
				refused(t, "another name", other.Acquire("", alias, 0))
				if taken {
					stranger.Unlock()
				}
				eventually(t, "the loser has it", func() bool { return !m.Free(a, false) })
				if host.Within(moment, loser.Dead) {
					t.Fatal("it was killed")
				}
				loser.Kill()
				eventually(t, "release", func() bool { return m.Free(a, true) })
			})
		})
	}
}

// W8: the C daemon forgets one of two shared locks of an owner that has ended. It stays until somebody releases it, and the log says so.
func TestW08LeakedLock(t *testing.T) { bothForms(t, host.C(t), nil, leakedLock) }

func leakedLock(t *testing.T, m *machine) {
	a := host.Data + "/a"
	m.touch(a)
	p := m.guestOn("gone", a, wire.Shared)
	must(t, p.conn.Acquire("", a, wire.Shared))
	p.conn.Close()
	p.Gone()
	if m.Free(a, true) {
		t.Fatal("the C daemon has not leaked it")
	}
	m.hop(host.Ours(t))
	m.says(" warning : ", "locks are held for a process that there is not", fmt.Sprint("pid=", p.PID()))
	m.crash()
	other := m.owner(noOne, "other")
	refused(t, "another owner", other.Acquire("", a, 0))
	must(t, m.owner(p.PID(), "gone").Release("", a))
	must(t, other.Acquire("", a, 0))
}

// A lock whose file was replaced or removed beneath it goes on.
func TestReplacedFile(t *testing.T) { bothForms(t, host.C(t), nil, replacedFile) }

func replacedFile(t *testing.T, m *machine) {
	a := host.Data + "/a"
	m.touch(a)
	c := m.owner(noOne, "one")
	must(t, c.Acquire("", a, 0))
	m.Must(func() error { return os.Rename(a, host.Data+"/old") })
	m.touch(a)
	for _, binary := range []string{host.Ours(t), host.Ours(t), host.C(t), host.Ours(t)} {
		m.hop(binary)
		if m.Free(host.Data+"/old", true) || !m.Free(a, true) {
			t.Error("the lock is on another file")
		}
		refused(t, "the same name", m.owner(noOneElse, "other").Acquire("", a, 0))
	}
	m.crash()
	if m.Free(host.Data+"/old", true) || !m.Free(a, true) {
		t.Error("after a crash the lock is on another file")
	}
	if n := m.countLines(" error : ", "live upgrade"); n > 0 {
		t.Errorf("errors: %s", last(m.Stderr(), "live upgrade"))
	}
	must(t, c.Release("", a))
	if !m.Free(host.Data+"/old", true) {
		t.Error("the file is not free")
	}
}

// The C daemon reads no more than 10 MiB of state: what is more is not handed to it, but to ours.
func TestTooBigForC(t *testing.T) { bothForms(t, host.Ours(t), nil, tooBigForC) }

func tooBigForC(t *testing.T, m *machine) {
	dir := host.Data + strings.Repeat("/"+strings.Repeat("d", 200), 18)
	m.Must(func() error { return os.MkdirAll(dir, 0o755) })
	c := m.owner(noOne, "one")
	const locks = 1500
	name := func(i int) string { return fmt.Sprintf("%s/%0200d", dir, i) }
	for i := range locks {
		must(t, c.Acquire("", name(i), wire.Autocreate))
	}
	m.turn(host.C(t))
	m.fails("more than the C daemon reads")
	for i := range locks {
		if m.Free(name(i), true) {
			t.Fatalf("lock %d is free", i)
		}
	}
	m.hop(host.Ours(t))
	m.crash()
	for i := range locks {
		if m.Free(name(i), true) {
			t.Fatalf("lock %d is free", i)
		}
	}
	for i := range locks / 2 {
		must(t, c.Release("", name(i)))
	}
	m.hop(host.C(t))
	refused(t, "the last one", m.owner(noOneElse, "other").Acquire("", name(locks-1), 0))
}

// The C daemon gets as many descriptors as we may have, not as many as we were started with.
func TestFileLimitForC(t *testing.T) { bothForms(t, host.Ours(t), nil, fileLimitForC) }

func fileLimitForC(t *testing.T, m *machine) {
	limit := func() (l unix.Rlimit) {
		must(t, unix.Prlimit(m.process(), unix.RLIMIT_NOFILE, nil, &l))
		return l
	}
	l := limit()
	c := m.owner(noOne, "one")
	for i := range 200 {
		must(t, c.Acquire("", fmt.Sprint(host.Data, "/", i), wire.Autocreate))
	}
	l.Cur = 100
	must(t, unix.Prlimit(m.process(), unix.RLIMIT_NOFILE, &l, nil))
	for _, binary := range []string{host.C(t), host.Ours(t), host.Ours(t), host.C(t)} {
		m.hop(binary)
		if now := limit(); now.Cur != l.Max {
			t.Errorf("at most %d files can be open, could be %d", now.Cur, l.Max)
		}
		other := m.owner(noOneElse, "other")
		must(t, other.Acquire("", host.Data+"/more", wire.Autocreate))
		must(t, other.Release("", host.Data+"/more"))
		other.Close()
	}
}

// The C daemon can't be given half a message. If the other half comes soon the upgrade waits for it, else that connection ends.
func TestHalfRequestForC(t *testing.T) { bothForms(t, host.Ours(t), nil, halfRequestForC) }

func halfRequestForC(t *testing.T, m *machine) {
	locks := m.hold()
	frame := wire.Request(wire.ProcAcquire, 5, wire.ResourceArgs("", host.Data+"/half", wire.Autocreate))
	waits := func() int { return m.countLines("live upgrade is tried again", "half received") }
	for tries := 1; ; tries++ {
		soon, never := m.owner(noOne, "soon"), m.owner(noOneElse, "never")
		for _, c := range []*wire.Conn{soon, never} {
			must(t, c.Send(frame[:30]))
			must(t, m.owner(noOne, "fence").Ping())
		}
		m.turn(host.C(t))
		mark, waited := m.mark(), waits()
		m.send(syscall.SIGUSR1)
		eventually(t, "the upgrade waits for the other half", func() bool { return waits() > waited })
		// It waits for some 80 ms. The daemon may not read what is sent later, or we may stand still for so long.
		sent := soon.Send(frame[30:])
		m.await(mark)
		m.isC = true
		if _, err := never.Recv(); !errors.Is(err, wire.ErrClosed) {
			t.Errorf("half a request is answered: %v", err)
		}
		m.says(" warning : ", "a client's connection ends", "30 bytes")
		reply, err := soon.Recv()
		if sent == nil && err == nil {
			must(t, reply.Err())
			must(t, soon.Release("", host.Data+"/half"))
			break
		}
		if tries == 10 {
			t.Fatalf("the upgrade does not wait for the other half of a request: %v, %v", sent, err)
		}
		m.hop(host.Ours(t))
	}
	locks.check(m)
}

// The C daemon ends when it is to write or read a name that is not UTF-8. The name of a guest is made so; the name of a lock can't be
// changed, so it is not handed over while such a one is held. Ours takes both.
func TestOddNames(t *testing.T) { bothForms(t, host.Ours(t), nil, oddNames) }

func oddNames(t *testing.T, m *machine) {
	g := m.guest("g\xff\xfe", wire.Autocreate)
	odd, path := m.owner(noOne, "odd \x01\"\\\xc3"), host.Data+"/\xffdisk\n\""
	must(t, odd.Acquire("", path, wire.Autocreate))
	for range 2 {
		m.usr1()
		refused(t, "a lock with an odd name", m.owner(noOneElse, "other").Acquire("", path, wire.Autocreate))
		m.says("domain=other")
	}
	m.crash()
	refused(t, "a lock with an odd name", m.owner(noOneElse, "other").Acquire("", path, wire.Autocreate))
	m.turn(host.C(t))
	m.fails("a name that JSON for the C daemon cannot hold")
	m.hop(host.Ours(t))
	must(t, odd.Release("", path))
	m.turn(host.C(t))
	m.fails("a name that JSON for the C daemon cannot hold") // the guest's
	must(t, m.owner(g.PID(), "libvirtd").Release("", g.path))
	m.hop(host.C(t))
	must(t, odd.Ping())
	must(t, odd.Acquire("", host.Data+"/plain", wire.Autocreate))
	m.hop(host.Ours(t))
	if g.Dead() {
		t.Error("the guest was killed")
	}
	must(t, odd.Release("", host.Data+"/plain"))
	must(t, g.conn.Ping())
}

// Whoever looks at the daemon's descriptors holds them for an instant, also those that exec has just closed. The C daemon must get the
// lock on its pid file all the same, without which it would end.
func TestWatched(t *testing.T) { bothForms(t, host.Ours(t), nil, watched) }

func watched(t *testing.T, m *machine) {
	locks := m.hold()
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		dir := fmt.Sprintf("/proc/%d/fd/", m.process())
		for fd := 0; ; fd = (fd + 1) % 32 {
			select {
			case <-stop:
				return
			default:
				_, _ = os.Readlink(dir + fmt.Sprint(fd)) // there may be none
			}
		}
	}()
	for range 8 {
		m.hop(host.C(t))
		m.hop(host.Ours(t))
	}
	close(stop)
	<-stopped
	locks.check(m)
}
