// SPDX-License-Identifier: LGPL-2.1-or-later

package xdr

import (
	"bytes"
	"encoding/hex"
	"math"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestAppend(t *testing.T) {
	t.Parallel()
	str := func(s string) *string { return &s }
	for _, tt := range []struct {
		name string
		got  []byte
		want string
	}{
		{"uint32", AppendUint32(nil, 0x01020304), "01020304"},
		{"int32", AppendInt32(nil, -2), "fffffffe"},
		{"uint64", AppendUint64(nil, 0x0102030405060708), "0102030405060708"},
		{"int64", AppendInt64(nil, -2), "fffffffffffffffe"},
		{"true", AppendBool(nil, true), "00000001"},
		{"false", AppendBool(nil, false), "00000000"},
		{"empty string", AppendString(nil, ""), "00000000"},
		{"padded string", AppendString(nil, "vm"), "00000002766d0000"},
		{"whole string", AppendString(nil, "disk"), "000000046469736b"},
		{"absent string", AppendOptionalString(nil, nil), "00000000"},
		{"present string", AppendOptionalString(nil, str("a")), "000000010000000161000000"},
		{"opaque", AppendOpaque(nil, []byte{1, 2, 3}), "01020300"},
		{"bytes", AppendBytes(nil, []byte{1, 2, 3, 4, 5}), "000000050102030405000000"},
		{"appended", AppendUint32([]byte{0xff}, 1), "ff00000001"},
	} {
		if got := hex.EncodeToString(tt.got); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
	}
}

func TestLenient(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, in, want string }{
		{"cut at NUL", "00000006" + "2f61007461696c0000000000"[:12] + "ffff", "/a"},
		{"padding of any value", "00000002766dffee", "vm"},
		{"not UTF-8", "00000002ff800000", "\xff\x80"},
		{"only a NUL", "0000000100000000", ""},
		{"bytes behind it", "00000000deadbeef", ""},
	} {
		in, err := hex.DecodeString(tt.in)
		if err != nil {
			t.Fatal(tt.name, err)
		}
		d := NewDecoder(in)
		if got := d.String(100); got != tt.want || d.Err() != nil {
			t.Errorf("%s: %q, %v, want %q", tt.name, got, d.Err(), tt.want)
		}
	}
	d := NewDecoder([]byte{0, 0, 0, 0, 0, 0, 0, 2, 0x80, 0, 0, 0})
	if d.Bool() || !d.Bool() || !d.Bool() || d.Err() != nil {
		t.Error("any word but zero is true")
	}
}

func TestBounds(t *testing.T) {
	t.Parallel()
	five := AppendString(nil, "abcde")
	for _, tt := range []struct {
		name   string
		decode func(d *Decoder)
		in     []byte
		ok     bool
	}{
		{"string at its bound", func(d *Decoder) { d.String(5) }, five, true},
		{"string above its bound", func(d *Decoder) { d.String(4) }, five, false},
		{"the bound is for the whole string", func(d *Decoder) { d.String(4) }, AppendString(nil, "a\x00cde"), false},
		{"padding is missing", func(d *Decoder) { d.String(5) }, five[:len(five)-1], false},
		{"length 2^32-1", func(d *Decoder) { d.String(Unbounded) }, AppendUint32(nil, math.MaxUint32), false},
		{"length 2^32-4", func(d *Decoder) { d.Bytes(Unbounded) }, AppendUint32(nil, math.MaxUint32-3), false},
		{"length 2^31", func(d *Decoder) { d.Bytes(Unbounded) }, AppendUint32(nil, 1<<31), false},
		{"count at its bound", func(d *Decoder) { d.Count(3) }, AppendUint32(nil, 3), true},
		{"count above its bound", func(d *Decoder) { d.Count(3) }, AppendUint32(nil, 4), false},
		{"nothing fixed", func(d *Decoder) { d.Fixed(0) }, nil, true},
		{"fixed, too short", func(d *Decoder) { d.Fixed(16) }, make([]byte, 15), false},
		{"fixed, negative", func(d *Decoder) { d.Fixed(-1) }, make([]byte, 15), false},
		{"fixed, very long", func(d *Decoder) { d.Fixed(math.MaxInt) }, make([]byte, 15), false},
	} {
		d := NewDecoder(tt.in)
		tt.decode(&d)
		if (d.Err() == nil) != tt.ok {
			t.Errorf("%s: %v", tt.name, d.Err())
		}
	}
}

// TestSticky: after a failure nothing is decoded any more.
func TestSticky(t *testing.T) {
	t.Parallel()
	d := NewDecoder(bytes.Repeat([]byte{0, 0, 0, 1}, 20))
	if d.Count(0); d.Err() != ErrDecode {
		t.Fatal(d.Err())
	}
	if d.Uint32() != 0 || d.Int32() != 0 || d.Uint64() != 0 || d.Int64() != 0 || d.Bool() || d.Count(9) != 0 ||
		d.String(9) != "" || d.OptionalString(9) != nil || d.Fixed(0) != nil || d.Bytes(9) != nil || d.Remaining() != nil {
		t.Error("a value after the failure")
	}
	if d.Err() != ErrDecode {
		t.Error("the failure is forgotten")
	}
}

// field is one value of a random message.
type field struct {
	encode func([]byte) []byte
	decode func(*Decoder) bool // and compare
}

func fields() *rapid.Generator[field] {
	text := rapid.Map(rapid.SliceOfN(rapid.ByteRange(1, 255), 0, 40), func(b []byte) string { return string(b) })
	return rapid.OneOf(
		rapid.Map(rapid.Uint32(), func(v uint32) field {
			return field{func(b []byte) []byte { return AppendUint32(b, v) }, func(d *Decoder) bool { return d.Uint32() == v }}
		}),
		rapid.Map(rapid.Int32(), func(v int32) field {
			return field{func(b []byte) []byte { return AppendInt32(b, v) }, func(d *Decoder) bool { return d.Int32() == v }}
		}),
		rapid.Map(rapid.Uint64(), func(v uint64) field {
			return field{func(b []byte) []byte { return AppendUint64(b, v) }, func(d *Decoder) bool { return d.Uint64() == v }}
		}),
		rapid.Map(rapid.Int64(), func(v int64) field {
			return field{func(b []byte) []byte { return AppendInt64(b, v) }, func(d *Decoder) bool { return d.Int64() == v }}
		}),
		rapid.Map(rapid.Bool(), func(v bool) field {
			return field{func(b []byte) []byte { return AppendBool(b, v) }, func(d *Decoder) bool { return d.Bool() == v }}
		}),
		rapid.Map(text, func(v string) field {
			return field{func(b []byte) []byte { return AppendString(b, v) }, func(d *Decoder) bool { return d.String(40) == v }}
		}),
		rapid.Map(rapid.Ptr(text, true), func(v *string) field {
			return field{func(b []byte) []byte { return AppendOptionalString(b, v) }, func(d *Decoder) bool {
				got := d.OptionalString(40)
				return (got == nil) == (v == nil) && (got == nil || *got == *v)
			}}
		}),
		rapid.Map(rapid.SliceOfN(rapid.Byte(), 1, 40), func(v []byte) field {
			return field{func(b []byte) []byte { return AppendOpaque(b, v) }, func(d *Decoder) bool { return bytes.Equal(d.Fixed(len(v)), v) }}
		}),
		rapid.Map(rapid.SliceOfN(rapid.Byte(), 0, 40), func(v []byte) field {
			return field{func(b []byte) []byte { return AppendBytes(b, v) }, func(d *Decoder) bool { return bytes.Equal(d.Bytes(40), v) }}
		}),
	)
}

// TestRoundTrip: what was encoded decodes to the same values, and no strict
// prefix of it decodes at all.
func TestRoundTrip(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		all := rapid.SliceOfN(fields(), 1, 8).Draw(t, "fields")
		var b []byte
		for _, f := range all {
			b = f.encode(b)
		}
		d := NewDecoder(b)
		for i, f := range all {
			if !f.decode(&d) {
				t.Fatalf("field %d differs", i)
			}
		}
		if d.Err() != nil || len(d.Remaining()) != 0 {
			t.Fatal(d.Err(), d.Remaining())
		}
		for n := range b {
			d := NewDecoder(b[:n])
			for _, f := range all {
				f.decode(&d)
			}
			if d.Err() == nil {
				t.Fatalf("%d of %d bytes decode", n, len(b))
			}
		}
	})
}

// FuzzDecoder decodes anything as anything: no panic, and never more than there is.
func FuzzDecoder(f *testing.F) {
	// REGISTER: uuid, name, id, pid, flags; and one with a length beyond the end.
	for _, s := range []string{
		"1111111111111111111111111111111100000002766d0000000000017000000100000000",
		"11111111111111111111111111111111ffffffff766d0000000000017000000100000000",
	} {
		b, err := hex.DecodeString(s)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, []byte{7, 5, 0, 0, 0})
	}
	f.Fuzz(func(t *testing.T, in, ops []byte) {
		orig := bytes.Clone(in)
		d := NewDecoder(in)
		for _, op := range ops {
			before, failed := len(d.Remaining()), d.Err() != nil
			n := 0
			bound := uint32(op) * uint32(op) * uint32(op) * uint32(op)
			switch op % 9 {
			case 0:
				d.Uint32()
			case 1:
				d.Uint64()
			case 2:
				d.Bool()
			case 3:
				d.Count(bound)
			case 4:
				s := d.StringBytes(bound)
				if bytes.IndexByte(s, 0) >= 0 {
					t.Error("a NUL in a string")
				}
				n = len(s)
			case 5:
				n = len(d.String(bound))
			case 6:
				if s := d.OptionalString(bound); s != nil {
					n = len(*s)
				}
			case 7:
				n = len(d.Fixed(int(op)))
			case 8:
				n = len(d.Bytes(bound))
			}
			after := len(d.Remaining())
			if n > before || after > before || failed && (after > 0 || d.Err() == nil) {
				t.Fatalf("operation %d: %d bytes from %d, %d left, %v", op%9, n, before, after, d.Err())
			}
			if d.Err() == nil && (before-after)%4 != 0 {
				t.Fatalf("operation %d took %d bytes", op%9, before-after)
			}
		}
		if !bytes.Equal(in, orig) {
			t.Error("the input was changed")
		}
	})
}

// TestNoAllocations: only strings are allocated.
func TestNoAllocations(t *testing.T) {
	b := AppendString(AppendUint64(nil, 1), strings.Repeat("x", 100))
	out := make([]byte, 0, 1000)
	if n := testing.AllocsPerRun(100, func() {
		d := NewDecoder(b)
		d.Uint64()
		name := d.StringBytes(100)
		if d.Err() != nil || len(name) != 100 {
			t.Error("not decoded")
		}
		AppendBytes(AppendUint32(out, 1), name)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkDecode(b *testing.B) {
	m, err := hex.DecodeString("1111111111111111111111111111111100000002766d0000000000017000000100000000")
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		d := NewDecoder(m)
		d.Fixed(16)
		_ = d.String(65536)
		d.Uint32()
		d.Uint32()
		d.Uint32()
		if d.Err() != nil {
			b.Fatal(d.Err())
		}
	}
}
