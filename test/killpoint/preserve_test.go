// SPDX-License-Identifier: LGPL-2.1-or-later

package killpoint

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
)

// A stop of a unit that preserves its descriptors (FileDescriptorStorePreserve=yes, systemd 254) leaves every lock held, and the next
// start takes them up; where it does not, a stop gives them up. The log says which it was. What systemctl(1) of such a systemd says is
// said by a script.
func TestPreservedStop(t *testing.T) {
	t.Parallel()
	for _, preserved := range []string{"yes", "no"} {
		t.Run(preserved, func(t *testing.T) {
			t.Parallel()
			m := startManaged(t)
			group := service(t, m.Host)
			m.kill()
			o := quiet
			o.Env = m.systemctl("case \"$*\" in\n*list-jobs*) echo '7 virtlockd.service stop running' ;;\n*) echo " + preserved + " ;;\nesac\n")
			m.Daemon = m.manager.Start(o)
			must(t, os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte(fmt.Sprint(m.PID())), 0))
			must(t, m.bystand.Ping())
			if code := m.Daemon.Stop(); code != 0 {
				t.Errorf("exit code %d", code)
			}
			if preserved == "no" {
				says(t, m.Daemon, "lock given up because the daemon stops", witness)
				for _, w := range m.waiters {
					w.Wakes()
				}
				if !host.Eventually(func() bool { return m.manager.Kept(vaultName) == 0 }) { // it reads that on its own time
					t.Error("the vault is kept")
				}
				return
			}
			says(t, m.Daemon, "are left to the next process", "FileDescriptorStorePreserve=yes")
			for _, w := range m.waiters {
				w.Asleep()
			}
			m.Daemon = m.manager.Start(o)
			must(t, m.bystand.Ping())
			m.holds("after the next start")
			m.end()
		})
	}
}

// service makes a control group with a unit's name, as seen from everywhere.
func service(t testing.TB, h *host.Host) string {
	t.Helper()
	h.Must(func() error {
		if err := os.Mkdir("/tmp/cgroup", 0o755); err != nil {
			return err
		}
		return unix.Mount("cgroup2", "/tmp/cgroup", "cgroup2", 0, "")
	})
	top := h.Path(fmt.Sprintf("/tmp/cgroup/virtlockd-preserve-%d-%s", os.Getpid(), filepath.Base(t.Name())))
	unit := top + "/virtlockd.service"
	must(t, os.MkdirAll(unit, 0o755))
	t.Cleanup(func() {
		if !host.Eventually(func() bool { return os.Remove(unit) == nil }) {
			t.Errorf("the control group %s is left", unit)
		}
		must(t, os.Remove(top))
	})
	return unit
}
