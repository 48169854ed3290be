// SPDX-License-Identifier: LGPL-2.1-or-later

package logging

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"testing/slogtest"
	"time"
)

// newLogs returns logs that write to the outputs; "FILE" in them stands for the path of a new file, which is returned too.
func newLogs(t *testing.T, c Config, level Level, filters, outputs string) (*Logs, string) {
	t.Helper()
	if c.Version == "" {
		c.Version, c.Package = "9.0.0", "ours 1.2"
	}
	if c.Hostname == "" {
		c.Hostname = "vm"
	}
	if c.PID == 0 {
		c.PID = 50
	}
	path := filepath.Join(t.TempDir(), "log")
	s := Settings{Level: level}
	var err error
	if s.Filters, err = ParseFilters(filters); err != nil {
		t.Fatal(err)
	}
	if s.Outputs, err = ParseOutputs(strings.ReplaceAll(outputs, "FILE", path), "/nowhere"); err != nil {
		t.Fatal(err)
	}
	s.Default = s.Outputs
	l, err := New(c, s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		_ = l.Close(ctx) // tests that care close it themselves
	})
	return l, path
}

func flush(t *testing.T, l *Logs) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := l.Flush(ctx); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

var someTime = time.Date(2026, 11, 22, 9, 17, 31, 788_999_999, time.FixedZone("CET", 3600))

// logOne passes a record without its caller to the handler of log.
func logOne(t *testing.T, log *slog.Logger, level slog.Level, message string, attrs ...slog.Attr) {
	t.Helper()
	r := slog.NewRecord(someTime, level, message, 0)
	r.AddAttrs(attrs...)
	if err := log.Handler().Handle(t.Context(), r); err != nil {
		t.Fatal(err)
	}
}

const heading = "2026-11-22 08:17:31.788+0000: 50: info : libvirt version: 9.0.0, package: ours 1.2\n" +
	"2026-11-22 08:17:31.788+0000: 50: info : hostname: vm\n"

func TestLine(t *testing.T) {
	t.Parallel()
	l, path := newLogs(t, Config{}, Debug, "", "1:file:FILE")
	log := l.Logger().With(Category, "locking.lock_daemon")
	logOne(t, log, slog.LevelDebug, "one")
	logOne(t, log, slog.LevelInfo+1, "two")
	logOne(t, log, slog.LevelWarn, "three", slog.Int("pid", 7), slog.String("path", "/a b"), slog.String("name", ""))
	logOne(t, log, slog.LevelError, "", slog.Any("error", errors.New("no")), slog.Int(ErrorCode, 1))
	flush(t, l)
	want := heading +
		"2026-11-22 08:17:31.788+0000: 50: debug : one\n" +
		"2026-11-22 08:17:31.788+0000: 50: info : two\n" +
		"2026-11-22 08:17:31.788+0000: 50: warning : three: pid=7 path=\"/a b\" name=\"\"\n" +
		"2026-11-22 08:17:31.788+0000: 50: error : : error=no\n"
	if got := read(t, path); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// A record of a real caller has its function and line, the process id and the time of now.
func TestCaller(t *testing.T) {
	t.Parallel()
	l, path := newLogs(t, Config{}, Warning, "", "1:file:FILE")
	before := time.Now()
	l.Logger().Warn("here")
	flush(t, l)
	line := strings.Split(read(t, path), "\n")[2]
	m := regexp.MustCompile(`^(\S+ \S+)\+0000: 50: warning : logging\.TestCaller:(\d+) : here$`).FindStringSubmatch(line)
	if m == nil {
		t.Fatal(line)
	}
	at, err := time.Parse("2006-01-02 15:04:05.000", m[1])
	if err != nil || at.Before(before.Add(-time.Millisecond)) || at.After(time.Now()) {
		t.Errorf("time %s, %v", m[1], err)
	}
}

// parseLine takes a line apart as slogtest wants it.
func parseLine(t *testing.T, line string) map[string]any {
	t.Helper()
	m := regexp.MustCompile(`^(?:(\S+ \S+\+0000): )?\d+: (\w+) : (?:\S+:\d+ : )?([^:]*)(?::( .*))?$`).FindStringSubmatch(line)
	if m == nil {
		t.Fatalf("odd line %q", line)
	}
	parsed := map[string]any{slog.LevelKey: m[2], slog.MessageKey: m[3]}
	if m[1] != "" {
		parsed[slog.TimeKey] = m[1]
	}
	token := func(s string) (string, string) {
		if strings.HasPrefix(s, `"`) {
			quoted, err := strconv.QuotedPrefix(s)
			if err != nil {
				t.Fatalf("%v in %q", err, line)
			}
			plain, err := strconv.Unquote(quoted)
			if err != nil {
				t.Fatalf("%v in %q", err, line)
			}
			return plain, s[len(quoted):]
		}
		end := strings.IndexAny(s, " =")
		if end < 0 {
			end = len(s)
		}
		return s[:end], s[end:]
	}
	for rest := m[4]; rest != ""; {
		var key, value string
		key, rest = token(strings.TrimPrefix(rest, " "))
		value, rest = token(strings.TrimPrefix(rest, "="))
		in := parsed
		groups := strings.Split(key, ".")
		for _, g := range groups[:len(groups)-1] {
			if in[g] == nil {
				in[g] = map[string]any{}
			}
			in = in[g].(map[string]any)
		}
		in[groups[len(groups)-1]] = value
	}
	return parsed
}

func TestSlogConformance(t *testing.T) {
	t.Parallel()
	var l *Logs
	var path string
	slogtest.Run(t, func(t *testing.T) slog.Handler {
		l, path = newLogs(t, Config{}, Debug, "", "1:file:FILE")
		return l.Logger().Handler()
	}, func(t *testing.T) map[string]any {
		flush(t, l)
		lines := strings.Split(strings.TrimSuffix(read(t, path), "\n"), "\n")
		if len(lines) != 3 {
			t.Fatalf("%d lines", len(lines))
		}
		return parseLine(t, lines[2])
	})
}

type panics struct{}

func (panics) Error() string { panic("on purpose") }

type marshals string

func (m marshals) MarshalText() ([]byte, error) {
	if m == "fails" {
		return nil, errors.New("on purpose")
	}
	return []byte("mar shalled"), nil
}

func TestAttributes(t *testing.T) {
	t.Parallel()
	plain := func(log *slog.Logger) *slog.Logger { return log }
	for _, tc := range []struct {
		name  string
		with  func(*slog.Logger) *slog.Logger
		attrs []slog.Attr
		want  string
	}{
		{"none", plain, nil, "m"},
		{"numbers", plain, []slog.Attr{slog.Int("i", -1), slog.Uint64("u", 1<<63), slog.Bool("b", true), slog.Float64("f", 1.5)}, "m: i=-1 u=9223372036854775808 b=true f=1.5"},
		{"time and duration", plain, []slog.Attr{slog.Time("t", someTime), slog.Duration("d", 1500*time.Millisecond)}, "m: t=2026-11-22T08:17:31.788Z d=1.5s"},
		{"any", plain, []slog.Attr{slog.Any("nil", nil), slog.Any("bytes", []byte("a b")), slog.Any("stringer", Warning), slog.Any("text", marshals("")), slog.Any("list", []int{1, 2})},
			`m: nil=<nil> bytes="a b" stringer=warning text="mar shalled" list="[1 2]"`},
		{"failing text", plain, []slog.Attr{slog.Any("text", marshals("fails"))}, "m: text=fails"},
		{"panic", plain, []slog.Attr{slog.Any("p", panics{}), slog.Int("i", 1)}, `m: p="!PANIC: on purpose" i=1`},
		{"quoting", plain, []slog.Attr{slog.String("q", `a"b`), slog.String("e", "a=b"), slog.String("n", "a\nb"), slog.String("x", "\xff"), slog.String("bs", `a\nb`), slog.String("u", "ü"), slog.String("rtl", "\u202e")},
			`m: q="a\"b" e="a=b" n="a\nb" x="\xff" bs=a\nb u=ü rtl="\u202e"`},
		{"keys", plain, []slog.Attr{slog.String("a b", "c"), slog.String("", "d"), slog.String("e\n", "f")}, `m: "a b"=c ""=d "e\n"=f`},
		{"groups", plain, []slog.Attr{slog.Group("g", slog.Int("a", 1), slog.Group("h", slog.Int("b", 2)), slog.Group("empty")), slog.Group("", slog.Int("c", 3))}, "m: g.a=1 g.h.b=2 c=3"},
		{"with", func(log *slog.Logger) *slog.Logger {
			return log.With("a", 1).WithGroup("g").With("b", 2).WithGroup("").WithGroup("h")
		}, []slog.Attr{slog.Int("c", 3)}, "m: a=1 g.b=2 g.h.c=3"},
		{"category in the record", plain, []slog.Attr{slog.String(Category, "x")}, "m: category=x"},
		{"category in a group", func(log *slog.Logger) *slog.Logger { return log.WithGroup("g").With(Category, "x") }, nil, "m: g.category=x"},
		{"category", func(log *slog.Logger) *slog.Logger { return log.With("a", 1, Category, "x", "b", 2) }, nil, "m: a=1 b=2"},
		{"numbers of errors", func(log *slog.Logger) *slog.Logger { return log.With(ErrorDomain, 7) }, []slog.Attr{slog.Int(ErrorCode, 1), slog.Group("g", slog.Int(ErrorCode, 1))}, "m: g.libvirt_code=1"},
		{"numbers of errors that are none", plain, []slog.Attr{slog.String(ErrorCode, "x")}, "m: libvirt_code=x"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			l, path := newLogs(t, Config{}, Debug, "", "1:file:FILE")
			logOne(t, tc.with(l.Logger()), slog.LevelInfo, "m", tc.attrs...)
			flush(t, l)
			want := heading + "2026-11-22 08:17:31.788+0000: 50: info : " + tc.want + "\n"
			if got := read(t, path); got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
		})
	}
}

// Loggers made from one must not write into each other's attributes, however much room those have.
func TestWithDoesNotShare(t *testing.T) {
	t.Parallel()
	l, path := newLogs(t, Config{}, Debug, "", "1:file:FILE")
	want := heading
	for n := range 40 {
		a := strings.Repeat("x", n+1)
		base := l.Logger().With("a", a)
		one, two := base.With("b", 1), base.With("b", 2)
		logOne(t, one, slog.LevelInfo, "m")
		logOne(t, two, slog.LevelInfo, "m")
		for b := 1; b <= 2; b++ {
			want += fmt.Sprintf("2026-11-22 08:17:31.788+0000: 50: info : m: a=%s b=%d\n", a, b)
		}
	}
	flush(t, l)
	if got := read(t, path); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// Whatever is in a message, an attribute, the host's name or a version: no output gets a line or an escape sequence more.
func TestInjection(t *testing.T) {
	t.Parallel()
	const evil = "a\n2026-11-22 08:17:31.788+0000: 1: error : forged\r\x1b[2J\x00\x7f\u009b\u2028\u202e\xfe\xffz"
	const escaped = `a\n2026-11-22 08:17:31.788+0000: 1: error : forged\r\x1b[2J\x00\x7f\u009b\u2028\u202e\xfe\xffz`
	l, path := newLogs(t, Config{Version: evil, Package: evil, Hostname: evil}, Debug, "", "1:file:FILE")
	logOne(t, l.Logger().With(evil, evil), slog.LevelInfo, evil, slog.String(evil, evil), slog.Any("e", errors.New(evil)))
	flush(t, l)
	const start = "2026-11-22 08:17:31.788+0000: 50: info : "
	want := start + "libvirt version: " + escaped + ", package: " + escaped + "\n" +
		start + "hostname: " + escaped + "\n" +
		start + escaped + `: "` + escaped + `"="` + escaped + `" "` + escaped + `"="` + escaped + `" e="` + escaped + `"` + "\n"
	if got := read(t, path); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestLengths(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 5<<20)
	for _, tc := range []struct {
		name, message string
		attrs         []slog.Attr
		suffix        string
	}{
		{"message", long, []slog.Attr{slog.Int("pid", 7)}, fmt.Sprintf("xxx...(%d more bytes): pid=7\n", len(long)-maxMessage)},
		{"value", "m", []slog.Attr{slog.String("name", long), slog.Int("pid", 7)}, fmt.Sprintf("xxx...(%d more bytes) pid=7\n", len(long)-maxValue)},
		{"quoted value", "m", []slog.Attr{slog.String("name", long[:maxValue-1]+" "), slog.Int("pid", 7)}, "xxx \" pid=7\n"},
		{"just right", "m", []slog.Attr{slog.String("name", long[:maxValue])}, "xxx\n"},
		{"all escaped", "m", []slog.Attr{slog.String("name", strings.Repeat("\x00", maxValue)), slog.Int("pid", 7)}, "\\x00\\x00\" pid=7\n"},
		{"many", "m", []slog.Attr{slog.String("a", strings.Repeat("é", 2000)), slog.String("b", strings.Repeat("\xff", 4000)), slog.String("c", strings.Repeat("\xff", 4000)),
			slog.String("d", strings.Repeat("é", 8000)), slog.String("e", strings.Repeat("\xff", 4000)), slog.String("f", strings.Repeat("é", 8000))}, " more bytes)\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			l, path := newLogs(t, Config{}, Debug, "", "1:file:FILE")
			logOne(t, l.Logger(), slog.LevelInfo, tc.message, tc.attrs...)
			flush(t, l)
			got := strings.TrimPrefix(read(t, path), heading)
			if !strings.HasSuffix(got, tc.suffix) || strings.Count(got, "\n") != 1 || len(got) > maxText+200 || strings.ToValidUTF8(got, "?") != got {
				t.Errorf("%d bytes, ...%q, want ...%q", len(got), got[max(0, len(got)-80):], tc.suffix)
			}
		})
	}
}

// Which messages an output gets: the category's level and the output's own both count.
func TestLevels(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		level            Level
		filters, outputs string
		want             string // levels of category "locking.lock_daemon", then of "rpc.netserver"
	}{
		{Warning, "", "1:file:FILE", "34 34"},
		{Error, "", "1:file:FILE", "4 4"}, // log_outputs doesn't make up for log_level
		{Debug, "", "1:file:FILE", "1234 1234"},
		{Debug, "", "3:file:FILE", "34 34"},
		{Warning, "1:lock", "1:file:FILE", "1234 34"},
		{Warning, "1:lock", "2:file:FILE", "234 34"},
		{Debug, "4:lock", "1:file:FILE", "4 1234"},
		{Warning, "4:lock 1:lock", "1:file:FILE", "4 34"}, // the first one that matches
		{Warning, "1:nothing 2:?pc.*server", "1:file:FILE", "34 234"},
		{Error, "2:*", "1:file:FILE", "234 234"},
	} {
		l, path := newLogs(t, Config{}, tc.level, tc.filters, tc.outputs)
		var got []string
		for _, category := range []string{"locking.lock_daemon", "rpc.netserver"} {
			log := l.Logger().With(Category, category)
			enabled := ""
			for level, sl := range map[Level]slog.Level{Debug: slog.LevelDebug, Info: slog.LevelInfo, Warning: slog.LevelWarn, Error: slog.LevelError} {
				if log.Enabled(t.Context(), sl) {
					enabled += strconv.Itoa(int(level))
				}
				log.Log(t.Context(), sl, "message", "of", fmt.Sprintf("%s/%d", category, level))
			}
			flush(t, l)
			seen := ""
			for level := Debug; level <= Error; level++ {
				if strings.Contains(read(t, path), fmt.Sprintf("message: of=%s/%d\n", category, level)) {
					seen += strconv.Itoa(int(level))
				}
			}
			if len(enabled) != len(seen) {
				t.Errorf("%v: %s is enabled for %s and logged %s", tc, category, enabled, seen)
			}
			got = append(got, seen)
		}
		if g := strings.Join(got, " "); g != tc.want {
			t.Errorf("%v: got %s", tc, g)
		}
	}
}

// Several outputs take what their own levels let through.
func TestOutputLevels(t *testing.T) {
	t.Parallel()
	l, path := newLogs(t, Config{}, Info, "", "4:file:FILE 1:file:FILE2")
	l.Logger().Debug("one")
	l.Logger().Info("two")
	l.Logger().Error("three")
	flush(t, l)
	first, second := read(t, path), read(t, path+"2")
	if strings.Count(first, "\n") != 3 || !strings.HasSuffix(first, " : three\n") {
		t.Error(first)
	}
	if strings.Count(second, "\n") != 4 || !strings.Contains(second, " : two\n") || !strings.HasSuffix(second, " : three\n") {
		t.Error(second)
	}
}

func BenchmarkDisabled(b *testing.B) {
	l, err := New(Config{}, Settings{Level: Warning, Outputs: []Output{{Warning, Stderr, ""}}})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close(context.Background())
	log := l.Logger().With(Category, "rpc.netserver")
	b.ReportAllocs()
	for b.Loop() {
		log.Debug("nobody reads this")
	}
}

func BenchmarkFile(b *testing.B) {
	l, err := New(Config{}, Settings{Level: Warning, Outputs: []Output{{Warning, File, filepath.Join(b.TempDir(), "log")}}})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close(context.Background())
	log := l.Logger().With(Category, "rpc.netserver")
	b.ReportAllocs()
	for b.Loop() {
		log.Error("lock refused", "domain", "vm1", "uuid", "b9d5c1e2-8d3c-4a7a-a7bb-1d6a5f6d1f11", "pid", 1234, "path", "/var/lib/libvirt/images/vm1.qcow2")
	}
}
