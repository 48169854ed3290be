// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"os"
	"os/signal"
	"syscall"
)

// signals are those that mean something to us. Each channel holds one: a signal that comes again before
// the first was handled says nothing new, and none crowds out another kind.
type signals struct {
	stop    chan os.Signal // SIGTERM, SIGINT, SIGQUIT
	reload  chan os.Signal // SIGHUP
	upgrade chan os.Signal // SIGUSR1
}

// catchSignals is called first of all, so that a signal during the start is neither lost nor deadly.
func catchSignals() *signals {
	s := &signals{make(chan os.Signal, 1), make(chan os.Signal, 1), make(chan os.Signal, 1)}
	signal.Notify(s.stop, syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT)
	signal.Notify(s.reload, syscall.SIGHUP)
	signal.Notify(s.upgrade, syscall.SIGUSR1)
	// What a stray kill(1), a timer that we inherited or a closed pipe can send: none of them may
	// cost a lock.
	signal.Ignore(syscall.SIGPIPE, syscall.SIGUSR2, syscall.SIGALRM, syscall.SIGVTALRM, syscall.SIGIO,
		syscall.SIGPWR, syscall.SIGXCPU, syscall.SIGXFSZ)
	return s
}

// release gives the signals their default actions back.
func (*signals) release() { signal.Reset() }
