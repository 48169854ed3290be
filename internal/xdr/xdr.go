// SPDX-License-Identifier: LGPL-2.1-or-later

// Package xdr appends and consumes External Data Representation (RFC 4506) as
// libvirt's wire protocols use it.
//
// Encoding appends to a byte slice. Decoding consumes a byte slice through
// [Decoder]. Nothing is found out by reflection, and nothing is allocated on
// the word of a length field: a length is checked against the caller's bound
// and against the bytes that are there before anything else happens.
//
// The decoder is as lenient as the C library behind libvirt, because peers may
// rely on it: padding bytes must be present but may have any value, bytes
// behind the last field are left alone, a string ends at its first NUL and
// need not be UTF-8, and any word but zero is true.
package xdr

import (
	"encoding/binary"
	"errors"
)

// Unbounded as a maximum admits every length that the remaining bytes can hold.
const Unbounded = ^uint32(0)

// ErrDecode says that the bytes do not hold what was asked for: they end too
// early or a length is above its bound. It has no details on purpose: the wire
// protocols answer each such message with one and the same error.
var ErrDecode = errors.New("xdr: message is too short or a length is above its bound")

// padding returns how many bytes follow n bytes of opaque data up to the next
// multiple of four.
func padding(n int) int { return (4 - n%4) % 4 }

// AppendUint32 appends an unsigned integer.
func AppendUint32(b []byte, v uint32) []byte { return binary.BigEndian.AppendUint32(b, v) }

// AppendInt32 appends an integer.
func AppendInt32(b []byte, v int32) []byte { return binary.BigEndian.AppendUint32(b, uint32(v)) }

// AppendUint64 appends an unsigned hyper integer.
func AppendUint64(b []byte, v uint64) []byte { return binary.BigEndian.AppendUint64(b, v) }

// AppendInt64 appends a hyper integer.
func AppendInt64(b []byte, v int64) []byte { return binary.BigEndian.AppendUint64(b, uint64(v)) }

// AppendBool appends a boolean.
func AppendBool(b []byte, v bool) []byte {
	if v {
		return AppendUint32(b, 1)
	}
	return AppendUint32(b, 0)
}

// AppendString appends a string: its length, its bytes, zero padding.
func AppendString(b []byte, s string) []byte {
	b = AppendUint32(b, uint32(len(s)))
	b = append(b, s...)
	return pad(b, len(s))
}

// AppendOptionalString appends "absent" for nil, else "present" and the string.
func AppendOptionalString(b []byte, s *string) []byte {
	if s == nil {
		return AppendBool(b, false)
	}
	return AppendString(AppendBool(b, true), *s)
}

// AppendOpaque appends opaque data of fixed length: the bytes and zero padding.
func AppendOpaque(b, data []byte) []byte {
	return pad(append(b, data...), len(data))
}

// AppendBytes appends opaque data of variable length: its length, its bytes,
// zero padding.
func AppendBytes(b, data []byte) []byte {
	return AppendOpaque(AppendUint32(b, uint32(len(data))), data)
}

func pad(b []byte, n int) []byte {
	var zero [4]byte
	return append(b, zero[:padding(n)]...)
}
