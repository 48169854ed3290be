// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"fmt"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// signals are those that mean something to us. Each channel holds one: a signal that comes again before
// the first was handled says nothing new, and none crowds out another kind.
type signals struct {
	stop    chan os.Signal // SIGTERM, SIGINT, SIGQUIT
	reload  chan os.Signal // SIGHUP
	upgrade chan os.Signal // SIGUSR1

	reloading atomic.Bool // a SIGHUP was taken out of reload and is not worked off yet
}

// catchSignals is called first of all, so that a signal during the start is neither lost nor deadly.
func catchSignals() *signals {
	s := &signals{stop: make(chan os.Signal, 1), reload: make(chan os.Signal, 1), upgrade: make(chan os.Signal, 1)}
	signal.Notify(s.stop, syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT)
	s.catchOthers()
	// What a stray kill(1), a timer that we inherited or a closed pipe can send: none of them may
	// cost a lock.
	signal.Ignore(syscall.SIGPIPE, syscall.SIGUSR2, syscall.SIGALRM, syscall.SIGVTALRM, syscall.SIGIO,
		syscall.SIGPWR, syscall.SIGXCPU, syscall.SIGXFSZ)
	return s
}

func (s *signals) catchOthers() {
	signal.Notify(s.reload, syscall.SIGHUP)
	signal.Notify(s.upgrade, syscall.SIGUSR1)
}

// heldBack are the signals that mean something to a daemon. Others stay as they are: the Go run-time
// needs some of them for itself.
var heldBack = []syscall.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGUSR1,
	syscall.SIGUSR2, syscall.SIGALRM}

// block holds signals back on this thread, to which the goroutine is locked, until unblock. Those that are pending then
// outlive execve(2), as the mask does, and so reach the next binary.
func (*signals) block() (unblock func(), err error) {
	var mask, old unix.Sigset_t
	for _, s := range heldBack {
		width := uint(unsafe.Sizeof(mask.Val[0])) * 8
		mask.Val[uint(s-1)/width] |= 1 << (uint(s-1) % width)
	}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &mask, &old); err != nil {
		return nil, os.NewSyscallError("pthread_sigmask", err)
	}
	return func() { _ = unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil) }, nil
}

// passOn sends what other threads have received and nobody has worked off to this thread, which holds it back. A
// signal that asks for the end is an error: that comes first.
func (s *signals) passOn() error {
	// Stop returns when what the kernel has delivered has arrived in the channels.
	idle := make(chan os.Signal, 1)
	signal.Notify(idle, syscall.SIGHUP)
	signal.Stop(idle)
	if len(s.stop) > 0 {
		return errEnding
	}
	for _, pending := range []struct {
		signal syscall.Signal
		yes    bool
	}{
		{syscall.SIGHUP, len(s.reload) > 0 || s.reloading.Load()},
		{syscall.SIGUSR1, len(s.upgrade) > 0},
	} {
		if !pending.yes {
			continue
		}
		if err := unix.Tgkill(os.Getpid(), unix.Gettid(), pending.signal); err != nil {
			return fmt.Errorf("pass %v on: %w", pending.signal, os.NewSyscallError("tgkill", err))
		}
	}
	return nil
}

// ignoreOthers is for the C daemon, which would leave signals blocked for ever: those that would end it before it
// has handlers are lost. SIGHUP would end it at any time.
func (s *signals) ignoreOthers() (undo func()) {
	signal.Ignore(syscall.SIGUSR1, syscall.SIGHUP)
	return s.catchOthers
}

// release gives the signals their default actions back.
func (*signals) release() { signal.Reset() }
