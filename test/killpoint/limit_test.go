// SPDX-License-Identifier: LGPL-2.1-or-later

package killpoint

import (
	"fmt"
	"strings"
	"testing"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// A process that may open fewer files than there are locks to take over serves nobody and leaves everything where it is, at whichever
// limit; with one that is just enough everything is there.
func TestRecoveryAtDescriptorLimit(t *testing.T) {
	t.Parallel()
	m := startManaged(t)
	c := m.Client(noOne)
	const locks = 60
	for i := range locks {
		must(t, c.Acquire("", fmt.Sprint(host.Data, "/many", i), wire.Autocreate))
	}
	m.kill()
	enough := 0
	for limit := 16; enough == 0; limit += 8 {
		ready := m.manager.Said("READY=1")
		o := quiet
		o.NoWait = true
		o.Env = []string{fmt.Sprint("NOFILE=", limit)}
		d := m.manager.Launch(o)
		if !host.Eventually(func() bool { return !d.Alive() || m.manager.Said("READY=1") > ready }) {
			t.Fatalf("with %d descriptors: it neither serves nor ends\n%s", limit, host.Shorten(d.Stderr()))
		}
		for _, w := range m.waiters {
			w.Asleep()
		}
		if !m.Exists("/run/virtlockd.pid") {
			t.Errorf("with %d descriptors: the pid file is gone, so a second daemon could be started", limit)
		}
		if d.Alive() {
			enough, m.Daemon = limit, d
			break
		}
		if code := d.Wait(); code <= 0 || limit > 16 && !strings.Contains(d.Stderr(), "open files") {
			t.Errorf("with %d descriptors it ends with %d and says\n%s", limit, code, host.Shorten(d.Stderr()))
		}
	}
	t.Logf("%d descriptors are enough for %d locks", enough, locks+2)
	must(t, m.bystand.Ping())
	// Whatever it can't take over it must not have given up.
	for i := range locks {
		if m.Free(fmt.Sprint(host.Data, "/many", i), true) {
			t.Errorf("lock %d was lost", i)
		}
	}
	m.kill()
	m.Daemon = m.manager.Start(quiet)
	if c.Ping() != nil { // the first one was killed right after the last reply
		c = m.Client(noOne)
	}
	for i := range locks {
		must(t, c.Release("", fmt.Sprint(host.Data, "/many", i)))
	}
	m.holds("after all")
	m.end()
}
