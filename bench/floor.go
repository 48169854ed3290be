// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"encoding/binary"
	"fmt"
	"hash/maphash"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"virtlockd/test/wire"
)

// floorEnv makes this program the floor server that listens there.
const floorEnv = "VIRTLOCKD_BENCH_FLOOR"

// floorServer does what no lock daemon can do without: it waits for requests, opens and locks files, and answers.
// There is one thread, no other check than whether a lease's name is still its file's, and no thought of who asks. It takes one event at a time,
// so where that costs, a daemon can be faster.
type floorServer struct {
	epfd, listener int
	seed           maphash.Seed
	held           map[uint64]int32 // descriptor, doubled, and 1 for a lease file, by path
	in             [64 << 10]byte
	path           [4096]byte
	out            [wire.HeaderLen]byte
	st             unix.Stat_t
	now            unix.Stat_t
}

// floor is the whole life of the process.
func floor() {
	debug.SetGCPercent(-1)
	runtime.LockOSThread()
	if err := os.MkdirAll("/run/libvirt", 0o755); err != nil {
		panic(err)
	}
	raiseLimit()
	s := &floorServer{seed: maphash.MakeSeed(), held: make(map[uint64]int32, 1<<15)}
	if fds := os.Getenv(againEnv); fds != "" {
		if _, err := fmt.Sscan(fds, &s.epfd, &s.listener); err != nil {
			panic(err)
		}
		s.loop()
	}
	var err error
	if s.epfd, err = unix.EpollCreate1(0); err != nil {
		panic(err)
	}
	if s.listener, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0); err != nil {
		panic(err)
	}
	if err = unix.Bind(s.listener, &unix.SockaddrUnix{Name: os.Getenv(floorEnv)}); err != nil {
		panic(err)
	}
	if err = unix.Listen(s.listener, 30); err != nil { // as both daemons
		panic(err)
	}
	s.watch(s.listener)
	s.loop()
}

// againEnv has the numbers of the epoll set and the listener, if the server has started itself again.
const againEnv = "VIRTLOCKD_BENCH_AGAIN"

// again is the floor of a live upgrade: everything that is open stays open, and another program goes on. Locks are not taken over.
func (s *floorServer) again() {
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGUSR1)
	env := append(os.Environ(), fmt.Sprintf("%s=%d %d", againEnv, s.epfd, s.listener))
	<-asked
	panic(syscall.Exec("/proc/self/exe", os.Args, env))
}

func (s *floorServer) loop() {
	go s.again()
	var ev unix.EpollEvent
	for {
		n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_WAIT, uintptr(s.epfd), uintptr(unsafe.Pointer(&ev)), 1, ^uintptr(0), 0, 0)
		switch {
		case errno != 0 && errno != unix.EINTR:
			panic(errno)
		case errno != 0 || n == 0:
		case int(ev.Fd) == s.listener:
			s.accept()
		default:
			s.serve(int(ev.Fd))
		}
	}
}

func (s *floorServer) watch(fd int) {
	ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}
	unix.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(s.epfd), unix.EPOLL_CTL_ADD, uintptr(fd), uintptr(unsafe.Pointer(&ev)), 0, 0)
}

func (s *floorServer) accept() {
	fd, _, errno := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(s.listener), 0, 0, 0, 0, 0)
	if errno == 0 {
		s.watch(int(fd))
	}
}

// serve reads what one client sent, and answers.
func (s *floorServer) serve(fd int) {
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&s.in)), uintptr(len(s.in)), unix.MSG_DONTWAIT, 0, 0)
	if errno == unix.EAGAIN || errno == unix.EINTR {
		return
	}
	if errno != 0 || n == 0 {
		unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0)
		return
	}
	for m := s.in[:n]; len(m) >= wire.HeaderLen; {
		size := binary.BigEndian.Uint32(m)
		ok := s.execute(binary.BigEndian.Uint32(m[12:]), m[wire.HeaderLen:size])
		copy(s.out[:], m)
		binary.BigEndian.PutUint32(s.out[0:], wire.HeaderLen)
		binary.BigEndian.PutUint32(s.out[16:], wire.TypeReply)
		binary.BigEndian.PutUint32(s.out[24:], wire.StatusOK)
		if !ok {
			binary.BigEndian.PutUint32(s.out[24:], wire.StatusError)
		}
		unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&s.out)), uintptr(len(s.out)), unix.MSG_NOSIGNAL, 0, 0)
		m = m[size:]
	}
}

// text takes an XDR string off args.
func text(args []byte) (b, rest []byte) {
	n := int(binary.BigEndian.Uint32(args))
	return args[4 : 4+n], args[4+(n+3)&^3:]
}

func (s *floorServer) execute(proc uint32, args []byte) bool {
	if proc != wire.ProcAcquire && proc != wire.ProcRelease && proc != wire.ProcCreateLockspace {
		return true
	}
	dir, args := text(args)
	n := copy(s.path[:], dir)
	if proc == wire.ProcCreateLockspace {
		s.path[n] = 0
		unix.RawSyscall(unix.SYS_MKDIRAT, s.at(), s.name(), 0o700)
		return true
	}
	if n > 0 {
		s.path[n] = '/'
		n++
	}
	name, args := text(args)
	n += copy(s.path[n:], name)
	s.path[n] = 0
	key := maphash.Bytes(s.seed, s.path[:n])
	if proc == wire.ProcRelease {
		return s.release(key)
	}
	return s.acquire(key, binary.BigEndian.Uint32(args)&wire.Autocreate != 0)
}

func (s *floorServer) at() uintptr   { return ^uintptr(99) } // AT_FDCWD is -100
func (s *floorServer) name() uintptr { return uintptr(unsafe.Pointer(&s.path)) }

func (s *floorServer) acquire(key uint64, lease bool) bool {
	flags := uintptr(unix.O_RDWR | unix.O_CLOEXEC)
	if lease {
		flags |= unix.O_CREAT
	}
	fd, _, errno := unix.RawSyscall6(unix.SYS_OPENAT, s.at(), s.name(), flags, 0o600, 0, 0)
	if errno != 0 {
		return false
	}
	l := unix.Flock_t{Type: unix.F_WRLCK, Len: 1}
	if _, _, errno = unix.RawSyscall(unix.SYS_FCNTL, fd, unix.F_OFD_SETLK, uintptr(unsafe.Pointer(&l))); errno != 0 {
		unix.RawSyscall(unix.SYS_CLOSE, fd, 0, 0)
		return false
	}
	v := int32(fd) * 2
	if lease {
		// Is the name still this file's?
		unix.RawSyscall(unix.SYS_FSTAT, fd, uintptr(unsafe.Pointer(&s.st)), 0)
		unix.RawSyscall6(unix.SYS_NEWFSTATAT, s.at(), s.name(), uintptr(unsafe.Pointer(&s.now)), 0, 0, 0)
		if s.st.Ino != s.now.Ino {
			return false
		}
		v++
	}
	s.held[key] = v
	return true
}

func (s *floorServer) release(key uint64) bool {
	v, ok := s.held[key]
	if !ok {
		return false
	}
	delete(s.held, key)
	if v&1 != 0 {
		unix.RawSyscall(unix.SYS_UNLINKAT, s.at(), s.name(), 0)
	}
	unix.RawSyscall(unix.SYS_CLOSE, uintptr(v/2), 0, 0)
	return true
}
