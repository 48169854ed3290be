// SPDX-License-Identifier: LGPL-2.1-or-later

package ctl

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"virtlockd/test/host"
)

// terminal is the tool in a terminal of its own.
type terminal struct {
	*follower
	master *os.File
}

func inTerminal(t *testing.T, h *host.Host, rows, cols uint16, cmd *exec.Cmd) *terminal {
	t.Helper()
	master, slave, err := pty.Open()
	must(t, err)
	must(t, pty.Setsize(master, &pty.Winsize{Rows: rows, Cols: cols}))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr.Setsid, cmd.SysProcAttr.Setctty = true, true
	err = h.Do(cmd.Start)
	slave.Close()
	must(t, err)
	// The follower closes its own when the tool has ended.
	fd, err := unix.FcntlInt(master.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	must(t, err)
	x := &terminal{newFollower(t, cmd, master), os.NewFile(uintptr(fd), "terminal")}
	t.Cleanup(func() { x.master.Close() })
	return x
}

func (x *terminal) state() term.State {
	x.t.Helper()
	s, err := term.GetState(int(x.master.Fd()))
	if err != nil {
		x.t.Fatal(err)
	}
	return *s
}

func (x *terminal) typeIn(s string) {
	x.t.Helper()
	if _, err := x.master.WriteString(s); err != nil {
		x.t.Fatal(err)
	}
}

const leaveScreen = "\x1b[?25h\x1b[?1049l"

func TestTop(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	c := d.Client(0x70000001)
	disk := file(h, "disk")
	x := inTerminal(t, h, 24, 300, command(t, h, "top", "--interval", "100ms"))
	x.await("virtlockd", "q quits", "0 held", "per second", "Events")
	must(t, c.Acquire("", disk, 0))
	x.await("1 held", disk)
	raw := x.state()
	d.Signal(syscall.SIGUSR1)
	x.await("upgraded", "1 live upgrades")
	d.Stop()
	x.await("no daemon is listening there")
	h.Start(host.Ours(t), host.Options{})
	before := len(x.printed())
	if !host.Eventually(func() bool { return strings.Contains(x.printed()[before:], "q quits") }) {
		t.Error("a daemon that came back is not noticed")
	}
	x.typeIn("xq")
	if code := x.end(); code != ok || !strings.HasSuffix(x.printed(), leaveScreen) {
		t.Errorf("it ends with %d and %q", code, x.printed()[max(0, len(x.printed())-50):])
	}
	if x.state() == raw {
		t.Error("the terminal is left in raw mode")
	}
}

// Whatever ends it, the terminal is as before; and it fits any terminal.
func TestTopEnds(t *testing.T) {
	t.Parallel()
	h, _ := start(t, host.Options{})
	for name, end := range map[string]func(x *terminal){
		"control-C": func(x *terminal) { x.typeIn("\x03") },
		"SIGTERM":   func(x *terminal) { must(t, x.cmd.Process.Signal(syscall.SIGTERM)) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x := inTerminal(t, h, 3, 10, command(t, h, "top", "-i", "100ms"))
			x.await("virtlockd")
			end(x)
			if code := x.end(); code != ok || !strings.HasSuffix(x.printed(), leaveScreen) {
				t.Errorf("it ends with %d and %q", code, x.printed())
			}
			for line := range strings.SplitSeq(x.printed(), "\r\n") {
				line = strings.NewReplacer("\x1b[?1049h", "", "\x1b[?25l", "", "\x1b[H", "", "\x1b[K", "", "\x1b[J", "", "\x1b[0m", "", "\x1b[1m", "",
					"\x1b[2m", "", "\x1b[33m", "", "\x1b[31m", "", "\x1b[32m", "").Replace(line)
				if len(line) > 30 { // some screens may meet at the end of one line
					t.Errorf("a line of %d: %q", len(line), line)
				}
			}
		})
	}
}

// Who wants to leave need not wait for a daemon that does not answer.
func TestTopLeavesAtOnce(t *testing.T) {
	t.Parallel()
	for name, key := range map[string]string{"q": "q", "control-C": "\x03"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h, d := start(t, host.Options{})
			x := inTerminal(t, h, 24, 300, command(t, h, "top", "-i", "100ms"))
			x.await("q quits")
			d.Signal(syscall.SIGSTOP)
			defer d.Signal(syscall.SIGCONT)
			// A connection that stays is one that waits for an answer.
			last, since := "", time.Time{}
			if !host.Eventually(func() bool {
				if now := x.socket(); now != last {
					last, since = now, time.Now()
				}
				return last != "" && time.Since(since) > 300*time.Millisecond
			}) {
				t.Fatal("the daemon is not asked")
			}
			x.typeIn(key)
			if code := x.end(); code != ok || !strings.HasSuffix(x.printed(), leaveScreen) || strings.Contains(x.printed(), "no answer") {
				t.Errorf("it ends with %d and %q", code, x.printed()[max(0, len(x.printed())-100):])
			}
		})
	}
}

// socket returns which socket the tool has, "" for none.
func (x *terminal) socket() string {
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", x.cmd.Process.Pid))
	for _, link := range links {
		if to, err := os.Readlink(link); err == nil && strings.HasPrefix(to, "socket:") {
			return to
		}
	}
	return ""
}

// On a terminal there are colours, unless they are not wanted, and release asks.
func TestTerminal(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	_, c := guest(t, h, d, "alpha")
	disk := file(h, "disk")
	must(t, c.Acquire("", disk, 0))
	x := inTerminal(t, h, 24, 200, command(t, h, "list"))
	if x.await("alpha"); x.end() != ok || !strings.Contains(x.printed(), "\x1b[1m") {
		t.Errorf("no colours on a terminal: %q", x.printed())
	}
	cmd := command(t, h, "list")
	cmd.Env = append(cmd.Env, "NO_COLOR=1")
	x = inTerminal(t, h, 24, 200, cmd)
	if x.await("alpha"); x.end() != ok || strings.Contains(x.printed(), "\x1b") {
		t.Errorf("colours that are not wanted: %q", x.printed())
	}

	for answer, code := range map[string]int{"no\n": failure, "\n": failure, "\x04": failure} {
		x = inTerminal(t, h, 24, 200, command(t, h, "release", disk))
		x.await("held for alpha", "that process runs", "Type yes")
		x.typeIn(answer)
		x.await("nothing was done")
		if got := x.end(); got != code || h.Free(disk, true) {
			t.Errorf("answer %q: exit code %d", answer, got)
		}
	}
	x = inTerminal(t, h, 24, 200, command(t, h, "release", disk))
	x.await("Type yes")
	x.typeIn("yes\n")
	x.await("released: ")
	if x.end() != ok || !h.Free(disk, true) {
		t.Errorf("%q", x.printed())
	}
}
