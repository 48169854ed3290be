// SPDX-License-Identifier: LGPL-2.1-or-later

package vault

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Cell is a Unix datagram socket that is connected to itself: what lies in its queue, a record and
// descriptors, stays although no process has it in its table, and nobody else can send to it (unix(7):
// only its peer can, and that is itself) or has, see connected.
//
// A Cell has one user at a time. It is not closed by the garbage collector.
type Cell struct {
	fd    atomic.Int32
	index uint32         // in its vault; 0: it belongs to none
	word  *atomic.Uint64 // in memory that outlives the process; nil: it belongs to no vault
}

// FD returns the socket's descriptor, to be passed to a worker process. It stays the cell's. -1: the cell is closed, be it with the vault that
// it belonged to; whoever still uses it then finds that nothing can be done with it.
func (c *Cell) FD() int { return int(c.fd.Load()) }

func newCell(fd int, index uint32) *Cell {
	c := &Cell{index: index}
	c.fd.Store(int32(fd))
	return c
}

// Index names the cell within its vault, from 1. 0: it belongs to none.
func (c *Cell) Index() uint32 {
	if c == nil {
		return 0
	}
	return c.index
}

// Word is a number beside the cell that outlives the process like what is in it. What it means is the business
// of whoever uses the cell: of a hold's, see Releasing, Stopped, Ending, Moving, Busy and Filling. nil: the cell belongs to no vault.
func (c *Cell) Word() *atomic.Uint64 { return c.word }

// Releasing is the word of a hold that is being released: whoever finds it after a crash goes on with that.
const Releasing = 1

// Stopped is the word of a hold whose owner the daemon has stopped, because a lock was lost.
const Stopped = 3

// Ending is the word of a hold whose owner is being ended, because it has closed its connection. It goes before Stopped. Only a verified
// owner is ended, so it also says that he is one, though the record may be older than that.
const Ending = 6

// Moving is the word of a hold that is being stored once more, with another lock on its file. Whoever finds both after a crash
// releases this one; who takes over from a live process, which has that other lock, stores the hold with it first.
const Moving = 5

// What a worker process does is in the low bits of the word, beside its number.
const (
	busy    = 2
	filling = 4
)

// Busy is the word of a hold that the worker process pid releases, with the last lock on its file. Until that process has ended, it may
// still do so, also after the daemon's end.
func Busy(pid int) uint64 { return uint64(pid)<<8 | busy }

// Filling is the word of a cell that the worker process pid puts a hold into. Until that process has ended, it may still do so. Where a
// record lies in the cell, it has: it has nothing more to do there.
func Filling(pid int) uint64 { return uint64(pid)<<8 | filling }

// Worker returns the worker process that may still work on a hold's cell, by the cell's word; 0: none.
func Worker(word uint64) int {
	if word&0xff == filling {
		return int(word >> 8)
	}
	return Releaser(word)
}

// Releaser is Worker for one that releases the hold.
func Releaser(word uint64) int {
	if word&0xff != busy {
		return 0
	}
	return int(word >> 8)
}

// NewCell makes an empty one that belongs to no vault. Close it.
func NewCell() (*Cell, error) { return connected(bound) }

// bound makes a socket with a name, to which anybody who knows the name can send.
func bound() (fd int, err error) {
	fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	// An empty address makes the kernel choose a name of its own.
	if err := unix.Bind(fd, &unix.SockaddrUnix{}); err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("bind", err)
	}
	return fd, nil
}

// connected makes a cell of a bound socket, to which from then on only the cell itself can send. One to which somebody else has sent before
// is not used: his message would be taken for the record.
func connected(bound func() (int, error)) (*Cell, error) {
	for {
		fd, err := bound()
		if err != nil {
			return nil, err
		}
		self, err := unix.Getsockname(fd)
		if err == nil {
			err = unix.Connect(fd, self)
		}
		if err != nil {
			unix.Close(fd)
			return nil, os.NewSyscallError("connect a socket to itself", err)
		}
		switch _, _, errno := receive(fd, nil, nil, unix.MSG_PEEK); errno {
		case unix.EAGAIN: // and nobody else can send any more
			return newCell(fd, 0), nil
		case 0:
			go unix.Close(fd) // to close what came along can take as long as a stranger likes
		default:
			unix.Close(fd)
			return nil, os.NewSyscallError("recvmsg", errno)
		}
	}
}

// At returns the cell whose socket is fd, which was handed over by somebody who still owns it. It belongs to no vault.
func At(fd int) *Cell { return newCell(fd, 0) }

// Close closes a cell that belongs to no vault, and so what lies in it.
func (c *Cell) Close() { unix.Close(int(c.fd.Swap(-1))) }

// Put adds a message: a record, which is not empty, and up to MaxFDs descriptors, of which the cell gets copies. It does
// not block. unix.EMSGSIZE: the record has more than MaxRecord bytes, or more than the kernel takes.
func (c *Cell) Put(record []byte, fds ...int) error {
	if len(record) > MaxRecord {
		return fmt.Errorf("of a record of %d bytes only %d would be read again: %w", len(record), MaxRecord, unix.EMSGSIZE)
	}
	if errno := send(c.FD(), record, fds); errno != 0 {
		return putError(errno)
	}
	return nil
}

// putError says what to do about an error of Put.
func putError(errno syscall.Errno) error {
	err := os.NewSyscallError("sendmsg", errno)
	switch errno {
	case unix.ETOOMANYREFS:
		return fmt.Errorf("too many descriptors of this user are in flight; raise the limit of open files (LimitNOFILE=) or give CAP_SYS_RESOURCE: %w", err)
	case unix.EAGAIN:
		return fmt.Errorf("the socket buffer is too small; give CAP_NET_ADMIN or raise net.core.wmem_default: %w", err)
	}
	return err
}

// Drop removes the first message and tells whether there was one. Its descriptors are not installed in this process, so
// this does not need room for them, and unless they were the last ones of their file nothing blocks.
func (c *Cell) Drop() bool {
	var b [1]byte
	vec := unix.Iovec{Base: &b[0], Len: 1}
	hdr := unix.Msghdr{Iov: &vec, Iovlen: 1}
	for {
		_, _, errno := unix.Syscall(unix.SYS_RECVMSG, uintptr(c.FD()), uintptr(unsafe.Pointer(&hdr)), unix.MSG_DONTWAIT)
		if errno != unix.EINTR {
			return errno == 0
		}
	}
}

// Empty removes all messages.
func (c *Cell) Empty() {
	for c.Drop() {
	}
}

// ErrTruncated says that descriptors could not be installed, since the process has as many as it may have. What lies
// in the cell is still there.
var ErrTruncated = errors.New("the limit of open files is reached; raise it (LimitNOFILE= in the unit)")

// ErrEmpty says that nothing lies in a cell.
var ErrEmpty = errors.New("nothing lies in the cell")

// Peek opens the first n descriptors of the first message, close-on-exec, and leaves the message where it is. The caller owns them.
// It does not block, and any number of processes may look at once.
//
// Errors: ErrEmpty; ErrTruncated.
func (c *Cell) Peek(n int) ([]int, error) {
	if n == 0 {
		return nil, nil
	}
	// No room for more than n: the kernel installs what there is room for.
	fds, _, err := c.first(make([]byte, unix.CmsgLen(4*n)))
	return complete(fds, len(fds) == n, err)
}

// All is Peek for all descriptors of the first message, of which there is at least one.
func (c *Cell) All() ([]int, error) {
	var oob [64]byte // a usual message has at most two
	fds, flags, err := c.first(oob[:])
	return complete(fds, len(fds) > 0 && flags&unix.MSG_CTRUNC == 0, err)
}

// peekAt is Peek for the message that begins so many bytes behind the first one, where nobody else looks.
func (c *Cell) peekAt(at, n int) ([]int, error) {
	defer c.peekFrom(-1)
	if err := c.peekFrom(at); err != nil {
		return nil, err
	}
	fds, _, err := c.look(make([]byte, unix.CmsgLen(4*n)))
	return complete(fds, len(fds) == n, err)
}

// first installs the descriptors of the first message for which there is room in oob. The flags are those of the message.
func (c *Cell) first(oob []byte) (fds []int, flags int, err error) {
	fds, flags, err = c.look(oob)
	if errors.Is(err, ErrEmpty) {
		// Or somebody who died had told MSG_PEEK to look elsewhere.
		if err := c.peekFrom(-1); err != nil {
			return nil, 0, err
		}
		fds, flags, err = c.look(oob)
	}
	return fds, flags, err
}

// look is first for the message where MSG_PEEK looks. It reads no data: that would move on where it looks (see peekFrom), for other
// processes, too.
func (c *Cell) look(oob []byte) (fds []int, flags int, err error) {
	_, n, flags, _, err := unix.Recvmsg(c.FD(), nil, oob, unix.MSG_PEEK|unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
	switch err {
	case nil:
		return Passed(oob[:n]), flags, nil
	case unix.EAGAIN:
		return nil, 0, ErrEmpty
	}
	return nil, 0, os.NewSyscallError("recvmsg", err)
}

// complete returns descriptors if they are all that were meant, else closes them.
func complete(fds []int, all bool, err error) ([]int, error) {
	if err != nil || all {
		return fds, err
	}
	for _, fd := range fds {
		unix.Close(fd)
	}
	return nil, ErrTruncated
}

// messages returns all of them without their descriptors. They are copied from buf, which has room for MaxRecord bytes.
func (c *Cell) messages(buf []byte) (all [][]byte, err error) {
	defer c.peekFrom(-1)
	for at := 0; ; {
		if err := c.peekFrom(at); err != nil {
			return nil, err
		}
		n, _, errno := receive(c.FD(), buf, nil, unix.MSG_PEEK)
		switch {
		case errno == unix.EAGAIN:
			return all, nil
		case errno != 0:
			return nil, os.NewSyscallError("recvmsg", errno)
		}
		all = append(all, append([]byte(nil), buf[:n]...))
		at += n
	}
}

// peekFrom says how many bytes behind the first one MSG_PEEK looks the next time (SO_PEEK_OFF in socket(7)); it moves on by what is
// read. -1: always at the first one. The socket has it, so it is the same for all processes.
func (c *Cell) peekFrom(at int) error {
	return os.NewSyscallError("setsockopt(SO_PEEK_OFF)", unix.SetsockoptInt(c.FD(), unix.SOL_SOCKET, unix.SO_PEEK_OFF, at))
}

// MaxFDs is how many descriptors one message can carry (SCM_MAX_FD in unix(7)).
const MaxFDs = 253

// send sends one message without blocking.
func send(fd int, data []byte, fds []int) syscall.Errno {
	var rights [64]byte // enough for what a usual message carries
	oob := rights[:0]
	if len(fds) > 0 {
		oob = appendRights(oob, fds)
	}
	vec := unix.Iovec{Base: &data[0], Len: uint64(len(data))}
	hdr := unix.Msghdr{Iov: &vec, Iovlen: 1}
	if len(oob) > 0 {
		hdr.Control = &oob[0]
		hdr.SetControllen(len(oob))
	}
	for {
		// Raw, since it does not sleep: the queue is in memory.
		_, _, errno := unix.RawSyscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&hdr)), unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
		if errno != unix.EINTR {
			return errno
		}
	}
}

// appendRights appends the control message that passes descriptors, like unix.UnixRights.
func appendRights(b []byte, fds []int) []byte {
	n := len(b)
	b = append(b, make([]byte, unix.CmsgSpace(4*len(fds)))...)
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[n]))
	h.Level, h.Type = unix.SOL_SOCKET, unix.SCM_RIGHTS
	h.SetLen(unix.CmsgLen(4 * len(fds)))
	for i, fd := range fds {
		*(*int32)(unsafe.Pointer(&b[n+unix.CmsgLen(4*i)])) = int32(fd)
	}
	return b
}

// receive receives one message without blocking, its descriptors close-on-exec.
func receive(fd int, data, oob []byte, flags int) (n, oobn int, errno syscall.Errno) {
	for {
		n, oobn, _, _, err := unix.Recvmsg(fd, data, oob, flags|unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
		if err == nil {
			return n, oobn, 0
		}
		if err != unix.EINTR {
			return 0, 0, err.(syscall.Errno) // as unix.Recvmsg returns it
		}
	}
}

// Passed returns the descriptors in the control data of a message.
func Passed(oob []byte) []int {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(messages) == 0 {
		return nil
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return nil
	}
	return fds
}
