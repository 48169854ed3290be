// SPDX-License-Identifier: LGPL-2.1-or-later

// Package lease is the record that a lease file carries while it is locked exclusively: who holds it, for other hosts that
// share the directory and are refused. It is one line of JSON:
//
//	{"virtlockd":1,"host":"node7","domain":"web","uuid":"c7a5fdbd-...","pid":4711,"since":"2024-05-06T07:08:09Z"}
//
// A lease file is empty or holds just that. Anything else is not ours, and nothing is done to it.
package lease

import (
	"bytes"
	"encoding/json"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// Max bounds a record, in bytes.
const Max = 1024

// prefix is what a record is told by. Its number changes if older daemons must not take it for theirs.
const prefix = `{"virtlockd":1,`

// Record says who holds a lease. What was read from a file may contain any characters.
type Record struct {
	Host   string    `json:"host"`
	Domain string    `json:"domain"`
	UUID   string    `json:"uuid"`
	PID    int32     `json:"pid"`
	Since  time.Time `json:"since"`
}

// Bytes returns the record as it is written. Long names are cut.
func (r *Record) Bytes() []byte {
	for limit := 255; ; limit /= 2 {
		if b := r.append(make([]byte, 0, 256), limit); len(b) <= Max {
			return b
		}
	}
}

func (r *Record) append(b []byte, limit int) []byte {
	b = appendText(append(b, prefix+`"host":`...), r.Host, limit)
	b = appendText(append(b, `,"domain":`...), r.Domain, limit)
	b = appendText(append(b, `,"uuid":`...), r.UUID, limit)
	b = strconv.AppendInt(append(b, `,"pid":`...), int64(r.PID), 10)
	b = r.Since.UTC().AppendFormat(append(b, `,"since":"`...), time.RFC3339)
	return append(b, "\"}\n"...)
}

// appendText leaves all but the plainest to encoding/json.
func appendText(b []byte, s string, limit int) []byte {
	s = s[:min(len(s), limit)]
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			quoted, err := json.Marshal(strings.ToValidUTF8(s, "?"))
			if err != nil {
				panic(err) // there is no such text
			}
			return append(b, quoted...)
		}
	}
	b = append(append(b, '"'), s...)
	return append(b, '"')
}

// Parse reads the whole content of a file. ok says that it is a record.
func Parse(b []byte) (r Record, ok bool) {
	// One line, and no more.
	if len(b) > Max || !bytes.HasPrefix(b, []byte(prefix)) || bytes.IndexByte(b, '\n') != len(b)-1 || !utf8.Valid(b) {
		return Record{}, false
	}
	var versioned struct {
		Record
		Version int `json:"virtlockd"`
	}
	if json.Unmarshal(b, &versioned) != nil || versioned.Version != 1 || versioned.Host == "" || !isUUID(versioned.UUID) {
		return Record{}, false
	}
	return versioned.Record, true
}

func isUUID(s string) bool {
	return len(s) == 36 && strings.Trim(s, "0123456789abcdef-") == ""
}
