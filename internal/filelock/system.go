// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// pathMax is the longest path that the kernel takes, without its NUL.
const pathMax = unix.PathMax - 1

const (
	openFlags  = unix.O_RDWR | unix.O_CLOEXEC | unix.O_NOCTTY | unix.O_LARGEFILE
	fileMode   = 0o600 // of a new lease file, less the umask, as the C daemon makes it
	dirMode    = 0o700
	noSymlinks = unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS
)

// scratch is the memory that system calls read and write. It lives on the
// heap as part of a pooled op, so that no call allocates.
type scratch struct {
	how  unix.OpenHow
	stx  unix.Statx_t
	st   unix.Stat_t
	fl   unix.Flock_t
	buf  []byte // a path with its NUL, or directory NUL name NUL
	name *byte  // into buf: the last component
}

// fileInfo is what is of interest of a file's status.
type fileInfo struct {
	id    FileID
	mode  uint32 // st_mode
	size  uint64
	rdev  uint64
	links uint64
}

func (i fileInfo) kind() uint32 { return i.mode & unix.S_IFMT }

func makeInfo(dev, ino, rdev, size, links uint64, mode uint32) fileInfo {
	i := fileInfo{id: FileID{Dev: dev, Ino: ino}, mode: mode, size: size, rdev: rdev, links: links}
	if i.kind() == unix.S_IFBLK {
		i.id = FileID{Dev: rdev, Block: true}
	}
	return i
}

func infoOfStat(st *unix.Stat_t) fileInfo {
	return makeInfo(uint64(st.Dev), st.Ino, uint64(st.Rdev), uint64(st.Size), uint64(st.Nlink), st.Mode) // other widths on other architectures
}

// usualPath is room for nearly all paths, in bytes. Hundreds of calls may wait for a disk, each with its buffer.
const usualPath = 256

// room makes the buffer n bytes long, at least.
func (s *scratch) room(n int) {
	if len(s.buf) < n {
		s.buf = make([]byte, max(n, usualPath))
	}
}

// setPath puts path and a NUL into the buffer. The path is known to be
// no longer than pathMax and without NUL.
func (s *scratch) setPath(path string) {
	s.room(len(path) + 1)
	n := copy(s.buf, path)
	s.buf[n] = 0
}

// split puts path into the buffer as directory and name. The path is tidy and
// isn't the root.
func (s *scratch) split(path string) {
	s.room(len(path) + 2)
	slash := len(path) - 1
	for path[slash] != '/' {
		slash--
	}
	n := 1
	if slash == 0 {
		s.buf[0] = '/'
	} else {
		n = copy(s.buf, path[:slash])
	}
	s.buf[n] = 0
	s.name = &s.buf[n+1]
	n += 1 + copy(s.buf[n+1:], path[slash+1:])
	s.buf[n] = 0
}

// openPath opens what the buffer names with O_PATH, that is for reference
// only, and follows no symbolic link. ELOOP: there is one.
func (s *scratch) openPath(flags uint64) (int, syscall.Errno) {
	s.how = unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC | flags, Resolve: noSymlinks}
	for {
		fd, _, errno := unix.Syscall6(unix.SYS_OPENAT2, ^uintptr(99), uintptr(unsafe.Pointer(&s.buf[0])), // AT_FDCWD is -100
			uintptr(unsafe.Pointer(&s.how)), unix.SizeofOpenHow, 0, 0)
		if errno != unix.EINTR {
			return int(fd), errno
		}
	}
}

// openDir opens the directory of path, which stays split in the buffer.
func (s *scratch) openDir(path string) (int, syscall.Errno) {
	s.split(path)
	return s.openPath(unix.O_DIRECTORY)
}

// statPath looks at path without following any symbolic link.
func (s *scratch) statPath(path string) (fileInfo, syscall.Errno) {
	s.setPath(path)
	fd, errno := s.openPath(0)
	if errno != 0 {
		return fileInfo{}, errno
	}
	info, errno := s.fstat(fd)
	unix.Close(fd)
	return info, errno
}

func (s *scratch) fstat(fd int) (fileInfo, syscall.Errno) {
	if err := unix.Fstat(fd, &s.st); err != nil {
		return fileInfo{}, toErrno(err)
	}
	return infoOfStat(&s.st), 0
}

// statAt looks at the name in the directory dir; a symbolic link is itself.
func (s *scratch) statAt(dir int) (fileInfo, syscall.Errno) {
	const mask = unix.STATX_TYPE | unix.STATX_MODE | unix.STATX_INO | unix.STATX_SIZE | unix.STATX_NLINK
	_, _, errno := unix.Syscall6(unix.SYS_STATX, uintptr(dir), uintptr(unsafe.Pointer(s.name)),
		unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, mask, uintptr(unsafe.Pointer(&s.stx)), 0)
	if errno != 0 {
		return fileInfo{}, errno
	}
	x := &s.stx
	return makeInfo(unix.Mkdev(x.Dev_major, x.Dev_minor), x.Ino, unix.Mkdev(x.Rdev_major, x.Rdev_minor), x.Size, uint64(x.Nlink), uint32(x.Mode)), 0
}

// openAt opens the name in the directory dir for reading and writing, and no
// symbolic link. EAGAIN: a process has a lease on the file (F_SETLEASE in fcntl(2)), and the
// kernel would wait until that is given back.
func (s *scratch) openAt(dir int, flags uintptr) (int, syscall.Errno) {
	for {
		fd, _, errno := unix.Syscall6(unix.SYS_OPENAT, uintptr(dir), uintptr(unsafe.Pointer(s.name)),
			openFlags|unix.O_NOFOLLOW|unix.O_NONBLOCK|flags, fileMode, 0, 0)
		if errno != unix.EINTR {
			return int(fd), errno
		}
	}
}

func (s *scratch) mkdirAt(dir int) syscall.Errno {
	_, _, errno := unix.Syscall(unix.SYS_MKDIRAT, uintptr(dir), uintptr(unsafe.Pointer(s.name)), dirMode)
	return errno
}

// createAt makes an empty regular file without opening it.
func (s *scratch) createAt(dir int) syscall.Errno {
	_, _, errno := unix.Syscall6(unix.SYS_MKNODAT, uintptr(dir), uintptr(unsafe.Pointer(s.name)), unix.S_IFREG|fileMode, 0, 0, 0)
	return errno
}

func (s *scratch) unlinkAt(dir int) syscall.Errno {
	_, _, errno := unix.Syscall(unix.SYS_UNLINKAT, uintptr(dir), uintptr(unsafe.Pointer(s.name)), 0)
	return errno
}

// setLock applies a lock type (F_RDLCK, F_WRLCK, F_UNLCK) to byte 0 of fd,
// with F_OFD_SETLK or F_SETLK, without waiting.
func (s *scratch) setLock(fd, cmd int, typ int16) syscall.Errno { return setLock(&s.fl, fd, cmd, typ) }

func setLock(fl *unix.Flock_t, fd, cmd int, typ int16) syscall.Errno {
	for {
		*fl = unix.Flock_t{Type: typ, Whence: unix.SEEK_SET, Start: 0, Len: 1}
		errno := toErrno(unix.FcntlFlock(uintptr(fd), cmd, fl))
		if errno != unix.EINTR {
			return errno
		}
	}
}

// refused reports whether the error of setLock means that somebody else holds
// a lock there; POSIX leaves the choice between two numbers.
func refused(errno syscall.Errno) bool { return errno == unix.EAGAIN || errno == unix.EACCES }

func lockType(m Mode) int16 {
	if m == Exclusive {
		return unix.F_WRLCK
	}
	return unix.F_RDLCK
}

func toErrno(err error) syscall.Errno {
	if err == nil {
		return 0
	}
	if errno, ok := err.(syscall.Errno); ok {
		return errno
	}
	return unix.EIO
}

// since returns for how long t is past.
func since(t time.Time) time.Duration { return time.Since(t).Round(time.Millisecond) }
