// SPDX-License-Identifier: LGPL-2.1-or-later

// Package systemd speaks the two small protocols between a service and systemd: socket activation
// (sd_listen_fds(3)) and state notification (sd_notify(3)).
package systemd

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// FirstFD is the number of the first passed descriptor (SD_LISTEN_FDS_START).
const FirstFD = 3

// The environment of socket activation.
const (
	envPID   = "LISTEN_PID"
	envFDs   = "LISTEN_FDS"
	envNames = "LISTEN_FDNAMES"
)

// Descriptor is one descriptor that was passed to us.
type Descriptor struct {
	FD int
	// Name is the unit's FileDescriptorName= (by default the socket unit's name); "" if the names
	// weren't passed or their number doesn't match.
	Name string
	// Path is the address that a UNIX socket is bound to; "" for an unbound or an abstract one and
	// for everything that isn't a UNIX socket.
	Path string
}

func (d Descriptor) String() string {
	return fmt.Sprintf("descriptor %d (name %q, path %q)", d.FD, d.Name, d.Path)
}

// Passed tells whether the environment holds descriptors meant for the process pid.
func Passed(pid int) bool {
	return os.Getenv(envPID) == strconv.Itoa(pid) && os.Getenv(envFDs) != "" && os.Getenv(envFDs) != "0"
}

// Readdress makes descriptors that were passed to another process ones for pid. It is for a process
// that inherits them from the one that systemd started.
func Readdress(pid int) error {
	return os.Setenv(envPID, strconv.Itoa(pid))
}

// Descriptors returns the descriptors passed to the process pid, none if there are none, and removes
// the variables from the environment, so that no child takes them for its own. The descriptors are
// set close-on-exec. Nothing is believed: the number is checked against the limit of open files, and
// each descriptor must be open.
func Descriptors(pid int) ([]Descriptor, error) {
	passed, count, names := Passed(pid), os.Getenv(envFDs), os.Getenv(envNames)
	for _, name := range []string{envPID, envFDs, envNames} {
		os.Unsetenv(name)
	}
	if !passed {
		return nil, nil
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return nil, os.NewSyscallError("getrlimit", err)
	}
	n, err := strconv.ParseUint(count, 10, 31)
	if err != nil || n+FirstFD > limit.Cur {
		return nil, fmt.Errorf("socket activation: %s=%q is not a possible number of descriptors (the limit of open files is %d)", envFDs, count, limit.Cur)
	}
	split := strings.Split(names, ":")
	if uint64(len(split)) != n {
		split = make([]string, n)
	}
	fds := make([]Descriptor, 0, min(n, 16))
	for i := range int(n) {
		fd := FirstFD + i
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
			return nil, fmt.Errorf("socket activation: %s=%d, but descriptor %d is not open: %w", envFDs, n, fd, err)
		}
		d := Descriptor{FD: fd, Name: split[i]}
		if sa, err := unix.Getsockname(fd); err == nil {
			if a, ok := sa.(*unix.SockaddrUnix); ok && strings.HasPrefix(a.Name, "/") {
				d.Path = a.Name
			}
		}
		fds = append(fds, d)
	}
	return fds, nil
}
