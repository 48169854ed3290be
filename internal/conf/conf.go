// SPDX-License-Identifier: LGPL-2.1-or-later

// Package conf reads configuration files in libvirt's syntax and turns virtlockd.conf into settings.
//
// The syntax, as the C daemon (libvirt 9.0.0) was observed to accept it:
//
//	file       = definition { separator definition } [ separator ]
//	definition = name "=" value [ "#" comment ] | "#" comment
//	separator  = end of line | ";"                       (one ";" only; blank lines may follow either)
//	name       = letter { letter | digit | "_" }
//	value      = [ "+" | "-" ] digits                    (base 10, leading zeros are just that)
//	           | `"` text `"` | "'" text "'"             (one line, no escapes at all)
//	           | `"""` text `"""`                        (any number of lines)
//	           | "[" [ value { "," value } [ "," ] ] "]" (line ends may stand around each value, comments may not)
//
// Blanks and tabs may stand between any of these. When a name is defined more than once the first definition counts. An
// empty file is fine, one of nothing but blanks is an error.
package conf

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"syscall"

	"virtlockd/internal/strerror"
)

// Limits of what Parse and Load take.
const (
	MaxSize   = 10 << 20 // bytes of a file, the C daemon's limit
	maxValues = 1 << 17  // definitions and list elements; a parsed value takes far more memory than its text
	maxDepth  = 64       // lists within lists
)

// File is a parsed configuration file.
type File struct {
	Entries []Entry // all definitions in the order of the file, repeated ones too
	name    string
	first   map[string]int // index into Entries of a name's first definition
}

// Entry is one definition, name = value.
type Entry struct {
	Name  string
	Line  int // of the name; the first line is 1
	value value
}

// kind is the type of a value.
type kind uint8

const (
	integer kind = iota
	text
	list
)

// value is what a name is defined as.
type value struct {
	kind     kind
	negative bool   // there is a minus sign; so -0 is not unsigned either
	number   uint64 // magnitude of an integer, at most math.MaxUint64
	text     string
	list     []value
}

// Error is what is wrong in a configuration file. Its text is the C daemon's with the line added where that has none.
type Error struct {
	File   string
	Line   int
	Class  string // "configuration file syntax error", "internal error" (a value of a wrong type or range) or "invalid argument"
	Detail string
}

func (e *Error) Error() string {
	return fmt.Sprintf("%s: %s:%d: %s", e.Class, e.File, e.Line, e.Detail)
}

// FileError is a configuration file that couldn't be read at all.
type FileError struct {
	Op   string // "open" or "read"
	Path string
	Err  error // nearly always a syscall.Errno
}

func (e *FileError) Error() string {
	why := e.Err.Error()
	var errno syscall.Errno
	if errors.As(e.Err, &errno) {
		why = strerror.Text(errno)
	}
	return fmt.Sprintf("Failed to %s file '%s': %s", e.Op, e.Path, why)
}

func (e *FileError) Unwrap() error { return e.Err }

// Load reads and parses the file at path. The error is a *FileError or an *Error.
func Load(path string) (*File, error) {
	// Not to wait for the other end of a FIFO.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, &FileError{"open", path, bare(err)}
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil {
		return nil, &FileError{"stat", path, bare(err)}
	} else if st.Mode()&fs.ModeNamedPipe != 0 {
		return nil, &FileError{"read", path, errFIFO}
	}
	data, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err != nil {
		return nil, &FileError{"read", path, bare(err)}
	}
	if len(data) > MaxSize {
		return nil, &FileError{"read", path, syscall.EOVERFLOW}
	}
	return Parse(path, data)
}

var errFIFO = errors.New("it is a FIFO, which can be read only once")

// bare takes the path off an error of package os, because FileError has its own.
func bare(err error) error {
	var pe *os.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// Parse parses data; name is what errors call the file. The error is an *Error.
func Parse(name string, data []byte) (*File, error) {
	p := parser{name: name, data: data, line: 1}
	f := &File{name: name, first: make(map[string]int)}
	for p.pos < len(p.data) {
		p.skipBlanksAndEOL()
		if p.peek() == '#' {
			p.skipComment()
		} else {
			e, err := p.definition()
			if err != nil {
				return nil, err
			}
			if _, ok := f.first[e.Name]; !ok {
				f.first[e.Name] = len(f.Entries)
			}
			f.Entries = append(f.Entries, e)
		}
		if err := p.separator(); err != nil {
			return nil, err
		}
	}
	return f, nil
}

// lookup returns the definition of name that counts.
func (f *File) lookup(name string) (Entry, bool) {
	i, ok := f.first[name]
	if !ok {
		return Entry{}, false
	}
	return f.Entries[i], true
}

// Uint32 stores the value of name in dst if it is defined. Anything but an integer from 0 to 4294967295 is an error.
func (f *File) Uint32(name string, dst *uint32) error {
	e, ok := f.lookup(name)
	switch {
	case !ok:
		return nil
	case e.value.kind != integer || e.value.negative:
		return f.errorAt(e, "internal error", "expected an unsigned integer for '%s' parameter", name)
	case e.value.number > math.MaxUint32:
		return f.errorAt(e, "internal error", "value for '%s' parameter must be in range 0:4294967295", name)
	}
	*dst = uint32(e.value.number)
	return nil
}

// Text stores the value of name in dst if it is defined. Anything but a string is an error.
func (f *File) Text(name string, dst *string) error {
	e, ok := f.lookup(name)
	if !ok {
		return nil
	}
	if e.value.kind != text {
		return f.errorAt(e, "internal error", "expected a string for '%s' parameter", name)
	}
	*dst = e.value.text
	return nil
}

func (f *File) errorAt(e Entry, class, format string, args ...any) error {
	return &Error{File: f.name, Line: e.Line, Class: class, Detail: fmt.Sprintf(format, args...)}
}
