// SPDX-License-Identifier: LGPL-2.1-or-later

package slowdisk

import (
	"errors"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

func TestMain(m *testing.M) { host.Main(m) }

// The C daemon hangs with the disk, which shows that the disk hangs.
func TestHang(t *testing.T) {
	t.Parallel()
	for _, op := range []Op{Lookup, Open, Create, Unlink, Lock} {
		t.Run(string(op), func(t *testing.T) {
			t.Parallel()
			h := host.New(t)
			d := h.Start(host.C(t), host.Options{})
			disk := Mount(t, h, "/tmp/slow", Options{Locks: op == Lock})
			if op != Create {
				disk.Add("a")
			}
			c, other := d.Client(0x70000001), d.Client(0x70000002)
			disk.Hang(op)
			proc := wire.ProcAcquire
			flags := wire.Autocreate
			if op == Unlink {
				proc, flags = wire.ProcDeleteResource, 0
			}
			if err := c.Send(wire.Request(proc, 9, wire.ResourceArgs("", "/tmp/slow/a", flags))); err != nil {
				t.Fatal(err)
			}
			disk.AwaitHang(op)
			if err := other.Send(wire.Ping()); err != nil {
				t.Fatal(err)
			}
			if m, err := other.RecvWithin(50 * time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("the disk does not hang: %v, %v", m, err)
			}
			disk.Resume(op)
			m, err := c.Recv()
			if err == nil {
				err = m.Err()
			}
			if err != nil {
				t.Error(err)
			}
			if got := disk.Has("a"); got != (op != Unlink) {
				t.Errorf("file is there: %v", got)
			}
		})
	}
}

// What is closed is unlocked, and nothing else.
func TestRelease(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	disk := Mount(t, h, "/tmp/slow", Options{Locks: true})
	disk.Add("a")
	// Not by package os, which would register them with the run-time's epoll set: see host.Wait.
	var files [2]int
	h.Must(func() (err error) {
		for i := range files {
			if files[i], err = unix.Open("/tmp/slow/a", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
				return err
			}
		}
		return unix.FcntlFlock(uintptr(files[0]), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Len: 1})
	})
	unix.Close(files[1])
	if !disk.Locked("a") {
		t.Error("the lock went with another descriptor of the file")
	}
	unix.Close(files[0])
	if !host.Eventually(func() bool { return !disk.Locked("a") }) {
		t.Error("the lock outlives its descriptor")
	}
}
