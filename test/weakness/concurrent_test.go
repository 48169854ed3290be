// SPDX-License-Identifier: LGPL-2.1-or-later

package weakness

import (
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// holders counts who has a file by the daemon's word.
type holders struct {
	mu                sync.Mutex
	exclusive, shared int
	granted           int
}

// enter notes a lock that was granted and tells what is wrong with that.
func (h *holders) enter(shared bool) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.granted++
	if shared {
		h.shared++
	} else {
		h.exclusive++
	}
	if h.exclusive > 1 || h.exclusive > 0 && h.shared > 0 {
		return fmt.Errorf("%d owners hold it exclusively and %d shared", h.exclusive, h.shared)
	}
	return nil
}

func (h *holders) leave(shared bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if shared {
		h.shared--
	} else {
		h.exclusive--
	}
}

// Many clients that ask for the same few files under different names, all at the same time.
func TestW05Concurrent(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	names := []string{"a", "b", "c"}
	h.Must(func() error {
		for _, n := range names {
			if err := os.WriteFile(path(n), []byte("disk"), 0o600); err != nil {
				return err
			}
			if err := os.Link(path(n), path("link-"+n)); err != nil {
				return err
			}
		}
		return nil
	})
	files := map[string]*holders{}
	for _, n := range names {
		files[n] = &holders{}
	}
	const clients, rounds = 8, 250
	var wg sync.WaitGroup
	for i := range clients {
		c := d.Client(noOne + i)
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(i), 1))
			for range rounds {
				n := names[rnd.IntN(len(names))]
				spelling := []string{path(n), path("link-" + n), host.Data + "//" + n, host.Data + "/./link-" + n}[rnd.IntN(4)]
				flags := uint32(rnd.IntN(4))
				shared := flags&wire.Shared != 0
				err := c.Acquire("", spelling, flags)
				if wire.IsLocked(err) {
					continue
				}
				if err != nil {
					t.Errorf("ACQUIRE: %v", err)
					return
				}
				if err := files[n].enter(shared); err != nil {
					t.Errorf("%s: %v", n, err)
					return
				}
				if rnd.IntN(2) == 0 {
					if err := c.Ping(); err != nil {
						t.Errorf("PING: %v", err)
						return
					}
				}
				files[n].leave(shared)
				if err := c.Release("", spelling); err != nil {
					t.Errorf("RELEASE: %v", err)
					return
				}
			}
		})
	}
	wg.Wait()
	for _, n := range names {
		if files[n].granted < clients {
			t.Errorf("%s was granted only %d times", n, files[n].granted)
		}
		if !h.Exists(path(n)) || !h.Free(path(n), true) {
			t.Errorf("%s is gone or still locked", n)
		}
	}
}
