// SPDX-License-Identifier: LGPL-2.1-or-later

package differential

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync/atomic"
	"testing"

	"pgregory.net/rapid"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// Random conversations of several clients. Each works in a directory of its own, so that all of them can use one
// pair of daemons. What they leave out are the wanted differences: no file has two names, none is written to or
// replaced while it is held, no lockspace's directory is impossible to make, no name has dots in it, and no owner
// is a process.
func TestRandom(t *testing.T) {
	t.Parallel()
	for _, part := range []string{"1", "2"} {
		t.Run(part, func(t *testing.T) {
			t.Parallel()
			both := newPair(t, host.Options{})
			for _, w := range []*world{both.c, both.ours} {
				w.procs["outsider"] = w.h.Spawn(host.ProcessOptions{})
			}
			var n atomic.Int64
			rapid.Check(t, func(rt *rapid.T) {
				p := &pair{t: rt, c: both.c, ours: both.ours}
				conversation{p, fmt.Sprintf("%s/%d", data, n.Add(1))}.run(rt)
			})
		})
	}
}

type conversation struct {
	*pair
	dir string
}

func (c conversation) run(rt *rapid.T) {
	c.mkdir(c.dir)
	for _, d := range []string{"/files", "/dir"} {
		c.mkdir(c.dir + d)
	}
	clients := []string{"A", "B", "C", "D"}
	c.connect(clients...)
	for i, client := range clients[:3] { // D starts unregistered
		c.call(client, register(ownerA+i%2))
	}
	lockspaces := []string{"", c.dir + "/one", c.dir + "/two", c.dir + "/deep/three"}
	c.call("A", newLockspace(lockspaces[1]))

	name := func(lockspace string) string {
		n := rapid.SampledFrom([]string{"a", "b", "c", "dir", "no/x"}).Draw(rt, "name")
		if lockspace == "" {
			return c.dir + "/files/" + n
		}
		return n
	}
	draw := func() request {
		r := request{serial: rapid.SampledFrom([]uint32{0, 1, 1<<32 - 1}).Draw(rt, "serial")}
		r.lockspace = rapid.SampledFrom(lockspaces).Draw(rt, "lockspace")
		r.flags = rapid.SampledFrom([]uint32{0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 1 << 31}).Draw(rt, "flags")
		switch kind := rapid.IntRange(0, 19).Draw(rt, "call"); {
		case kind < 8:
			r.proc = wire.ProcAcquire
			r.flags = rapid.SampledFrom([]uint32{0, 1, 1, 2, 2, 3, 3, 4}).Draw(rt, "acquire")
		case kind < 13:
			r.proc = wire.ProcRelease
		case kind < 15:
			r.proc = wire.ProcCreateResource
		case kind < 16:
			r.proc = wire.ProcDeleteResource
		case kind < 17:
			r.proc = wire.ProcNew
		case kind < 18:
			r.proc = wire.ProcCreateLockspace
		default:
			r.proc = wire.ProcRegister
			r.owner = wire.VM(rapid.SampledFrom([]int{ownerA, ownerB, ownerC, 0, -1, -1 << 31}).Draw(rt, "owner"))
			r.owner.ID = rapid.SampledFrom([]uint32{1, 1, 1, 2, 0}).Draw(rt, "id")
			r.owner.Flags = rapid.SampledFrom([]uint32{0, 0, 0, 1}).Draw(rt, "owner flags")
		}
		r.name = name(r.lockspace)
		return r
	}
	client := rapid.SampledFrom(clients)
	for range rapid.IntRange(1, 60).Draw(rt, "steps") {
		who := client.Draw(rt, "client")
		switch rapid.IntRange(0, 29).Draw(rt, "step") {
		default:
			c.call(who, draw())
		case 20, 21: // several at once
			var b []byte
			n := rapid.IntRange(2, 8).Draw(rt, "at once")
			what := fmt.Sprintf("%d at once:", n)
			for range n {
				r := draw()
				b = append(b, r.frame()...)
				what += "\n    " + r.String()
			}
			c.send(who, what, b, n)
		case 22: // in pieces
			f := draw().frame()
			at := rapid.IntRange(1, len(f)-1).Draw(rt, "cut")
			c.exchange(who, fmt.Sprintf("in two pieces, %x", f), func(*world) [][]byte { return [][]byte{f[:at], f[at:]} }, 1)
		case 23: // cut off
			r := draw()
			args := r.args()
			args = args[:rapid.IntRange(0, len(args)-1).Draw(rt, "cut off")]
			c.send(who, "cut off, "+r.String(), wire.Request(r.proc, 3, args), 1)
		case 24: // something else
			h := wire.Header{
				Program: rapid.SampledFrom([]uint32{wire.LockProgram, wire.AdminProgram, 1}).Draw(rt, "program"),
				Version: rapid.SampledFrom([]uint32{1, 1, 2}).Draw(rt, "version"),
				Proc:    rapid.SampledFrom([]uint32{0, 1, 9, 1 << 31}).Draw(rt, "procedure"),
				Type:    rapid.SampledFrom([]uint32{0, 1, 2, 3, 5}).Draw(rt, "type"),
				Status:  rapid.SampledFrom([]uint32{0, 0, 1}).Draw(rt, "status"),
			}
			if h.Type == wire.TypeCall {
				c.send(who, fmt.Sprintf("%+v", h), wire.Frame(h, nil), 1)
			} else {
				c.fence(who, fmt.Sprintf("%+v", h), wire.Frame(h, nil))
			}
		case 25: // a bad end, or a good one, and back again
			if rapid.Bool().Draw(rt, "bad end") {
				c.send(who, "rubbish", make([]byte, 40), 1)
			}
			c.connect(who)
		case 26:
			c.call(who, request{proc: wire.ProcRestrict, flags: rapid.SampledFrom([]uint32{0, 0, 1}).Draw(rt, "flags")})
		case 27, 28:
			c.disturb(rt, lockspaces)
		case 29:
			c.sameBelow(c.dir)
		}
	}
	c.sameBelow(c.dir)
	c.both("outsider unlocks", func(w *world) error {
		w.procs["outsider"].Unlock()
		return nil
	})
}

// disturb does something to a file that nobody holds.
func (c conversation) disturb(rt *rapid.T, lockspaces []string) {
	dir := rapid.SampledFrom(lockspaces).Draw(rt, "where")
	if dir == "" {
		dir = c.dir + "/files"
	}
	path := dir + "/" + rapid.SampledFrom([]string{"a", "b", "c", "dir"}).Draw(rt, "file")
	if locks, err := c.c.h.LocksOf(c.c.d, path); err == nil && len(locks) > 0 {
		return
	}
	missing := func(err error) error {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrExist) {
			return nil
		}
		return err
	}
	switch what := rapid.SampledFrom([]string{"touch", "mkdir", "remove", "chmod", "lock", "lock elsewhere", "lock shared"}).Draw(rt, "what"); what {
	case "touch":
		c.fs("touch "+path, func() error {
			f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
			if err == nil {
				err = f.Close()
			}
			return missing(err)
		})
	case "mkdir":
		c.fs("mkdir "+path, func() error { return missing(os.Mkdir(path, 0o755)) })
	case "remove":
		c.fs("remove "+path, func() error { return missing(os.Remove(path)) })
	case "chmod":
		c.fs("chmod "+path, func() error { return missing(os.Chmod(path, 0o751)) })
	default:
		if fi, err := os.Lstat(c.c.h.Path(path)); err != nil || !fi.Mode().IsRegular() {
			return
		}
		kind, at := "W", int64(0)
		if what == "lock elsewhere" {
			at = 1
		}
		if what == "lock shared" {
			kind = "R"
		}
		c.both(what+" "+path, func(w *world) error {
			w.procs["outsider"].Lock(path, kind, at, 1)
			return nil
		})
	}
}
