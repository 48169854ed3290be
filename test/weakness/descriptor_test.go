// SPDX-License-Identifier: LGPL-2.1-or-later

package weakness

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/slowdisk"
	"virtlockd/test/wire"
)

// A descriptor that a client attaches to what it sends is closed by the kernel on our thread, which can take as long as its disk does. On a
// kernel that can't refuse it, that delays its client, and nobody else: no request, no disconnect, no collection of garbage.
func TestHungDescriptor(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	read := slowdisk.Mount(t, h, "/tmp/read", slowdisk.Options{})
	left := slowdisk.Mount(t, h, "/tmp/left", slowdisk.Options{})
	onRead, onLeft := newDevice(t, h, read, "/tmp/read"), newDevice(t, h, left, "/tmp/left")
	reads, ends, other := d.Client(noOne), d.Client(noOne), d.Client(noOneElse)
	d.AllowDescriptors()
	read.Hang(slowdisk.Write)
	left.Hang(slowdisk.Write)

	d.Pause() // whoever closes a device last waits: that has to be the daemon
	must(t, reads.Send(wire.Ping()))
	must(t, attach(reads, wire.Ping(), onRead))
	must(t, onRead.Close())
	// A message that is none ends the connection. It fills the daemon's read, so what is behind it is not read.
	must(t, ends.Send(append([]byte{0, 0, 0, 1}, make([]byte, 2<<10)...)))
	must(t, attach(ends, []byte{0}, onLeft))
	must(t, onLeft.Close())
	d.Continue()
	read.AwaitHang(slowdisk.Write)
	left.AwaitHang(slowdisk.Write)

	// Clients come and go, and leave garbage enough to be collected some times.
	for range 200 {
		c := d.Client(noOneElse)
		_, err := c.Call(99, make([]byte, 200<<10)) // there is no such procedure
		must(t, err)
		c.Close()
	}
	must(t, other.Ping())
	admin := d.Dial("admin")
	must(t, admin.AdminOpen())
	eventually(t, "the others have gone", func() bool {
		clients, err := admin.AdminClients("virtlockd")
		must(t, err)
		return len(clients) <= 3
	})
}

// attach sends bytes with a descriptor.
func attach(c *wire.Conn, b []byte, f *os.File) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	err = raw.Write(func(fd uintptr) bool {
		sent = unix.Sendmsg(int(fd), b, unix.UnixRights(int(f.Fd())), nil, unix.MSG_NOSIGNAL)
		return sent != unix.EAGAIN && sent != unix.EINTR
	})
	return errors.Join(err, sent)
}

// newDevice returns the only descriptor of a block device, which lies on a disk and has something to be written there when it is closed.
func newDevice(t *testing.T, h *host.Host, disk *slowdisk.Disk, dir string) *os.File {
	t.Helper()
	const size = 1 << 20
	disk.AddSize("device", size)
	var device *os.File
	h.Must(func() error {
		// Not by package os: the run-time would have the kernel ask the disk whether it is ready, with all waiting that has to answer.
		backing, err := unix.Open(filepath.Join(dir, "device"), unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(backing)
		control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer control.Close()
		for {
			n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
			if err != nil {
				return fmt.Errorf("find a free loop device: %w", err)
			}
			if device, err = os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDWR, 0); err != nil {
				return err
			}
			// It is free again when it is closed.
			config := unix.LoopConfig{Fd: uint32(backing), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR}}
			switch err = unix.IoctlLoopConfigure(int(device.Fd()), &config); err {
			case nil:
				_, err = device.Write(make([]byte, size))
				return err
			case unix.EBUSY: // somebody else was faster
				device.Close()
			default:
				return fmt.Errorf("set up a loop device: %w", err)
			}
		}
	})
	t.Cleanup(func() {
		disk.Resume(slowdisk.Write) // else to close it would hang here, with the disk's own server
		device.Close()
	})
	return device
}
