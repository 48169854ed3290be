// SPDX-License-Identifier: LGPL-2.1-or-later

package lockproto

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"virtlockd/internal/lockspace"
	"virtlockd/internal/owner"
)

// holder is what an error of a locked resource says of its holder, and of the disk if the resource is its hash: nothing of what is
// not known.
func holder(err error, s *session, name string) (text string) {
	var pids []int32
	var locked *lockspace.LockedError
	more := ": "
	if errors.As(err, &locked) {
		text, more = ": "+locked.Holder.String(), "; "
		if o := locked.Holder.Owner; o != nil && o.Kind() != owner.Unverified {
			pids = append(pids, o.PID)
		}
	}
	// The guest that was refused has the same disk.
	if s.owner != nil && (s.self.Load() != nil || s.namespace == ours) {
		pids = append(pids, s.owner.PID)
	}
	if disk := diskOf(name, pids...); disk != "" {
		text += fmt.Sprintf("%sthe disk is %q", more, disk)
	}
	return text
}

// maxFiles bounds how many open files of a process are looked at.
const maxFiles = 1024

// diskOf finds the path of a disk that libvirt has named by its hash, among the open files of processes; "" if it is not there.
// The links in /proc are read and not followed, which touches no disk, and a path that has the right hash is the right one.
func diskOf(hash string, pids ...int32) string {
	if want, err := hex.DecodeString(hash); err != nil || len(want) != sha256.Size {
		return ""
	}
	for _, pid := range pids {
		if pid <= 0 {
			continue
		}
		dir, err := os.Open(fmt.Sprintf("/proc/%d/fd", pid))
		if err != nil {
			continue // it has just ended
		}
		names, _ := dir.Readdirnames(maxFiles)
		for _, name := range names {
			path, err := os.Readlink(filepath.Join(dir.Name(), name))
			if err != nil {
				continue
			}
			if sum := sha256.Sum256([]byte(path)); hex.EncodeToString(sum[:]) == hash {
				dir.Close()
				return path
			}
		}
		dir.Close()
	}
	return ""
}
