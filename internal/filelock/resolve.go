// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"strings"

	"golang.org/x/sys/unix"
)

// maxLinks is how many symbolic links the kernel follows in one path.
const maxLinks = 40

// tidy removes empty and "." components from an absolute path. It refuses
// ("", false) what means more than its letters: "..", and "." or "/" at the
// end, which ask for a directory.
func tidy(path string) (string, bool) {
	if clean, ok := scan(path); clean {
		return path, true
	} else if !ok {
		return "", false
	}
	var b strings.Builder
	for part := range strings.SplitSeq(path, "/") {
		if part != "" && part != "." {
			b.WriteByte('/')
			b.WriteString(part)
		}
	}
	return b.String(), true
}

// scan reports whether path is tidy already, and whether it can be made so.
func scan(path string) (clean, ok bool) {
	clean = true
	for start := 1; start <= len(path); {
		end := start
		for end < len(path) && path[end] != '/' {
			end++
		}
		switch part := path[start:end]; part {
		case "", ".":
			clean = false
			if end == len(path) {
				return false, false
			}
		case "..":
			return false, false
		}
		start = end + 1
	}
	return clean, clean || path != ""
}

// resolve follows the symbolic links of an absolute path by itself, and only
// where a walk meets nothing but local file systems. follow says whether a
// link in the last place is followed too. What comes back is tidy and free of
// links, as of now. ok is false when a worker has to go that way: because
// it leads to something that isn't local, to mount, or because only the
// kernel can say what the path means.
func (f *Files) resolve(o *op, points mountPoints, path string, follow bool) (real, mount string, ok bool) {
	var (
		done     = ""    // what is resolved already; "" is the root
		rest     = path  // what comes after it
		sticky   = true  // done may be a directory where not every link may be followed
		lastLink = false // a link in the last place was followed
	)
	for links := 0; ; {
		part, tail, more := strings.Cut(strings.TrimLeft(rest, "/"), "/")
		last := strings.Trim(tail, "/") == ""
		switch part {
		case "", ".":
			if last || part == "" {
				return "", mount, false
			}
			rest = tail
			continue
		case "..":
			if last {
				return "", mount, false
			}
			done, rest, sticky = done[:max(0, strings.LastIndexByte(done, '/'))], tail, true
			continue
		}
		if last && more {
			return "", mount, false // "name/": it must be a directory
		}
		here := done + "/" + part
		local := false
		if mount, local = points.find(here); !local || len(here) > pathMax {
			return "", mount, false
		}
		o.setPath(here)
		fd, errno := o.openPath(unix.O_NOFOLLOW)
		if errno == unix.ENOENT && !lastLink && !strings.Contains(tail, "..") {
			return strings.TrimSuffix(here+"/"+tail, "/"), mount, true // the caller finds the same error, or makes it
		}
		if errno != 0 {
			return "", mount, false
		}
		info, errno := o.fstat(fd)
		if errno != 0 || info.kind() != unix.S_IFLNK || (last && !follow) {
			unix.Close(fd)
			if last || info.kind() != unix.S_IFDIR {
				return here, mount, errno == 0 && last
			}
			done, rest = here, tail
			sticky = info.mode&(unix.S_ISVTX|unix.S_IWOTH) == unix.S_ISVTX|unix.S_IWOTH
			continue
		}
		target := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(fd, "", target)
		unix.Close(fd)
		// In such a directory the kernel follows only links of certain owners
		// (fs.protected_symlinks); it knows the rules best.
		if links++; err != nil || n == 0 || n == len(target) || links > maxLinks || sticky && done != "" {
			return "", mount, false
		}
		lastLink = lastLink || last
		rest = string(target[:n])
		if !last {
			rest += "/" + tail
		}
		if target[0] == '/' {
			done, sticky = "", true
		}
	}
}
