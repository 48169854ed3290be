// SPDX-License-Identifier: LGPL-2.1-or-later

package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"
)

// Patience is how long a Conn waits for what must come. It only bounds a failing test.
const Patience = 15 * time.Second

// ErrClosed says that the daemon closed the connection.
var ErrClosed = errors.New("connection closed by the daemon")

// Conn is one connection to the daemon. It is not safe for concurrent use; sending and receiving are
// separate, so that tests can pipeline.
type Conn struct {
	c       *net.UnixConn
	program uint32
	serial  uint32
}

// Dial connects to a socket. program is used by Call.
func Dial(path string, program uint32) (*Conn, error) {
	c, err := net.DialTimeout("unix", path, Patience)
	if err != nil {
		return nil, err
	}
	return &Conn{c: c.(*net.UnixConn), program: program}, nil
}

// FromFile wraps a connected socket that another process made; f is closed.
func FromFile(f *os.File, program uint32) (*Conn, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("%s is not a UNIX socket", f.Name())
	}
	return &Conn{c: u, program: program}, nil
}

// Send writes bytes as they are.
func (c *Conn) Send(b []byte) error {
	if err := c.c.SetWriteDeadline(time.Now().Add(Patience)); err != nil {
		return err
	}
	_, err := c.c.Write(b)
	return closedIs(err)
}

// Recv waits for one frame. ErrClosed: there is none, and none will come.
func (c *Conn) Recv() (Message, error) { return c.RecvWithin(Patience) }

// RecvWithin is Recv with another patience; when that ends the error is os.ErrDeadlineExceeded.
func (c *Conn) RecvWithin(d time.Duration) (Message, error) {
	if err := c.c.SetReadDeadline(time.Now().Add(d)); err != nil {
		return Message{}, err
	}
	var length [4]byte
	if _, err := io.ReadFull(c.c, length[:]); err != nil {
		return Message{}, closedIs(err)
	}
	n := binary.BigEndian.Uint32(length[:])
	if n < HeaderLen || n > MaxFrame {
		return Message{}, fmt.Errorf("daemon sent length word %d", n)
	}
	frame := make([]byte, n)
	copy(frame, length[:])
	if _, err := io.ReadFull(c.c, frame[4:]); err != nil {
		return Message{}, fmt.Errorf("within a frame of %d bytes: %w", n, err)
	}
	return Parse(frame)
}

// closedIs turns the ways in which a closed peer shows into ErrClosed.
func closedIs(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		return ErrClosed
	}
	return err
}

// Call sends one request of the connection's program and waits for its reply. A reply that does not belong to
// the request is an error. The result's Err is what the daemon answered.
func (c *Conn) Call(proc uint32, args []byte) (Message, error) {
	h := Header{Program: c.program, Version: Version, Proc: proc, Type: TypeCall, Serial: c.serial}
	c.serial++
	if err := c.Send(Frame(h, args)); err != nil {
		return Message{}, err
	}
	m, err := c.Recv()
	if err != nil {
		return m, err
	}
	if m.Program != h.Program || m.Version != h.Version || m.Proc != h.Proc || m.Serial != h.Serial || m.Type != TypeReply {
		return m, fmt.Errorf("reply does not belong to the request %+v: %s", h, m)
	}
	return m, nil
}

// call is Call for procedures whose answer matters only as success or error.
func (c *Conn) call(proc uint32, args []byte) error {
	m, err := c.Call(proc, args)
	if err != nil {
		return err
	}
	if err := m.Err(); err != nil {
		return err
	}
	if len(m.Payload) > 0 {
		return fmt.Errorf("reply has a payload of %d bytes where none belongs", len(m.Payload))
	}
	return nil
}

// Ping sends a keepalive request and waits for its answer. Since a daemon answers the requests of one
// connection in order, it is a fence: all earlier ones are done.
func (c *Conn) Ping() error {
	if err := c.Send(Ping()); err != nil {
		return err
	}
	m, err := c.Recv()
	if err != nil {
		return err
	}
	if string(m.Raw) != string(Pong()) {
		return fmt.Errorf("PING is answered by %s", m)
	}
	return nil
}

// CloseWrite ends our direction.
func (c *Conn) CloseWrite() error { return c.c.CloseWrite() }

// Close closes the connection. Closing twice is harmless.
func (c *Conn) Close() {
	// The only error is that it is closed already.
	_ = c.c.Close()
}

// SyscallConn gives access to the descriptor.
func (c *Conn) SyscallConn() (syscall.RawConn, error) { return c.c.SyscallConn() }

// File returns a copy of the descriptor, to be handed to another process.
func (c *Conn) File() (*os.File, error) { return c.c.File() }
