// SPDX-License-Identifier: LGPL-2.1-or-later

// Package filelock takes and gives up locks on files: open file description
// (OFD) locks on byte 0, length 1, which exclude the POSIX record locks that
// the C daemon takes. Files on a known local file system are worked on
// directly; everything else, block devices above all, in worker processes,
// because a system call that hangs there would hold this whole process at
// exec and at exit, and with it every guest.
package filelock

import (
	"errors"
	"log/slog"
	"strconv"
	"syscall"
	"time"
)

// Mode says whether a lock tolerates others of its kind.
type Mode uint8

// The modes of a lock.
const (
	Shared    Mode = iota // F_RDLCK
	Exclusive             // F_WRLCK
)

// Kind is the kind of kernel lock behind a Lock.
type Kind uint8

// The kinds of kernel locks. OFD locks are the rule; POSIX ones are taken
// where the kernel or the file system refuses OFD locks.
const (
	OFD Kind = iota
	POSIX
)

// FileID names a file by what it is, not by what it is called. Two names of
// one file have the same FileID, and so have two device nodes of one disk.
type FileID struct {
	Dev, Ino uint64 // of a block device: st_rdev and 0
	Block    bool
}

// ErrLocked is in the error chain when somebody else holds a conflicting
// lock in the kernel, or, from Delete, when held said so.
var ErrLocked = errors.New("the file is locked by somebody else")

// LockedError is ErrLocked, about a file that could be looked at.
type LockedError struct {
	File FileID
	// Record of its holder (see package lease) that was found in it; nil: none.
	Record []byte
}

func (*LockedError) Error() string { return ErrLocked.Error() }
func (*LockedError) Unwrap() error { return ErrLocked }

// ErrNotDir is in the error chain when MakeDir finds something there that is
// not a directory.
var ErrNotDir = errors.New("something else than a directory is there")

// ErrClosed is in the error chain of calls after, or cut short by, Close.
var ErrClosed = errors.New("the file locks are shut down")

// The values of Error.Op: which step failed.
const (
	OpOpen   = "open"   // Lock: open, or open/create
	OpLock   = "lock"   // Lock: fcntl
	OpStore  = "store"  // Lock: keeping the locked descriptor (ETOOMANYREFS: limit of descriptors in flight)
	OpMkdir  = "mkdir"  // MakeDir
	OpCreate = "create" // Create
	OpUnlink = "unlink" // Delete and Release
	OpStat   = "stat"   // Stat
	OpUnlock = "unlock" // Release
	OpCheck  = "check"  // Check
	OpWorker = "worker" // any: there is no worker, or it died; see Err
)

// Error is the error of all methods here: which step failed, on which path,
// and why.
type Error struct {
	Op   string
	Path string
	Err  error // syscall.Errno, ErrLocked, ErrNotDir, *HungError, ErrClosed ...
}

func (e *Error) Error() string { return e.Op + " " + strconv.Quote(e.Path) + ": " + e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// wrap makes an *Error; one that only lacks its path is given it.
func wrap(op, path string, err error) *Error {
	if e, ok := err.(*Error); ok {
		e.Path = path
		return e
	}
	return &Error{op, path, err}
}

// Errno returns the error number of the system call that failed, or 0 if it
// was not a system call.
func (e *Error) Errno() syscall.Errno {
	var errno syscall.Errno
	errors.As(e.Err, &errno)
	return errno
}

// Config configures Files. The zero value is good.
type Config struct {
	Logger *slog.Logger // default: none
	Self   string       // executable of the workers, default /proc/self/exe
	Dir    string       // what relative paths are relative to, default the working directory at New
	// Waiting is called when the calling goroutine is about to wait for a worker. Default: none.
	Waiting func()

	// MaxWorkersPerMount bounds the workers that are busy on one mount (or one
	// block device), default 32. MaxWorkers bounds all, default 512.
	MaxWorkersPerMount, MaxWorkers int
	// HungAfter is how long a mount with all of its workers busy may finish no
	// call before further ones fail at once, default 2 s.
	HungAfter time.Duration
	// WorkerIdle is how long a worker waits for more work, default 30 s.
	WorkerIdle time.Duration
}

// Call is a call in progress, for logs.
type Call struct {
	Op     string // "lock", "release", "mkdir", "create", "delete", "stat", "check"
	Path   string
	Mount  string // the mount point, or the block device; "" for a direct call
	Worker int    // pid of the worker, 0 for a direct call or while it waits for one
	Since  time.Time
}

// HungError says that so many calls hang on a mount that no more are begun.
type HungError struct {
	Mount  string        // mount point, or block device; "": all of them together
	Calls  int           // how many calls are in progress there
	Oldest time.Duration // for how long the oldest of them
}

func (e *HungError) Error() string {
	where := "the file system or device " + strconv.Quote(e.Mount) + " does not answer: "
	if e.Mount == "" {
		where = "several file systems or devices do not answer: "
	}
	return where + strconv.Itoa(e.Calls) +
		" calls hang there, the oldest for " + e.Oldest.Round(time.Millisecond).String() + "; bring it back or abort it (umount -f)"
}
