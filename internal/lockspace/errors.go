// SPDX-License-Identifier: LGPL-2.1-or-later

package lockspace

import (
	"errors"
	"fmt"
)

// What a request can fail of. Each is wrapped in an *Error that names the resource; failures
// of the file system keep the file lock layer's errors.
var (
	ErrNoLockspace   = errors.New("no such lockspace")
	ErrExists        = errors.New("the lockspace exists already")
	ErrDefaultExists = errors.New("the default lockspace exists already")
	ErrLocked        = errors.New("the resource is locked")
	ErrNotLocked     = errors.New("the resource is not locked")
	ErrNotOwner      = errors.New("the owner does not hold the resource")
	ErrOwnerEnded    = errors.New("the owner's process has ended")
	ErrEscapes       = errors.New("the resource's name leaves the lockspace's directory")
	ErrTooMany       = errors.New("too many of them")
	ErrRetired       = errors.New("the daemon is ending")
	ErrGone          = errors.New("the client has gone")
)

// Error is a failed operation on a resource.
type Error struct {
	Op        string // "acquire", "release", "create", "delete", "new"
	Lockspace string // "" is the default lockspace
	Resource  string // as the client sent it
	Path      string // the file; "" where it did not come to that
	Err       error
}

func (e *Error) Error() string {
	return fmt.Sprintf("cannot %s resource %q in lockspace %q: %v", e.Op, e.Resource, e.Lockspace, e.Err)
}

func (e *Error) Unwrap() error { return e.Err }
