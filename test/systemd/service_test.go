// SPDX-License-Identifier: LGPL-2.1-or-later

package systemd

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// disk is what guests lock.
const disk = Data + "/disk"

// serves fails the test unless the daemon answers on a new connection, and tells its process id.
func serves(m *Machine, socket string) int {
	m.t.Helper()
	c := m.Dial(socket)
	if err := c.Ping(); err != nil {
		m.t.Fatalf("%s socket: %v", socket, err)
	}
	// The daemon closes its side when it has seen the end of ours: the C daemon can't hand over a client that has not
	// registered.
	if err := c.CloseWrite(); err != nil {
		m.t.Fatal(err)
	}
	if _, err := c.Recv(); !errors.Is(err, wire.ErrClosed) {
		m.t.Fatalf("%s socket: %v", socket, err)
	}
	// It may have answered before systemd was told that it is ready.
	m.WaitState(Service, "active")
	pid := m.MainPID()
	if exe := m.Exe(pid); exe != Binary {
		m.t.Errorf("main process %d is %s", pid, exe)
	}
	return pid
}

// acquire makes a disk that the client holds.
func acquire(m *Machine, c *wire.Conn, path string) {
	m.t.Helper()
	m.WriteFile(path, "", 0o600)
	if err := c.Acquire("", path, 0); err != nil {
		m.t.Fatalf("ACQUIRE_RESOURCE: %v", err)
	}
	held(m, path)
}

func held(m *Machine, path string) {
	m.t.Helper()
	if !m.Locked(path) {
		m.t.Errorf("%s is not locked", path)
	}
}

// The exporter's unit takes all from it that it does not need, and nothing that it does; it waits for no daemon.
func TestExporter(t *testing.T) {
	t.Parallel()
	m := Boot(t, Options{})
	const unit = "virtlockctl-exporter.service"
	m.Systemctl("start", unit)
	scrape := func() string {
		out, _ := m.Run("bash", "-c", `exec 3<>/dev/tcp/127.0.0.1/9747 && printf 'GET /metrics HTTP/1.0\r\n\r\n' >&3 && cat <&3`)
		return out
	}
	wait := func(text string) {
		t.Helper()
		var out string
		if !host.Eventually(func() bool { out = scrape(); return strings.Contains(out, text) }) {
			t.Fatalf("the exporter does not say %q:\n%s\n%v", text, host.Shorten(out), m.Journal("_SYSTEMD_UNIT="+unit))
		}
	}
	wait("virtlockd_up 0")
	m.Systemctl("start", LockSocket, AdminSocket)
	acquire(m, m.Guest().Client(), disk)
	wait("virtlockd_up 1")
	wait(`virtlockd_locks{mode="exclusive"} 1`)
	if n := m.ShowInt(unit, "NRestarts"); n != 0 {
		t.Errorf("%d restarts", n)
	}
	m.Systemctl("stop", unit)
	if s := m.State(unit); s != "inactive" {
		t.Errorf("stopped, it is %s", s)
	}
}

func TestActivation(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		mask   string // unit
		listen []string
		first  string // socket to connect to
		also   bool   // the other one is served too
	}{
		{"lock", "", []string{LockSocket}, "lock", true}, // the service wants the admin socket
		{"lock alone", AdminSocket, []string{LockSocket}, "lock", false},
		{"both, lock first", "", []string{LockSocket, AdminSocket}, "lock", true},
		{"both, admin first", "", []string{LockSocket, AdminSocket}, "admin", true},
		{"admin pulls in lock", "", []string{AdminSocket}, "admin", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			m := Boot(t, Options{})
			if tt.mask != "" {
				m.Systemctl("mask", "--now", tt.mask)
			}
			m.Systemctl(append([]string{"start"}, tt.listen...)...)
			if s := m.State(Service); s != "inactive" {
				t.Errorf("the service is %s before anybody connects", s)
			}
			for _, unit := range tt.listen {
				socket, _, _ := strings.Cut(strings.TrimPrefix(unit, "virtlockd-"), ".")
				if socket == "virtlockd" {
					socket = "lock"
				}
				path, _ := socketPath(socket)
				if out, err := m.Run("stat", "--format=%F %a %U", path); err != nil || out != "socket 600 root" {
					t.Errorf("%s: %s, %v", path, out, err)
				}
			}
			pid := serves(m, tt.first)
			other := map[string]string{"lock": "admin", "admin": "lock"}[tt.first]
			if tt.also {
				if again := serves(m, other); again != pid {
					t.Errorf("the %s socket started another process: %d, not %d", other, again, pid)
				}
			} else if path, _ := socketPath(other); m.Exists(path) {
				t.Errorf("%s was made", path)
			}
			if n := m.ShowInt(Service, "NRestarts"); n != 0 {
				t.Errorf("%d restarts", n)
			}
			if lines := m.Journal("_SYSTEMD_UNIT="+Service, "PRIORITY=4", "PRIORITY=3"); len(lines) != 0 {
				t.Errorf("the daemon complains: %v", lines)
			}
		})
	}
	// As shipped the admin socket is bound to the lock socket; an administrator's own units may be different.
	t.Run("admin alone", func(t *testing.T) {
		t.Parallel()
		m := Boot(t, Options{Files: map[string]string{
			UnitDir + "/" + Service:     "[Service]\nType=notify\nExecStart=" + Binary + "\n",
			UnitDir + "/" + AdminSocket: "[Socket]\nListenStream=/run/libvirt/virtlockd-admin-sock\nService=" + Service + "\n",
		}})
		m.Systemctl("start", AdminSocket)
		serves(m, "admin")
		if path, _ := socketPath("lock"); m.Exists(path) {
			t.Errorf("%s was made", path)
		}
		m.WaitJournal("socket activation passed no lock socket", "_SYSTEMD_UNIT="+Service)
	})
}

// Enabled as the manual says, the sockets listen after the next boot.
func TestEnable(t *testing.T) {
	t.Parallel()
	m := Boot(t, Options{})
	m.Systemctl("enable", Service)
	for _, unit := range []string{LockSocket, AdminSocket} {
		if s := m.Systemctl("is-enabled", unit); s != "enabled" {
			t.Errorf("%s is %s", unit, s)
		}
	}
	// What a boot does.
	m.Systemctl("daemon-reload")
	m.Systemctl("restart", "sockets.target")
	for _, unit := range []string{LockSocket, AdminSocket} {
		m.WaitState(unit, "active")
	}
	if s := m.State(Service); s != "inactive" {
		t.Errorf("the service is %s before anybody connects", s)
	}
	serves(m, "lock")
	out, err := m.Run("systemd-analyze", "verify", "/usr/lib/systemd/system/"+Service)
	var complaints []string
	for line := range strings.Lines(out) {
		if !strings.Contains(line, "Unknown key 'FileDescriptorStorePreserve'") { // systemd before 254
			complaints = append(complaints, line)
		}
	}
	if err != nil || len(complaints) > 0 {
		t.Errorf("systemd-analyze verify: %v\n%q", err, complaints)
	}
}

// The start is over when a client is served, not before.
func TestReady(t *testing.T) {
	t.Parallel()
	m := Boot(t, Options{})
	m.ShowNotifications()
	const gate = Data + "/gate"
	m.DropIn(Service, "[Service]\nExecStart=\nExecStart=/bin/sh -c 'until test -e "+gate+"; do sleep 0.01; done; exec "+Binary+"'\n")
	done := make(chan error, 1)
	go func() {
		_, err := m.TrySystemctl("start", Service)
		done <- err
	}()
	m.WaitState(Service, "activating")
	select {
	case err := <-done:
		t.Errorf("systemctl start has returned before the daemon runs: %v", err)
	default:
	}
	m.WriteFile(gate, "", 0o644)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if s := m.State(Service); s != "active" {
		t.Errorf("the service is %s", s)
	}
	serves(m, "lock")
	if diff := cmp.Diff([]string{"READY=1"}, m.Notifications()); diff != "" {
		t.Errorf("notifications -want +got:\n%s", diff)
	}
}

// A configuration that can't be used fails the start with the reason. The service goes on trying, and who waits for
// it is served when it is mended.
func TestBadConfiguration(t *testing.T) {
	t.Parallel()
	m := Boot(t, Options{Files: map[string]string{Config: "max_clients = many\n"}})
	out, err := m.TrySystemctl("start", Service)
	if err == nil {
		t.Errorf("the start succeeds: %s", out)
	}
	m.WaitJournal(Config+":1", "_SYSTEMD_UNIT="+Service)
	if !host.Eventually(func() bool { return m.ShowInt(Service, "NRestarts") >= 8 }) {
		t.Errorf("given up after %d restarts: %s", m.ShowInt(Service, "NRestarts"), m.State(Service))
	}
	c := m.Dial("lock")
	m.WriteFile(Config, "", 0o644)
	if err := c.Ping(); err != nil {
		t.Error(err)
	}
	m.WaitState(Service, "active")
}

func TestStopAndStart(t *testing.T) {
	t.Parallel()
	m := Boot(t, Options{})
	m.ShowNotifications()
	m.Systemctl("start", Service)
	g := m.Guest()
	c := g.Client()
	acquire(m, c, disk)

	m.Systemctl("stop", Service)
	if s, pid := m.State(Service), m.MainPID(); s != "inactive" || pid != 0 {
		t.Errorf("after the stop the service is %s, its process %d", s, pid)
	}
	if r := m.Show(Service, "Result"); r != "success" {
		t.Errorf("result of the service: %s", r)
	}
	if !g.Alive() {
		t.Error("the guest died of the stop")
	}
	if _, err := c.Recv(); err == nil {
		t.Error("the connection is still open")
	}
	if diff := cmp.Diff([]string{"READY=1", "STOPPING=1"}, m.Notifications()); diff != "" {
		t.Errorf("notifications -want +got:\n%s", diff)
	}
	m.WaitJournal("lock given up", "PRIORITY=4")
	if m.Exists("/run/virtlockd.pid") {
		t.Error("the pid file is left")
	}
	// The sockets are systemd's, and activate again.
	for _, unit := range []string{LockSocket, AdminSocket} {
		if s := m.State(unit); s != "active" {
			t.Errorf("%s is %s after the stop of the service", unit, s)
		}
	}
	for _, socket := range []string{"lock", "admin"} {
		if path, _ := socketPath(socket); !m.Exists(path) {
			t.Errorf("%s is gone", path)
		}
	}
	first := serves(m, "lock")
	c = g.Client()
	acquire(m, c, disk)
	m.Systemctl("restart", Service)
	if pid := serves(m, "lock"); pid == first {
		t.Errorf("process %d outlives a restart", pid)
	}
	if !g.Alive() {
		t.Error("the guest died of the restart")
	}
	if err := c.Ping(); err != nil {
		t.Errorf("the connection from before the restart: %v", err)
	}
	held(m, disk)

	// Without its socket there is no service, and no file is left.
	m.Systemctl("stop", LockSocket)
	m.WaitState(Service, "inactive")
	m.WaitState(AdminSocket, "inactive")
	for _, socket := range []string{"lock", "admin"} {
		if path, _ := socketPath(socket); m.Exists(path) {
			t.Errorf("%s is left", path)
		}
	}
	if !g.Alive() {
		t.Error("the guest died of the stop of the socket")
	}
}

func TestReload(t *testing.T) {
	t.Parallel()
	m := Boot(t, Options{Files: map[string]string{Config: "max_clients = 1\n"}})
	m.Systemctl("start", Service)
	pid := m.MainPID()
	g := m.Guest()
	acquire(m, g.Client(), disk)
	waits := m.Dial("lock")
	if err := waits.Send(wire.Ping()); err != nil {
		t.Fatal(err)
	}
	m.WaitJournal("max_clients", "_SYSTEMD_UNIT="+Service, "PRIORITY=4")
	m.WriteFile(Config, "max_clients = 100\nlog_level = 2\n", 0o644)
	m.Systemctl("reload", Service)
	if _, err := waits.Recv(); err != nil {
		t.Errorf("the client that waited: %v", err)
	}
	m.WaitJournal("this binary has taken over", "_SYSTEMD_UNIT="+Service, "PRIORITY=6")
	// A bad one changes nothing and is reported.
	m.WriteFile(Config, "max_clients = 1\nlog_level = 77\n", 0o644)
	m.Systemctl("reload", Service)
	m.WaitJournal(Config, "_SYSTEMD_UNIT="+Service, "PRIORITY=3")
	if again := serves(m, "lock"); again != pid {
		t.Errorf("process %d became %d", pid, again)
	}
	held(m, disk)
}

// However often it is killed, it comes back at once.
func TestKill(t *testing.T) {
	t.Parallel()
	const kills = 10
	m := Boot(t, Options{})
	m.Systemctl("start", Service)
	g := m.Guest()
	invocation := m.Show(LockSocket, "InvocationID")
	pid := m.MainPID()
	var clients []*wire.Conn
	for i := range kills {
		c := g.Client()
		acquire(m, c, fmt.Sprintf("%s%d", disk, i))
		m.Signal("KILL")
		// A client that comes now waits and is served.
		again := serves(m, "lock")
		if again == pid {
			t.Fatalf("process %d survives SIGKILL", pid)
		}
		pid = again
		// Everything goes on, over the same connections, those of the processes before included.
		clients = append(clients, c)
		for j, c := range clients {
			if err := c.Ping(); err != nil {
				t.Fatalf("after kill %d, connection %d: %v", i, j, err)
			}
			held(m, fmt.Sprintf("%s%d", disk, j))
		}
	}
	for i, c := range clients {
		if err := c.Release("", fmt.Sprintf("%s%d", disk, i)); err != nil {
			t.Error(err)
		}
		if m.Locked(fmt.Sprintf("%s%d", disk, i)) {
			t.Errorf("disk %d is still locked", i)
		}
	}
	if n := m.ShowInt(Service, "NRestarts"); n != kills {
		t.Errorf("%d restarts, want %d", n, kills)
	}
	if !g.Alive() {
		t.Error("the guest died of it")
	}
	if m.Show(LockSocket, "InvocationID") != invocation {
		t.Error("the socket was started anew")
	}
}

// The live upgrade is nothing to systemd but a reload.
func TestUpgrade(t *testing.T) {
	t.Parallel()
	m := Boot(t, Options{Files: map[string]string{Config: "log_level = 2\n"}})
	m.Systemctl("start", Service)
	m.ShowNotifications()
	g := m.Guest()
	c := g.Client()
	acquire(m, c, disk)
	before := unitFacts(m)

	const upgrades = 3
	for i := range upgrades {
		m.CopyIn(host.Ours(t), Binary)
		m.Signal("USR1")
		want := slices.Repeat([]string{"RELOADING=1", "READY=1"}, i+1)
		if !host.Eventually(func() bool { return len(m.Notifications()) >= len(want) }) {
			t.Fatalf("upgrade %d is not over", i)
		}
		if diff := cmp.Diff(want, m.Notifications()); diff != "" {
			t.Fatalf("notifications -want +got:\n%s", diff)
		}
		held(m, disk)
		if err := c.Ping(); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(slices.DeleteFunc(m.Journal("_SYSTEMD_UNIT="+Service), func(e Entry) bool {
		return !strings.Contains(e["MESSAGE"], "this binary has taken over")
	})); n != upgrades {
		t.Errorf("%d take-overs, want %d", n, upgrades)
	}
	if diff := cmp.Diff(before, unitFacts(m)); diff != "" {
		t.Errorf("the unit -before +after:\n%s", diff)
	}
	// Everything goes on: the client, its lock, new clients, a kill, a stop.
	if err := c.Release("", disk); err != nil {
		t.Error(err)
	}
	if m.Locked(disk) {
		t.Error("the lock outlives its release")
	}
	pid := serves(m, "lock")
	m.Signal("KILL")
	if again := serves(m, "lock"); again == pid {
		t.Errorf("process %d survives SIGKILL", pid)
	}
	m.Systemctl("stop", Service)
	if r := m.Show(Service, "Result"); r != "success" {
		t.Errorf("result of the service: %s", r)
	}
	if !g.Alive() {
		t.Error("the guest died of it")
	}
}

// unitFacts is what stays when nothing is restarted.
func unitFacts(m *Machine) map[string]string {
	m.t.Helper()
	facts := map[string]string{}
	for _, unit := range []string{Service, LockSocket, AdminSocket} {
		for _, p := range []string{"ActiveState", "InvocationID", "NRestarts", "MainPID", "ActiveEnterTimestampMonotonic"} {
			facts[unit+" "+p] = m.Show(unit, p)
		}
	}
	return facts
}

// systemd may be replaced or read its units anew while guests run.
func TestManagerReload(t *testing.T) {
	t.Parallel()
	m := Boot(t, Options{})
	m.Systemctl("start", Service)
	g := m.Guest()
	c := g.Client()
	acquire(m, c, disk)
	before := unitFacts(m)
	for _, what := range []string{"daemon-reload", "daemon-reexec", "daemon-reload"} {
		m.Systemctl(what)
		if diff := cmp.Diff(before, unitFacts(m)); diff != "" {
			t.Errorf("%s: the unit -before +after:\n%s", what, diff)
		}
		held(m, disk)
		if err := c.Ping(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		serves(m, "lock")
		serves(m, "admin")
	}
	// systemd still listens to it and looks after it.
	m.ShowNotifications()
	m.Signal("USR1")
	if !host.Eventually(func() bool { return len(m.Notifications()) == 2 }) {
		t.Errorf("after daemon-reexec: notifications %q", m.Notifications())
	}
	held(m, disk)
	pid := m.MainPID()
	m.Signal("KILL")
	if again := serves(m, "lock"); again == pid {
		t.Errorf("process %d survives SIGKILL", pid)
	}
}

// The unit's limits are those of the process.
func TestLimits(t *testing.T) {
	t.Parallel()
	m := Boot(t, Options{Files: map[string]string{
		// Debian's defaults are the unit's values; others have less.
		"/etc/systemd/system.conf.d/test.conf": "[Manager]\nDefaultLimitNOFILE=256:4096\n",
	}})
	m.Systemctl("start", Service)
	pid := strconv.Itoa(m.MainPID())
	limit, score := "524288", "-900"
	if !mayRaise(t, m) {
		// A virtual machine or container that has been denied it: systemd does what is possible.
		t.Log("CAP_SYS_RESOURCE is missing: only what is possible without is looked at")
		limit, score = openFiles(m, "1")[1], strings.TrimSpace(m.ReadFile("/proc/1/oom_score_adj"))
	}
	// The daemon raises the soft limit, which is for programs that use select(2).
	if diff := cmp.Diff([]string{limit, limit}, openFiles(m, pid)); diff != "" {
		t.Errorf("limit of open files -want +got:\n%s", diff)
	}
	if got := strings.TrimSpace(m.ReadFile("/proc/" + pid + "/oom_score_adj")); got != score {
		t.Errorf("oom_score_adj is %s, want %s", got, score)
	}
	for property, want := range map[string]string{"LimitNOFILE": "524288", "LimitNOFILESoft": "1024", "OOMScoreAdjust": "-900"} {
		if got := m.Show(Service, property); got != want {
			t.Errorf("%s is %s, want %s", property, got, want)
		}
	}
	// It has the machine's own file systems: images and leases may be anywhere.
	for _, ns := range []string{"mnt", "net", "ipc"} {
		theirs, err := m.Run("readlink", "/proc/"+pid+"/ns/"+ns)
		if err != nil {
			t.Fatal(err)
		}
		if own, err := m.Run("readlink", "/proc/1/ns/"+ns); err != nil || own != theirs {
			t.Errorf("namespace %s of the daemon is %s, that of systemd %s (%v)", ns, theirs, own, err)
		}
	}
}

// The unit has, as systemd reads it, all that a lock's life depends on.
func TestSettings(t *testing.T) {
	t.Parallel()
	m := Boot(t, Options{})
	m.Systemctl("start", Service)
	for unit, settings := range map[string]map[string]string{
		Service: {
			"Type": "notify", "NotifyAccess": "main",
			"Restart": "always", "RestartUSec": "100ms", "StartLimitIntervalUSec": "0", // a unit that fails drops its descriptors
			"FileDescriptorStoreMax": "8",
			"KillMode":               "process",
			"OOMPolicy":              "continue", // the process that was killed is followed by another one, not by the end of the unit
			"TasksMax":               "infinity",
			// Images and leases may be anywhere, and what is taken away is taken away from the C daemon too.
			"ProtectSystem": "no", "ProtectHome": "no", "PrivateTmp": "no", "PrivateDevices": "no", "DevicePolicy": "auto", "ProtectClock": "no",
			"NoNewPrivileges": "no", "MemoryMax": "infinity",
		},
		LockSocket:  {"TriggerLimitIntervalUSec": "0"},
		AdminSocket: {"TriggerLimitIntervalUSec": "0"},
	} {
		for property, want := range settings {
			if got := m.Show(unit, property); got != want {
				t.Errorf("%s of %s is %q, want %q", property, unit, got, want)
			}
		}
	}
	// systemd before 254 does not know it, so it can't show it.
	if text := m.Systemctl("cat", Service); !strings.Contains(text, "\nFileDescriptorStorePreserve=yes\n") {
		t.Errorf("FileDescriptorStorePreserve=yes is not in the unit:\n%s", text)
	}
}

// mayRaise tells whether the machine's systemd may raise limits.
func mayRaise(t *testing.T, m *Machine) bool {
	for line := range strings.Lines(m.ReadFile("/proc/1/status")) {
		if text, ok := strings.CutPrefix(line, "CapEff:"); ok {
			caps, err := strconv.ParseUint(strings.TrimSpace(text), 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			return caps&(1<<unix.CAP_SYS_RESOURCE) != 0
		}
	}
	t.Fatal("/proc/1/status has no CapEff")
	return false
}

// openFiles returns a process's soft and hard limit of open files.
func openFiles(m *Machine, pid string) []string {
	for line := range strings.Lines(m.ReadFile("/proc/" + pid + "/limits")) {
		if rest, ok := strings.CutPrefix(line, "Max open files"); ok {
			return strings.Fields(rest)[:2]
		}
	}
	return nil
}

// refusal makes a daemon refuse a lock and returns what the journal has of it.
func refusal(m *Machine) Entry {
	m.t.Helper()
	m.Systemctl("start", Service)
	a, b := m.Guest(), m.Guest()
	acquire(m, a.Client(), disk)
	if err := b.Client().Acquire("", disk, 0); !wire.IsLocked(err) {
		m.t.Fatalf("ACQUIRE_RESOURCE of a held disk: %v", err)
	}
	e := m.WaitJournal("is locked", "_SYSTEMD_UNIT="+Service)
	if m.t.Failed() {
		return e
	}
	if ours := strconv.Itoa(m.MainPID()); e["_PID"] != ours {
		m.t.Errorf("the entry is of process %s, not %s", e["_PID"], ours)
	}
	e["pid of the loser"] = strconv.Itoa(b.PID())
	return e
}

// journald takes what the daemon sends as its own kind of message, with the fields that the C daemon's have.
func TestJournal(t *testing.T) {
	t.Parallel()
	c, ours := refusal(Boot(t, Options{Debian: true})), refusal(Boot(t, Options{}))
	for name := range c {
		if _, ok := ours[name]; !ok {
			t.Errorf("field %s=%q of the C daemon's entry is missing", name, c[name])
		}
	}
	for _, name := range []string{"_TRANSPORT", "_COMM", "_EXE", "_SYSTEMD_UNIT", "PRIORITY", "SYSLOG_FACILITY", "LIBVIRT_DOMAIN", "LIBVIRT_CODE"} {
		if c[name] != ours[name] {
			t.Errorf("field %s is %q, the C daemon's %q", name, ours[name], c[name])
		}
	}
	for _, part := range []string{disk, "pid=" + ours["pid of the loser"], "domain=vm", "uuid=11111111-1111-1111-1111-111111111111"} {
		if !strings.Contains(ours["MESSAGE"], part) {
			t.Errorf("message %q lacks %s", ours["MESSAGE"], part)
		}
	}
}
