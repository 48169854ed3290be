// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"virtlockd/internal/buildinfo"
	"virtlockd/internal/rundir"
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

// stateFileName is the same in both modes.
const stateFileName = "virtlockd-restart-exec.json"

// findPaths works out the default paths of the mode that uid runs in.
func findPaths(uid int, getenv func(string) string) paths {
	run, err := rundir.Find(uid, getenv)
	p := paths{
		system:      uid == 0,
		uid:         uint32(uid),
		runDir:      run,
		lockSocket:  filepath.Join(run, rundir.LockSocket),
		adminSocket: filepath.Join(run, rundir.AdminSocket),
	}
	if p.system {
		p.pidFile = filepath.Join(buildinfo.Runstatedir, "virtlockd.pid")
		p.stateFile = filepath.Join(buildinfo.Runstatedir, stateFileName)
		p.config = filepath.Join(buildinfo.Sysconfdir, "libvirt/virtlockd.conf")
		p.logFile = filepath.Join(buildinfo.Localstatedir, "log/libvirt/virtlockd.log")
		return p
	}
	cache, cacheErr := rundir.User(uid, getenv, "XDG_CACHE_HOME", ".cache")
	config, configErr := rundir.User(uid, getenv, "XDG_CONFIG_HOME", ".config")
	if err := cmp.Or(err, cacheErr, configErr); err != nil {
		return paths{uid: p.uid, err: err}
	}
	p.pidFile = filepath.Join(run, "virtlockd.pid")
	p.stateFile = filepath.Join(run, stateFileName)
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
