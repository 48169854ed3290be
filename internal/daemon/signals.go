// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"errors"
	"os"
	"os/signal"
	"slices"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"virtlockd/internal/sigaction"
)

// signals are those that mean something to us. Each channel holds one: a signal that comes again before
// the first was handled says nothing new, and none crowds out another kind.
type signals struct {
	stop    chan os.Signal // SIGTERM, SIGINT, SIGQUIT
	reload  chan os.Signal // SIGHUP
	upgrade chan os.Signal // SIGUSR1

	caught    chan struct{} // closed when all are caught or ignored
	reloading atomic.Bool   // a SIGHUP was taken out of reload and is not worked off yet
}

// catchSignals is called first of all, so that a signal during the start is neither lost nor deadly. The run-time has a thread for
// them, which is woken anew for each. After a live upgrade nobody waits for that until the configuration is read: what is taken over can be
// left at any point, while a new daemon makes nothing before it can undo it.
func catchSignals() *signals {
	s := &signals{
		stop: make(chan os.Signal, 1), reload: make(chan os.Signal, 1), upgrade: make(chan os.Signal, 1), caught: make(chan struct{}),
	}
	go func() {
		defer close(s.caught)
		s.catch()
		// What a stray kill(1), a timer that we inherited or a closed pipe can send: none of them may
		// cost a lock.
		signal.Ignore(syscall.SIGPIPE, syscall.SIGUSR2, syscall.SIGALRM, syscall.SIGVTALRM, syscall.SIGIO,
			syscall.SIGPWR, syscall.SIGXCPU, syscall.SIGXFSZ)
	}()
	return s
}

func (s *signals) catch() {
	signal.Notify(s.stop, syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT)
	signal.Notify(s.reload, syscall.SIGHUP)
	signal.Notify(s.upgrade, syscall.SIGUSR1)
}

// errReload says that a SIGHUP is to be worked off first.
var errReload = errors.New("the configuration is being read again")

// prepareExec sees to it that no signal is deadly until the next binary has its handlers, but for those that ask for the end.
// The goroutine is locked to its thread. If exec fails, undo.
//
//	SIGUSR1   is held back, and then pending for a binary of ours, unless another thread takes it in the last instant: then this
//	          upgrade is the one that it asks for. The C daemon would leave it blocked, so there it is ignored
//	SIGHUP,   are ignored, since the Go run-time of the next binary neither holds them back nor survives them. It reads its
//	SIGINT    configuration anyway
//	SIGTERM,  end the process at once, from here on until the next binary has its handlers: the Go run-time does not
//	SIGQUIT   hold them back either, and to lose them would be worse
//
// All actions are set behind the back of the run-time, see [sigaction].
//
// An error says that something has come that is to be worked off here.
func (s *signals) prepareExec(ours bool) (undo func(), err error) {
	var undone []func()
	undo = func() {
		for _, f := range slices.Backward(undone) {
			f()
		}
	}
	var mask, old unix.Sigset_t
	if ours {
		width := uint(unsafe.Sizeof(mask.Val[0])) * 8
		mask.Val[uint(unix.SIGUSR1-1)/width] |= 1 << (uint(unix.SIGUSR1-1) % width)
	}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &mask, &old); err != nil {
		undo()
		return nil, os.NewSyscallError("pthread_sigmask", err)
	}
	undone = append(undone, func() { _ = unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil) })

	ignored := syscall.SIGUSR1
	if ours {
		ignored = syscall.SIGINT
	}
	for action, signals := range map[sigaction.Action][]syscall.Signal{
		sigaction.Ignore: {syscall.SIGHUP, ignored}, sigaction.Default: {syscall.SIGTERM, syscall.SIGQUIT},
	} {
		restore, err := sigaction.Set(action, signals...)
		if err != nil {
			undo()
			return nil, err
		}
		undone = append(undone, restore)
	}
	sigaction.Arrived(syscall.SIGTERM)
	switch {
	case len(s.stop) > 0:
		err = errEnding
	case len(s.reload) > 0 || s.reloading.Load():
		err = errReload
	case len(s.upgrade) > 0 && ours:
		// Another one was asked for meanwhile, perhaps with another binary.
		err = os.NewSyscallError("tgkill", unix.Tgkill(os.Getpid(), unix.Gettid(), unix.SIGUSR1))
	}
	if err != nil {
		undo()
		return nil, err
	}
	return undo, nil
}

// release gives the signals their default actions back.
func (*signals) release() { signal.Reset() }
