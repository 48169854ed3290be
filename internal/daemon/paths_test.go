// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestFindPaths(t *testing.T) {
	t.Parallel()
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	user := func(run, config, cache string) paths {
		return paths{
			uid:         12345,
			runDir:      run,
			lockSocket:  run + "/virtlockd-sock",
			adminSocket: run + "/virtlockd-admin-sock",
			pidFile:     run + "/virtlockd.pid",
			stateFile:   run + "/virtlockd-restart-exec.json",
			config:      config + "/virtlockd.conf",
			logFile:     cache + "/virtlockd.log",
		}
	}
	for _, tt := range []struct {
		name string
		uid  int
		env  string
		want paths
	}{
		{"root", 0, "HOME=/h XDG_RUNTIME_DIR=/r XDG_CONFIG_HOME=/c XDG_CACHE_HOME=/k", paths{
			system:      true,
			runDir:      "/run/libvirt",
			lockSocket:  "/run/libvirt/virtlockd-sock",
			adminSocket: "/run/libvirt/virtlockd-admin-sock",
			pidFile:     "/run/virtlockd.pid",
			stateFile:   "/run/virtlockd-restart-exec.json",
			config:      "/etc/libvirt/virtlockd.conf",
			logFile:     "/var/log/libvirt/virtlockd.log",
		}},
		{"all set", 12345, "HOME=/h XDG_RUNTIME_DIR=/r XDG_CONFIG_HOME=/c XDG_CACHE_HOME=/k",
			user("/r/libvirt", "/c/libvirt", "/k/libvirt")},
		{"home only", 12345, "HOME=/h", user("/h/.cache/libvirt", "/h/.config/libvirt", "/h/.cache/libvirt")},
		{"empty is unset", 12345, "HOME=/h XDG_RUNTIME_DIR= XDG_CONFIG_HOME= XDG_CACHE_HOME=",
			user("/h/.cache/libvirt", "/h/.config/libvirt", "/h/.cache/libvirt")},
		{"cache in place of the run-time directory", 12345, "HOME=/h XDG_CACHE_HOME=/k",
			user("/k/libvirt", "/h/.config/libvirt", "/k/libvirt")},
		{"relative", 12345, "HOME=/h XDG_RUNTIME_DIR=r", user(wd+"/r/libvirt", "/h/.config/libvirt", "/h/.cache/libvirt")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got := findPaths(tt.uid, func(name string) string {
				for _, kv := range strings.Fields(tt.env) {
					if k, v, _ := strings.Cut(kv, "="); k == name {
						return v
					}
				}
				return ""
			})
			if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(paths{})); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
	p := findPaths(987654321, func(string) string { return "" })
	if p.err == nil || exitCode(p.makeRunDir()) != exitUsage {
		t.Errorf("no home at all: %+v", p)
	}
}

// Not parallel: the umask is the process's.
func TestMakeDir(t *testing.T) {
	for _, umask := range []int{0, 0o077, 0o777} {
		dir := t.TempDir()
		old := unix.Umask(umask)
		err := makeDir(dir+"/a/b", 0o755)
		unix.Umask(old)
		if err != nil {
			t.Errorf("umask %#o: %v", umask, err)
			continue
		}
		for _, d := range []string{"/a", "/a/b"} {
			st, err := os.Stat(dir + d)
			if err != nil || st.Mode() != fs.ModeDir|0o755 {
				t.Errorf("umask %#o: mode of %s is %v, %v; want 0755", umask, d, st.Mode(), err)
			}
		}
	}

	dir := t.TempDir()
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	if err := makeDir(dir, 0o755); err != nil {
		t.Error(err)
	}
	if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o711 {
		t.Errorf("an existing directory now has mode %v, %v", st.Mode(), err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("nowhere", filepath.Join(dir, "dangling")); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]error{"file": syscall.ENOTDIR, "file/x": syscall.ENOTDIR, "dangling": syscall.EEXIST} {
		if err := makeDir(filepath.Join(dir, name), 0o755); !errors.Is(err, want) {
			t.Errorf("%s: %v; want %v", name, err, want)
		}
	}
}
