// SPDX-License-Identifier: LGPL-2.1-or-later

package weakness

import (
	"testing"

	"virtlockd/test/host"
	"virtlockd/test/slowdisk"
	"virtlockd/test/wire"
)

// slow is a file on a disk that hangs.
const slow = "/tmp/slow/a"

// hungCall is a request that hangs on a disk.
type hungCall struct {
	op     slowdisk.Op // the operation that hangs
	proc   uint32
	flags  uint32
	exists bool // the file is there before
	held   bool // it is held before
}

var hungCalls = []hungCall{
	{slowdisk.Lookup, wire.ProcAcquire, 0, true, false},
	{slowdisk.Open, wire.ProcAcquire, 0, true, false},
	{slowdisk.Create, wire.ProcAcquire, wire.Autocreate, false, false},
	{slowdisk.Lock, wire.ProcAcquire, 0, true, false},
	{slowdisk.Unlink, wire.ProcRelease, 0, false, true},
}

// hung is a daemon with one request under way that hangs.
type hung struct {
	d    *host.Daemon
	disk *slowdisk.Disk
	conn *wire.Conn // its answer is awaited
}

func newHung(t *testing.T, c hungCall) hung {
	t.Helper()
	h, d := start(t, host.Options{})
	disk := slowdisk.Mount(t, h, "/tmp/slow", slowdisk.Options{Locks: c.op == slowdisk.Lock})
	if c.exists {
		disk.Add("a")
	}
	conn := d.Client(noOne)
	if c.held {
		must(t, conn.Acquire("", slow, wire.Autocreate))
	}
	disk.Hang(c.op)
	must(t, conn.Send(wire.Request(c.proc, 2, wire.ResourceArgs("", slow, c.flags))))
	disk.AwaitHang(c.op)
	return hung{d: d, disk: disk, conn: conn}
}

// An owner that dies while its lock is being taken does not get it.
func TestW04OwnerDiesMeanwhile(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	disk := slowdisk.Mount(t, h, "/tmp/slow", slowdisk.Options{})
	disk.Add("a")
	p := h.Spawn(host.ProcessOptions{})
	libvirtd := d.Client(p.PID())
	disk.Hang(slowdisk.Open)
	must(t, libvirtd.Send(wire.Request(wire.ProcAcquire, 2, wire.ResourceArgs("", slow, 0))))
	disk.AwaitHang(slowdisk.Open)
	p.Kill()
	p.Gone()
	disk.Resume(slowdisk.Open)
	m, err := libvirtd.Recv()
	must(t, err)
	if m.Err() != nil {
		t.Logf("the owner had ended when the disk answered: %v", m.Err())
	}
	next := d.Client(noOne)
	eventually(t, "next owner gets the lock", func() bool { return next.Acquire("", slow, 0) == nil })
}

// A lock on a hung disk does not keep the other locks of a dead owner.
func TestW04DeadOwnersOtherLocks(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	disk := slowdisk.Mount(t, h, "/tmp/slow", slowdisk.Options{})
	before, after := host.Data+"/before", host.Data+"/after"
	p, vm := guest(t, h, d, host.ProcessOptions{}, before, wire.Autocreate)
	must(t, vm.Acquire("", slow, wire.Autocreate))
	must(t, vm.Acquire("", after, wire.Autocreate))
	disk.Hang(slowdisk.Unlink)
	p.Kill()
	vm.Close()
	disk.AwaitHang(slowdisk.Unlink)
	eventually(t, "the other locks are free", func() bool { return !h.Exists(before) && !h.Exists(after) })
	disk.Resume(slowdisk.Unlink)
	next := d.Client(noOne)
	eventually(t, "next owner gets the lock", func() bool { return next.Acquire("", slow, wire.Autocreate) == nil })
}
