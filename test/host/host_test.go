// SPDX-License-Identifier: LGPL-2.1-or-later

package host

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
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

// A test binary that is killed leaves nothing behind, neither a daemon that has upgraded itself, nor a keeper and its daemon.
func TestKilledTestLeavesNothing(t *testing.T) {
	const env = "VIRTLOCKD_TEST_KILLED"
	if os.Getenv(env) != "" {
		h := New(t)
		upgraded, keeper := h.Start(Ours(t), Options{Config: "log_level = 2\n"}), New(t).Start(Ours(t), Options{Args: []string{"--keeper"}})
		upgraded.Signal(unix.SIGUSR1)
		if !Eventually(func() bool { return strings.Contains(upgraded.Stderr(), "this binary has taken over") }) {
			t.Fatal(upgraded.Stderr())
		}
		fmt.Println("processes", upgraded.PID(), keeper.PID(), keeper.Kept())
		select {}
	}
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.timeout=120s")
	cmd.Env = append(os.Environ(), env+"=1", "VIRTLOCKD_BINARY="+Ours(t))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	var pids [3]int
	_, err = fmt.Fscanf(bufio.NewReader(out), "processes %d %d %d", &pids[0], &pids[1], &pids[2])
	left := map[int]int{}
	for _, pid := range pids {
		if fd, err := unix.PidfdOpen(pid, 0); err == nil {
			left[pid] = fd
			defer unix.Close(fd)
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	if err != nil || len(left) != len(pids) {
		t.Fatalf("processes %v: %v", pids, err)
	}
	if !Eventually(func() bool {
		for pid, fd := range left {
			if n, _ := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0); n > 0 {
				delete(left, pid)
			}
		}
		return len(left) == 0
	}) {
		t.Errorf("left behind: %v of upgraded, keeper, daemon %v", left, pids)
		for pid := range left {
			var st unix.Stat_t
			if unix.Stat(fmt.Sprintf("/proc/%d/ns/mnt", pid), &st) == nil {
				endAll(st.Ino)
			}
		}
	}
}
