// SPDX-License-Identifier: LGPL-2.1-or-later

// Package rundir says where the daemon's sockets are, for the daemon that makes them and for the tool that asks it.
package rundir

import (
	"fmt"
	"os/user"
	"path/filepath"
	"strconv"

	"virtlockd/internal/buildinfo"
)

// Names of the sockets, below the directory that Find returns.
const (
	LockSocket  = "virtlockd-sock"
	AdminSocket = "virtlockd-admin-sock"
)

// Find returns the directory of the sockets: the system's for uid 0, else that of the user's own daemon.
func Find(uid int, getenv func(string) string) (string, error) {
	if uid == 0 {
		return filepath.Join(buildinfo.Runstatedir, "libvirt"), nil
	}
	// Where the run-time directory isn't set, as in a session without login, the cache takes its place.
	if d := getenv("XDG_RUNTIME_DIR"); d != "" {
		return filepath.Abs(filepath.Join(d, "libvirt"))
	}
	return User(uid, getenv, "XDG_CACHE_HOME", ".cache")
}

// User returns libvirt's directory below one of the XDG Base Directory Specification, which a variable names or
// which has its place in the home directory. A relative variable counts from where we were started.
func User(uid int, getenv func(string) string, variable, below string) (string, error) {
	d := getenv(variable)
	if d == "" {
		home := getenv("HOME")
		if home == "" {
			u, err := user.LookupId(strconv.Itoa(uid))
			if err != nil {
				return "", fmt.Errorf("HOME is not set, and there is no home directory of user %d: %w", uid, err)
			}
			home = u.HomeDir
		}
		d = filepath.Join(home, below)
	}
	return filepath.Abs(filepath.Join(d, "libvirt"))
}
