// SPDX-License-Identifier: LGPL-2.1-or-later

//go:build gap

package filelock

import (
	"time"

	"golang.org/x/sys/unix"
)

// gap makes a lock that is taken over free for an instant. A binary that does so must be caught by the test that looks at
// locks from outside during live upgrades and recoveries.
func (l *Lock) gap() {
	var fl unix.Flock_t
	setLock(&fl, int(l.fd), unix.F_OFD_SETLK, unix.F_UNLCK)
	time.Sleep(100 * time.Microsecond)
	setLock(&fl, int(l.fd), unix.F_OFD_SETLK, lockType(l.mode))
}
