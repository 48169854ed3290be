// SPDX-License-Identifier: LGPL-2.1-or-later

package logging

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"virtlockd/internal/conf"
	"virtlockd/internal/strerror"
)

// Settings is one complete set of log settings. What was passed to Apply or came from Logs.Settings must not be changed.
type Settings struct {
	Level   Level    // for messages that no filter matches
	Filters []Filter // in order; the first that matches a message's category counts
	Outputs []Output // at least one, each Dest and Arg once
	Default []Output // what SetOutputs("") goes back to
	// OutputsFrom says where Outputs come from (FILE:LINE or an environment variable), for errors; "" for the default.
	OutputsFrom string
}

// Filter sets the level of the categories that match it.
type Filter struct {
	Level Level
	Match string // pattern for any part of a category: '*' is any text, '?' any character
}

// Dest is the kind of an output.
type Dest uint8

// The kinds of outputs.
const (
	Stderr Dest = iota
	File
	Syslog
	Journald
)

var destNames = [...]string{Stderr: "stderr", File: "file", Syslog: "syslog", Journald: "journald"}

// String returns the name that is used in log_outputs.
func (d Dest) String() string { return destNames[d] }

// takesArg reports whether something must follow in log_outputs.
func (d Dest) takesArg() bool { return d == File || d == Syslog }

// Output is one place that messages of Level and above go to.
type Output struct {
	Level Level
	Dest  Dest
	Arg   string // File: the absolute path; Syslog: the identifier; else ""
}

// same reports whether both write to the same place.
func (o Output) same(p Output) bool { return o.Dest == p.Dest && o.Arg == p.Arg }

// String returns the form of log_outputs.
func (o Output) String() string {
	if o.Dest.takesArg() {
		return fmt.Sprintf("%d:%s:%s", o.Level, o.Dest, o.Arg)
	}
	return fmt.Sprintf("%d:%s", o.Level, o.Dest)
}

// FormatFilters prints filters as the C daemon does, with the asterisks that are understood and a blank behind each.
func FormatFilters(filters []Filter) string {
	var b strings.Builder
	for _, f := range filters {
		fmt.Fprintf(&b, "%d:*%s* ", f.Level, f.Match)
	}
	return b.String()
}

// FormatOutputs prints outputs as the C daemon does.
func FormatOutputs(outputs []Output) string {
	var b strings.Builder
	for i, o := range outputs {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(o.String())
	}
	return b.String()
}

// InvalidError is a log setting that makes no sense. Its text is the C daemon's, which reports these with code 8 (invalid
// argument) and domain 0; it doesn't have Source in it.
type InvalidError struct {
	Source string // where it was set: FILE:LINE or the environment variable; "" at run time
	Detail string
}

func (e *InvalidError) Error() string { return "invalid argument: " + e.Detail }

// OpenError is a log file that couldn't be opened. The C daemon reports it with code 38 (system error), domain 0, this
// text and the errno.
type OpenError struct {
	Path string
	Err  error // a syscall.Errno
}

func (e *OpenError) Error() string {
	var errno syscall.Errno
	errors.As(e.Err, &errno)
	return fmt.Sprintf("failed to open %s: %s", e.Path, strerror.Text(errno))
}

func (e *OpenError) Unwrap() error { return e.Err }

// Bounds of what may be set; the C daemon has none.
const (
	maxFilters = 1024
	maxOutputs = 32
)

func invalid(format string, args ...any) error {
	return &InvalidError{Detail: fmt.Sprintf(format, args...)}
}

// ParseFilters parses log_filters: "LEVEL:TEXT ...", divided by blanks. A '+' before the text (it once asked for stack
// traces) and anything from a second colon on are ignored. The error is an *InvalidError.
func ParseFilters(s string) ([]Filter, error) {
	var filters []Filter
	for item := range strings.SplitSeq(s, " ") {
		if item == "" {
			continue
		}
		parts := strings.Split(item, ":")
		if len(parts) < 2 {
			return nil, invalid("Malformed format for filter '%s'", item)
		}
		level, ok := parseLevel(parts[0])
		if !ok {
			return nil, invalid("Invalid priority '%s' for filter '%s'", parts[0], item)
		}
		match := strings.TrimPrefix(parts[1], "+")
		if match == "" {
			return nil, invalid("Invalid match string '%s'", parts[1])
		}
		if len(filters) == maxFilters {
			return nil, invalid("More than %d filters", maxFilters)
		}
		filters = append(filters, Filter{level, match})
	}
	return filters, nil
}

// ParseOutputs parses log_outputs: "LEVEL:stderr", "LEVEL:journald", "LEVEL:syslog:IDENTIFIER" and "LEVEL:file:PATH",
// divided by blanks; so no path can have a blank or a colon. A relative path starts at dir, the working directory if that
// is "". Of several for the same place the last one stays. The error is an *InvalidError.
func ParseOutputs(s, dir string) ([]Output, error) {
	var outputs []Output
	for item := range strings.SplitSeq(s, " ") {
		if item == "" {
			continue
		}
		parts := strings.Split(item, ":")
		if len(parts) < 2 {
			return nil, invalid("Malformed format for log output '%s'", item)
		}
		level, ok := parseLevel(parts[0])
		if !ok {
			return nil, invalid("Invalid log priority '%s' for log output '%s'", parts[0], item)
		}
		dest := slices.Index(destNames[:], parts[1])
		if dest < 0 {
			return nil, invalid("Invalid log destination '%s' for log output '%s'", parts[1], item)
		}
		o := Output{Level: level, Dest: Dest(dest)}
		want := 2
		if o.Dest.takesArg() {
			want = 3
		}
		if len(parts) != want {
			return nil, invalid("Log output '%s' does not meet the format requirements for destination type '%s'", item, o.Dest)
		}
		switch o.Dest {
		case File:
			o.Arg = absolute(parts[2], dir)
		case Syslog:
			o.Arg = parts[2]
		}
		outputs = slices.DeleteFunc(outputs, o.same)
		if len(outputs) == maxOutputs {
			return nil, invalid("More than %d log outputs", maxOutputs)
		}
		outputs = append(outputs, o)
	}
	return outputs, nil
}

// absolute returns the clean absolute form of path.
func absolute(path, dir string) string {
	if filepath.IsAbs(path) {
		return filepath.Clean(path)
	}
	if dir == "" {
		dir, _ = os.Getwd() // a working directory that is gone has no name; only "/" remains
	}
	return filepath.Join("/", dir, path)
}

// parseLevel takes what the C daemon does: white space and a '+' may precede the number, zeros too.
func parseLevel(s string) (Level, bool) {
	s = strings.TrimPrefix(strings.TrimLeft(s, "\t\n\v\f\r "), "+")
	if s == "" || s[0] == '+' {
		return 0, false
	}
	s = strings.TrimLeft(s, "0")
	if len(s) != 1 || s[0] < '1' || s[0] > '4' {
		return 0, false
	}
	return Level(s[0] - '0'), true
}

// matches reports whether the filter is for that category.
func (f Filter) matches(category string) bool {
	return glob("*"+f.Match+"*", category)
}

// glob matches all of s against the pattern, in which only '*' and '?' are special. It goes back to the last '*' only,
// which is enough, so no pattern takes longer than the product of both lengths.
func glob(pattern, s string) bool {
	p, i := 0, 0
	star, from := -1, 0
	for i < len(s) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, from = p, i
			p++
		case p < len(pattern) && (pattern[p] == '?' || pattern[p] == s[i]):
			p++
			i++
		case star >= 0:
			from++
			p, i = star+1, from
		default:
			return false
		}
	}
	return strings.Trim(pattern[p:], "*") == ""
}

// Env holds the environment variables that take part. "" is the same as unset.
type Env struct {
	Debug   string // LIBVIRT_DEBUG: the level, 1 to 4 or its name
	Filters string // LIBVIRT_LOG_FILTERS
	Outputs string // LIBVIRT_LOG_OUTPUTS
}

// EnvFrom takes the variables from getenv (os.Getenv).
func EnvFrom(getenv func(string) string) Env {
	return Env{Debug: getenv("LIBVIRT_DEBUG"), Filters: getenv("LIBVIRT_LOG_FILTERS"), Outputs: getenv("LIBVIRT_LOG_OUTPUTS")}
}

// Mode is what relative paths and the default output depend on.
type Mode struct {
	Daemon   bool   // -d
	StdinTTY bool   // standard input is a terminal
	Journald bool   // see JournaldPresent
	File     string // absolute path of the log file of -d without journald
	Dir      string // absolute path that relative ones start at; "" for the working directory
}

// JournaldPresent reports whether journald's socket is at that path (JournaldSocket if "") and can be written to.
func JournaldPresent(path string) bool {
	if path == "" {
		path = JournaldSocket
	}
	return unix.Access(path, unix.W_OK) == nil
}

// Resolve decides the settings from environment, configuration, -v and mode. Environment beats configuration; -v lowers
// the level to Info if it would be higher. A bad value is an *InvalidError with its Source, also where another one beats it.
func Resolve(env Env, c conf.Settings, verbose bool, mode Mode) (Settings, error) {
	s := Settings{Level: Warning}
	if c.LogLevel != 0 {
		s.Level = Level(c.LogLevel)
	}
	var err error
	if s.Filters, err = ParseFilters(c.LogFilters); err != nil {
		return Settings{}, from(c.Where("log_filters"), err)
	}
	if s.Outputs, err = ParseOutputs(c.LogOutputs, mode.Dir); err != nil {
		return Settings{}, from(c.Where("log_outputs"), err)
	}
	s.OutputsFrom = c.Where("log_outputs")

	if env.Debug != "" {
		level, ok := parseDebug(env.Debug)
		if !ok {
			return Settings{}, from("LIBVIRT_DEBUG", invalid("Failed to set logging priority, argument '%s' is invalid", env.Debug))
		}
		s.Level = level
	}
	filters, err := ParseFilters(env.Filters)
	if err != nil {
		return Settings{}, from("LIBVIRT_LOG_FILTERS", err)
	}
	if len(filters) > 0 {
		s.Filters = filters
	}
	outputs, err := ParseOutputs(env.Outputs, mode.Dir)
	if err != nil {
		return Settings{}, from("LIBVIRT_LOG_OUTPUTS", err)
	}
	if len(outputs) > 0 {
		s.Outputs, s.OutputsFrom = outputs, "LIBVIRT_LOG_OUTPUTS"
	}

	if verbose {
		s.Level = min(s.Level, Info)
	}
	s.Default = []Output{mode.output(s.Level)}
	if len(s.Outputs) == 0 {
		s.Outputs, s.OutputsFrom = s.Default, ""
	}
	return s, nil
}

// output returns the default output.
func (m Mode) output(level Level) Output {
	switch {
	case m.Journald && (m.Daemon || !m.StdinTTY):
		return Output{Level: max(level, Info), Dest: Journald} // debug messages would drown everybody else's
	case m.Daemon:
		return Output{Level: level, Dest: File, Arg: m.File}
	}
	return Output{Level: level, Dest: Stderr}
}

// Early returns the settings for the time before the configuration is read: all goes to stderr. A bad LIBVIRT_DEBUG is
// ignored, Resolve will refuse it.
func Early(env Env, verbose bool) Settings {
	level, ok := parseDebug(env.Debug)
	if !ok {
		level = Warning
	}
	if verbose {
		level = min(level, Info)
	}
	outputs := []Output{{Level: level, Dest: Stderr}}
	return Settings{Level: level, Outputs: outputs, Default: outputs}
}

func parseDebug(s string) (Level, bool) {
	if i := slices.Index(levelNames[:], s); i >= 0 && s != "" {
		return Level(i), true
	}
	if len(s) != 1 {
		return 0, false
	}
	return parseLevel(s)
}

// from adds to an *InvalidError where the value was set.
func from(source string, err error) error {
	var e *InvalidError
	if errors.As(err, &e) {
		return &InvalidError{Source: source, Detail: e.Detail}
	}
	return err
}
