// SPDX-License-Identifier: LGPL-2.1-or-later

package host

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
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

// built is our daemon, made once per test binary.
var built = struct {
	once sync.Once
	dir  string
	path string
	err  error
}{}

// Ours returns the path of our daemon: $VIRTLOCKD_BINARY if that is set, else it is built from the source tree.
func Ours(t testing.TB) string {
	t.Helper()
	built.once.Do(func() {
		if path := os.Getenv("VIRTLOCKD_BINARY"); path != "" {
			built.path, built.err = filepath.Abs(path)
			return
		}
		if built.dir, built.err = os.MkdirTemp("", "virtlockd-test-"); built.err != nil {
			return
		}
		// Also for a daemon that runs as somebody else.
		if built.err = os.Chmod(built.dir, 0o755); built.err != nil {
			return
		}
		built.path = filepath.Join(built.dir, "virtlockd")
		cmd := exec.Command("go", "build", "-o", built.path, "virtlockd/cmd/virtlockd")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			built.err = fmt.Errorf("building our daemon: %w\n%s", err, out)
		}
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	return built.path
}

// Main is what TestMain calls. It runs the tests; in a process that a test started it plays its part instead.
func Main(m *testing.M) {
	Play()
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
