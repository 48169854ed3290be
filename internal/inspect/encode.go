// SPDX-License-Identifier: LGPL-2.1-or-later

package inspect

import (
	"encoding/binary"
	"encoding/json"
	"strconv"
	"time"
)

// LocksEncoder writes a part of the locks, one by one: there can be tens of thousands, and others wait for the processor
// meanwhile. The result is that of Append with a Locks, at a fraction of its cost.
type LocksEncoder struct {
	b     []byte
	start int // of the opaque
	n     int
}

// EncodeLocks begins a part behind out.
func EncodeLocks(out []byte) *LocksEncoder {
	e := &LocksEncoder{start: len(out)}
	e.b = append(append(out, 0, 0, 0, 0), `{"locks":[`...)
	return e
}

// Len returns how many locks, in how many bytes, there are.
func (e *LocksEncoder) Len() (n, bytes int) { return e.n, len(e.b) - e.start }

// Add appends a lock.
func (e *LocksEncoder) Add(l *Lock) {
	if e.n++; e.n > 1 {
		e.b = append(e.b, ',')
	}
	e.b = appendLock(e.b, l)
}

// End completes the part and returns it.
func (e *LocksEncoder) End(table int64, next int) []byte {
	e.b = append(e.b, `],"table":`...)
	e.b = strconv.AppendInt(e.b, table, 10)
	e.b = append(e.b, `,"next":`...)
	e.b = strconv.AppendInt(e.b, int64(next), 10)
	e.b = append(e.b, '}')
	size := len(e.b) - e.start - 4
	binary.BigEndian.PutUint32(e.b[e.start:], uint32(size))
	for range -size & 3 {
		e.b = append(e.b, 0)
	}
	return e.b
}

// appendLock writes what encoding/json would.
func appendLock(b []byte, l *Lock) []byte {
	b = appendText(append(b, `{"lockspace":`...), l.Lockspace)
	b = appendText(append(b, `,"resource":`...), l.Resource)
	b = appendText(append(b, `,"path":`...), l.Path)
	b = appendText(append(b, `,"mode":`...), Text(l.Mode))
	b = appendText(append(b, `,"kind":`...), Text(l.Kind))
	b = strconv.AppendBool(append(b, `,"autocreate":`...), l.AutoCreate)
	b = strconv.AppendBool(append(b, `,"remote":`...), l.Remote)
	b = strconv.AppendBool(append(b, `,"crash_safe":`...), l.CrashSafe)
	b = strconv.AppendUint(append(b, `,"file":{"dev":`...), l.File.Dev, 10)
	if l.File.Ino != 0 {
		b = strconv.AppendUint(append(b, `,"ino":`...), l.File.Ino, 10)
	}
	if l.File.Block {
		b = append(b, `,"block":true`...)
	}
	b = append(b, `},"owners":[`...)
	for i := range l.Owners {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendOwner(b, &l.Owners[i])
	}
	return append(b, `]}`...)
}

func appendOwner(b []byte, o *Owner) []byte {
	b = appendText(append(b, `{"name":`...), o.Name)
	b = appendText(append(b, `,"uuid":`...), Text(o.UUID))
	b = strconv.AppendInt(append(b, `,"pid":`...), int64(o.PID), 10)
	if o.Kind != "" {
		b = appendText(append(b, `,"kind":`...), Text(o.Kind))
	}
	if !o.Since.IsZero() {
		b = append(b, `,"since":"`...)
		b = o.Since.AppendFormat(b, time.RFC3339Nano)
		b = append(b, '"')
	}
	return append(b, '}')
}

// appendText leaves all but the plainest to encoding/json.
func appendText(b []byte, t Text) []byte {
	for i := range len(t) {
		if c := t[i]; c < ' ' || c > '~' || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			quoted, err := json.Marshal(t)
			if err != nil {
				panic(err) // there is no such text
			}
			return append(b, quoted...)
		}
	}
	b = append(b, '"')
	b = append(b, t...)
	return append(b, '"')
}
