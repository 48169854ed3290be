// SPDX-License-Identifier: LGPL-2.1-or-later

package systemd

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"syscall"
	"testing"
	"time"

	"virtlockd/test/host"
	"virtlockd/test/survivor"
	"virtlockd/test/wire"
)

// noOne is the first of a row of process ids that no process has: the kernel gives none above 4194304.
const noOne = 0x70000000

// Kills at any instant, under load and under systemd, lose no lock and no answer, and leave no lock for nobody.
func TestKillStorm(t *testing.T) {
	t.Parallel()
	n := 300
	if v := os.Getenv("KILLS"); v != "" {
		var err error
		if n, err = strconv.Atoi(v); err != nil {
			t.Fatal(err)
		}
	}
	m := Boot(t, Options{})
	m.Systemctl("start", Service)
	c := newCrowd(m)
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
	before, begin := 0, time.Now()
	for done := 0; done < n && clients.Err() == nil; done++ {
		var pid int
		if !host.Eventually(func() bool { pid = m.MainPID(); return pid > 0 && pid != before }) {
			t.Fatal("systemd starts no other daemon")
		}
		before = pid
		// Most come while it serves, some in the midst of its start and recovery.
		if rand.IntN(4) > 0 {
			answered := clients.Requests.Load()
			if !host.Eventually(func() bool { return clients.Requests.Load() > answered+32 }) {
				t.Fatal("it does not serve")
			}
		}
		time.Sleep(time.Duration(rand.IntN(20_000)) * time.Microsecond)
		if out, err := m.Run("kill", "-KILL", strconv.Itoa(pid)); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	took := time.Since(begin)
	if err := clients.Stop(); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d kills in %v; %v", n, took.Round(time.Millisecond), clients)
	for k := range 32 {
		if path := fmt.Sprint(Data, "/load", k); m.Exists(path) {
			t.Errorf("%s is held for nobody, or its lease was left", path)
		}
	}
	c.goesOn("the storm")
	c.end()
}
