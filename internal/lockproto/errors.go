// SPDX-License-Identifier: LGPL-2.1-or-later

package lockproto

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"virtlockd/internal/filelock"
	"virtlockd/internal/lockspace"
	"virtlockd/internal/logging"
	"virtlockd/internal/rpc"
	"virtlockd/internal/strerror"
)

// Templates of libvirt's error codes.
const (
	internalError   = "internal error: %s"
	invalidArgument = "invalid argument: %s"
	denied          = "operation forbidden: %s"
	invalid         = "Requested operation is not valid: %s"
	busy            = "resource busy: %s"
)

var (
	errRestricted = rpc.Ordinary(rpc.CodeOperationDenied, rpc.DomainRPC, denied,
		"lock manager connection has been restricted")
	errNotRegistered = rpc.Ordinary(rpc.CodeOperationInvalid, rpc.DomainRPC, invalid,
		"lock owner details have not been registered")
)

// wireError words an error as the C daemon does. Where it has no such error, the code is the
// nearest that libvirt has.
func wireError(err error, s *session, a *args) error {
	if wire := (*rpc.Error)(nil); errors.As(err, &wire) {
		return wire
	}
	fail := func(code int32, template, format string, v ...any) error {
		return rpc.Ordinary(code, rpc.DomainLockspace, template, fmt.Sprintf(format, v...))
	}
	switch {
	case errors.Is(err, lockspace.ErrNoLockspace):
		return rpc.Ordinary(rpc.CodeInternal, rpc.DomainRPC, internalError, "Lockspace for path "+a.path+" does not exist")
	case errors.Is(err, lockspace.ErrExists):
		return rpc.Ordinary(rpc.CodeInternal, rpc.DomainRPC, internalError, "Lockspace for path "+a.path+" already exists")
	case errors.Is(err, lockspace.ErrDefaultExists):
		return rpc.Ordinary(rpc.CodeOperationInvalid, rpc.DomainRPC, invalid, "the default lockspace already exists")
	case errors.Is(err, lockspace.ErrLocked), errors.Is(err, filelock.ErrLocked):
		return fail(rpc.CodeResourceBusy, busy, "Lockspace resource '%s' is locked%s", a.name, holder(err, s, a.name))
	case errors.Is(err, lockspace.ErrNotLocked):
		return fail(rpc.CodeResourceBusy, busy, "Lockspace resource '%s' is not locked", a.name)
	case errors.Is(err, lockspace.ErrNotOwner):
		return fail(rpc.CodeInternal, internalError, "owner %d does not hold the resource lock", s.owner.PID)
	case errors.Is(err, lockspace.ErrEscapes):
		return fail(rpc.CodeInvalidArg, invalidArgument, "Lockspace resource '%s' is outside of lockspace %s", a.name, a.path)
	case errors.Is(err, filelock.ErrNotDir):
		return fail(rpc.CodeInternal, internalError, "Lockspace location %s exists, but is not a directory", a.path)
	}
	var failed *lockspace.Error
	if !errors.As(err, &failed) {
		return fail(rpc.CodeInternal, internalError, "%v", err)
	}
	return fileError(failed, a, fail)
}

// fileError words what the file lock layer says.
func fileError(failed *lockspace.Error, a *args, fail func(code int32, template, format string, v ...any) error) error {
	var file *filelock.Error
	if !errors.As(failed, &file) {
		return fail(rpc.CodeInternal, internalError, "%v", failed)
	}
	errno := file.Errno()
	if errno == 0 {
		return fail(rpc.CodeInternal, internalError, "%v", file)
	}
	system := func(domain int32, format string, v ...any) error {
		return rpc.System(domain, errno, fmt.Sprintf(format, v...)+": "+strerror.Text(errno))
	}
	switch file.Op {
	case filelock.OpOpen:
		if a.flags&lockspace.AutoCreate != 0 {
			return system(rpc.DomainLockspace, "Unable to open/create resource %s", failed.Path)
		}
		return system(rpc.DomainLockspace, "Unable to open resource %s", failed.Path)
	case filelock.OpLock:
		return system(rpc.DomainLockspace, "Unable to acquire lock on '%s'", failed.Path)
	case filelock.OpMkdir:
		return system(rpc.DomainLockspace, "Unable to create lockspace %s", failed.Path)
	case filelock.OpCreate:
		return system(rpc.DomainNone, "cannot create file '%s'", failed.Path)
	case filelock.OpUnlink:
		return system(rpc.DomainLockspace, "Unable to delete lockspace resource %s", failed.Path)
	}
	return system(rpc.DomainLockspace, "Unable to %s resource %s", file.Op, failed.Path)
}

// log writes one line for a call that failed. A refused lock names its domain and file, because
// that is where somebody's guest does not start.
func (p *Program) log(s *session, a *args, err, wire error) {
	level := slog.LevelError
	if errors.Is(err, lockspace.ErrNotLocked) {
		// libvirtd releases what a paused guest does not hold any more: every healthy day has some.
		level = slog.LevelInfo
	}
	attrs := make([]slog.Attr, 0, 6)
	if s.owner != nil {
		attrs = append(attrs, slog.Any("", s.owner))
	}
	if failed := (*lockspace.Error)(nil); errors.As(err, &failed) && failed.Path != "" {
		attrs = append(attrs, slog.String("path", failed.Path))
	}
	if answer := (*rpc.Error)(nil); errors.As(wire, &answer) {
		attrs = append(attrs, slog.Int(logging.ErrorDomain, int(answer.Domain)), slog.Int(logging.ErrorCode, int(answer.Code)))
	}
	p.cfg.Logger.LogAttrs(context.Background(), level, wire.Error(), attrs...)
}
