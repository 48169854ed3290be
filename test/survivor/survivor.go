// SPDX-License-Identifier: LGPL-2.1-or-later

// Package survivor is clients of a lock daemon that acquire and release all the time while it is killed again and again, and know what
// has to be true.
package survivor

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// Clients are some that run until Stop.
type Clients struct {
	Requests   atomic.Int64
	Unanswered atomic.Int64 // by a closed connection
	Unawares   atomic.Int64 // of those, acquisitions that had taken effect

	dial func() (*wire.Conn, error)
	stop context.CancelFunc
	all  sync.WaitGroup

	mu   sync.Mutex
	errs []error
}

// Start starts n clients. Each has a lease file of its own, for an owner of its own whose process id is first or above.
func Start(n, first int, dial func() (*wire.Conn, error), path func(k int) string) *Clients {
	ctx, stop := context.WithCancel(context.Background())
	c := &Clients{dial: dial, stop: stop}
	for k := range n {
		one := &client{Clients: c, owner: first + k, path: path(k)}
		c.all.Go(func() {
			defer one.close()
			for i := 0; ctx.Err() == nil; i++ {
				if err := one.round(); err != nil {
					c.mu.Lock()
					c.errs = append(c.errs, fmt.Errorf("client %d, round %d: %w", k, i, err))
					c.mu.Unlock()
					return
				}
			}
		})
	}
	return c
}

// Err returns what was not as it must be, up to now.
func (c *Clients) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return errors.Join(c.errs...)
}

// Storm kills the daemon n times, at any instant: mostly while it serves, sometimes in the midst of its start and recovery. pid returns
// the daemon's process, 0 if there is none just now.
func (c *Clients) Storm(n int, pid func() int, kill func(pid int) error) error {
	before := 0
	for range n {
		now := 0
		if !host.Eventually(func() bool { now = pid(); return now > 0 && now != before }) {
			return fmt.Errorf("there is no daemon after process %d", before)
		}
		before = now
		if rand.IntN(4) > 0 {
			answered := c.Requests.Load()
			if !host.Eventually(func() bool { return c.Requests.Load() > answered+32 }) {
				return fmt.Errorf("process %d does not serve", now)
			}
		}
		time.Sleep(time.Duration(rand.IntN(20_000)) * time.Microsecond)
		if err := kill(now); err != nil {
			return err
		}
		if err := c.Err(); err != nil {
			return err
		}
	}
	return nil
}

// Stop lets all clients come to their end, with nothing held, and returns Err.
func (c *Clients) Stop() error {
	c.stop()
	c.all.Wait()
	return c.Err()
}

func (c *Clients) String() string {
	return fmt.Sprintf("%d requests, %d of them answered by a closed connection (%d had their lock)", c.Requests.Load(), c.Unanswered.Load(), c.Unawares.Load())
}

// client is one. Its connections may be closed by a crash at any time.
type client struct {
	*Clients
	owner int
	path  string
	conn  *wire.Conn
}

func (c *client) close() {
	if c.conn != nil {
		c.conn.Close()
		c.conn = nil
	}
}

func (c *client) connect() error {
	if c.conn != nil {
		return nil
	}
	conn, err := c.dial()
	if err != nil {
		return err
	}
	if err := conn.Register(wire.VM(c.owner)); err != nil {
		conn.Close()
		return err
	}
	c.conn = conn
	return nil
}

// lost tells whether the connection was closed; anything else is an answer.
func lost(err error) bool {
	return errors.Is(err, wire.ErrClosed) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET)
}

// ask sends one request, and again on a new connection until there is an answer. certain tells that the first one was answered.
func (c *client) ask(acquire bool) (certain bool, err error) {
	for certain = true; ; {
		if err := c.connect(); lost(err) {
			continue
		} else if err != nil {
			return certain, err
		}
		c.Requests.Add(1)
		if acquire {
			err = c.conn.Acquire("", c.path, wire.Autocreate)
		} else {
			err = c.conn.Release("", c.path)
		}
		if !lost(err) {
			return certain, err
		}
		c.Unanswered.Add(1)
		certain = false
		c.close()
	}
}

// round acquires and releases. What was confirmed has to be true; of what was not answered either is possible.
func (c *client) round() error {
	certain, err := c.ask(true)
	if wire.IsLocked(err) && !certain {
		c.Unawares.Add(1) // the reply was on its way
		err = nil
	}
	if err != nil {
		return fmt.Errorf("ACQUIRE of what is free (answered at once: %v): %w", certain, err)
	}
	certain, err = c.ask(false)
	if err != nil && (certain || !strings.Contains(err.Error(), "is not locked")) {
		return fmt.Errorf("RELEASE of what is held (answered at once: %v): %w", certain, err)
	}
	return nil
}
