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

// follow replaces the first symbolic link in path, which is tidy and meets
// local file systems only, by what it points to; with last false the last
// component doesn't count. It opens nothing but for reference, and no link. ok
// is false when only the kernel can say what the path means.
func (o *op) follow(path string, last bool) (real string, ok bool) {
	// ends[i] is where the component i ends.
	ends := make([]int, 1, 16) // the root
	for i := 1; i <= len(path); i++ {
		if i == len(path) || path[i] == '/' {
			ends = append(ends, i)
		}
	}
	free, link := 0, len(ends)-1 // up to free there is no link; up to link there is one
	if !last {
		link--
	}
	for link-free > 1 {
		middle := (free + link) / 2
		o.setPath(path[:ends[middle]])
		switch fd, errno := o.openPath(0); errno {
		case 0:
			unix.Close(fd)
			free = middle
		case unix.ELOOP:
			link = middle
		default:
			return "", false
		}
	}
	if link < 1 {
		return "", false
	}
	o.linked = o.linked || link == len(ends)-1
	above := path[:ends[free]]
	target, ok := o.readLink(above, path[ends[free]+1:ends[link]])
	if !ok {
		return "", false
	}
	if target[0] == '/' {
		return target + path[ends[link]:], true
	}
	// What is above is real, so its parents are what they are called.
	for strings.HasPrefix(target, "../") {
		above = above[:max(0, strings.LastIndexByte(above, '/'))]
		target = strings.TrimLeft(target[2:], "/")
	}
	return above + "/" + target + path[ends[link]:], true
}

// readLink reads the link name in the directory dir.
func (o *op) readLink(dir, name string) (target string, ok bool) {
	o.setPath(dir + "/")
	fd, errno := o.openPath(unix.O_DIRECTORY)
	if errno != 0 {
		return "", false
	}
	defer unix.Close(fd)
	info, errno := o.fstat(fd)
	// In such a directory the kernel follows only links of certain owners
	// (fs.protected_symlinks); it knows the rules best.
	const sticky = unix.S_ISVTX | unix.S_IWOTH
	if errno != 0 || info.mode&sticky == sticky {
		return "", false
	}
	o.room(pathMax + 2)
	n, err := unix.Readlinkat(fd, name, o.buf)
	return string(o.buf[:max(n, 0)]), err == nil && n > 0 && n < len(o.buf)
}
