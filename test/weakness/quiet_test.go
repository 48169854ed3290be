// SPDX-License-Identifier: LGPL-2.1-or-later

package weakness

import (
	"strings"
	"testing"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// libvirtd releases what a guest that it paused does not hold any more: that is no error that anybody should read.
func TestReleaseOfFreeIsQuiet(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	c := d.Client(noOne)
	if err := c.Release("", path("free")); !wire.IsNotLocked(err) {
		t.Fatalf("got %v", err)
	}
	// What is logged comes in order: after this line nothing of the RELEASE can come.
	touch(h, path("held"))
	must(t, c.Acquire("", path("held"), 0))
	refused(t, "second ACQUIRE", c.Acquire("", path("held"), 0))
	eventually(t, "refusal is logged", func() bool { return strings.Contains(d.Stderr(), path("held")) })
	if strings.Contains(d.Stderr(), path("free")) {
		t.Errorf("RELEASE is logged:\n%s", d.Stderr())
	}
}

// The token of libvirt's daemons among each other is none of ours.
func TestNoToken(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	must(t, d.Client(noOne).Ping())
	if got := d.Stop(); got != 0 {
		t.Errorf("exit status %d", got)
	}
	if h.Exists("/run/libvirt/common") {
		t.Error("/run/libvirt/common was made")
	}
}
