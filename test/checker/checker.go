// SPDX-License-Identifier: LGPL-2.1-or-later

// Package checker watches, from outside and in a process of its own, that locks are never free: for each it waits in F_OFD_SETLKW, and
// it asks the kernel about the first few of them in a tight loop. The one sees what is free for long enough for a process to be woken,
// the other what is free when it looks.
//
// A test binary that uses the package calls Init first in its TestMain, because the process is the test binary itself.
package checker

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
)

const (
	partEnv = "VIRTLOCKD_TEST_CHECKER" // set in the environment of the process
	firstFD = 3                        // of the files that it is given
	polled  = 4                        // how many of them it asks about all the time
)

// What a line begins with that tells of a free lock.
const (
	Woke = "woke " // the kernel has given it to who waited
	Free = "free " // the kernel has said so
)

// Init plays the part of the process and doesn't return, if it was started as that. Otherwise it does nothing.
func Init() {
	if os.Getenv(partEnv) == "" {
		return
	}
	if err := check(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "process of a test: %v\n", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// check reports in lines on its standard output, until its input ends.
func check(names []string) error {
	var out sync.Mutex
	report := func(format string, a ...any) {
		out.Lock()
		defer out.Unlock()
		fmt.Printf(format+"\n", a...)
	}
	looks := make([]uintptr, min(polled, len(names)))
	for i := range looks {
		// Opened anew: what the one who waits may get is another one's here.
		fd, err := unix.Open("/proc/self/fd/"+strconv.Itoa(firstFD+i), unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", names[i], err)
		}
		looks[i] = uintptr(fd)
	}
	for i, name := range names {
		go wait(uintptr(firstFD+i), func(err error) { report(Woke+"%s: %v", name, err) })
	}
	report("ready")
	var polls atomic.Int64
	go func() {
		free := make([]bool, len(looks))
		for i := 0; ; i = (i + 1) % len(looks) {
			l := unix.Flock_t{Type: unix.F_WRLCK, Len: 1}
			if err := unix.FcntlFlock(looks[i], unix.F_OFD_GETLK, &l); err != nil {
				report("poll %s: %v", names[i], err)
				return
			}
			polls.Add(1)
			if l.Type == unix.F_UNLCK && !free[i] {
				free[i] = true // said once
				report(Free+"%s", names[i])
			}
		}
	}()
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return err
	}
	report("polls %d", polls.Load())
	return nil
}

// wait tells when it has the lock. It gives it up at once: whoever has lost it may take it again.
func wait(fd uintptr, woke func(error)) {
	for {
		err := unix.FcntlFlock(fd, unix.F_OFD_SETLKW, &unix.Flock_t{Type: unix.F_WRLCK, Len: 1})
		if err == unix.EINTR { // Go interrupts threads that stay long
			continue
		}
		unix.FcntlFlock(fd, unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_UNLCK, Len: 1})
		woke(err)
		return
	}
}

// Checker is the test's side of the process. That ends with the test, whose end of its input is closed then.
type Checker struct {
	t     testing.TB
	cmd   *exec.Cmd
	input io.Closer
	lines *bufio.Scanner
}

// Start begins to watch byte 0 of files, which must be locked; paths are as the test sees them.
func Start(t testing.TB, paths ...string) *Checker {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("checker: %v", err)
		}
	}
	c := &Checker{t: t, cmd: &exec.Cmd{
		Path: "/proc/self/exe", Args: append([]string{"virtlockd-test-checker"}, paths...),
		Env: append(os.Environ(), partEnv+"=1"), Stderr: os.Stderr,
	}}
	var waited []string // as /proc/locks names files
	for _, path := range paths {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0) // not by package os: see host.Wait
		must(err)
		f := os.NewFile(uintptr(fd), path)
		defer f.Close()
		c.cmd.ExtraFiles = append(c.cmd.ExtraFiles, f)
		var st unix.Stat_t
		must(unix.Fstat(fd, &st))
		waited = append(waited, fmt.Sprintf(" %02x:%02x:%d ", unix.Major(uint64(st.Dev)), unix.Minor(uint64(st.Dev)), st.Ino))
	}
	in, err := c.cmd.StdinPipe()
	must(err)
	out, err := c.cmd.StdoutPipe()
	must(err)
	must(c.cmd.Start())
	t.Cleanup(func() {
		_ = c.cmd.Process.Kill() // the usual end is behind it
		_ = c.cmd.Wait()
	})
	c.input, c.lines = in, bufio.NewScanner(out)
	if !c.lines.Scan() || c.lines.Text() != "ready" {
		t.Fatalf("checker says %q", c.lines.Text())
	}
	waits := func() int {
		b, err := os.ReadFile("/proc/locks")
		must(err)
		n := 0
		for line := range strings.Lines(string(b)) {
			if strings.Contains(line, "-> OFDLCK") && slices.ContainsFunc(waited, func(w string) bool { return strings.Contains(line, w) }) {
				n++
			}
		}
		return n
	}
	if !host.Eventually(func() bool { return waits() >= len(paths) }) {
		t.Fatalf("the checker waits for %d locks, want %d", waits(), len(paths))
	}
	return c
}

// End returns what the checker has seen, which should be nothing, and how often it has looked.
func (c *Checker) End() (seen []string, polls int) {
	c.t.Helper()
	if err := c.input.Close(); err != nil {
		c.t.Fatalf("checker: %v", err)
	}
	for c.lines.Scan() {
		if n, err := fmt.Sscanf(c.lines.Text(), "polls %d", &polls); n == 1 && err == nil {
			continue
		}
		seen = append(seen, c.lines.Text())
	}
	if err := c.cmd.Wait(); err != nil {
		c.t.Fatalf("checker: %v", err)
	}
	return seen, polls
}

// Quiet ends the checker and fails the test if it has seen anything, or has not looked. It returns how often it has.
func (c *Checker) Quiet() int {
	c.t.Helper()
	seen, polls := c.End()
	if len(seen) > 0 || polls == 0 {
		c.t.Errorf("from outside, in %d looks: %q", polls, seen)
	}
	return polls
}
