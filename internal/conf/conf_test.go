// SPDX-License-Identifier: LGPL-2.1-or-later

package conf

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
)

// observed is a configuration file and what the C daemon (libvirt 9.0.0), started with it as /run/c.conf, made of it.
type observed struct {
	Conf, Hex string
	Result    string // the limits and log settings it then ran with
	Error     string // or why it didn't start
}

func loadObserved(t *testing.T) []observed {
	t.Helper()
	b, err := os.ReadFile("testdata/observed.json")
	if err != nil {
		t.Fatal(err)
	}
	var all []observed
	if err := json.Unmarshal(b, &all); err != nil {
		t.Fatal(err)
	}
	for i, o := range all {
		if o.Hex != "" {
			raw, err := hex.DecodeString(o.Hex)
			if err != nil {
				t.Fatal(err)
			}
			all[i].Conf = string(raw)
		}
	}
	if len(all) < 130 {
		t.Fatalf("only %d observed cases", len(all))
	}
	return all
}

var lineOf = regexp.MustCompile(`(/run/c\.conf):\d+`)

func TestObserved(t *testing.T) {
	t.Parallel()
	for _, o := range loadObserved(t) {
		t.Run(o.Conf, func(t *testing.T) {
			t.Parallel()
			f, err := Parse("/run/c.conf", []byte(o.Conf))
			var s Settings
			if err == nil {
				s, err = f.Settings()
			}
			switch {
			case o.Conf == "max_clients = 0\n": // wanted difference
				want := "invalid argument: /run/c.conf:1: max_clients must be at least 1: with 0 no virtual machine could get a lock; leave it out for the default of 1024"
				if err == nil || err.Error() != want {
					t.Fatalf("got %v, want %s", err, want)
				}
			case o.Conf == "admin_max_clients = 0\n": // the same
				if err == nil || !strings.HasPrefix(err.Error(), "invalid argument: /run/c.conf:1: admin_max_clients must be at least 1: ") {
					t.Fatalf("got %v", err)
				}
			case strings.HasPrefix(o.Error, "configuration file syntax error: "):
				if err == nil || err.Error() != o.Error {
					t.Fatalf("got %v, want %s", err, o.Error)
				}
			case strings.HasPrefix(o.Error, "internal error: "), strings.Contains(o.Error, "Failed to set logging priority"):
				// Ours name the line too, and the file in any case.
				if err == nil {
					t.Fatalf("no error, want %s", o.Error)
				}
				plain := lineOf.ReplaceAllString(err.Error(), "$1")
				if plain == err.Error() {
					t.Errorf("no line in %q", err)
				}
				if plain != o.Error && strings.Replace(plain, "/run/c.conf: ", "", 1) != o.Error {
					t.Errorf("got %v, want %s", err, o.Error)
				}
			case o.Error != "": // about the inside of log_filters and log_outputs: package logging
				if err != nil {
					t.Fatal(err)
				}
			default:
				if err != nil {
					t.Fatalf("%v, want %s", err, o.Result)
				}
				want := fmt.Sprintf("max=%d unauth=%d admin=%d ", s.MaxClients, s.MaxClients, s.AdminMaxClients)
				if !strings.HasPrefix(o.Result, want) {
					t.Errorf("got %s, want %s", want, o.Result)
				}
			}
		})
	}
}

func TestSettings(t *testing.T) {
	t.Parallel()
	const file = `
log_level = 2
# a comment; not_a = "definition"
log_filters = '1:locking 3:util' ; max_clients = 7
log_outputs = """3:stderr
4:file:/x"""
log_level = 4		# repeated: the first one counts
lock_manager = "lockd"
admin_max_clients = +012
Log_Level = [ 1, [ "a", 'b', ], ]
`
	f, err := Parse("v.conf", []byte(file))
	if err != nil {
		t.Fatal(err)
	}
	s, err := f.Settings()
	if err != nil {
		t.Fatal(err)
	}
	if s.LogLevel != 2 || s.LogFilters != "1:locking 3:util" || s.LogOutputs != "3:stderr\n4:file:/x" || s.MaxClients != 7 || s.AdminMaxClients != 12 {
		t.Errorf("got %+v", s)
	}
	for key, want := range map[string]string{
		"log_level": "v.conf:2", "log_filters": "v.conf:4", "max_clients": "v.conf:4", "log_outputs": "v.conf:5", "admin_max_clients": "v.conf:9", "absent": "",
	} {
		if got := s.Where(key); got != want {
			t.Errorf("Where(%s) = %q, want %q", key, got, want)
		}
	}
	var unknown []string
	for _, e := range s.Unknown() {
		unknown = append(unknown, fmt.Sprintf("%s:%d", e.Name, e.Line))
	}
	if got := strings.Join(unknown, " "); got != "lock_manager:8 Log_Level:10" {
		t.Errorf("unknown keys: %s", got)
	}
	if d := Defaults(); d.Where("log_level") != "" || d.Unknown() != nil {
		t.Errorf("the defaults come from nowhere, got %q, %v", d.Where("log_level"), d.Unknown())
	}
}

// Every key that virtlockd knows is complained about in the same way, with its line.
func TestWrongTypes(t *testing.T) {
	t.Parallel()
	for key := range known {
		isText := strings.HasPrefix(key, "log_f") || strings.HasPrefix(key, "log_o") || key == "lock_lost_action"
		for _, v := range []string{"5", "-5", "-0", "'s'", "[]", "4294967296", "18446744073709551621"} {
			want := ""
			switch {
			case isText && v != "'s'":
				want = "internal error: f:3: expected a string for '" + key + "' parameter"
			case !isText && (strings.HasPrefix(v, "4") || strings.HasPrefix(v, "1")):
				want = "internal error: f:3: value for '" + key + "' parameter must be in range 0:4294967295"
			case !isText && v != "5":
				want = "internal error: f:3: expected an unsigned integer for '" + key + "' parameter"
			case isText && key == "lock_lost_action":
				want = `invalid argument: f:3: lock_lost_action must be "log", "pause" or "kill", not "s"`
			case key == "log_level":
				want = "invalid argument: f:3: Failed to set logging priority, argument '5' is invalid"
			}
			f, err := Parse("f", []byte("\n\n"+key+" = "+v+"\n"))
			if err != nil {
				t.Fatal(err)
			}
			got := ""
			if _, err := f.Settings(); err != nil {
				got = err.Error()
				var e *Error
				if !errors.As(err, &e) || e.File != "f" || e.Line != 3 {
					t.Errorf("%s = %s: %#v", key, v, err)
				}
			}
			if got != want {
				t.Errorf("%s = %s: got %q, want %q", key, v, got, want)
			}
		}
	}
}

func TestStrings(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		`x = "a\"`:             `a\`,
		`x = 'a"b'`:            `a"b`,
		`x = "a'b"`:            `a'b`,
		"x = \"\xff\xfe\"":     "\xff\xfe",
		"x = \"a\x00b\"":       "a",
		"x = \"\"":             "",
		"x = \"\"\"a\"b\"\"\"": "a\"b",
		"x = \"\"\"\n\n\"\"\"": "\n\n",
	} {
		f, err := Parse("f", []byte(in))
		if err != nil {
			t.Errorf("%q: %v", in, err)
			continue
		}
		got := "unset"
		if err := f.Text("x", &got); err != nil || got != want {
			t.Errorf("%q: got %q, %v, want %q", in, got, err, want)
		}
	}
}

func TestBounds(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct{ text, want string }{
		"deep":       {"x=" + strings.Repeat("[", maxDepth) + strings.Repeat("]", maxDepth), ""},
		"too deep":   {"x=" + strings.Repeat("[", 1<<20), "configuration file syntax error: f:1: more than 64 lists within each other"},
		"many":       {strings.Repeat("a=1\n", maxValues), ""},
		"too many":   {strings.Repeat("a=1\n", maxValues+1), "configuration file syntax error: f:131073: more than 131072 values"},
		"long list":  {"x=[" + strings.Repeat("1,", maxValues) + "]", "configuration file syntax error: f:1: more than 131072 values"},
		"long name":  {strings.Repeat("a", 1<<20) + "=1", ""},
		"long value": {"a='" + strings.Repeat("a", 1<<20) + "'", ""},
	} {
		_, err := Parse("f", []byte(tc.text))
		if got := fmt.Sprint(err); (err == nil) != (tc.want == "") || err != nil && got != tc.want {
			t.Errorf("%s: got %v, want %q", name, err, tc.want)
		}
	}
}

func TestLoad(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	padding := "\nmax_clients = 3\n"
	full := write("full", "#"+strings.Repeat("x", MaxSize-len(padding)-1)+padding)
	over := write("over", "#"+strings.Repeat("x", MaxSize-len(padding))+padding)
	missing := filepath.Join(dir, "missing")

	if s, err := LoadSettings(full, false); err != nil || s.MaxClients != 3 {
		t.Errorf("10 MiB: %d, %v", s.MaxClients, err)
	}
	for path, want := range map[string]string{
		over:        "Failed to read file '" + over + "': Value too large for defined data type",
		missing:     "Failed to open file '" + missing + "': No such file or directory",
		dir:         "Failed to read file '" + dir + "': Is a directory",
		"":          "Failed to open file '': No such file or directory",
		"/dev/zero": "Failed to read file '/dev/zero': Value too large for defined data type",
	} {
		if _, err := LoadSettings(path, false); err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	_, err := Load(over)
	if !errors.Is(err, syscall.EOVERFLOW) {
		t.Errorf("%v is no EOVERFLOW", err)
	}
	if _, err := Load(missing); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v is no ErrNotExist", err)
	}
	if s, err := LoadSettings(missing, true); err != nil || s.MaxClients != 1024 || s.AdminMaxClients != 5000 || s.LogLevel != 0 {
		t.Errorf("missing default file: %+v, %v", s, err)
	}
	if _, err := LoadSettings(dir, true); err == nil {
		t.Error("an unreadable default file was passed over")
	}
	if _, err := LoadSettings(write("bad", "max_clients"), true); err == nil {
		t.Error("a broken default file was passed over")
	}
}

// A FIFO would hold up the start, and every reload after it.
func TestLoadFIFO(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path); err == nil {
		t.Error("a FIFO was read")
	}
}
