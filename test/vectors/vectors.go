// SPDX-License-Identifier: LGPL-2.1-or-later

// Package vectors replays recorded exchanges with the C daemon against a daemon and reports where it answers or
// acts differently. testdata/vectors.json is the recording; Differences lists where ours differs on purpose.
package vectors

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
)

// Scenario is one recording: what was done to a fresh daemon and what came of it.
type Scenario struct {
	Name   string
	Desc   string
	Config string
	// Crashed says that the C daemon died of SIGSEGV on the way, Ended that the scenario ends it in order.
	Crashed bool
	Ended   bool
	Steps   []Step
}

// Step is one action or one look.
type Step struct {
	Op     string
	Client string
	Label  string

	Socket     string
	OwnProcess bool `json:"own_process"`

	SendHex      string   `json:"send_hex"`
	ExpectHex    string   `json:"expect_hex"`
	ExpectHexAlt []string `json:"expect_hex_alt"`
	Expect       string   // "closed", "no-reply" or "none"

	Action, Path, Arg string

	Exists bool
	Type   string
	Mode   string
	Size   *int64

	Locks []string // type, start and end of each

	ID         string
	Kind       string
	Start, Len int64

	Alive bool

	Signal string
	Wait   float64
}

// Load reads the recording.
func Load(file string) ([]Scenario, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var doc struct{ Scenarios []Scenario }
	if err := json.Unmarshal(b, &doc); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return doc.Scenarios, nil
}

// String describes the step in a line.
func (s Step) String() string {
	switch s.Op {
	case "send":
		return fmt.Sprintf("%s sends %s", s.Client, s.Label)
	case "recv":
		return fmt.Sprintf("%s receives %s", s.Client, s.Label)
	case "fs":
		return fmt.Sprintf("%s %s %s", s.Action, s.Path, s.Arg)
	default:
		return fmt.Sprintf("%s %s%s%s", s.Op, s.Client, s.Path, s.ID)
	}
}

// A Pattern is a sequence of bytes, some of which may be any.
type Pattern struct {
	bytes []byte
	any   []bool
}

// anyBytes is how many bytes the placeholders that stand for unknown values cover.
var anyBytes = map[string]int{"PID:*": 4, "TS": 8}

// ParsePattern reads hexadecimal digits with placeholders: {PID:X} is pid("X") in four bytes, {PID:*} any four
// bytes, {TS} any eight. <6e*300> stands for the digits 6e three hundred times.
func ParsePattern(s string, pid func(client string) (uint32, error)) (Pattern, error) {
	var p Pattern
	s, err := repeat(s)
	if err != nil {
		return p, err
	}
	add := func(b []byte, any bool) {
		p.bytes = append(p.bytes, b...)
		p.any = append(p.any, slices.Repeat([]bool{any}, len(b))...)
	}
	for s != "" {
		digits, rest, found := strings.Cut(s, "{")
		b, err := hex.DecodeString(digits)
		if err != nil {
			return p, err
		}
		add(b, false)
		if !found {
			break
		}
		token, rest, found := strings.Cut(rest, "}")
		if !found {
			return p, errors.New("placeholder is not closed")
		}
		s = rest
		if n := anyBytes[token]; n > 0 {
			add(make([]byte, n), true)
			continue
		}
		client, found := strings.CutPrefix(token, "PID:")
		if !found {
			return p, fmt.Errorf("unknown placeholder %q", token)
		}
		n, err := pid(client)
		if err != nil {
			return p, err
		}
		add(binary.BigEndian.AppendUint32(nil, n), false)
	}
	return p, nil
}

// repeat writes out repetitions. It works on digits: a repetition may start in the middle of a byte.
func repeat(s string) (string, error) {
	var out strings.Builder
	for {
		before, rest, found := strings.Cut(s, "<")
		out.WriteString(before)
		if !found {
			return out.String(), nil
		}
		token, after, found := strings.Cut(rest, ">")
		digits, count, ok := strings.Cut(token, "*")
		n, err := strconv.Atoi(count)
		if !found || !ok || err != nil {
			return "", fmt.Errorf("bad repetition %q", token)
		}
		out.WriteString(strings.Repeat(digits, n))
		s = after
	}
}

// Bytes returns the bytes to send; it is an error if some of them may be any.
func (p Pattern) Bytes() ([]byte, error) {
	for _, any := range p.any {
		if any {
			return nil, errors.New("unknown bytes can't be sent")
		}
	}
	return p.bytes, nil
}

// Matches compares received bytes.
func (p Pattern) Matches(b []byte) bool {
	if len(b) != len(p.bytes) {
		return false
	}
	for i := range b {
		if b[i] != p.bytes[i] && !p.any[i] {
			return false
		}
	}
	return true
}
