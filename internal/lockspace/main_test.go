// SPDX-License-Identifier: LGPL-2.1-or-later

package lockspace

import (
	"os"
	"testing"

	"virtlockd/internal/filelock"
)

// The test binary is the worker process of its locks on remote files, too.
func TestMain(m *testing.M) {
	if filelock.IsWorker() {
		filelock.WorkerMain()
	}
	os.Exit(m.Run())
}
