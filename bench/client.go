// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"virtlockd/test/wire"
)

// patience is how long a client waits for a reply.
const patience = 20 * time.Second

// client is a connection that makes raw, blocking system calls and allocates nothing while it is measured.
type client struct {
	fd               int
	acquire, release []byte // whole frames
	held             bool   // the next request is release
	began            int64  // of a pair, in ns
	poll             unix.PollFd
	in               [256]byte
}

// dial connects to a daemon.
func dial(path string) (*client, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	tv := unix.NsecToTimeval(patience.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("setsockopt", err)
	}
	for {
		err := unix.Connect(fd, &unix.SockaddrUnix{Name: path})
		if err == nil {
			return &client{fd: fd}, nil
		}
		if err != unix.EINTR {
			unix.Close(fd)
			return nil, os.NewSyscallError("connect", err)
		}
	}
}

func (c *client) close() { unix.Close(c.fd) }

// owner is what clients register for a process.
func owner(pid int) []byte {
	o := wire.VM(pid)
	o.Name = "instance-0000a1b2" // of a usual length
	return wire.Request(wire.ProcRegister, 0, wire.RegisterArgs(o))
}

// send writes a whole request. The raw system call doesn't tell the scheduler, which then does nothing about it.
func (c *client) send(b []byte) error {
	for len(b) > 0 {
		n, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(c.fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), unix.MSG_NOSIGNAL, 0, 0)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return os.NewSyscallError("send", errno)
		}
		b = b[n:]
	}
	return nil
}

var (
	errSilent = errors.New("the daemon does not answer")
	errClosed = errors.New("the daemon closed the connection")
	errRefuse = errors.New("the daemon answered a request by an error")
)

// recv reads a reply. All those that are measured are a header without payload.
func (c *client) recv() error {
	for have := 0; ; {
		c.poll = unix.PollFd{Fd: int32(c.fd), Events: unix.POLLIN}
		n, _, errno := unix.RawSyscall(unix.SYS_POLL, uintptr(unsafe.Pointer(&c.poll)), 1, uintptr(patience.Milliseconds()))
		switch {
		case errno == unix.EINTR:
			continue
		case errno != 0:
			return os.NewSyscallError("poll", errno)
		case n == 0:
			return errSilent
		}
		n, _, errno = unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(c.fd), uintptr(unsafe.Pointer(&c.in[have])), uintptr(wire.HeaderLen-have), 0, 0, 0)
		switch {
		case errno == unix.EINTR:
			continue
		case errno != 0:
			return os.NewSyscallError("recv", errno)
		case n == 0:
			return errClosed
		}
		if have += int(n); have == wire.HeaderLen {
			break
		}
	}
	if binary.BigEndian.Uint32(c.in[24:]) != wire.StatusOK {
		return c.refused()
	}
	return nil
}

// refused reads the rest of an error reply.
func (c *client) refused() error {
	rest := make([]byte, binary.BigEndian.Uint32(c.in[:])-wire.HeaderLen)
	n, err := unix.Read(c.fd, rest)
	if err != nil {
		return os.NewSyscallError("read", err)
	}
	if e, err := wire.ParseError(rest[:n]); err == nil {
		return fmt.Errorf("%w: %s", errRefuse, e.Text())
	}
	return errRefuse
}

func (c *client) call(b []byte) error {
	if err := c.send(b); err != nil {
		return err
	}
	return c.recv()
}

// pair acquires and releases.
func (c *client) pair() error {
	if err := c.call(c.acquire); err != nil {
		return err
	}
	return c.call(c.release)
}

// resource tells what the client's pairs are about.
func (c *client) resource(lockspace, name string, flags uint32) {
	c.acquire = wire.Request(wire.ProcAcquire, 1, wire.ResourceArgs(lockspace, name, flags))
	c.release = wire.Request(wire.ProcRelease, 2, wire.ResourceArgs(lockspace, name, 0))
}

// samples are times in ns of what was done in a loop.
type samples struct {
	ns      []int64
	elapsed time.Duration
}

// quantile of the times, in s.
func (s *samples) quantile(q float64) float64 {
	slices.Sort(s.ns)
	return float64(s.ns[min(len(s.ns)-1, int(q*float64(len(s.ns))))]) / 1e9
}

func (s *samples) rate() float64 { return float64(len(s.ns)) / s.elapsed.Seconds() }

// clock is the monotonic time in ns.
func clock() int64 { return int64(time.Since(epoch)) }

var epoch = time.Now()

// onThread runs f on a thread of its own, on one processor if cpu isn't negative, and ends the thread.
func onThread(cpu int, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if cpu >= 0 {
			var set unix.CPUSet
			set.Set(cpu)
			if err := unix.SchedSetaffinity(0, &set); err != nil {
				done <- os.NewSyscallError("sched_setaffinity", err)
				return
			}
		}
		done <- f()
	}()
	return <-done
}

// repeat does something for as long as d, at least once.
func repeat(cpu int, d time.Duration, do func() error) (*samples, error) {
	s := &samples{ns: make([]int64, 0, 1+int(d/(4*time.Microsecond)))}
	err := onThread(cpu, func() error {
		begin := clock()
		for now := begin; ; {
			if err := do(); err != nil {
				return err
			}
			t := clock()
			s.ns = append(s.ns, t-now)
			now = t
			if s.elapsed = time.Duration(now - begin); s.elapsed >= d {
				return nil
			}
		}
	})
	return s, err
}

// closedLoop lets each client make one pair after the other, all of them on one thread.
func closedLoop(cs []*client, d time.Duration) (*samples, error) {
	s := &samples{ns: make([]int64, 0, 1+int(d/time.Microsecond))}
	err := onThread(-1, func() error {
		epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
		if err != nil {
			return os.NewSyscallError("epoll_create1", err)
		}
		defer unix.Close(epfd)
		begin := clock()
		for i, c := range cs {
			ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(i)}
			if err := unix.EpollCtl(epfd, unix.EPOLL_CTL_ADD, c.fd, &ev); err != nil {
				return os.NewSyscallError("epoll_ctl", err)
			}
			c.began, c.held = begin, true
			if err := c.send(c.acquire); err != nil {
				return err
			}
		}
		var events [64]unix.EpollEvent
		for busy := len(cs); busy > 0; {
			n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_WAIT, uintptr(epfd), uintptr(unsafe.Pointer(&events)), uintptr(len(events)), uintptr(patience.Milliseconds()), 0, 0)
			if errno == unix.EINTR {
				continue
			}
			if errno != 0 || n == 0 {
				return fmt.Errorf("no reply within %s: %w", patience, errno)
			}
			for _, ev := range events[:n] {
				c := cs[ev.Fd]
				if err := c.recv(); err != nil {
					return err
				}
				if c.held {
					c.held = false
					if err := c.send(c.release); err != nil {
						return err
					}
					continue
				}
				now := clock()
				s.ns = append(s.ns, now-c.began)
				if time.Duration(now-begin) >= d {
					busy--
					continue
				}
				c.began, c.held = now, true
				if err := c.send(c.acquire); err != nil {
					return err
				}
			}
		}
		s.elapsed = time.Duration(clock() - begin)
		return nil
	})
	return s, err
}
