// SPDX-License-Identifier: LGPL-2.1-or-later

package keeper

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/systemd"
)

// A lock whose descriptor is stored is never free, however often the daemon is killed.
func TestKills(t *testing.T) {
	h := newHost(t, nil)
	d := h.next()
	file := filepath.Join(h.dir, "disk")
	ino := d.tell("store disk %s", file)
	d.tell("store b %s", file+"2")
	d.say("READY=1")
	want := fmt.Sprint([]string{"disk", "b"}, d.Keeper)

	// The waiter is another open file, and so another owner.
	waiter, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan error, 1)
	go func() {
		defer waiter.Close()
		got <- unix.FcntlFlock(waiter.Fd(), unix.F_OFD_SETLKW, &unix.Flock_t{Type: unix.F_WRLCK, Len: 1})
	}()
	kills := 50
	if testing.Short() {
		kills = 5
	}
	for i := range kills {
		d.kill()
		d = h.next()
		if now := fmt.Sprint(d.Names, d.Keeper); now != want || fmt.Sprint(d.Inodes[0]) != ino || !d.Nice || !d.Alive {
			t.Fatalf("after kill %d: %+v, want %s", i, d.hello, want)
		}
		if d.Died != "killed by signal 9 (SIGKILL)" {
			t.Fatalf("after kill %d: the daemon before %q", i, d.Died)
		}
		d.say("READY=1")
		select {
		case err := <-got:
			t.Fatalf("after kill %d the lock was free: %v", i, err)
		default:
		}
	}
	// The test itself: without the keeper the waiter gets the lock.
	d.tell("remove disk")
	if has(t, d.Keeper, file) {
		t.Errorf("the keeper still has %s: %v", file, descriptorsIn(t, d.Keeper))
	}
	d.kill()
	if err := <-got; err != nil {
		t.Error(err)
	}
	if d = h.next(); fmt.Sprint(d.Names) != "[b]" {
		t.Errorf("after the removal: %v", d.Names)
	}
	pss, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", d.Keeper))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(pss)) {
		if strings.HasPrefix(line, "Private_") || strings.HasPrefix(line, "Pss:") {
			t.Log(strings.TrimSpace(line))
		}
	}
}

// The daemon is started as it was meant to be, and the keeper shows in none of it.
func TestEnvironment(t *testing.T) {
	h := newHost(t, nil)
	d := h.next()
	env := slices.DeleteFunc(d.Env, func(kv string) bool {
		return strings.HasPrefix(kv, envNotify+"=") || strings.HasPrefix(kv, envKeeper+"=")
	})
	// JSON has no such byte.
	want := slices.Clone(h.cmd.Env)
	for i := range want {
		want[i] = strings.ToValidUTF8(want[i], "\uFFFD")
	}
	slices.Sort(env)
	slices.Sort(want)
	if !slices.Equal(env, want) {
		t.Errorf("environment %q, want %q", env, want)
	}
	if !slices.Equal(d.Args, h.cmd.Args) || d.Dir != h.dir || d.Died != "" || d.Report != -1 || len(d.Names) != 0 {
		t.Errorf("%+v", d.hello)
	}
	if d.Keeper != h.cmd.Process.Pid {
		t.Errorf("the keeper is %d, not %d", d.Keeper, h.cmd.Process.Pid)
	}
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", d.Keeper))
	if cwd, e := os.Readlink(fmt.Sprintf("/proc/%d/cwd", d.Keeper)); err != nil || e != nil || string(comm) != "virtlockd-keep\n" || cwd != "/" {
		t.Errorf("the keeper is %q in %s, %v, %v", comm, cwd, err, e)
	}
}

// What socket activation gave to the keeper reaches every daemon, under its name; the report descriptor only the first.
func TestGiven(t *testing.T) {
	var l net.Listener
	var r *os.File
	h := newHost(t, func(h *host) {
		var err error
		if l, err = net.Listen("unix", filepath.Join(h.dir, "s")); err != nil {
			t.Fatal(err)
		}
		f, err := l.(*net.UnixListener).File()
		if err != nil {
			t.Fatal(err)
		}
		var w *os.File
		if r, w, err = os.Pipe(); err != nil {
			t.Fatal(err)
		}
		h.cmd.ExtraFiles = []*os.File{f, w}
		h.cmd.Env = append(h.cmd.Env, "LISTEN_FDS=1", "LISTEN_FDNAMES=virtlockd.socket", "KEEPER_TEST_REPORT=4")
		t.Cleanup(func() { l.Close(); r.Close() })
	})
	d := h.next()
	for _, f := range h.cmd.ExtraFiles {
		f.Close()
	}
	if fmt.Sprint(d.Names, d.Report >= 0) != "[virtlockd.socket] true" {
		t.Errorf("the first: %+v", d.hello)
	}
	d.say("READY=1")
	d.kill()
	// Nobody has the pipe any more.
	if n, err := r.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("from the pipe: %d, %v", n, err)
	}
	d = h.next()
	if fmt.Sprint(d.Names, d.Report) != "[virtlockd.socket] -1" {
		t.Errorf("the second: %+v", d.hello)
	}
	d.tell("remove virtlockd.socket")
	d.kill()
	if d = h.next(); len(d.Names) != 0 {
		t.Errorf("the third: %+v", d.hello)
	}
}

// Which ends are intended.
func TestEnds(t *testing.T) {
	for _, tt := range []struct {
		name    string
		prepare func(d *daemon)
		end     func(d *daemon)
		exit    int // of the keeper; -1: it starts another daemon
	}{
		{"stop", func(d *daemon) { d.tell("store a %s", d.Dir+"/a"); d.say("READY=1"); d.say("STOPPING=1") }, func(d *daemon) { d.exit(0) }, 0},
		{"stop with something left behind", func(d *daemon) { d.tell("store a %s", d.Dir+"/a"); d.say("READY=1"); d.say("STOPPING=1") }, func(d *daemon) { d.exit(1) }, 1},
		{"panic in the stop", func(d *daemon) { d.tell("store a %s", d.Dir+"/a"); d.say("READY=1"); d.say("STOPPING=1") }, func(d *daemon) { d.exit(2) }, -1},
		{"killed in the stop", func(d *daemon) { d.tell("store a %s", d.Dir+"/a"); d.say("READY=1"); d.say("STOPPING=1") }, (*daemon).kill, -1},
		{"failed start", func(d *daemon) {}, func(d *daemon) { d.exit(6) }, 6},
		{"killed start", func(d *daemon) {}, (*daemon).kill, 128 + 9},
		{"failed start with something stored", func(d *daemon) { d.tell("store a %s", d.Dir+"/a") }, func(d *daemon) { d.exit(6) }, -1},
		{"end without a word", func(d *daemon) { d.tell("store a %s", d.Dir+"/a"); d.say("READY=1") }, func(d *daemon) { d.exit(0) }, -1},
		{"end without a word and with nothing stored", func(d *daemon) { d.say("READY=1") }, func(d *daemon) { d.exit(0) }, 0},
		{"failure with nothing stored", func(d *daemon) { d.say("READY=1") }, func(d *daemon) { d.exit(6) }, -1},
		{"changed its mind", func(d *daemon) { d.tell("store a %s", d.Dir+"/a"); d.say("STOPPING=1"); d.say("READY=1") }, func(d *daemon) { d.exit(0) }, -1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t, nil)
			d := h.next()
			tt.prepare(d)
			tt.end(d)
			if tt.exit < 0 {
				if next := h.next(); next.Died == "" {
					t.Errorf("the next: %+v", next.hello)
				}
				return
			}
			if got := h.exit(); got != tt.exit {
				t.Errorf("exit code %d, want %d", got, tt.exit)
			}
		})
	}
}

func TestStoreLimits(t *testing.T) {
	h := newHost(t, nil)
	d := h.next()
	d.say("READY=1")
	before := len(descriptorsIn(t, d.Keeper))
	count := func(want int, what string) {
		t.Helper()
		if got := len(descriptorsIn(t, d.Keeper)) - before; got != want {
			t.Errorf("%s: the keeper has %d more descriptors, want %d", what, got, want)
		}
	}
	d.tell("probe")
	count(0, "after a probe")
	d.tell("store a %s", h.dir+"/a") // twice in one message
	count(1, "one file twice")
	d.tell("many 65")
	count(1, "more than fit into a message")
	d.tell("many 64")
	count(maxStored, "more than fit into the store")
	d.tell("remove many")
	count(1, "after the removal")
	d.tell("many 63")
	count(maxStored, "as many as fit")
	d.tell("remove many")
	for _, bad := range []string{"FDSTORE=1\nFDNAME=a:b", "FDSTOREREMOVE=1\nFDNAME=a\x00", "FDSTOREREMOVE=1\nFDNAME=a" + strings.Repeat("x", 300),
		"FDSTOREREMOVE=1\nFDNAME=a\n" + strings.Repeat("x\n", maxMessage), "\n\n=\n", "FDSTORE=1", "READY", "FDSTOREREMOVE=2\nFDNAME=a"} {
		d.say(bad)
		count(1, bad)
	}
}

// Only the daemon is listened to.
func TestStranger(t *testing.T) {
	h := newHost(t, nil)
	d := h.next()
	d.tell("store a %s", h.dir+"/a")
	d.say("READY=1")
	before := descriptorsIn(t, d.Keeper)
	cmd := exec.Command("/proc/self/exe")
	for _, kv := range d.Env {
		if strings.HasPrefix(kv, envNotify) {
			cmd.Env = append(cmd.Env, kv)
		}
	}
	cmd.Env = append(cmd.Env, roleVar+"=stranger")
	if out, err := cmd.CombinedOutput(); err != nil || string(out) != "<nil>\n" {
		t.Fatalf("%v\n%s", err, out)
	}
	d.say("") // everything before is worked off
	if after := descriptorsIn(t, d.Keeper); !reflect.DeepEqual(before, after) {
		t.Errorf("descriptors before %v, after %v", before, after)
	}
	d.exit(0) // it has not said STOPPING=1
	if d = h.next(); fmt.Sprint(d.Names) != "[a]" {
		t.Errorf("stored: %v", d.Names)
	}
}

// Who is of another user can't send at all: what he attaches the keeper would have to close, and that can hang.
func TestOtherUser(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can be somebody else")
	}
	h := newHost(t, nil)
	d := h.next()
	d.say("READY=1")
	var address string
	for _, kv := range d.Env {
		if value, ok := strings.CutPrefix(kv, envNotify+"="); ok {
			address = value
		}
	}
	try := func(uid uintptr) error {
		result := make(chan error)
		go func() {
			runtime.LockOSThread() // and ends with this goroutine
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uid, uid, uid); errno != 0 {
				result <- errno
				return
			}
			result <- systemd.NotifierAt(address).Send("STATUS=x", 0)
		}()
		return <-result
	}
	if err := try(0); err != nil {
		t.Error("as root: ", err)
	}
	if err := try(65534); !errors.Is(err, unix.EACCES) {
		t.Error("as somebody else: ", err)
	}
	names, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		t.Fatal(err)
	}
	if link, err := os.Readlink(address); err != nil || !strings.Contains(link, "(deleted)") || strings.Contains(string(names), address) {
		t.Errorf("%s leads to %s, %v", address, link, err)
	}
	d.say("READY=1")
}

// A daemon that never gets ready is started less and less often, but it is.
func TestBackOff(t *testing.T) {
	h := newHost(t, nil)
	d := h.next()
	d.tell("store a %s", h.dir+"/a")
	d.kill()
	start := time.Now()
	var last time.Time
	for range 4 {
		d = h.next()
		last = time.Now()
		d.exit(3)
	}
	if d = h.next(); d.Died != "exit code 3" || fmt.Sprint(d.Names) != "[a]" {
		t.Errorf("%+v", d.hello)
	}
	// 200, 400, 800, 1600, 3200 ms from one start to the next.
	if took := time.Since(start); took < 5*time.Second {
		t.Errorf("five starts took %v only", took)
	}
	step := time.Since(last)
	d.say("READY=1")
	start = time.Now()
	d.kill()
	h.next()
	// Without READY=1 it would have been the longest of all.
	if took := time.Since(start); took >= step {
		t.Errorf("the start after one that was ready took %v, the one before %v", took, step)
	}
}

func TestSignals(t *testing.T) {
	h := newHost(t, nil)
	d := h.next()
	d.tell("store a %s", h.dir+"/a")
	d.say("READY=1")
	// The daemon of this test does not catch it: it is killed, and that is told by the next.
	const sig = unix.SIGHUP
	for range 3 {
		for _, harmless := range []unix.Signal{unix.SIGUSR2, unix.SIGPIPE, unix.SIGALRM, unix.SIGPWR, unix.SIGIO, unix.SIGXCPU, 40} {
			unix.Kill(d.Keeper, harmless)
		}
		if err := unix.Kill(d.Keeper, sig); err != nil {
			t.Fatal(err)
		}
		d = h.next()
		if want := fmt.Sprintf("killed by signal %d (%s)", sig, unix.SignalName(sig)); d.Died != want {
			t.Errorf("%q, want %q", d.Died, want)
		}
		// One that comes before the daemon is ready waits for that.
		unix.Kill(d.Keeper, unix.SIGUSR1)
		d.say("READY=1")
	}
}

// One that asks for the end is not lost if it was deadly: the next daemon gets it, and the one after that.
func TestDeadlyStop(t *testing.T) {
	h := newHost(t, nil)
	d := h.next()
	d.tell("store a %s", h.dir+"/a")
	d.say("READY=1")
	unix.Kill(d.PID, unix.SIGTERM)
	for range 2 {
		d = h.next()
		if d.Died != "killed by signal 15 (SIGTERM)" || fmt.Sprint(d.Names) != "[a]" {
			t.Errorf("%+v", d.hello)
		}
		fmt.Fprintf(d.conn, "send %q\n", "READY=1") // it may not live to say that it has
	}
	d = h.next()
	d.tell("remove a")
	d.exit(0)
	if code := h.exit(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// Without a daemon, and with nothing kept, there is nothing to wait for.
func TestStopBetween(t *testing.T) {
	h := newHost(t, nil)
	for range 3 { // now it waits for 800 ms
		d := h.next()
		if d.Died == "" {
			d.say("READY=1")
		}
		d.exit(3)
	}
	h.eventually("there is no daemon", func() bool {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", h.cmd.Process.Pid, h.cmd.Process.Pid))
		return err == nil && len(children) == 0
	})
	unix.Kill(h.cmd.Process.Pid, unix.SIGTERM)
	if got := h.exit(); got != 128+15 {
		t.Errorf("exit code %d", got)
	}
}

// copyProgram makes a program of our own, so that it can be replaced.
func copyProgram(t *testing.T, dir string) string {
	data, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "keeper-test-program")
	if err := os.WriteFile(path, data, 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// The keeper goes on as the installed binary with everything that it has, or as it was.
func TestReexec(t *testing.T) {
	var program string
	h := newHost(t, func(h *host) {
		program = copyProgram(t, h.dir)
		h.cmd.Path = program
	})
	d := h.next()
	d.tell("store a %s", h.dir+"/a")
	d.say("READY=1")
	exe := func() string {
		link, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", d.Keeper))
		if err != nil {
			t.Fatal(err)
		}
		return link
	}
	descriptors := descriptorsIn(t, d.Keeper)

	if err := os.Rename(program, program+".old"); err != nil {
		t.Fatal(err)
	}
	d.tell("reexec") // there is nothing to run
	d.tell("store b %s", h.dir+"/b")
	if got := exe(); got != program+".old" {
		t.Errorf("the keeper is %s", got)
	}
	d.tell("remove b")
	if got := descriptorsIn(t, d.Keeper); !reflect.DeepEqual(got, descriptors) {
		t.Errorf("after an exec that failed: %v, before %v", got, descriptors)
	}
	// And a start falls back to what runs.
	d.kill()
	d = h.next()
	d.say("READY=1")

	data, err := os.ReadFile(program + ".old")
	if err == nil {
		err = os.WriteFile(program, data, 0o700)
	}
	if err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		d.tell("reexec")
		d.tell("remove b")
		d.tell("store b %s%d", h.dir+"/b", i)
	}
	if got := exe(); !strings.HasPrefix(got, program) {
		t.Errorf("the keeper is %s", got)
	}
	// The barrier after it was answered by the new program, which forwards signals.
	old := d
	for range 10 {
		d.tell("reexec")
		unix.Kill(d.Keeper, unix.SIGHUP)
		d = h.next()
		if d.Died != "killed by signal 1 (SIGHUP)" || d.Keeper != old.Keeper {
			t.Fatalf("%+v", d.hello)
		}
		d.say("READY=1")
	}
	if fmt.Sprint(d.Names) != "[a b]" {
		t.Errorf("%+v", d.hello)
	}
	d.say("STOPPING=1")
	d.exit(0)
	if got := h.exit(); got != 0 {
		t.Errorf("exit code %d", got)
	}
}

// The daemon's end in order counts also if its wish for another binary was not worked off before.
func TestEndsBeforeReexec(t *testing.T) {
	h := newHost(t, nil)
	d := h.next()
	d.tell("store a %s", h.dir+"/a")
	d.say("READY=1")
	if err := unix.Kill(d.Keeper, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(d.conn, "leave")
	h.eventually("the daemon has ended", func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", d.PID))
		return err == nil && strings.Contains(string(stat), ") Z ")
	})
	if err := unix.Kill(d.Keeper, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if got := h.exit(); got != 0 {
		t.Errorf("exit code %d", got)
	}
}

// Signals that come while the keeper goes on as another program, or would and can't, do not end it. The first time counts: afterwards
// the run-time knows them as ignored.
func TestSignalsDuringReexec(t *testing.T) {
	// One copy, before anything runs: a file that a child has open for writing, for an instant, can't be executed.
	original := copyProgram(t, t.TempDir())
	for i := range 100 {
		t.Run(strconv.Itoa(i), func(t *testing.T) {
			var program string
			h := newHost(t, func(h *host) {
				program = filepath.Join(h.dir, filepath.Base(original))
				if err := os.Link(original, program); err != nil {
					t.Fatal(err)
				}
				h.cmd.Path = program
			})
			d := h.next()
			d.tell("store a %s", h.dir+"/a")
			d.say("READY=1")
			if i%2 == 1 {
				if err := os.Rename(program, program+".old"); err != nil {
					t.Fatal(err)
				}
			}
			stop := make(chan struct{})
			var storm sync.WaitGroup
			storm.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
						unix.Kill(d.Keeper, unix.SIGUSR1) // the daemon takes no notice of it
					}
				}
			})
			d.tell("reexec")
			close(stop)
			storm.Wait()
			// And then they are forwarded as ever.
			unix.Kill(d.Keeper, unix.SIGHUP)
			next := h.next()
			if next.Died != "killed by signal 1 (SIGHUP)" || next.Keeper != d.Keeper || fmt.Sprint(next.Names) != "[a]" {
				t.Errorf("%+v", next.hello)
			}
		})
	}
}

// What to go on as is the daemon's program, and no other one's that has its process id now.
func TestProgramNow(t *testing.T) {
	t.Parallel()
	const installed = "/usr/sbin/installed"
	start := func() (*exec.Cmd, int) {
		t.Helper()
		cmd := exec.Command("/bin/sleep", "1000")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		pidfd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			cmd.Process.Kill()
			cmd.Wait()
			unix.Close(pidfd)
		})
		return cmd, pidfd
	}
	other, pidfd := start()
	program := func(pidfd int) string {
		k := &keeper{program: installed, state: state{pid: other.Process.Pid, pidfd: pidfd}}
		return k.programNow()
	}
	sleep, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", other.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	if got := program(pidfd); got != sleep {
		t.Errorf("the daemon runs %s, got %s", sleep, got)
	}
	daemon, ended := start()
	daemon.Process.Kill()
	daemon.Wait()
	if got := program(ended); got != installed {
		t.Errorf("the daemon has ended: got %s", got)
	}
}

// A live upgrade of the daemon keeps the link.
func TestDaemonUpgrade(t *testing.T) {
	h := newHost(t, nil)
	d := h.next()
	d.tell("store a %s", h.dir+"/a")
	d.say("READY=1")
	fmt.Fprintln(d.conn, "upgrade")
	next := h.next()
	if next.PID != d.PID || !next.Alive || next.Keeper != d.Keeper || len(next.Names) != 0 {
		t.Errorf("%+v", next.hello)
	}
	next.tell("store b %s", h.dir+"/b")
	next.kill()
	if d = h.next(); fmt.Sprint(d.Names) != "[a b]" {
		t.Errorf("%+v", d.hello)
	}
}

// A keeper that is killed harms nobody: the daemon gets another.
func TestAdopt(t *testing.T) {
	h := newHost(t, nil)
	d := h.next()
	d.say("READY=1")
	for i := range 3 {
		d.tell("store a %s", fmt.Sprintf("%s/a%d", h.dir, i))
		if err := unix.Kill(d.Keeper, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		h.eventually("the keeper ends", func() bool { return !ours(d.Keeper) })
		var pid int
		fmt.Sscan(d.tell("adopt"), &pid)
		h.pids = append(h.pids, pid)
		d.tell("store b %s", fmt.Sprintf("%s/b%d", h.dir, i))
		fmt.Fprintln(d.conn, "upgrade")
		d = h.next()
		if d.Keeper != pid || !d.Alive {
			t.Fatalf("after an upgrade: %+v, the keeper is %d", d.hello, pid)
		}
		d.tell("reexec")
		d.kill()
		if d = h.next(); fmt.Sprint(d.Names, d.Keeper == pid, d.Dir == h.dir) != "[b] true true" {
			t.Fatalf("%+v", d.hello)
		}
		d.tell("remove b")
		d.say("READY=1")
	}
	// A stop is one for an adopted daemon as well.
	unix.Kill(d.Keeper, unix.SIGKILL)
	h.eventually("the keeper ends", func() bool { return !ours(d.Keeper) })
	var pid int
	fmt.Sscan(d.tell("adopt"), &pid)
	h.pids = append(h.pids, pid)
	d.tell("store c %s", h.dir+"/c")
	d.say("STOPPING=1")
	d.exit(0)
	h.eventually("the keeper ends", func() bool { return !ours(pid) })
}

func TestBothKilled(t *testing.T) {
	h := newHost(t, nil)
	d := h.next()
	d.tell("store a %s", h.dir+"/a")
	d.say("READY=1")
	unix.Kill(d.Keeper, unix.SIGKILL)
	d.kill()
	if code := h.exit(); code != -1 {
		t.Errorf("exit code %d", code)
	}
	h.eventually("the daemon ends", func() bool { return !ours(d.PID) })
	h.listen.SetDeadline(time.Now().Add(300 * time.Millisecond))
	if conn, err := h.listen.Accept(); err == nil {
		conn.Close()
		t.Error("somebody started a daemon")
	}
}

// Who started the keeper hears what the daemon says, but nothing of the store.
func TestOutward(t *testing.T) {
	var conn *net.UnixConn
	h := newHost(t, func(h *host) {
		path := filepath.Join(h.dir, "notify")
		var err error
		if conn, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		h.cmd.Env = append(h.cmd.Env, envNotify+"="+path)
	})
	d := h.next()
	d.tell("store a %s", h.dir+"/a")
	d.say("READY=1\nFDNAME=x\nMAINPID=1\nSTATUS=fine")
	d.say("RELOADING=1\nMONOTONIC_USEC=5")
	d.say("STOPPING=1")
	buf := make([]byte, 1000)
	for _, want := range []string{"READY=1\nSTATUS=fine\n", "RELOADING=1\nMONOTONIC_USEC=5\n", "STOPPING=1\n"} {
		conn.SetReadDeadline(time.Now().Add(patience))
		n, err := conn.Read(buf)
		if err != nil || string(buf[:n]) != want {
			t.Errorf("%q, %v; want %q", buf[:n], err, want)
		}
	}
}

func TestState(t *testing.T) {
	t.Parallel()
	s := &state{args: []string{"a", ""}, env: []string{"A=\xff\n=", ""}, dir: "/a b", outer: "@x", report: 5, notify: 6, address: "@y", hello: 7,
		pid: 8, pidfd: 9, child: true, ready: true, stopping: true, served: true, quick: 10, how: "so: and so", pending: 1 << 63,
		items: []item{{11, "a b", true}, {12, "", false}}}
	got, err := decodeState(string(s.encode()))
	if err != nil || !reflect.DeepEqual(got, s) {
		t.Errorf("%+v, %v", got, err)
	}
	for _, bad := range []string{"", "arg=x\x00item=", "arg=x\x00item=1 true", "arg=x\x00pid=a"} {
		if s, err := decodeState(bad); err == nil {
			t.Errorf("%q: %+v", bad, s)
		}
	}
}

func TestMark(t *testing.T) {
	t.Parallel()
	m := mark{1, 1 << 63, 3, -1, "a:b"}
	if got, err := parseMark(m.String()); err != nil || got != m {
		t.Errorf("%+v, %v", got, err)
	}
	for _, bad := range []string{"", "1:2:3:4", "x:2:3:4:", "1:-2:3:4:"} {
		if m, err := parseMark(bad); err == nil {
			t.Errorf("%q: %+v", bad, m)
		}
	}
}

func FuzzMessage(f *testing.F) {
	for _, seed := range []string{"FDSTORE=1\nFDNAME=x\nFDPOLL=0", "FDSTOREREMOVE=1\nFDNAME=x\n", "BARRIER=1", "READY=1\nSTATUS=x", "STOPPING=1\nREADY=1", "KEEPER_REEXEC=1", "=\n\x00"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		m, ok := parse(data)
		if !ok {
			return
		}
		if strings.ContainsAny(m.name, ":\n\x00") || m.name == "" {
			t.Errorf("name %q", m.name)
		}
		if strings.Contains(m.outward, "FDSTORE") && !strings.Contains(m.outward, "STATUS=") {
			t.Errorf("outward: %q", m.outward)
		}
		if len(m.outward) > len(data)+1 {
			t.Errorf("%d bytes became %d", len(data), len(m.outward))
		}
		// What is passed on means the same once more.
		if again, ok := parse([]byte(m.outward)); ok && (again.ready != m.ready || again.stopping != m.stopping) {
			t.Errorf("%+v became %+v", m, again)
		}
	})
}
