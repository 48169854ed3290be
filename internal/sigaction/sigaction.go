// SPDX-License-Identifier: LGPL-2.1-or-later

// Package sigaction sets what the kernel does with a signal, behind the back of the run-time, for the time of an execve(2).
//
// With [os/signal.Ignore] and its like the run-time would die of a signal whose handler has just begun on another thread: it finds the
// mark gone that it handles it.
package sigaction

import (
	"os"
	"os/signal"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Action is what the kernel does with a signal.
type Action uint64

// SIG_DFL and SIG_IGN.
const (
	Default Action = 0
	Ignore  Action = 1
)

// Set gives each of the signals that action. restore gives the old ones back. After an error nothing has changed.
func Set(action Action, signals ...syscall.Signal) (restore func(), err error) {
	old := make([]sigaction, 0, len(signals))
	restore = func() {
		for i := range old {
			_ = set(signals[i], &old[i], nil) // it had it before
		}
	}
	for _, sig := range signals {
		var was sigaction
		if err := set(sig, &sigaction{uint64(action)}, &was); err != nil {
			restore()
			return nil, err
		}
		old = append(old, was)
	}
	return restore, nil
}

// sigaction is struct sigaction of the kernel. Its first member is the action, everywhere but on MIPS; no architecture's is larger.
type sigaction [8]uint64

// sigset is the size of the kernel's signal set, in bytes: 64 signals everywhere but on MIPS, which has no KVM hosts.
const sigset = 8

func set(sig syscall.Signal, act, old *sigaction) error {
	_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(act)), uintptr(unsafe.Pointer(old)), sigset, 0, 0)
	if errno != 0 {
		return os.NewSyscallError("rt_sigaction", errno)
	}
	return nil
}

// Arrived returns when what the kernel has delivered before that has arrived in the channels of os/signal. It is given a signal that is
// caught anyway: to catch another one, and to let it go, is for a thread that would have to be woken twice.
func Arrived(caught syscall.Signal) {
	idle := make(chan os.Signal, 1)
	signal.Notify(idle, caught)
	signal.Stop(idle) // waits for that
}
