// SPDX-License-Identifier: LGPL-2.1-or-later

package sigaction

import (
	"errors"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// ignored tells whether the kernel ignores a signal to this process (proc_pid_status(5)).
func ignored(t *testing.T, sig syscall.Signal) bool {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if set, ok := strings.CutPrefix(line, "SigIgn:"); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(set), 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n&(1<<(sig-1)) != 0
		}
	}
	t.Fatal("no SigIgn")
	return false
}

// What is ignored for a while is caught again afterwards, and what came before has arrived.
func TestSet(t *testing.T) {
	came := make(chan os.Signal, 1)
	signal.Notify(came, unix.SIGUSR1)
	defer signal.Stop(came)
	send := func() {
		t.Helper()
		if err := unix.Kill(os.Getpid(), unix.SIGUSR1); err != nil {
			t.Fatal(err)
		}
	}
	for range 100 {
		if err := unix.Tgkill(os.Getpid(), unix.Gettid(), unix.SIGUSR1); err != nil { // taken by this thread before it returns
			t.Fatal(err)
		}
		restore, err := Set(Ignore, unix.SIGUSR1, unix.SIGHUP)
		if err != nil {
			t.Fatal(err)
		}
		Arrived(unix.SIGUSR1)
		if len(came) != 1 {
			t.Fatal("what came before has not arrived")
		}
		<-came
		send()
		Arrived(unix.SIGUSR1)
		if len(came) != 0 || !ignored(t, unix.SIGUSR1) || !ignored(t, unix.SIGHUP) {
			t.Fatal("it is not ignored")
		}
		restore()
		if ignored(t, unix.SIGUSR1) || ignored(t, unix.SIGHUP) {
			t.Fatal("it is still ignored")
		}
		send()
		<-came
	}
}

// One that can't be set leaves all as they were.
func TestSetFails(t *testing.T) {
	if _, err := Set(Ignore, unix.SIGHUP, unix.SIGKILL); !errors.Is(err, unix.EINVAL) {
		t.Errorf("SIGKILL: %v", err)
	}
	if ignored(t, unix.SIGHUP) {
		t.Error("the other one is ignored")
	}
}
