// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// describe says where and what is measured.
func (b *bench) describe() results {
	r := results{
		Date:    time.Now(),
		Machine: fmt.Sprintf("%d x %s, %s", runtime.NumCPU(), processor(), kernel()),
		Disk:    b.disk,
		Ours:    version(b.ours),
		Form:    "quick",
	}
	if b.full {
		r.Form = "full"
	}
	if b.c != "" {
		r.C = version(b.c) + " (" + packageOf(b.c) + ")"
	}
	if load, err := os.ReadFile("/proc/loadavg"); err == nil {
		r.Load, _, _ = strings.Cut(string(load), " ")
	}
	return r
}

func processor() string {
	b, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(b)) {
		if name, ok := strings.CutPrefix(line, "model name"); ok {
			return strings.TrimSpace(strings.TrimLeft(name, "\t :"))
		}
	}
	return runtime.GOARCH
}

func kernel() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "Linux"
	}
	return "Linux " + unix.ByteSliceToString(u.Release[:])
}

func version(path string) string {
	out, err := exec.Command(path, "--version").Output()
	if err != nil {
		return err.Error()
	}
	return strings.Join(strings.Split(strings.TrimSpace(string(out)), "\n"), "; ")
}

// packageOf asks dpkg, where there is one.
func packageOf(path string) string {
	owner, err := exec.Command("dpkg-query", "-S", path).Output()
	if err != nil {
		return "of no package"
	}
	name, _, _ := bytes.Cut(owner, []byte(":"))
	out, err := exec.Command("dpkg-query", "-W", string(name)).Output()
	if err != nil {
		return string(name)
	}
	return strings.Join(strings.Fields(string(out)), " ")
}

// fileSystem names the type of the file system of a directory.
func fileSystem(dir string) (string, error) {
	out, err := exec.Command("stat", "-f", "-c", "%T", dir).Output()
	if err != nil {
		return "", fmt.Errorf("file system of %s: %w", dir, err)
	}
	name := strings.TrimSpace(string(out))
	if name == "ext2/ext3" { // they share a magic number with ext4
		name = "ext4"
	}
	return name, nil
}

// lastCPU is a processor that we may run on, not the one that most interrupts go to.
func lastCPU() int {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return 0
	}
	for cpu := len(set)*64 - 1; cpu > 0; cpu-- {
		if set.IsSet(cpu) {
			return cpu
		}
	}
	return 0
}

func absolute(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	// The daemon's directory is shown in the namespace by its real name.
	return filepath.EvalSymlinks(path)
}

// closeRaw is close(2) without a word to the scheduler.
func closeRaw(fd int) { unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }
