// SPDX-License-Identifier: LGPL-2.1-or-later

package ctl

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"virtlockd/internal/inspect"
	"virtlockd/test/host"
	"virtlockd/test/slowdisk"
	"virtlockd/test/wire"
)

func TestList(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	if r := want(t, h, ok, "list"); strings.Count(r.out, "\n") != 1 {
		t.Errorf("without locks: %v", r)
	}
	begin := time.Now()
	p, alpha := guest(t, h, d, "alpha")
	disk := file(h, "disk")
	must(t, alpha.Acquire("", disk, 0))
	space := host.Data + "/leases"
	must(t, alpha.CreateLockspace(space))
	must(t, alpha.Acquire(space, "lease", wire.Shared|wire.Autocreate))
	beta := d.Client(0x70000001)
	must(t, beta.Acquire(space, "lease", wire.Shared))

	var locks []inspect.Lock
	read(t, h, ok, &locks, "list")
	if len(locks) != 2 || locks[0].Resource != inspect.Text(disk) || locks[1].Resource != "lease" {
		t.Fatalf("listed %+v", locks)
	}
	l := locks[0]
	if l.Lockspace != "" || l.Path != l.Resource || l.Mode != "exclusive" || l.Kind != "OFD" || l.Remote || l.AutoCreate || len(l.Owners) != 1 {
		t.Errorf("the disk is listed as %+v", l)
	}
	o := l.Owners[0]
	if o.Name != "alpha" || o.PID != int32(p.PID()) || o.Kind != "verified" || o.UUID != "11111111-1111-1111-1111-111111111111" ||
		o.Since.Before(begin.Add(-time.Second)) || o.Since.After(time.Now().Add(time.Second)) {
		t.Errorf("its owner is listed as %+v", o)
	}
	if l := locks[1]; l.Mode != "shared" || !l.AutoCreate || l.Lockspace != inspect.Text(space) || l.Path != inspect.Text(space+"/lease") ||
		len(l.Owners) != 2 || l.Owners[1].Kind != "unverified" {
		t.Errorf("the lease is listed as %+v", l)
	}

	for _, c := range []struct {
		args string
		rows int
	}{
		{"", 3}, {"-l /", 1}, {"-l " + space, 2}, {"-l /none", 0}, {"-r lease", 2}, {"-r dis", 1}, {"-u alpha", 3}, {"-u beta", 0},
		{fmt.Sprintf("-u %d", 0x70000001), 2}, {"-u 11111111-1111-1111-1111-111111111111", 3},
		{"-m shared", 2}, {"-m exclusive", 1}, {"--unsafe", 3},
	} {
		r := want(t, h, ok, append([]string{"list"}, strings.Fields(c.args)...)...)
		if n := strings.Count(r.out, "\n") - 1; n != c.rows {
			t.Errorf("list %s has %d rows, want %d:\n%s", c.args, n, c.rows, r.out)
		}
		if strings.Contains(r.out, "\x1b") {
			t.Errorf("list %s has colours for a file", c.args)
		}
	}
}

// The whole of a long table comes, in parts.
func TestListMany(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	c := d.Client(0x70000001)
	space := host.Data + "/leases"
	must(t, c.CreateLockspace(space))
	const n = 1000
	for i := range n {
		must(t, c.Acquire(space, fmt.Sprintf("%04d", i), wire.Autocreate))
	}
	var locks []inspect.Lock
	read(t, h, ok, &locks, "list")
	if len(locks) != n {
		t.Fatalf("%d of %d locks", len(locks), n)
	}
	for i, l := range locks {
		if string(l.Resource) != fmt.Sprintf("%04d", i) {
			t.Fatalf("lock %d is %s", i, l.Resource)
		}
	}
	var s inspect.Status
	read(t, h, ok, &s, "status")
	if s.Locks.Exclusive != n || s.Locks.Shared != 0 || s.Lockspaces != 2 {
		t.Errorf("status %+v", s)
	}
}

// What a client has named can't do anything to the terminal.
func TestNamesAreEscaped(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	c := d.Dial("lock")
	vm := wire.VM(0x70000001)
	vm.Name = "a\x1b[31mb\nc\xff\u202e"
	must(t, c.Register(vm))
	disk := file(h, "x\x1b]0;title\x07\xfe")
	must(t, c.Acquire("", disk, 0))
	for _, args := range [][]string{{"list"}, {"who", disk}, {"events"}, {"check"}} {
		r := ctl(t, h, args...)
		if strings.ContainsAny(r.out, "\x1b\x07\u202e") || !utf8.ValidString(r.out) || !strings.Contains(r.out, `x\x1b]0;title\a\xfe`) {
			t.Errorf("%q: %v", args, r)
		}
	}
	var locks []inspect.Lock
	read(t, h, ok, &locks, "list")
	if len(locks) != 1 || string(locks[0].Resource) != disk || string(locks[0].Owners[0].Name) != vm.Name {
		t.Errorf("JSON does not keep the bytes: %+v", locks)
	}
}

func TestWho(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	_, c := guest(t, h, d, "alpha")
	disk, other := file(h, "disk"), file(h, "other")
	space := host.Data + "/leases"
	must(t, c.CreateLockspace(space))
	must(t, c.Acquire("", disk, 0))
	sum := sha256.Sum256([]byte("/images/far.qcow2"))
	name := hex.EncodeToString(sum[:])
	must(t, c.Acquire(space, name, wire.Autocreate))
	h.Must(func() error { return syscall.Symlink("disk", host.Data+"/link") })

	for _, disk := range []string{disk, "/images/far.qcow2", name, host.Data + "/link", "../vlv/disk"} {
		if r := want(t, h, ok, "who", disk); !strings.Contains(r.out, "alpha") {
			t.Errorf("who %s: %v", disk, r)
		}
	}
	// libvirt does not clean a path before it computes the sum; a name without slash is a path if there is such a file.
	for _, spelled := range []string{"/images//b.qcow2", host.Cwd + "/here.qcow2"} {
		sum := sha256.Sum256([]byte(spelled))
		must(t, c.Acquire(space, hex.EncodeToString(sum[:]), wire.Autocreate))
	}
	h.WriteFile(host.Cwd+"/here.qcow2", "", 0o600)
	for _, disk := range []string{"/images//b.qcow2", "here.qcow2"} {
		if r := want(t, h, ok, "who", disk); !strings.Contains(r.out, "alpha") {
			t.Errorf("who %s: %v", disk, r)
		}
	}
	if r := want(t, h, found, "who", other); !strings.Contains(r.out, "sha256") {
		t.Errorf("who of a free disk: %v", r)
	}
	want(t, h, found, "who", "/none")
	var answer struct {
		Names []struct{ What, Name string }
		Locks []inspect.Lock
	}
	read(t, h, ok, &answer, "who", "/images/far.qcow2")
	if len(answer.Locks) != 1 || len(answer.Names) != 2 || answer.Names[1].Name != name {
		t.Errorf("who in JSON: %+v", answer)
	}
}

// The programs that libvirt asks are asked for a block device, and no other.
func TestWhoAsksPrograms(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	c := d.Client(0x70000001)
	space := host.Data + "/leases"
	must(t, c.CreateLockspace(space))
	must(t, c.Acquire(space, "the-lvm-uuid", wire.Autocreate))
	h.WriteFile("/tmp/bin/lvs", "#!/bin/sh\n[ \"$*\" = '--noheadings --unbuffered --nosuffix --options uuid /dev/vg/disk' ] && echo '  the-lvm-uuid'\n", 0o755)
	must(t, c.Acquire(space, "the-scsi-serial", wire.Autocreate))
	h.WriteFile("/tmp/udev/scsi_id", "#!/bin/sh\n[ \"$*\" = '--replace-whitespace --whitelisted --device /dev/sdz' ] && echo 'the-scsi-serial '\n", 0o755)
	h.Must(func() error { return syscall.Mount("/tmp/udev", "/lib/udev", "", syscall.MS_BIND, "") })
	run := func(path string) result {
		cmd := command(t, h, "who", path)
		cmd.Env = append(cmd.Env, "PATH=/tmp/bin:/usr/bin:/bin")
		return finish(t, h, cmd)
	}
	if r := run("/dev/vg/disk"); r.exit != ok || !strings.Contains(r.out, "the-lvm-uuid") {
		t.Errorf("who of a volume: %v", r)
	}
	if r := run("/dev/sdz"); r.exit != ok || !strings.Contains(r.out, "the-scsi-serial") || strings.Contains(r.out, "the-lvm-uuid") {
		t.Errorf("who of a SCSI disk: %v", r)
	}
	for _, path := range []string{"/vg/disk", "/sdz"} {
		if r := run(path); r.exit != found {
			t.Errorf("who of the file %s: %v", path, r)
		}
	}
}

func TestRelease(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	p, c := guest(t, h, d, "alpha")
	disk := file(h, "disk")
	must(t, c.Acquire("", disk, 0))
	want(t, h, usage, "release", disk) // nobody can be asked
	want(t, h, failure, "release", "--yes", disk+"x")
	want(t, h, failure, "release", "--yes", "--pid", "1", disk)
	if h.Free(disk, true) {
		t.Fatal("the lock is gone")
	}
	r := want(t, h, ok, "release", "--yes", disk)
	if !strings.Contains(r.out, "alpha") || !h.Free(disk, true) {
		t.Errorf("%v", r)
	}
	if p.Dead() {
		t.Error("the owner was ended")
	}
	logged := func() bool {
		log := d.Stderr()
		return strings.Contains(log, "warning") && strings.Contains(log, "was taken from its owner") && strings.Contains(log, "alpha")
	}
	if !host.Eventually(logged) {
		t.Errorf("the log says %s", host.Shorten(d.Stderr()))
	}
	if r := ctl(t, h, "events", "-k", "released"); !strings.Contains(r.out, "(administrator)") {
		t.Errorf("events: %v", r)
	}

	// One of several.
	must(t, c.Acquire("", disk, wire.Shared))
	must(t, d.Client(0x70000001).Acquire("", disk, wire.Shared))
	if r := want(t, h, failure, "release", "--yes", disk); !strings.Contains(r.errs, "several") {
		t.Errorf("one of several: %v", r)
	}
	want(t, h, ok, "release", "--yes", "--pid", fmt.Sprint(p.PID()), disk)
	var locks []inspect.Lock
	read(t, h, ok, &locks, "list")
	if len(locks) != 1 || len(locks[0].Owners) != 1 || locks[0].Owners[0].PID != 0x70000001 {
		t.Errorf("left: %+v", locks)
	}
	space := host.Data + "/leases"
	must(t, c.CreateLockspace(space))
	must(t, c.Acquire(space, "lease", wire.Autocreate))
	want(t, h, ok, "release", "-y", "-l", space, "lease")
	if h.Exists(space + "/lease") {
		t.Error("a lease file is left")
	}
}

// Whoever is asked says yes to what was shown: somebody who has got the lock meanwhile keeps it.
func TestReleaseAsks(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	disk := file(h, "disk")
	ask := func(args ...string) *terminal {
		return inTerminal(t, h, 24, 300, command(t, h, append([]string{"release", disk}, args...)...))
	}
	x := ask()
	x.await("held by nobody")
	if code := x.end(); code != failure {
		t.Errorf("of nobody's: exit code %d", code)
	}
	first, second := d.Client(0x70000001), d.Client(0x70000002)
	must(t, first.Acquire("", disk, wire.Shared))
	must(t, second.Acquire("", disk, wire.Shared))
	x = ask()
	x.await("several owners")
	if code := x.end(); code != usage {
		t.Errorf("of two: exit code %d", code)
	}
	must(t, second.Release("", disk))
	for _, next := range []*wire.Conn{second, first} {
		x = ask()
		x.await(fmt.Sprint(0x70000001), "Type yes")
		must(t, first.Release("", disk))
		must(t, next.Acquire("", disk, 0))
		x.typeIn("yes\n")
		x.await("does not hold the resource")
		if code := x.end(); code != failure || h.Free(disk, true) {
			t.Errorf("of another one's: exit code %d", code)
		}
		must(t, next.Release("", disk))
		must(t, first.Acquire("", disk, 0))
	}
	x = ask()
	x.await("Type yes")
	x.typeIn("yes\n")
	x.await("released: ")
	if code := x.end(); code != ok || !h.Free(disk, true) {
		t.Errorf("exit code %d", code)
	}
}

func TestEvents(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	p, c := guest(t, h, d, "alpha")
	disk := file(h, "disk")
	must(t, c.Acquire("", disk, 0))
	if err := d.Client(0x70000001).Acquire("", disk, 0); !wire.IsLocked(err) {
		t.Fatal(err)
	}
	p.IgnoreTerm()
	c.Close()
	p.Gone()
	var out string
	complete := func() bool {
		out = ctl(t, h, "events").out
		return strings.Contains(out, "released")
	}
	if !host.Eventually(complete) {
		t.Fatalf("events:\n%s", out)
	}
	var order []string
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		what := f[2]
		if strings.HasPrefix(f[3], "(") {
			what += f[3]
		}
		order = append(order, what)
	}
	if got, want := strings.Join(order, " "), "acquired refused(held) killed(SIGTERM) killed(SIGKILL) released(owner-dead)"; got != want {
		t.Errorf("events %s, want %s", got, want)
	}
	if r := ctl(t, h, "events", "--kind", "refused,killed"); strings.Count(r.out, "\n") != 3 {
		t.Errorf("some events: %v", r)
	}
}

// A guest that can't be killed, since it waits for a disk, keeps its locks until it has ended, and that is told.
func TestOwnerCannotBeKilled(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	p, c := guest(t, h, d, "alpha")
	disk := file(h, "disk")
	must(t, c.Acquire("", disk, 0))
	slow := slowdisk.Mount(t, h, "/tmp/slow", slowdisk.Options{})
	slow.Add("image")
	slow.Hang(slowdisk.Open)
	p.Open("/tmp/slow/image")
	slow.AwaitHang(slowdisk.Open)
	c.Close()
	if !host.Eventually(func() bool { return strings.Contains(d.Stderr(), "the killed owner does not end") }) {
		t.Fatalf("nothing is said of a guest that does not end:\n%s", d.Stderr())
	}
	if p.Dead() || h.Free(disk, true) {
		t.Errorf("dead: %v; its lock is free: %v", p.Dead(), h.Free(disk, true))
	}
	if !host.Eventually(func() bool { return strings.Contains(ctl(t, h, "events", "--kind", "killed").out, "(stuck)") }) {
		t.Error("there is no event of a guest that does not end")
	}
	slow.Resume(slowdisk.Open)
	p.Gone()
	if !host.Eventually(func() bool { return h.Free(disk, true) }) {
		t.Error("the lock of a guest that has ended is not free")
	}
}

// A follower sees what happens, over a live upgrade and a restart too.
func TestFollow(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	c := d.Client(0x70000001)
	one, two := file(h, "one"), file(h, "two")
	cmd := command(t, h, "events", "--follow", "-o", "json")
	f := follow(t, h, cmd)
	must(t, c.Acquire("", one, 0))
	f.await("acquired", one)
	d.Signal(syscall.SIGUSR1)
	f.await("upgraded", "taken over 1 locks")
	must(t, c.Acquire("", two, 0))
	f.await("acquired", two)
	var locks []inspect.Lock
	read(t, h, ok, &locks, "list")
	if len(locks) != 2 || locks[0].Owners[0].Since.IsZero() || locks[0].Owners[0].Since.After(locks[1].Owners[0].Since) {
		t.Errorf("times after the upgrade: %+v", locks)
	}
	var s inspect.Status
	read(t, h, ok, &s, "status")
	if s.Upgrades != 1 || !s.Started.Before(s.Serving) {
		t.Errorf("status after the upgrade: %+v", s)
	}
	d.Stop()
	f.await("waiting for it")
	d = h.Start(host.Ours(t), host.Options{})
	three := file(h, "three")
	must(t, d.Client(0x70000001).Acquire("", three, 0))
	f.await("acquired", three)
	must(t, cmd.Process.Signal(syscall.SIGINT))
	if code := f.end(); code != ok {
		t.Errorf("an interrupted follower ends with %d", code)
	}
}

func TestStatus(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{Config: "max_clients = 7\n"})
	c := d.Client(0x70000001)
	must(t, c.Acquire("", file(h, "disk"), 0))
	r := want(t, h, ok, "status")
	for _, text := range []string{fmt.Sprintf("%d, up", d.PID()), "1 held: 1 exclusive, 0 shared", "virtlockd: 1 of at most 7 clients", "no: nobody keeps locks beyond this process"} {
		if !strings.Contains(r.out, text) {
			t.Errorf("status does not say %q:\n%s", text, r.out)
		}
	}
}

// Each client and each lock needs a file of the daemon, and there may be so many.
func TestOpenFiles(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	c := d.Client(0x70000001)
	for i := range 20 {
		must(t, c.Acquire("", file(h, fmt.Sprint(i)), 0))
	}
	must(t, unix.Prlimit(d.PID(), unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 60, Max: 60}, nil))
	var s inspect.Status
	if !host.Eventually(func() bool { // connections before may not be closed yet
		read(t, h, ok, &s, "status")
		open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.PID()))
		must(t, err)
		return s.Files.Open == len(open)+1 // that of the question
	}) {
		t.Errorf("it counts %d open files", s.Files.Open)
	}
	if s.Files.Max != 60 || s.Files.Open <= 20 {
		t.Errorf("%+v", s.Files)
	}
	if r := want(t, h, ok, "status"); !regexp.MustCompile(`(?m)^open files +\d+ of at most 60$`).MatchString(r.out) {
		t.Errorf("status does not say how many files may be open:\n%s", r.out)
	}
	families := exposition(t, want(t, h, ok, "metrics").out)
	if n := value(families, "virtlockd_open_files", ""); n <= 20 || n > 60 {
		t.Errorf("virtlockd_open_files is %v", n)
	}
	if n := value(families, "virtlockd_open_files_max", ""); n != 60 {
		t.Errorf("virtlockd_open_files_max is %v", n)
	}
}

func TestUnreachable(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	if r := want(t, h, absent, "list"); !strings.Contains(r.errs, "hint: start it") {
		t.Errorf("no daemon: %v", r)
	}
	d := h.Start(host.C(t), host.Options{})
	for _, command := range []string{"list", "status", "events", "check", "who /x", "release --yes /x"} {
		if r := want(t, h, absent, strings.Fields(command)...); !strings.Contains(r.errs, "libvirt's own virtlockd") {
			t.Errorf("the C daemon: %v", r)
		}
	}
	d.Stop()
	ours := h.Start(host.Ours(t), host.Options{})
	if r := want(t, h, absent, "-c", ours.SocketPath("lock"), "list"); !strings.Contains(r.errs, "virtlockd-admin-sock") {
		t.Errorf("the wrong socket: %v", r)
	}
	cmd := command(t, h, "-c", ours.SocketPath("admin"), "list")
	cmd.SysProcAttr.Credential = &syscall.Credential{Uid: 65534, Gid: 65534}
	if r := finish(t, h, cmd); r.exit != denied || !strings.Contains(r.errs, "root only") {
		t.Errorf("somebody else: %v", r)
	}
	// Even if he may open the socket.
	h.Must(func() error { return syscall.Chmod(ours.SocketPath("admin"), 0o777) })
	cmd = command(t, h, "-c", ours.SocketPath("admin"), "list")
	cmd.SysProcAttr.Credential = &syscall.Credential{Uid: 65534, Gid: 65534}
	if r := finish(t, h, cmd); r.exit != denied {
		t.Errorf("somebody else: %v", r)
	}
}

func TestUsage(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	for _, line := range []string{"", "none", "list extra", "who", "who a b", "list --none", "list -o xml", "list -m both", "release", "completion", "completion csh", "--none", "help none", "top", "top -i 1ms", "release --yes --pid 9999999999 x", "events --kind lsot", "events -k lost,lsot"} {
		r := want(t, h, usage, strings.Fields(line)...)
		if !strings.Contains(r.errs, "hint: ") || r.out != "" {
			t.Errorf("%q: %v", line, r)
		}
	}
	for _, line := range []string{"help", "-h", "--help", "help list", "list --help", "version", "--version", "completion bash", "completion zsh", "completion fish"} {
		if r := want(t, h, ok, strings.Fields(line)...); r.out == "" || r.errs != "" {
			t.Errorf("%q: %v", line, r)
		}
	}
}

// A connection that has given up its right to change anything can't, by any program, and an upgrade does not give
// it back.
func TestReadOnly(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	disk := file(h, "disk")
	must(t, d.Client(0x70000001).Acquire("", disk, 0))
	c := d.Dial("admin")
	must(t, c.AdminOpen())
	call := func(program, proc uint32, args []byte) error {
		must(t, c.Send(wire.Frame(wire.Header{Program: program, Version: 1, Proc: proc}, args)))
		m, err := c.Recv()
		must(t, err)
		return m.Err()
	}
	release, err := inspect.Append(nil, inspect.ReleaseRequest{Resource: inspect.Text(disk)})
	must(t, err)
	must(t, call(inspect.ReadProgram, inspect.ProcReadOnly, nil))
	for range 2 {
		for what, err := range map[string]error{
			"release":           call(inspect.WriteProgram, inspect.ProcRelease, release),
			"virt-admin":        call(wire.AdminProgram, 19, wire.Payload(nil).Uint32(9).Uint32(0)),
			"client-disconnect": c.AdminClientClose(wire.LockServer, 1),
		} {
			if e := wire.AsError(err); e == nil || e.Code != wire.CodeDenied {
				t.Errorf("%s: %v", what, err)
			}
		}
		must(t, call(inspect.ReadProgram, inspect.ProcStatus, nil))
		if h.Free(disk, true) {
			t.Fatal("the lock is gone")
		}
		upgrade(t, h, d)
	}
}

// upgrade makes the daemon replace itself.
func upgrade(t *testing.T, h *host.Host, d *host.Daemon) {
	t.Helper()
	var before, s inspect.Status
	read(t, h, ok, &before, "status")
	d.Signal(syscall.SIGUSR1)
	if !host.Eventually(func() bool { read(t, h, ok, &s, "status"); return s.Upgrades > before.Upgrades }) {
		t.Fatal("no live upgrade")
	}
}

// A user's own daemon is found by that user without being told where it is.
func TestSession(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	nobody := &syscall.Credential{Uid: 65534, Gid: 65534}
	const run = "/tmp/xdg"
	h.Must(func() error {
		if err := syscall.Mkdir(run, 0o700); err != nil {
			return err
		}
		return syscall.Chown(run, int(nobody.Uid), int(nobody.Gid))
	})
	env := []string{"HOME=/none", "XDG_RUNTIME_DIR=" + run, "XDG_CONFIG_HOME=" + run, "XDG_CACHE_HOME=" + run}
	d := h.Start(host.Ours(t), host.Options{Credential: nobody, Env: env, RunDir: run + "/libvirt", NoWait: true})
	if !host.Eventually(func() bool { return h.Exists(d.SocketPath("admin")) }) {
		t.Fatalf("no admin socket\n%s", d.Stderr())
	}
	cmd := command(t, h, "status")
	cmd.Env, cmd.SysProcAttr.Credential = append(cmd.Env, env...), nobody
	if r := finish(t, h, cmd); r.exit != ok || !strings.Contains(r.out, fmt.Sprint(d.PID())) {
		t.Errorf("%v", r)
	}
	// root is somebody else here.
	want(t, h, denied, "-c", d.SocketPath("admin"), "status")
}
