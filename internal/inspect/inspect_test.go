// SPDX-License-Identifier: LGPL-2.1-or-later

package inspect

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"virtlockd/internal/xdr"
)

func TestRoundTrip(t *testing.T) {
	t.Parallel()
	at := time.Date(2024, 2, 29, 12, 0, 0, 123456789, time.UTC)
	want := Locks{Next: 7, Locks: []Lock{{
		Lockspace: "/ls", Resource: "a\xffb", Path: "/ls/a\xffb", Mode: "shared", Kind: "OFD", Remote: true,
		File:   File{Dev: 1 << 60, Ino: 1<<64 - 1},
		Owners: []Owner{{Name: "a\"\n\x00", PID: -1, Since: at}, {Name: "\u2028"}},
	}}}
	b, err := Append([]byte("before"), want)
	if err != nil {
		t.Fatal(err)
	}
	b = b[len("before"):]
	var got Locks
	if err := Decode(b, MaxReply, &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	for n := range b {
		if err := Decode(b[:n], MaxReply, &got); !errors.Is(err, xdr.ErrDecode) {
			t.Fatalf("the first %d of %d bytes: %v", n, len(b), err)
		}
	}
	if err := Decode(b, 10, &got); !errors.Is(err, xdr.ErrDecode) {
		t.Errorf("beyond the limit: %v", err)
	}
}

// The encoder for many locks writes what the one for everything does.
func TestEncodeLocks(t *testing.T) {
	t.Parallel()
	text := rapid.Custom(func(t *rapid.T) Text {
		return Text(rapid.OneOf(rapid.StringMatching(`[a-z/]*`), rapid.String(), rapid.Map(rapid.SliceOf(rapid.Byte()), func(b []byte) string { return string(b) })).Draw(t, "text"))
	})
	rapid.Check(t, func(t *rapid.T) {
		want := Locks{Locks: []Lock{}, Table: rapid.Int64().Draw(t, "table"), Next: rapid.Int().Draw(t, "next")}
		e := EncodeLocks([]byte("before"))
		for range rapid.IntRange(0, 3).Draw(t, "locks") {
			l := Lock{
				Lockspace: text.Draw(t, "lockspace"), Resource: text.Draw(t, "resource"), Path: text.Draw(t, "path"),
				Mode: rapid.String().Draw(t, "mode"), Kind: rapid.String().Draw(t, "kind"),
				AutoCreate: rapid.Bool().Draw(t, "autocreate"), Remote: rapid.Bool().Draw(t, "remote"), CrashSafe: rapid.Bool().Draw(t, "safe"),
				File:   File{Dev: rapid.Uint64().Draw(t, "dev"), Ino: rapid.Uint64().Draw(t, "ino"), Block: rapid.Bool().Draw(t, "block")},
				Owners: []Owner{},
			}
			for range rapid.IntRange(0, 3).Draw(t, "owners") {
				o := Owner{Name: text.Draw(t, "name"), UUID: rapid.String().Draw(t, "uuid"), PID: rapid.Int32().Draw(t, "pid"), Kind: rapid.String().Draw(t, "kind")}
				if ns := rapid.Int64().Draw(t, "since"); ns > 0 {
					o.Since = time.Unix(0, ns).UTC()
				}
				l.Owners = append(l.Owners, o)
			}
			want.Locks = append(want.Locks, l)
			e.Add(&l)
		}
		b, err := Append([]byte("before"), want)
		if err != nil {
			t.Fatal(err)
		}
		if got := e.End(want.Table, want.Next); !bytes.Equal(got, b) {
			t.Fatalf("got  %q\nwant %q", got, b)
		}
	})
}

// A reader of another version is not disturbed.
func TestOtherVersion(t *testing.T) {
	t.Parallel()
	b, err := Append(nil, map[string]any{"from": 3, "of_tomorrow": map[string]any{"a": []int{1}}})
	if err != nil {
		t.Fatal(err)
	}
	var p Part
	if err := Decode(b, MaxRequest, &p); err != nil || p != (Part{From: 3}) {
		t.Errorf("%+v, %v", p, err)
	}
	for _, text := range []string{"", "{", "[]", "{} {}", `{"from":"x"}`, `{"from":1e99}`, strings.Repeat("[", 100000)} {
		if err := Decode(xdr.AppendBytes(nil, []byte(text)), MaxRequest, &p); err == nil {
			t.Errorf("%.20q decodes", text)
		}
	}
}

// Any bytes come through.
func TestText(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		want := Text(rapid.SliceOf(rapid.Byte()).Draw(t, "bytes"))
		if rapid.Bool().Draw(t, "valid") {
			want = Text(rapid.String().Draw(t, "text"))
		}
		b, err := json.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		var got Text
		if err := json.Unmarshal(b, &got); err != nil || got != want {
			t.Fatalf("%q became %q by %s, %v", want, got, b, err)
		}
	})
	var x Text
	for _, text := range []string{"1", "[]", `{"base64":"!"}`} {
		if err := json.Unmarshal([]byte(text), &x); err == nil {
			t.Errorf("%s is a text", text)
		}
	}
}
