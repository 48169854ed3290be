// SPDX-License-Identifier: LGPL-2.1-or-later

package rpc

import "encoding/binary"

// A message on the wire, all words big-endian:
//
//	0       4       8       12      16      20      24      28
//	+-------+-------+-------+-------+-------+-------+-------+--- - -
//	| length| prog  | vers  | proc  | type  | serial| status| payload
//	+-------+-------+-------+-------+-------+-------+-------+--- - -
//
// The length counts the whole message, itself included. The payload of a
// typeCallFDs begins with the number of descriptors that follow the message,
// each with one byte of its own.
const (
	lengthSize = 4
	headerSize = 28

	// maxLength is the largest length word that the protocol admits. A message
	// that long is accepted as the C daemon does it; how much of it is kept is
	// Config.MaxMessage.
	maxLength = 32<<20 + lengthSize

	// maxDescriptors is how many descriptors may come with one call.
	maxDescriptors = 32
)

// Message types.
const (
	typeCall    = 0
	typeReply   = 1
	typeMessage = 2
	typeStream  = 3
	typeCallFDs = 4
)

// Message status.
const (
	statusOK    = 0
	statusError = 1
)

// The keepalive program, served on every socket.
const (
	keepaliveProgram = 0x6b656570
	keepaliveVersion = 1
	keepalivePing    = 1
	keepalivePong    = 2
)

// header is the fixed part of a message behind its length word.
type header struct {
	program, version, proc, kind, serial, status uint32
}

// parseHeader reads the header of a message of at least headerSize bytes.
func parseHeader(m []byte) header {
	_ = m[headerSize-1]
	return header{
		program: binary.BigEndian.Uint32(m[4:]),
		version: binary.BigEndian.Uint32(m[8:]),
		proc:    binary.BigEndian.Uint32(m[12:]),
		kind:    binary.BigEndian.Uint32(m[16:]),
		serial:  binary.BigEndian.Uint32(m[20:]),
		status:  binary.BigEndian.Uint32(m[24:]),
	}
}

// put fills in the first headerSize bytes of m, a complete message.
func (h *header) put(m []byte) {
	_ = m[headerSize-1]
	binary.BigEndian.PutUint32(m[0:], uint32(len(m)))
	binary.BigEndian.PutUint32(m[4:], h.program)
	binary.BigEndian.PutUint32(m[8:], h.version)
	binary.BigEndian.PutUint32(m[12:], h.proc)
	binary.BigEndian.PutUint32(m[16:], h.kind)
	binary.BigEndian.PutUint32(m[20:], h.serial)
	binary.BigEndian.PutUint32(m[24:], h.status)
}
