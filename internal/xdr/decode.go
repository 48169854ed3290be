// SPDX-License-Identifier: LGPL-2.1-or-later

package xdr

import (
	"bytes"
	"encoding/binary"
)

// Decoder consumes values from a byte slice, front to back. After the first
// failure every call returns a zero value and Err reports the failure, so that
// a message can be taken apart in one go and checked once.
//
// The zero value is a decoder of no bytes. A Decoder may be copied to try
// something out: the copy advances alone.
type Decoder struct {
	rest   []byte
	failed bool
}

// NewDecoder returns a decoder of b. The decoder reads b and never writes to it.
func NewDecoder(b []byte) Decoder { return Decoder{rest: b} }

// Err returns nil, or ErrDecode if any call failed.
func (d *Decoder) Err() error {
	if d.failed {
		return ErrDecode
	}
	return nil
}

// Remaining returns the bytes not consumed yet, nil after a failure.
func (d *Decoder) Remaining() []byte { return d.rest }

func (d *Decoder) fail() {
	d.failed = true
	d.rest = nil
}

// Uint32 consumes an unsigned integer.
func (d *Decoder) Uint32() uint32 {
	if len(d.rest) < 4 {
		d.fail()
		return 0
	}
	v := binary.BigEndian.Uint32(d.rest)
	d.rest = d.rest[4:]
	return v
}

// Int32 consumes an integer.
func (d *Decoder) Int32() int32 { return int32(d.Uint32()) }

// Uint64 consumes an unsigned hyper integer.
func (d *Decoder) Uint64() uint64 {
	if len(d.rest) < 8 {
		d.fail()
		return 0
	}
	v := binary.BigEndian.Uint64(d.rest)
	d.rest = d.rest[8:]
	return v
}

// Int64 consumes a hyper integer.
func (d *Decoder) Int64() int64 { return int64(d.Uint64()) }

// Bool consumes a boolean; every word but zero is true.
func (d *Decoder) Bool() bool { return d.Uint32() != 0 }

// Count consumes the length word of an array of at most max elements.
func (d *Decoder) Count(max uint32) uint32 {
	n := d.Uint32()
	if n > max {
		d.fail()
		return 0
	}
	return n
}

// Fixed consumes n bytes of opaque data and their padding. The result is part
// of the decoded slice, nil after a failure.
func (d *Decoder) Fixed(n int) []byte {
	if d.failed || n < 0 || n > len(d.rest) || n+padding(n) > len(d.rest) {
		d.fail()
		return nil
	}
	v := d.rest[:n:n]
	d.rest = d.rest[n+padding(n):]
	return v
}

// Bytes consumes opaque data of variable length, at most max bytes. The result
// is part of the decoded slice.
func (d *Decoder) Bytes(max uint32) []byte {
	n := d.Count(max)
	if uint64(n) > uint64(len(d.rest)) {
		d.fail()
		return nil
	}
	return d.Fixed(int(n))
}

// StringBytes consumes a string of at most max bytes and returns it, cut at its
// first NUL, as part of the decoded slice. The bound applies to the whole string.
func (d *Decoder) StringBytes(max uint32) []byte {
	v := d.Bytes(max)
	if i := bytes.IndexByte(v, 0); i >= 0 {
		v = v[:i:i]
	}
	return v
}

// String consumes a string of at most max bytes, cut at its first NUL.
func (d *Decoder) String(max uint32) string { return string(d.StringBytes(max)) }

// OptionalString consumes a string that may be absent: nil then, and after a
// failure.
func (d *Decoder) OptionalString(max uint32) *string {
	if !d.Bool() {
		return nil
	}
	s := d.String(max)
	if d.failed {
		return nil
	}
	return &s
}
