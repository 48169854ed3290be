// SPDX-License-Identifier: LGPL-2.1-or-later

// Package wire is a small black-box client of the wire protocol that virtlockd speaks: frames, error
// replies, keepalive, and the calls of the lock and the admin program. It is written from the public
// protocol facts alone and shares no code with the daemon, so that tests can use it as the oracle.
package wire

import (
	"encoding/binary"
	"fmt"
)

// Programs and their only version.
const (
	LockProgram      uint32 = 0x0ea7beef
	AdminProgram     uint32 = 0x06900690
	KeepaliveProgram uint32 = 0x6b656570
	Version          uint32 = 1
)

// Message types of a frame's header.
const (
	TypeCall        uint32 = 0
	TypeReply       uint32 = 1
	TypeMessage     uint32 = 2
	TypeStream      uint32 = 3
	TypeCallWithFDs uint32 = 4
)

// Status of a reply.
const (
	StatusOK    uint32 = 0
	StatusError uint32 = 1
)

// HeaderLen is the number of bytes before the payload: the length word and the six words of the header.
const HeaderLen = 28

// MaxFrame bounds what this client accepts from a daemon: the protocol's 32 MiB and the length word.
const MaxFrame = 32<<20 + 4

// Header is what follows the length word of a frame.
type Header struct {
	Program, Version, Proc, Type, Serial, Status uint32
}

// Frame returns the bytes of one message, with its length word.
func Frame(h Header, payload []byte) []byte {
	return FrameLen(uint32(HeaderLen+len(payload)), h, payload)
}

// FrameLen is Frame with a length word of the caller's choice, for malformed frames.
func FrameLen(length uint32, h Header, payload []byte) []byte {
	b := make([]byte, 0, HeaderLen+len(payload))
	for _, w := range []uint32{length, h.Program, h.Version, h.Proc, h.Type, h.Serial, h.Status} {
		b = binary.BigEndian.AppendUint32(b, w)
	}
	return append(b, payload...)
}

// Ping returns a keepalive request; its answer is Pong.
func Ping() []byte {
	return Frame(Header{Program: KeepaliveProgram, Version: Version, Proc: 1, Type: TypeMessage}, nil)
}

// Pong returns the answer to a Ping.
func Pong() []byte {
	return Frame(Header{Program: KeepaliveProgram, Version: Version, Proc: 2, Type: TypeMessage}, nil)
}

// Message is a received frame.
type Message struct {
	Header
	Payload []byte
	Raw     []byte // the whole frame, with its length word
}

// Parse splits a whole frame.
func Parse(frame []byte) (Message, error) {
	if len(frame) < HeaderLen {
		return Message{}, fmt.Errorf("frame of %d bytes has no whole header", len(frame))
	}
	if n := binary.BigEndian.Uint32(frame); int64(n) != int64(len(frame)) {
		return Message{}, fmt.Errorf("length word says %d, frame has %d bytes", n, len(frame))
	}
	w := func(i int) uint32 { return binary.BigEndian.Uint32(frame[4*i:]) }
	return Message{
		Header:  Header{Program: w(1), Version: w(2), Proc: w(3), Type: w(4), Serial: w(5), Status: w(6)},
		Payload: frame[HeaderLen:],
		Raw:     frame,
	}, nil
}

// Err returns the error that an error reply carries, nil for any other message. An error reply that does not
// decode to its last byte gives an error of another type.
func (m Message) Err() error {
	if m.Status == StatusOK {
		return nil
	}
	e, err := ParseError(m.Payload)
	if err != nil {
		return fmt.Errorf("reply to procedure %d with status %d: %w", m.Proc, m.Status, err)
	}
	return e
}

// String describes the message in one line, for the output of a failed test.
func (m Message) String() string {
	what := fmt.Sprintf("payload %x", m.Payload)
	if m.Status != StatusOK {
		what = m.Err().Error()
	}
	return fmt.Sprintf("program %#x version %d procedure %d type %d serial %d status %d: %s",
		m.Program, m.Version, m.Proc, m.Type, m.Serial, m.Status, what)
}
