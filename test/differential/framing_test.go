// SPDX-License-Identifier: LGPL-2.1-or-later

package differential

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// moment is how long something is watched that must not happen.
const moment = 300 * time.Millisecond

// containsOK tells whether a trace line ends in a reply without error.
func containsOK(line string) bool { return strings.Contains(line, " status 0: ") }

// fence sends a PING and compares its answer, and whatever comes before it.
func (p *pair) fence(client, what string, b []byte) bool {
	p.t.Helper()
	return p.send(client, what+", PING", append(b[:len(b):len(b)], wire.Ping()...), 1)
}

// Headers with each field out of order.
func TestHeaders(t *testing.T) {
	t.Parallel()
	p := newPair(t, host.Options{})
	p.connect("A")
	args := wire.RegisterArgs(wire.VM(ownerA))
	call := wire.Header{Program: wire.LockProgram, Version: wire.Version, Proc: wire.ProcRegister}
	odd := []uint32{0, 1, 2, 3, 7, 1 << 16, 1<<31 - 1, 1 << 31, 1<<32 - 1}
	for _, v := range odd {
		for name, h := range map[string]wire.Header{
			"program":   {Program: v, Version: 1, Proc: 1},
			"version":   {Program: wire.LockProgram, Version: v, Proc: 1},
			"status":    {Program: wire.LockProgram, Version: 1, Proc: 1, Status: v},
			"serial":    {Program: wire.LockProgram, Version: 1, Proc: 1, Serial: v},
			"procedure": {Program: wire.LockProgram, Version: 1, Proc: v | 0x10},
			"keepalive": {Program: wire.KeepaliveProgram, Version: v, Proc: 1},
			"admin":     {Program: wire.AdminProgram, Version: 1, Proc: v},
			"qemu":      {Program: 0x20008086, Version: v, Proc: 1},
		} {
			p.send("A", fmt.Sprintf("%s %#x", name, v), wire.Frame(h, args), 1)
		}
	}
	p.send("A", "procedure 0", wire.Frame(wire.Header{Program: wire.LockProgram, Version: 1}, args), 1)
	p.send("A", "procedure 9", wire.Frame(wire.Header{Program: wire.LockProgram, Version: 1, Proc: 9}, nil), 1)
	for _, typ := range odd {
		if typ == wire.TypeCall {
			continue
		}
		for _, h := range []wire.Header{call, {Program: wire.AdminProgram, Version: 1, Proc: 1}, {Program: 1, Version: 1, Proc: 1}} {
			h.Type = typ
			if typ == wire.TypeCallWithFDs {
				continue
			}
			p.fence("A", fmt.Sprintf("program %#x type %#x", h.Program, typ), wire.Frame(h, args))
			h.Status = 1
			p.fence("A", fmt.Sprintf("program %#x type %#x status 1", h.Program, typ), wire.Frame(h, args))
		}
	}
	for _, proc := range odd {
		for _, typ := range odd {
			h := wire.Header{Program: wire.KeepaliveProgram, Version: 1, Proc: proc, Type: typ, Serial: 5}
			if typ == wire.TypeCallWithFDs {
				continue
			}
			if proc == 1 && typ == wire.TypeMessage || typ == wire.TypeCall {
				p.send("A", fmt.Sprintf("keepalive procedure %#x type %#x", proc, typ), wire.Frame(h, args[:8]), 1)
				continue
			}
			p.fence("A", fmt.Sprintf("keepalive procedure %#x type %#x", proc, typ), wire.Frame(h, nil))
		}
	}
	p.calls("A", register(ownerA), acquire("", data+"/a", 2))
	p.same()
}

// Length words with too little or too much behind them.
func TestLengths(t *testing.T) {
	t.Parallel()
	p := newPair(t, host.Options{})
	call := wire.Header{Program: wire.LockProgram, Version: wire.Version, Proc: wire.ProcRegister}
	args := wire.RegisterArgs(wire.VM(ownerA))
	for n := range uint32(28) {
		p.connect("A")
		if p.send("A", fmt.Sprintf("length %d", n), wire.FrameLen(n, call, args), 1) {
			p.fail("length %d leaves the connection open", n)
		}
	}
	for _, n := range []uint32{32<<20 + 5, 32<<20 + 100, 1<<31 - 1, 1 << 31, 1<<32 - 1} {
		p.connect("A")
		if p.send("A", fmt.Sprintf("length %d", n), wire.FrameLen(n, call, args), 1) {
			p.fail("length %d leaves the connection open", n)
		}
	}
	// The longest frame that is read at all.
	p.connect("A")
	const most = 32<<20 + 4
	long := wire.FrameLen(most, call, append(args, make([]byte, most-wire.HeaderLen-len(args))...))
	p.fence("A", "longest frame", long)
	p.send("A", "", nil, 1)
	p.calls("A", acquire("", data+"/a", 2))
	// Garbage.
	p.connect("A")
	p.send("A", "text", []byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"), 1)
	p.connect("A")
	p.calls("A", register(ownerA), release("", data+"/a"))
	p.same()
}

// A conversation cut into writes of every size.
func TestSplitWrites(t *testing.T) {
	t.Parallel()
	p := newPair(t, host.Options{})
	talk := func() []byte {
		var b []byte
		for i, r := range []request{register(ownerA), acquire("", data+"/a", 2), acquire("", data+"/a", 2), release("", data+"/a"), release("", data+"/a")} {
			r.serial = uint32(i)
			b = append(b, r.frame()...)
			b = append(b, wire.Ping()...)
		}
		return b
	}()
	for _, size := range []int{1, 2, 3, 4, 5, 27, 28, 29, 60, 64, 100, 255, len(talk)} {
		p.connect("A")
		p.exchange("A", fmt.Sprintf("in writes of %d bytes", size), func(*world) [][]byte {
			var writes [][]byte
			for rest := talk; len(rest) > 0; {
				n := min(size, len(rest))
				writes = append(writes, rest[:n])
				rest = rest[n:]
			}
			return writes
		}, 10)
		p.same()
	}
}

// Many requests in one write are answered in order.
func TestPipeline(t *testing.T) {
	t.Parallel()
	p := newPair(t, host.Options{})
	p.connect("A", "B")
	p.calls("A", register(ownerA), newLockspace(data+"/ls"))
	p.calls("B", register(ownerB))
	var b []byte
	n := 0
	add := func(f []byte) {
		b = append(b, f...)
		n++
	}
	for i := range 50 {
		name := fmt.Sprint(i % 7)
		for _, r := range []request{acquire(data+"/ls", name, uint32(i)%4|2), create(data+"/ls", name), release(data+"/ls", name), acquire("/nowhere", "x", 0), acquire(data+"/ls", name, 4)} {
			r.serial = uint32(n)
			add(r.frame())
		}
		add(wire.Ping())
		add(wire.Frame(wire.Header{Program: 1, Serial: uint32(n)}, nil))
	}
	p.send("A", fmt.Sprintf("%d requests", n), b, n)
	p.same()
	// And then the end of our side: all of them are answered.
	p.both("A ends its side", func(w *world) error { return w.conns["A"].CloseWrite() })
	p.send("A", "nothing", nil, 1)
	p.connect("C")
	p.exchange("C", "one request and the end", func(*world) [][]byte { return [][]byte{register(ownerC).frame()} }, 0)
	p.both("C ends its side", func(w *world) error { return w.conns["C"].CloseWrite() })
	p.send("C", "nothing", nil, 2)
	p.calls("B", acquire(data+"/ls", "1", 2))
	p.same()
}

// Requests that come with descriptors, on a kernel that can't refuse them: since Linux 6.16 it does (D-descriptors).
func TestDescriptors(t *testing.T) {
	t.Parallel()
	p := newPair(t, host.Options{})
	frame := func(count uint32, args []byte) []byte {
		h := wire.Header{Program: wire.LockProgram, Version: wire.Version, Proc: wire.ProcRegister, Type: wire.TypeCallWithFDs}
		return wire.Frame(h, append(wire.Payload(nil).Uint32(count), args...))
	}
	args := wire.RegisterArgs(wire.VM(ownerA))
	// None are a call like any other.
	p.connect("A")
	p.send("A", "no descriptors", frame(0, args), 1)
	p.calls("A", acquire("", data+"/a", 2))
	p.send("A", "no descriptors, no arguments", frame(0, nil), 1)
	p.send("A", "no count", wire.Frame(wire.Header{Program: wire.LockProgram, Version: 1, Proc: 1, Type: 4}, nil), 1)
	// Each in a message of one byte.
	for _, n := range []int{1, 2, 32} {
		p.connect("A")
		p.allowDescriptors("A")
		p.both(fmt.Sprintf("%d descriptors", n), func(w *world) error {
			c := w.conns["A"]
			if err := c.Send(frame(uint32(n), args)); err != nil {
				return err
			}
			for range n {
				if err := sendFD(c); err != nil {
					return err
				}
			}
			return nil
		})
		p.send("A", "and then", nil, 1)
		p.calls("A", release("", data+"/a"), acquire("", data+"/a", 2))
	}
	for _, n := range []uint32{33, 1 << 16, 1 << 31, 1<<32 - 1} {
		p.connect("A")
		p.send("A", fmt.Sprintf("%d descriptors", n), frame(n, args), 1)
	}
	// None comes: the next bytes are not one.
	p.connect("A")
	p.send("A", "one descriptor that does not come", append(frame(1, args), register(ownerA).frame()...), 1)
	// One where none belongs.
	p.connect("A")
	p.allowDescriptors("A")
	p.both("a descriptor for nothing", func(w *world) error {
		return sendWith(w.conns["A"], register(ownerA).frame())
	})
	p.send("A", "and then", nil, 1)
	p.calls("A", release("", data+"/a"))
	p.same()
}

// allowDescriptors makes of a new connection one that descriptors can be sent on.
func (p *pair) allowDescriptors(client string) {
	p.t.Helper()
	p.both("allow descriptors", func(w *world) error {
		if err := w.conns[client].Ping(); err != nil { // not before it is accepted
			return err
		}
		w.d.AllowDescriptors()
		return nil
	})
}

func sendFD(c *wire.Conn) error { return sendWith(c, []byte{0}) }

// sendWith sends bytes with a descriptor.
func sendWith(c *wire.Conn, b []byte) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()
	var sent error
	err = raw.Write(func(fd uintptr) bool {
		sent = unix.Sendmsg(int(fd), b, unix.UnixRights(int(null.Fd())), nil, unix.MSG_NOSIGNAL)
		return sent != unix.EAGAIN
	})
	if err != nil {
		return err
	}
	return sent
}

// At the limit clients wait, in order, and are served as soon as there is room.
func TestMaxClients(t *testing.T) {
	t.Parallel()
	p := newPair(t, host.Options{Config: "max_clients = 2\n"})
	p.connect("A", "B")
	p.calls("A", register(ownerA))
	p.calls("B", register(ownerB))
	p.connect("C", "D", "E")
	for _, client := range []string{"C", "D", "E"} {
		p.send(client, "REGISTER while it waits", register(ownerC).frame(), 0)
	}
	p.silent("C", "D", "E")
	p.calls("A", acquire("", data+"/a", 2))
	p.close("A")
	p.send("C", "its turn", nil, 1)
	p.silent("D", "E")
	p.calls("C", acquire("", data+"/a", 2))
	p.close("D") // gives up
	p.close("B")
	p.send("E", "its turn", nil, 1)
	p.calls("E", acquire("", data+"/b", 2))
	p.same()
}

// silent checks that nothing comes.
func (p *pair) silent(clients ...string) {
	p.t.Helper()
	p.both("silence", func(w *world) error {
		for _, client := range clients {
			if m, err := w.conns[client].RecvWithin(moment / 3); err == nil || !os.IsTimeout(err) {
				return fmt.Errorf("%s got %s, %v", client, m, err)
			}
		}
		return nil
	})
}

// Both end by these signals in the same way, as far as it is not better that they don't.
func TestStop(t *testing.T) {
	t.Parallel()
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGQUIT} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			p := newPair(t, host.Options{})
			p.connect("A", "B")
			p.calls("A", register(ownerA), newLockspace(data+"/ls"), acquire("", data+"/a", 2), acquire(data+"/ls", "b", 3), create("", data+"/c"), acquire("", data+"/c", 0))
			p.calls("B", register(ownerB), acquire(data+"/ls", "b", 3))
			for _, w := range []*world{p.c, p.ours} {
				w.d.Signal(sig)
				if got := w.d.Wait(); got != 0 {
					t.Errorf("%s: exit status %d", w.name, got)
				}
			}
			p.send("B", "nothing", nil, 1)
			// The C daemon also makes a token there, which is for libvirt's other daemons.
			for _, w := range []*world{p.c, p.ours} {
				w.h.Must(func() error { return os.RemoveAll("/run/libvirt/common") })
			}
			dirs := []string{data, "/run"}
			c, ours := p.c.state(dirs), p.ours.state(dirs)
			if strings.Join(c, "\n") != strings.Join(ours, "\n") {
				t.Errorf("left behind\n   C: %s\nours: %s", strings.Join(c, "\n      "), strings.Join(ours, "\n      "))
			}
		})
	}
}
