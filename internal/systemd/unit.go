// SPDX-License-Identifier: LGPL-2.1-or-later

package systemd

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path"
	"strings"
	"time"
)

// Unit returns the name of the service that this process belongs to, by its control group (proc_pid_cgroup(5)); "" if it belongs to
// none.
func Unit() string {
	data, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return ""
	}
	for line := range bytes.Lines(data) {
		// 0::/system.slice/x.service, or 1:name=systemd:/system.slice/x.service where there are several hierarchies.
		parts := strings.SplitN(strings.TrimSpace(string(line)), ":", 3)
		if len(parts) != 3 || parts[1] != "" && parts[1] != "name=systemd" {
			continue
		}
		if name := path.Base(parts[2]); strings.HasSuffix(name, ".service") {
			return name
		}
	}
	return ""
}

// End is what a service that is asked to end is asked for.
type End struct {
	Job string // the unit's job: "stop", "restart" ...; "": none
	// Preserved tells that the unit's descriptors outlive a stop (FileDescriptorStorePreserve=yes, systemd 254).
	Preserved bool
}

// AskEnd asks systemd why the unit is to end, by systemctl(1), because that is asked once in the life of a daemon.
func AskEnd(unit string, user bool, timeout time.Duration) (End, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	run := func(args ...string) ([]byte, error) {
		if user {
			args = append([]string{"--user"}, args...)
		}
		out, err := output(ctx, exec.CommandContext(ctx, "systemctl", args...))
		if err != nil {
			return nil, fmt.Errorf("systemctl %s: %w", strings.Join(args, " "), err)
		}
		return out, nil
	}
	var e End
	// JOB UNIT TYPE STATE
	jobs, err := run("list-jobs", "--no-legend", "--plain", "--full", "--no-pager")
	if err != nil {
		return e, err
	}
	for lines := bufio.NewScanner(bytes.NewReader(jobs)); lines.Scan(); {
		if f := strings.Fields(lines.Text()); len(f) >= 3 && f[1] == unit {
			e.Job = f[2]
		}
	}
	props, err := run("show", "--property=FileDescriptorStorePreserve", "--value", unit)
	if err != nil {
		return e, err
	}
	e.Preserved = strings.TrimSpace(string(props)) == "yes"
	return e, nil
}

// output returns what a program has written, and does not wait longer than ctx for one that waits for a disk or has left a child behind
// with its output.
func output(ctx context.Context, cmd *exec.Cmd) ([]byte, error) {
	cmd.WaitDelay = time.Second
	type result struct {
		out []byte
		err error
	}
	ended := make(chan result, 1)
	go func() { // ends when the disk answers, or with the process
		out, err := cmd.Output()
		ended <- result{out, err}
	}()
	select {
	case r := <-ended:
		return r.out, r.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
