// SPDX-License-Identifier: LGPL-2.1-or-later

// Package buildinfo holds what is decided when the program is built: versions and directory prefixes.
// The Makefile sets the variables with the linker's -X; the values here are for a plain "go build".
package buildinfo

import (
	"fmt"
	"runtime/debug"
	"strconv"
	"strings"
)

// Set by the linker; never written at run time.
var (
	// LibvirtVersion is the libvirt release (X.Y.Z) whose behaviour this program speaks. It is what
	// --version and the admin protocol report.
	LibvirtVersion = "9.0.0"
	// Version is our own version.
	Version = "0.1.0"
	// Commit is the commit the program was built from; empty: not known.
	Commit = ""

	// Sysconfdir is where the system's configuration lives.
	Sysconfdir = "/etc"
	// Runstatedir is where the sockets and the pid file of the system daemon live.
	Runstatedir = "/run"
	// Localstatedir is where the log directory of the system daemon lives.
	Localstatedir = "/var"
)

// Product is what the second line of --version begins with. The C daemon's answer has no such line: that is
// how the two are told apart before a live upgrade.
const Product = "virtlockd (Go)"

// CommitName returns the commit the program was built from, or "unknown commit".
func CommitName() string {
	if Commit != "" {
		return Commit
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				return s.Value
			}
		}
	}
	return "unknown commit"
}

// LibvirtNumber returns LibvirtVersion as libvirt's APIs encode it: major*1,000,000 + minor*1,000 + release.
func LibvirtNumber() (uint64, error) {
	parts := strings.Split(LibvirtVersion, ".")
	if len(parts) != 3 {
		return 0, fmt.Errorf("libvirt version %q set at build is not X.Y.Z", LibvirtVersion)
	}
	var n uint64
	for _, p := range parts {
		v, err := strconv.ParseUint(p, 10, 16)
		if err != nil || v > 999 {
			return 0, fmt.Errorf("libvirt version %q set at build is not X.Y.Z", LibvirtVersion)
		}
		n = n*1000 + v
	}
	return n, nil
}
