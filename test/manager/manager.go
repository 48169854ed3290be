// SPDX-License-Identifier: LGPL-2.1-or-later

// Package manager is a service manager of a test's own. It keeps the descriptors of a lock daemon and passes them to the next one, as
// systemd does, but starts one when the test says so, and can be slow, refuse what it is to keep, or be gone.
package manager

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
)

const address = "/run/manager"

// item is a descriptor that is kept.
type item struct {
	name string
	file *os.File
}

// Manager is one on a host. It ends with the test.
type Manager struct {
	h    *host.Host
	t    testing.TB
	work sync.Mutex // held while a message is worked off

	mu      sync.Mutex
	items   []item
	said    []string
	refuses string
	stalls  string
}

// New starts a manager.
func New(t testing.TB, h *host.Host) *Manager {
	t.Helper()
	m := &Manager{h: h, t: t}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	h.Must(func() error { return unix.Bind(fd, &unix.SockaddrUnix{Name: address}) })
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		data, control := make([]byte, 4096), make([]byte, unix.CmsgSpace(4*64))
		for {
			n, c, _, _, err := unix.Recvmsg(fd, data, control, unix.MSG_CMSG_CLOEXEC)
			if err == unix.EINTR {
				continue
			}
			if err != nil || n == 0 {
				return
			}
			if m.stallsAt(string(data[:n])) {
				m.Pause()
			}
			m.work.Lock()
			m.receive(string(data[:n]), control[:c])
			m.work.Unlock()
		}
	}()
	t.Cleanup(func() {
		unix.Shutdown(fd, unix.SHUT_RD)
		<-ended
		unix.Close(fd)
		m.Drop()
	})
	return m
}

func (m *Manager) receive(message string, control []byte) {
	var files []*os.File
	if messages, err := unix.ParseSocketControlMessage(control); err == nil {
		for i := range messages {
			fds, _ := unix.ParseUnixRights(&messages[i])
			for _, fd := range fds {
				files = append(files, os.NewFile(uintptr(fd), "stored"))
			}
		}
	}
	lines := strings.Split(message, "\n")
	name := "stored"
	for _, line := range lines {
		if of, ok := strings.CutPrefix(line, "FDNAME="); ok {
			name = of
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.said = append(m.said, message)
	switch {
	case slices.Contains(lines, "FDSTORE=1") && (m.refuses == "" || !strings.Contains(name, m.refuses)):
		for _, f := range files {
			if slices.ContainsFunc(m.items, func(it item) bool { return same(it.file, f) }) {
				f.Close()
			} else {
				m.items = append(m.items, item{name, f})
			}
		}
		return
	case slices.Contains(lines, "FDSTOREREMOVE=1"):
		m.items = slices.DeleteFunc(m.items, func(it item) bool {
			if it.name == name {
				it.file.Close()
			}
			return it.name == name
		})
	}
	for _, f := range files { // what is refused; and what comes with a barrier, to answer it
		f.Close()
	}
}

// same tells whether two files are the same socket, of which one copy is enough.
func same(a, b *os.File) bool {
	first, err := a.Stat()
	second, again := b.Stat()
	return err == nil && again == nil && os.SameFile(first, second)
}

// Pause makes it answer nothing. What it is told meanwhile it hears afterwards.
func (m *Manager) Pause() { m.work.Lock() }

// PauseAt makes it answer nothing from the moment on that it is given something under this name.
func (m *Manager) PauseAt(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stalls = name
}

// stallsAt tells whether the pause of PauseAt begins with this message.
func (m *Manager) stallsAt(message string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	lines := strings.Split(message, "\n")
	if m.stalls == "" || !slices.Contains(lines, "FDSTORE=1") || !slices.Contains(lines, "FDNAME="+m.stalls) {
		return false
	}
	m.stalls = ""
	return true
}

// Continue ends a pause.
func (m *Manager) Continue() { m.work.Unlock() }

// Refuse makes it throw away what it is given under a name that contains this; "": nothing any more.
func (m *Manager) Refuse(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.refuses = name
}

// Kept returns how many descriptors it keeps under a name.
func (m *Manager) Kept(name string) (n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, it := range m.items {
		if it.name == name {
			n++
		}
	}
	return n
}

// Keep has it keep this, too, as if it had been given that before all others or, with last, after them.
func (m *Manager) Keep(name string, f *os.File, last bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	at := 0
	if last {
		at = len(m.items)
	}
	m.items = slices.Insert(m.items, at, item{name, f})
}

// Use calls f with a descriptor that it keeps under a name.
func (m *Manager) Use(name string, f func(fd int) error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, it := range m.items {
		if it.name == name {
			return f(int(it.file.Fd()))
		}
	}
	return fmt.Errorf("the manager keeps no %s", name)
}

// Said returns how often it was told this.
func (m *Manager) Said(line string) (n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, message := range m.said {
		if slices.Contains(strings.Split(message, "\n"), line) {
			n++
		}
	}
	return n
}

// Drop closes all that it keeps.
func (m *Manager) Drop() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, it := range m.items {
		it.file.Close()
	}
	m.items = nil
}

// Options returns how a daemon is started that gets what is kept, as the process that NOTIFY_SOCKET is meant for. Only that itself
// knows its number, so LISTEN_PID is up to who starts it.
func (m *Manager) Options(o host.Options) host.Options {
	m.mu.Lock()
	defer m.mu.Unlock()
	var names []string
	for _, it := range m.items {
		o.Files = append(o.Files, it.file)
		names = append(names, it.name)
	}
	o.Env = append(o.Env, "NOTIFY_SOCKET="+address)
	if len(names) > 0 {
		o.Env = append(o.Env, "LISTEN_FDS="+strconv.Itoa(len(names)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	}
	return o
}

// Start starts a daemon and waits until it is ready.
func (m *Manager) Start(o host.Options) *host.Daemon {
	m.t.Helper()
	ready := m.Said("READY=1")
	d := m.Launch(o)
	if !host.Eventually(func() bool { return m.Said("READY=1") > ready }) {
		m.t.Fatalf("the daemon never says that it is ready\n%s", host.Shorten(d.Stderr()))
	}
	return d
}

// Launch starts a daemon, which can be connected to afterwards, or with o.NoWait not even that. NOFILE in its environment is how many
// descriptors it may have, and PROGRAM a path by which it is run, so that a test can put another program there.
func (m *Manager) Launch(o host.Options) *host.Daemon {
	m.t.Helper()
	o = m.Options(o)
	// The shell, which becomes the daemon, knows the number.
	script := fmt.Sprintf("#!/bin/sh\ntest -z \"$NOFILE\" || ulimit -n \"$NOFILE\"\nLISTEN_PID=$$; export LISTEN_PID; exec \"${PROGRAM:-%s}\" \"$@\"\n", host.Ours(m.t))
	m.h.WriteFile(starter, script, 0o755)
	m.h.Expose(host.Ours(m.t))
	return m.h.Start(starter, o)
}

const starter = "/tmp/start-virtlockd" // not below a directory, which host would look for on the real machine
