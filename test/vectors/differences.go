// SPDX-License-Identifier: LGPL-2.1-or-later

package vectors

import (
	"encoding/hex"
	"fmt"
	"strings"
	"syscall"

	"virtlockd/test/wire"
)

// Difference is where ours differs from the recording on purpose. One more, D-holder, is in all replies of one kind: see
// wire.WithoutHolder.
type Difference struct {
	ID       string // of its entry in docs/differences.md, which gives the reason
	Scenario string
	Step     int
	Want     Want
}

// differences is the whole list. Some steps differ only in consequence of an earlier one of the same id: what was
// refused is not held, what was not removed is there.
var differences = []Difference{
	// A NEW that makes no lockspace says why, as CREATE_LOCKSPACE does, and leaves nothing behind.
	{"D-new-failed", "new-path-is-file", 3, notDir("/tmp/vlv/f")},
	{"D-new-failed", "new-path-is-file", 4, notDir("/tmp/vlv/f")},
	{"D-new-failed", "new-below-file", 3, noLockspace("/tmp/vlv/f/sub", syscall.ENOTDIR, "Not a directory")},
	{"D-new-failed", "new-below-file", 4, noLockspace("/tmp/vlv/f/sub", syscall.ENOTDIR, "Not a directory")},
	{"D-new-failed", "new-symlink-dir", 15, noLockspace("/tmp/vlv/dang", syscall.ENOTDIR, "Not a directory")},
	{"D-new-failed", "lockspace-path-long", 2, noLockspace("/"+strings.Repeat("p", 300), syscall.ENAMETOOLONG, "File name too long")},
	{"D-new-failed", "new-null-lockspace", 3, notDir("/tmp/vlv/f")},
	{"D-new-failed", "new-null-lockspace", 7, Success{}},
	{"D-new-failed", "new-null-lockspace", 8, Success{}},
	{"D-new-failed", "new-null-lockspace", 9, locked("x")},
	{"D-new-failed", "new-null-lockspace", 13, Success{}}, // C has crashed
	{"D-new-failed", "new-null-lockspace-client-exit", 3, notDir("/tmp/vlv/f")},
	{"D-new-failed", "new-null-lockspace-client-exit", 8, Success{}}, // C has crashed

	// A file that is held is held under all its names.
	{"D-alias", "new-symlink-dir", 9, locked("x")},
	{"D-alias", "new-symlink-dir", 11, notLocked("x")},
	{"D-alias", "new-symlink-dir", 12, leaseFile},
	{"D-alias", "alias-hardlink", 8, locked("/tmp/vlv/b")},
	{"D-alias", "alias-hardlink", 10, notLocked("/tmp/vlv/b")},
	{"D-alias", "alias-hardlink", 11, Locks{"WRITE 0 0"}},
	{"D-alias", "alias-symlink", 7, locked("/tmp/vlv/b")},
	{"D-alias", "alias-symlink", 9, notLocked("/tmp/vlv/b")},
	{"D-alias", "alias-symlink", 10, Locks{"WRITE 0 0"}},
	{"D-alias", "shared-then-external", 7, locked("/tmp/vlv/b")},
	{"D-alias", "shared-then-external", 8, Locks{"READ 0 0"}},

	// Nothing that is done under another name takes the lock of a held file away.
	{"D-alias-close", "failed-alias-acquire-drops-lock", 8, Locks{"WRITE 0 0"}},
	{"D-alias-close", "create-drops-lock-self", 7, Locks{"WRITE 0 0"}},

	// A held file can't be deleted under another name.
	{"D-delete-alias", "delete-basic", 12, locked("/tmp/vlv//b")},
	{"D-delete-alias", "delete-basic", 13, leaseFile},

	// AUTOCREATE removes nothing at release but an empty file that it locked.
	{"D-autocreate-unlink", "acquire-existing", 11, File{Type: "file", Mode: "0644", Size: 4}},
	{"D-autocreate-unlink", "file-replaced-while-held", 10, File{Type: "file", Mode: "0644", Size: 3}},
	{"D-autocreate-unlink", "alias-symlink-autocreate", 7, File{Type: "symlink", Mode: "0777", Size: int64(len("/tmp/vlv/a"))}},
	{"D-autocreate-unlink", "alias-symlink-autocreate", 12, File{Type: "symlink", Mode: "0777", Size: int64(len("/tmp/vlv/dangle"))}},

	// A name can't lead out of its lockspace's directory.
	{"D-escape", "create-basic", 20, outside("../esc")},
	{"D-escape", "create-basic", 21, Absent{}},
	{"D-escape", "delete-basic", 22, outside("../victim")},
	{"D-escape", "delete-basic", 23, File{Type: "file", Mode: "0644"}},
	{"D-escape", "acquire-empty-names", 11, outside("../esc")},
	{"D-escape", "acquire-empty-names", 12, Absent{}},
	{"D-escape", "acquire-empty-names", 17, outside("..")},
}

// Differences is the list by scenario and step.
var Differences = index()

func index() map[string]map[int]Want {
	m := map[string]map[int]Want{}
	for _, d := range differences {
		if m[d.Scenario] == nil {
			m[d.Scenario] = map[int]Want{}
		}
		m[d.Scenario][d.Step] = d.Want
	}
	return m
}

// leaseFile is a file that ours made.
var leaseFile = File{Type: "file", Mode: "0600"}

func locked(name string) Refusal    { return busy("Lockspace resource '" + name + "' is locked") }
func notLocked(name string) Refusal { return busy("Lockspace resource '" + name + "' is not locked") }

func busy(detail string) Refusal {
	return Refusal{wire.CodeResourceBusy, "resource busy: %s", detail, 0}
}

func notDir(path string) Refusal {
	return Refusal{wire.CodeInternal, "internal error: %s", "Lockspace location " + path + " exists, but is not a directory", 0}
}

func outside(name string) Refusal {
	return Refusal{wire.CodeInvalidArg, "invalid argument: %s", "Lockspace resource '" + name + "' is outside of lockspace /tmp/vlv/ls", 0}
}

func noLockspace(path string, errno syscall.Errno, text string) Refusal {
	return Refusal{wire.CodeSystem, "%s", "Unable to create lockspace " + path + ": " + text, errno}
}

// Success is a reply without error and without payload.
type Success struct{}

func (Success) apply(s *Step, request []byte) error { return reply(s, request, wire.StatusOK, nil) }

// Refusal is an error reply of the lockspace domain.
type Refusal struct {
	Code             int32
	Template, Detail string
	Errno            syscall.Errno
}

func (r Refusal) apply(s *Step, request []byte) error {
	ints := [2]int32{-1, -1}
	if r.Errno != 0 {
		ints[0] = int32(r.Errno)
	}
	text := strings.Replace(r.Template, "%s", r.Detail, 1)
	p := wire.Payload(nil).Uint32(uint32(r.Code)).Uint32(uint32(wire.DomainLockspace)).
		Uint32(1).String(text).Uint32(2).Uint32(0).
		Uint32(1).String(r.Template).Uint32(1).String(r.Detail).Uint32(0).
		Uint32(uint32(ints[0])).Uint32(uint32(ints[1])).Uint32(0)
	return reply(s, request, wire.StatusError, p)
}

// reply expects an answer to the request.
func reply(s *Step, request []byte, status uint32, payload []byte) error {
	m, err := wire.Parse(request)
	if err != nil || s.Op != "send" {
		return fmt.Errorf("no single request has this answer: %w", err)
	}
	h := m.Header
	h.Type, h.Status = wire.TypeReply, status
	s.Expect, s.ExpectHexAlt, s.ExpectHex = "", nil, hex.EncodeToString(wire.Frame(h, payload))
	return nil
}

// File is what is found at a path.
type File struct {
	Type, Mode string
	Size       int64
}

func (f File) apply(s *Step, _ []byte) error {
	s.Exists, s.Type, s.Mode, s.Size = true, f.Type, f.Mode, &f.Size
	return ofKind(s, "check")
}

// Absent is nothing at a path.
type Absent struct{}

func (Absent) apply(s *Step, _ []byte) error {
	s.Exists = false
	return ofKind(s, "check")
}

// Locks are what the daemon holds on a file.
type Locks []string

func (l Locks) apply(s *Step, _ []byte) error {
	s.Locks = l
	return ofKind(s, "locks")
}

func ofKind(s *Step, op string) error {
	if s.Op != op {
		return fmt.Errorf("step is %q, want %q", s.Op, op)
	}
	return nil
}
