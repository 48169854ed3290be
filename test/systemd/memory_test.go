// SPDX-License-Identifier: LGPL-2.1-or-later

package systemd

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"virtlockd/test/host"
)

// outOfMemory is a way to have the kernel kill a daemon because memory runs out.
type outOfMemory struct {
	run  func(format string, args ...any) (string, error) // a script on the machine
	kill func(pid int)
	// killed checks that the kernel has killed so many.
	killed func(times int)
	// killOther has it kill another process of the unit; nil: systemd would not learn of it.
	killOther func()
}

// The kernel kills a daemon when memory runs out.
func TestOutOfMemory(t *testing.T) {
	t.Parallel()
	m := Boot(t, Options{Files: map[string]string{Config: "log_level = 2\n"}})
	o := outOfMemory{run: func(format string, args ...any) (string, error) {
		return m.Run("sh", "-ec", fmt.Sprintf(format, args...))
	}}
	if slices.Contains(strings.Fields(m.ReadFile("/sys/fs/cgroup/cgroup.controllers")), "memory") {
		o.inUnit(m)
	} else if out, err := o.run("mkdir /tmp/memory; mount -t cgroup -o memory none /tmp/memory"); err == nil {
		o.besideUnit(m)
	} else {
		t.Skipf("the memory controller is needed, of control groups version 1 (%v: %s), or of version 2, handed on to where the test is;"+
			" TestSettings still looks at the unit", err, out)
	}
	m.Systemctl("start", Service)
	c := newCrowd(m)
	const times = 3
	for range times {
		c.next("lack of memory", func() { o.kill(m.MainPID()) })
	}
	if o.killOther != nil {
		pid := m.MainPID()
		o.killOther()
		c.goesOn("the end of another process")
		if now := m.MainPID(); now != pid {
			t.Errorf("the daemon is process %d, was %d: it was ended because another process of the unit was killed", now, pid)
		}
	}
	c.end()
	o.killed(times)
	complains(m)
}

// inUnit limits the unit's own group, of version 2, so systemd learns why it is killed. The limit is raised before a process gets
// through.
func (o *outOfMemory) inUnit(m *Machine) {
	o.kill = func(pid int) {
		m.t.Helper()
		m.Systemctl("set-property", "--runtime", Service, "MemoryMax=64K")
		if !host.Eventually(func() bool { return !m.Alive(pid) }) {
			m.t.Fatal("memory does not run out")
		}
		m.Systemctl("set-property", "--runtime", Service, "MemoryMax=infinity")
	}
	told := func() (n int) {
		for _, e := range m.Journal("_PID=1", "UNIT="+Service) {
			if strings.Contains(e["MESSAGE"], "killed by the OOM killer") {
				n++
			}
		}
		return n
	}
	o.killed = func(times int) {
		m.t.Helper()
		if n := told(); n < times {
			m.t.Errorf("systemd has learnt of %d kills", n)
		}
	}
	o.killOther = func() {
		m.t.Helper()
		before := told()
		m.Systemctl("set-property", "--runtime", Service, "MemoryMax=200M")
		out, err := o.run("echo 1000 >/proc/self/oom_score_adj; echo $$ >/sys/fs/cgroup%s/cgroup.procs; exec tail /dev/zero", m.Show(Service, "ControlGroup"))
		if err == nil {
			m.t.Fatalf("memory does not run out\n%s", out)
		}
		if !host.Eventually(func() bool { return told() > before }) {
			m.t.Errorf("systemd has not learnt of the kill: %v\n%s", err, out)
		}
		m.Systemctl("set-property", "--runtime", Service, "MemoryMax=infinity")
	}
}

// besideUnit puts the process into a group of version 1 without any memory, of which systemd knows nothing.
func (o *outOfMemory) besideUnit(m *Machine) {
	t := m.t
	const group = "/tmp/memory/virtlockd-test"
	t.Cleanup(func() {
		// A process that has ended leaves it a moment later.
		if !host.Eventually(func() bool { _, err := o.run("test ! -e %s || rmdir %[1]s", group); return err == nil }) {
			t.Errorf("the control group %s is left", group)
		}
	})
	if out, err := o.run("mkdir %s; echo 0 >%[1]s/memory.limit_in_bytes", group); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	o.kill = func(pid int) {
		t.Helper()
		// What a process has already is not counted there; of more there is none.
		if out, err := o.run("echo %d >%s/cgroup.procs", pid, group); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if !host.Eventually(func() bool {
			m.Guest().Dial("lock") // takes some
			return !m.Alive(pid)
		}) {
			t.Fatal("memory does not run out")
		}
	}
	o.killed = func(times int) {
		t.Helper()
		if out, err := o.run("cat %s/memory.oom_control", group); err != nil || !strings.Contains(out, fmt.Sprintf("oom_kill %d", times)) {
			t.Errorf("the kernel has not killed %d: %v\n%s", times, err, out)
		}
	}
}
