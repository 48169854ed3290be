// SPDX-License-Identifier: LGPL-2.1-or-later

package killpoint

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
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

// settled waits until a process has nothing to do: a daemon has then noted that its last reply was sent. If it is killed before, that
// connection is closed.
func settled(t testing.TB, pid int) {
	t.Helper()
	sleeps := func() bool {
		threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		for _, name := range threads {
			b, err := os.ReadFile(name)
			if err == nil && !bytes.HasPrefix(b[bytes.LastIndexByte(b, ')')+1:], []byte(" S")) {
				return false
			}
		}
		return len(threads) > 0
	}
	if !host.Eventually(sleeps) {
		t.Fatalf("process %d is always busy", pid)
	}
}
