// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"

	"virtlockd/internal/buildinfo"
	"virtlockd/internal/strerror"
)

// paths are the default places of one mode: the system's daemon, run by root, or a user's own one.
type paths struct {
	system bool
	uid    uint32 // the only user that is served
	err    error  // why a user's directories can't be told; the paths are empty then

	runDir      string // holds the sockets
	lockSocket  string
	adminSocket string
	pidFile     string
	stateFile   string // for another binary in this process
	config      string
	logFile     string // of a detached daemon without journald
}

// Names that are the same in both modes, below the directory of libvirt.
const (
	lockSocketName  = "virtlockd-sock"
	adminSocketName = "virtlockd-admin-sock"
	stateFileName   = "virtlockd-restart-exec.json"
)

// findPaths works out the default paths of the mode that uid runs in.
func findPaths(uid int, getenv func(string) string) paths {
	if uid == 0 {
		run := filepath.Join(buildinfo.Runstatedir, "libvirt")
		return paths{
			system:      true,
			runDir:      run,
			lockSocket:  filepath.Join(run, lockSocketName),
			adminSocket: filepath.Join(run, adminSocketName),
			pidFile:     filepath.Join(buildinfo.Runstatedir, "virtlockd.pid"),
			stateFile:   filepath.Join(buildinfo.Runstatedir, stateFileName),
			config:      filepath.Join(buildinfo.Sysconfdir, "libvirt/virtlockd.conf"),
			logFile:     filepath.Join(buildinfo.Localstatedir, "log/libvirt/virtlockd.log"),
		}
	}
	p := paths{uid: uint32(uid)}
	// The XDG Base Directory Specification; where the run-time directory isn't set, as in a
	// session without login, the cache takes its place.
	dir := func(variable, below string) string {
		if d := getenv(variable); d != "" {
			return d
		}
		home := getenv("HOME")
		if home == "" {
			u, err := user.LookupId(strconv.Itoa(uid))
			if err != nil {
				p.err = fmt.Errorf("HOME is not set, and there is no home directory of user %d: %w", uid, err)
				return ""
			}
			home = u.HomeDir
		}
		return filepath.Join(home, below)
	}
	cache := filepath.Join(dir("XDG_CACHE_HOME", ".cache"), "libvirt")
	p.runDir = cache
	if d := getenv("XDG_RUNTIME_DIR"); d != "" {
		p.runDir = filepath.Join(d, "libvirt")
	}
	config := filepath.Join(dir("XDG_CONFIG_HOME", ".config"), "libvirt")
	if p.err != nil {
		return paths{uid: p.uid, err: p.err}
	}
	// A relative variable counts from where we were started: the daemon goes elsewhere.
	for _, d := range []*string{&cache, &p.runDir, &config} {
		abs, err := filepath.Abs(*d)
		if err != nil {
			return paths{uid: p.uid, err: err}
		}
		*d = abs
	}
	p.lockSocket = filepath.Join(p.runDir, lockSocketName)
	p.adminSocket = filepath.Join(p.runDir, adminSocketName)
	p.pidFile = filepath.Join(p.runDir, "virtlockd.pid")
	p.stateFile = filepath.Join(p.runDir, stateFileName)
	p.config = filepath.Join(config, "virtlockd.conf")
	p.logFile = filepath.Join(cache, "virtlockd.log")
	return p
}

// dirMode is the mode of directories that the mode makes: open to look through for the system's
// daemon, because clients of other daemons meet there; a user's own are private.
func (p paths) dirMode() fs.FileMode {
	if p.system {
		return 0o755
	}
	return 0o700
}

// makeRunDir makes the directory of the sockets.
func (p paths) makeRunDir() error {
	if p.err != nil {
		return &startError{exitUsage, p.err}
	}
	err := makeDir(p.runDir, p.dirMode())
	switch {
	case err == nil:
		return nil
	case p.system:
		return &startError{exitRunDir, fmt.Errorf("unable to create rundir %s: %s", p.runDir, errnoText(err))}
	default:
		return &startError{exitUsage, fmt.Errorf("cannot create user runtime directory '%s': %s; set XDG_RUNTIME_DIR to a directory of yours", p.runDir, errnoText(err))}
	}
}

// makeDir makes a directory and its parents with exactly that mode, whatever the umask is. Existing
// directories stay as they are.
func makeDir(path string, mode fs.FileMode) error {
	st, err := os.Stat(path)
	if err == nil {
		if st.IsDir() {
			return nil
		}
		return &fs.PathError{Op: "mkdir", Path: path, Err: syscall.ENOTDIR}
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if parent := filepath.Dir(path); parent != path {
		if err := makeDir(parent, mode); err != nil {
			return err
		}
	}
	if err := os.Mkdir(path, mode); err != nil {
		// Somebody else may have made it meanwhile.
		if st, statErr := os.Stat(path); statErr == nil && st.IsDir() {
			return nil
		}
		return err
	}
	return os.Chmod(path, mode) // the umask can only have taken bits away
}

// errnoText is the C library's text of the system error behind err.
func errnoText(err error) string {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return strerror.Text(errno)
	}
	return err.Error()
}
