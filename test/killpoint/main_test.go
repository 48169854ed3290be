// SPDX-License-Identifier: LGPL-2.1-or-later

package killpoint

import (
	"testing"

	"virtlockd/test/host"
)

func TestMain(m *testing.M) { host.Main(m) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
