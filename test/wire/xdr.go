// SPDX-License-Identifier: LGPL-2.1-or-later

package wire

import (
	"encoding/binary"
	"fmt"
)

// Payload builds arguments in XDR (RFC 4506). Its methods return the longer payload.
type Payload []byte

// Uint32 appends an unsigned (or signed) int.
func (p Payload) Uint32(v uint32) Payload { return binary.BigEndian.AppendUint32(p, v) }

// Uint64 appends an unsigned hyper.
func (p Payload) Uint64(v uint64) Payload { return binary.BigEndian.AppendUint64(p, v) }

// String appends a string: its length, its bytes, and zeros up to a multiple of four.
func (p Payload) String(s string) Payload {
	p = append(p.Uint32(uint32(len(s))), s...)
	return append(p, make([]byte, -len(s)&3)...)
}

// Bytes appends bytes as they are (fixed-length opaque data of a multiple of four, or rubbish).
func (p Payload) Bytes(b ...byte) Payload { return append(p, b...) }

// Reader takes results apart. The first failure sticks; Done reports it.
type Reader struct {
	b   []byte
	err error
}

// NewReader reads the payload of a reply.
func NewReader(payload []byte) *Reader { return &Reader{b: payload} }

func (r *Reader) take(n int, what string) []byte {
	if r.err == nil && (n < 0 || len(r.b) < n) {
		r.err = fmt.Errorf("%s of %d bytes runs past the end, %d are left", what, n, len(r.b))
	}
	if r.err != nil {
		return nil
	}
	b := r.b[:n]
	r.b = r.b[n:]
	return b
}

// Uint32 reads an unsigned int.
func (r *Reader) Uint32() uint32 {
	if b := r.take(4, "int"); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

// Int32 reads an int.
func (r *Reader) Int32() int32 { return int32(r.Uint32()) }

// Uint64 reads an unsigned hyper.
func (r *Reader) Uint64() uint64 {
	if b := r.take(8, "hyper"); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

// String reads a string and insists on zero padding, as a correct sender writes it.
func (r *Reader) String() string {
	n := r.Uint32()
	if r.err == nil && int64(n) > int64(len(r.b)) {
		r.err = fmt.Errorf("string of %d bytes runs past the end, %d are left", n, len(r.b))
	}
	s := string(r.take(int(n), "string"))
	for _, c := range r.take(-int(n)&3, "padding") {
		if c != 0 && r.err == nil {
			r.err = fmt.Errorf("padding of string %q is not zero", s)
		}
	}
	return s
}

// OptionalString reads a string that may be absent (nil).
func (r *Reader) OptionalString() *string {
	switch v := r.Uint32(); v {
	case 0:
		return nil
	case 1:
		s := r.String()
		return &s
	default:
		if r.err == nil {
			r.err = fmt.Errorf("optional string starts with %d", v)
		}
		return nil
	}
}

// Done reports the first failure, or bytes that were left over.
func (r *Reader) Done() error {
	if r.err == nil && len(r.b) > 0 {
		r.err = fmt.Errorf("%d bytes are left over", len(r.b))
	}
	return r.err
}
