// SPDX-License-Identifier: LGPL-2.1-or-later

package upgrade

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// A giver is a process that plays a daemon which hands over to ours, with all that can be wrong then. It has a listening socket, two clients
// and three locks, the last one shared, and execs the binary that it is told.
const (
	giverClients = 2
	giverSpec    = "/tmp/spec" // what is wrong
	giverLog     = "/tmp/giver.log"
	giverSocket  = "/run/libvirt/virtlockd-sock"
)

func giverLock(i int) string { return fmt.Sprint(host.Data, "/given", i) }

// object is what JSON calls so.
type object = map[string]any

// handed is a state file that is being put together, and what goes with it.
type handed struct {
	state   object
	server  object   // the lock server
	clients []object // its clients
	locks   []object // the resources of the default lockspace
	text    []byte   // the file, if it is not the state as JSON
	mode    os.FileMode
}

// damages are what can be wrong, by name.
var damages = map[string]func(h *handed) error{
	"nothing": func(*handed) error { return nil },
	"magic":   func(h *handed) error { h.state["magic"] = "99999999"; return nil },
	"earlier process": func(h *handed) error {
		h.state["virtlockd-go"] = object{"version": 1, "began": 1}
		return nil
	},
	"no magic":          func(h *handed) error { delete(h.state, "magic"); return nil },
	"broken JSON":       func(h *handed) error { h.text = []byte(`{"magic":`); return nil },
	"empty file":        func(h *handed) error { h.text = []byte{}; return nil },
	"a guest has ended": endedGuest,
	"others may write": func(h *handed) error {
		h.mode = 0o666
		return nil
	},
	"no lockspaces": func(h *handed) error {
		delete(h.state, "lockspaces")
		return nil
	},
	"no admin server and odd keys": func(h *handed) error {
		h.state["odd"] = []any{1, "two"}
		delete(h.server, "next_client_id")
		return nil
	},
	"no default lockspace": func(h *handed) error { delete(h.state, "defaultLockspace"); return nil },
	"lock without owners":  func(h *handed) error { h.locks[0]["owners"] = []int{}; return nil },
	"lock under another name": func(h *handed) error {
		h.locks[0]["path"] = host.Data + "/another"
		return nil
	},
	"lock not open": func(h *handed) error { return swap(h.locks[0], 999) },
	"lock on another file": func(h *handed) error {
		fd, err := unix.Open(host.Data+"/another", unix.O_RDWR, 0)
		return errors.Join(err, swap(h.locks[0], fd))
	},
	"lock on a number that is soon taken": func(h *handed) error { return swap(h.locks[0], lowest()) },
	"lock not locked": func(h *handed) error {
		return unlock(h.locks[0])
	},
	"client not open": func(h *handed) error { return swap(h.clients[0]["sock"].(object), 999) },
	"client is a file": func(h *handed) error {
		fd, err := unix.Open(host.Data+"/another", unix.O_RDWR, 0)
		return errors.Join(err, swap(h.clients[0]["sock"].(object), fd))
	},
	"client on a number that is soon taken": func(h *handed) error { return swap(h.clients[0]["sock"].(object), lowest()) },
	"client twice": func(h *handed) error {
		h.clients[0]["sock"].(object)["fd"] = h.clients[1]["sock"].(object)["fd"]
		return nil
	},
	"socket not open": func(h *handed) error { return swap(listener(h), 999) },
	"socket is a file": func(h *handed) error {
		fd, err := unix.Open(host.Data+"/another", unix.O_RDWR, 0)
		return errors.Join(err, swap(listener(h), fd))
	},
	"socket is a client": func(h *handed) error {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		return errors.Join(err, swap(listener(h), pair[0]))
	},
}

// endedGuest makes the first lock that of a process that has connected itself, and has ended.
func endedGuest(h *handed) error {
	cmd := &exec.Cmd{Path: "/proc/self/exe", Args: []string{"caller"}, Env: append(os.Environ(), partEnv+"=caller")}
	if err := cmd.Start(); err != nil {
		return err
	}
	fd, _, err := unix.Accept4(listener(h)["fd"].(int), unix.SOCK_NONBLOCK)
	if err != nil {
		return err
	}
	if err := cmd.Wait(); err != nil {
		return err
	}
	guest := maps.Clone(h.clients[0])
	guest["id"], guest["sock"] = giverClients+1, object{"fd": fd, "errfd": -1, "pid": 0, "isClient": true, "unlinkUNIX": false}
	data := maps.Clone(guest["privateData"].(object))
	data["ownerPid"], data["restricted"] = cmd.Process.Pid, true
	guest["privateData"] = data
	h.server["clients"], h.server["next_client_id"] = append(h.clients, guest), giverClients+2
	h.locks[0]["owners"] = []int{cmd.Process.Pid}
	return nil
}

// swap puts another descriptor in the place of one, which is closed.
func swap(of object, fd int) error {
	err := unix.Close(of["fd"].(int))
	of["fd"] = fd
	return err
}

// lowest is a number that something that the next program opens will have.
func lowest() int {
	fd, err := unix.Open("/dev/null", unix.O_RDONLY, 0)
	if err != nil {
		return 3
	}
	unix.Close(fd)
	return fd
}

func unlock(of object) error {
	return unix.FcntlFlock(uintptr(of["fd"].(int)), unix.F_SETLK, &unix.Flock_t{Type: unix.F_UNLCK, Len: 1})
}

func listener(h *handed) object {
	return h.server["services"].([]object)[0]["socks"].([]object)[0]
}

// give is the giver. Its arguments are the program to execute and that one's command line.
func give() error {
	spec, err := os.ReadFile(giverSpec)
	if err != nil {
		return err
	}
	if err := os.MkdirAll("/run/libvirt", 0o755); err != nil {
		return err
	}
	listen, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	if err := errors.Join(unix.Bind(listen, &unix.SockaddrUnix{Name: giverSocket}), unix.Listen(listen, 30)); err != nil {
		return err
	}
	sock := func(fd int, client bool) object {
		return object{"fd": fd, "errfd": -1, "pid": 0, "isClient": client, "unlinkUNIX": !client}
	}
	h := &handed{mode: 0o600}
	for i := range giverClients {
		fd, _, err := unix.Accept4(listen, unix.SOCK_NONBLOCK)
		if err != nil {
			return err
		}
		h.clients = append(h.clients, object{
			"id": i + 1, "auth": 0, "auth_pending": false, "readonly": false, "nrequests_max": 1, "conn_time": time.Now().Unix(), "sock": sock(fd, true),
			"privateData": object{"restricted": false, "ownerPid": noOne, "ownerId": 1, "ownerName": "given", "ownerUUID": "11111111-1111-1111-1111-111111111111"},
		})
	}
	for i := range 3 {
		fd, err := unix.Open(giverLock(i), unix.O_RDWR|unix.O_CREAT, 0o600)
		if err != nil {
			return err
		}
		kind, flags := int16(unix.F_WRLCK), 0
		if i == 2 {
			kind, flags = unix.F_RDLCK, 1
		}
		if err := unix.FcntlFlock(uintptr(fd), unix.F_SETLK, &unix.Flock_t{Type: kind, Len: 1}); err != nil {
			return err
		}
		h.locks = append(h.locks, object{"name": giverLock(i), "path": giverLock(i), "fd": fd, "lockHeld": true, "flags": flags, "owners": []int{noOne}})
	}
	h.server = object{
		"min_workers": 1, "max_workers": 1, "priority_workers": 0, "max_clients": 100, "max_anonymous_clients": 100, "keepaliveInterval": -1 & 0xffffffff,
		"keepaliveCount": 0, "next_client_id": giverClients + 1,
		"services": []object{{"auth": 0, "readonly": false, "nrequests_client_max": 1, "socks": []object{sock(listen, false)}}},
		"clients":  h.clients,
	}
	h.state = object{
		"magic": strconv.Itoa(os.Getpid()), "daemon": object{"servers": object{"virtlockd": h.server}},
		"defaultLockspace": object{"resources": h.locks}, "lockspaces": []object{},
	}
	if err := damages[string(spec)](h); err != nil {
		return err
	}
	if h.text == nil {
		if h.text, err = json.Marshal(h.state); err != nil {
			return err
		}
	}
	if err := errors.Join(os.WriteFile(stateFile, h.text, h.mode), os.Chmod(stateFile, h.mode)); err != nil {
		return err
	}
	return syscall.Exec(os.Args[1], os.Args[1:], os.Environ())
}

// given is a daemon of ours that was given something.
type given struct {
	*host.Host
	t       *testing.T
	pid     int
	clients []*wire.Conn
	done    chan struct{}
}

func (g *given) log() string {
	b, err := os.ReadFile(g.Path(giverLog))
	must(g.t, err)
	return string(b)
}

func (g *given) dial() *wire.Conn {
	g.t.Helper()
	var c *wire.Conn
	eventually(g.t, "a connection", func() (ok bool) {
		var err error
		c, err = wire.Dial(g.Path(giverSocket), wire.LockProgram)
		return err == nil
	})
	g.t.Cleanup(c.Close)
	return c
}

func receive(t *testing.T, damage string, args ...string) *given {
	t.Helper()
	h := host.New(t)
	m := &machine{Host: h, t: t}
	g := &given{Host: h, t: t, done: make(chan struct{})}
	h.Expose(host.Ours(t))
	h.WriteFile(giverSpec, damage, 0o600)
	h.WriteFile(host.Data+"/another", "", 0o600)
	h.WriteFile("/tmp/g.conf", `log_level = 2`+"\n"+`log_outputs = "1:file:`+giverLog+`"`+"\n", 0o600)
	cmd := m.command("giver", append([]string{host.Ours(t), "-f", "/tmp/g.conf"}, args...)...)
	m.Must(cmd.Start)
	g.pid = cmd.Process.Pid
	go func() {
		_ = cmd.Wait()
		close(g.done)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-g.done
		if t.Failed() && h.Exists(giverLog) {
			t.Log(host.Shorten(h.ReadFile(giverLog)))
		}
	})
	for range giverClients {
		g.clients = append(g.clients, g.dial())
	}
	eventually(t, "the state file is read", func() bool { return h.Exists(giverLog) && !(h.Exists(stateFile)) || g.ended() })
	eventually(t, "an answer", func() bool {
		c := g.dial()
		defer c.Close()
		return c.Ping() == nil
	})
	return g
}

func (g *given) ended() bool {
	select {
	case <-g.done:
		return true
	default:
		return false
	}
}

// A guest that ends while the C daemon hands over is told of by its connection alone. Its locks do not stay for nobody.
func TestGuestEndsDuringHandOver(t *testing.T) {
	t.Parallel()
	g := receive(t, "a guest has ended")
	eventually(t, "its lock is given up", func() bool { return g.Free(giverLock(0), true) })
	if g.Free(giverLock(1), true) {
		t.Error("another's lock is free")
	}
	other := g.dial()
	must(t, other.Register(wire.VM(noOneElse)))
	must(t, other.Acquire("", giverLock(0), 0))
}

// A daemon that was detached does not leave its process, and so its locks, for a state file that is of no use.
func TestFaultyStateDetached(t *testing.T) {
	t.Parallel()
	for _, damage := range []string{"nothing", "magic", "broken JSON", "others may write"} {
		t.Run(damage, func(t *testing.T) {
			t.Parallel()
			g := receive(t, damage, "-d", "--no-keeper")
			for i := range 3 {
				if g.Free(giverLock(i), true) {
					t.Errorf("lock %d is free in the kernel", i)
				}
			}
			if g.ended() {
				t.Error("the daemon has left its process")
			}
		})
	}
}

// A lock that could not be taken over is not given away by a later live upgrade either.
func TestFaultyStateThenUpgrades(t *testing.T) {
	t.Parallel()
	for _, damage := range []string{"magic", "no default lockspace", "lock without owners", "lock under another name"} {
		t.Run(damage, func(t *testing.T) {
			t.Parallel()
			g := receive(t, damage)
			for n := range 4 {
				for i := range 3 {
					if g.Free(giverLock(i), true) {
						t.Fatalf("after %d live upgrades lock %d is free in the kernel", n, i)
					}
				}
				taken := func() int { return strings.Count(g.log(), successLine) }
				before := taken()
				must(t, syscall.Kill(g.pid, syscall.SIGUSR1))
				eventually(t, "a live upgrade", func() bool { return taken() > before || g.ended() })
			}
			if g.ended() {
				t.Error("the daemon has ended")
			}
		})
	}
}

// What a faulty state file says is not believed, and what is right in it is kept.
func TestFaultyState(t *testing.T) {
	t.Parallel()
	all, none := []bool{true, true}, []bool{false, false}
	for damage, want := range map[string]struct {
		clients []bool // whether they are kept
		locks   []bool // whether they have owners; they are never free
		said    string
	}{
		"nothing":                               {clients: all, locks: []bool{true, true, true}},
		"no admin server and odd keys":          {clients: all, locks: []bool{true, true, true}, said: "next_client_id"},
		"no lockspaces":                         {clients: all, locks: []bool{true, true, true}, said: "lockspaces"},
		"magic":                                 {clients: none, locks: []bool{false, false, false}, said: `the state file is of process \"99999999\"`},
		"earlier process":                       {clients: none, locks: []bool{false, false, false}, said: "an earlier process that had the same process id"},
		"no magic":                              {clients: none, locks: []bool{false, false, false}, said: "does not say which process"},
		"broken JSON":                           {clients: none, locks: []bool{false, false, false}, said: "of no use"},
		"empty file":                            {clients: none, locks: []bool{false, false, false}, said: "of no use"},
		"others may write":                      {clients: none, locks: []bool{false, false, false}, said: "others may write to it"},
		"no default lockspace":                  {clients: all, locks: []bool{false, false, false}, said: "defaultLockspace"},
		"lock without owners":                   {clients: all, locks: []bool{false, true, true}, said: "nobody can release it"},
		"lock not open":                         {clients: all, locks: []bool{true, true, true}, said: "so its file was locked anew"},
		"lock on another file":                  {clients: all, locks: []bool{true, true, true}, said: "it is another file"},
		"lock on a number that is soon taken":   {clients: all, locks: []bool{true, true, true}, said: "so its file was locked anew"},
		"lock not locked":                       {clients: all, locks: []bool{true, true, true}, said: "was taken again"},
		"client not open":                       {clients: []bool{false, true}, locks: []bool{true, true, true}, said: "descriptor 999 was not handed over"},
		"client is a file":                      {clients: []bool{false, true}, locks: []bool{true, true, true}, said: "a client is not kept"},
		"client on a number that is soon taken": {clients: []bool{false, true}, locks: []bool{true, true, true}, said: "was not handed over"},
		"client twice":                          {clients: []bool{false, true}, locks: []bool{true, true, true}, said: "clients[1]"},
		"socket not open":                       {clients: all, locks: []bool{true, true, true}, said: "a listening socket is not kept"},
		"socket is a file":                      {clients: all, locks: []bool{true, true, true}, said: "a listening socket is not kept"},
		"socket is a client":                    {clients: all, locks: []bool{true, true, true}, said: "a listening socket is not kept"},
	} {
		t.Run(damage, func(t *testing.T) {
			t.Parallel()
			g := receive(t, damage)
			kept := 0
			var one *wire.Conn
			for i, c := range g.clients {
				switch err := c.Ping(); {
				case err == nil:
					kept++
					one = c
				case !errors.Is(err, wire.ErrClosed):
					t.Errorf("client %d: %v", i, err)
				}
			}
			wantKept := 0
			for _, k := range want.clients {
				if k {
					wantKept++
				}
			}
			if kept != wantKept {
				t.Errorf("%d clients are kept, want %d", kept, wantKept)
			}
			other := g.dial()
			must(t, other.Register(wire.VM(noOneElse)))
			owner := one
			if owner == nil {
				owner = g.dial()
				must(t, owner.Register(wire.VM(noOne)))
			}
			for i, owned := range want.locks {
				path := giverLock(i)
				if g.Free(path, true) {
					t.Errorf("lock %d is free in the kernel", i)
				}
				refused(t, path, other.Acquire("", path, 0))
				err := wire.AsError(owner.Release("", path))
				if owned != (err == nil) {
					t.Errorf("release of lock %d: %v", i, err)
				}
				if owned && !g.Free(path, true) {
					t.Errorf("lock %d was released and is not free", i)
				}
			}
			if !g.Free(host.Data+"/another", true) {
				t.Error("a file that nobody has locked is locked")
			}
			// It is written by a goroutine of its own.
			if !host.Eventually(func() bool { return strings.Contains(g.log(), want.said) }) {
				t.Errorf("the log does not say %q", want.said)
			}
			for line := range strings.Lines(g.log()) {
				if want.said == "" && strings.Contains(line, " error : ") && !strings.Contains(line, "is locked") {
					t.Errorf("in the log: %s", line)
				}
			}
			if g.ended() {
				t.Error("the daemon has ended")
			}
		})
	}
}

// Another instance that is started while a state file is there leaves it to the process that it is of.
func TestStateOfAnother(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	p := h.Spawn(host.ProcessOptions{})
	text := fmt.Sprintf(`{"magic":"%d"}`, p.PID())
	h.WriteFile(stateFile, text, 0o600)
	d := h.Start(host.Ours(t), host.Options{})
	if !h.Exists(stateFile) || h.ReadFile(stateFile) != text {
		t.Error("the state file of a living process is gone")
	}
	d.Stop()
	p.Kill()
	p.Gone()
	h.Start(host.Ours(t), host.Options{})
	if h.Exists(stateFile) {
		t.Error("the state file of a dead process is still there")
	}
}
