// SPDX-License-Identifier: LGPL-2.1-or-later

package vmhost

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A Lock is one record lock in the kernel's table.
type Lock struct {
	Kind      string // "POSIX" or "OFDLCK"
	Exclusive bool
	PID       int // of the locker in this process's pid namespace; -1 for OFD locks
}

// Mode returns "exclusive" or "shared".
func (l Lock) Mode() string {
	if l.Exclusive {
		return "exclusive"
	}
	return "shared"
}

// fileID is a file as /proc/locks names it.
type fileID struct {
	major, minor uint32
	ino          uint64
}

// LockTable is a view of the kernel's locks on byte 0 of files, the byte that lock daemons use. (libvirtd locks byte 1 of an
// image, QEMU bytes 100 to 203.)
type LockTable map[fileID][]Lock

// ReadLocks reads /proc/locks. Waiting requests are left out.
func ReadLocks() (LockTable, error) {
	f, err := os.Open("/proc/locks")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	table := LockTable{}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		// 7: POSIX  ADVISORY  WRITE 4711 fe:00:131091 0 0
		w := strings.Fields(lines.Text())
		if len(w) != 8 || (w[1] != "POSIX" && w[1] != "OFDLCK") || w[6] != "0" || w[7] != "0" {
			continue
		}
		pid, err := strconv.Atoi(w[4])
		if err != nil {
			return nil, fmt.Errorf("/proc/locks: %q: %w", lines.Text(), err)
		}
		var id fileID
		if _, err := fmt.Sscanf(w[5], "%x:%x:%d", &id.major, &id.minor, &id.ino); err != nil {
			return nil, fmt.Errorf("/proc/locks: %q: %w", lines.Text(), err)
		}
		table[id] = append(table[id], Lock{w[1], w[3] == "WRITE", pid})
	}
	return table, lines.Err()
}

// On returns the locks on the file at path, which may be a block device's node. No such file, no locks.
func (t LockTable) On(path string) []Lock {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return nil
	}
	return t[fileID{unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino}]
}

// LeaseName returns the name of the file in an indirect lockspace that stands for a disk: the SHA-256 of its path.
func LeaseName(disk string) string {
	sum := sha256.Sum256([]byte(disk))
	return hex.EncodeToString(sum[:])
}

// Holds reports whether a process of the host, by its pid there, has a lock on the file at path, which is as this process sees it.
// Unlike /proc/locks that tells the holder of OFD locks, too.
func (h *Host) Holds(pid int, path string) (bool, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return false, err
	}
	file := fmt.Sprintf(" %02x:%02x:%d 0 0", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	infos, err := filepath.Glob(h.Path(fmt.Sprintf("/proc/%d/fdinfo/*", pid)))
	if err != nil {
		return false, err
	}
	for _, info := range infos {
		text, err := os.ReadFile(info)
		if err != nil {
			continue // closed meanwhile
		}
		for line := range strings.Lines(string(text)) {
			if strings.HasPrefix(line, "lock:") && strings.HasSuffix(strings.TrimSpace(line), file) {
				return true, nil
			}
		}
	}
	return false, nil
}

// Below returns the locked files in a directory tree: path relative to dir to locks.
func (t LockTable) Below(dir string) (map[string][]Lock, error) {
	found := map[string][]Lock{}
	err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if os.IsNotExist(err) {
			return nil // files come and go
		}
		if err != nil || e.IsDir() {
			return err
		}
		if locks := t.On(path); len(locks) > 0 {
			rel, err := filepath.Rel(dir, path)
			if err != nil {
				return err
			}
			found[rel] = locks
		}
		return nil
	})
	return found, err
}
