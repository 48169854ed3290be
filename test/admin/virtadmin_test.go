// SPDX-License-Identifier: LGPL-2.1-or-later

package admin

import (
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

func TestMain(m *testing.M) { host.Main(m) }

// silence is how long something that must not happen is waited for.
const silence = 300 * time.Millisecond

// side is one of the two daemons that are compared, with what is on its host.
type side struct {
	name  string
	d     *host.Daemon
	admin Admin
	pids  map[string]int
}

// both starts the C daemon and ours, each on a host of its own.
func both(t *testing.T, o host.Options) [2]*side {
	t.Helper()
	var sides [2]*side
	for i, binary := range []string{host.C(t), host.Ours(t)} {
		h := host.New(t)
		sides[i] = &side{
			name:  []string{"C", "ours"}[i],
			d:     h.Start(binary, o),
			admin: Admin{Host: h, URI: System},
			pids:  map[string]int{},
		}
	}
	return sides
}

// guest starts a process on the host of each side and connects it to the lock socket, registered as itself.
func guest(t *testing.T, sides [2]*side, name string) (conns [2]*wire.Conn, procs [2]*host.Process) {
	t.Helper()
	for i, s := range sides {
		p := s.admin.Host.Spawn(host.ProcessOptions{})
		c := p.Dial(s.d, "lock")
		o := wire.VM(p.PID())
		o.Name = name
		if err := c.Register(o); err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
		s.pids["{"+name+"}"] = p.PID()
		conns[i], procs[i] = c, p
	}
	return conns, procs
}

// command is a line for virt-admin and the exit code that it must have with both daemons. Arguments are separated
// by blanks; ” is an empty one, _ stands for a blank within one.
type command struct {
	line string
	exit int
}

func (c command) args() []string {
	args := strings.Fields(c.line)
	for i, a := range args {
		if a == "''" {
			a = ""
		}
		args[i] = strings.ReplaceAll(a, "_", " ")
	}
	return args
}

// compare runs the commands one after the other on both sides.
func compare(t *testing.T, sides [2]*side, commands []command) {
	t.Helper()
	for _, c := range commands {
		var results [2]Result
		var wg sync.WaitGroup
		for i, s := range sides {
			wg.Go(func() { results[i] = s.admin.Run(t, c.args()...).Normal(s.pids) })
		}
		wg.Wait()
		if results[0] != results[1] {
			t.Errorf("virt-admin %s:\n   C: %v\nours: %v", c.line, results[0], results[1])
		}
		if results[0].Exit != c.exit {
			t.Errorf("virt-admin %s: the C daemon gives %v, want exit code %d", c.line, results[0], c.exit)
		}
	}
}

// Each command of virt-admin, with good and with bad arguments. A group's commands build on each other.
var groups = []struct {
	name   string
	config string
	list   []command
}{
	{"general", "", []command{
		{"uri", 0},
		{"version", 0},
		{"version --daemon", 1},
		{"server-list", 0},
		{"srv-list", 0},
		{"server-list extra", 1},
		{"connect", 0},
		{"connect virtlockd:///system", 0},
		{"connect virtlockd:///nosuch", 1},
		{"echo hello", 0},
		{"pwd", 0},
		{"no-such-command", 1},
		{"daemon-shutdown", 1}, // unknown to the client of this release
		{"uri;_srv-list;_version;_client-list_admin", 0},
	}},
	{"threadpool", "", []command{
		{"server-threadpool-info virtlockd", 0},
		{"srv-threadpool-info virtlockd", 0},
		{"srv-threadpool-info admin", 0},
		{"srv-threadpool-info --server virtlockd", 0},
		{"srv-threadpool-info nosuch", 1},
		{"srv-threadpool-info", 1},
		{"srv-threadpool-info ''", 1},
		{"server-threadpool-set virtlockd --max-workers 5", 1},
		{"srv-threadpool-set virtlockd --max-workers 5", 1},
		{"srv-threadpool-set virtlockd --min-workers 3", 1},
		{"srv-threadpool-set virtlockd --min-workers 3 --max-workers 5", 1},
		{"srv-threadpool-set virtlockd --min-workers 9 --max-workers 5", 1},
		{"srv-threadpool-set virtlockd --min-workers 0 --max-workers 0", 0},
		{"srv-threadpool-set virtlockd --min-workers -1", 1},
		{"srv-threadpool-set virtlockd --max-workers abc", 1},
		{"srv-threadpool-set virtlockd --max-workers 4294967296", 1},
		{"srv-threadpool-set virtlockd --max-workers 4294967295 --min-workers 4294967295", 1},
		{"srv-threadpool-set virtlockd --priority-workers 2", 0},
		{"srv-threadpool-info virtlockd", 0},
		{"srv-threadpool-info admin", 0},
		{"srv-threadpool-set virtlockd --priority-workers 3 --max-workers 1", 1},
		{"srv-threadpool-set virtlockd --priority-workers 4 --min-workers 0", 0},
		{"srv-threadpool-info virtlockd", 0},
		{"srv-threadpool-set virtlockd", 1},
		{"srv-threadpool-set nosuch --max-workers 5", 1},
		{"srv-threadpool-set --max-workers 5", 1},
	}},
	{"limits", "max_clients = 20\nadmin_max_clients = 5\n", []command{
		{"server-clients-info virtlockd", 0},
		{"srv-clients-info virtlockd", 0},
		{"srv-clients-info admin", 0},
		{"srv-clients-info nosuch", 1},
		{"srv-clients-info", 1},
		{"srv-clients-info ''", 1},
		{"server-clients-set virtlockd --max-clients 30", 0},
		{"srv-clients-info virtlockd", 0},
		{"srv-clients-set virtlockd --max-unauth-clients 10", 0},
		{"srv-clients-set virtlockd --max-clients 15 --max-unauth-clients 12", 0},
		{"srv-clients-info virtlockd", 0},
		{"srv-clients-set virtlockd --max-clients 5 --max-unauth-clients 12", 1},
		{"srv-clients-set virtlockd --max-clients 5", 1},
		{"srv-clients-set virtlockd --max-clients 1 --max-unauth-clients 1", 0},
		{"srv-clients-set virtlockd --max-clients 0", 1},
		{"srv-clients-set virtlockd --max-unauth-clients 0", 0},
		{"srv-clients-set virtlockd --max-clients 0", 0},
		{"srv-clients-info virtlockd", 0},
		{"srv-clients-set virtlockd --max-unauth-clients 100", 1},
		{"srv-clients-set virtlockd --max-clients -5", 1},
		{"srv-clients-set virtlockd --max-clients 1x", 1},
		{"srv-clients-set virtlockd --max-clients 4294967296", 1},
		{"srv-clients-set virtlockd --max-clients 4294967295", 0},
		{"srv-clients-set admin --max-clients 4 --max-unauth-clients 4", 0},
		{"srv-clients-set virtlockd", 1},
		{"srv-clients-set nosuch --max-clients 5", 1},
		{"srv-clients-set virtlockd --max-clients", 1},
		{"srv-clients-info virtlockd", 0},
		{"srv-clients-info admin", 0},
	}},
	{"clients", "", []command{
		{"client-list virtlockd", 0},
		{"client-list admin", 0},
		{"client-list nosuch", 1},
		{"client-list", 1},
		{"client-list ''", 1},
		{"client-info virtlockd 2", 0},
		{"client-info virtlockd 3", 0},
		{"client-info --server virtlockd --client 3", 0},
		{"client-info virtlockd 1", 1},
		{"client-info virtlockd 99", 1},
		{"client-info virtlockd 0", 1},
		{"client-info virtlockd 18446744073709551615", 1},
		{"client-info virtlockd abc", 1},
		{"client-info virtlockd", 1},
		{"client-info admin 99", 1},
		{"client-info nosuch 1", 1},
		{"client-disconnect virtlockd 99", 1},
		{"client-disconnect virtlockd 0", 1},
		{"client-disconnect virtlockd abc", 1},
		{"client-disconnect virtlockd", 1},
		{"client-disconnect nosuch 1", 1},
		{"client-disconnect virtlockd 2", 0},
		{"client-disconnect virtlockd 2", 1},
		{"client-info virtlockd 2", 1},
		{"client-list virtlockd", 0},
		{"srv-clients-info virtlockd", 0},
	}},
	{"filters", "", []command{
		{"daemon-log-filters", 0},
		{"daemon-log-filters 1:nothing_3:here", 0},
		{"daemon-log-filters", 0},
		{"daemon-log-filters --filters 4:else", 0},
		{"daemon-log-filters", 0},
		{"daemon-log-filters ''", 0},
		{"daemon-log-filters", 0},
		{"daemon-log-filters 1:+nothing", 0},
		{"daemon-log-filters", 0},
		{"daemon-log-filters 1:nothing:more_2:a,3:b", 0},
		{"daemon-log-filters", 0},
		{"daemon-log-filters 4:nothing_4:nothing_3:nothing", 0},
		{"daemon-log-filters", 0},
		{"daemon-log-filters 9:foo", 1},
		{"daemon-log-filters 0:foo", 1},
		{"daemon-log-filters x:foo", 1},
		{"daemon-log-filters abc", 1},
		{"daemon-log-filters 1:", 1},
		{"daemon-log-filters 4:good_5:bad", 1},
		{"daemon-log-filters", 0},
		{"daemon-log-filters __4:blanks__3:around__", 0},
		{"daemon-log-filters", 0},
	}},
	{"outputs", "", []command{
		{"daemon-log-outputs", 0},
		{"daemon-log-outputs 4:file:/run/newlog", 0},
		{"daemon-log-outputs", 0},
		{"daemon-log-outputs 4:file:/nodir/x", 1},
		{"daemon-log-outputs 4:file:/run", 1},
		{"daemon-log-outputs", 0},
		{"daemon-log-outputs 9:stderr", 1},
		{"daemon-log-outputs 0:stderr", 1},
		{"daemon-log-outputs foo", 1},
		{"daemon-log-outputs 1:bogus", 1},
		{"daemon-log-outputs 4:file", 1},
		{"daemon-log-outputs 4:file:", 1},
		{"daemon-log-outputs 4:syslog", 1},
		{"daemon-log-outputs 4:stderr:x", 1},
		{"daemon-log-outputs 4:file:relative", 0},
		{"daemon-log-outputs", 0},
		{"daemon-log-outputs 4:stderr_4:file:/run/n2", 0},
		{"daemon-log-outputs", 0},
		{"daemon-log-outputs 4:stderr_3:stderr_4:file:/run/n2_3:file:/run/n2", 0},
		{"daemon-log-outputs", 0},
		{"daemon-log-outputs 4:file:/run/n3_4:file:/nodir/y", 1},
		{"daemon-log-outputs", 0},
		{"daemon-log-outputs ''", 0},
		{"daemon-log-outputs", 0},
		{"daemon-log-outputs --outputs 4:stderr", 0},
		{"daemon-log-outputs", 0},
	}},
	{"daemon", "", []command{
		{"daemon-timeout", 1},
		{"daemon-timeout 100", 1},
		{"daemon-timeout --timeout 100", 0},
		{"daemon-timeout --timeout 0", 0},
		{"daemon-timeout --timeout 0", 0},
		{"daemon-timeout --timeout -1", 1},
		{"daemon-timeout --timeout abc", 1},
		{"daemon-timeout --timeout 4294967296", 1},
		{"daemon-timeout --timeout 4294967295", 0},
		{"server-update-tls virtlockd", 1},
		{"srv-update-tls admin", 1},
		{"srv-update-tls nosuch", 1},
		{"srv-update-tls", 1},
	}},
}

func TestCommands(t *testing.T) {
	t.Parallel()
	for _, g := range groups {
		t.Run(g.name, func(t *testing.T) {
			t.Parallel()
			sides := both(t, host.Options{Config: g.config})
			if g.name == "clients" || g.name == "limits" {
				guest(t, sides, "first")
				guest(t, sides, "second")
			}
			compare(t, sides, g.list)
		})
	}
}

// A user's own daemon is reached by the session URI.
func TestSession(t *testing.T) {
	t.Parallel()
	nobody := &syscall.Credential{Uid: 65534, Gid: 65534}
	var sides [2]*side
	for i, binary := range []string{host.C(t), host.Ours(t)} {
		h := host.New(t)
		const home, run = "/tmp/home", "/tmp/xdg"
		h.Must(func() error {
			for _, dir := range []string{home, run} {
				if err := syscall.Mkdir(dir, 0o700); err != nil {
					return err
				}
				if err := syscall.Chown(dir, int(nobody.Uid), int(nobody.Gid)); err != nil {
					return err
				}
			}
			return nil
		})
		env := []string{"HOME=" + home, "XDG_RUNTIME_DIR=" + run}
		sides[i] = &side{
			name: []string{"C", "ours"}[i],
			d: h.Start(binary, host.Options{
				Credential: nobody, Env: env, RunDir: run + "/libvirt", NoWait: true,
			}),
			admin: Admin{Host: h, URI: Session, Env: env, Credential: nobody},
		}
		if !host.Eventually(func() bool { return h.Exists(sides[i].d.SocketPath("admin")) }) {
			t.Fatalf("%s: no admin socket\n%s", sides[i].name, sides[i].d.Stderr())
		}
		sides[i].pids = map[string]int{}
	}
	compare(t, sides, []command{
		{"uri", 0},
		{"srv-list", 0},
		{"srv-clients-info admin", 0},
		{"client-list virtlockd", 0},
		{"client-list admin", 0},
		{"version", 0},
		{"daemon-log-filters 4:nothing", 0},
		{"daemon-log-filters", 0},
	})
	// root is somebody else here.
	for _, s := range sides {
		s.admin.Credential = nil
	}
	refused(t, sides)
}

// refused checks that virt-admin can't connect. Whether it finds the connection closed when it writes or when it
// reads, and so what it goes on to say, is chance; it may even die of SIGPIPE.
func refused(t *testing.T, sides [2]*side) {
	t.Helper()
	for _, s := range sides {
		r := s.admin.Run(t, "srv-list")
		if r.Exit == -1-int(syscall.SIGPIPE) {
			continue
		}
		if r.Exit != 1 || r.Stdout != "" || !strings.HasPrefix(r.Stderr, "error: Failed to connect to the admin server\n") {
			t.Errorf("%s: a stranger: %v", s.name, r)
		}
	}
}

// Nobody but root gets in, even if the socket's mode were wrong.
func TestStranger(t *testing.T) {
	t.Parallel()
	sides := both(t, host.Options{})
	for _, s := range sides {
		s.admin.Host.Must(func() error { return syscall.Chmod(s.d.SocketPath("admin"), 0o777) })
		s.admin.Credential = &syscall.Credential{Uid: 65534, Gid: 65534}
		s.admin.Env = []string{"HOME=/tmp"}
	}
	refused(t, sides)
	for _, s := range sides {
		if !host.Eventually(func() bool { return strings.Contains(s.d.Stderr(), "operation forbidden: Disallowing client") }) {
			t.Errorf("%s: nothing in the log:\n%s", s.name, s.d.Stderr())
		}
		s.admin.Credential = nil
	}
	compare(t, sides, []command{{"srv-list", 0}})
}

// What was set is in force at once.
func TestLimitsAtOnce(t *testing.T) {
	t.Parallel()
	sides := both(t, host.Options{Config: "max_clients = 2\nadmin_max_clients = 2\n"})
	guest(t, sides, "first")
	guest(t, sides, "second")
	waiting := map[string]*wire.Conn{}
	for _, s := range sides {
		c := s.d.Dial("lock")
		if err := c.Send(wire.Ping()); err != nil {
			t.Fatal(err)
		}
		waiting[s.name] = c
	}
	compare(t, sides, []command{
		{"srv-clients-info virtlockd", 0},
		{"srv-clients-set virtlockd --max-clients 3", 0},
	})
	for name, c := range waiting {
		if _, err := c.Recv(); err != nil {
			t.Errorf("%s: the third client: %v", name, err)
		}
	}
	compare(t, sides, []command{
		{"srv-clients-set virtlockd --max-clients 1 --max-unauth-clients 1", 0},
		{"srv-clients-info virtlockd", 0},
	})
	for name, c := range waiting {
		if err := c.Ping(); err != nil {
			t.Errorf("%s: the third client, after the limit was lowered: %v", name, err)
		}
	}
	// The admin socket's own limit holds too: with two others connected, a third one waits.
	for _, s := range sides {
		var others [2]*wire.Conn
		for i := range others {
			others[i] = s.d.Dial("admin")
			if err := others[i].AdminOpen(); err != nil {
				t.Fatal(err)
			}
		}
		done := make(chan Result, 1)
		go func() { done <- s.admin.Run(t, "srv-list") }()
		if host.Within(silence, func() bool { return len(done) > 0 }) {
			t.Errorf("%s: a client beyond admin_max_clients is served", s.name)
		}
		others[0].Close()
		if r := <-done; r.Exit != 0 {
			t.Errorf("%s: when there is room again: %v", s.name, r)
		}
	}
}

// A guest that is disconnected while it holds locks is ended by the C daemon; ours refuses. Without locks both
// disconnect it and leave it alone. (D-admin-guest)
func TestGuest(t *testing.T) {
	t.Parallel()
	sides := both(t, host.Options{})
	conns, procs := guest(t, sides, "web1")
	for i, s := range sides {
		s.admin.Host.WriteFile(host.Data+"/disk", "", 0o600)
		if err := conns[i].Acquire("", host.Data+"/disk", 0); err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
	}
	c, ours := sides[0], sides[1]
	if r := c.admin.Run(t, "client-disconnect", "virtlockd", "2"); r.Exit != 0 {
		t.Errorf("C: %v", r)
	}
	if !host.Eventually(procs[0].Dead) {
		t.Error("C: the guest lives on: is this no difference any more?")
	}

	r := ours.admin.Run(t, "client-disconnect", "virtlockd", "2")
	text := fmt.Sprintf("error: Failed to disconnect client '2' from server virtlockd\n"+
		"error: Requested operation is not valid: client '2' is the running guest 'web1' (uuid 11111111-1111-1111-1111-111111111111, pid %d) itself, "+
		"which holds locks; stop or migrate the guest instead\n", procs[1].PID())
	if want := (Result{Stdout: "\n", Stderr: text, Exit: 1}); r != want {
		t.Errorf("ours:\n got %v\nwant %v", r, want)
	}
	if procs[1].Dead() {
		t.Fatal("ours: the guest was ended")
	}
	if locks := ours.admin.Host.Locks(ours.d, host.Data+"/disk"); len(locks) != 1 {
		t.Errorf("ours: locks are %v", locks)
	}
	if err := conns[1].Release("", host.Data+"/disk"); err != nil {
		t.Fatalf("ours: the guest's connection: %v", err)
	}
	if r := ours.admin.Run(t, "client-disconnect", "virtlockd", "2"); r.Exit != 0 {
		t.Errorf("ours, without locks: %v", r)
	}
	if _, err := conns[1].Recv(); err != wire.ErrClosed {
		t.Errorf("ours: the connection: %v", err)
	}
	if procs[1].Dead() {
		t.Error("ours: the guest without locks was ended")
	}
}

// libvirtd's connection can be closed at any time; what it has locked for its guests stays locked.
func TestProxy(t *testing.T) {
	t.Parallel()
	sides := both(t, host.Options{})
	for _, s := range sides {
		p := s.admin.Host.Spawn(host.ProcessOptions{})
		c := s.d.Client(p.PID())
		s.admin.Host.WriteFile(host.Data+"/disk", "", 0o600)
		if err := c.Acquire("", host.Data+"/disk", 0); err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
	}
	compare(t, sides, []command{{"client-disconnect virtlockd 2", 0}, {"client-list virtlockd", 0}})
	for _, s := range sides {
		if locks := s.admin.Host.Locks(s.d, host.Data+"/disk"); len(locks) != 1 {
			t.Errorf("%s: locks are %v", s.name, locks)
		}
	}
}

// One administrator can disconnect another, and is not seen any more when he himself has gone.
func TestAdministrators(t *testing.T) {
	t.Parallel()
	sides := both(t, host.Options{})
	var others [2]*wire.Conn
	for i, s := range sides {
		others[i] = s.d.Dial("admin")
		if err := others[i].AdminOpen(); err != nil {
			t.Fatal(err)
		}
	}
	compare(t, sides, []command{
		{"client-list admin", 0},
		{"client-disconnect admin 1", 0},
		{"client-disconnect admin 1", 1},
		{"client-list admin", 0},
		{"srv-clients-info admin", 0},
		{"client-disconnect admin 7", 1}, // itself: it sees its connection end
	})
	for i, s := range sides {
		if _, err := others[i].Recv(); err != wire.ErrClosed {
			t.Errorf("%s: the other administrator: %v", s.name, err)
		}
	}
}

// Filters and outputs change what is logged with the next line.
func TestLoggingAtOnce(t *testing.T) {
	t.Parallel()
	sides := both(t, host.Options{})
	const log = "/run/log"
	compare(t, sides, []command{
		{"daemon-log-outputs 1:file:" + log, 0},
		{"srv-clients-set virtlockd --max-clients 2000", 0},
		{"daemon-log-outputs", 0},
	})
	for _, s := range sides {
		if got := s.admin.Host.ReadFile(log); got != "" {
			t.Errorf("%s: before the filter: %q", s.name, got)
		}
	}
	// C logs what it does as debug messages of rpc, ours what an administrator does as info of admin.
	compare(t, sides, []command{
		{"daemon-log-filters 1:rpc_1:admin", 0},
		{"srv-clients-set virtlockd --max-clients 3000", 0},
	})
	for _, s := range sides {
		logged := func() bool { return strings.Contains(s.admin.Host.ReadFile(log), "virNetServer") }
		if s.name == "ours" {
			logged = func() bool { return strings.Contains(s.admin.Host.ReadFile(log), "3000") }
		}
		if !host.Eventually(logged) {
			t.Errorf("%s: after the filter: %q", s.name, s.admin.Host.ReadFile(log))
		}
	}
	// An error is logged without any filter, so it marks a place.
	compare(t, sides, []command{
		{"daemon-log-filters ''", 0},
		{"daemon-log-filters 9:before", 1},
		{"srv-clients-set virtlockd --max-clients 4000", 0},
		{"daemon-log-filters 9:after", 1},
	})
	for _, s := range sides {
		var between string
		if !host.Eventually(func() bool {
			_, tail, _ := strings.Cut(s.admin.Host.ReadFile(log), "for filter '9:before'")
			var found bool
			between, _, found = strings.Cut(tail, "for filter '9:after'")
			return found
		}) {
			t.Errorf("%s: the errors are not logged: %q", s.name, s.admin.Host.ReadFile(log))
		}
		if strings.Count(between, "\n") != 1 {
			t.Errorf("%s: after the filters were dropped: %q", s.name, between)
		}
	}
}

// Blanks alone leave the C daemon without any output, which it can't even tell; ours goes back to the default, as for an
// empty string. (D-admin-outputs)
func TestBlankOutputs(t *testing.T) {
	t.Parallel()
	sides := both(t, host.Options{})
	compare(t, sides, []command{{"daemon-log-outputs 4:stderr", 0}, {"daemon-log-outputs __", 0}})
	const mute = "error: Unable to get daemon logging outputs information\nerror: Library function returned error but did not set virError\n"
	if r := sides[0].admin.Run(t, "daemon-log-outputs"); r.Exit != 1 || r.Stderr != mute {
		t.Errorf("C: %v", r)
	}
	if r := sides[1].admin.Run(t, "daemon-log-outputs"); r.Exit != 0 || r.Stdout != " Logging outputs: 3:stderr\n\n" {
		t.Errorf("ours: %v", r)
	}
}

// The timeout set at run time ends the daemon when the last client has gone.
func TestTimeout(t *testing.T) {
	t.Parallel()
	sides := both(t, host.Options{})
	compare(t, sides, []command{{"daemon-timeout --timeout 1", 0}})
	for _, s := range sides {
		if got := s.d.Wait(); got != 0 {
			t.Errorf("%s: exit code %d", s.name, got)
		}
		if s.admin.Host.Exists(s.d.SocketPath("admin")) {
			t.Errorf("%s: the socket is left behind", s.name)
		}
	}
}

// The call that newer clients have for it ends our daemon, but not while it holds locks. The C daemon of this
// release does not know it. (D-admin-shutdown)
func TestShutdown(t *testing.T) {
	t.Parallel()
	const shutdown = 20
	sides := both(t, host.Options{})
	conns, _ := guest(t, sides, "web1")
	for i, s := range sides {
		s.admin.Host.WriteFile(host.Data+"/disk", "", 0o600)
		if err := conns[i].Acquire("", host.Data+"/disk", 0); err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
		c := s.d.Dial("admin")
		m, err := c.Call(shutdown, wire.FlagsArgs(0))
		if err != nil || m.Err() == nil {
			t.Fatalf("%s: %s, %v", s.name, m, err)
		}
		text := wire.AsError(m.Err()).Text()
		if s.name == "C" {
			if text != "unknown procedure: 20" {
				t.Errorf("C: %s", text)
			}
			continue
		}
		if want := "Requested operation is not valid: 1 lock is held and would be lost; " +
			"stop, migrate or suspend the guests first; to replace the program use the live upgrade (SIGUSR1), which keeps them"; text != want {
			t.Errorf("ours:\n got %s\nwant %s", text, want)
		}
		if err := conns[i].Release("", host.Data+"/disk"); err != nil {
			t.Fatal(err)
		}
		if m, err := c.Call(shutdown, wire.FlagsArgs(0)); err != nil || m.Err() != nil {
			t.Fatalf("ours, without locks: %v, %v", m.Err(), err)
		}
		if got := s.d.Wait(); got != 0 {
			t.Errorf("ours: exit code %d", got)
		}
	}
}
