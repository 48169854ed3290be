// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// idleBubble runs an idler under a clock of its own.
func idleBubble(t *testing.T, timeout time.Duration, f func(i *idler, busy *atomic.Bool, expired func() bool)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		var busy atomic.Bool
		i := newIdler(timeout, busy.Load)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			i.run(ctx)
		}()
		f(i, &busy, func() bool {
			synctest.Wait()
			return isClosed(i.expired)
		})
		cancel()
		<-done
	})
}

func TestIdlerExpires(t *testing.T) {
	t.Parallel()
	idleBubble(t, 10*time.Second, func(_ *idler, _ *atomic.Bool, expired func() bool) {
		time.Sleep(10*time.Second - time.Nanosecond)
		if expired() {
			t.Error("expired early")
		}
		time.Sleep(time.Nanosecond)
		if !expired() {
			t.Error("not expired in time")
		}
	})
}

func TestIdlerBusy(t *testing.T) {
	t.Parallel()
	idleBubble(t, 10*time.Second, func(i *idler, busy *atomic.Bool, expired func() bool) {
		time.Sleep(9 * time.Second)
		busy.Store(true)
		i.changed()
		time.Sleep(time.Hour)
		if expired() {
			t.Error("expired while busy")
		}
		busy.Store(false)
		i.changed()
		time.Sleep(9 * time.Second)
		i.changed() // a change that changes nothing: the time starts anew
		time.Sleep(9 * time.Second)
		if expired() {
			t.Error("expired though there was something going on")
		}
		time.Sleep(time.Second)
		if !expired() {
			t.Error("not expired in time")
		}
	})
}

// Somebody who comes at the last moment, before it is told, is seen.
func TestIdlerLastMoment(t *testing.T) {
	t.Parallel()
	idleBubble(t, 10*time.Second, func(i *idler, busy *atomic.Bool, expired func() bool) {
		busy.Store(true)
		time.Sleep(time.Minute)
		if expired() {
			t.Error("expired over a client that has just come")
		}
		busy.Store(false)
		i.changed()
		time.Sleep(10 * time.Second)
		if !expired() {
			t.Error("not expired in time")
		}
	})
}

func TestIdlerSetTimeout(t *testing.T) {
	t.Parallel()
	idleBubble(t, 0, func(i *idler, _ *atomic.Bool, expired func() bool) {
		time.Sleep(1000 * time.Hour)
		if expired() {
			t.Error("expired without a timeout")
		}
		i.setTimeout(5 * time.Second)
		time.Sleep(4 * time.Second)
		i.setTimeout(0)
		time.Sleep(1000 * time.Hour)
		if expired() {
			t.Error("expired after the timeout was taken back")
		}
		i.setTimeout(time.Second)
		time.Sleep(time.Second)
		if !expired() {
			t.Error("not expired in time")
		}
	})
}
