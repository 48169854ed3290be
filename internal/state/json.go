// SPDX-License-Identifier: LGPL-2.1-or-later

package state

import (
	"fmt"
	"unicode/utf16"
	"unicode/utf8"
)

// maxDepth bounds nesting; the hand-over file needs nine levels.
const maxDepth = 32

// SyntaxError says that a file is not JSON, or not whole, or nested too deeply.
type SyntaxError struct {
	Offset int // in bytes, from the start of the file
	Msg    string
}

func (e *SyntaxError) Error() string {
	return fmt.Sprintf("the state file is not valid JSON: at byte %d: %s", e.Offset, e.Msg)
}

// A scanner reads strict JSON (RFC 8259) but for one thing: bytes of a string that are not
// UTF-8 are kept as they are, because a name is bytes, and encoding/json would replace them. The first error
// sticks: every method then returns at once.
type scanner struct {
	data  []byte
	pos   int
	depth int
	err   error
}

func (s *scanner) fail(msg string) {
	if s.err == nil {
		s.err = &SyntaxError{Offset: s.pos, Msg: msg}
		s.pos = len(s.data)
	}
}

// peek skips white space and returns the byte after it, 0 at the end.
func (s *scanner) peek() byte {
	for s.pos < len(s.data) {
		switch c := s.data[s.pos]; c {
		case ' ', '\n', '\t', '\r':
			s.pos++
		case 0:
			s.fail("unexpected byte 0x00")
			return 0
		default:
			return c
		}
	}
	return 0
}

// enter begins an object or array. first tells whether there is anything in it.
func (s *scanner) enter(end byte) (first bool) {
	if s.depth++; s.depth > maxDepth {
		s.fail(fmt.Sprintf("nested more than %d levels deep", maxDepth))
		return false
	}
	s.pos++
	if s.peek() == end {
		s.leave()
		return false
	}
	return s.err == nil
}

func (s *scanner) leave() {
	s.depth--
	s.pos++
}

// more goes on after an element of an object or array.
func (s *scanner) more(end byte) bool {
	switch c := s.peek(); {
	case s.err != nil:
	case c == ',':
		s.pos++
		return true
	case c == end:
		s.leave()
	case c == 0:
		s.fail("the file ends too early")
	default:
		s.fail(fmt.Sprintf("expected ',' or %q, found %q", end, c))
	}
	return false
}

// key reads the name of a member of an object, and the colon.
func (s *scanner) key() []byte {
	if s.peek() != '"' {
		s.fail("expected a key")
		return nil
	}
	key := s.str()
	if s.peek() != ':' {
		s.fail("expected ':'")
		return nil
	}
	s.pos++
	return key
}

// skip reads a value of any kind.
func (s *scanner) skip() {
	switch c := s.peek(); c {
	case '{':
		for ok := s.enter('}'); ok; ok = s.more('}') {
			s.key()
			s.skip()
		}
	case '[':
		for ok := s.enter(']'); ok; ok = s.more(']') {
			s.skip()
		}
	case '"':
		s.str()
	case 't':
		s.literal("true")
	case 'f':
		s.literal("false")
	case 'n':
		s.literal("null")
	default:
		s.number()
	}
}

func (s *scanner) literal(word string) {
	if len(s.data)-s.pos < len(word) || string(s.data[s.pos:s.pos+len(word)]) != word {
		s.fail("unknown word")
		return
	}
	s.pos += len(word)
}

// number reads a number as text. peek has been called.
func (s *scanner) number() []byte {
	start := s.pos
	digits := func() bool {
		from := s.pos
		for s.pos < len(s.data) && '0' <= s.data[s.pos] && s.data[s.pos] <= '9' {
			s.pos++
		}
		return s.pos > from
	}
	is := func(chars string) bool {
		for i := range len(chars) {
			if s.pos < len(s.data) && s.data[s.pos] == chars[i] {
				s.pos++
				return true
			}
		}
		return false
	}
	is("-")
	if !is("0") && !digits() {
		s.unexpected()
		return nil
	}
	if is(".") && !digits() {
		s.unexpected()
		return nil
	}
	if is("eE") {
		is("+-")
		if !digits() {
			s.unexpected()
			return nil
		}
	}
	return s.data[start:s.pos]
}

func (s *scanner) unexpected() {
	if s.pos >= len(s.data) {
		s.fail("the file ends too early")
		return
	}
	s.fail(fmt.Sprintf("unexpected %q", s.data[s.pos]))
}

// plain are the bytes that stand for themselves in a string.
var plain = func() (t [256]bool) {
	for c := 0x20; c < len(t); c++ {
		t[c] = c != '"' && c != '\\'
	}
	return t
}()

// str reads a string; data[pos] is its quote. The result is part of data where it can be.
func (s *scanner) str() []byte {
	s.pos++
	start := s.pos
	i := start
	for i < len(s.data) && plain[s.data[i]] {
		i++
	}
	s.pos = i
	if i < len(s.data) && s.data[i] == '"' {
		s.pos++
		return s.data[start:i]
	}
	if i < len(s.data) && s.data[i] == '\\' {
		return s.escaped(append([]byte(nil), s.data[start:i]...))
	}
	s.unexpected()
	return nil
}

// escaped reads on at the first escape sequence of a string.
func (s *scanner) escaped(b []byte) []byte {
	for s.pos < len(s.data) {
		c := s.data[s.pos]
		switch {
		case c == '"':
			s.pos++
			return b
		case c < 0x20:
			s.unexpected()
			return nil
		case c != '\\':
			b = append(b, c)
			s.pos++
			continue
		}
		if s.pos++; s.pos == len(s.data) {
			break
		}
		c = s.data[s.pos]
		s.pos++
		switch c {
		case '"', '\\', '/':
			b = append(b, c)
		case 'b':
			b = append(b, '\b')
		case 'f':
			b = append(b, '\f')
		case 'n':
			b = append(b, '\n')
		case 'r':
			b = append(b, '\r')
		case 't':
			b = append(b, '\t')
		case 'u':
			r := s.hex4()
			if utf16.IsSurrogate(r) {
				low := rune(-1)
				if s.pos+1 < len(s.data) && s.data[s.pos] == '\\' && s.data[s.pos+1] == 'u' {
					s.pos += 2
					low = s.hex4()
				}
				if r = utf16.DecodeRune(r, low); r == utf8.RuneError {
					s.fail("half of a surrogate pair")
				}
			}
			if s.err != nil {
				return nil
			}
			b = utf8.AppendRune(b, r)
		default:
			s.pos--
			s.unexpected()
			return nil
		}
	}
	s.unexpected()
	return nil
}

func (s *scanner) hex4() rune {
	var r rune
	for range 4 {
		if s.pos >= len(s.data) {
			s.unexpected()
			return -1
		}
		c := s.data[s.pos]
		switch {
		case '0' <= c && c <= '9':
			c -= '0'
		case 'a' <= c && c <= 'f':
			c -= 'a' - 10
		case 'A' <= c && c <= 'F':
			c -= 'A' - 10
		default:
			s.unexpected()
			return -1
		}
		r = r<<4 | rune(c)
		s.pos++
	}
	return r
}
