// SPDX-License-Identifier: LGPL-2.1-or-later

package vault

import (
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// Two processes that look at once both see what lies in a cell, also if that is shorter than what they would read of it: where
// MSG_PEEK looks is the socket's own, and they share that.
func TestPeekAtOnce(t *testing.T) {
	t.Parallel()
	c, err := NewCell()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fd, _ := lockedFile(t, "disk")
	defer unix.Close(fd)
	if err := c.Put([]byte{1}, fd); err != nil {
		t.Fatal(err)
	}
	var both sync.WaitGroup
	for range 2 {
		both.Go(func() {
			for i := range 20000 {
				fds, err := c.All()
				if err != nil || len(fds) != 1 {
					t.Errorf("look %d: descriptors %v, %v", i, fds, err)
					return
				}
				unix.Close(fds[0])
			}
		})
	}
	both.Wait()
}
