// SPDX-License-Identifier: LGPL-2.1-or-later

package owner

import (
	"bufio"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/poll"
)

const deadline = 20 * time.Second

// registry returns one that reports deaths on a channel.
func registry(t *testing.T) (*Registry, <-chan *Owner) {
	t.Helper()
	p, err := poll.New()
	if err != nil {
		t.Fatal(err)
	}
	go p.Run(t.Context())
	died := make(chan *Owner, 16)
	r := NewRegistry(Config{Poller: p, Logger: slog.New(slog.DiscardHandler), Died: func(o *Owner) { died <- o }})
	t.Cleanup(func() {
		r.Close()
		p.Close()
		if len(r.byPID)+len(r.numbers) != 0 {
			t.Errorf("owners left behind: %v %v", r.byPID, r.numbers)
		}
	})
	return r, died
}

// child starts a shell script that is running when this returns; it ends with the test.
func child(t *testing.T, script string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", script+"\necho ready; read x")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if cmd.ProcessState == nil {
			cmd.Process.Kill()
			cmd.Wait()
		}
	})
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatalf("the child did not start: %v", err)
	}
	return cmd
}

func details(cmd *exec.Cmd) *Details {
	return &Details{Name: "guest", ID: 1, PID: int32(cmd.Process.Pid)}
}

func self(t *testing.T, r *Registry, cmd *exec.Cmd) *Owner {
	t.Helper()
	fd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	o, err := r.Self(details(cmd), fd)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func mustDie(t *testing.T, died <-chan *Owner, o *Owner) {
	t.Helper()
	select {
	case got := <-died:
		if got != o {
			t.Fatalf("owner %d died, want %d", got.PID, o.PID)
		}
		if !o.Dead() {
			t.Error("an owner whose death was reported is not Dead")
		}
	case <-time.After(deadline):
		t.Fatalf("the death of owner %d was not reported", o.PID)
	}
}

func signalOf(t *testing.T, cmd *exec.Cmd) syscall.Signal {
	t.Helper()
	cmd.Wait()
	return cmd.ProcessState.Sys().(syscall.WaitStatus).Signal()
}

func TestWatchedOwnerDies(t *testing.T) {
	t.Parallel()
	r, died := registry(t)
	cmd := child(t, "")
	o, err := r.Named(details(cmd), true)
	if err != nil {
		t.Fatal(err)
	}
	if again, _ := r.Named(details(cmd), true); again != o {
		t.Error("the same process became two owners")
	} else {
		again.Release()
	}
	if o.Kind() != Watched || o.Dead() {
		t.Errorf("kind %v, dead %v", o.Kind(), o.Dead())
	}
	r.HangUp(o) // only a verified owner is ended
	cmd.Process.Signal(unix.SIGUSR1)
	// Not reaped yet: a zombie has ended.
	mustDie(t, died, o)
	if sig := signalOf(t, cmd); sig != unix.SIGUSR1 {
		t.Errorf("ended by %v", sig)
	}
	if _, err := r.Self(details(cmd), pidfdOfDead(t)); !errors.Is(err, ErrDead) {
		t.Errorf("a dead process registered: %v", err)
	}
	o.Release()
	// Its number is nobody's now. A libvirtd that does not know yet gets no lock for it.
	if _, err := r.Named(details(cmd), true); !errors.Is(err, ErrDead) {
		t.Errorf("somebody spoke for an owner that has ended: %v", err)
	}
}

// pidfdOfDead returns a pidfd whose process has ended, as one that was taken at accept can be.
func pidfdOfDead(t *testing.T) int {
	t.Helper()
	other := exec.Command("/bin/true")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(other.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	other.Wait()
	return fd
}

func TestUnverifiedOwners(t *testing.T) {
	t.Parallel()
	r, _ := registry(t)
	me := int32(os.Getpid())
	for _, c := range []struct {
		name  string
		pid   int32
		local bool
	}{
		{"zero", 0, true},
		{"negative", -2, true},
		{"no such process", 0x70000001, true},
		{"a number from another pid namespace", me, false},
	} {
		o, err := r.Named(&Details{PID: c.pid}, c.local)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if o.Kind() != Unverified || o.Dead() {
			t.Errorf("%s: kind %v, dead %v", c.name, o.Kind(), o.Dead())
		}
		if again, _ := r.Named(&Details{PID: c.pid}, c.local); again != o {
			t.Errorf("%s: the same number became two owners", c.name)
		} else {
			again.Release()
		}
		o.Release()
	}
}

// A number that somebody else named from another namespace is not the process here that
// has it too.
func TestNumberIsNotProcess(t *testing.T) {
	t.Parallel()
	r, died := registry(t)
	cmd := child(t, "")
	number, _ := r.Named(details(cmd), false)
	process := self(t, r, cmd)
	if number == process {
		t.Fatal("a number and a process are one owner")
	}
	cmd.Process.Kill()
	mustDie(t, died, process)
	if number.Dead() {
		t.Error("the number died with the process")
	}
	number.Release()
	process.Release()
}

func TestHangUp(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, script string
		want         syscall.Signal
	}{
		{"obeys", "", unix.SIGTERM},
		{"ignores SIGTERM", `trap "" TERM`, unix.SIGKILL},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r, died := registry(t)
			cmd := child(t, c.script)
			o := self(t, r, cmd)
			if o.Kind() != Verified {
				t.Fatalf("kind %v", o.Kind())
			}
			r.HangUp(o)
			r.HangUp(o) // as when two of its connections close
			mustDie(t, died, o)
			if sig := signalOf(t, cmd); sig != c.want {
				t.Errorf("ended by %v, want %v", sig, c.want)
			}
			o.Release()
		})
	}
}

// A shutdown between SIGTERM and SIGKILL leaves the guest alone.
func TestCloseKillsNobody(t *testing.T) {
	t.Parallel()
	r, _ := registry(t)
	cmd := child(t, `trap "" TERM`)
	o := self(t, r, cmd)
	r.HangUp(o)
	r.Close()
	// Long enough for a sequence that goes on to kill it.
	fds := []unix.PollFd{{Fd: int32(o.proc.fd), Events: unix.POLLIN}}
	for end := time.Now().Add(killAfter + time.Second); ; {
		n, err := unix.Poll(fds, int(max(0, time.Until(end)).Milliseconds()))
		if err == unix.EINTR {
			continue
		}
		if n != 0 || err != nil {
			t.Errorf("the guest was ended (%v)", err)
		}
		break
	}
	o.Release()
}

func TestInOurPIDNamespace(t *testing.T) {
	t.Parallel()
	if !InOurPIDNamespace(int32(os.Getpid())) {
		t.Error("we are not in our own namespace")
	}
	for _, pid := range []int32{0, -1, 0x70000001} {
		if InOurPIDNamespace(pid) {
			t.Errorf("%d is in our namespace", pid)
		}
	}
	cmd := exec.Command("/bin/sh", "-c", "echo ready; read x")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}
	in, _ := cmd.StdinPipe()
	out, _ := cmd.StdoutPipe()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	bufio.NewReader(out).ReadString('\n')
	if InOurPIDNamespace(int32(cmd.Process.Pid)) {
		t.Error("a process of another namespace is in ours")
	}
}

// A process that has ended is never taken for the one that has its number now, whichever is seen first.
func TestAdoptNumberUsedAgain(t *testing.T) {
	t.Parallel()
	for name, first := range map[string]int{"ended one first": 0, "living one first": 1} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, died := registry(t)
			gone, lives := child(t, ""), child(t, "")
			both := []*process{}
			for _, cmd := range []*exec.Cmd{gone, lives} {
				p, err := openProcess(int32(cmd.Process.Pid))
				if err != nil {
					t.Fatal(err)
				}
				p.pid = 4711 // as if it were the number of both
				both = append(both, p)
			}
			gone.Process.Kill()
			gone.Wait()
			owners := make([]*Owner, 2)
			for _, i := range []int{first, 1 - first} {
				o, err := r.enter(&Details{Name: "guest", PID: 4711}, both[i], Verified)
				if err != nil {
					t.Fatal(err)
				}
				owners[i] = o
			}
			if owners[0] == owners[1] {
				t.Fatal("a process that has ended has become the one that lives")
			}
			if first == 0 {
				mustDie(t, died, owners[0])
			}
			if !owners[0].Dead() || owners[1].Dead() {
				t.Errorf("dead: %v, %v; want true, false", owners[0].Dead(), owners[1].Dead())
			}
			owners[0].Release()
			owners[1].Release()
		})
	}
}
