// SPDX-License-Identifier: LGPL-2.1-or-later

package logging

import (
	"errors"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// pollTime is for how long, in milliseconds, an output that isn't ready is waited for before looking whether to give up.
const pollTime = 250

// pipeBuf is how much a pipe that is ready takes without blocking, and at once (PIPE_BUF of pipe(7)).
const pipeBuf = 4096

// errGivenUp is the loss of records that waited for an output when it was closed.
var errGivenUp = errors.New("the output was blocked")

// writable waits until fd takes data; false if it doesn't yet.
func writable(fd int) (bool, error) {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, pollTime)
	if err == unix.EINTR {
		return false, nil
	}
	return n > 0, err
}

// lineWriter writes lines to a descriptor.
type lineWriter struct {
	fd         int
	pid        int
	unfinished bool // the last line is only there in part
	writing    atomic.Bool
}

// write writes r as a line. With wait set it makes sure before each piece that the descriptor takes it.
func (w *lineWriter) write(r *record, stop *atomic.Bool, wait bool) error {
	b := make([]byte, 0, len(r.text)+128)
	if w.unfinished {
		b = append(b, '\n')
	}
	if !r.time.IsZero() {
		b = r.time.UTC().AppendFormat(b, "2006-01-02 15:04:05.000+0000: ")
	}
	b = r.appendLine(b, w.pid)
	for len(b) > 0 {
		piece := b
		if wait {
			piece = b[:min(len(b), pipeBuf)]
			if err := w.await(stop); err != nil {
				return err
			}
		}
		w.writing.Store(true)
		n, err := unix.Write(w.fd, piece)
		w.writing.Store(false)
		switch err {
		case nil:
			b = b[n:]
			w.unfinished = len(b) > 0
		case unix.EINTR:
		case unix.EAGAIN:
			wait = true
		default:
			return err
		}
	}
	return nil
}

// inWrite tells whether a write(2) is under way. One to a disk that hangs can't be interrupted.
func (w *lineWriter) inWrite() bool { return w.writing.Load() }

func (w *lineWriter) await(stop *atomic.Bool) error {
	for !stop.Load() {
		if ok, err := writable(w.fd); ok || err != nil {
			return err
		}
	}
	return errGivenUp
}

// stderr is the output of that name. Its descriptor is shared with other processes, so it can't be made non-blocking.
type stderr struct{ lineWriter }

func (w *stderr) write(r *record, stop *atomic.Bool) error { return w.lineWriter.write(r, stop, true) }
func (w *stderr) reopen() error                            { return nil }
func (w *stderr) renew() bool                              { return false }
func (w *stderr) close()                                   {}

// file is a log file.
type file struct {
	lineWriter // its fd is the sink's goroutine's
	path       string

	mu     sync.Mutex
	next   int // opened by reopen, to be taken over by renew; -1 if none
	closed bool
}

// openFile opens a log file, *OpenError if it can't.
func openFile(path string, pid int) (*file, error) {
	fd, err := openLog(path)
	if err != nil {
		return nil, err
	}
	return &file{lineWriter: lineWriter{fd: fd, pid: pid}, path: path, next: -1}, nil
}

// openLog opens for appending. O_NONBLOCK is for named pipes and terminals.
func openLog(path string) (int, error) {
	for {
		fd, err := unix.Open(path, unix.O_WRONLY|unix.O_APPEND|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY, 0o600)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return -1, &OpenError{Path: path, Err: err}
		}
		return fd, nil
	}
}

func (f *file) write(r *record, stop *atomic.Bool) error { return f.lineWriter.write(r, stop, false) }

func (f *file) reopen() error {
	fd, err := openLog(f.path)
	if err != nil {
		return err
	}
	f.mu.Lock()
	unwanted := f.next
	if f.closed {
		unwanted = fd
	} else {
		f.next = fd
	}
	f.mu.Unlock()
	closeFD(unwanted)
	return nil
}

func (f *file) renew() bool {
	f.mu.Lock()
	next := f.next
	f.next = -1
	f.mu.Unlock()
	if next < 0 {
		return false
	}
	if sameFile(f.fd, next) {
		closeFD(next)
		return false
	}
	closeFD(f.fd)
	f.fd, f.unfinished = next, false
	return true
}

func (f *file) close() {
	f.mu.Lock()
	f.closed = true
	next := f.next
	f.mu.Unlock()
	closeFD(f.fd)
	closeFD(next)
}

// sameFile reports whether both descriptors are of one file.
func sameFile(a, b int) bool {
	var sa, sb unix.Stat_t
	return unix.Fstat(a, &sa) == nil && unix.Fstat(b, &sb) == nil && sa.Dev == sb.Dev && sa.Ino == sb.Ino
}

// closeFD closes fd if it is one. Errors (of a network file system's late writes) come too late to do anything about.
func closeFD(fd int) {
	if fd >= 0 {
		_ = unix.Close(fd)
	}
}
