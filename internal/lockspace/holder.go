// SPDX-License-Identifier: LGPL-2.1-or-later

package lockspace

import (
	"errors"
	"fmt"
	"os"
	"time"

	"virtlockd/internal/filelock"
	"virtlockd/internal/lease"
	"virtlockd/internal/owner"
)

// Holder is who has what somebody else was refused.
type Holder struct {
	Owner  *owner.Owner // without a reference: good for questions only; nil: another host's
	Domain string
	UUID   string
	PID    int32
	Host   string
	Since  time.Time // zero: not known
	Shared bool
	Others int // who share it, too
}

// maxName bounds what is told of a name, in bytes.
const maxName = 128

// String tells it in one printable line of bounded length, whatever a client or another host has written.
func (h *Holder) String() string {
	mode := "exclusively"
	if h.Shared {
		mode = "shared"
	}
	text := fmt.Sprintf("held %s by domain %s (UUID %s, pid %d) on host %s", mode, quote(h.Domain), h.UUID, h.PID, quote(h.Host))
	if !h.Since.IsZero() {
		text += " since " + h.Since.UTC().Format(time.RFC3339)
	}
	if h.Owner == nil {
		text += ", as its lease file says"
	}
	if h.Others > 0 {
		text += fmt.Sprintf(", and %d more", h.Others)
	}
	return text
}

func quote(name string) string { return fmt.Sprintf("%q", name[:min(len(name), maxName)]) }

// LockedError says that somebody else has the resource, and who.
type LockedError struct {
	Holder Holder
	Err    error // ErrLocked or filelock.ErrLocked is in its chain
}

func (e *LockedError) Error() string { return e.Err.Error() + ": " + e.Holder.String() }

func (e *LockedError) Unwrap() error { return e.Err }

// lockedBy is ErrLocked because of r. t.mu is held.
func lockedBy(r *resource) error {
	if len(r.holders) == 0 {
		return ErrLocked // it is being given up, or deleted
	}
	return &LockedError{r.holder(), ErrLocked}
}

// holder tells who holds r, the first if there are several. t.mu is held.
func (r *resource) holder() Holder {
	first := r.holders[0]
	d := first.owner.Details()
	h := Holder{
		Owner: first.owner, Domain: d.Name, UUID: d.UUIDString(), PID: first.owner.PID, Host: hostname(),
		Shared: r.shared(), Others: len(r.holders) - 1,
	}
	if first.since != 0 {
		h.Since = time.Unix(0, first.since)
	}
	return h
}

// hostname is asked for each time, because it can change.
func hostname() string {
	name, err := os.Hostname()
	if err != nil {
		return "?"
	}
	return name
}

// named adds to an error of the Locker who has the file, if it was refused by the kernel: the table knows if we have it
// under another name.
func (t *Table) named(err error) error {
	var locked *filelock.LockedError
	if !errors.As(err, &locked) {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if r := t.files[locked.File]; r != nil && len(r.holders) > 0 {
		return &LockedError{r.holder(), err}
	}
	// What the file says is true only while somebody has it, and he has just been met.
	if record, ok := lease.Parse(locked.Record); ok {
		return &LockedError{Holder{Domain: record.Domain, UUID: record.UUID, PID: record.PID, Host: record.Host, Since: record.Since}, err}
	}
	return err
}

// record is what the file of a lease says of its owner, while he has it exclusively.
func (r *resource) record(o *owner.Owner) []byte {
	if r.flags&AutoCreate == 0 || r.shared() {
		return nil
	}
	d := o.Details()
	record := lease.Record{Host: hostname(), Domain: d.Name, UUID: d.UUIDString(), PID: o.PID, Since: time.Now()}
	return record.Bytes()
}
