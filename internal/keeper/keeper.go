// SPDX-License-Identifier: LGPL-2.1-or-later

// Package keeper is a small process that holds the daemon's descriptors and starts it again when it dies.
//
// Everything worth keeping is in a few descriptors of the daemon: as long as somebody else holds copies, a daemon that is killed
// loses nothing. Where systemd runs us its file descriptor store does that. Elsewhere the keeper does: the same binary in a process
// of its own, which speaks the same protocol, so that the daemon doesn't have to know the difference (sd_notify(3),
// sd_pid_notify_with_fds(3), sd_listen_fds(3)).
//
// One goroutine does all the work, in a loop around poll(2), and nothing in it waits for the daemon. The keeper never kills it.
//
//	Run    makes the calling process a keeper, which starts the daemon as its child
//	Adopt  is for a daemon without a keeper, for example because that was killed: it starts one that watches it
//	Kept   tells a daemon about its keeper
//
// A keeper becomes one by exec(2): with a state in a memory file, which is also how it goes on as another binary.
package keeper

import (
	"fmt"
	"math/bits"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/poll"
	"virtlockd/internal/sigaction"
	"virtlockd/internal/systemd"
)

const (
	name = "virtlockd-keeper" // argv[0]
	comm = "virtlockd-keep"   // what top shows: 15 bytes are all there is

	// The only argument, with the descriptor of the state behind it. The C daemon, should it ever be started like this, refuses it.
	argState = "--state="
	argFork  = "--fork=" // start a keeper with that state and end
)

// environment makes the Go run-time as small as it gets. The daemon never sees it.
var environment = []string{"GOMAXPROCS=1", "GOGC=off", "GOMEMLIMIT=4MiB", "GODEBUG=containermaxprocs=0", "GOTRACEBACK=none"}

// Starts are at least minDelay apart; for each in a row that didn't get as far as READY=1 it is twice as long, maxDelay at most. So a
// daemon that ran for longer than that is started again at once.
const (
	minDelay = 100 * time.Millisecond
	maxDelay = 5 * time.Second
)

// exitPanic is the exit code of a Go program that panics. The daemon itself never ends with it once it has said STOPPING=1.
const exitPanic = 2

// forwarded are the signals that mean something to the daemon. All others but the deadly ones are nothing to a Go program.
var forwarded = []syscall.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGUSR1, unix.SIGTERM}

// stopSignals, as a set like state.pending, ask for the end.
const stopSignals = 1<<unix.SIGINT | 1<<unix.SIGQUIT | 1<<unix.SIGTERM

// self is the program that runs here, whatever is installed by now.
const self = "/proc/self/exe"

// Config is what a daemon is started with, besides the environment of the process that calls Run or Adopt. That loses what was meant
// for this process alone: NOTIFY_SOCKET and the descriptors of socket activation.
type Config struct {
	Args []string // with the program's name first
	Dir  string   // its working directory; "/" if it can't be entered any more
	// Report is a descriptor that the first daemon started by Run gets, and no other, see [Link]; -1: none. The keeper
	// closes its own.
	Report int
}

// Run makes this process the keeper of a daemon that it starts. The descriptors of socket activation that are meant for this process
// are passed on, under the same names, until the daemon removes them from the store. It returns only if that didn't work; those
// descriptors are then lost.
//
// The keeper ends, with the daemon's exit code, when the daemon ended as it wanted to: it exits after STOPPING=1, or with 0 while
// nothing is stored, or before it has ever said READY=1 and stored anything. Otherwise the daemon is started again, for ever.
func Run(c Config) error {
	passed, err := systemd.Descriptors(os.Getpid())
	if err != nil {
		return fmt.Errorf("start the keeper: %w", err)
	}
	s := newState(c)
	s.outer, s.report = os.Getenv(envNotify), c.Report
	for _, d := range passed {
		s.items = append(s.items, item{d.FD, d.Name, true})
	}
	return s.become(self)
}

// keeper is the process. Its main goroutine owns everything.
type keeper struct {
	state
	program string // the installed binary
	outward systemd.Notifier
	started time.Time // when the daemon was, last
	due     time.Time // not before that it is started again
	reexec  bool      // the daemon wants us to go on as the installed binary
	in      buffers

	// The signals that came, a byte each, on their way from a goroutine of their own.
	signals, signalsIn int
	came               chan os.Signal
	caught             chan struct{} // answers a marker in came
}

// stateArgument returns the descriptor that follows arg on our command line, if we were started as a keeper.
func stateArgument(arg string) (fd int, ok bool) {
	if len(os.Args) != 2 || os.Args[0] != name {
		return -1, false
	}
	number, ok := strings.CutPrefix(os.Args[1], arg)
	fd, err := strconv.Atoi(number)
	if !ok || err != nil {
		return -1, false
	}
	_, err = unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0) // fails for all but memory files
	return fd, err == nil
}

// IsKeeper reports whether this process was started as a keeper.
func IsKeeper() bool {
	_, run := stateArgument(argState)
	_, fork := stateArgument(argFork)
	return run || fork
}

// Main is the keeper, and doesn't return. If IsKeeper, main has to call it before anything else.
func Main() {
	if _, ok := stateArgument(argFork); ok {
		os.Exit(fork())
	}
	fd, _ := stateArgument(argState)
	s, err := loadState(fd)
	if err == nil {
		k := &keeper{state: *s}
		if err = k.settle(); err == nil {
			os.Exit(k.run())
		}
	}
	fmt.Fprintf(os.Stderr, "%s: error: %v\n", name, err)
	os.Exit(1)
}

// settle makes the process a keeper.
func (k *keeper) settle() error {
	if err := k.catch(); err != nil {
		return err
	}
	for _, set := range [][2]string{{"/proc/self/comm", comm}, {"/proc/self/oom_score_adj", "-999"}} {
		// Without privilege or /proc it keeps all the same. What starts from here is as well protected.
		if fd, err := unix.Open(set[0], unix.O_WRONLY|unix.O_CLOEXEC, 0); err == nil {
			unix.Write(fd, []byte(set[1]))
			unix.Close(fd)
		}
	}
	if err := unix.Chdir("/"); err != nil {
		return &os.PathError{Op: "chdir", Path: "/", Err: err}
	}
	var err error
	if k.program, err = os.Executable(); err != nil {
		k.program = self
	}
	k.outward = systemd.NotifierAt(k.outer)
	if k.notify < 0 {
		if err := k.bind(); err != nil {
			return fmt.Errorf("make the socket that the daemon notifies: %w", err)
		}
	}
	if k.hello < 0 {
		return nil
	}
	err = k.greet()
	unix.Close(k.hello)
	k.hello = -1
	return err
}

// run works until an intended end of the daemon, and returns the exit code.
func (k *keeper) run() int {
	for {
		if k.pidfd < 0 && time.Until(k.due) <= 0 {
			if err := k.start(); err != nil {
				if !k.served && k.stored() == 0 {
					fmt.Fprintf(os.Stderr, "%s: error: %v\n", name, err)
					return 1
				}
				k.failed(err.Error())
			}
		}
		if code, end := k.forward(); end {
			return code
		}
		ended := k.wait()
		k.takeSignals()
		k.receive(ended) // also what the daemon has sent right before its end
		if ended {
			code, end, how := k.reap()
			if end {
				return code
			}
			k.failed(how)
		}
		if k.reexec {
			k.reexec = false
			k.goOn()
		}
	}
}

// wait sleeps until there is something to do, and tells whether the daemon has ended.
func (k *keeper) wait() (ended bool) {
	fds := [...]unix.PollFd{
		{Fd: int32(k.pidfd), Events: unix.POLLIN}, // a negative one is ignored
		{Fd: int32(k.notify), Events: unix.POLLIN},
		{Fd: int32(k.signals), Events: unix.POLLIN},
	}
	timeout := -1
	if k.pidfd < 0 {
		timeout = int(max(0, time.Until(k.due))/time.Millisecond) + 1
	}
	_, err := unix.Poll(fds[:], timeout)
	return err == nil && fds[0].Revents != 0
}

// start starts the daemon with all that is stored.
func (k *keeper) start() error {
	k.started = time.Now()
	files := []uintptr{0, 1, 2}
	names := make([]string, len(k.items))
	for i, it := range k.items {
		files = append(files, uintptr(it.fd))
		names[i] = it.name
	}
	report := -1
	if k.report >= 0 {
		report = len(files)
		files = append(files, uintptr(k.report))
	}
	start, err := startTime(os.Getpid())
	if err != nil {
		return err
	}
	env := slices.Concat(k.env, []string{
		envNotify + "=" + k.address,
		envKeeper + "=" + mark{os.Getpid(), start, 0, report, k.how}.String(),
	})
	if len(names) > 0 {
		// Kept adds for which process.
		env = append(env, "LISTEN_FDS="+strconv.Itoa(len(names)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	}
	pidfd := -1
	attr := &syscall.ProcAttr{
		Dir: k.dir, Env: env, Files: files,
		// What a terminal sends to its foreground group comes from us, once.
		Sys: &syscall.SysProcAttr{Setpgid: true, PidFD: &pidfd},
	}
	// What is installed may be no good, or be missing while it is replaced: then what runs here. Or it is the C daemon, as must have been
	// the one that has served and left nothing here: that would refuse our options, or detach itself and be out of sight.
	program := k.program
	if k.quick%2 == 1 || k.served && k.stored() == 0 {
		program = self
	}
	pid, err := syscall.ForkExec(program, k.args, attr)
	if err != nil && (program != self || attr.Dir != "/") {
		attr.Dir = "/"
		pid, err = syscall.ForkExec(self, k.args, attr)
	}
	if err == nil && pidfd < 0 { // Linux before 5.2
		pidfd, err = unix.PidfdOpen(pid, 0)
	}
	if err != nil {
		return fmt.Errorf("start the daemon, %s: %w", program, err)
	}
	k.pid, k.pidfd, k.child = pid, pidfd, true
	k.ready, k.stopping = false, false
	if k.report >= 0 {
		unix.Close(k.report)
		k.report = -1
	}
	return nil
}

// reap takes note of the daemon's end: how it was, and whether it was intended and ends us with an exit code.
func (k *keeper) reap() (code int, end bool, how string) {
	var status unix.WaitStatus
	for k.child {
		if _, err := unix.Wait4(k.pid, &status, 0, nil); err != unix.EINTR {
			break
		}
	}
	unix.Close(k.pidfd)
	k.pidfd = -1
	// As the init of a container we inherit the daemon's worker processes.
	for {
		if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); pid <= 0 && err != unix.EINTR {
			break
		}
	}
	empty := k.stored() == 0
	switch {
	case !k.child:
		return 0, k.stopping || empty, "it ended, nobody knows how"
	case status.Exited():
		code = status.ExitStatus()
		end = k.stopping && code != exitPanic || empty && (code == 0 || !k.served)
		return code, end, fmt.Sprintf("exit code %d", code)
	default:
		sig := status.Signal()
		// Within exec a daemon can't hold one back that asks for the end. It is for the next one, which then ends in order.
		k.pending |= 1 << sig & stopSignals
		return 128 + int(sig), empty && !k.served, fmt.Sprintf("killed by signal %d (%s)", sig, unix.SignalName(sig))
	}
}

// failed sees to it that the daemon is started again. how says why it has to be.
func (k *keeper) failed(how string) {
	k.quick++
	if k.ready {
		k.quick = 0
	}
	k.how, k.ready = how, false
	delay := minDelay
	for range k.quick {
		delay = min(2*delay, maxDelay)
	}
	k.due = k.started.Add(delay)
}

// catch has the signals that are to be forwarded written into a pipe.
func (k *keeper) catch() error {
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return fmt.Errorf("catch signals: %w", os.NewSyscallError("pipe2", err))
	}
	k.signals, k.signalsIn = pipe[0], pipe[1]
	k.came, k.caught = make(chan os.Signal, 16), make(chan struct{})
	for _, sig := range forwarded {
		signal.Notify(k.came, sig)
	}
	go func() {
		for s := range k.came {
			if s == marker {
				k.caught <- struct{}{}
				continue
			}
			unix.Write(k.signalsIn, []byte{byte(s.(syscall.Signal))})
		}
	}()
	return nil
}

// marker is no signal. Behind the last one it tells when that was written.
const marker = syscall.Signal(0)

// takeSignals takes note of the signals that came.
func (k *keeper) takeSignals() {
	var came [64]byte
	n, _ := unix.Read(k.signals, came[:])
	for _, sig := range came[:max(0, n)] {
		k.pending |= 1 << sig
	}
}

// forward sends the signals that came to the daemon. One that has something to take up is first let get ready, since signals are deadly
// until it catches them. end: there is no daemon and nothing stored, so that one that asks for the end is for us.
func (k *keeper) forward() (code int, end bool) {
	switch stop := k.pending & stopSignals; {
	case k.pidfd >= 0 && (k.ready || !k.served && k.stored() == 0):
		for k.pending != 0 {
			sig := unix.Signal(bits.TrailingZeros64(k.pending))
			if unix.PidfdSendSignal(k.pidfd, sig, nil, 0) == unix.ESRCH {
				break // it has ended: the next one gets it
			}
			k.pending &^= 1 << sig
		}
	case k.pidfd < 0 && stop != 0 && k.stored() == 0:
		return 128 + bits.TrailingZeros64(stop), true
	}
	return 0, false
}

// programNow returns what to go on as: the program that the daemon runs, if that is another one than ours, since it may have come there
// by a link that leads elsewhere now; else what is installed where ours was.
func (k *keeper) programNow() string {
	ours, err := os.Readlink(self)
	if err != nil || k.pidfd < 0 {
		return k.program
	}
	path, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", k.pid))
	// If the daemon lives now the pid was no other process's a moment before.
	if err != nil || path == ours || poll.Ended(k.pidfd) {
		return k.program
	}
	return strings.TrimSuffix(path, " (deleted)") // replaced: the new one has its name
}

// goOn runs the installed binary in our place, with everything that we have. It returns if that didn't work, and then everything is as
// it was.
//
// A signal to be forwarded that comes between here and the new keeper's catch, a millisecond or two, is lost: it is ignored until the
// run-time of the new program installs its handlers, whatever is set here, and deadly from then on. The run-time lets none of those that ask for the end
// be held back over exec. Whoever waits for a barrier behind its wish for another binary does not get there.
func (k *keeper) goOn() {
	restore, err := sigaction.Set(sigaction.Ignore, forwarded...)
	if err != nil {
		return // the kernel knows them all
	}
	defer restore()
	sigaction.Arrived(unix.SIGTERM)
	k.came <- marker
	<-k.caught
	k.takeSignals()
	_ = k.become(k.programNow())
}
