// SPDX-License-Identifier: LGPL-2.1-or-later

package ctl

import (
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"virtlockd/test/host"
)

// follower is a run of the tool that goes on, and what it has printed so far.
type follower struct {
	t    testing.TB
	cmd  *exec.Cmd
	done chan struct{}

	mu  sync.Mutex
	out strings.Builder
}

// follow starts a command whose output is read as it comes. It is killed when the test ends.
func follow(t testing.TB, h *host.Host, cmd *exec.Cmd) *follower {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = w, w
	err = h.Do(cmd.Start)
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	return newFollower(t, cmd, r)
}

// newFollower reads what a command that was started prints.
func newFollower(t testing.TB, cmd *exec.Cmd, r *os.File) *follower {
	f := &follower{t: t, cmd: cmd, done: make(chan struct{})}
	go func() {
		defer close(f.done)
		defer r.Close()
		buf := make([]byte, 4096)
		for {
			n, err := r.Read(buf)
			f.mu.Lock()
			f.out.Write(buf[:n])
			f.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		<-f.done
	})
	return f
}

// printed is all that has come so far.
func (f *follower) printed() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.out.String()
}

// await waits until all texts have been printed.
func (f *follower) await(texts ...string) {
	f.t.Helper()
	for _, text := range texts {
		if !host.Eventually(func() bool { return strings.Contains(f.printed(), text) }) {
			f.t.Fatalf("%q is not printed:\n%s", text, host.Shorten(f.printed()))
		}
	}
}

// end waits for the end of the command and returns its exit code.
func (f *follower) end() int {
	f.t.Helper()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = f.cmd.Wait()
		<-f.done // all that it has printed was read
	}()
	if !host.Eventually(func() bool {
		select {
		case <-ended:
			return true
		default:
			return false
		}
	}) {
		f.t.Fatal("the tool does not end")
	}
	return f.cmd.ProcessState.ExitCode()
}
