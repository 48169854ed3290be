// SPDX-License-Identifier: LGPL-2.1-or-later

package admin

import (
	"bytes"
	"errors"
	"testing"

	"pgregory.net/rapid"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// What virt-admin would stop, or never sends, gets the same bytes as the answer from both daemons, whatever was sent
// before. Left out is what would end the daemon and what differs from run to run: the order of servers, times, and the
// number of priority workers, which the C daemon shows before its threads have followed.
func TestRaw(t *testing.T) {
	t.Parallel()
	sides := both(t, host.Options{Config: "max_clients = 20\nadmin_max_clients = 7\n"})
	var conns [2]*wire.Conn
	for i, s := range sides {
		conns[i] = s.d.Dial("admin")
	}
	// exchange sends the same call to both and reports whether the connections are still open.
	exchange := func(r *rapid.T, proc uint32, args []byte) bool {
		var got [2]wire.Message
		var closed [2]bool
		for i, c := range conns {
			m, err := c.Call(proc, args)
			closed[i] = errors.Is(err, wire.ErrClosed)
			if err != nil && !closed[i] {
				r.Fatalf("%s: procedure %d, arguments %x: %v", sides[i].name, proc, args, err)
			}
			got[i] = m
		}
		if !bytes.Equal(got[0].Raw, got[1].Raw) || closed[0] != closed[1] {
			r.Fatalf("procedure %d, arguments %x:\n   C: %s (closed: %t)\nours: %s (closed: %t)", proc, args, got[0], closed[0], got[1], closed[1])
		}
		return !closed[0]
	}
	rapid.Check(t, func(r *rapid.T) {
		// Back to the start: what fails can be shortened then.
		absent := wire.Payload(nil).Uint32(0).Uint32(0)
		exchange(r, 16, absent)
		exchange(r, 17, absent)
		for _, name := range []string{"admin", "virtlockd"} {
			exchange(r, 13, wire.Payload(nil).String(name).Uint32(2).
				String("nclients_max").Uint32(2).Uint32(20).String("nclients_unauth_max").Uint32(2).Uint32(20).Uint32(0))
		}
		for range rapid.IntRange(1, 20).Draw(r, "calls") {
			proc, args := drawCall(r)
			if exchange(r, proc, args) {
				continue
			}
			for i, s := range sides {
				conns[i].Close()
				// Both daemons forget the connection before the next call.
				conns[i] = s.d.Dial("admin")
				if !host.Eventually(func() bool {
					list, err := conns[i].AdminClients("admin")
					return err == nil && len(list) == 1
				}) {
					r.Fatalf("%s: the old connection stays", s.name)
				}
			}
		}
	})
}

// drawCall makes a call that is right in most of its parts.
func drawCall(r *rapid.T) (proc uint32, args []byte) {
	p := wire.Payload(nil)
	server := func() {
		p = p.String(rapid.SampledFrom([]string{"virtlockd", "admin", "virtlockd", "admin", "nosuch", "", "admin\x00x", "\xff%s"}).Draw(r, "server"))
	}
	flags := func() { p = p.Uint32(rapid.SampledFrom([]uint32{0, 0, 0, 0, 1, 2, 0x80000000}).Draw(r, "flags")) }
	// Of the clients none is named: their time stamps differ.
	id := func() {
		p = p.Uint64(rapid.SampledFrom([]uint64{0, 1 << 40, 1<<64 - 1}).Draw(r, "id"))
	}
	text := func(of []string) {
		if rapid.Bool().Draw(r, "absent") {
			p = p.Uint32(0)
			return
		}
		p = p.Uint32(rapid.SampledFrom([]uint32{1, 1, 1, 7}).Draw(r, "present")).String(rapid.SampledFrom(of).Draw(r, "text"))
	}
	params := func(names []string) {
		n := rapid.SampledFrom([]int{0, 1, 1, 2, 2, 3, 32, 33}).Draw(r, "parameters")
		p = p.Uint32(uint32(n))
		for range n {
			p = p.String(rapid.SampledFrom(names).Draw(r, "name"))
			kind := rapid.SampledFrom([]uint32{2, 2, 2, 2, 2, 2, 1, 3, 4, 5, 6, 7, 0, 8}).Draw(r, "kind")
			p = p.Uint32(kind)
			switch kind {
			case 3, 4, 5:
				p = p.Uint64(1)
			case 7:
				p = p.String("x")
			default:
				p = p.Uint32(rapid.SampledFrom([]uint32{0, 1, 2, 1<<32 - 1}).Draw(r, "value"))
			}
		}
	}
	proc = rapid.SampledFrom([]uint32{0, 1, 2, 3, 5, 6, 7, 7, 7, 8, 9, 10, 11, 12, 13, 13, 13, 14, 15, 16, 17, 18, 19, 21, 1 << 31}).Draw(r, "procedure")
	switch proc {
	case 5, 6, 12, 18:
		server()
		flags()
	case 7:
		server()
		params([]string{"minWorkers", "maxWorkers", "nWorkers", "bogus"})
		flags()
	case 8:
		// The admin server's list has the time of our own connection.
		p = p.String(rapid.SampledFrom([]string{"virtlockd", "nosuch"}).Draw(r, "server")).Uint32(rapid.SampledFrom([]uint32{0, 1, 9}).Draw(r, "results"))
		flags()
	case 9:
		server()
		id()
		flags()
	case 10, 11:
		server()
		id()
		p = p.Uint64(1).Uint32(2)
		flags()
	case 13:
		server()
		params([]string{"nclients_max", "nclients_max", "nclients_unauth_max", "nclients", "bogus"})
		flags()
	case 1, 14, 15:
		flags()
	case 16:
		text([]string{"4:stderr", "", "5:stderr", "stderr", "4:file:/nodir/x", "4:file:/run/raw", "4:bogus", "4:syslog", ":", "4:"})
		flags()
	case 17:
		text([]string{"4:a", "", "5:a", "a", "4:a 4:b", "4:", ":a", " ", "+4:a", "4:+a", "4:*a*", "4:a:b"})
		flags()
	case 19:
		p = p.Uint32(rapid.SampledFrom([]uint32{0, 1000000}).Draw(r, "seconds"))
		flags()
	}
	args = p
	switch rapid.IntRange(0, 9).Draw(r, "damage") {
	case 0:
		args = args[:rapid.IntRange(0, len(args)).Draw(r, "length")]
	case 1:
		args = append(args, 0, 0, 0, 1)
	}
	return proc, args
}
