// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"encoding/binary"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"virtlockd/internal/lease"
	"virtlockd/internal/vault"
)

// What passes over a worker's control socket (SOCK_SEQPACKET, so messages
// keep their bounds). Both ends are the same binary on one machine: native
// byte order, no versions.
//
// The worker speaks first, once: an empty reply, when it is ready. Then each
// request is one message (with cells as SCM_RIGHTS where they are needed), and so
// is each reply.

// request is what a worker is asked to do.
type request struct {
	op     workOp
	mode   Mode
	create bool
	record []byte // of workLock: to be written to a lease file; nil: none
	path   string // absolute; of workRelease: what to unlink, may be ""; of workShare: the record
	// fds are: of workLock the cell to store the file in; of workRelease, workAgain and workCheck the cell that it lies in, none if the
	// worker itself holds the lock; of workShare that cell, another one, and perhaps a pidfd to go with the file.
	fds []int
	// busy, if not nil, is told who works on it: see vault.Busy. It is not part of the message.
	busy *atomic.Uint64
}

type workOp uint8

const (
	workLock    workOp = iota + 1 // open and lock path, store it in the cell
	workRelease                   // release what is in the cell, or what the worker holds itself
	workMakeDir
	workCreate
	workUnlink
	workStat
	workCheck // look at what is in the cell, or, without one, at the file at path
	workShare // store what is in one cell in another one, with a record
	workAgain // lock what is in the cell, or what the worker holds itself, once more
)

// reply is what came of it. The errno belongs to the step.
type reply struct {
	errno       syscall.Errno
	step        step
	posix       bool // workLock, workAgain: a POSIX lock, which the worker holds itself
	id          FileID
	record      []byte        // workLock, refused: what was found in the file
	recordErrno syscall.Errno // workLock: why no record could be written
	holder      *worker       // set by the pool: the worker that holds the POSIX lock
}

// step says where an errno came from.
type step uint8

const (
	stepNone   step = iota
	stepOpen        // of workLock
	stepLock        // of workLock
	stepStore       // of workLock
	stepGone        // of workCheck
	stepNotDir      // of workMakeDir: no errno, something else is there
	stepOther       // the only step of the others
)

const (
	requestHeader = 5
	maxRequest    = requestHeader + lease.Max + max(pathMax, vault.MaxRecord)
	maxRequestFDs = 3
	replySize     = 24 // without record
	maxReply      = replySize + lease.Max
)

func appendRequest(b []byte, r request) []byte {
	b = append(b, byte(r.op), byte(r.mode), asByte(r.create))
	b = binary.NativeEndian.AppendUint16(b, uint16(len(r.record)))
	b = append(b, r.record...)
	return append(b, r.path...)
}

func parseRequest(b []byte) (request, bool) {
	if len(b) < requestHeader || len(b) > maxRequest {
		return request{}, false
	}
	n, rest := int(binary.NativeEndian.Uint16(b[3:])), b[requestHeader:]
	if n > min(len(rest), lease.Max) {
		return request{}, false
	}
	r := request{op: workOp(b[0]), mode: Mode(b[1]), create: b[2] != 0, path: string(rest[n:])}
	if n > 0 {
		r.record = rest[:n:n]
	}
	return r, r.op >= workLock && r.op <= workAgain && r.mode <= Exclusive
}

func appendReply(b []byte, r reply) []byte {
	b = binary.NativeEndian.AppendUint32(b, uint32(r.errno))
	b = append(b, byte(r.step), asByte(r.posix), asByte(r.id.Block), byte(r.recordErrno))
	b = binary.NativeEndian.AppendUint64(b, r.id.Dev)
	b = binary.NativeEndian.AppendUint64(b, r.id.Ino)
	return append(b, r.record...)
}

func parseReply(b []byte) (reply, bool) {
	if len(b) < replySize || len(b) > maxReply {
		return reply{}, false
	}
	r := reply{
		errno: syscall.Errno(binary.NativeEndian.Uint32(b)),
		step:  step(b[4]),
		posix: b[5] != 0,
		id: FileID{
			Dev:   binary.NativeEndian.Uint64(b[8:]),
			Ino:   binary.NativeEndian.Uint64(b[16:]),
			Block: b[6] != 0,
		},
		recordErrno: syscall.Errno(b[7]),
	}
	if len(b) > replySize {
		r.record = append(r.record, b[replySize:]...)
	}
	return r, true
}

func asByte(b bool) byte {
	if b {
		return 1
	}
	return 0
}

// sendMessage sends one message with descriptors.
func sendMessage(socket int, data []byte, fds ...int) error {
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	for {
		err := unix.Sendmsg(socket, data, oob, nil, unix.MSG_NOSIGNAL)
		if err != unix.EINTR {
			return err
		}
	}
}

// receiveMessage waits for a message. n 0: the other end is gone.
func receiveMessage(socket int, data, oob []byte) (n, oobn int, err error) {
	for {
		n, oobn, _, _, err = unix.Recvmsg(socket, data, oob, unix.MSG_CMSG_CLOEXEC)
		if err != unix.EINTR {
			return n, oobn, err
		}
	}
}
