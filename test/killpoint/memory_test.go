// SPDX-License-Identifier: LGPL-2.1-or-later

package killpoint

import (
	"fmt"
	"strings"
	"testing"

	"virtlockd/test/host"
	"virtlockd/test/manager"
	"virtlockd/test/wire"
)

// A daemon that gets no memory for a vault says so and serves without one: locks are held, and are told to be unsafe. A limit of the size of
// files (RLIMIT_FSIZE) is one of memory files, too.
func TestNoMemoryForVault(t *testing.T) {
	t.Parallel()
	const start = "/tmp/start-limited"
	h := host.New(t)
	h.Expose(host.Ours(t))
	h.WriteFile(start, fmt.Sprintf("#!/bin/sh\nulimit -f 2048; exec %s \"$@\"\n", host.Ours(t)), 0o755)
	m := manager.New(t, h)
	d := h.Start(start, m.Options(quiet))
	says(t, d, " warning : ", "locks are lost if this daemon crashes", "make a vault", "file too large")
	if s := status(t, h); !strings.Contains(s, "make a vault") {
		t.Errorf("status does not say why locks are not safe:\n%s", s)
	}
	c, path := d.Client(noOne), host.Data+"/x"
	must(t, c.Acquire("", path, wire.Autocreate))
	if h.Free(path, true) {
		t.Error("the lock is not held")
	}
	if s := tool(t, h, nil, nil, "list", "--unsafe"); !strings.Contains(s, path) {
		t.Errorf("the lock is not among those that are not safe:\n%s", s)
	}
	must(t, c.Release("", path))
	if !h.Free(path, true) || m.Kept(vaultName) != 0 {
		t.Error("something is left")
	}
	if code := d.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
