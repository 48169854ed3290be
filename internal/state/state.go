// SPDX-License-Identifier: LGPL-2.1-or-later

// Package state is one picture of everything that a lock daemon must keep when another binary
// takes its place in the same process: clients, lockspaces, locks, their owners and descriptors.
//
// A Snapshot is written as the JSON of libvirt's hand-over file, which the C daemon reads and
// writes too (observed with 9.0.0; older forms from public test data of 1.0.1 and later). What the C daemon
// has no place for goes in keys that it ignores:
//
//	top level      "virtlockd-go": version, times, run time settings, the table of owners
//	client         "virtlockd-go": unread and unsent bytes, who the peer is, ...
//	resource       "virtlockd-go": its owners by their place in the table, what its file is
//	any string     KEY "Bytes": its exact bytes in base64, where they are not UTF-8
//
// The package knows files and bytes, no daemon: it neither opens nor closes nor checks the
// descriptors that a snapshot names.
package state

import (
	"encoding/hex"
	"fmt"
)

// NoFD stands where a descriptor would, if there is none.
const NoFD int32 = -1

// None stands where the place of an owner in Snapshot.Owners would, if there is none.
const None int32 = -1

// Snapshot is everything worth keeping of a daemon. A descriptor is named at most once in it.
type Snapshot struct {
	// PID of the process, which the C daemon calls the file's magic: exec keeps it, so a file
	// that names another one is not ours.
	PID int32

	// Lock and Admin are the servers "virtlockd" and "admin". nil: the daemon has no such server.
	Lock, Admin *Server

	// Default is the lockspace in which a resource is named by its path.
	Default    []Resource
	Lockspaces []Lockspace

	// Owners are all that a resource or a client refers to, by their place here, and those that are
	// known for another reason.
	Owners []Owner

	// From here on only our own daemon writes and reads it.

	// Began is when the process started, in clock ticks after boot as in proc_pid_stat(5), which exec keeps, too: where process ids
	// are small, as in a container, another one had the same. 0: not known.
	Began      uint64
	StartTime  int64  // of the first daemon, ns since the epoch; 0: not known
	Upgrades   uint64 // how many binaries have handed over
	Recoveries uint64 // how many processes have taken over from one that had died
	// Configured are the limits of clients as they were read last, of the lock and the admin server; 0: not known. Those in force may be
	// others, set at run time.
	Configured [2]uint32
	Frozen     int64  // since when everybody waits for this hand-over, ns of CLOCK_MONOTONIC; 0: not known
	PIDFile    int32  // descriptor of the locked pid file, or NoFD
	Epoll      *Epoll // nil: not handed over
	// Vault is the descriptor of the root of the vault, or NoFD. The cells below are those of package vault, from 1;
	// 0: not stored.
	Vault int32
	// VaultKept says that somebody else keeps that, too, as far as is known.
	VaultKept bool
	Cell      uint32 // with the daemon's own settings
	// AnotherVault says that there is one more, which is not used; whoever keeps the vault has it.
	AnotherVault bool
	// StartDir is where relative names on the command line count from. "": the working directory.
	StartDir string

	// Settings changed at run time. nil: as the command line and the configuration say.
	Timeout                          *uint32 // seconds without client before the daemon ends, 0: never
	LogLevel, LogFilters, LogOutputs *string
}

// Epoll is the epoll set of all descriptors.
type Epoll struct {
	FD         int32
	Generation int32 // greater than that of each registration in it
}

// Server is one set of sockets and their clients.
type Server struct {
	MinWorkers, MaxWorkers, PriorityWorkers uint32

	MaxClients, MaxUnauth uint32

	KeepaliveInterval uint32 // seconds; 4294967295: off
	KeepaliveCount    uint32

	NextClientID uint64 // greater than that of each client, at most 2^63
	Services     []Service
	Clients      []Client
}

// Service is a set of listening sockets with the same rules.
type Service struct {
	Auth        int32 // 0: none
	ReadOnly    bool
	MaxRequests uint32 // at a time, for each client
	Sockets     []Socket
}

// Socket listens.
type Socket struct {
	FD     int32
	Unlink bool // its file is removed at the end: we made it, not systemd
}

// Client is a connection.
type Client struct {
	ID          uint64 // from 1 to 2^63-1
	ConnectTime int64  // ns since the epoch, not negative; the C daemon keeps seconds. 0: not known
	FD          int32

	Auth        int32
	AuthPending bool
	ReadOnly    bool
	MaxRequests uint32

	// Of a client of the lock server.

	Registered bool // it has told us its owner
	Restricted bool
	Owner      Details // zero unless Registered
	// Self is the place in Snapshot.Owners of the process that the peer has been proven to be, or
	// None. The C daemon keeps no proof.
	Self int32

	// From here on only our own daemon writes and reads it.

	Peer    int32  // process id of the peer as the kernel has it; 0: not known
	Uptime  int64  // the moment of ConnectTime in ns since boot; 0: not known
	Unread  []byte // received and not executed
	Dropped uint32 // how many bytes of the first message in Unread were received and not kept
	FDs     uint32 // how many descriptors were received, and not kept, with that message
	LastFD  bool   // some came with the last byte of Unread
	Unsent  []byte // of a reply
	Closing bool   // to be closed when Unsent is out
	Undo    *Undo  // what to do if Unsent can't be delivered; nil: nothing
	Cell    uint32 // that the connection is stored in
}

// Undo names an acquisition by the call whose reply is not out.
type Undo struct {
	Lockspace, Resource string
}

// Details is what a client said of an owner when it registered. It converts to and from
// owner.Details.
type Details struct {
	Name string
	UUID [16]byte
	ID   uint32
	PID  int32 // any 32 bits
}

// Kind says how an owner is known, with the meanings of package owner.
type Kind uint8

// The kinds of owners. The C daemon tells none.
const (
	Unknown Kind = iota
	Unverified
	Watched
	Verified
)

var kinds = [...]string{"unknown", "unverified", "watched", "verified"}

func (k Kind) String() string {
	if int(k) < len(kinds) {
		return kinds[k]
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// Owner is a process, or a bare number, in whose name locks are held.
type Owner struct {
	Details
	Kind      Kind
	PIDFD     int32  // or NoFD
	Ending    bool   // it has hung up while it held locks, and is being ended
	Stopped   bool   // by the daemon, because a lock was lost
	StartTime uint64 // of the process, in clock ticks after boot as in proc_pid_stat(5); 0: not known
}

// Lockspace is a directory of lease files.
type Lockspace struct {
	Dir       string // never ""
	Resources []Resource
	Cell      uint32 // that the lockspace is stored in; only our own daemon writes and reads it
}

// Resource is one that is held.
type Resource struct {
	Name   string
	Path   string
	FD     int32 // with the kernel's lock. NoFD: it is lost
	Held   bool  // the C daemon's lockHeld, which it never clears
	Flags  uint32
	Owners []int32 // places in Snapshot.Owners; an owner that acquired twice is there twice
	Since  []int64 // when each of the owners acquired it, Unix time in ns, 0: not known; nil: none is
	File   File
	Cells  []uint32 // that the holds of Owners are stored in; nil: in none. Only our own daemon writes and reads it
}

// File is what our own daemon knows of a locked file, so that it need not ask a disk that may hang.
type File struct {
	Dev, Ino uint64 // of a block device: its number, and 0
	Block    bool
	POSIX    bool // the lock is a POSIX record lock
	Remote   bool // calls on it may hang
	// Exclusive says that the kernel's lock is, though the resource may be shared: the C daemon let two names
	// of one file be held in different modes.
	Exclusive bool
}

// appendUUID appends the usual form of 36 characters.
func appendUUID(b []byte, u *[16]byte) []byte {
	for i, part := range [...][]byte{u[0:4], u[4:6], u[6:8], u[8:10], u[10:16]} {
		if i > 0 {
			b = append(b, '-')
		}
		b = hex.AppendEncode(b, part)
	}
	return b
}

// parseUUID reads what appendUUID wrote. Like the C daemon it ignores dashes, wherever they are.
func parseUUID(s []byte) (u [16]byte, ok bool) {
	var digits [32]byte
	n := 0
	for _, c := range s {
		if c == '-' {
			continue
		}
		if n == len(digits) {
			return u, false
		}
		digits[n] = c
		n++
	}
	if n != len(digits) {
		return u, false
	}
	if _, err := hex.Decode(u[:], digits[:]); err != nil {
		return [16]byte{}, false
	}
	return u, true
}
