// SPDX-License-Identifier: LGPL-2.1-or-later

package logging

import (
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

// What is understood is printed so that it is understood in the same way again.
func FuzzParseSettings(f *testing.F) {
	for _, s := range []string{"", "1:a 2:b", "1:+a", "1:a:b", "3:stderr 4:file:/x", "1:syslog:a 2:journald", "\t+03:file:rel", "9:x", "1:"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if outputs, err := ParseOutputs(s, "/dir"); err == nil {
			again, err := ParseOutputs(FormatOutputs(outputs), "/other")
			if err != nil || !slices.Equal(again, outputs) {
				t.Errorf("%q: %v, printed and parsed again %v, %v", s, outputs, again, err)
			}
		}
		if filters, err := ParseFilters(s); err == nil {
			again, err := ParseFilters(FormatFilters(filters))
			for i := range again { // each print adds a pair of asterisks, which changes nothing
				again[i].Match = strings.TrimSuffix(strings.TrimPrefix(again[i].Match, "*"), "*")
			}
			if err != nil || !slices.Equal(again, filters) {
				t.Errorf("%q: %v, printed and parsed again %v, %v", s, filters, again, err)
			}
		}
	})
}

// Any text becomes one printable line, and a value can be read back.
func FuzzText(f *testing.F) {
	for _, s := range []string{"", "a", "a b", "\n", "\x1b[0m", "\xff", "\u202e", `"`, `\n`, "\ufffd"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		message, value := string(appendEscaped(nil, s, maxMessage)), string(appendQuoted(nil, s))
		for _, text := range []string{message, value} {
			for i, c := range text {
				if !strconv.IsPrint(c) || c == utf8.RuneError && !strings.HasPrefix(text[i:], "\ufffd") {
					t.Fatalf("%q became %q", s, text)
				}
			}
		}
		if len(s) > maxValue {
			return
		}
		got := value
		if strings.HasPrefix(value, `"`) {
			var err error
			if got, err = strconv.Unquote(value); err != nil {
				t.Fatalf("%q became %q: %v", s, value, err)
			}
		} else if strings.ContainsAny(value, ` ="`) || value == "" {
			t.Fatalf("%q isn't quoted", s)
		}
		if got != s {
			t.Fatalf("%q became %q", s, value)
		}
	})
}
