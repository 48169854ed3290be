// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/internal/keeper"
	"virtlockd/internal/poll"
	"virtlockd/test/host"
)

// The pidfd of a keeper that has ended leaves the epoll set before it is closed: its number may be another descriptor's right afterwards, and
// that would be taken out instead. Here a copy of it would stay in the set.
func TestKeeperLeavesPollerFirst(t *testing.T) {
	t.Parallel()
	p, err := poll.New()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan error, 1)
	go func() { ran <- p.Run(ctx) }()
	process := exec.Command("sleep", "1000")
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	pidfd, err := unix.PidfdOpen(process.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	copied, err := unix.FcntlInt(uintptr(pidfd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(copied)
	d := &daemon{log: slog.New(slog.DiscardHandler), poller: p}
	d.safety.again = make(chan struct{}, 1)
	d.safety.link = &keeper.Link{PID: process.Process.Pid, PIDFD: pidfd}
	watched := func() bool {
		epfd, _ := p.State()
		info, err := os.ReadFile(fmt.Sprint("/proc/self/fdinfo/", epfd))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(info)) {
			if fields := strings.Fields(line); len(fields) > 1 && fields[0] == "tfd:" && fields[1] == fmt.Sprint(pidfd) {
				return true
			}
		}
		return false
	}
	guarded := make(chan struct{})
	go func() {
		defer close(guarded)
		d.guard(ctx)
	}()
	if !host.Eventually(watched) {
		t.Error("the keeper is not watched")
	}
	if err := process.Process.Kill(); err != nil {
		t.Error(err)
	}
	_ = process.Wait() // it was killed
	if !host.Eventually(func() bool { return d.safety.keeper() == nil && !watched() }) {
		t.Error("the pidfd of a keeper that has ended stays in the epoll set")
	}
	cancel()
	<-guarded
	if err := <-ran; err != nil {
		t.Error(err)
	}
}
