// SPDX-License-Identifier: LGPL-2.1-or-later

// Virtlockd holds locks on the resources of virtual machines on behalf of libvirt.
package main

import (
	"os"

	"virtlockd/internal/daemon"
	"virtlockd/internal/filelock"
	"virtlockd/internal/keeper"
)

func main() {
	if filelock.IsWorker() {
		filelock.WorkerMain()
	}
	if keeper.IsKeeper() {
		keeper.Main()
	}
	os.Exit(daemon.Main(os.Args))
}
