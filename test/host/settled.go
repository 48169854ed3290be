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
	if !Eventually(func() bool { return InState(pid, 'S') }) {
		t.Fatalf("process %d is always busy", pid)
	}
}

// InState tells whether all threads of a process are in a state: 'S', they sleep; 'T', they are stopped; 'Z', it has ended.
func InState(pid int, state byte) bool {
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	for _, name := range threads {
		b, err := os.ReadFile(name)
		// The state is the first field after the name in parentheses.
		if err == nil && !bytes.HasPrefix(b[bytes.LastIndexByte(b, ')')+1:], []byte{' ', state}) {
			return false
		}
	}
	return len(threads) > 0
}
