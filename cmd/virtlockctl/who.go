// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"virtlockd/internal/inspect"
)

// lookTime bounds a look at a disk, which may hang.
const lookTime = 5 * time.Second

// candidate is a name by which libvirt may lock a disk.
type candidate struct {
	What string       `json:"what"`
	Name inspect.Text `json:"name"`
}

// holders is the answer to who.
type holders struct {
	Names []candidate    `json:"names"`
	Locks []inspect.Lock `json:"locks"`
}

func who(*pflag.FlagSet) func(*tool, []string) error {
	return func(t *tool, args []string) error {
		file, known := fileOf(args[0])
		names := candidates(t.ctx, args[0], known)
		locks, err := t.locks(func(l *inspect.Lock) bool {
			return known && l.File == file || slices.ContainsFunc(names, func(c candidate) bool {
				return l.Resource == c.Name || l.Path == c.Name
			})
		})
		if err != nil {
			return err
		}
		if t.json {
			err = t.printJSON(holders{names, locks})
		} else {
			err = t.printHolders(args[0], names, locks)
		}
		if err == nil && len(locks) == 0 {
			return exit(exitFound)
		}
		return err
	}
}

func (t *tool) printHolders(of string, names []candidate, locks []inspect.Lock) error {
	if len(locks) > 0 {
		return t.printLocks(locks)
	}
	fmt.Fprintf(t.out, "Nobody holds %s here, under any of its names:\n", clean(of))
	for _, c := range names {
		if _, err := fmt.Fprintf(t.out, "  %-10s %s\n", c.What, clean(string(c.Name))); err != nil {
			return err
		}
	}
	return nil
}

// candidates returns the names that libvirt locks a disk by, which may exist as a file: its path, or in a lockspace the hash of that, an LVM
// volume's UUID, a SCSI disk's serial number.
func candidates(ctx context.Context, path string, exists bool) []candidate {
	names := []candidate{{"name", inspect.Text(path)}}
	add := func(what, name string) {
		if name != "" && !slices.ContainsFunc(names, func(c candidate) bool { return string(c.Name) == name }) {
			names = append(names, candidate{what, inspect.Text(name)})
		}
	}
	if !exists && !strings.Contains(path, "/") {
		return names // a resource, not a path
	}
	addSum := func(path string) {
		sum := sha256.Sum256([]byte(path))
		add("sha256", hex.EncodeToString(sum[:]))
	}
	if filepath.IsAbs(path) {
		addSum(path) // libvirt takes it as the domain's XML spells it
	}
	if abs, err := filepath.Abs(path); err == nil {
		add("path", abs)
		addSum(abs)
		path = abs
	}
	if strings.HasPrefix(path, "/dev/") {
		add("lvm", firstLine(ctx, "lvs", "--noheadings", "--unbuffered", "--nosuffix", "--options", "uuid", path))
		add("scsi", firstLine(ctx, "/lib/udev/scsi_id", "--replace-whitespace", "--whitelisted", "--device", path))
	}
	return names
}

// firstLine returns what a program says first, "" if it fails: then the disk is of another kind. One that hangs in the
// kernel can't be killed, so it is left behind.
func firstLine(ctx context.Context, name string, args ...string) string {
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	said := make(chan string, 1)
	go func() {
		out, err := exec.CommandContext(ctx, name, args...).Output()
		if err != nil {
			out = nil
		}
		said <- string(out)
	}()
	select {
	case <-ctx.Done():
		return ""
	case text := <-said:
		line, _, _ := strings.Cut(strings.TrimSpace(text), "\n")
		return strings.TrimSpace(line)
	}
}

// fileOf tells which file is at a path, if there is one and its disk answers in time.
func fileOf(path string) (inspect.File, bool) {
	found := make(chan inspect.File, 1)
	go func() {
		defer close(found)
		var st unix.Stat_t
		switch err := unix.Stat(path, &st); {
		case err != nil:
		case st.Mode&unix.S_IFMT == unix.S_IFBLK:
			found <- inspect.File{Dev: uint64(st.Rdev), Block: true} // other widths on other architectures
		default:
			found <- inspect.File{Dev: uint64(st.Dev), Ino: st.Ino}
		}
	}()
	select {
	case f, ok := <-found:
		return f, ok
	case <-time.After(lookTime):
		return inspect.File{}, false
	}
}

// lives tells whether a process with that number can be seen from here.
func lives(pid int32) bool {
	_, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
	return err == nil
}
