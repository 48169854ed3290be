// SPDX-License-Identifier: LGPL-2.1-or-later

// Virtlockctl shows an operator what virtlockd holds, does and has done.
package main

import (
	"context"
	"os"
	"os/signal"
	"strconv"
	"syscall"
)

func main() {
	yieldToGuests()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// yieldToGuests lets everybody else use the processor first: what an operator looks at must not delay what he looks at. The
// priority is each thread's own, and new ones inherit it.
func yieldToGuests() {
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return
	}
	for _, thread := range threads {
		if id, err := strconv.Atoi(thread.Name()); err == nil {
			_ = syscall.Setpriority(syscall.PRIO_PROCESS, id, 19)
		}
	}
}
