// SPDX-License-Identifier: LGPL-2.1-or-later

package wire

import "regexp"

// holder is what ours says behind the C daemon's "is locked" (D-holder in docs/differences.md).
var holder = regexp.MustCompile(`(' is locked): (?:held (?:exclusively|shared) by domain "[^[:cntrl:]]*" \(UUID [0-9a-f-]{36}, pid -?\d+\) on host "[^[:cntrl:]]+"` +
	`(?: since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)?(?:, as its lease file says)?(?:, and \d+ more)?(?:; the disk is "[^[:cntrl:]]+")?|the disk is "[^[:cntrl:]]+")$`)

// WithoutHolder returns the message without who holds a resource and its disk, if it is an error that has it in the right form: then
// it is what the C daemon sends.
func WithoutHolder(m Message) Message {
	if m.Type != TypeReply || m.Status != StatusError {
		return m
	}
	e, err := ParseError(m.Payload)
	if err != nil || e.Code != CodeResourceBusy || e.Str1 == nil || e.Str2 == nil || e.Str3 != nil || e.Message == nil {
		return m
	}
	detail := holder.ReplaceAllString(*e.Str2, "$1")
	if detail == *e.Str2 || *e.Message != "resource busy: "+*e.Str2 {
		return m
	}
	p := Payload(nil).Uint32(uint32(e.Code)).Uint32(uint32(e.Domain)).
		Uint32(1).String("resource busy: " + detail).Uint32(uint32(e.Level)).Uint32(0).
		Uint32(1).String(*e.Str1).Uint32(1).String(detail).Uint32(0).
		Uint32(uint32(e.Int1)).Uint32(uint32(e.Int2)).Uint32(0)
	out, err := Parse(Frame(m.Header, p))
	if err != nil {
		return m
	}
	return out
}
