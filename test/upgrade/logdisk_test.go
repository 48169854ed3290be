// SPDX-License-Identifier: LGPL-2.1-or-later

package upgrade

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"virtlockd/test/host"
	"virtlockd/test/slowdisk"
	"virtlockd/test/wire"
)

// Procedures of the admin program.
const (
	setLogOutputs = 16
	setLogFilters = 17
	setTimeout    = 19
)

func setLog(t *testing.T, admin *wire.Conn, procedure uint32, text string) {
	t.Helper()
	m, err := admin.Call(procedure, wire.Payload(nil).Uint32(1).String(text).Uint32(0))
	if err == nil {
		err = m.Err()
	}
	must(t, err)
}

// A log file on a disk that hangs holds a thread in write(2), for which exec would wait with everybody standing still. The
// upgrade is put off, with a line elsewhere that names the output, and works when the disk is back.
func TestLogDiskHangs(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	d := h.Start(host.Ours(t), host.Options{Args: []string{"-v"}})
	disk := slowdisk.Mount(t, h, "/run/slow", slowdisk.Options{})
	disk.Add("log")
	admin := d.Dial("admin")
	setLog(t, admin, setLogOutputs, "1:stderr 1:file:/run/slow/log")
	disk.Hang(slowdisk.Write)
	setLog(t, admin, setLogFilters, "1:locking") // is logged itself
	disk.AwaitHang(slowdisk.Write)

	says := func(text string) func() bool {
		return func() bool { return strings.Contains(d.Stderr(), text) }
	}
	d.Signal(syscall.SIGUSR1)
	if !host.Within(time.Minute, says("no live upgrade")) {
		t.Fatal("the upgrade was neither refused nor done")
	}
	if !says("/run/slow/log")() {
		t.Errorf("the refusal does not name the output:\n%s", d.Stderr())
	}
	if err := d.Client(0x70000001).Ping(); err != nil {
		t.Errorf("while the log's disk hangs: %v", err)
	}
	disk.Resume(slowdisk.Write)
	// The attempt logs to that disk too, and is put off again if it meets such a line being written.
	refused := func() int { return strings.Count(d.Stderr(), "no live upgrade") }
	seen := refused()
	d.Signal(syscall.SIGUSR1)
	done := func() bool {
		if n := refused(); n > seen {
			seen = n
			d.Signal(syscall.SIGUSR1)
		}
		return says("this binary has taken over")()
	}
	if !host.Within(time.Minute, done) {
		t.Errorf("no upgrade after the disk came back:\n%s", d.Stderr())
	}
}
