// SPDX-License-Identifier: LGPL-2.1-or-later

package cmdline

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var errStop = errors.New("stop")

// record makes options that note what was called, in order.
func record(calls *[]string) []Option {
	note := func(name string) func(string) error {
		return func(v string) error {
			*calls = append(*calls, name+"="+v)
			if v == "stop" || name == "version" {
				return errStop
			}
			return nil
		}
	}
	return []Option{
		{Short: 'v', Long: "verbose", Do: note("verbose")},
		{Short: 'd', Long: "daemon", Do: note("daemon")},
		{Short: 'f', Long: "config", Arg: true, Do: note("config")},
		{Short: 't', Long: "timeout", Arg: true, Do: note("timeout")},
		{Short: 'V', Long: "version", Do: note("version")},
		{Long: "keeper", Do: note("keeper")},
		{Long: "keep", Do: note("keep")},
		{Short: 'q', Do: note("quiet")},
	}
}

func TestParse(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		args     string // fields; "''" is an empty argument
		calls    string
		operands string
		err      string
	}{
		{args: ""},
		{args: "-v", calls: "verbose="},
		{args: "--verbose", calls: "verbose="},
		{args: "--verb -d", calls: "verbose= daemon="},
		{args: "-vd", calls: "verbose= daemon="},
		{args: "-t5", calls: "timeout=5"},
		{args: "-t 5", calls: "timeout=5"},
		{args: "-vt5 -d", calls: "verbose= timeout=5 daemon="},
		{args: "-vt -d", calls: "verbose= timeout=-d"},
		{args: "-tv", calls: "timeout=v"},
		{args: "--timeout=5", calls: "timeout=5"},
		{args: "--timeout= -d", calls: "timeout= daemon="},
		{args: "--timeout 5", calls: "timeout=5"},
		{args: "--ti=5=6", calls: "timeout=5=6"},
		{args: "--timeout --", calls: "timeout=--"},
		{args: "-f '' -d", calls: "config= daemon="},
		{args: "a -v b", calls: "verbose=", operands: "a b"},
		{args: "-v -- -d b", calls: "verbose=", operands: "-d b"},
		{args: "-", operands: "-"},
		{args: "-q", calls: "quiet="},
		{args: "--keep", calls: "keep="}, // an exact name wins over a longer one
		{args: "--keepe", calls: "keeper="},
		{args: "--kee", err: "option '--kee' is ambiguous; possibilities: '--keeper' '--keep'"},
		{args: "--ver", err: "option '--ver' is ambiguous; possibilities: '--verbose' '--version'"},
		{args: "--ver=1", err: "option '--ver=1' is ambiguous; possibilities: '--verbose' '--version'"},
		{args: "--=1", err: "option '--=1' is ambiguous; possibilities: '--verbose' '--daemon' '--config' '--timeout' '--version' '--keeper' '--keep'"},
		{args: "-x", err: "invalid option -- 'x'"},
		{args: "-?", err: "invalid option -- '?'"},
		{args: "-vx", calls: "verbose=", err: "invalid option -- 'x'"},
		{args: "-\x00", err: "invalid option -- '\x00'"},
		{args: "-\xff", err: "invalid option -- '\xff'"},
		{args: "--bogus", err: "unrecognized option '--bogus'"},
		{args: "--bogus=3", err: "unrecognized option '--bogus=3'"},
		{args: "--verbose=1", err: "option '--verbose' doesn't allow an argument"},
		{args: "--verb=1", err: "option '--verbose' doesn't allow an argument"},
		{args: "-f", err: "option requires an argument -- 'f'"},
		{args: "--config", err: "option '--config' requires an argument"},
		{args: "--con", err: "option '--config' requires an argument"},
		{args: "-V -x", calls: "version=", err: "stop"}, // a later fault isn't reached
		{args: "-Vx", calls: "version=", err: "stop"},
		{args: "-x -V", err: "invalid option -- 'x'"},
		{args: "-f stop -v", calls: "config=stop", err: "stop"},
	} {
		t.Run(tt.args, func(t *testing.T) {
			var args, calls []string
			for _, f := range strings.Fields(tt.args) {
				args = append(args, strings.ReplaceAll(f, "''", ""))
			}
			operands, err := Parse(record(&calls), args)
			text := ""
			if err != nil {
				text = err.Error()
			}
			got := [3]string{strings.Join(calls, " "), strings.Join(operands, " "), text}
			if diff := cmp.Diff([3]string{tt.calls, tt.operands, tt.err}, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			var usage *UsageError
			if err != nil && errors.As(err, &usage) == errors.Is(err, errStop) {
				t.Errorf("error %v has the wrong kind", err)
			}
		})
	}
}

// Whatever is typed, each argument is used once: as an option, a value or an operand.
func FuzzParse(f *testing.F) {
	for _, seed := range []string{"-v", "-vt5\n--\n-d", "--timeout=5\nx", "--ver", "-f", "-\xff", "--\n-", "a\n-dv\nb"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		args := strings.Split(text, "\n")
		var calls []string
		operands, err := Parse(record(&calls), args)
		if err != nil {
			var usage *UsageError
			if !errors.Is(err, errStop) && !errors.As(err, &usage) {
				t.Fatalf("%q: error of an unknown kind: %v", args, err)
			}
			return
		}
		rest := args
		for _, o := range operands {
			i := slices.Index(rest, o)
			if i < 0 {
				t.Fatalf("%q: operands %q aren't a part of it in order", args, operands)
			}
			rest = rest[i+1:]
		}
		for _, arg := range args {
			if len(calls) == 0 && !slices.Contains(operands, arg) && arg != "--" {
				t.Fatalf("%q: %q was lost", args, arg)
			}
		}
	})
}
