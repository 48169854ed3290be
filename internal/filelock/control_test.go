// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// A socket that the run-time's poller does not take, as none is when the user has too many watches, is of no use: whoever waited for a
// reply would take the worker for one that has not begun.
func TestControlWithoutPoller(t *testing.T) {
	t.Parallel()
	fd, err := unix.Open(t.TempDir(), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0) // epoll refuses it
	if err != nil {
		t.Fatal(err)
	}
	c, err := newControl(fd)
	if !errors.Is(err, os.ErrNoDeadline) {
		t.Errorf("newControl: %v, want %v", err, os.ErrNoDeadline)
	}
	if c != nil {
		c.close()
	}
}
