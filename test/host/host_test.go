// SPDX-License-Identifier: LGPL-2.1-or-later

package host

import (
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/test/wire"
)

func TestMain(m *testing.M) { Main(m) }

// The harness itself is proven against the C daemon.
func TestDaemon(t *testing.T) {
	t.Parallel()
	h := New(t)
	d := h.Start(C(t), Options{})
	c := d.Client(0x70000001)
	if err := c.Acquire("", Data+"/a", wire.Autocreate); err != nil {
		t.Fatal(err)
	}
	want := []Lock{{Kind: "POSIX", Type: "WRITE", PID: d.PID(), Start: "0", End: "0"}}
	if got := h.Locks(d, Data+"/a"); !slices.Equal(got, want) {
		t.Errorf("locks %v, want %v", got, want)
	}
	if h.Free(Data+"/a", false) {
		t.Error("a held file is free")
	}
	if err := c.Release("", Data+"/a"); err != nil {
		t.Error(err)
	}
	if h.Exists(Data + "/a") {
		t.Error("file of a lock is left")
	}
	if _, err := os.Stat("/run/libvirt/virtlockd-sock"); err == nil && h.Exists("/run/libvirt/virtlockd-sock") {
		t.Log("the machine has a virtlockd of its own, too")
	}
	if got := d.Stop(); got != 0 {
		t.Errorf("exit status %d", got)
	}
	if h.Exists("/run/libvirt/virtlockd-sock") {
		t.Error("socket is left")
	}
}

func TestProcess(t *testing.T) {
	t.Parallel()
	h := New(t)
	d := h.Start(C(t), Options{})
	p := h.Spawn(ProcessOptions{})
	c := p.Dial(d, "lock")
	if err := c.Register(wire.VM(p.PID())); err != nil {
		t.Fatal(err)
	}
	if err := c.Acquire("", Data+"/a", wire.Autocreate); err != nil {
		t.Fatal(err)
	}
	c.Close()
	p.Gone() // the C daemon kills it, so the peer process id was that of p

	x := h.Spawn(ProcessOptions{})
	x.Lock(Data+"/x", "R", 0, 1)
	if h.Free(Data+"/x", true) || !h.Free(Data+"/x", false) {
		t.Error("a lock of another process does not show")
	}
	x.Kill()
	x.Gone()
	if !Eventually(func() bool { return h.Free(Data+"/x", true) }) {
		t.Error("a lock outlives its process")
	}
	// Now the same process id again.
	y := h.Spawn(ProcessOptions{PID: x.PID()})
	if y.PID() != x.PID() || y.Dead() {
		t.Errorf("process id %d, want that of the dead one, %d", y.PID(), x.PID())
	}
	z := h.Spawn(ProcessOptions{Zombie: true, NewPIDNamespace: true})
	z.Kill()
	if err := unix.Kill(z.PID(), 0); err != nil || !z.Dead() {
		t.Errorf("not a zombie: %v", err)
	}
}

func TestParseLocks(t *testing.T) {
	t.Parallel()
	const text = `1: POSIX  ADVISORY  WRITE 7 00:2f:17 0 0
1: -> POSIX  ADVISORY  WRITE 8 00:2f:17 0 0
2: OFDLCK ADVISORY  READ -1 00:2f:17 0 EOF
3: FLOCK  ADVISORY  WRITE 9 00:2f:17 0 EOF
4: POSIX  ADVISORY  WRITE 7 fd:01:17 100 101
`
	got, err := parseLocks(text, fileID{0, 0x2f, 17})
	want := []Lock{{"POSIX", "WRITE", 7, "0", "0"}, {"OFDLCK", "READ", -1, "0", "EOF"}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
	if got, err := parseLocks(text, fileID{0xfd, 1, 17}); err != nil || len(got) != 1 || got[0].Start != "100" {
		t.Errorf("got %v, %v", got, err)
	}
}
