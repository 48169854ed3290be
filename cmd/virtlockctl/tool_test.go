// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"bytes"
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"

	"virtlockd/internal/events"
)

func TestClean(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"":               "",
		"/dev/vg/disk 1": "/dev/vg/disk 1",
		"größe":          "größe",
		"a\x1b[31mb":     `a\x1b[31mb`,
		"a\nb\tc\rd":     `a\nb\tc\rd`,
		"\xff\xfe":       `\xff\xfe`,
		"\u202eabc":      `\u202eabc`,
		"\u009b31m":      `\u009b31m`,
		`a\nb`:           `a\\nb`,
		"\x00\x7f":       `\x00\x7f`,
		"\U000e0001":     `\U000e0001`,
		"\u2028":         `\u2028`,
	} {
		if got := clean(in); got != want {
			t.Errorf("%q is shown as %q, want %q", in, got, want)
		}
	}
}

func TestCleanJSON(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"", "größe", "a\x1bb\\c\"d", "\u009b31m", "\u202eabc", "\x7f", "\U000e0001x", "\u2028", "a\nb\t"} {
		text, err := json.MarshalIndent([]string{s}, "", " ")
		if err != nil {
			t.Fatal(err)
		}
		cleaned := cleanJSON(text)
		var back []string
		if err := json.Unmarshal(cleaned, &back); err != nil || len(back) != 1 || back[0] != s {
			t.Errorf("%q becomes %q, %v: %q", s, cleaned, err, back)
		}
		for _, r := range string(cleaned) {
			if r != '\n' && !unicode.IsPrint(r) {
				t.Errorf("%q becomes %q", s, cleaned)
			}
		}
	}
}

func TestAge(t *testing.T) {
	t.Parallel()
	now := time.Now()
	for d, want := range map[time.Duration]string{
		-time.Hour: "0s", 999 * time.Millisecond: "0s", 61 * time.Second: "1m1s", 59*time.Minute + 59*time.Second: "59m59s",
		time.Hour: "1h0m", 25*time.Hour + 59*time.Minute: "1d1h", 1000 * 24 * time.Hour: "1000d0h",
	} {
		if got := age(now.Add(-d), now); got != want {
			t.Errorf("%v is shown as %s, want %s", d, got, want)
		}
	}
	if got := age(time.Time{}, now); got != "?" {
		t.Errorf("what is not known is shown as %s", got)
	}
}

func TestCut(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		line  string
		width int
		want  string
	}{
		{"abc", 3, "abc"},
		{"abcd", 3, "abc" + reset},
		{"äöü", 2, "äö" + reset},
		{"\x1b[31mab\x1b[0m", 2, "\x1b[31mab\x1b[0m"},
		{"\x1b[31mabc\x1b[0m", 2, "\x1b[31mab" + reset},
		{"", 0, ""},
		{"a\x1b[", 5, "a"},
	} {
		if got := cut(c.line, c.width); got != c.want {
			t.Errorf("%q cut to %d is %q, want %q", c.line, c.width, got, c.want)
		}
	}
}

// Columns line up, with colours and with letters of several bytes.
func TestTable(t *testing.T) {
	t.Parallel()
	b := table{heads: []string{"A", "LONG", "C"}}
	b.add(text("äöü"), cell{"x", red}, text("end"))
	b.add(text("a"), text("longer"), text("e"))
	var out bytes.Buffer
	if err := b.write(&tool{colours: true}, &out); err != nil {
		t.Fatal(err)
	}
	plain := regexp.MustCompile("\x1b\\[[0-9]*m").ReplaceAllString(out.String(), "")
	if want := "A    LONG    C\näöü  x       end\na    longer  e\n"; plain != want {
		t.Errorf("got\n%swant\n%s", plain, want)
	}
}

// shell returns the path of a shell whose completion there is.
func shell(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%v (install the package %s, as test/setup does)", err, name)
	}
	return path
}

// inShell runs a shell that leaves nothing behind.
func inShell(t *testing.T, name, input string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.Command(shell(t, name), args...)
	cmd.Env = []string{"PATH=/usr/bin:/bin", "HOME=" + t.TempDir(), "LANG=C"}
	cmd.Stdin = strings.NewReader(input)
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

var completions = map[string]string{"bash": bashCompletion, "zsh": zshCompletion, "fish": fishCompletion}

// The completion scripts and the manual page know each command and option.
func TestCompletion(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../../man/virtlockctl.8")
	if err != nil {
		t.Fatal(err)
	}
	texts := maps.Clone(completions)
	texts["the manual page"] = strings.ReplaceAll(string(page), `\-`, "-")
	for where, text := range texts {
		for _, c := range commands {
			entry := `\b` + c.name + `\b`
			if where == "the manual page" {
				entry = `(?m)^\.BI? "?` + c.name + `\b`
				if c.name == "completion" {
					entry = `(?m)^\.BR "completion `
				}
			}
			if !regexp.MustCompile(entry).MatchString(text) {
				t.Errorf("%s does not know %s", where, c.name)
			}
			for _, o := range options(&c) {
				form := "--" + o
				if where == "fish" {
					form = "-l " + o
				}
				if !regexp.MustCompile(form + `\b`).MatchString(text) {
					t.Errorf("%s does not know --%s of %s", where, o, c.name)
				}
			}
		}
	}
}

// Each shell can read its script.
func TestCompletionParses(t *testing.T) {
	t.Parallel()
	for name, script := range completions {
		if out, err := inShell(t, name, script, "-n"); err != nil || out != "" {
			t.Errorf("%s does not understand it: %v\n%s", name, err, out)
		}
		if _, err := inShell(t, name, script+"\nif (\n", "-n"); err == nil {
			t.Errorf("%s takes anything", name)
		}
	}
}

// All that names the kinds of events names those that the daemon counts.
func TestKinds(t *testing.T) {
	t.Parallel()
	var want []string
	for _, c := range events.New().Counts() {
		want = append(want, c.Kind.String())
	}
	slices.Sort(want)
	want = slices.Compact(want)
	same := func(where string, got []string) {
		t.Helper()
		slices.Sort(got)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", where, diff)
		}
	}
	same("the tool", slices.Collect(maps.Keys(eventColours)))

	flags := pflag.NewFlagSet("events", pflag.ContinueOnError)
	showEvents(flags)
	_, list, _ := strings.Cut(flags.Lookup("kind").Usage, ": ")
	same("its help", strings.Split(list, ", "))

	got, err := bashCompletes(t, "virtlockctl", "events", "--kind", "")
	if err != nil {
		t.Error(err)
	}
	same("bash", strings.Fields(got))

	offered := regexp.MustCompile(`:kind:\(([a-z ]+)\)`).FindStringSubmatch(zshCompletion)
	if offered == nil {
		t.Fatal("zsh offers no kinds")
	}
	same("zsh", strings.Fields(offered[1]))

	// Each line has a description behind a tab.
	got, err = inShell(t, "fish", fishCompletion+"\ncomplete -C 'virtlockctl events --kind ' | string replace -r '\\t.*' ''\n")
	if err != nil {
		t.Errorf("%v\n%s", err, got)
	}
	same("fish", strings.Fields(got))

	page, err := os.ReadFile("../../man/virtlockctl.8")
	if err != nil {
		t.Fatal(err)
	}
	_, entry, _ := strings.Cut(string(page), `\-\-kind`)
	entry, _, _ = strings.Cut(entry, "\n.TP")
	for _, k := range want {
		if !regexp.MustCompile(`[" ]` + k + `[" ]`).MatchString(entry) {
			t.Errorf("the manual page does not know the kind %s", k)
		}
	}
}

// options returns the long options of a command.
func options(c *command) (names []string) {
	if c.setup == nil {
		return nil
	}
	flags := pflag.NewFlagSet(c.name, pflag.ContinueOnError)
	c.declare(flags)
	flags.VisitAll(func(f *pflag.Flag) { names = append(names, f.Name) })
	return names
}

// bashCompletes returns what bash offers for the last of these words.
func bashCompletes(t *testing.T, words ...string) (string, error) {
	t.Helper()
	// compopt works within a completion only.
	return inShell(t, "bash", bashCompletion+"\ncompopt() { :; }\nCOMP_WORDS=('"+strings.Join(words, "' '")+"')\nCOMP_CWORD=$((${#COMP_WORDS[@]} - 1))\n_virtlockctl\necho \"${COMPREPLY[*]}\"\n",
		"--norc", "-s")
}

func TestBashCompletes(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]string{
		"virtlockctl sta":              "status",
		"virtlockctl list --lo":        "--lockspace",
		"virtlockctl list -o js":       "json",
		"virtlockctl -c /x events --f": "--follow",
		"virtlockctl completion f":     "fish",
		"virtlockctl events --kind re": "released refused recovered",
		// What -f means depends on the command.
		"virtlockctl events -f tool_te":     "",
		"virtlockctl events -f --ki":        "--kind",
		"virtlockctl metrics -f tool_te":    "tool_test.go",
		"virtlockctl metrics --file tool_t": "tool_test.go",
		"virtlockctl -c tool_te":            "tool_test.go",
	} {
		if got, err := bashCompletes(t, strings.Fields(line)...); err != nil || got != want {
			t.Errorf("%s: %q, %v, want %q", line, got, err, want)
		}
	}
}
