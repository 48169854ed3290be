// SPDX-License-Identifier: LGPL-2.1-or-later

package conf

import (
	"bytes"
	"fmt"
	"math"
	"math/bits"
)

// parser reads the text from front to back, one byte of look-ahead. A NUL is an ordinary byte outside of strings, where
// nothing takes it; a string ends at its first NUL, as in C.
type parser struct {
	name   string
	data   []byte
	pos    int
	line   int
	values int // so far, for maxValues
}

func (p *parser) fail(format string, args ...any) error {
	return &Error{File: p.name, Line: p.line, Class: "configuration file syntax error", Detail: fmt.Sprintf(format, args...)}
}

// peek returns the next byte, 0 at the end.
func (p *parser) peek() byte {
	if p.pos < len(p.data) {
		return p.data[p.pos]
	}
	return 0
}

func (p *parser) skipBlanks() {
	for p.peek() == ' ' || p.peek() == '\t' {
		p.pos++
	}
}

func (p *parser) skipBlanksAndEOL() {
	for {
		switch p.peek() {
		case '\n':
			p.line++
		case ' ', '\t', '\r':
		default:
			return
		}
		p.pos++
	}
}

// skipComment goes to the end of the line, not over it.
func (p *parser) skipComment() {
	if n := bytes.IndexAny(p.data[p.pos:], "\r\n"); n >= 0 {
		p.pos += n
	} else {
		p.pos = len(p.data)
	}
}

func isEOL(c byte) bool    { return c == '\n' || c == '\r' }
func isDigit(c byte) bool  { return '0' <= c && c <= '9' }
func isLetter(c byte) bool { return 'a' <= c|0x20 && c|0x20 <= 'z' }

// definition reads name = value and a comment behind it.
func (p *parser) definition() (Entry, error) {
	e := Entry{Line: p.line}
	start := p.pos
	if !isLetter(p.peek()) {
		return e, p.fail("expecting a name")
	}
	for c := p.peek(); isLetter(c) || isDigit(c) || c == '_'; c = p.peek() {
		p.pos++
	}
	e.Name = string(p.data[start:p.pos])
	p.skipBlanks()
	if p.peek() != '=' {
		return e, p.fail("expecting an assignment")
	}
	p.pos++
	p.skipBlanks()
	var err error
	if e.value, err = p.value(0); err != nil {
		return e, err
	}
	p.skipBlanks()
	if p.peek() == '#' {
		p.skipComment()
	}
	return e, nil
}

// separator reads what must stand between two definitions; the end of the file will do.
func (p *parser) separator() error {
	p.skipBlanks()
	switch {
	case p.pos == len(p.data):
		return nil
	case p.peek() == ';':
		p.pos++
	case !isEOL(p.peek()):
		return p.fail("expecting a separator")
	}
	p.skipBlanksAndEOL()
	return nil
}

func (p *parser) value(depth int) (value, error) {
	if p.values++; p.values > maxValues {
		return value{}, p.fail("more than %d values", maxValues)
	}
	switch c := p.peek(); {
	case c == '"' || c == '\'':
		s, err := p.text()
		return value{kind: text, text: s}, err
	case c == '[':
		if depth == maxDepth {
			return value{}, p.fail("more than %d lists within each other", maxDepth)
		}
		l, err := p.list(depth + 1)
		return value{kind: list, list: l}, err
	case c == '-' || c == '+' || isDigit(c):
		return p.integer()
	}
	return value{}, p.fail("expecting a value")
}

// text reads a string in any of its three forms.
func (p *parser) text() (string, error) {
	quote := p.data[p.pos]
	// The C daemon looks for three quotes only if at least seven bytes are left.
	if long := []byte(`"""`); len(p.data)-p.pos > 2*len(long) && bytes.HasPrefix(p.data[p.pos:], long) {
		p.pos += len(long)
		start := p.pos
		for !bytes.HasPrefix(p.data[p.pos:], long) {
			if len(p.data)-p.pos < len(long) {
				return "", p.fail("unterminated string")
			}
			if p.data[p.pos] == '\n' {
				p.line++
			}
			p.pos++
		}
		p.pos += len(long)
		return untilNUL(p.data[start : p.pos-len(long)]), nil
	}
	p.pos++
	start := p.pos
	for p.pos < len(p.data) && !isEOL(p.data[p.pos]) {
		if p.data[p.pos] == quote {
			p.pos++
			return untilNUL(p.data[start : p.pos-1]), nil
		}
		p.pos++
	}
	return "", p.fail("unterminated string")
}

func untilNUL(b []byte) string {
	b, _, _ = bytes.Cut(b, []byte{0})
	return string(b)
}

func (p *parser) list(depth int) ([]value, error) {
	p.pos++ // the bracket
	var l []value
	p.skipBlanksAndEOL()
	for p.pos < len(p.data) && p.data[p.pos] != ']' {
		if len(l) > 0 {
			if p.data[p.pos] != ',' {
				return nil, p.fail("expecting a separator in list")
			}
			p.pos++
			p.skipBlanksAndEOL()
			if p.peek() == ']' {
				break
			}
		}
		v, err := p.value(depth)
		if err != nil {
			return nil, err
		}
		l = append(l, v)
		p.skipBlanksAndEOL()
	}
	if p.peek() != ']' {
		return nil, p.fail("list is not closed with ]")
	}
	p.pos++
	return l, nil
}

func (p *parser) integer() (value, error) {
	v := value{kind: integer}
	if c := p.peek(); c == '-' || c == '+' {
		v.negative = c == '-'
		p.pos++
	}
	if !isDigit(p.peek()) {
		return v, p.fail("unterminated number")
	}
	for ; isDigit(p.peek()); p.pos++ {
		high, low := bits.Mul64(v.number, 10)
		sum, carry := bits.Add64(low, uint64(p.peek()-'0'), 0)
		if high != 0 || carry != 0 {
			sum = math.MaxUint64 // out of every range; the C daemon goes on modulo 2^64
		}
		v.number = sum
	}
	return v, nil
}
