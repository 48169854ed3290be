// SPDX-License-Identifier: LGPL-2.1-or-later

package conf

import (
	"bytes"
	"errors"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// printFile writes entries so that they parse to the same again.
func printFile(b *bytes.Buffer, entries []Entry) {
	for _, e := range entries {
		b.WriteString(e.Name + " = ")
		printValue(b, e.value)
		b.WriteByte('\n')
	}
}

func printValue(b *bytes.Buffer, v value) {
	switch v.kind {
	case integer:
		if v.negative {
			b.WriteByte('-')
		}
		b.WriteString(strconv.FormatUint(v.number, 10))
	case text:
		quote := `"`
		switch {
		case strings.ContainsAny(v.text, "\r\n"):
			quote = `"""`
		case strings.Contains(v.text, `"`):
			quote = `'`
		}
		b.WriteString(quote + v.text + quote)
	case list:
		b.WriteString("[ ")
		for _, e := range v.list {
			printValue(b, e)
			b.WriteString(", ")
		}
		b.WriteString("]")
	}
}

// printable reports whether some form of string can hold all texts within v: three double quotes beside both a single
// quote and a line end can't be written at all.
func printable(v value) bool {
	for _, e := range v.list {
		if !printable(e) {
			return false
		}
	}
	oneLine := !strings.ContainsAny(v.text, "\r\n")
	return oneLine && (!strings.Contains(v.text, `"`) || !strings.Contains(v.text, `'`)) ||
		!strings.Contains(v.text, `"""`) && !strings.HasSuffix(v.text, `"`) && !oneLine
}

var equal = cmp.AllowUnexported(Entry{}, value{})

func drawValue(depth int) *rapid.Generator[value] {
	return rapid.Custom(func(t *rapid.T) value {
		kinds := 2
		if depth > 0 {
			kinds = 3
		}
		switch v := (value{kind: kind(rapid.IntRange(0, kinds-1).Draw(t, "kind"))}); v.kind {
		case integer:
			v.number = rapid.Uint64().Draw(t, "number")
			v.negative = rapid.Bool().Draw(t, "negative")
			return v
		case text:
			v.text = rapid.StringMatching(`[^\x00]*`).Filter(func(s string) bool { return printable(value{text: s}) }).Draw(t, "text")
			return v
		default:
			v.list = rapid.SliceOfN(drawValue(depth-1), 1, 4).Draw(t, "list")
			return v
		}
	})
}

// What is printed parses to what it was printed from, whatever blanks, comments and line ends come between.
func TestPrintParse(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var want []Entry
		var b bytes.Buffer
		for range rapid.IntRange(0, 6).Draw(t, "definitions") {
			noise := rapid.SampledFrom([]string{"", "\n", "# c\n", " \t", "\r\n\r\n", "  # x = 1\n\n"}).Draw(t, "noise")
			b.WriteString(noise)
			e := Entry{
				Name:  rapid.StringMatching(`[A-Za-z][A-Za-z0-9_]{0,9}`).Draw(t, "name"),
				Line:  1 + bytes.Count(b.Bytes(), []byte("\n")),
				value: drawValue(2).Draw(t, "value"),
			}
			want = append(want, e)
			printFile(&b, []Entry{e})
		}
		f, err := Parse("f", b.Bytes())
		if err != nil {
			t.Fatalf("%q: %v", b.String(), err)
		}
		if d := cmp.Diff(want, f.Entries, equal); d != "" {
			t.Fatalf("%q: (-want +got)\n%s", b.String(), d)
		}
	})
}

// No input crashes the parser; each error is one of its own and names a line within the file; what was parsed and can be
// printed parses to the same again.
func FuzzParse(f *testing.F) {
	for _, s := range []string{
		"", "\n", "# c\n", "max_clients = 3 # c\r\nlog_level=1;x='a'", "log_outputs = \"\"\"1:file:/x\n\"\"\"\n",
		"x = [ 1, 'a', [ \"b\", ], ]", "x = -", "x=[", "x = \"a", "\xef\xbb\xbfx=1", "x=1\x00", "x=99999999999999999999",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		file, err := Parse("f", data)
		if err != nil {
			var e *Error
			if !errors.As(err, &e) || e.Line < 1 || e.Line > 1+bytes.Count(data, []byte("\n")) {
				t.Fatalf("odd error %#v", err)
			}
			return
		}
		_, _ = file.Settings()
		for _, e := range file.Entries {
			if !printable(e.value) {
				return
			}
		}
		var b bytes.Buffer
		printFile(&b, file.Entries)
		again, err := Parse("f", b.Bytes())
		if err != nil {
			t.Fatalf("%q, printed from %q: %v", b.String(), data, err)
		}
		for i := range min(len(file.Entries), len(again.Entries)) { // printing moves definitions to other lines
			file.Entries[i].Line, again.Entries[i].Line = 0, 0
		}
		if d := cmp.Diff(file.Entries, again.Entries, equal); d != "" {
			t.Fatalf("%q, printed from %q: (-want +got)\n%s", b.String(), data, d)
		}
	})
}
