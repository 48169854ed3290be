// SPDX-License-Identifier: LGPL-2.1-or-later

package rpc

import (
	"bytes"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// handOver makes the one client of a server one of another server, as a live upgrade does.
func handOver(t *testing.T, from, to *bench, c *Client) {
	t.Helper()
	if running := from.Freeze(time.Now().Add(patience)); len(running) > 0 {
		t.Fatalf("running: %v", running)
	}
	saved := c.Save()
	saved.Unread, saved.Unsent = bytes.Clone(saved.Unread), bytes.Clone(saved.Unsent)
	fd, err := unix.FcntlInt(uintptr(saved.FD), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	saved.FD = int32(fd)
	to.Freeze(time.Now())
	if err := to.Adopt(&saved, func(*Client) error { return nil }); err != nil {
		t.Fatal(err)
	}
	to.Thaw()
}

// A message that is cut by a hand-over is executed as if it had not been, wherever the cut is: between its bytes, in what is
// dropped of one that is too long, between the descriptors that come with it, before or behind it.
func TestHandOverOfHalfMessage(t *testing.T) {
	const limit = 4 << 10
	long := request(procEcho, 1, bytes.Repeat([]byte("long"), limit))
	withFDs := message(header{program: lockProgram, version: 1, proc: procEcho, kind: typeCallFDs, serial: 1}, append(u32(2), "args"...))
	type part struct {
		bytes []byte
		fds   int
	}
	for name, tt := range map[string]struct {
		before, after []part
		want          []byte
	}{
		"nothing":     {nil, []part{{request(procEcho, 1, u32(7)), 0}}, reply(procEcho, 1, u32(7))},
		"length word": {[]part{{request(procEcho, 1, u32(7))[:3], 0}}, []part{{request(procEcho, 1, u32(7))[3:], 0}}, reply(procEcho, 1, u32(7))},
		"arguments":   {[]part{{request(procEcho, 1, u32(7))[:30], 0}}, []part{{request(procEcho, 1, u32(7))[30:], 0}}, reply(procEcho, 1, u32(7))},
		"long":        {[]part{{long[:2*limit], 0}}, []part{{long[2*limit:], 0}}, reply(procEcho, 1, long[headerSize:limit])},
		"one descriptor of two": {
			[]part{{withFDs, 0}, {[]byte{0}, 1}}, []part{{[]byte{0}, 1}}, reply(procEcho, 1, []byte("args")),
		},
		"before the descriptors": {
			[]part{{withFDs, 0}}, []part{{[]byte{0}, 1}, {[]byte{0}, 1}}, reply(procEcho, 1, []byte("args")),
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			change := func(c *Config) { c.MaxMessage = limit }
			old, next := serve(t, change), serve(t, change)
			p, c := old.client()
			send := func(parts []part) {
				for _, x := range parts {
					if x.fds > 0 {
						p.rights(x.bytes, p.fd)
					} else {
						p.sendAside(x.bytes)
						p.senders.Wait()
					}
				}
			}
			send(tt.before)
			if len(tt.before) > 0 {
				eventually(t, "the first half is read", func() bool {
					n, err := unix.IoctlGetInt(c.fd, unix.TIOCINQ)
					return err == nil && n == 0 && c.state.Load()&stateActive == 0 && old.kept.Load() > 0
				})
			}
			handOver(t, old, next, c)
			send(tt.after)
			p.expect(tt.want)
			p.send(request(procEcho, 2, nil))
			p.expect(reply(procEcho, 2, nil))
			old.Thaw()
		})
	}
}
