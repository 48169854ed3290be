// SPDX-License-Identifier: LGPL-2.1-or-later

// Package cmdline parses command lines the way GNU getopt_long(3) does: short and long options,
// bundles, "--name=value", unambiguous abbreviations, options after operands, "--" as the end.
// The error texts are glibc's, because scripts and people know them.
package cmdline

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

// Option describes one option.
type Option struct {
	Short rune   // 0: none
	Long  string // without dashes; "": none
	Arg   bool   // takes an argument
	// Do acts on the option; value is "" when Arg is false. An error ends the parsing and is
	// returned as it is. Options act in the order in which they stand.
	Do func(value string) error
}

// UsageError is a command line that doesn't follow the options' rules. Its text is getopt's,
// without the program's name.
type UsageError struct{ text string }

func (e *UsageError) Error() string { return e.text }

func usagef(format string, args ...any) error {
	return &UsageError{fmt.Sprintf(format, args...)}
}

// Parse goes through args (without the program's name), calls Do for each option found and returns
// the operands. Options before a faulty one have acted when Parse returns the fault.
func Parse(options []Option, args []string) (operands []string, err error) {
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		switch {
		case arg == "--":
			return append(operands, args...), nil
		case strings.HasPrefix(arg, "--"):
			args, err = long(options, arg[2:], args)
		case len(arg) > 1 && arg[0] == '-':
			args, err = bundle(options, arg[1:], args)
		default:
			operands = append(operands, arg)
		}
		if err != nil {
			return operands, err
		}
	}
	return operands, nil
}

// long acts on one long option; rest are the arguments after it. It returns what is left of rest.
func long(options []Option, text string, rest []string) ([]string, error) {
	name, value, hasValue := strings.Cut(text, "=")
	o, err := find(options, name, text)
	if err != nil {
		return rest, err
	}
	switch {
	case !o.Arg && hasValue:
		return rest, usagef("option '--%s' doesn't allow an argument", o.Long)
	case o.Arg && !hasValue:
		if len(rest) == 0 {
			return rest, usagef("option '--%s' requires an argument", o.Long)
		}
		value, rest = rest[0], rest[1:]
	}
	return rest, o.Do(value)
}

// find looks up a long option by its name or by a prefix that fits no other one; text is the
// argument as typed, for the error.
func find(options []Option, name, text string) (*Option, error) {
	var found []*Option
	for i := range options {
		o := &options[i]
		switch {
		case o.Long == "":
		case o.Long == name:
			return o, nil
		case strings.HasPrefix(o.Long, name):
			found = append(found, o)
		}
	}
	switch len(found) {
	case 0:
		return nil, usagef("unrecognized option '--%s'", text)
	case 1:
		return found[0], nil
	}
	var b strings.Builder
	for _, o := range found {
		fmt.Fprintf(&b, " '--%s'", o.Long)
	}
	return nil, usagef("option '--%s' is ambiguous; possibilities:%s", text, b.String())
}

// bundle acts on the short options of one argument; rest are the arguments after it. It returns
// what is left of rest.
func bundle(options []Option, text string, rest []string) ([]string, error) {
	for text != "" {
		c, size := utf8.DecodeRuneInString(text)
		raw := text[:size]
		text = text[size:]
		o := short(options, c)
		if o == nil {
			return rest, usagef("invalid option -- '%s'", raw)
		}
		if !o.Arg {
			if err := o.Do(""); err != nil {
				return rest, err
			}
			continue
		}
		value := text
		if value == "" {
			if len(rest) == 0 {
				return rest, usagef("option requires an argument -- '%c'", c)
			}
			value, rest = rest[0], rest[1:]
		}
		return rest, o.Do(value)
	}
	return rest, nil
}

func short(options []Option, c rune) *Option {
	for i := range options {
		if options[i].Short == c && c != 0 {
			return &options[i]
		}
	}
	return nil
}
