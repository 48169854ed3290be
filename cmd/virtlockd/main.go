// SPDX-License-Identifier: LGPL-2.1-or-later

// Virtlockd holds locks on the resources of virtual machines on behalf of libvirt.
package main

import (
	"os"
	"runtime"

	"virtlockd/internal/daemon"
	"virtlockd/internal/filelock"
	"virtlockd/internal/keeper"
)

// The kernel gives a signal to the first thread of a process if it can (complete_signal, Linux 6.1; signal(7) promises none), and to no other
// while that hangs in a call on a disk. So that thread is main's own, and main only waits for what there is to do. A worker, which is in such
// calls alone, gets no signals.
func init() {
	if !filelock.IsWorker() {
		runtime.LockOSThread()
	}
}

func main() {
	if filelock.IsWorker() {
		filelock.WorkerMain()
	}
	if keeper.IsKeeper() {
		keeper.Main()
	}
	os.Exit(daemon.Main(os.Args))
}
