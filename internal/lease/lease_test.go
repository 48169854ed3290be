// SPDX-License-Identifier: LGPL-2.1-or-later

package lease

import (
	"strings"
	"testing"
	"time"
)

var example = Record{Host: "node7", Domain: "web", UUID: "11111111-1111-1111-1111-111111111111", PID: 4711, Since: time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC)}

func TestRecord(t *testing.T) {
	t.Parallel()
	const want = `{"virtlockd":1,"host":"node7","domain":"web","uuid":"11111111-1111-1111-1111-111111111111","pid":4711,"since":"2024-05-06T07:08:09Z"}` + "\n"
	if got := string(example.Bytes()); got != want {
		t.Errorf("got %s", got)
	}
	for _, name := range []string{"web", `a"b\c`, "ä\x00\n\x1b\u202e", "", strings.Repeat("x", 255)} {
		r := example
		r.Domain = name
		if got, ok := Parse(r.Bytes()); !ok || got != r {
			t.Errorf("%q became %+v, %v", name, got, ok)
		}
	}
	for _, name := range []string{"\xff\xfe", strings.Repeat("\x00", 1<<16), strings.Repeat("ä", 1000)} {
		r := example
		r.Domain, r.Host = name, name
		b := r.Bytes()
		if _, ok := Parse(b); !ok || len(b) > Max {
			t.Errorf("%.20q became %d bytes, %s", name, len(b), b)
		}
	}
}

// What is not a record is somebody else's.
func TestForeign(t *testing.T) {
	t.Parallel()
	good := string(example.Bytes())
	for _, text := range []string{
		"", "\n", "data", good[:len(good)-1], good + "\n", good + "x", good + good, " " + good, strings.ToUpper(good),
		strings.Replace(good, `:1,`, `:2,`, 1), strings.Replace(good, `"pid":4711`, `"pid":"4711"`, 1), strings.Replace(good, `"pid":4711`, `"pid":99999999999`, 1),
		strings.Replace(good, "}", `,"virtlockd":2}`, 1), strings.Replace(good, "2024", "x", 1), strings.Replace(good, "node7", "", 1),
		strings.Replace(good, "11111111-", "\\u001b[1m-", 1), strings.Replace(good, "web", "\xff", 1), strings.Replace(good, "web", strings.Repeat("x", Max), 1), `{"virtlockd":1,}` + "\n", `{"virtlockd":1,"host":"x"}`,
	} {
		if r, ok := Parse([]byte(text)); ok {
			t.Errorf("%.60q is a record: %+v", text, r)
		}
	}
	// One of a later version with more in it is one.
	if _, ok := Parse([]byte(strings.Replace(good, "}", `,"more":[1]}`, 1))); !ok {
		t.Error("unknown fields are refused")
	}
}

// Whatever lies in a file, what is taken for a record can be written again and is the same then.
func FuzzParse(f *testing.F) {
	f.Add(example.Bytes())
	f.Add([]byte(`{"virtlockd":1,"host":"\u0000\ud800","uuid":"11111111-1111-1111-1111-111111111111","pid":-1,"since":"0001-01-01T00:00:00+23:59"}` + "\n"))
	f.Add([]byte("data"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, ok := Parse(b)
		if !ok {
			if r != (Record{}) {
				t.Errorf("no record, but %+v", r)
			}
			return
		}
		again := r.Bytes()
		if len(b) > Max || len(again) > Max {
			t.Errorf("%d and %d bytes", len(b), len(again))
		}
		if _, ok := Parse(again); !ok && r.Since.UTC().Year() < 10000 {
			t.Errorf("%q becomes %q, which is none", b, again)
		}
	})
}
