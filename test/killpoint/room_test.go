// SPDX-License-Identifier: LGPL-2.1-or-later

package killpoint

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// crowded is a daemon whose vault can take some more locks, and no more.
type crowded struct {
	*host.Host
	t      testing.TB
	dir    string                 // of what is locked
	conn   *wire.Conn             // whose owner lives
	says   string                 // what the log gives as reason
	log    func() string          // the daemon's
	status func(...string) string // what virtlockctl says
	crash  func()                 // kills the daemon, and waits for the next one
}

func (c *crowded) path(i int) string { return fmt.Sprintf("%s/crowd%d-", c.dir, i) }

// unsafe lists the locks, of those that are given, that would be lost.
func (c *crowded) unsafe(n int) (list []int) {
	text := c.status("list", "--unsafe")
	for i := range n {
		if strings.Contains(text, c.path(i)) {
			list = append(list, i)
		}
	}
	return list
}

func (c *crowded) count(of string) int { return strings.Count(c.log(), of) }

// noRoom lets the daemon lock until the vault is full, and beyond.
func (c *crowded) noRoom() {
	t := c.t
	t.Helper()
	const (
		notSafe = "a lock is held but not safe from a crash of this daemon"
		most    = 600
		beyond  = 3 // are taken when there is no room
	)
	n := 0
	for enough := most; n < enough; n++ {
		must(t, c.conn.Acquire("", c.path(n), wire.Autocreate)) // service goes on
		if enough == most && c.count(notSafe) > 0 {
			enough = n + beyond
		}
	}
	if n == most {
		t.Fatalf("%d locks are safe\n%s", n, host.Shorten(c.log()))
	}
	unsafe := c.unsafe(n)
	if len(unsafe) < beyond || unsafe[0] != n-len(unsafe) {
		t.Fatalf("not safe, of %d locks, are %v, want the last %d at least", n, unsafe, beyond)
	}
	said := 0
	for line := range strings.Lines(c.log()) {
		if strings.Contains(line, " error : ") && strings.Contains(line, notSafe) && strings.Contains(line, c.says) {
			said++
		}
	}
	if said != len(unsafe) {
		t.Errorf("%d error lines tell that a lock is not safe, and why; want %d", said, len(unsafe))
	}
	// Connections, such as the tool's, are counted too.
	text := c.status("status")
	counted := regexp.MustCompile(`(\d+) times a lock or connection could not be made crash-safe`).FindStringSubmatch(text)
	if counted == nil {
		t.Errorf("status does not tell of it:\n%s", text)
	} else if times, _ := strconv.Atoi(counted[1]); times < len(unsafe) {
		t.Errorf("status counts %d, want %d at least", times, len(unsafe))
	}
	// When others are given up there is room for new ones.
	for i := range 10 {
		must(t, c.conn.Release("", c.path(i)))
	}
	for i := range 5 {
		must(t, c.conn.Acquire("", c.path(i), wire.Autocreate))
	}
	if now := c.unsafe(n); !slices.Equal(now, unsafe) {
		t.Errorf("after there was room: not safe are %v, want %v still", now, unsafe)
	}
	must(t, c.conn.Ping())
	// The daemon is not as it should be, but what is safe is safe.
	c.crash()
	must(t, c.conn.Ping())
	for i := range n {
		want := i < 5 || i >= 10 && !slices.Contains(unsafe, i)
		if held := !c.Free(c.path(i), true); held != want {
			t.Errorf("after a crash: lock %d is held: %v, want %v", i, held, want)
		}
	}
	// What it has taken over can be given up, and then all is as ever.
	for i := 10; i < n-len(unsafe); i++ {
		must(t, c.conn.Release("", c.path(i)))
	}
	must(t, c.conn.Acquire("", c.path(n-1), wire.Autocreate))
	c.crash()
	must(t, c.conn.Ping())
	if c.Free(c.path(n-1), true) {
		t.Error("what was locked when there was room again is lost")
	}
}

// The socket buffer of the vault's root takes no more cells: the daemon could not enlarge it.
func TestNoRoomInSocketBuffer(t *testing.T) {
	t.Parallel()
	m := startManaged(t)
	squeeze := func() {
		must(t, m.manager.Use(vaultName, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 1) }))
	}
	squeeze()
	c := &crowded{
		Host: m.Host, t: t, dir: host.Data, conn: m.client(), says: "socket buffer is too small",
		log:    func() string { return m.Stderr() },
		status: func(args ...string) string { return tool(t, m.Host, nil, nil, args...) },
		crash: func() {
			m.kill()
			m.Daemon = m.manager.Start(quiet)
		},
	}
	c.noRoom()
	m.mustLive()
}

// A user without privilege may have as many descriptors in flight as files open.
func TestNoRoomInFlight(t *testing.T) {
	t.Parallel()
	const (
		run   = "/tmp/xdg"
		start = "/tmp/start-unprivileged"
		// The third of what is in flight for a lock, the owner's pidfd, is in the daemon's table just once: so this limit is reached first.
		files = 300
	)
	// What is in flight is counted for each user, who must be nobody else's.
	// Nobody else's, not even another run's: the limit is one for all processes of a user.
	id := uint32(1<<24 + os.Getpid())
	user := &syscall.Credential{Uid: id, Gid: id}
	h := host.New(t)
	h.Must(func() error {
		if err := syscall.Mkdir(run, 0o700); err != nil {
			return err
		}
		return syscall.Chown(run, int(user.Uid), int(user.Gid))
	})
	h.Expose(host.Ours(t))
	h.WriteFile(start, fmt.Sprintf("#!/bin/sh\nulimit -n %d; exec %s \"$@\"\n", files, host.Ours(t)), 0o755)
	env := []string{"HOME=/none", "XDG_RUNTIME_DIR=" + run, "XDG_CONFIG_HOME=" + run, "XDG_CACHE_HOME=" + run}
	d := h.Start(start, host.Options{
		Args: []string{"--keeper"}, Config: "log_level = 2\nlog_outputs = \"2:stderr\"\n", Credential: user, Env: env, RunDir: run + "/libvirt", NoWait: true,
	})
	t.Cleanup(d.EndKept)
	if !host.Eventually(func() bool { return h.Exists(d.SocketPath("lock")) && d.Kept() != 0 }) {
		t.Fatalf("no daemon\n%s", d.Stderr())
	}
	guest := h.Spawn(host.ProcessOptions{Credential: user})
	conn := guest.Dial(d, "lock")
	must(t, conn.Register(wire.VM(guest.PID())))
	c := &crowded{
		Host: h, t: t, dir: run, conn: conn, says: "too many descriptors of this user are in flight",
		log:    d.Stderr,
		status: func(args ...string) string { return tool(t, h, user, env, args...) },
		crash: func() {
			const over = "this process has taken over"
			before, said := d.Kept(), strings.Count(d.Stderr(), over)
			host.Settled(t, before)
			must(t, unix.Kill(before, unix.SIGKILL))
			if !host.Eventually(func() bool { return strings.Count(d.Stderr(), over) > said }) {
				t.Fatalf("there is no daemon after process %d\n%s", before, host.Shorten(d.Stderr()))
			}
		},
	}
	c.noRoom()
	if guest.Dead() {
		t.Error("the guest was ended")
	}
}
