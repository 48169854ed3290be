// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// localTypes are the file systems whose calls end in bounded time unless the
// machine itself is broken. What isn't known here is treated as remote, which
// costs time but is never wrong. An overlay counts as local whatever its
// layers are.
var localTypes = map[string]bool{
	"bcachefs": true, "btrfs": true, "devtmpfs": true, "erofs": true, "exfat": true, "ext2": true,
	"ext3": true, "ext4": true, "f2fs": true, "hugetlbfs": true, "iso9660": true, "jfs": true, "msdos": true,
	"nilfs2": true, "ntfs3": true, "overlay": true, "ramfs": true, "reiserfs": true, "rootfs": true,
	"squashfs": true, "tmpfs": true, "udf": true, "vfat": true, "xfs": true, "zfs": true,
}

// mountPoints says of each mount point whether all that is mounted there is
// local.
type mountPoints map[string]bool

// find returns the mount that decides about path, and whether a walk along
// path meets local file systems only: a walk to a local one below a remote
// one has to ask the remote one. path is absolute and tidy; it is compared by
// its letters only, so that no file system is touched.
func (m mountPoints) find(path string) (mount string, local bool) {
	mount = "/"
	local = m["/"] // a root that isn't listed (chroot) is not known to be local
	for i := 1; i < len(path); i++ {
		if i+1 < len(path) && path[i+1] != '/' {
			continue
		}
		here, ok := m[path[:i+1]]
		if !ok {
			continue
		}
		if !here {
			mount, local = path[:i+1], false
		} else if local {
			mount = path[:i+1]
		}
	}
	return mount, local
}

// parseMountinfo reads the form of /proc/self/mountinfo, see proc(5).
func parseMountinfo(data []byte) (mountPoints, error) {
	points := mountPoints{}
	for line := range bytes.Lines(data) {
		line = bytes.TrimSuffix(line, []byte("\n"))
		fields := bytes.Split(line, []byte(" "))
		// id parent major:minor root mountpoint options [optional ...] - type source options
		dash := 6
		for dash < len(fields) && string(fields[dash]) != "-" {
			dash++
		}
		if dash+1 >= len(fields) || len(fields[4]) == 0 || fields[4][0] != '/' {
			return nil, fmt.Errorf("line %.200q isn't what proc(5) says", line)
		}
		point := unescape(fields[4])
		local := localTypes[string(fields[dash+1])]
		for option := range bytes.SplitSeq(fields[5], []byte(",")) {
			// There the kernel must say what becomes of a symbolic link.
			if string(option) == "nosymfollow" {
				local = false
			}
		}
		// With several mounts on one point, all count: a walk may meet an
		// automounter below the one on top.
		if before, ok := points[point]; ok {
			local = local && before
		}
		points[point] = local
	}
	return points, nil
}

// unescape undoes the octal escapes (\040 for a space) of mountinfo.
func unescape(b []byte) string {
	if bytes.IndexByte(b, '\\') < 0 {
		return string(b)
	}
	var s strings.Builder
	for i := 0; i < len(b); i++ {
		if b[i] == '\\' && i+3 < len(b) && b[i+1] <= '3' && octal(b[i+1]) && octal(b[i+2]) && octal(b[i+3]) {
			s.WriteByte((b[i+1]-'0')<<6 | (b[i+2]-'0')<<3 | (b[i+3] - '0'))
			i += 3
			continue
		}
		s.WriteByte(b[i])
	}
	return s.String()
}

func octal(c byte) bool { return '0' <= c && c <= '7' }

// mountTable keeps mountPoints up to date. The kernel marks an open
// /proc/self/mountinfo as exceptional when mounts changed since the last poll
// of that descriptor, so asking costs one short system call.
type mountTable struct {
	mu      sync.Mutex // not held over a system call that can block: the poll has no timeout
	fd      int        // -1: closed
	pollfd  unix.PollFd
	timeout unix.Timespec
	serial  uint64 // counts the changes seen
	points  mountPoints
	known   uint64 // serial that points was read at
}

// newMountTable returns one that is read when it is first needed: after a live upgrade everybody waits.
func newMountTable() (*mountTable, error) {
	fd, err := unix.Open("/proc/self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /proc/self/mountinfo: %w; /proc must be mounted", err)
	}
	return &mountTable{fd: fd, serial: 1}, nil
}

func (t *mountTable) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.fd >= 0 {
		unix.Close(t.fd)
		t.fd = -1
	}
}

// changed asks whether mounts changed since the last time. mu is held.
func (t *mountTable) changed() bool {
	t.pollfd = unix.PollFd{Fd: int32(t.fd), Events: unix.POLLPRI}
	t.timeout = unix.Timespec{}
	// It can't sleep, so the scheduler needn't know.
	n, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&t.pollfd)), 1, uintptr(unsafe.Pointer(&t.timeout)), 0, 0, 0)
	return errno != 0 || n != 0
}

// current returns what is known, if it is current, else the serial to read for.
func (t *mountTable) current() (mountPoints, uint64, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.fd < 0 {
		return nil, 0, ErrClosed
	}
	if t.changed() {
		t.serial++
	}
	if t.known == t.serial {
		return t.points, t.serial, nil
	}
	return nil, t.serial, nil
}

// get returns the mounts as they are now.
func (t *mountTable) get() (mountPoints, error) {
	// A listing may be torn by a change in between; then it is read again. If
	// that doesn't end, mounts are made all the time, and not below our paths.
	var points mountPoints
	for range 10 {
		current, serial, err := t.current()
		if err != nil || current != nil {
			return current, err
		}
		if points, err = readMountinfo(); err != nil {
			return nil, err
		}
		t.mu.Lock()
		if t.known < serial {
			t.points, t.known = points, serial
		}
		t.mu.Unlock()
	}
	return points, nil
}

func readMountinfo() (mountPoints, error) {
	const name = "/proc/self/mountinfo"
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", name, err)
	}
	defer unix.Close(fd)
	data := make([]byte, 0, 16<<10)
	for {
		if len(data) == cap(data) {
			data = append(data, 0)[:len(data)]
		}
		n, err := unix.Read(fd, data[len(data):cap(data)])
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return nil, fmt.Errorf("read %s: %w", name, err)
		case n == 0:
			points, err := parseMountinfo(data)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			return points, nil
		default:
			data = data[:len(data)+n]
		}
	}
}
