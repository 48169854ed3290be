// SPDX-License-Identifier: LGPL-2.1-or-later

// Package killpoint kills a process between two of its system calls: at the entry of one, which then has no effect, or at its exit,
// before the program knows the result. The kernel stops the process there (ptrace(2)), so the program needs nothing for it, and each
// point that it goes through can be hit.
package killpoint

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
)

// A Point is where a thread of the process was stopped.
type Point struct {
	Call int // the system call's number
	Exit bool
}

func (p Point) String() string {
	name := names[p.Call]
	if name == "" {
		name = "system call " + strconv.Itoa(p.Call)
	}
	if p.Exit {
		return "after " + name
	}
	return "before " + name
}

// names are those that tell a reader of a failed test where it was.
var names = map[int]string{
	unix.SYS_RECVMSG: "recvmsg", unix.SYS_SENDMSG: "sendmsg", unix.SYS_RECVFROM: "recvfrom", unix.SYS_SENDTO: "sendto",
	unix.SYS_READ: "read", unix.SYS_WRITE: "write", unix.SYS_OPENAT: "openat", unix.SYS_OPENAT2: "openat2", unix.SYS_CLOSE: "close",
	unix.SYS_FCNTL: "fcntl", unix.SYS_UNLINKAT: "unlinkat", unix.SYS_MKDIRAT: "mkdirat", unix.SYS_EXECVE: "execve", unix.SYS_IOCTL: "ioctl",
	unix.SYS_SOCKET: "socket", unix.SYS_SETSOCKOPT: "setsockopt", unix.SYS_ACCEPT4: "accept4", unix.SYS_SHUTDOWN: "shutdown",
	unix.SYS_STATX: "statx", unix.SYS_GETSOCKOPT: "getsockopt", unix.SYS_PIDFD_SEND_SIGNAL: "pidfd_send_signal",
	unix.SYS_PIDFD_OPEN: "pidfd_open", unix.SYS_EPOLL_CTL: "epoll_ctl", unix.SYS_FSTAT: "fstat",
}

// noise are the calls of the Go run-time that change nothing outside of the process, and come at any time, or only look: they are not counted.
var noise = []int{
	unix.SYS_FUTEX, unix.SYS_NANOSLEEP, unix.SYS_SCHED_YIELD, unix.SYS_EPOLL_PWAIT, unix.SYS_PPOLL, unix.SYS_MADVISE, unix.SYS_MMAP, unix.SYS_MUNMAP,
	unix.SYS_RT_SIGRETURN, unix.SYS_RT_SIGPROCMASK, unix.SYS_SIGALTSTACK, unix.SYS_GETTID, unix.SYS_GETPID, unix.SYS_TGKILL, unix.SYS_CLONE,
	unix.SYS_CLONE3, unix.SYS_PRCTL, unix.SYS_RESTART_SYSCALL, unix.SYS_SET_ROBUST_LIST, unix.SYS_RSEQ, unix.SYS_SCHED_GETAFFINITY,
}

// Never is the number of no point.
const Never = -1

// Trace is a process that is stopped at each of its system calls, and goes on at once, until it is killed.
type Trace struct {
	pid   int
	ended chan struct{}
	err   error // once it has ended

	mu     sync.Mutex
	armed  bool
	exec   bool                      // armed by the next execve
	at     func(n int, p Point) bool // the one to be killed at
	points []Point
	last   time.Time // when the last point was reached
	killed bool

	before func(tid, call int) // called where a thread enters a system call; nil: nothing is

	calls map[int]int // what each thread is in; only of the goroutine that follows
}

// Attach begins to trace a process, all its threads, and the programs that it becomes. It ends with the process.
func Attach(pid int) (*Trace, error) {
	t := &Trace{pid: pid, ended: make(chan struct{}), calls: map[int]int{}}
	attached := make(chan error)
	go t.run(attached, make(chan struct{}))
	return t, <-attached
}

// run lives on a thread of its own, which ends with it: then whatever is still traced is let go. locked is closed when it has one.
func (t *Trace) run(attached chan<- error, locked chan<- struct{}) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The main thread never ends. While this goroutine sits on it, another one gets another thread.
		next := make(chan struct{})
		go t.run(attached, next)
		<-next
		runtime.UnlockOSThread()
		close(locked)
		return
	}
	close(locked)
	defer close(t.ended)
	err := t.seize()
	attached <- err
	if err == nil {
		t.err = t.follow()
	}
}

// Kill has the process killed at its point number at, from 0, counted from now; Never: it is only counted.
func (t *Trace) Kill(at int) { t.arm(func(n int, _ Point) bool { return n == at }, false) }

// KillAfterExec is Kill, counted from where the process has become another program.
func (t *Trace) KillAfterExec(at int) { t.arm(func(n int, _ Point) bool { return n == at }, true) }

// KillAfter has the process killed after the next system call of that number.
func (t *Trace) KillAfter(call int) {
	t.arm(func(_ int, p Point) bool { return p == Point{call, true} }, false)
}

func (t *Trace) arm(at func(n int, p Point) bool, exec bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.armed, t.exec, t.at, t.points, t.last = !exec, exec, at, nil, time.Now()
}

// Points returns those that were reached since Kill. The process was killed at the last one, if it was.
func (t *Trace) Points() []Point {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.points)
}

// rest is how long a process that has nothing to do reaches no point. It only matters to how many points are found.
const rest = 50 * time.Millisecond

// Finish waits until the process was killed. If it comes to rest before, and done says that it has done what it was to do, it is killed
// then.
func (t *Trace) Finish(done func() bool) error {
	over := func() bool {
		select {
		case <-t.ended:
			return true
		default:
			t.mu.Lock()
			defer t.mu.Unlock()
			return t.armed && time.Since(t.last) > rest && done()
		}
	}
	if !host.Eventually(over) {
		return fmt.Errorf("process %d does not come to rest", t.pid)
	}
	if err := unix.Kill(t.pid, unix.SIGKILL); err != nil && err != unix.ESRCH {
		return os.NewSyscallError("kill", err)
	}
	<-t.ended
	return t.err
}

// options of ptrace(2): stops at system calls are told apart from others; new threads are traced, and other programs.
const options = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACEEXEC

// seize attaches to all threads. They don't stop for it, so new ones are looked for until there are none.
func (t *Trace) seize() error {
	seized := map[int]bool{}
	for before := -1; before < len(seized); {
		before = len(seized)
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", t.pid))
		if err != nil {
			return err
		}
		for _, e := range entries {
			tid, err := strconv.Atoi(e.Name())
			if err != nil || seized[tid] {
				continue
			}
			switch err := ptrace(unix.PTRACE_SEIZE, tid, 0, options); err {
			case nil, unix.EPERM: // the latter: a thread of a traced one
				seized[tid] = true
			case unix.ESRCH:
			default:
				return os.NewSyscallError("ptrace(SEIZE)", err)
			}
		}
	}
	for tid := range seized {
		// From its stop on it goes from call to call. A thread that has ended meanwhile has none.
		_ = ptrace(unix.PTRACE_INTERRUPT, tid, 0, 0)
	}
	return nil
}

// follow lets each thread that has stopped go on.
func (t *Trace) follow() error {
	for {
		tid, ws, err := t.wait()
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.ECHILD || err == nil && tid == t.pid && !ws.Stopped():
			return nil
		case err != nil:
			return os.NewSyscallError("wait", err)
		case !ws.Stopped():
			continue
		}
		signal := uintptr(0)
		switch event := ws >> 16; {
		case ws.StopSignal() == unix.SIGTRAP|0x80:
			if err := t.stopped(tid); err != nil {
				return err
			}
		case event == unix.PTRACE_EVENT_EXEC:
			t.mu.Lock()
			if t.exec {
				t.armed, t.exec, t.last = true, false, time.Now()
			}
			t.mu.Unlock()
		case event == unix.PTRACE_EVENT_STOP && ws.StopSignal() != unix.SIGTRAP: // SIGSTOP is what it says
			_ = ptrace(unix.PTRACE_LISTEN, tid, 0, 0)
			continue
		case event == 0:
			signal = uintptr(ws.StopSignal())
		}
		// One that was killed can't go on.
		if err := ptrace(unix.PTRACE_SYSCALL, tid, 0, signal); err != nil && err != unix.ESRCH {
			return os.NewSyscallError("ptrace(SYSCALL)", err)
		}
	}
}

// wait waits until something happens to a thread that this one traces: the process of the test has other children. The end of the
// traced process stays for its parent, which may be this very process.
func (t *Trace) wait() (tid int, ws unix.WaitStatus, err error) {
	const whom = unix.WALL | unix.WNOTHREAD
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WSTOPPED|unix.WNOWAIT|whom, nil); err != nil {
		return 0, 0, err
	}
	tid, _ = child(&info)
	if info.Code <= cldDumped {
		if tid != t.pid {
			_, err = unix.Wait4(tid, &ws, whom, nil)
		}
		return tid, ws, err
	}
	info = unix.Siginfo{}
	if err := unix.Waitid(unix.P_PID, tid, &info, unix.WSTOPPED|unix.WNOHANG|whom, nil); err != nil {
		return 0, 0, err
	}
	tid, status := child(&info)
	if tid == 0 { // it was killed in the meantime
		return 0, 0, unix.EINTR
	}
	return tid, unix.WaitStatus(status<<8 | 0x7f), nil
}

// cldDumped is the last code of a siginfo_t that says that a child has ended (sigaction(2)).
const cldDumped = 3

// child returns which child a siginfo_t is about, and its status, on 64-bit machines.
func child(info *unix.Siginfo) (pid, status int) {
	at := func(offset int) int { return int(*(*int32)(unsafe.Add(unsafe.Pointer(info), offset))) }
	return at(16), at(24)
}

// syscallInfo is the head of struct ptrace_syscall_info of ptrace(2), with the call's number at the end: it is there at an entry.
type syscallInfo struct {
	op     uint8
	_      [3]uint8
	arch   uint32
	ip, sp uint64
	nr     uint64
}

const (
	getSyscallInfo = 0x420e // PTRACE_GET_SYSCALL_INFO, Linux 5.3
	atEntry        = 1
	atExit         = 2
)

// stopped counts a stop at a system call, and kills the process if this is the one.
func (t *Trace) stopped(tid int) error {
	var info syscallInfo
	_, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, getSyscallInfo, uintptr(tid), unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info)), 0, 0)
	if errno == unix.ESRCH {
		return nil
	}
	if errno != 0 {
		return os.NewSyscallError("ptrace(GET_SYSCALL_INFO)", errno)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	p := Point{Exit: info.op == atExit}
	if info.op == atEntry {
		p.Call = int(info.nr)
		t.calls[tid] = p.Call
		if t.before != nil {
			t.before(tid, p.Call)
		}
	} else {
		p.Call = t.calls[tid]
	}
	if !t.armed || t.killed || slices.Contains(noise, p.Call) {
		return nil
	}
	t.points, t.last = append(t.points, p), time.Now()
	if t.at(len(t.points)-1, p) {
		t.killed = true
		if err := unix.Kill(t.pid, unix.SIGKILL); err != nil {
			return os.NewSyscallError("kill", err)
		}
	}
	return nil
}

func ptrace(request, tid int, addr, data uintptr) error {
	_, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, uintptr(request), uintptr(tid), addr, data, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
