// SPDX-License-Identifier: LGPL-2.1-or-later

package wire

import (
	"errors"
	"fmt"
)

// Error codes and domains as libvirt numbers them; only those that virtlockd sends.
const (
	CodeInternal     int32 = 1
	CodeInvalidArg   int32 = 8
	CodeDenied       int32 = 29
	CodeSystem       int32 = 38
	CodeRPC          int32 = 39
	CodeInvalidOp    int32 = 55
	CodeUnsupported  int32 = 74
	CodeResourceBusy int32 = 87
	CodeNoServer     int32 = 95
	CodeNoClient     int32 = 96

	DomainNone      int32 = 0
	DomainRPC       int32 = 7
	DomainLockspace int32 = 51
	DomainAdmin     int32 = 62
)

// Error is the payload of an error reply.
type Error struct {
	Code, Domain, Level int32
	Message             *string
	Str1, Str2, Str3    *string
	Int1, Int2          int32
}

// Error describes the error with all its fields, so that two different ones never read the same.
func (e *Error) Error() string {
	opt := func(s *string) string {
		if s == nil {
			return "-"
		}
		return fmt.Sprintf("%q", *s)
	}
	return fmt.Sprintf("code %d domain %d level %d message %s str1 %s str2 %s str3 %s int1 %d int2 %d",
		e.Code, e.Domain, e.Level, opt(e.Message), opt(e.Str1), opt(e.Str2), opt(e.Str3), e.Int1, e.Int2)
}

// Text returns the message, "" when it is absent.
func (e *Error) Text() string {
	if e.Message == nil {
		return ""
	}
	return *e.Message
}

// ParseError reads the payload of an error reply: code, domain, message, level, domain object, three strings,
// two ints and network object. virtlockd sends neither object; one that is there is an error here.
func ParseError(payload []byte) (*Error, error) {
	r := NewReader(payload)
	e := &Error{}
	absent := func(what string) {
		if v := r.Uint32(); v != 0 && r.err == nil {
			r.err = fmt.Errorf("error reply carries a %s", what)
		}
	}
	e.Code = r.Int32()
	e.Domain = r.Int32()
	e.Message = r.OptionalString()
	e.Level = r.Int32()
	absent("domain")
	e.Str1 = r.OptionalString()
	e.Str2 = r.OptionalString()
	e.Str3 = r.OptionalString()
	e.Int1 = r.Int32()
	e.Int2 = r.Int32()
	absent("network")
	if err := r.Done(); err != nil {
		return nil, fmt.Errorf("error reply does not decode: %w", err)
	}
	return e, nil
}

// AsError returns the error reply in err's chain, nil if there is none (a lost connection, say).
func AsError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return nil
}

// IsLocked tells whether err is the reply to a request for a resource that somebody holds.
func IsLocked(err error) bool { return isBusy(err, "locked") }

// IsNotLocked tells whether err is the reply to a RELEASE of what nobody holds.
func IsNotLocked(err error) bool { return isBusy(err, "not locked") }

func isBusy(err error, state string) bool {
	e := AsError(err)
	if e == nil || e.Code != CodeResourceBusy || e.Domain != DomainLockspace || e.Str2 == nil {
		return false
	}
	var tail = "' is " + state
	s := holder.ReplaceAllString(*e.Str2, "$1")
	return len(s) >= len(tail) && s[len(s)-len(tail):] == tail
}
