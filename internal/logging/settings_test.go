// SPDX-License-Identifier: LGPL-2.1-or-later

package logging

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"virtlockd/internal/conf"
)

// The C daemon (libvirt 9.0.0) was sent these by virt-admin; want is what it then showed, or its error.
func TestParseFilters(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		in, want string
		count    int
	}{
		{"", "", 0},
		{"  ", "", 0},
		{"1:locking 3:util", "1:*locking* 3:*util* ", 2},
		{"1:a 1:a 3:a", "1:*a* 1:*a* 3:*a* ", 3},
		{"1:a,2:b", "1:*a,2* ", 1},
		{"1:a:zz", "1:*a* ", 1},
		{"1:a\t2:b", "1:*a\t2* ", 1},
		{"1:a\n2:b", "1:*a\n2* ", 1},
		{"01:a", "1:*a* ", 1},
		{"+1:a", "1:*a* ", 1},
		{"\t1:a", "1:*a* ", 1},
		{" 1:a ", "1:*a* ", 1},
		{"1:+foo", "1:*foo* ", 1},
		{"1:++a", "1:*+a* ", 1},
		{"1:a+b", "1:*a+b* ", 1},
		{"1:*a*", "1:**a** ", 1},
		{"1:", "invalid argument: Invalid match string ''", 0},
		{"1::a", "invalid argument: Invalid match string ''", 0},
		{"1:+", "invalid argument: Invalid match string '+'", 0},
		{"abc", "invalid argument: Malformed format for filter 'abc'", 0},
		{"1", "invalid argument: Malformed format for filter '1'", 0},
		{":a", "invalid argument: Invalid priority '' for filter ':a'", 0},
		{"::", "invalid argument: Invalid priority '' for filter '::'", 0},
		{"0:a", "invalid argument: Invalid priority '0' for filter '0:a'", 0},
		{"9:foo", "invalid argument: Invalid priority '9' for filter '9:foo'", 0},
		{"1x:a", "invalid argument: Invalid priority '1x' for filter '1x:a'", 0},
		{"++1:a", "invalid argument: Invalid priority '++1' for filter '++1:a'", 0},
		{"-4294967295:a", "invalid argument: Invalid priority '-4294967295' for filter '-4294967295:a'", 0},
		{"1:a 2:b 9:c", "invalid argument: Invalid priority '9' for filter '9:c'", 0},
		{strings.Repeat("1:a ", maxFilters), strings.Repeat("1:*a* ", maxFilters), maxFilters},
		{strings.Repeat("1:a ", maxFilters+1), "invalid argument: More than 1024 filters", 0},
	} {
		filters, err := ParseFilters(tc.in)
		got := FormatFilters(filters)
		if err != nil {
			got = err.Error()
			var invalid *InvalidError
			if !errors.As(err, &invalid) || "invalid argument: "+invalid.Detail != tc.want {
				t.Errorf("%q: %#v", tc.in, err)
			}
		}
		if got != tc.want || len(filters) != tc.count {
			t.Errorf("%.100q: got %.100q, %d, want %.100q, %d", tc.in, got, len(filters), tc.want, tc.count)
		}
	}
}

// As TestParseFilters; the daemon's working directory was /run/w. "" and blanks stand for the default here; the C daemon
// is without any output after blanks.
func TestParseOutputs(t *testing.T) {
	t.Parallel()
	const invalidArg = "invalid argument: "
	var many, tooMany []string
	for i := range maxOutputs {
		many = append(many, fmt.Sprintf("1:file:/%d", i))
	}
	tooMany = append(many[:maxOutputs:maxOutputs], "1:stderr")
	for _, tc := range []struct{ in, want string }{
		{"", ""},
		{"  ", ""},
		{"3:stderr 4:file:/x", "3:stderr 4:file:/x"},
		{"1:file:/run/d/a 3:file:/run/d/a", "3:file:/run/d/a"},
		{"1:stderr 2:stderr 3:stderr", "3:stderr"},
		{"4:stderr 1:file:/run/d/z 3:stderr", "1:file:/run/d/z 3:stderr"},
		{"3:syslog:a 2:syslog:b 4:syslog:a", "2:syslog:b 4:syslog:a"},
		{"1:file:rel", "1:file:/run/w/rel"},
		{"1:file:rel/../x", "1:file:/run/w/x"},
		{"1:file:/run//d/./x", "1:file:/run/d/x"},
		{"1:file:rel 2:file:/run/w/rel", "2:file:/run/w/rel"},
		{"1:file:", "1:file:/run/w"},
		{"1:syslog:", "1:syslog:"},
		{"1:journald", "1:journald"},
		{"01:stderr", "1:stderr"},
		{"foo", invalidArg + "Malformed format for log output 'foo'"},
		{"1", invalidArg + "Malformed format for log output '1'"},
		{"3:syslog:a b", invalidArg + "Malformed format for log output 'b'"},
		{"9:stderr", invalidArg + "Invalid log priority '9' for log output '9:stderr'"},
		{":stderr", invalidArg + "Invalid log priority '' for log output ':stderr'"},
		{"1:bogus", invalidArg + "Invalid log destination 'bogus' for log output '1:bogus'"},
		{"1:", invalidArg + "Invalid log destination '' for log output '1:'"},
		{"1:Stderr", invalidArg + "Invalid log destination 'Stderr' for log output '1:Stderr'"},
		{"3:stderr,1:file:/run/d/x", invalidArg + "Invalid log destination 'stderr,1' for log output '3:stderr,1:file:/run/d/x'"},
		{"3:stderr\t4:file:/run/d/q", invalidArg + "Invalid log destination 'stderr\t4' for log output '3:stderr\t4:file:/run/d/q'"},
		{"1:file:/run/d/a:b", invalidArg + "Log output '1:file:/run/d/a:b' does not meet the format requirements for destination type 'file'"},
		{"1:file", invalidArg + "Log output '1:file' does not meet the format requirements for destination type 'file'"},
		{"1:syslog", invalidArg + "Log output '1:syslog' does not meet the format requirements for destination type 'syslog'"},
		{"1:stderr:x", invalidArg + "Log output '1:stderr:x' does not meet the format requirements for destination type 'stderr'"},
		{"2:stderr:", invalidArg + "Log output '2:stderr:' does not meet the format requirements for destination type 'stderr'"},
		{"1:journald:x", invalidArg + "Log output '1:journald:x' does not meet the format requirements for destination type 'journald'"},
		{strings.Join(many, " "), strings.Join(many, " ")},
		{strings.Join(tooMany, " "), invalidArg + "More than 32 log outputs"},
	} {
		outputs, err := ParseOutputs(tc.in, "/run/w")
		got := FormatOutputs(outputs)
		if err != nil {
			got = err.Error()
		}
		if got != tc.want {
			t.Errorf("%q: got %q, want %q", tc.in, got, tc.want)
		}
	}
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	if o, err := ParseOutputs("1:file:x", ""); err != nil || o[0].Arg != filepath.Join(wd, "x") {
		t.Errorf("got %v, %v, want one in %s", o, err, wd)
	}
}

func TestFilterMatches(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		match, category string
		want            bool
	}{
		{"lock", "locking.lock_daemon", true},
		{"daemon", "locking.lock_daemon", true},
		{"locking.lock_daemon", "locking.lock_daemon", true},
		{"Lock", "locking.lock_daemon", false},
		{"l*k_d*n", "locking.lock_daemon", true},
		{"l?ck?ng", "locking.lock_daemon", true},
		{"l?cking?lock_daemon?", "locking.lock_daemon", false},
		{"[l]ock", "locking.lock_daemon", false},
		{"[l]ock", "a[l]ock", true},
		{"*", "", true},
		{"?", "", false},
		{"rpc", "locking.lock_daemon", false},
		{"a*b*c", "xaxbxbxcx", true},
		{"a*b*c", "xaxcxbx", false},
		{strings.Repeat("a*", 300) + "b", strings.Repeat("a", 5000), false}, // must not take for ever
	} {
		if got := (Filter{Debug, tc.match}).matches(tc.category); got != tc.want {
			t.Errorf("%.40q on %.40q: %t", tc.match, tc.category, got)
		}
	}
}

// settingsOf parses a configuration file named /c.
func settingsOf(t *testing.T, text string) conf.Settings {
	t.Helper()
	f, err := conf.Parse("/c", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	s, err := f.Settings()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestResolve(t *testing.T) {
	t.Parallel()
	fg := Mode{File: "/log", Dir: "/dir"}
	tty := Mode{StdinTTY: true, File: "/log", Dir: "/dir"}
	daemon := Mode{Daemon: true, File: "/log", Dir: "/dir"}
	journald := func(m Mode) Mode { m.Journald = true; return m }
	for _, tc := range []struct {
		name    string
		env     Env
		conf    string
		verbose bool
		mode    Mode
		want    string // level, filters, outputs, default outputs, where the outputs come from
	}{
		{name: "foreground", mode: fg, want: "3 | | 3:stderr | 3:stderr |"},
		{name: "foreground on a terminal", mode: tty, want: "3 | | 3:stderr | 3:stderr |"},
		{name: "foreground with journald", mode: journald(fg), want: "3 | | 3:journald | 3:journald |"},
		{name: "foreground on a terminal with journald", mode: journald(tty), want: "3 | | 3:stderr | 3:stderr |"},
		{name: "-d", mode: daemon, want: "3 | | 3:file:/log | 3:file:/log |"},
		{name: "-d with journald", mode: journald(daemon), want: "3 | | 3:journald | 3:journald |"},
		{name: "-d from a terminal with journald", mode: journald(Mode{Daemon: true, StdinTTY: true}), want: "3 | | 3:journald | 3:journald |"},
		{name: "-v", verbose: true, mode: fg, want: "2 | | 2:stderr | 2:stderr |"},
		{name: "-d -v", verbose: true, mode: daemon, want: "2 | | 2:file:/log | 2:file:/log |"},
		{name: "-d -v with journald", verbose: true, mode: journald(daemon), want: "2 | | 2:journald | 2:journald |"},
		{name: "log_level", conf: "log_level=1", mode: fg, want: "1 | | 1:stderr | 1:stderr |"},
		{name: "log_level 0", conf: "log_level=0", mode: fg, want: "3 | | 3:stderr | 3:stderr |"},
		{name: "no debug messages to journald by default", conf: "log_level=1", mode: journald(fg), want: "1 | | 2:journald | 2:journald |"},
		{name: "LIBVIRT_DEBUG and journald", env: Env{Debug: "1"}, mode: journald(daemon), want: "1 | | 2:journald | 2:journald |"},
		{name: "debug messages to journald when asked for", conf: "log_level=1;log_outputs='1:journald'", mode: journald(fg), want: "1 | | 1:journald | 2:journald | /c:1"},
		{name: "-v beats log_level", conf: "log_level=4", verbose: true, mode: fg, want: "2 | | 2:stderr | 2:stderr |"},
		{name: "-v leaves log_level 1", conf: "log_level=1", verbose: true, mode: fg, want: "1 | | 1:stderr | 1:stderr |"},
		{name: "LIBVIRT_DEBUG beats log_level", env: Env{Debug: "error"}, conf: "log_level=1", mode: fg, want: "4 | | 4:stderr | 4:stderr |"},
		{name: "-v beats LIBVIRT_DEBUG=3", env: Env{Debug: "3"}, verbose: true, mode: fg, want: "2 | | 2:stderr | 2:stderr |"},
		{name: "-v beats LIBVIRT_DEBUG=4", env: Env{Debug: "4"}, verbose: true, mode: fg, want: "2 | | 2:stderr | 2:stderr |"},
		{name: "-v leaves LIBVIRT_DEBUG=1", env: Env{Debug: "1"}, verbose: true, mode: fg, want: "1 | | 1:stderr | 1:stderr |"},
		{name: "LIBVIRT_DEBUG=debug", env: Env{Debug: "debug"}, mode: fg, want: "1 | | 1:stderr | 1:stderr |"},
		{name: "LIBVIRT_DEBUG=info", env: Env{Debug: "info"}, mode: fg, want: "2 | | 2:stderr | 2:stderr |"},
		{name: "LIBVIRT_DEBUG=warning", env: Env{Debug: "warning"}, mode: fg, want: "3 | | 3:stderr | 3:stderr |"},
		{name: "configured filters and outputs", conf: "log_filters='1:x'\nlog_outputs='4:file:y'", mode: fg, want: "3 | 1:*x*  | 4:file:/dir/y | 3:stderr | /c:2"},
		{name: "-v leaves configured outputs", conf: "log_outputs='4:stderr'", verbose: true, mode: fg, want: "2 | | 4:stderr | 2:stderr | /c:1"},
		{name: "environment beats configuration", env: Env{Filters: "2:e", Outputs: "1:syslog:e"}, conf: "log_filters='1:x'\nlog_outputs='4:file:/y'", mode: fg,
			want: "3 | 2:*e*  | 1:syslog:e | 3:stderr | LIBVIRT_LOG_OUTPUTS"},
		{name: "blanks are nothing", env: Env{Filters: " ", Outputs: " "}, conf: "log_filters='1:x'\nlog_outputs='4:file:/y'", mode: fg,
			want: "3 | 1:*x*  | 4:file:/y | 3:stderr | /c:2"},
		{name: "configured blanks", conf: "log_filters=' '\nlog_outputs=' '", mode: fg, want: "3 | | 3:stderr | 3:stderr |"},

		{name: "bad configured filter", conf: "\nlog_filters='x'", mode: fg, want: "/c:2: invalid argument: Malformed format for filter 'x'"},
		{name: "bad configured output", conf: "\nlog_outputs='x'", env: Env{Outputs: "3:stderr"}, mode: fg, want: "/c:2: invalid argument: Malformed format for log output 'x'"},
		{name: "bad LIBVIRT_LOG_FILTERS", env: Env{Filters: "foo"}, mode: fg, want: "LIBVIRT_LOG_FILTERS: invalid argument: Malformed format for filter 'foo'"},
		{name: "bad LIBVIRT_LOG_OUTPUTS", env: Env{Outputs: "foo"}, mode: fg, want: "LIBVIRT_LOG_OUTPUTS: invalid argument: Malformed format for log output 'foo'"},
		{name: "LIBVIRT_DEBUG=x", env: Env{Debug: "x"}, mode: fg, want: "LIBVIRT_DEBUG: invalid argument: Failed to set logging priority, argument 'x' is invalid"},
		{name: "LIBVIRT_DEBUG=0", env: Env{Debug: "0"}, mode: fg, want: "LIBVIRT_DEBUG: invalid argument: Failed to set logging priority, argument '0' is invalid"},
		{name: "LIBVIRT_DEBUG=5", env: Env{Debug: "5"}, mode: fg, want: "LIBVIRT_DEBUG: invalid argument: Failed to set logging priority, argument '5' is invalid"},
		{name: "LIBVIRT_DEBUG=01", env: Env{Debug: "01"}, mode: fg, want: "LIBVIRT_DEBUG: invalid argument: Failed to set logging priority, argument '01' is invalid"},
		{name: "LIBVIRT_DEBUG=+", env: Env{Debug: "+"}, mode: fg, want: "LIBVIRT_DEBUG: invalid argument: Failed to set logging priority, argument '+' is invalid"},
		{name: "LIBVIRT_DEBUG=WARNING", env: Env{Debug: "WARNING"}, mode: fg, want: "LIBVIRT_DEBUG: invalid argument: Failed to set logging priority, argument 'WARNING' is invalid"},
		{name: "LIBVIRT_DEBUG=1 and a blank", env: Env{Debug: "1 "}, mode: fg, want: "LIBVIRT_DEBUG: invalid argument: Failed to set logging priority, argument '1 ' is invalid"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s, err := Resolve(tc.env, settingsOf(t, tc.conf), tc.verbose, tc.mode)
			got := strings.TrimSpace(fmt.Sprintf("%d | %s | %s | %s | %s", s.Level, FormatFilters(s.Filters), FormatOutputs(s.Outputs), FormatOutputs(s.Default), s.OutputsFrom))
			got = strings.Replace(got, "|  |", "| |", 1)
			if err != nil {
				got = err.Error()
				var invalid *InvalidError
				if errors.As(err, &invalid) {
					got = invalid.Source + ": " + got
				}
			}
			if got != tc.want {
				t.Errorf("\ngot  %s\nwant %s", got, tc.want)
			}
		})
	}
}

// Each configuration file that the C daemon was observed with: the same filters and outputs, or the same error.
func TestResolveObserved(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile("../conf/testdata/observed.json")
	if err != nil {
		t.Fatal(err)
	}
	var all []struct{ Conf, Result, Error string }
	if err := json.Unmarshal(b, &all); err != nil {
		t.Fatal(err)
	}
	result := regexp.MustCompile(`(?s)outputs='(.*)' filters=(?:None|'(.*)')$`)
	seen := 0
	for _, o := range all {
		f, err := conf.Parse("/c", []byte(o.Conf))
		if err != nil {
			continue // tested in package conf
		}
		c, err := f.Settings()
		if err != nil {
			continue
		}
		s, err := Resolve(Env{}, c, false, Mode{Dir: "/"})
		switch {
		case strings.HasPrefix(o.Error, "failed to open "): // when applied
			if err != nil || FormatOutputs(s.Outputs) != "3:stderr 1:file:/nodir/x" {
				t.Errorf("%q: got %v, %v", o.Conf, s, err)
			}
		case o.Error != "":
			if err == nil || err.Error() != o.Error {
				t.Errorf("%q: got %v, want %s", o.Conf, err, o.Error)
			}
			seen++
		default:
			want := result.FindStringSubmatch(o.Result)
			if want == nil {
				t.Fatalf("odd result %q", o.Result)
			}
			// virt-admin showed a line end as such; the record of it has it escaped.
			outputs := strings.ReplaceAll(FormatOutputs(s.Outputs), "\n", `\n`)
			if err != nil || outputs != want[1] || FormatFilters(s.Filters) != want[2] {
				t.Errorf("%q: got %q, %q, %v, want %q, %q", o.Conf, outputs, FormatFilters(s.Filters), err, want[1], want[2])
			}
			seen++
		}
	}
	if seen < 50 {
		t.Errorf("only %d cases", seen)
	}
}

func TestEarly(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		debug   string
		verbose bool
		want    string
	}{{"", false, "3:stderr"}, {"", true, "2:stderr"}, {"1", true, "1:stderr"}, {"error", false, "4:stderr"}, {"bogus", false, "3:stderr"}} {
		s := Early(Env{Debug: tc.debug, Outputs: "1:file:/x"}, tc.verbose)
		if got := FormatOutputs(s.Outputs); got != tc.want || FormatOutputs(s.Default) != tc.want || s.Level != s.Outputs[0].Level {
			t.Errorf("%+v: got %+v", tc, s)
		}
	}
}

func TestEnvFrom(t *testing.T) {
	t.Parallel()
	got := EnvFrom(func(name string) string { return "$" + name })
	if got != (Env{"$LIBVIRT_DEBUG", "$LIBVIRT_LOG_FILTERS", "$LIBVIRT_LOG_OUTPUTS"}) {
		t.Errorf("got %+v", got)
	}
}

func TestJournaldPresent(t *testing.T) {
	t.Parallel()
	if JournaldPresent(filepath.Join(t.TempDir(), "none")) {
		t.Error("a socket that isn't there is present")
	}
	if path, _ := listen(t, syscall.SOCK_DGRAM); !JournaldPresent(path) {
		t.Error("a socket isn't present")
	}
}
