// SPDX-License-Identifier: LGPL-2.1-or-later

package systemd

import (
	"fmt"
	"strings"
	"testing"

	"virtlockd/test/host"
)

// memoryGroup is a control group of version 1, where no unit is. With a limit in the unit's own group, of version 2, the next process
// would not get far either.
const memoryGroup = "/tmp/memory/virtlockd-test"

// The kernel kills a daemon when memory runs out.
func TestOutOfMemory(t *testing.T) {
	t.Parallel()
	m := Boot(t, Options{Files: map[string]string{Config: "log_level = 2\n"}})
	run := func(format string, args ...any) (string, error) {
		return m.Run("sh", "-ec", fmt.Sprintf(format, args...))
	}
	if out, err := run("mkdir /tmp/memory; mount -t cgroup -o memory none /tmp/memory"); err != nil {
		t.Skipf("the memory controller of control groups version 1 is needed: %v\n%s", err, out)
	}
	t.Cleanup(func() {
		// A process that has ended leaves it a moment later.
		if !host.Eventually(func() bool { _, err := run("test ! -e %s || rmdir %[1]s", memoryGroup); return err == nil }) {
			t.Errorf("the control group %s is left", memoryGroup)
		}
	})
	if out, err := run("mkdir %s; echo 0 >%[1]s/memory.limit_in_bytes", memoryGroup); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	m.Systemctl("start", Service)
	c := newCrowd(m)
	const times = 3
	for range times {
		c.next("lack of memory", func() {
			pid := m.MainPID()
			// What a process has already is not counted there; of more there is none.
			if out, err := run("echo %d >%s/cgroup.procs", pid, memoryGroup); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if !host.Eventually(func() bool {
				m.Guest().Dial("lock") // takes some
				return !m.Alive(pid)
			}) {
				t.Fatal("memory does not run out")
			}
		})
	}
	c.end()
	if out, err := run("cat %s/memory.oom_control", memoryGroup); err != nil || !strings.Contains(out, fmt.Sprintf("oom_kill %d", times)) {
		t.Errorf("the kernel has not killed %d: %v\n%s", times, err, out)
	}
	complains(m)
}
