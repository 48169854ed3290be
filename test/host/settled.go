// SPDX-License-Identifier: LGPL-2.1-or-later

package host

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// Settled waits until a process has nothing to do: a daemon has then noted that its last reply was sent. If it is killed before, that
// connection is closed.
func Settled(t testing.TB, pid int) {
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
	if !Eventually(sleeps) {
		t.Fatalf("process %d is always busy", pid)
	}
}
