// SPDX-License-Identifier: LGPL-2.1-or-later

package state

import (
	"fmt"
	"slices"
	"strconv"
)

// MagicError says that a file is of another process, or does not say of which. Nothing of it may be
// adopted: its descriptors are not those of this process.
type MagicError struct {
	Got  string // as the file has it; "": nothing, or not a string
	Want int32
}

func (e *MagicError) Error() string {
	if e.Got == "" {
		return fmt.Sprintf("the state file does not say which process wrote it (magic), so it is not taken for that of process %d", e.Want)
	}
	return fmt.Sprintf("the state file is of process %q, not of this one, %d", e.Got, e.Want)
}

// Trouble says what was wrong with a part of a file.
type Trouble uint8

// What can be wrong.
const (
	Missing       Trouble = iota // a key that every release writes
	WrongType                    // not the kind of value that belongs there
	OutOfRange                   // a number, or a text with a fixed form, that means nothing there
	Duplicate                    // a key, name, number or descriptor for the second time
	NoOwners                     // a resource that nobody holds
	Contradiction                // values that exclude each other
	Foreign                      // a server or a version that we do not know
)

func (t Trouble) String() string {
	return [...]string{"missing", "wrong type", "out of range", "duplicate", "no owners", "contradiction", "foreign"}[t]
}

// Problem is one thing that was wrong with a file whose rest was read.
type Problem struct {
	Where   string // its place, such as "daemon.servers.virtlockd.clients[2].sock.fd"
	Trouble Trouble
	// Kept tells that what Where names, or what it belongs to, is in the snapshot, as Why says.
	Kept bool
	// FDs are descriptors that the file names there and the snapshot does not. They may be open. To close
	// one drops any POSIX lock that this process has on the same file.
	FDs []int32
	Why string
}

func (p Problem) String() string {
	kept := "not kept"
	if p.Kept {
		kept = "kept"
	}
	return p.Where + ": " + p.Why + " (" + kept + ")"
}

// step is one level of where the decoder is: a key, or with key nil an index.
type step struct {
	key   []byte
	index int
}

func (d *decoder) where() string {
	var b []byte
	for _, s := range d.at {
		if s.key == nil {
			b = append(b, '[')
			b = strconv.AppendInt(b, int64(s.index), 10)
			b = append(b, ']')
			continue
		}
		if len(b) > 0 {
			b = append(b, '.')
		}
		b = append(b, s.key...)
	}
	return string(b)
}

func (d *decoder) problem(p Problem) {
	if d.err != nil {
		return
	}
	if p.Where == "" {
		p.Where = d.where()
	}
	d.problems = append(d.problems, p)
}

// kept reports what was wrong here and what was taken instead.
func (d *decoder) kept(t Trouble, why string) { d.problem(Problem{Trouble: t, Kept: true, Why: why}) }

// lost reports what is not in the snapshot, with its descriptors.
func (d *decoder) lost(t Trouble, why string, fds ...int32) {
	fds = slices.DeleteFunc(fds, func(fd int32) bool { return fd < 0 })
	if len(fds) == 0 {
		fds = nil
	}
	d.problem(Problem{Trouble: t, Why: why, FDs: fds})
}

// missing reports keys of an object that must be there and are not.
func (d *decoder) missing(keys []string, seen, required uint32, why string) {
	for k, key := range keys {
		if required&^seen&(1<<k) != 0 {
			d.at = append(d.at, step{key: []byte(key)})
			d.kept(Missing, why)
			d.at = d.at[:len(d.at)-1]
		}
	}
}
