// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"context"
	"sync/atomic"
	"time"
)

// idler ends the daemon when nobody has needed it for a time. It is told of each change and looks
// itself then, so it neither polls nor depends on the order in which it is told.
type idler struct {
	busy    func() bool
	timeout atomic.Int64 // nanoseconds, 0: never
	changes chan struct{}
	expired chan struct{} // gets a value when the time is up
}

// newIdler makes one that does nothing until Run. busy must not block.
func newIdler(timeout time.Duration, busy func() bool) *idler {
	i := &idler{busy: busy, changes: make(chan struct{}, 1), expired: make(chan struct{}, 1)}
	i.timeout.Store(int64(timeout))
	return i
}

// changed says that busy may answer otherwise now. It never blocks. Changes come with nearly every request, and
// waking run costs more than the request, so that is left out where no time is to be kept.
func (i *idler) changed() {
	if i.timeout.Load() > 0 {
		i.look()
	}
}

// look wakes run.
func (i *idler) look() {
	select {
	case i.changes <- struct{}{}:
	default: // the look that is due will see this change as well
	}
}

// setTimeout changes the time; 0 is never. The time starts anew.
func (i *idler) setTimeout(d time.Duration) {
	i.timeout.Store(int64(d))
	i.look()
}

// timeoutSeconds returns the time in force.
func (i *idler) timeoutSeconds() uint32 { return uint32(i.timeout.Load() / int64(time.Second)) }

// run watches until ctx ends. Whoever hears that the time is up looks himself whether somebody has
// come in that moment; if so, the time starts anew with the next change.
func (i *idler) run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	timer.Stop()
	i.changed()
	for {
		select {
		case <-ctx.Done():
			return
		case <-i.changes:
			if d := time.Duration(i.timeout.Load()); d > 0 && !i.busy() {
				timer.Reset(d)
			} else {
				timer.Stop()
			}
		case <-timer.C:
			// A client that has come in this very moment is served.
			if i.timeout.Load() > 0 && !i.busy() {
				select {
				case i.expired <- struct{}{}:
				default: // said already
				}
			}
		}
	}
}
