// SPDX-License-Identifier: LGPL-2.1-or-later

package weakness

import (
	"os"
	"strings"
	"testing"
	"time"

	"virtlockd/test/host"
	"virtlockd/test/slowdisk"
	"virtlockd/test/wire"
)

func TestMain(m *testing.M) { host.Main(m) }

// Owners whose process ids belong to no process: the kernel gives none above 4194304.
const (
	noOne     = 0x70000001
	noOneElse = 0x70000002
)

// moment is how long something is watched that must not happen.
const moment = 300 * time.Millisecond

func start(t *testing.T, o host.Options) (*host.Host, *host.Daemon) {
	t.Helper()
	h := host.New(t)
	return h, h.Start(host.Ours(t), o)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func touch(h *host.Host, path string) { h.WriteFile(path, "", 0o644) }

// refused checks for the answer that a resource is locked.
func refused(t *testing.T, what string, err error) {
	t.Helper()
	if !wire.IsLocked(err) {
		t.Errorf("%s: got %v, want 'is locked'", what, err)
	}
}

// eventually fails the test if a condition does not come true.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	if !host.Eventually(cond) {
		t.Fatalf("never: %s", what)
	}
}

// guest is a process that registered itself, as a virtual machine does, and holds a lock.
func guest(t *testing.T, h *host.Host, d *host.Daemon, o host.ProcessOptions, path string, flags uint32) (*host.Process, *wire.Conn) {
	t.Helper()
	p := h.Spawn(o)
	c := p.Dial(d, "lock")
	must(t, c.Register(wire.VM(p.PID())))
	if path != "" {
		must(t, c.Acquire("", path, flags))
	}
	return p, c
}

// works lets an unrelated client take and give up a lock a few times.
func works(t *testing.T, c *wire.Conn, path string) {
	t.Helper()
	for range 10 {
		must(t, c.Acquire("", path, wire.Autocreate))
		must(t, c.Release("", path))
	}
}

// A NEW that makes no lockspace is refused as CREATE_LOCKSPACE is, and leaves nothing that could hurt later.
func TestW01FailedNew(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	c := d.Client(noOne)
	touch(h, host.Data+"/f")
	h.Must(func() error { return os.Symlink("nowhere", host.Data+"/dangling") })
	for _, path := range []string{host.Data + "/f", host.Data + "/f/sub", host.Data + "/dangling", "/" + strings.Repeat("q", 300), "/proc/x"} {
		created, made := wire.AsError(c.CreateLockspace(path)), wire.AsError(c.New(path))
		if created == nil || made == nil || created.Error() != made.Error() {
			t.Errorf("%.40s: NEW says %v, CREATE_LOCKSPACE %v", path, made, created)
		}
		if again := wire.AsError(c.New(path)); again == nil || again.Error() != made.Error() {
			t.Errorf("%.40s: NEW again says %v", path, again)
		}
	}
	// The end of a guest is where the C daemon crashes.
	held := host.Data + "/held"
	must(t, c.Acquire("", held, wire.Autocreate))
	p, vm := guest(t, h, d, host.ProcessOptions{}, host.Data+"/g", wire.Autocreate)
	vm.Close()
	p.Gone()
	eventually(t, "guest's lock released", func() bool { return !h.Exists(host.Data + "/g") })
	if h.Free(held, false) {
		t.Error("lock is lost")
	}
	h.Must(func() error { return os.Remove(host.Data + "/f") })
	must(t, c.New(host.Data+"/f"))
	must(t, c.Acquire(host.Data+"/f", "x", wire.Autocreate))
}

// Owners that do not end when they are asked to, and zombies, keep nobody waiting.
func TestW03StubbornOwners(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	c := d.Client(noOne)
	var procs []*host.Process
	var conns []*wire.Conn
	for _, name := range []string{"/1", "/2", "/3"} {
		p, vm := guest(t, h, d, host.ProcessOptions{}, host.Data+name, wire.Autocreate)
		p.IgnoreTerm()
		procs, conns = append(procs, p), append(conns, vm)
	}
	for _, vm := range conns {
		vm.Close()
	}
	works(t, c, host.Data+"/mine")
	for i, p := range procs {
		if p.Dead() {
			t.Errorf("requests waited for the end of owner %d", i)
		}
	}
	for _, p := range procs {
		p.Gone()
	}
}

// A slow or hung disk delays only who asked for it, whatever the call is that hangs.
func TestW04HungDisk(t *testing.T) {
	t.Parallel()
	for _, c := range hungCalls {
		t.Run(string(c.op), func(t *testing.T) {
			t.Parallel()
			s := newHung(t, c)
			works(t, s.d.Client(noOneElse), host.Data+"/mine")
			must(t, s.d.Client(noOneElse).Ping())
			s.disk.Resume(c.op)
			m, err := s.conn.Recv()
			must(t, err)
			must(t, m.Err())
		})
	}
}

// An acquisition that ends after its client has gone is undone.
func TestW04GoneClient(t *testing.T) {
	t.Parallel()
	for _, c := range hungCalls {
		if c.proc != wire.ProcAcquire {
			continue
		}
		t.Run(string(c.op), func(t *testing.T) {
			t.Parallel()
			s := newHung(t, c)
			s.conn.Close()
			s.disk.Resume(c.op)
			other := s.d.Client(noOneElse)
			eventually(t, "resource is free", func() bool {
				return other.Acquire("", slow, c.flags) == nil
			})
		})
	}
}

// A daemon that is told to stop does not wait for a disk that never answers, and says what it left behind.
func TestW04StopWhileHung(t *testing.T) {
	t.Parallel()
	for _, c := range hungCalls {
		if c.op != slowdisk.Open && c.op != slowdisk.Unlink {
			continue
		}
		t.Run(string(c.op), func(t *testing.T) {
			t.Parallel()
			s := newHung(t, c)
			if got := s.d.Stop(); got < 0 {
				t.Errorf("daemon ended with %d", got)
			}
			if s.disk.Waiting(c.op) == 0 {
				t.Error("the disk had answered")
			}
			if !strings.Contains(s.d.Stderr(), slow) {
				t.Errorf("the log does not name the file:\n%s", s.d.Stderr())
			}
		})
	}
}

// Registration as another process, at will, is libvirtd's way. But a number is not a process.
func TestW16ReusedProcessID(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	a, b := host.Data+"/a", host.Data+"/b"

	// The first owner's child keeps its connection, so the daemon does not see a hang-up.
	x := h.Spawn(host.ProcessOptions{})
	c, _ := x.DialAndPassOn(d, "lock")
	must(t, c.Register(wire.VM(x.PID())))
	must(t, c.Acquire("", a, wire.Autocreate))
	x.Kill()
	x.Gone()
	eventually(t, "lock of a dead owner is given up, though its child has its connection", func() bool { return !h.Exists(a) })

	// The next one has its number.
	y, vm := guest(t, h, d, host.ProcessOptions{PID: x.PID()}, b, wire.Autocreate)
	x.Close() // the child goes
	c.Close() // and with this copy the connection
	if host.Within(moment, y.Dead) {
		t.Fatal("the end of an old connection killed a process that only has its owner's number")
	}
	if h.Free(b, false) {
		t.Error("the end of an old connection took the lock of another process")
	}
	must(t, vm.Release("", b))
}

// A lock taken by libvirtd for a guest that never connected ends with that guest.
func TestW17NamedOwner(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	a := host.Data + "/a"
	x := h.Spawn(host.ProcessOptions{})
	libvirtd := d.Client(x.PID())
	must(t, libvirtd.Acquire("", a, wire.Autocreate))
	libvirtd.Close()
	if host.Within(moment, x.Dead) {
		t.Fatal("owner was killed")
	}
	if h.Free(a, false) {
		t.Fatal("lock ends with the connection of another process")
	}
	x.Kill()
	eventually(t, "lock of a dead owner is given up", func() bool { return !h.Exists(a) })
}

// The number that a client in another namespace names may be its own here. It is not its owner all the same.
func TestW17OtherNamespaceOwnNumber(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	a := host.Data + "/a"
	proxy := h.Spawn(host.ProcessOptions{NewPIDNamespace: true})
	c := proxy.Dial(d, "lock")
	must(t, c.Register(wire.VM(proxy.PID())))
	must(t, c.Acquire("", a, wire.Autocreate))
	c.Close()
	if host.Within(moment, func() bool { return proxy.Dead() }) {
		t.Fatal("a proxy was killed for the guest that it spoke for")
	}
	proxy.Kill()
	if host.Within(moment, func() bool { return h.Free(a, false) }) {
		t.Fatal("lock was given up at the end of the proxy")
	}
}

// A number that was sent out of another process id namespace is nobody here, whoever has it.
func TestW17OtherNamespace(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	a := host.Data + "/a"
	bystander := h.Spawn(host.ProcessOptions{})
	proxy := h.Spawn(host.ProcessOptions{NewPIDNamespace: true})
	c := proxy.Dial(d, "lock")
	must(t, c.Register(wire.VM(bystander.PID())))
	must(t, c.Acquire("", a, wire.Autocreate))

	// A process of the same number, here, means nothing. The same for one who dies after it shows that its
	// death was seen and had no effect.
	witness := h.Spawn(host.ProcessOptions{})
	local := d.Client(witness.PID())
	must(t, local.Acquire("", host.Data+"/witness", wire.Autocreate))
	bystander.Kill()
	bystander.Gone()
	witness.Kill()
	eventually(t, "witness' lock is given up", func() bool { return !h.Exists(host.Data + "/witness") })
	if h.Free(a, false) {
		t.Fatal("lock was given up at the death of a process that only has its owner's number")
	}
	// Nor does the proxy's own end matter: it is not the owner.
	c.Close()
	proxy.Kill()
	if host.Within(moment, func() bool { return h.Free(a, false) }) {
		t.Fatal("lock was given up at the end of the proxy")
	}
	refused(t, "another owner", d.Client(0x70000001).Acquire("", a, wire.Autocreate))
}
