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
