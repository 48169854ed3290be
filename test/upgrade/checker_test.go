// SPDX-License-Identifier: LGPL-2.1-or-later

package upgrade

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
)

// polled is how many of its files the checker asks about all the time.
const polled = 4

// check is a process that wants files which must never be free: for each it waits in F_OFD_SETLKW, and it asks the kernel about the
// first few of them in a tight loop. It reports in lines on its standard output, until its input ends.
func check(paths []string) error {
	fds := make([]int, len(paths))
	for i, path := range paths {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", path, err)
		}
		fds[i] = fd
	}
	var out sync.Mutex
	report := func(format string, a ...any) {
		out.Lock()
		defer out.Unlock()
		fmt.Printf(format+"\n", a...)
	}
	lock := func() *unix.Flock_t { return &unix.Flock_t{Type: unix.F_WRLCK, Len: 1} }
	for i, fd := range fds {
		go func() {
			for {
				err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLKW, lock())
				if err != unix.EINTR {
					report("woke %s: %v", paths[i], err)
					return
				}
			}
		}()
	}
	report("ready")
	var polls atomic.Int64
	go func() {
		n := min(polled, len(fds))
		free := make([]bool, n)
		for i := 0; ; i = (i + 1) % n {
			l := lock()
			if err := unix.FcntlFlock(uintptr(fds[i]), unix.F_OFD_GETLK, l); err != nil {
				report("poll %s: %v", paths[i], err)
				return
			}
			polls.Add(1)
			if l.Type == unix.F_UNLCK && !free[i] {
				free[i] = true // said once
				report("free %s", paths[i])
			}
		}
	}()
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return err
	}
	report("polls %d", polls.Load())
	return nil
}

// checker is the test's side of such a process.
type checker struct {
	cmd   *exec.Cmd
	input io.Closer
	lines *bufio.Scanner
}

func (m *machine) startChecker(paths ...string) *checker {
	m.t.Helper()
	c := &checker{cmd: m.command("checker", paths...)}
	in, err := c.cmd.StdinPipe()
	must(m.t, err)
	out, err := c.cmd.StdoutPipe()
	must(m.t, err)
	m.Must(c.cmd.Start)
	m.t.Cleanup(func() {
		_ = c.cmd.Process.Kill() // the usual end is behind it
		_ = c.cmd.Wait()
	})
	c.input, c.lines = in, bufio.NewScanner(out)
	if !c.lines.Scan() || c.lines.Text() != "ready" {
		m.t.Fatalf("checker says %q", c.lines.Text())
	}
	var waited []string // as /proc/locks names files
	for _, path := range paths {
		var st unix.Stat_t
		must(m.t, unix.Stat(m.Path(path), &st))
		waited = append(waited, fmt.Sprintf(" %02x:%02x:%d ", unix.Major(uint64(st.Dev)), unix.Minor(uint64(st.Dev)), st.Ino))
	}
	waits := func() int {
		b, err := os.ReadFile("/proc/locks")
		must(m.t, err)
		n := 0
		for line := range strings.Lines(string(b)) {
			if strings.Contains(line, "-> OFDLCK") && slices.ContainsFunc(waited, func(w string) bool { return strings.Contains(line, w) }) {
				n++
			}
		}
		return n
	}
	if !host.Eventually(func() bool { return waits() == len(paths) }) {
		m.t.Fatalf("the checker waits for %d locks, want %d", waits(), len(paths))
	}
	return c
}

// end returns what the checker has seen, which should be nothing, and how often it has looked.
func (c *checker) end(t testing.TB) (seen []string, polls int) {
	t.Helper()
	must(t, c.input.Close())
	for c.lines.Scan() {
		if n, err := fmt.Sscanf(c.lines.Text(), "polls %d", &polls); n == 1 && err == nil {
			continue
		}
		seen = append(seen, c.lines.Text())
	}
	must(t, c.cmd.Wait())
	return seen, polls
}
