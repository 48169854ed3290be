// SPDX-License-Identifier: LGPL-2.1-or-later

package systemd

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// manager is who receives notifications: it works like systemd, with a store for max descriptors.
type manager struct {
	conn  *net.UnixConn
	max   int
	mute  bool // doesn't work off barriers
	ended chan struct{}

	mu    sync.Mutex // guards what follows
	names []string
	store []int
	polls []string // what FDPOLL= each of them came with
}

func startManager(t *testing.T, max int, mute bool) (*manager, Notifier) {
	t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: "@" + t.TempDir(), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	m := &manager{conn: conn, max: max, mute: mute, ended: make(chan struct{})}
	go m.serve()
	t.Cleanup(m.close)
	return m, Notifier{address: conn.LocalAddr().String()}
}

func (m *manager) close() {
	m.conn.Close()
	<-m.ended
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, fd := range m.store {
		unix.Close(fd)
	}
	m.store = nil
}

// stored names what is in the store, each with the FDPOLL= that it came with.
func (m *manager) stored() (names []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, name := range m.names {
		names = append(names, name+m.polls[i])
	}
	return names
}

func (m *manager) serve() {
	defer close(m.ended)
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4*maxPassed))
	for {
		n, oobn, _, _, err := m.conn.ReadMsgUnix(buf, oob)
		if err != nil {
			return
		}
		var fds []int
		if messages, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil && len(messages) == 1 {
			fds, _ = unix.ParseUnixRights(&messages[0])
		}
		m.work(string(buf[:n]), fds)
	}
}

func (m *manager) work(message string, fds []int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	name, _ := field(message, "FDNAME")
	if v, _ := field(message, "FDSTORE"); v == "1" {
		for len(fds) > 0 && len(m.store) < m.max {
			poll, _ := field(message, "FDPOLL")
			m.store, m.names, m.polls = append(m.store, fds[0]), append(m.names, name), append(m.polls, poll)
			fds = fds[1:]
		}
	}
	if v, _ := field(message, "FDSTOREREMOVE"); v == "1" {
		for i := len(m.store) - 1; i >= 0; i-- {
			if m.names[i] == name {
				unix.Close(m.store[i])
				m.store, m.names, m.polls = slices.Delete(m.store, i, i+1), slices.Delete(m.names, i, i+1), slices.Delete(m.polls, i, i+1)
			}
		}
	}
	if v, _ := field(message, "BARRIER"); v == "1" && m.mute {
		m.store = append(m.store, fds...)
		return
	}
	for _, fd := range fds {
		unix.Close(fd)
	}
}

func TestStore(t *testing.T) {
	t.Parallel()
	m, n := startManager(t, 2*maxPassed, false)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	barrier := func() {
		t.Helper()
		if err := n.Barrier(10 * time.Second); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(n.Store("a", int(r.Fd())), n.Store("b", int(w.Fd()), int(r.Fd()))); err != nil {
		t.Fatal(err)
	}
	barrier()
	if got := fmt.Sprint(m.stored()); got != "[a0 b0 b0]" {
		t.Errorf("stored: %s", got)
	}
	if err := n.Remove("b"); err != nil {
		t.Fatal(err)
	}
	barrier()
	if got := fmt.Sprint(m.stored()); got != "[a0]" {
		t.Errorf("after the removal: %s", got)
	}
	// More than fit into one message.
	many := slices.Repeat([]int{int(r.Fd())}, maxPassed+1)
	if err := n.Store("many", many...); err != nil {
		t.Fatal(err)
	}
	barrier()
	if got := len(m.stored()); got != 1+len(many) {
		t.Errorf("%d descriptors are stored, want %d", got, 1+len(many))
	}
}

func TestStoreNames(t *testing.T) {
	t.Parallel()
	_, n := startManager(t, 1, false)
	for name, want := range map[string]bool{
		"": false, "a": true, "vault 1": true, "a:b": false, "a\nFDSTOREREMOVE=1": false, "\x7f": false, "ä": false,
		strings.Repeat("x", MaxName): true, strings.Repeat("x", MaxName+1): false,
	} {
		if got := ValidName(name); got != want {
			t.Errorf("ValidName(%q) = %v", name, got)
		}
		if err := n.Remove(name); (err == nil) != want {
			t.Errorf("Remove(%q): %v", name, err)
		}
		if err := n.Store(name); (err == nil) != want {
			t.Errorf("Store(%q): %v", name, err)
		}
	}
}

func TestBarrierTimeout(t *testing.T) {
	t.Parallel()
	_, n := startManager(t, 1, true)
	if err := n.Barrier(10 * time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("nobody answered: %v", err)
	}
	if err := (Notifier{}).Barrier(time.Hour); err != nil {
		t.Errorf("without a receiver: %v", err)
	}
}

func TestProbeStore(t *testing.T) {
	t.Parallel()
	m, n := startManager(t, 1, false)
	if err := n.ProbeStore("probe", 10*time.Second); err != nil {
		t.Errorf("a store that is real: %v", err)
	}
	if err := n.Barrier(10 * time.Second); err != nil || len(m.stored()) != 0 {
		t.Errorf("left in the store: %v, %v", m.stored(), err)
	}
	_, n = startManager(t, 0, false)
	if err := n.ProbeStore("probe", 10*time.Second); !errors.Is(err, ErrNoStore) {
		t.Errorf("a store that isn't: %v", err)
	}
	if err := (Notifier{}).ProbeStore("probe", 10*time.Second); !errors.Is(err, ErrNoStore) {
		t.Errorf("nobody: %v", err)
	}
}

// The address of a receiver that has ended may be an impostor's.
func TestReceiverEnded(t *testing.T) {
	t.Parallel()
	_, n := startManager(t, 1, false)
	self, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(self)
	if err := n.For(self).Send("READY=1"); err != nil {
		t.Errorf("to one that lives: %v", err)
	}
	cmd := exec.Command("/bin/true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	gone, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	cmd.Wait()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(gone)
	if err := n.For(gone).Send("READY=1"); !errors.Is(err, unix.ESRCH) {
		t.Errorf("to one that has ended: %v", err)
	}
}

// field returns the value of the first line KEY=VALUE of a message.
func field(message, key string) (value string, ok bool) {
	for line := range strings.SplitSeq(message, "\n") {
		if k, v, found := strings.Cut(line, "="); found && k == key {
			return v, true
		}
	}
	return "", false
}
