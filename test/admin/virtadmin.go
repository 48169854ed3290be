// SPDX-License-Identifier: LGPL-2.1-or-later

// Package admin compares what an unmodified virt-admin does with our daemon and with the C one.
package admin

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"virtlockd/test/host"
)

// client is Debian's package of the administrator's tool.
const client = "/usr/bin/virt-admin"

// System is the URI of a root daemon, Session that of a user's.
const (
	System  = "virtlockd:///system"
	Session = "virtlockd:///session"
)

// Admin runs virt-admin on a host.
type Admin struct {
	Host *host.Host
	URI  string
	// Env is added to a small fixed environment; Credential runs it as somebody else.
	Env        []string
	Credential *syscall.Credential
}

// Result is what one command did.
type Result struct {
	Stdout, Stderr string
	Exit           int // -1 minus the signal that killed it, if one did
}

func (r Result) String() string {
	return fmt.Sprintf("exit code %d, stdout %q, stderr %q", r.Exit, r.Stdout, r.Stderr)
}

// Run runs one command and waits for its end.
func (a Admin) Run(t testing.TB, args ...string) Result {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := &exec.Cmd{
		Path:        client,
		Args:        append([]string{"virt-admin", "-c", a.URI}, args...),
		Env:         append([]string{"PATH=/usr/bin:/bin", "HOME=/root", "LANG=C", "TZ=UTC"}, a.Env...),
		Dir:         host.Cwd,
		Stdout:      &out,
		Stderr:      &errs,
		SysProcAttr: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Credential: a.Credential},
	}
	if err := a.Host.Do(cmd.Start); err != nil {
		t.Errorf("virt-admin: %v (it is in the package libvirt-clients)", err)
		return Result{Exit: -1}
	}
	stuck := time.AfterFunc(host.Patience, func() { _ = cmd.Process.Kill() })
	defer stuck.Stop()
	err := cmd.Wait()
	if failed := (*exec.ExitError)(nil); err != nil && !errors.As(err, &failed) {
		t.Errorf("virt-admin %q: %v", args, err)
	}
	exit := cmd.ProcessState.ExitCode()
	if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		exit = -1 - int(ws.Signal())
	}
	return Result{out.String(), errs.String(), exit}
}

var (
	stamp  = regexp.MustCompile(`\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\+0000`)
	server = regexp.MustCompile(`(?m)^ \d    (admin|virtlockd)$`)
)

// Normal returns the result without what differs from run to run: times; the process ids in pids, which are
// replaced by their names; the order of servers, which the C daemon chooses anew at each start.
func (r Result) Normal(pids map[string]int) Result {
	r.Stdout = stamp.ReplaceAllString(r.Stdout, "TIME")
	for name, pid := range pids {
		r.Stdout = strings.ReplaceAll(r.Stdout, "unix_process_id: "+strconv.Itoa(pid)+"\n", "unix_process_id: "+name+"\n")
	}
	if rows := server.FindAllStringSubmatch(r.Stdout, -1); len(rows) > 1 {
		names := make([]string, len(rows))
		for i, row := range rows {
			names[i] = row[1]
		}
		slices.Sort(names)
		i := -1
		r.Stdout = server.ReplaceAllStringFunc(r.Stdout, func(string) string {
			i++
			return " " + strconv.Itoa(i) + "    " + names[i]
		})
	}
	return r
}
