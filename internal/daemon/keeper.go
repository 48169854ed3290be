// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/keeper"
	"virtlockd/internal/systemd"
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

// meetKeeper has the keeper that started us keep what is to be kept.
func (d *daemon) meetKeeper() {
	l := d.safety.link
	d.safety.wanted = l != nil || d.options.wantsKeeper() // by way of the C daemon the option is lost
	if l == nil {
		if err := d.safety.why; err != nil {
			d.log.Error("there is no keeper", "error", err)
		}
		return
	}
	if l.PIDFD < 0 {
		d.loseKeeper(l)
		return
	}
	d.notify = l.Notifier()
	d.safety.store = d.notify
}

// tellKept tells why the keeper has started us, if a daemon before this one has ended. The log is as configured by then.
func (d *daemon) tellKept() {
	l := d.safety.link
	switch {
	case l == nil || l.Died == "":
	case d.found == nil: // it was the C daemon
		d.log.Error("the keeper has started the daemon again; the one before had left nothing with it, so its locks are lost while their owners may go on",
			"keeper", l.PID, "ended", l.Died)
	default:
		d.log.Warn("the keeper has started the daemon again", "keeper", l.PID, "ended", l.Died)
	}
}

// startKeeper starts one for a daemon that has none, and makes it the place where descriptors are stored.
func (d *daemon) startKeeper() error {
	c := keeperConfig(nil)
	c.Dir = d.startDir
	l, err := keeper.Adopt(c, adoptTime)
	if err != nil {
		return err
	}
	d.safety.mu.Lock()
	defer d.safety.mu.Unlock()
	d.safety.link, d.safety.store, d.safety.proved = l, l.Notifier(), false
	d.notify = d.safety.store
	return nil
}

// loseKeeper forgets a keeper that has ended.
func (d *daemon) loseKeeper(l *keeper.Link) {
	d.log.Error("the keeper has ended; until there is another one a crash of this daemon would lose all locks", "keeper", l.PID)
	d.safety.mu.Lock()
	d.safety.link, d.safety.store, d.safety.proved = nil, systemd.Notifier{}, false
	d.notify = systemd.Notifier{}
	d.safety.why = errKeeperEnded
	d.safety.mu.Unlock()
	l.Close()
}

// errKeeperEnded says what there is instead of a keeper.
var errKeeperEnded = errors.New("the keeper has ended, and there is no other one yet")

// keeperEnd is closed when a keeper has ended. It is the handler of its pidfd, which is called once.
type keeperEnd chan struct{}

func (e keeperEnd) Ready(uint32) { close(e) }

// watchKeeper returns what is closed when the keeper, if there is one, has ended, and what ends the watch.
func (d *daemon) watchKeeper(l *keeper.Link) (ended <-chan struct{}, unwatch func()) {
	if l == nil {
		return nil, func() {}
	}
	fd, end := l.PIDFD, make(keeperEnd)
	token, err := d.poller.Add(fd, unix.EPOLLIN|unix.EPOLLONESHOT, end)
	if err != nil {
		d.log.Error("the end of the keeper will not be noticed", "keeper", l.PID, "error", err)
		return nil, func() {}
	}
	return end, func() { _ = d.poller.Remove(token, fd) } // its end or ours is what counts
}
