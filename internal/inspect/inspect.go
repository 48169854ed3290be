// SPDX-License-Identifier: LGPL-2.1-or-later

// Package inspect is the protocol by which virtlockctl looks at the daemon: two programs of our own beside libvirt's on
// the admin socket, one that reads and one that changes, and what their calls say.
//
// Arguments and results are one opaque (RFC 4506) with JSON in it. Whoever reads ignores fields that he does not know,
// so the two sides need not be of one version. What is long is read in parts.
package inspect

import (
	"encoding/json"
	"fmt"
	"time"

	"virtlockd/internal/xdr"
)

// The programs' numbers on the wire, in the range that is left to users (RFC 5531, section 8.3).
const (
	ReadProgram  = 0x2EA7BEE0
	WriteProgram = 0x2EA7BEE1
	Version      = 1
)

// Procedures of the read program.
const (
	ProcReadOnly = 1 // the connection gives up the right to change anything
	ProcStatus   = 2 // -> Status
	ProcLocks    = 3 // Part -> Locks
	ProcEvents   = 4 // EventsRequest -> Events
	ProcCheck    = 5 // Part -> Checks
)

// Procedures of the write program.
const (
	ProcRelease = 1 // ReleaseRequest -> Released
	ProcResume  = 2 // ResumeRequest -> Owner
)

const (
	// MaxRequest bounds the arguments of a call: two names of the lock protocol, each byte as \u0000.
	MaxRequest = 1 << 20
	// MaxReply bounds a result.
	MaxReply = 16 << 20
	// MaxPart bounds how many locks, or events, a part has.
	MaxPart = 256
)

// Append appends a value as it is sent.
func Append(out []byte, v any) ([]byte, error) {
	text, err := json.Marshal(v)
	if err != nil {
		return out, fmt.Errorf("encode %T: %w", v, err)
	}
	return xdr.AppendBytes(out, text), nil
}

// Decode reads a value of at most limit bytes.
func Decode(payload []byte, limit uint32, v any) error {
	d := xdr.NewDecoder(payload)
	text := d.Bytes(limit)
	if err := d.Err(); err != nil {
		return err
	}
	if err := json.Unmarshal(text, v); err != nil {
		return fmt.Errorf("decode %T: %w", v, err)
	}
	return nil
}

// Part asks for a part of a list: after the last one's Next, 0 for the first, at most so many (0: as many as
// there may be). Next is 0 in the last part. A part with another Table than the one before it is of another list: after a live
// upgrade, locks have other places, and who reads has to begin anew.
type Part struct {
	From  int `json:"from"`
	Limit int `json:"limit,omitempty"`
}

// Status is how the daemon is.
type Status struct {
	Version string `json:"version"`
	Commit  string `json:"commit"`
	Libvirt string `json:"libvirt"` // the release that it behaves like
	PID     int    `json:"pid"`

	Now        time.Time `json:"now"`
	Started    time.Time `json:"started"` // the first binary in this process
	Serving    time.Time `json:"serving"` // since when this binary serves, and counts
	Upgrades   uint64    `json:"upgrades"`
	Recoveries uint64    `json:"recoveries"`

	CrashSafe       bool   `json:"crash_safe"` // locks outlive the process
	CrashSafeReason string `json:"crash_safe_reason,omitempty"`

	Locks      LockCount   `json:"locks"`
	Lockspaces int         `json:"lockspaces"`
	Servers    []Server    `json:"servers"`
	Workers    WorkerCount `json:"workers"`
	Files      FileCount   `json:"files"`
	Goroutines int         `json:"goroutines"` // 0: not known, as from an older daemon
	HeapLive   uint64      `json:"heap_live"`  // bytes that the last collection of garbage left; 0: the same, or there was none yet

	// Calls are those in progress on files, the oldest first; there are CallCount, of which only some are here.
	Calls     []Call `json:"calls"`
	CallCount int    `json:"call_count"`

	Unstored   uint64  `json:"unstored"`    // how often a lock or connection could not be made crash-safe
	LogDropped uint64  `json:"log_dropped"` // lines that no log output took
	Counts     []Count `json:"counts"`      // of events, since Serving
	LastEvent  uint64  `json:"last_event"`  // its number
}

// LockCount is how many locks are held.
type LockCount struct {
	Exclusive int `json:"exclusive"`
	Shared    int `json:"shared"`
	CrashSafe int `json:"crash_safe"` // of both
}

// Server is one of the daemon's sockets.
type Server struct {
	Name       string `json:"name"`
	Clients    int    `json:"clients"`
	MaxClients uint32 `json:"max_clients"`
}

// FileCount is how many files the process has open: each client and each lock needs one. Zeros: not known, as from an older daemon.
type FileCount struct {
	Open int    `json:"open"`
	Max  uint64 `json:"max"`
}

// WorkerCount is how many processes work on disks that may hang.
type WorkerCount struct {
	All  int `json:"all"`
	Busy int `json:"busy"`
}

// Call is one on a file, in progress.
type Call struct {
	Op     string    `json:"op"`
	Path   Text      `json:"path"`
	Mount  Text      `json:"mount,omitempty"`  // whom a worker waits for
	Worker int       `json:"worker,omitempty"` // its pid
	Since  time.Time `json:"since"`
}

// Count is how often something has happened.
type Count struct {
	Kind   string `json:"kind"`
	Reason string `json:"reason,omitempty"`
	N      uint64 `json:"n"`
}

// Owner is in whose name a lock is held.
type Owner struct {
	Name Text   `json:"name"` // of the domain
	UUID string `json:"uuid"`
	PID  int32  `json:"pid"`
	// Kind is "verified" (it has registered itself), "watched" (libvirt named it) or "unverified" (a number).
	Kind  string    `json:"kind,omitempty"`
	Since time.Time `json:"since,omitzero"` // zero: not known
}

// Lock is a resource that is held.
type Lock struct {
	Lockspace  Text   `json:"lockspace"` // "" is the default one, in which a resource is named by its path
	Resource   Text   `json:"resource"`
	Path       Text   `json:"path"`
	Mode       string `json:"mode"`       // "exclusive" or "shared"
	Kind       string `json:"kind"`       // of the kernel's lock: "OFD" or "POSIX"
	AutoCreate bool   `json:"autocreate"` // its file is a lease that goes with it
	Remote     bool   `json:"remote"`     // worker processes work on it
	CrashSafe  bool   `json:"crash_safe"`
	File       File   `json:"file"`
	// Owners has an entry for each acquisition.
	Owners []Owner `json:"owners"`
}

// File is which file it is, whatever it is called.
type File struct {
	Dev   uint64 `json:"dev"` // of a block device: its own number
	Ino   uint64 `json:"ino,omitempty"`
	Block bool   `json:"block,omitempty"`
}

// Locks is a part of the locks.
type Locks struct {
	Locks []Lock `json:"locks"`
	Table int64  `json:"table"`
	Next  int    `json:"next"`
}

// EventsRequest asks for events with a greater number than that, at most so many (0: as many as there may be).
type EventsRequest struct {
	After uint64 `json:"after"`
	Limit int    `json:"limit,omitempty"`
}

// Event is something that has happened.
type Event struct {
	Seq       uint64    `json:"seq"`
	Time      time.Time `json:"time"`
	Kind      string    `json:"kind"`
	Reason    string    `json:"reason,omitempty"`
	Mode      string    `json:"mode,omitempty"`
	Lockspace Text      `json:"lockspace,omitempty"`
	Resource  Text      `json:"resource,omitempty"`
	Owner     *Owner    `json:"owner,omitempty"`
	Text      Text      `json:"text,omitempty"`
}

// Events are some that have happened. Next is what to ask for the next time. Missed are already forgotten.
type Events struct {
	Events []Event `json:"events"`
	Next   uint64  `json:"next"`
	Missed uint64  `json:"missed,omitempty"`
}

// Checks is what was found out about a part of the locks. The daemon may have looked at fewer than it was asked for.
type Checks struct {
	Checked int       `json:"checked"`
	Faulty  []Finding `json:"faulty"`
	Table   int64     `json:"table"`
	Next    int       `json:"next"`
}

// Finding is a lock with something wrong.
type Finding struct {
	Lock     Lock      `json:"lock"`
	Problems []Problem `json:"problems"`
}

// Problem is something wrong with a lock. The kinds are those of package verify.
type Problem struct {
	Kind string `json:"kind"`
	Text Text   `json:"text"`
}

// ReleaseRequest is to give up a lock in spite of its owner. Without PID there must be just one. With Since, it is given up only if
// he has held it since then: whoever has got it meanwhile keeps it.
type ReleaseRequest struct {
	Lockspace Text      `json:"lockspace"`
	Resource  Text      `json:"resource"`
	PID       *int32    `json:"pid,omitempty"`
	Since     time.Time `json:"since,omitzero"`
}

// ResumeRequest is to continue an owner who was stopped because a lock was lost: by the domain's name, its UUID or the process id.
type ResumeRequest struct {
	Who Text `json:"who"`
}

// Released is who has lost a lock, and how many acquisitions of the resource are left.
type Released struct {
	Owner Owner `json:"owner"`
	Left  int   `json:"left"`
	// Waiting says that the disk has not answered yet: the lock will be free when it does.
	Waiting bool `json:"waiting,omitempty"`
}
