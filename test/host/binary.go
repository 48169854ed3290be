// SPDX-License-Identifier: LGPL-2.1-or-later

package host

import (
	"flag"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// reference is Debian's package of the daemon that ours replaces.
const reference = "/usr/sbin/virtlockd"

// C returns the path of the C daemon.
func C(t testing.TB) string {
	t.Helper()
	if _, err := os.Stat(reference); err != nil {
		t.Fatalf("the C daemon is the reference of this test: %v (install the package libvirt-daemon)", err)
	}
	return reference
}

// built are our programs, each made once per test binary, where it is needed.
var built = struct {
	mu       sync.Mutex
	dir      string
	programs map[string]string // their paths by name
}{programs: map[string]string{}}

// Ours returns the path of our daemon: $VIRTLOCKD_BINARY if that is set, else it is built from the source tree.
func Ours(t testing.TB) string {
	t.Helper()
	return binary(t, "virtlockd", os.Getenv("VIRTLOCKD_BINARY"))
}

// Ctl returns the path of virtlockctl: $VIRTLOCKCTL_BINARY if that is set, else it is built from the source tree.
func Ctl(t testing.TB) string {
	t.Helper()
	return binary(t, "virtlockctl", os.Getenv("VIRTLOCKCTL_BINARY"))
}

func binary(t testing.TB, name, given string) string {
	t.Helper()
	built.mu.Lock()
	defer built.mu.Unlock()
	if built.programs[name] == "" {
		path, err := build(name, given)
		if err != nil {
			t.Fatal(err)
		}
		built.programs[name] = path
	}
	return built.programs[name]
}

// build makes a program, unless one is given.
func build(name, given string) (path string, err error) {
	if given != "" {
		return filepath.Abs(given)
	}
	if built.dir == "" {
		if built.dir, err = os.MkdirTemp("", "virtlockd-test-"); err != nil {
			return "", err
		}
		// Also for a daemon that runs as somebody else.
		if err = os.Chmod(built.dir, 0o755); err != nil {
			return "", err
		}
	}
	path = filepath.Join(built.dir, name)
	cmd := exec.Command("go", "build", "-o", path, "virtlockd/cmd/"+name)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building %s: %w\n%s", name, err, out)
	}
	return path, nil
}

// Main is what TestMain calls. It runs the tests; in a process that a test started it plays its part instead.
func Main(m *testing.M) {
	Play()
	// Daemons don't inherit what whoever runs the tests left open, so that a test counts the same descriptors everywhere.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		panic(err)
	}
	if err := StartReaper(); err != nil {
		panic(err)
	}
	// These tests wait more than they compute. An explicit -parallel, which is parsed later, has its way.
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	code := m.Run()
	if built.dir != "" {
		os.RemoveAll(built.dir)
	}
	os.Exit(code)
}

// Play doesn't return in a process that Spawn started. Main calls it; so does a program that is no test binary.
func Play() {
	if os.Getenv(partEnv) != "" {
		os.Exit(play())
	}
}
