// SPDX-License-Identifier: LGPL-2.1-or-later

package wire

import (
	"encoding/hex"
	"strings"
	"testing"
)

// The frames below were recorded from libvirt's own client and from virtlockd 9.0.0.
func TestFrames(t *testing.T) {
	t.Parallel()
	vm := VM(0x70000001)
	for _, c := range []struct {
		name string
		got  []byte
		want string
	}{
		{"REGISTER", Request(ProcRegister, 0, RegisterArgs(vm)),
			"000000400ea7beef000000010000000100000000000000000000000011111111111111111111111111111111" +
				"00000002766d0000000000017000000100000000"},
		{"RESTRICT", Request(ProcRestrict, 1, FlagsArgs(0)),
			"000000200ea7beef000000010000000200000000000000010000000000000000"},
		{"CREATE_LOCKSPACE", Request(ProcCreateLockspace, 1, LockspaceArgs("/tmp/vlv/ls")),
			"0000002c0ea7beef00000001000000080000000000000001000000000000000b2f746d702f766c762f6c7300"},
		{"ACQUIRE_RESOURCE", Request(ProcAcquire, 2, ResourceArgs("", "/tmp/vlv/auto", Autocreate)),
			"000000380ea7beef0000000100000006000000000000000200000000000000000000000d" +
				"2f746d702f766c762f6175746f00000000000002"},
		{"PONG", Pong(), "0000001c6b6565700000000100000002000000020000000000000000"},
	} {
		if got := hex.EncodeToString(c.got); got != c.want {
			t.Errorf("%s:\n got %s\nwant %s", c.name, got, c.want)
		}
	}
}

func TestErrorReply(t *testing.T) {
	t.Parallel()
	text, template, detail := "resource busy: Lockspace resource 'a' is locked", "resource busy: %s", "Lockspace resource 'a' is locked"
	p := Payload(nil).Uint32(87).Uint32(51).Uint32(1).String(text).Uint32(2).Uint32(0).
		Uint32(1).String(template).Uint32(1).String(detail).Uint32(0).Uint32(0xffffffff).Uint32(0xffffffff).Uint32(0)
	e, err := ParseError(p)
	if err != nil {
		t.Fatal(err)
	}
	if !IsLocked(e) || IsNotLocked(e) || e.Text() != text || *e.Str1 != template || e.Int1 != -1 || e.Int2 != -1 || e.Str3 != nil {
		t.Errorf("got %v", e)
	}
	for n := range p {
		if _, err := ParseError(p[:n]); err == nil {
			t.Errorf("the first %d of %d bytes decode", n, len(p))
		}
	}
	if _, err := ParseError(append(p, 0)); err == nil || !strings.Contains(err.Error(), "left over") {
		t.Errorf("a trailing byte gives %v", err)
	}
}

func TestParse(t *testing.T) {
	t.Parallel()
	f := Request(ProcRestrict, 7, FlagsArgs(3))
	m, err := Parse(f)
	if err != nil {
		t.Fatal(err)
	}
	want := Header{Program: LockProgram, Version: 1, Proc: ProcRestrict, Serial: 7}
	if m.Header != want || string(m.Payload) != "\x00\x00\x00\x03" {
		t.Errorf("got %+v payload %x", m.Header, m.Payload)
	}
	for n := range f {
		if _, err := Parse(f[:n]); err == nil {
			t.Errorf("the first %d bytes parse", n)
		}
	}
}
