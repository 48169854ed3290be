// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// kind of a server that is measured.
type kind string

const (
	ours kind = "ours"
	cOne kind = "C"
	bare kind = "floor"
)

// kinds returns those that there are.
func (b *bench) kinds() []kind {
	if b.c == "" {
		return []kind{ours, bare}
	}
	return []kind{cOne, ours, bare}
}

// daemons returns the kinds without the floor.
func (b *bench) daemons() []kind {
	all := b.kinds()
	return all[:len(all)-1]
}

// subject is a server that runs on a host of its own.
type subject struct {
	s    *scope
	h    *host.Host
	d    *host.Daemon
	sock string // for dial
	kept int    // the daemon's first process where d is its keeper; else 0
	// guest is a process that has registered itself and keeps its connection, as QEMU does. Others lock for it, as
	// libvirtd does.
	guest *host.Process
}

// process is the daemon's own, also where a keeper has started that.
func (t *subject) process() int {
	if t.kept != 0 {
		return t.kept
	}
	return t.d.PID()
}

// config for both daemons. All clients of a test machine's descriptor limit are let in.
const config = "max_clients = 20000\n"

// start starts a server, on the one processor that the clients use if pinned says so. One that is pinned later would
// have started its threads for more.
func (b *bench) start(s *scope, k kind, pinned bool) *subject {
	t := b.startOn(host.New(s), s, k, pinned, host.Options{})
	t.addGuest()
	return t
}

func (t *subject) addGuest() {
	t.guest = t.h.Spawn(host.ProcessOptions{})
	conn := t.guest.Dial(t.d, "lock")
	t.s.must(conn.Register(wire.VM(t.guest.PID())))
	t.s.must(conn.Restrict())
}

func (b *bench) startOn(h *host.Host, s *scope, k kind, pinned bool, o host.Options) *subject {
	t := &subject{s: s, h: h}
	o.Config = config
	binary := b.ours
	switch k {
	case ours:
		if b.env != "" {
			o.Env = append(o.Env, b.env)
		}
	case cOne:
		binary = b.c
	case bare:
		binary = "/proc/self/exe"
		o.NoConfig = true
		o.Env = append(o.Env, floorEnv+"=/run/libvirt/virtlockd-sock")
	}
	if pinned {
		var all, one unix.CPUSet
		one.Set(b.cpu)
		h.Must(func() error {
			if err := unix.SchedGetaffinity(0, &all); err != nil {
				return err
			}
			return unix.SchedSetaffinity(0, &one)
		})
		defer h.Must(func() error { return unix.SchedSetaffinity(0, &all) })
	}
	t.sock = h.Path("/run/libvirt/virtlockd-sock")
	t.d = h.Start(binary, o)
	return t
}

// startC starts the C daemon with clients that are connected, and locks. It takes a time that grows with the square of
// their number to connect to it, so they connect to ours, which hands over to it.
func (b *bench) startC(s *scope, pinned bool, clients, locks int) (*subject, *crowd) {
	t := b.startOn(host.New(s), s, ours, pinned, host.Options{Argv0: b.c})
	t.addGuest()
	t.lock(locks)
	idle := t.connect(clients)
	t.upgrade()
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", t.d.PID()))
	if err != nil || exe != b.c {
		s.Fatalf("no hand-over to the C daemon: %s runs, %v", exe, err)
	}
	// It serves.
	t.client().close()
	return t, idle
}

// loaded starts a server that has clients and locks.
func (b *bench) loaded(s *scope, k kind, pinned bool, clients, locks int) (*subject, *crowd) {
	if k == cOne && clients+locks > 200 {
		return b.startC(s, pinned, clients, locks)
	}
	t := b.start(s, k, pinned)
	t.lock(locks)
	return t, t.connect(clients)
}

// upgrade sends SIGUSR1 and returns when another program runs.
func (t *subject) upgrade() {
	before := stack(t.d.PID())
	t.d.Signal(syscall.SIGUSR1)
	if !host.Eventually(func() bool {
		now := stack(t.d.PID())
		return now != "" && now != before || !t.d.Alive()
	}) {
		t.s.Fatalf("SIGUSR1 has no effect\n%s", host.Shorten(t.d.Stderr()))
	}
	if !t.d.Alive() {
		t.s.Fatalf("SIGUSR1 ended the daemon: %d\n%s", t.d.Wait(), host.Shorten(t.d.Stderr()))
	}
}

// stack is where the stack of a process begins, which another program has elsewhere. "": it has none at this moment,
// which is so in the midst of exec(2), or has ended.
func stack(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	const startstack = 28 - 3 // proc_pid_stat(5); the first field here is the third
	if err != nil || len(fields) <= startstack || fields[startstack] == "0" {
		return ""
	}
	return fields[startstack]
}

// client connects and registers for the guest.
func (t *subject) client() *client {
	c, err := dial(t.sock)
	t.s.must(err)
	t.s.Cleanup(c.close)
	if err := c.call(owner(t.guest.PID())); err != nil {
		t.s.Fatalf("REGISTER: %v\n%s", err, host.Shorten(t.d.Stderr()))
	}
	return c
}

// place is where the files of a client's pairs are.
type place struct {
	indirect bool
	disk     bool // else tmpfs
}

// file is an image's path in the namespace, made there, or the lease's directory and name.
func (b *bench) resource(t *subject, p place, i int) (lockspace, name string, flags uint32) {
	dir := host.Data
	if p.disk {
		dir = filepath.Join(b.dir, strconv.Itoa(t.d.PID()))
	}
	if p.indirect {
		dir = filepath.Join(dir, "leases")
		c, err := dial(t.sock)
		t.s.must(err)
		t.s.must(c.call(wire.Request(wire.ProcCreateLockspace, 0, wire.LockspaceArgs(dir))))
		c.close()
		return dir, fmt.Sprintf("%064x", i), wire.Autocreate
	}
	path := filepath.Join(dir, "images", fmt.Sprintf("instance-%08x.qcow2", i))
	t.h.WriteFile(path, "", 0o600)
	return "", path, 0
}

// worker returns clients that make pairs, each on a resource of its own.
func (b *bench) workers(t *subject, p place, n int) []*client {
	cs := make([]*client, n)
	for i := range cs {
		cs[i] = t.client()
		cs[i].resource(b.resource(t, p, i))
	}
	return cs
}

// lock acquires n images for the guest.
func (t *subject) lock(n int) {
	if n == 0 {
		return
	}
	const batch = 64
	path := func(i int) string { return fmt.Sprintf("%s/held/instance-%08x.qcow2", host.Data, i) }
	t.h.Must(func() error {
		if err := os.MkdirAll(host.Data+"/held", 0o755); err != nil {
			return err
		}
		for i := range n {
			if err := os.WriteFile(path(i), nil, 0o600); err != nil {
				return err
			}
		}
		return nil
	})
	c := t.client()
	for i := 0; i < n; i += batch {
		var requests []byte
		for j := i; j < min(n, i+batch); j++ {
			requests = append(requests, wire.Request(wire.ProcAcquire, 1, wire.ResourceArgs("", path(j), 0))...)
		}
		t.s.must(c.send(requests))
		for j := i; j < min(n, i+batch); j++ {
			if err := c.recv(); err != nil {
				t.s.Fatalf("held lock %d: %v", j, err)
			}
		}
	}
}

// stop ends the server at once, before its clients go.
func (t *subject) stop() {
	t.d.Signal(syscall.SIGKILL)
	t.d.Wait()
}

// cpuTime is what a process has used, its ended threads included, in s. The clock's number is clock_getcpuclockid(3)'s.
func cpuTime(pid int) (float64, error) {
	const scheduler = 2 // CPUCLOCK_SCHED of the kernel
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|scheduler), &ts); err != nil {
		return 0, os.NewSyscallError("clock_gettime", err)
	}
	return float64(ts.Nano()) / 1e9, nil
}

// contextSwitches counts how often the threads of a process have been switched to another one.
func contextSwitches(pid int) float64 {
	n := 0.0
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	for _, task := range tasks {
		b, err := os.ReadFile(task)
		if err != nil {
			continue // it has ended
		}
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) == 2 && strings.HasSuffix(f[0], "voluntary_ctxt_switches:") {
				v, _ := strconv.ParseFloat(f[1], 64)
				n += v
			}
		}
	}
	return n
}

// use is the memory of a process in bytes.
type use struct{ private, pss float64 }

// memoryOf reads /proc/PID/smaps_rollup.
func memoryOf(pid int) (use, error) {
	var u use
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return u, err
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 3 || f[2] != "kB" {
			continue
		}
		n, err := strconv.ParseFloat(f[1], 64)
		if err != nil {
			return u, fmt.Errorf("smaps_rollup has the line %q", line)
		}
		switch f[0] {
		case "Private_Clean:", "Private_Dirty:":
			u.private += n * 1024
		case "Pss:":
			u.pss += n * 1024
		}
	}
	return u, nil
}

// rest lets things settle after a load.
func (b *bench) rest() {
	time.Sleep(time.Duration(b.pick(1000, 10000)) * time.Millisecond)
}
