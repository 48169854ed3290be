// SPDX-License-Identifier: LGPL-2.1-or-later

package systemd

import (
	"errors"
	"fmt"
	"strconv"
	"syscall"
	"testing"
	"time"

	"virtlockd/test/checker"
	"virtlockd/test/host"
	"virtlockd/test/survivor"
	"virtlockd/test/wire"
)

// noOne is the first of a row of process ids that no process has: the kernel gives none above 4194304.
const noOne = 0x70000000

// Kills at any instant, under load and under systemd, lose no lock and no answer, and leave no lock for nobody.
func TestKillStorm(t *testing.T) {
	t.Parallel()
	n := host.Number(t, "KILLS", 300)
	m := Boot(t, Options{})
	m.Systemctl("start", Service)
	c := newCrowd(m)
	var locked []string
	for path := range c.waiters {
		locked = append(locked, m.Path(path))
	}
	outside := checker.Start(t, locked...)
	clients := survivor.Start(32, noOne, func() (*wire.Conn, error) {
		for {
			path, program := socketPath("lock")
			conn, err := wire.Dial(m.Path(path), program)
			if !errors.Is(err, syscall.EAGAIN) { // the queue is full: libvirt's clients wait for it
				return conn, err
			}
			time.Sleep(time.Millisecond)
		}
	}, func(k int) string { return fmt.Sprint(Data, "/load", k) })
	begin := time.Now()
	if err := clients.Storm(n, m.MainPID, func(pid int) error {
		_, err := m.Run("kill", "-KILL", strconv.Itoa(pid))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	took := time.Since(begin)
	if err := clients.Stop(); err != nil {
		t.Fatal(err)
	}
	polls := outside.Quiet()
	t.Logf("%d kills in %v; %v; %d looks from outside", n, took.Round(time.Millisecond), clients, polls)
	for k := range 32 {
		if path := fmt.Sprint(Data, "/load", k); m.Exists(path) {
			t.Errorf("%s is held for nobody, or its lease was left", path)
		}
	}
	c.goesOn("the storm")
	c.end()
}
