// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// adopt makes this process the parent of what is started here and loses its own, as the daemon of a keeper that was killed (prctl(2)).
func adopt() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become a subreaper: %w", os.NewSyscallError("prctl", err))
	}
	return nil
}

// endAll ends all processes that were started here. They are killed with the threads that started them, but for those that have started
// themselves again: exec(2) from another thread than the first forgets that. One whose call hangs on a disk of ours ends when we do.
func endAll() {
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		// All are stopped first, since a keeper and its daemon start each other again.
		for _, sig := range []unix.Signal{unix.SIGSTOP, unix.SIGKILL} {
			for _, pid := range descendants(os.Getpid()) {
				_ = unix.Kill(pid, sig) // it may have ended
			}
		}
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if err == unix.ECHILD {
				return
			}
			if pid <= 0 && err != unix.EINTR {
				break
			}
		}
	}
}

// descendants of a process.
func descendants(pid int) []int {
	all := children(pid)
	for i := 0; i < len(all); i++ {
		all = append(all, children(all[i])...)
	}
	return all
}
