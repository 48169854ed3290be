// SPDX-License-Identifier: LGPL-2.1-or-later

package vault

import (
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// While a socket has its name and is not connected yet, anybody can send to it. What he sends lies in no cell.
func TestStrangerSends(t *testing.T) {
	t.Parallel()
	stranger, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(stranger)
	send := func(fd int) error {
		name, err := unix.Getsockname(fd)
		if err != nil {
			t.Fatal(err)
		}
		return unix.Sendto(stranger, lockspaceRecord("/forged"), 0, name)
	}
	sent := 0
	c, err := connected(func() (int, error) {
		fd, err := bound()
		if err == nil && sent < 2 {
			err = send(fd)
			sent++
		}
		return fd, err
	})
	if err != nil || sent != 2 {
		t.Fatalf("sent %d times: %v", sent, err)
	}
	defer c.Close()
	if c.Drop() {
		t.Error("a stranger's message lies in a cell")
	}
	if err := send(c.FD()); err != unix.EPERM {
		t.Errorf("a stranger sends to a cell: %v", err)
	}
	if err := c.Put([]byte{1}); err != nil || !c.Drop() || c.Drop() {
		t.Errorf("nothing can be put into it, or it does not come out: %v", err)
	}
}

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
