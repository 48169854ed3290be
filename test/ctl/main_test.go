// SPDX-License-Identifier: LGPL-2.1-or-later

// Package ctl tests virtlockctl against a running daemon.
package ctl

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"virtlockd/internal/inspect"
	"virtlockd/test/host"
	"virtlockd/test/wire"
)

func TestMain(m *testing.M) { host.Main(m) }

// Exit codes, as the manual page has them.
const (
	ok      = 0
	found   = 1
	usage   = 2
	absent  = 3
	denied  = 4
	failure = 5
)

// result is what one run of the tool did.
type result struct {
	out, errs string
	exit      int
}

func (r result) String() string {
	return fmt.Sprintf("exit code %d, stdout %q, stderr %q", r.exit, r.out, r.errs)
}

// command is the tool on a host.
func command(t testing.TB, h *host.Host, args ...string) *exec.Cmd {
	t.Helper()
	path := host.Ctl(t)
	h.Expose(path)
	return &exec.Cmd{
		Path:        path,
		Args:        append([]string{"virtlockctl"}, args...),
		Env:         []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C", "TERM=xterm"},
		Dir:         host.Cwd,
		SysProcAttr: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL},
	}
}

// ctl runs the tool on a host.
func ctl(t testing.TB, h *host.Host, args ...string) result {
	t.Helper()
	return finish(t, h, command(t, h, args...))
}

// finish runs a command and waits for its end.
func finish(t testing.TB, h *host.Host, cmd *exec.Cmd) result {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := h.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 4*host.Patience)
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })()
	var failed *exec.ExitError
	if err := cmd.Wait(); err != nil && !errors.As(err, &failed) {
		t.Fatal(err)
	}
	return result{out.String(), errs.String(), cmd.ProcessState.ExitCode()}
}

// want runs the tool and insists on an exit code.
func want(t testing.TB, h *host.Host, code int, args ...string) result {
	t.Helper()
	r := ctl(t, h, args...)
	if r.exit != code {
		t.Errorf("virtlockctl %q: %v, want exit code %d", args, r, code)
	}
	return r
}

// read runs the tool with -o json and reads what it says.
func read(t testing.TB, h *host.Host, code int, into any, args ...string) {
	t.Helper()
	r := want(t, h, code, append(args, "-o", "json")...)
	if err := json.Unmarshal([]byte(r.out), into); err != nil {
		t.Fatalf("virtlockctl %q: %v: %v", args, err, r)
	}
}

// start runs our daemon on a host.
func start(t testing.TB, o host.Options) (*host.Host, *host.Daemon) {
	t.Helper()
	h := host.New(t)
	return h, h.Start(host.Ours(t), o)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// guest is a process that has registered itself under a name, and its connection.
func guest(t testing.TB, h *host.Host, d *host.Daemon, name string) (*host.Process, *wire.Conn) {
	t.Helper()
	p := h.Spawn(host.ProcessOptions{})
	c := p.Dial(d, "lock")
	o := wire.VM(p.PID())
	o.Name = name
	must(t, c.Register(o))
	return p, c
}

// file makes a disk.
func file(h *host.Host, name string) string {
	path := host.Data + "/" + name
	h.WriteFile(path, "content of "+name, 0o600)
	return path
}

// kinds returns what was found, as "resource: kind kind".
func kinds(all []inspect.Finding) string {
	var lines []string
	for _, f := range all {
		line := strings.TrimPrefix(string(f.Lock.Resource), host.Data+"/") + ":"
		for _, p := range f.Problems {
			line += " " + p.Kind
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "; ")
}
