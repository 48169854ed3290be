// SPDX-License-Identifier: LGPL-2.1-or-later

package adminproto

import (
	"errors"
	"fmt"
	"strconv"

	"golang.org/x/sys/unix"

	"virtlockd/internal/logging"
	"virtlockd/internal/owner"
	"virtlockd/internal/rpc"
)

// Templates of libvirt's error codes.
const (
	internalError   = "internal error: %s"
	invalidArgument = "invalid argument: %s"
	unsupported     = "argument unsupported: %s"
	invalid         = "Requested operation is not valid: %s"
	noServer        = "Server not found: %s"
	noClient        = "Client not found: %s"
)

var (
	errNoTLS     = rpc.Ordinary(rpc.CodeInternal, rpc.DomainRPC, internalError, "no tls service found, unable to update tls files")
	errMinAboveM = rpc.Ordinary(rpc.CodeInvalidArg, rpc.DomainNone, invalidArgument, "minWorkers cannot be larger than maxWorkers")
	errNoPool    = rpc.Ordinary(rpc.CodeInvalidArg, rpc.DomainNone, invalidArgument, "maxWorkers must not be switched from zero to non-zero and vice versa")
	// The C daemon has it the wrong way round; peers may look for the text.
	errUnauthAboveMax = rpc.Ordinary(rpc.CodeInvalidArg, rpc.DomainRPC, invalidArgument,
		"The overall maximum number of clients waiting for authentication must not be less than the overall maximum number of clients")
	// No client of the C daemon can be one.
	errReadOnly = rpc.Ordinary(rpc.CodeOperationDenied, rpc.DomainAdmin, "operation forbidden: %s", "this connection is read only")
	errTooLong  = rpc.Protocol("Unable to encode message payload")
)

// wording is how a procedure says that there is no such server or client: some hand on what their
// helpers say, some have their own words.
type wording uint8

const (
	handedOn wording = iota
	reworded
)

func (w wording) server(name string) error {
	if w == reworded {
		return rpc.Ordinary(rpc.CodeNoServer, rpc.DomainAdmin, noServer, "no server with matching name '"+name+"' found")
	}
	return rpc.Ordinary(rpc.CodeNoServer, rpc.DomainRPC, noServer, "No server named '"+name+"'")
}

func (w wording) client(id uint64) error {
	number := strconv.FormatUint(id, 10)
	if w == reworded {
		return rpc.Ordinary(rpc.CodeNoClient, rpc.DomainAdmin, noClient, "no client with matching id '"+number+"' found")
	}
	return rpc.Ordinary(rpc.CodeNoClient, rpc.DomainRPC, noClient, "No client with matching ID '"+number+"'")
}

// LocksHeldError is why a daemon does not shut down: it would give up locks of guests that run.
type LocksHeldError struct {
	Locks int // how many are held
}

// Error says how many locks are held, and how to go on.
func (e *LocksHeldError) Error() string {
	held := fmt.Sprintf("%d locks are held", e.Locks)
	if e.Locks == 1 {
		held = "1 lock is held"
	}
	return held + " and would be lost; stop, migrate or suspend the guests first; to replace the program use the live upgrade (SIGUSR1), which keeps them"
}

// guardedError refuses to disconnect a guest.
func guardedError(id uint64, guest *owner.Details) error {
	return rpc.Ordinary(rpc.CodeOperationInvalid, rpc.DomainAdmin, invalid, fmt.Sprintf(
		"client '%d' is the running guest '%s' (uuid %s, pid %d) itself, which holds locks; stop or migrate the guest instead",
		id, guest.Name, guest.UUIDString(), guest.PID))
}

func tooManyClients(n int) error {
	return rpc.Ordinary(rpc.CodeInternal, rpc.DomainAdmin, internalError,
		fmt.Sprintf("Too many clients '%d' for limit '%d'", n, maxList))
}

// wireError words an error as the C daemon does. Where it has no such error, the code is the
// nearest that libvirt has.
func wireError(err error) *rpc.Error {
	if wire := (*rpc.Error)(nil); errors.As(err, &wire) {
		return wire
	}
	if setting := (*logging.InvalidError)(nil); errors.As(err, &setting) {
		return rpc.Ordinary(rpc.CodeInvalidArg, rpc.DomainNone, invalidArgument, setting.Detail)
	}
	if output := (*logging.OpenError)(nil); errors.As(err, &output) {
		var errno unix.Errno
		errors.As(output.Err, &errno)
		return rpc.System(rpc.DomainNone, errno, output.Error())
	}
	return rpc.Ordinary(rpc.CodeOperationInvalid, rpc.DomainAdmin, invalid, err.Error())
}
