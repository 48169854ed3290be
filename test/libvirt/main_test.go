// SPDX-License-Identifier: LGPL-2.1-or-later

// Package libvirt_test runs real libvirtd and real QEMU guests against the lock daemon and compares the locks in the kernel after
// each step. Every scenario runs against the C daemon too, with the same expectations, so that what is expected is what the C
// daemon does, not what somebody thinks that it does.
package libvirt_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"virtlockd/test/vmhost"
)

// A daemon under test.
type daemon struct {
	name string
	kind string // of its locks in /proc/locks
	path string
}

var (
	reference = daemon{name: "c", kind: "POSIX", path: "/usr/sbin/virtlockd"}
	ours      = daemon{name: "ours", kind: "OFDLCK"} // path set by TestMain
	daemons   []daemon
	ctl       string // path of virtlockctl, set by TestMain
)

// Kinds of hosts, by the lockspaces that libvirt is told to use.
const (
	direct   = "direct"   // locks on the disks themselves
	indirect = "indirect" // locks on lease files named by the hash of the disk's path
	manual   = "manual"   // only <lease> elements: auto_disk_leases = 0
)

var qemuLockd = map[string]string{
	direct:   "",
	indirect: fmt.Sprintf("file_lockspace_dir = %q\n", vmhost.LeasesDir),
	manual:   fmt.Sprintf("auto_disk_leases = 0\nfile_lockspace_dir = %q\n", vmhost.LeasesDir),
}

// scratch is a directory of the whole run; below it the hosts' common things lie.
var scratch string

func TestMain(m *testing.M) {
	vmhost.Init()
	os.Exit(run(m))
}

func run(m *testing.M) (code int) {
	if why := missing(); why != "" {
		fmt.Fprintln(os.Stderr, "test/libvirt can't run:", why)
		return 1
	}
	var err error
	if scratch, err = os.MkdirTemp("", "vmtest-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(scratch)
	if err := os.Chmod(scratch, 0o755); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if ours.path, err = build(scratch, "virtlockd", os.Getenv("VIRTLOCKD_BINARY")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if ctl, err = build(scratch, "virtlockctl", os.Getenv("VIRTLOCKCTL_BINARY")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	daemons = []daemon{reference, ours}
	code = m.Run()
	if err := hosts.close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	return code
}

// missing says what keeps the tests from running on this machine, if anything does.
func missing() string {
	if os.Getuid() != 0 {
		return "namespaces and loop devices take root"
	}
	for _, program := range []string{
		reference.path, "/usr/sbin/libvirtd", "/usr/bin/virsh", "/usr/bin/qemu-system-x86_64",
		"/usr/bin/qemu-img", "/usr/bin/nsenter",
	} {
		if _, err := os.Stat(program); err != nil {
			return err.Error() + " (test/setup installs it)"
		}
	}
	return ""
}

// build returns the path of one of our programs: the one that is given, or one built from this tree.
func build(dir, name, given string) (string, error) {
	if given != "" {
		return filepath.Abs(given)
	}
	path := filepath.Join(dir, name)
	cmd := exec.Command("go", "build", "-o", path, "virtlockd/cmd/"+name)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w: %s", name, err, out)
	}
	return path, nil
}

// hosts are started when a test first wants them and shared by all tests of their kind.
var hosts hostPool

type hostPool struct {
	mu    sync.Mutex
	start map[string]func() (*vmhost.Host, error)
}

// get returns the host of that name, after starting it with all daemons if it is the first time.
func (p *hostPool) get(opts vmhost.Options, d daemon) (*vmhost.Host, error) {
	p.mu.Lock()
	if p.start == nil {
		p.start = map[string]func() (*vmhost.Host, error){}
	}
	start := p.start[opts.Name]
	if start == nil {
		start = sync.OnceValues(func() (*vmhost.Host, error) {
			h, err := vmhost.Start(opts)
			if err != nil {
				return nil, err
			}
			if err := h.StartAll(context.Background(), d.path); err != nil {
				h.Close()
				return nil, err
			}
			return h, nil
		})
		p.start[opts.Name] = start
	}
	p.mu.Unlock()
	return start()
}

// close ends all hosts, after making sure that the tests, which have ended all guests, have left no lock and no lease behind.
func (p *hostPool) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var problems []error
	for name, start := range p.start {
		h, err := start()
		if err != nil {
			continue // reported by the test that wanted it
		}
		if err := checkEmpty(h); err != nil {
			problems = append(problems, fmt.Errorf("host %s, after all tests: %w", name, err))
		}
		problems = append(problems, h.Close())
	}
	return errors.Join(problems...)
}

// checkEmpty looks for locks on anything that the host's guests could use, and for lease files that nobody cleaned up.
func checkEmpty(h *vmhost.Host) error {
	table, err := vmhost.ReadLocks()
	if err != nil {
		return err
	}
	var problems []error
	for _, dir := range []string{vmhost.ImagesDir, vmhost.LeasesDir, "/dev"} {
		locked, err := table.Below(h.Path(dir))
		if err != nil {
			return err
		}
		for file, locks := range locked {
			problems = append(problems, fmt.Errorf("%s/%s still locked: %v", dir, file, locks))
		}
	}
	entries, err := os.ReadDir(h.Path(vmhost.LeasesDir))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if isHash(e.Name()) {
			problems = append(problems, fmt.Errorf("lease file %s left behind", e.Name()))
		}
	}
	return errors.Join(problems...)
}

// isHash reports whether a lease file's name is one that libvirt makes: SHA-256 in hexadecimal.
func isHash(name string) bool {
	return len(name) == 64 && strings.Trim(name, "0123456789abcdef") == ""
}

// uuid makes a UUID of a host's or guest's name.
func uuid(name string) string {
	sum := vmhost.LeaseName(name) // any hash will do
	return fmt.Sprintf("%s-%s-4%s-8%s-%s", sum[:8], sum[8:12], sum[13:16], sum[17:20], sum[20:32])
}
