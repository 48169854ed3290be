// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"fmt"
	"time"

	"virtlockd/internal/buildinfo"
	"virtlockd/internal/events"
	"virtlockd/internal/inspectproto"
	"virtlockd/internal/rpc"
	"virtlockd/internal/verify"
	"virtlockd/internal/watch"
)

// servers returns what administrators see, in the order in which they see it.
func (d *daemon) servers() []*rpc.Server { return []*rpc.Server{d.admin, d.lock} }

// inspection returns the programs by which virtlockctl looks at us.
func (d *daemon) inspection() []rpc.Program {
	serving := time.Now()
	d.checker = verify.New(d.table)
	d.watcher = watch.New(watch.Config{
		Table:   d.table,
		Checker: d.checker,
		Events:  d.events,
		Logger:  d.category("locking.lock_daemon"),
		Action:  func() string { return d.limits.Load().LockLostAction },
	})
	return inspectproto.Programs(inspectproto.Config{
		Table:   d.table,
		Files:   d.files,
		Events:  d.events,
		Checker: d.checker,
		Watcher: d.watcher,
		Safe:    d.safe,
		Servers: d.servers,
		Life: func() inspectproto.Life {
			return inspectproto.Life{Started: time.Unix(0, d.startTime), Serving: serving, Upgrades: d.upgrades, Recoveries: d.recoveries}
		},
		Dropped: d.logs.Dropped,
		Logger:  d.category("admin"),
	})
}

// reportUpgrade tells those who look at us that this binary has taken over from another one.
func (d *daemon) reportUpgrade(locks, clients int) {
	d.events.Add(events.Event{
		Kind: events.Upgraded,
		Text: fmt.Sprintf("version %s has taken over %d locks and %d clients", buildinfo.Version, locks, clients),
	})
}
