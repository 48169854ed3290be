// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon_test

import (
	"strings"
	"testing"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// The secret by which libvirt's own daemons know each other is not this daemon's to make. (D-token)
func TestNoToken(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	d := h.Start(host.Ours(t), host.Options{})
	if err := d.Client(strangerPID).Acquire("", host.Data+"/x", wire.Autocreate); err != nil {
		t.Fatal(err)
	}
	if h.Exists(runDir + "/common") {
		t.Errorf("%s/common was made", runDir)
	}
	d.Stop()
}

// libvirtd releases what a paused guest does not hold any more, so that is no event. What was
// refused is one, and its line names everything. (D-log-release)
func TestReleaseOfFreeIsQuiet(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	d := h.Start(host.Ours(t), host.Options{})
	c := d.Client(strangerPID)
	if err := c.Release("", host.Data+"/free"); err == nil {
		t.Fatal("something free was released")
	}
	if err := c.Acquire("", host.Data+"/held", wire.Autocreate); err != nil {
		t.Fatal(err)
	}
	if err := d.Client(strangerPID+1).Acquire("", host.Data+"/held", 0); err == nil {
		t.Fatal("something held was acquired")
	}
	d.Stop()
	log := d.Stderr()
	if strings.Contains(log, "is not locked") {
		t.Errorf("a release of something free is in the log:\n%s", log)
	}
	for line := range strings.Lines(log) {
		if strings.Contains(line, "is locked") {
			for _, part := range []string{": error :", "domain=", "uuid=", "pid=1879048194", "path=" + host.Data + "/held"} {
				if !strings.Contains(line, part) {
					t.Errorf("the line of a refused lock has no %q: %s", part, line)
				}
			}
			return
		}
	}
	t.Errorf("a refused lock is not in the log:\n%s", log)
}
