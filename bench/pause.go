// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// lossAfter is how long a request may be without reply before another connection asks, too: the C daemon forgets
// requests that it has half read when it starts itself again. So its time is too long by so much at most.
const lossAfter = 5 * time.Millisecond

// pause makes the daemon start itself again and returns the longest time without any reply, in s. Requests are
// registrations, which connections new and old can make.
func (t *subject) pause() float64 {
	request := owner(t.guest.PID())
	first := t.client()
	cs := []*client{first}
	var over atomic.Bool
	wait := func() {}
	var longest int64
	err := onThread(-1, func() error {
		last := clock()
		for n := 0; !over.Load(); n++ {
			if n == 100 {
				longest = 0
				wait = t.s.beside(func() {
					defer over.Store(true)
					t.upgrade()
					time.Sleep(100 * time.Millisecond)
				})
			}
			if err := cs[0].send(request); err != nil {
				return err
			}
			c, err := t.reply(&cs, request)
			if err != nil {
				return err
			}
			now := clock()
			longest = max(longest, now-last)
			last = now
			if len(cs) > 1 {
				// Replies may still come on the others.
				cs = []*client{c}
			}
		}
		return nil
	})
	wait()
	t.s.must(err)
	return float64(longest) / 1e9
}

// reply waits for a reply on any of the connections, and adds one when it takes too long.
func (t *subject) reply(cs *[]*client, request []byte) (*client, error) {
	for begin := clock(); ; {
		fds := make([]unix.PollFd, len(*cs))
		for i, c := range *cs {
			fds[i] = unix.PollFd{Fd: int32(c.fd), Events: unix.POLLIN}
		}
		n, err := unix.Poll(fds, int(lossAfter.Milliseconds()))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		if n > 0 {
			for i, c := range *cs {
				if fds[i].Revents != 0 {
					return c, c.recv()
				}
			}
		}
		if clock()-begin > int64(patience) {
			return nil, fmt.Errorf("no reply for %s", patience)
		}
		if len(*cs) >= 20 { // below the length of the queue of connections
			continue
		}
		c, err := dial(t.sock)
		if err != nil {
			return nil, err
		}
		t.s.Cleanup(c.close)
		if err := c.send(request); err != nil {
			return nil, err
		}
		*cs = append(*cs, c)
	}
}
