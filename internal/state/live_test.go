// SPDX-License-Identifier: LGPL-2.1-or-later

package state

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// The tests of this file run the C daemon. What it execs on SIGUSR1, or what execs it, is this test binary.

const (
	partEnv   = "VIRTLOCKD_STATE_TEST_PART"
	caseEnv   = "VIRTLOCKD_STATE_TEST_CASE"
	cDaemon   = "/usr/sbin/virtlockd"
	stateFile = "/run/virtlockd-restart-exec.json"
	successor = "/tmp/successor" // the test binary
	captured  = "/tmp/captured"  // the state file as the C daemon wrote it
	order     = "/tmp/order"     // what relay shall do
	spec      = "/tmp/spec"      // what handOver shall hand over
)

func TestMain(m *testing.M) {
	var err error
	switch part := os.Getenv(partEnv); part {
	case "":
		host.Main(m)
		return
	case "relay":
		err = relay()
	case "handover":
		err = handOver()
	default:
		err = fmt.Errorf("no part is called %q", part)
	}
	// Either part ends in another program, or here.
	fmt.Fprintf(os.Stderr, "part of a test: %v\n", err)
	os.Exit(70)
}

// relay is what the C daemon execs: it reads the state, keeps a copy of the file, writes the state anew, and execs the
// C daemon again.
func relay() error {
	data, err := Read(stateFile)
	if err != nil {
		return err
	}
	if err := errors.Join(Remove(stateFile), Write(captured+".part", data)); err != nil {
		return err
	}
	how, err := os.ReadFile(order)
	if err != nil {
		return err
	}
	if string(how) == "end" {
		if err := os.Rename(captured+".part", captured); err != nil {
			return err
		}
		os.Exit(0)
	}
	s, problems, err := Decode(data, int32(os.Getpid()))
	if err != nil {
		return err
	}
	if len(problems) > 0 {
		return fmt.Errorf("problems: %v", problems)
	}
	if string(how) == "accept" {
		// The listening socket does not block.
		listen := s.Lock.Services[0].Sockets[0].FD
		if _, err := unix.Poll([]unix.PollFd{{Fd: listen, Events: unix.POLLIN}}, int(host.Patience.Milliseconds())); err != nil {
			return err
		}
		fd, err := accept(listen)
		if err != nil {
			return err
		}
		s.Lock.Clients = append(s.Lock.Clients, Client{ID: s.Lock.NextClientID, FD: fd, MaxRequests: 1, Self: None})
		s.Lock.NextClientID++
	}
	r := C
	if string(how) == "ours" {
		// Which the C daemon reads as well.
		r = Ours
		for i := range s.Lock.Clients {
			s.Lock.Clients[i].Uptime = 1
		}
		s.LogFilters, s.Upgrades = new(string), 3
		for i := range s.Default {
			s.Default[i].File = File{Dev: 3, Ino: 5, Remote: true}
		}
	}
	if data, err = Encode(s, r); err != nil {
		return err
	}
	if err := errors.Join(Write(stateFile, data), os.Rename(captured+".part", captured)); err != nil {
		return err
	}
	return syscall.Exec(cDaemon, os.Args, os.Environ())
}

// accept returns a connection that stays open over exec, and does not block.
func accept(listen int32) (int32, error) {
	fd, _, err := unix.Accept4(int(listen), unix.SOCK_NONBLOCK)
	return int32(fd), os.NewSyscallError("accept4", err)
}

// handOver plays a daemon that hands over to the C daemon: it listens, has the clients and locks of a snapshot, and
// execs. The first byte of the file says for whom it is written.
func handOver() error {
	data, err := os.ReadFile(spec)
	if err != nil {
		return err
	}
	s, _, err := Decode(data[1:], 1)
	if err != nil {
		return err
	}
	s.PID = int32(os.Getpid())
	unix.Umask(0o077)
	if err := os.Mkdir("/run/libvirt", 0o755); err != nil {
		return err
	}
	for _, srv := range []struct {
		path string
		*Server
	}{{"/run/libvirt/virtlockd-admin-sock", s.Admin}, {"/run/libvirt/virtlockd-sock", s.Lock}} {
		if srv.Server == nil {
			continue
		}
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: srv.path}), unix.Listen(fd, 30)); err != nil {
			return err
		}
		srv.Services = []Service{{MaxRequests: 1, Sockets: []Socket{{FD: int32(fd), Unlink: true}}}}
		for i := range srv.Clients {
			if srv.Clients[i].FD, err = accept(int32(fd)); err != nil {
				return err
			}
		}
		if err := unix.SetNonblock(fd, true); err != nil {
			return err
		}
	}
	for _, rs := range s.spaces() {
		for i := range rs {
			if rs[i].FD == NoFD {
				continue
			}
			fd, err := unix.Open(rs[i].Path, unix.O_RDWR|unix.O_CREAT, 0o600)
			if err != nil {
				return &os.PathError{Op: "open", Path: rs[i].Path, Err: err}
			}
			lock := unix.Flock_t{Type: unix.F_WRLCK, Len: 1}
			if rs[i].Flags&1 != 0 {
				lock.Type = unix.F_RDLCK
			}
			if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lock); err != nil {
				return &os.PathError{Op: "lock", Path: rs[i].Path, Err: err}
			}
			rs[i].FD = int32(fd)
		}
	}
	if i := slices.IndexFunc(hurdles, func(h hurdle) bool { return h.name == os.Getenv(caseEnv) }); i >= 0 {
		hurdles[i].change(s)
	}
	// Also what Encode would refuse.
	if err := Write(stateFile, encode(nil, s, Reader(data[0])).b); err != nil {
		return err
	}
	return syscall.Exec(cDaemon, os.Args, os.Environ())
}

// machine is a host with a C daemon.
type machine struct {
	*host.Host
	*host.Daemon
	t testing.TB
}

// install puts the test binary where the daemon will exec it.
func install(t testing.TB) *host.Host {
	t.Helper()
	h := host.New(t)
	host.C(t)
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	h.WriteFile(successor, string(self), 0o755)
	return h
}

func start(t testing.TB) machine {
	t.Helper()
	h := install(t)
	return machine{h, h.Start(cDaemon, host.Options{Argv0: successor, Env: []string{partEnv + "=relay"}}), t}
}

// hop makes the C daemon hand over to relay, and returns what it wrote.
func (m machine) hop(how string) []byte {
	m.t.Helper()
	m.Must(func() error { return Remove(captured) })
	m.WriteFile(order, how, 0o600)
	m.Signal(syscall.SIGUSR1)
	if !host.Eventually(func() bool { return m.Exists(captured) || !m.Alive() }) || !m.Exists(captured) {
		m.t.Fatalf("no state came\n%s", host.Shorten(m.Stderr()))
	}
	return []byte(m.ReadFile(captured))
}

// fake is the process id of an owner that does not exist.
const fake = 0x70000001

func owned(pid uint32, name string) wire.Owner {
	o := wire.VM(int(pid))
	o.Name, o.ID = name, 9
	return o
}

// ok fails the test if a call failed.
func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (m machine) client(o wire.Owner) *wire.Conn {
	m.t.Helper()
	c := m.Dial("lock")
	ok(m.t, c.Register(o))
	return c
}

// scene is a state that a C daemon is brought into.
type scene struct {
	name string
	play func(m machine) []*wire.Conn
	// What the state then has.
	clients               []string // restricted and owner, in the order of ids
	resources             []string // lockspace, name, flags and owners, sorted
	spaces                int
	held                  []string // files
	firstSpace, firstOwns string   // a resource of the first client
}

var scenes = []scene{
	{
		name: "an administrator alone",
		play: func(m machine) []*wire.Conn {
			admin := m.Dial("admin")
			ok(m.t, admin.AdminOpen())
			return []*wire.Conn{admin}
		},
	},
	{
		name: "clients without locks",
		play: func(m machine) []*wire.Conn {
			a, b := m.client(owned(fake, "a")), m.client(owned(0xffffffff, "b\"\\\b\f\n\r\t\x01\x1f\x7fñ\U0001F600"))
			ok(m.t, b.Restrict())
			c := m.client(owned(0x80000000, ""))
			d := m.client(owned(0, "xen"))
			return []*wire.Conn{a, b, c, d}
		},
		clients: []string{
			"false 1879048193 a", "true -1 b\"\\\b\f\n\r\t\x01\x1f\x7fñ\U0001F600", "false -2147483648 ", "false 0 xen",
		},
	},
	{
		name: "locks of all kinds",
		play: func(m machine) []*wire.Conn {
			a, b := m.client(owned(fake, "a")), m.client(owned(fake+1, "b"))
			neg := m.client(owned(0xfffffffe, "negative"))
			for _, dir := range []string{"/ls", "/empty", "/odd \"\\\t\x02/é"} {
				ok(m.t, a.New(host.Data+dir))
			}
			m.WriteFile(host.Data+"/plain", "", 0o600)
			ok(m.t, a.Acquire("", host.Data+"/plain", 0))
			ok(m.t, a.Acquire("", host.Data+"/auto", wire.Autocreate))
			for _, c := range []*wire.Conn{a, b, b, neg} {
				ok(m.t, c.Acquire(host.Data+"/ls", "shared", wire.Autocreate|wire.Shared))
			}
			ok(m.t, b.Acquire(host.Data+"/odd \"\\\t\x02/é", "n\x1fñ\"", wire.Autocreate))
			ok(m.t, b.Restrict())
			return []*wire.Conn{a, b, neg}
		},
		clients: []string{"false 1879048193 a", "true 1879048194 b", "false -2 negative"},
		resources: []string{
			" /tmp/vlv/auto 2 [1879048193]",
			" /tmp/vlv/plain 0 [1879048193]",
			"/tmp/vlv/ls shared 3 [1879048193 1879048194 1879048194 -2]",
			"/tmp/vlv/odd \"\\\t\x02/é n\x1fñ\" 2 [1879048194]",
		},
		spaces:    3,
		held:      []string{"/plain", "/auto", "/ls/shared"},
		firstOwns: host.Data + "/auto",
	},
	{
		name: "many",
		play: func(m machine) []*wire.Conn {
			var cs []*wire.Conn
			for i := range 100 {
				c := m.client(owned(fake+uint32(i), fmt.Sprint("guest", i)))
				if i == 0 {
					ok(m.t, c.New(host.Data+"/ls"))
				}
				ok(m.t, c.Acquire(host.Data+"/ls", fmt.Sprintf("%064x", i), wire.Autocreate))
				ok(m.t, c.Restrict())
				cs = append(cs, c)
			}
			return cs
		},
		clients: func() (s []string) {
			for i := range 100 {
				s = append(s, fmt.Sprint("true ", fake+i, " guest", i))
			}
			return s
		}(),
		resources: func() (s []string) {
			for i := range 100 {
				s = append(s, fmt.Sprintf("/tmp/vlv/ls %064x 2 [%d]", i, fake+i))
			}
			return s
		}(),
		spaces:     1,
		held:       []string{fmt.Sprintf("/ls/%064x", 0), fmt.Sprintf("/ls/%064x", 99)},
		firstSpace: host.Data + "/ls", firstOwns: fmt.Sprintf("%064x", 0),
	},
}

// check compares a decoded state with what the scene says.
func (sc *scene) check(t testing.TB, s *Snapshot) {
	t.Helper()
	var clients, resources []string
	for _, c := range s.Lock.Clients {
		if !c.Registered {
			t.Errorf("client %d is not registered", c.ID)
		}
		clients = append(clients, fmt.Sprint(c.Restricted, " ", c.Owner.PID, " ", c.Owner.Name))
	}
	if !slices.IsSortedFunc(s.Lock.Clients, func(a, b Client) int { return cmp.Compare(a.ID, b.ID) }) {
		t.Error("clients are not in the order of their ids")
	}
	for dir, rs := range s.spaces() {
		for _, r := range rs {
			var pids []int32
			for _, o := range r.Owners {
				pids = append(pids, s.Owners[o].PID)
			}
			if !r.Held || r.FD == NoFD || !strings.HasSuffix(r.Path, r.Name) || !strings.HasPrefix(r.Path, dir) {
				t.Errorf("resource is %+v", r)
			}
			resources = append(resources, fmt.Sprint(dir, " ", r.Name, " ", r.Flags, " ", pids))
		}
	}
	slices.Sort(resources)
	if diff := gocmp.Diff(sc.clients, clients); diff != "" {
		t.Errorf("clients (-want +got):\n%s", diff)
	}
	if diff := gocmp.Diff(sc.resources, resources); diff != "" {
		t.Errorf("resources (-want +got):\n%s", diff)
	}
	if len(s.Lockspaces) != sc.spaces {
		t.Errorf("%d lockspaces, want %d", len(s.Lockspaces), sc.spaces)
	}
}

// sorted puts a state into an order that does not depend on the C daemon's hash tables.
func sorted(s *Snapshot) *Snapshot {
	byName := func(a, b Resource) int { return cmp.Compare(a.Name, b.Name) }
	pids := func(rs []Resource) {
		for i := range rs {
			for j := range rs[i].Owners {
				// Places differ with the order; nobody else uses them here.
				rs[i].Owners[j] = s.Owners[rs[i].Owners[j]].PID
			}
		}
		slices.SortFunc(rs, byName)
	}
	for _, rs := range s.spaces() {
		pids(rs)
	}
	slices.SortFunc(s.Lockspaces, func(a, b Lockspace) int { return cmp.Compare(a.Dir, b.Dir) })
	slices.SortFunc(s.Owners, func(a, b Owner) int { return cmp.Compare(a.PID, b.PID) })
	return s
}

// What the C daemon writes is read, and written again for it byte by byte.
func TestFromC(t *testing.T) {
	t.Parallel()
	for i := range scenes {
		sc := &scenes[i]
		t.Run(sc.name, func(t *testing.T) {
			t.Parallel()
			m := start(t)
			sc.play(m)
			data := m.hop("end")
			if status := m.Wait(); status != 0 {
				t.Fatalf("the relay ends with %d\n%s", status, m.Stderr())
			}
			s := mustDecode(t, data, int32(m.PID()))
			sc.check(t, s)
			again, err := Encode(s, C)
			ok(t, err)
			if diff := gocmp.Diff(compact(t, data), string(again)); diff != "" {
				t.Errorf("file (-C's +ours):\n%s", diff)
			}
		})
	}
}

// The C daemon goes on with what was decoded and encoded again, in either form, and has the same state
// afterwards.
func TestThroughC(t *testing.T) {
	t.Parallel()
	for i := range scenes {
		sc := &scenes[i]
		for _, how := range []string{"c", "ours"} {
			t.Run(sc.name+"/"+how, func(t *testing.T) {
				t.Parallel()
				m := start(t)
				clients := sc.play(m)
				first := mustDecode(t, m.hop(how), int32(m.PID()))
				for _, c := range clients {
					ok(t, c.Ping())
				}
				for _, file := range sc.held {
					if m.Free(host.Data+file, true) {
						t.Errorf("%s is free", file)
					}
				}
				second := mustDecode(t, m.hop(how), int32(m.PID()))
				sc.check(t, second)
				if diff := gocmp.Diff(sorted(first), sorted(second)); diff != "" {
					t.Errorf("state (-before +after):\n%s", diff)
				}
				if sc.firstOwns == "" {
					return
				}
				// The locks are what they were to the daemon, too.
				other := m.Client(fake + 1000)
				var busy *wire.Error
				if err := other.Acquire(sc.firstSpace, sc.firstOwns, wire.Autocreate); !errors.As(err, &busy) || busy.Code != wire.CodeResourceBusy {
					t.Errorf("a held resource is acquired: %v", err)
				}
				if sc.name == "many" {
					// Everybody is restricted, which the daemon must know still.
					if err := clients[0].Release(sc.firstSpace, sc.firstOwns); err == nil {
						t.Error("a restricted client may release")
					}
					return
				}
				ok(t, clients[0].Release(sc.firstSpace, sc.firstOwns))
				ok(t, other.Acquire(sc.firstSpace, sc.firstOwns, wire.Autocreate))
			})
		}
	}
}

// A client that has not registered, at which the C daemon itself would end, is one to it still.
func TestUnregisteredThroughC(t *testing.T) {
	t.Parallel()
	m := start(t)
	holder := m.Client(fake)
	ok(t, holder.Acquire("", host.Data+"/a", wire.Autocreate))
	m.WriteFile(order, "accept", 0o600)
	m.Signal(syscall.SIGUSR1)
	if !host.Eventually(func() bool { return m.Exists(captured + ".part") }) {
		t.Fatalf("no state came\n%s", m.Stderr())
	}
	fresh := m.Dial("lock")
	if !host.Eventually(func() bool { return m.Exists(captured) }) {
		t.Fatalf("the relay did not accept\n%s", m.Stderr())
	}
	var not *wire.Error
	err := fresh.Acquire("", host.Data+"/b", wire.Autocreate)
	if !errors.As(err, &not) || not.Text() != "Requested operation is not valid: lock owner details have not been registered" {
		t.Errorf("an unregistered client acquires: %v\n%s", err, m.Stderr())
	}
	ok(t, holder.Ping())
	if m.Free(host.Data+"/a", true) {
		t.Error("the lock is free")
	}
	// The C daemon now hands such a client over itself, and it is still what it was.
	s := mustDecode(t, m.hop("c"), int32(m.PID()))
	if len(s.Lock.Clients) != 2 || s.Lock.Clients[1].Registered || !s.Lock.Clients[0].Registered {
		t.Errorf("clients are %+v", s.Lock.Clients)
	}
	if err := fresh.Release("", host.Data+"/a"); !errors.As(err, &not) || not.Text() != "Requested operation is not valid: lock owner details have not been registered" {
		t.Errorf("an unregistered client releases: %v", err)
	}
	ok(t, fresh.Register(wire.VM(fake+1)))
	ok(t, fresh.Acquire("", host.Data+"/b", wire.Autocreate))
}

// given is a state with so many clients that a test hands over to the C daemon, without descriptors.
func given(clients int) *Snapshot {
	s := &Snapshot{PID: 1, PIDFile: NoFD, Vault: NoFD,
		Admin: &Server{MaxClients: 50, MaxUnauth: 50, KeepaliveInterval: 1<<32 - 1, NextClientID: 1},
		Lock:  &Server{MaxClients: 60, MaxUnauth: 60, KeepaliveInterval: 1<<32 - 1, NextClientID: uint64(clients) + 1},
	}
	s.Owners = []Owner{
		{Details: Details{Name: "a", ID: 1, PID: fake}, PIDFD: NoFD},
		{Details: Details{Name: "b", ID: 2, PID: -5}, PIDFD: NoFD},
	}
	for i := range clients {
		c := Client{ID: uint64(i) + 1, ConnectTime: 1_000_000_000_123_456_789, FD: int32(100 + i), MaxRequests: 1, Self: None}
		if i < len(s.Owners) {
			c.Registered, c.Owner = true, s.Owners[i].Details
		}
		s.Lock.Clients = append(s.Lock.Clients, c)
	}
	s.Default = []Resource{
		{Name: host.Data + "/x", Path: host.Data + "/x", FD: 200, Held: true, Flags: 2, Owners: []int32{0}},
		{Name: host.Data + "/shared", Path: host.Data + "/shared", FD: 201, Held: true, Flags: 3, Owners: []int32{0, 1, 1}},
	}
	s.Lockspaces = []Lockspace{{Dir: host.Data}}
	return s
}

// handedOver starts a process that hands s over to the C daemon, and returns the connections of its clients.
func handedOver(t testing.TB, s *Snapshot, r Reader, env ...string) (machine, []*wire.Conn) {
	t.Helper()
	data, err := Encode(s, Ours)
	ok(t, err)
	h := install(t)
	h.WriteFile(spec, string(byte(r))+string(data), 0o600)
	m := machine{h, h.Start(successor, host.Options{Env: append(env, partEnv+"=handover"), NoWait: true}), t}
	var clients []*wire.Conn
	if s.Lock != nil {
		for range s.Lock.Clients {
			clients = append(clients, m.Dial("lock"))
		}
	}
	return m, clients
}

// The C daemon goes on with locks and clients that it has never seen, the locks being open file description locks.
func TestToC(t *testing.T) {
	t.Parallel()
	for _, r := range readers {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			s := given(3)
			m, clients := handedOver(t, s, r.Reader)
			var not *wire.Error
			if err := clients[2].Acquire("", host.Data+"/y", wire.Autocreate); !errors.As(err, &not) || not.Text() != "Requested operation is not valid: lock owner details have not been registered" {
				t.Fatalf("an unregistered client acquires: %v\n%s", err, m.Stderr())
			}
			admin := m.Dial("admin")
			ok(t, admin.AdminOpen())
			list, err := admin.AdminClients(wire.LockServer)
			ok(t, err)
			want := []wire.AdminClient{{ID: 1, Timestamp: 1e9}, {ID: 2, Timestamp: 1e9}, {ID: 3, Timestamp: 1e9}}
			if diff := gocmp.Diff(want, list); diff != "" {
				t.Errorf("clients (-want +got):\n%s", diff)
			}
			for path, exclusive := range map[string]bool{"/x": false, "/shared": true} {
				if m.Free(host.Data+path, exclusive) {
					t.Errorf("%s is free", path)
				}
			}
			if err := clients[1].Acquire("", host.Data+"/x", 0); err == nil {
				t.Error("a held resource is acquired")
			}
			// Everything that was held can be released, by those who held it, and nothing else.
			ok(t, clients[0].Release("", host.Data+"/x"))
			if !m.Free(host.Data+"/x", true) || m.Exists(host.Data+"/x") {
				t.Error("a released resource is locked, or its lease file is left")
			}
			ok(t, clients[0].Release("", host.Data+"/shared"))
			ok(t, clients[1].Release("", host.Data+"/shared"))
			if m.Free(host.Data+"/shared", true) {
				t.Error("a shared resource is free before its last owner released it")
			}
			if err := clients[0].Release("", host.Data+"/shared"); err == nil {
				t.Error("a resource is released once more than acquired")
			}
			ok(t, clients[1].Release("", host.Data+"/shared"))
			ok(t, clients[2].Register(wire.VM(fake+2)))
			ok(t, clients[2].Acquire(host.Data, "y", wire.Autocreate))
			if m.Exists(stateFile) {
				t.Error("the C daemon has left the state file")
			}
			if status := m.Stop(); status != 0 {
				t.Errorf("the C daemon ends with %d", status)
			}
		})
	}
}

// hurdle is a state that the C daemon may not take.
type hurdle struct {
	name   string
	change func(s *Snapshot) // applied when the descriptors are known
	ends   bool
}

var hurdles = []hurdle{
	{"nothing", func(*Snapshot) {}, false},
	{"no admin server", func(s *Snapshot) { s.Admin = nil }, false},
	{"not held", func(s *Snapshot) { s.Default[0].Held = false }, false},
	{"no owners", func(s *Snapshot) { s.Default[1].Owners = nil }, false},
	{"largest file", func(s *Snapshot) { pad(s, MaxC) }, false},
	{"too big", func(s *Snapshot) { pad(s, MaxC+1) }, true},
	{"no lock server", func(s *Snapshot) { s.Lock = nil }, true},
	{"limits", func(s *Snapshot) { s.Lock.MaxUnauth = s.Lock.MaxClients + 1 }, true},
	{"authentication", func(s *Snapshot) { s.Lock.Clients[0].AuthPending = true }, true},
	{"no descriptor", func(s *Snapshot) { s.Default[0].FD = NoFD }, true},
}

// What ForC says would end the C daemon does, and what lies just within its limits does not.
func TestHurdlesOfC(t *testing.T) {
	t.Parallel()
	for _, tt := range hurdles {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			changed := given(1)
			tt.change(changed)
			obstacles, err := ForC(changed)
			ok(t, err)
			if got := len(blocking(obstacles)) > 0; got != tt.ends {
				t.Errorf("obstacles are %v", obstacles)
			}
			m, clients := handedOver(t, given(1), C, caseEnv+"="+tt.name)
			if tt.ends {
				if status := m.Wait(); status == 0 || status == 70 {
					t.Errorf("the C daemon ends with %d\n%s", status, host.Shorten(m.Stderr()))
				}
				return
			}
			ok(t, clients[0].Ping())
			if m.Free(host.Data+"/shared", true) {
				t.Error("a lock is free")
			}
			if err := m.Client(fake+3).Acquire("", host.Data+"/shared", 0); err == nil {
				t.Error("a held resource is acquired")
			}
			ok(t, clients[0].Release("", host.Data+"/x"))
		})
	}
}
