// SPDX-License-Identifier: LGPL-2.1-or-later

// Package inspectclient asks a running daemon by the protocol of package inspect.
package inspectclient

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/inspect"
	"virtlockd/internal/rpc"
	"virtlockd/internal/xdr"
)

// Why a daemon can't be asked. Each is wrapped in an error that names the socket.
var (
	ErrNoDaemon = errors.New("no daemon is listening there")
	ErrDenied   = errors.New("access is denied")
	// ErrForeign is what the C daemon gives rise to, and one of ours that is older than the program.
	ErrForeign = errors.New("the daemon does not know this program")
	ErrLost    = errors.New("the daemon has closed the connection")
	// ErrBusy is what more connections than it has accepted yet give rise to.
	ErrBusy = errors.New("the daemon accepts no more connections at the moment")
	// ErrReplaced says that a list has to be read anew.
	ErrReplaced = errors.New("a live upgrade came while a list was read")
)

// Refused is the answer of a daemon that did not do what it was asked for.
type Refused struct{ Message string }

func (e *Refused) Error() string { return e.Message }

// Conn is a connection to a daemon. It is for one goroutine at a time.
type Conn struct {
	path    string
	conn    net.Conn
	serial  uint32
	timeout time.Duration
}

// Dial connects to an admin socket. timeout bounds the connecting and each answer.
func Dial(ctx context.Context, path string, timeout time.Duration) (*Conn, error) {
	d := net.Dialer{Timeout: timeout}
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("cannot reach the daemon at %s: %w", path, reason(err))
	}
	return &Conn{path: path, conn: conn, timeout: timeout}, nil
}

// reason adds what the error of a connection means.
func reason(err error) error {
	switch {
	case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ENOTDIR):
		return fmt.Errorf("%w: %w", ErrNoDaemon, err)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%w: %w", ErrDenied, err)
	case errors.Is(err, syscall.EAGAIN):
		return fmt.Errorf("%w: %w", ErrBusy, err)
	}
	return err
}

// Close closes the connection.
func (c *Conn) Close() error { return c.conn.Close() }

// ReadOnly gives up the right to change anything by this connection.
func (c *Conn) ReadOnly() error { return c.call(inspect.ReadProgram, inspect.ProcReadOnly, nil, nil) }

// Status returns how the daemon is.
func (c *Conn) Status() (*inspect.Status, error) {
	s := new(inspect.Status)
	return s, c.call(inspect.ReadProgram, inspect.ProcStatus, nil, s)
}

// Locks returns all locks, part by part. The first error is the last thing that comes: ErrReplaced if what came is to be forgotten.
func (c *Conn) Locks() iter.Seq2[*inspect.Lock, error] {
	return func(yield func(*inspect.Lock, error) bool) {
		table := int64(0)
		for from, more := 0, true; more; {
			var part inspect.Locks
			if err := c.call(inspect.ReadProgram, inspect.ProcLocks, &inspect.Part{From: from}, &part); err != nil {
				yield(nil, err)
				return
			}
			if from > 0 && part.Table != table {
				yield(nil, ErrReplaced)
				return
			}
			table = part.Table
			for i := range part.Locks {
				if !yield(&part.Locks[i], nil) {
					return
				}
			}
			more = part.Next > from // else a daemon could keep us busy for ever
			from = part.Next
		}
	}
}

// Checks has all locks checked, part by part. Errors are as for Locks.
func (c *Conn) Checks() iter.Seq2[*inspect.Checks, error] {
	return func(yield func(*inspect.Checks, error) bool) {
		table := int64(0)
		for from, more := 0, true; more; {
			part := new(inspect.Checks)
			if err := c.call(inspect.ReadProgram, inspect.ProcCheck, &inspect.Part{From: from}, part); err != nil {
				yield(nil, err)
				return
			}
			if from > 0 && part.Table != table {
				yield(nil, ErrReplaced)
				return
			}
			table = part.Table
			if !yield(part, nil) {
				return
			}
			more = part.Next > from
			from = part.Next
		}
	}
}

// Events returns the next events with a greater number.
func (c *Conn) Events(after uint64) (*inspect.Events, error) {
	e := new(inspect.Events)
	return e, c.call(inspect.ReadProgram, inspect.ProcEvents, &inspect.EventsRequest{After: after}, e)
}

// Release gives up a lock in spite of its owner.
func (c *Conn) Release(req *inspect.ReleaseRequest) (*inspect.Released, error) {
	r := new(inspect.Released)
	return r, c.call(inspect.WriteProgram, inspect.ProcRelease, req, r)
}

// Resume continues an owner who was stopped because a lock was lost.
func (c *Conn) Resume(who string) (*inspect.Owner, error) {
	o := new(inspect.Owner)
	return o, c.call(inspect.WriteProgram, inspect.ProcResume, &inspect.ResumeRequest{Who: inspect.Text(who)}, o)
}

// The frame that package rpc describes.
const (
	headerSize  = 28
	typeCall    = 0
	typeReply   = 1
	statusError = 1
	maxText     = 1 << 20
)

// call sends one call and reads its reply.
func (c *Conn) call(program, proc uint32, args, result any) error {
	frame := make([]byte, headerSize, 512)
	if args != nil {
		var err error
		if frame, err = inspect.Append(frame, args); err != nil {
			return err
		}
	}
	c.serial++
	for i, word := range []uint32{uint32(len(frame)), program, inspect.Version, proc, typeCall, c.serial, 0} {
		binary.BigEndian.PutUint32(frame[4*i:], word)
	}
	reply, err := c.exchange(frame)
	if err != nil {
		return fmt.Errorf("the daemon at %s: %w", c.path, err)
	}
	if err := c.understand(reply, result); err != nil {
		return fmt.Errorf("the daemon at %s: %w", c.path, err)
	}
	return nil
}

// exchange sends a frame and receives one.
func (c *Conn) exchange(frame []byte) ([]byte, error) {
	if err := c.conn.SetDeadline(time.Now().Add(c.timeout)); err != nil {
		return nil, err
	}
	if _, err := c.conn.Write(frame); err != nil {
		return nil, c.lost(err)
	}
	var word [4]byte
	if _, err := io.ReadFull(c.conn, word[:]); err != nil {
		return nil, c.lost(err)
	}
	n := binary.BigEndian.Uint32(word[:])
	if n < headerSize || n > headerSize+inspect.MaxReply {
		return nil, fmt.Errorf("it answers with a message of %d bytes", n)
	}
	reply := make([]byte, n)
	copy(reply, word[:])
	if _, err := io.ReadFull(c.conn, reply[4:]); err != nil {
		return nil, c.lost(err)
	}
	return reply, nil
}

// lost says what the end of a connection means. One that is closed before the first answer may be that of a peer
// whom the daemon does not serve, or the daemon has ended meanwhile.
func (c *Conn) lost(err error) error {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("no answer within %v: %w", c.timeout, err)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		if c.serial == 1 && !c.served() {
			return fmt.Errorf("%w: it has closed the connection at once", ErrDenied)
		}
		return ErrLost
	}
	return err
}

// served tells whether the daemon serves who we are. It serves its own user alone, and that is who listens: the daemon,
// or a service manager of the same user for it.
func (c *Conn) served() bool {
	u, ok := c.conn.(*net.UnixConn)
	if !ok {
		return false
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return false
	}
	var cred *unix.Ucred
	ctlErr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	return ctlErr == nil && err == nil && int(cred.Uid) == os.Geteuid()
}

// understand takes a reply apart.
func (c *Conn) understand(reply []byte, result any) error {
	word := func(i int) uint32 { return binary.BigEndian.Uint32(reply[4*i:]) }
	if word(4) != typeReply || word(5) != c.serial {
		return fmt.Errorf("its message of type %d with number %d is no answer to call %d", word(4), word(5), c.serial)
	}
	if word(6) == statusError {
		return refusal(reply[headerSize:])
	}
	if result == nil {
		return nil
	}
	return inspect.Decode(reply[headerSize:], inspect.MaxReply, result)
}

// refusal reads the beginning of an error: its code, its domain, its text.
func refusal(payload []byte) error {
	d := xdr.NewDecoder(payload)
	code, domain, text := d.Int32(), d.Int32(), d.OptionalString(maxText)
	if err := d.Err(); err != nil {
		return fmt.Errorf("its error can't be read: %w", err)
	}
	refused := &Refused{Message: "it does not say why"}
	if text != nil {
		refused.Message = *text
	}
	if code == rpc.CodeRPC && domain == rpc.DomainRPC {
		// It has no other reason to complain about a message of ours.
		return fmt.Errorf("%w: %w", ErrForeign, refused)
	}
	return refused
}
