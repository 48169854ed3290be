// SPDX-License-Identifier: LGPL-2.1-or-later

package rpc

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"virtlockd/internal/xdr"
)

// Error codes that go over the wire, as libvirt numbers them.
const (
	CodeInternal            int32 = 1  // "internal error: %s"
	CodeInvalidArg          int32 = 8  // "invalid argument: %s", and unsupported flags
	CodeOperationDenied     int32 = 29 // "operation forbidden: %s"
	CodeSystem              int32 = 38 // a failed system call
	CodeRPC                 int32 = 39 // the message itself was wrong
	CodeOperationInvalid    int32 = 55 // "Requested operation is not valid: %s"
	CodeArgumentUnsupported int32 = 74 // "argument unsupported: %s"
	CodeResourceBusy        int32 = 87 // "resource busy: %s"
	CodeNoServer            int32 = 95 // "Server not found: %s"
	CodeNoClient            int32 = 96 // "Client not found: %s"
)

// Error domains that go over the wire: the part of libvirt that an error is
// from.
const (
	DomainNone      int32 = 0
	DomainRPC       int32 = 7
	DomainLockspace int32 = 51
	DomainAdmin     int32 = 62
)

// levelError is the only level that goes over the wire.
const levelError = 2

// Error is an error reply. The peer gets all of its fields.
type Error struct {
	Code, Domain     int32
	Message          string
	Str1, Str2, Str3 *string // nil: absent
	Int1, Int2       int32
}

// Error returns the message.
func (e *Error) Error() string { return e.Message }

var (
	// ErrNoProc is returned by Program.Call for a procedure that it does not
	// have. The server answers "unknown procedure: %d".
	ErrNoProc = errors.New("rpc: unknown procedure")

	// ErrDecode is returned by Program.Call for arguments that do not decode.
	// The server answers "Unable to decode message payload". xdr.ErrDecode does
	// the same.
	ErrDecode = fmt.Errorf("rpc: arguments: %w", xdr.ErrDecode)
)

// Ordinary returns an error in the usual shape: the template, which contains one
// %s, filled with the detail.
func Ordinary(code, domain int32, template, detail string) *Error {
	return &Error{
		Code: code, Domain: domain,
		Message: strings.Replace(template, "%s", detail, 1),
		Str1:    &template, Str2: &detail,
		Int1: -1, Int2: -1,
	}
}

// System returns the error of a failed system call. The message is complete:
// it contains the error's text.
func System(domain int32, errno unix.Errno, message string) *Error {
	return &Error{
		Code: CodeSystem, Domain: domain,
		Message: message,
		Str1:    ptr("%s"), Str2: &message,
		Int1: int32(errno), Int2: -1,
	}
}

// Protocol returns the error for a message that is not as the protocol wants it.
func Protocol(message string) *Error {
	return &Error{
		Code: CodeRPC, Domain: DomainRPC,
		Message: message,
		Str1:    ptr("%s"), Str2: &message,
		Int1: -1, Int2: -1,
	}
}

// BadFlags returns the error for flags that a procedure does not know. The
// function is the C daemon's name for it; unknown has the unknown bits only.
func BadFlags(function string, domain int32, unknown uint32) *Error {
	return &Error{
		Code: CodeInvalidArg, Domain: domain,
		Message: fmt.Sprintf("unsupported flags (0x%x) in function %s", unknown, function),
		Str1:    &function, Str2: ptr("flags"),
	}
}

func ptr(s string) *string { return &s }

// appendError appends the payload of an error reply.
func appendError(b []byte, e *Error) []byte {
	b = xdr.AppendInt32(b, e.Code)
	b = xdr.AppendInt32(b, e.Domain)
	b = xdr.AppendOptionalString(b, &e.Message)
	b = xdr.AppendInt32(b, levelError)
	b = xdr.AppendBool(b, false) // the domain object that the error is about
	b = xdr.AppendOptionalString(b, e.Str1)
	b = xdr.AppendOptionalString(b, e.Str2)
	b = xdr.AppendOptionalString(b, e.Str3)
	b = xdr.AppendInt32(b, e.Int1)
	b = xdr.AppendInt32(b, e.Int2)
	return xdr.AppendBool(b, false) // the network object
}
