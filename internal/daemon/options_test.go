// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"slices"
	"strings"
	"testing"
	"time"

	"virtlockd/internal/state"
)

func TestParseTimeout(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		in   string
		want time.Duration
		ok   bool
	}{
		{"0", 0, true},
		{"-0", 0, true},
		{"1", time.Second, true},
		{"+1", time.Second, true},
		{"01", time.Second, true},
		{" 1", time.Second, true},
		{"\t1", time.Second, true},
		{"1 ", time.Second, true},
		{"2147483647", 2147483647 * time.Second, true},
		{"2147483648", 0, false},
		{"4294967296", 0, false},
		{"99999999999", 0, false},
		{"99999999999999999999999", 0, false},
		{"-1", 0, false},
		{"", 0, false},
		{" ", 0, false},
		{"abc", 0, false},
		// strtol(3) would stop where it can't go on; we don't guess.
		{"1x", 0, false},
		{"1.5", 0, false},
		{"1 2", 0, false},
		{"0x1", 0, false},
		{"1_000", 0, false},
	} {
		got, err := parseTimeout(tt.in)
		if got != tt.want || (err == nil) != tt.ok {
			t.Errorf("%q: %v, %v; want %v, ok %v", tt.in, got, err, tt.want, tt.ok)
		}
		if err != nil && exitCode(err) != exitUsage {
			t.Errorf("%q: exit code %d", tt.in, exitCode(err))
		}
	}
}

func TestParseOptionsLastWins(t *testing.T) {
	t.Parallel()
	o, err := parseOptions(strings.Fields("-f a -f b --pid-file=x -p y -t 5 -t 0 -dv extra"))
	if err != nil {
		t.Fatal(err)
	}
	if *o.config != "b" || *o.pidFile != "y" || o.timeout != 0 || !o.detach || !o.verbose || len(o.ignored) != 1 {
		t.Errorf("got %+v (config %q, pid file %q)", o, *o.config, *o.pidFile)
	}
	o, err = parseOptions(nil)
	if err != nil || o.config != nil || o.pidFile != nil {
		t.Errorf("nothing given: %+v, %v", o, err)
	}
}

func TestArgumentsForC(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ args, want string }{
		{"virtlockd", "virtlockd"},
		{"virtlockd --keeper", "virtlockd"},
		{"--keeper --keeper", "--keeper"},
		{"v -d --no-keeper -v", "v -d -v"},
		{"v --no-k --ke -f x", "v -f x"},
		{"v -f --keeper --keeper", "v -f --keeper"},
		{"v -vf --keeper -vp--keeper --keeper", "v -vf --keeper -vp--keeper"},
		{"v --config --keeper --conf=x --keeper", "v --config --keeper --conf=x"},
		{"v --keeper -- --keeper", "v -- --keeper"},
		{"v --verbose -t 5 -p x", "v --verbose -t 5 -p x"},
	} {
		args := strings.Fields(tt.args)
		if got := strings.Join(argumentsFor(state.C, args), " "); got != tt.want {
			t.Errorf("%q becomes %q, want %q", tt.args, got, tt.want)
		}
		if got := argumentsFor(state.Ours, args); !slices.Equal(got, args) {
			t.Errorf("%q becomes %q for ours", tt.args, got)
		}
	}
}
