// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/keeper"
)

// adoptTime bounds the start of a keeper by a daemon that has lost its own.
const adoptTime = 10 * time.Second

// keeperConfig says how a keeper starts the daemon: as this process was started.
func keeperConfig(waiting *reporter) keeper.Config {
	c := keeper.Config{Args: os.Args, Dir: "/", Report: -1}
	if dir, err := os.Getwd(); err == nil {
		c.Dir = dir
	}
	if waiting != nil {
		c.Report = waiting.fd
	}
	return c
}

// meetKeeper tells of the keeper that started us, and why it did.
func (d *daemon) meetKeeper() {
	l := d.safety.link
	if l == nil {
		if err := d.safety.why; err != nil {
			d.log.Error("there is no keeper", "error", err)
		}
		return
	}
	d.notify = l.Notifier()
	d.safety.store = d.notify
	if l.Died != "" {
		d.log.Warn("the keeper has started the daemon again", "keeper", l.PID, "ended", l.Died)
	}
}

// startKeeper starts one for a daemon that has none, and makes it the place where descriptors are stored.
func (d *daemon) startKeeper() error {
	c := keeperConfig(nil)
	c.Dir = d.startDir
	l, err := keeper.Adopt(c, adoptTime)
	if err != nil {
		return fmt.Errorf("start a keeper: %w", err)
	}
	d.safety.mu.Lock()
	d.safety.link, d.safety.store = l, l.Notifier()
	d.notify = l.Notifier()
	d.safety.mu.Unlock()
	return nil
}

// errKeeperEnded says what there is instead of a keeper.
var errKeeperEnded = errors.New("the keeper has ended, and no other one could be started")

// keeperEnd is closed when a keeper has ended. It is the handler of its pidfd, which is called once.
type keeperEnd chan struct{}

func (e keeperEnd) Ready(uint32) { close(e) }

// watchKeeper starts another keeper when the one that we have ends, until ctx does.
func (d *daemon) watchKeeper(ctx context.Context) {
	for l := d.safety.keeper(); l != nil; l = d.safety.keeper() {
		if err := d.awaitKeeper(ctx, l); ctx.Err() != nil {
			return
		} else if err != nil {
			d.log.Error("the end of the keeper will not be noticed", "keeper", l.PID, "error", err)
			return
		}
		d.log.Error("the keeper has ended; until there is another one a crash of this daemon would lose all locks", "keeper", l.PID)
		l.Close()
		if err := d.changeKeeper(); err != nil {
			d.log.Error("locks are lost if this daemon crashes", "error", err)
			d.safety.mu.Lock()
			d.safety.why = errors.Join(errKeeperEnded, err)
			d.safety.link = nil
			d.safety.mu.Unlock()
			return
		}
		d.log.Info("another keeper has everything", "keeper", d.safety.keeper().PID)
	}
}

// awaitKeeper returns when the keeper has ended, or ctx has.
func (d *daemon) awaitKeeper(ctx context.Context, l *keeper.Link) error {
	if l.PIDFD < 0 {
		return nil
	}
	end := make(keeperEnd)
	token, err := d.poller.Add(l.PIDFD, unix.EPOLLIN|unix.EPOLLONESHOT, end)
	if err != nil {
		return err
	}
	select {
	case <-ctx.Done():
	case <-end:
	}
	_ = d.poller.Remove(token, l.PIDFD) // its end or ours is what counts
	return nil
}

// changeKeeper gives the vault to a new keeper.
func (d *daemon) changeKeeper() error {
	if err := d.startKeeper(); err != nil {
		return err
	}
	d.safety.mu.Lock()
	v, store := d.safety.vault, d.safety.store
	d.safety.mu.Unlock()
	if v == nil {
		return nil
	}
	return entrust(store, v)
}
