// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/spf13/pflag"
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

// The completion scripts and the manual page know each command and option.
func TestCompletion(t *testing.T) {
	t.Parallel()
	for shell, script := range map[string]string{"bash": bashCompletion, "zsh": zshCompletion, "fish": fishCompletion} {
		for _, c := range commands {
			if !regexp.MustCompile(`\b` + c.name + `\b`).MatchString(script) {
				t.Errorf("%s does not know %s", shell, c.name)
			}
			for _, o := range options(&c) {
				form := "--" + o
				if shell == "fish" {
					form = "-l " + o
				}
				if !strings.Contains(script, form) {
					t.Errorf("%s does not know --%s of %s", shell, o, c.name)
				}
			}
		}
		path, err := exec.LookPath(shell)
		if err != nil {
			continue
		}
		cmd := exec.Command(path, "-n")
		cmd.Stdin = strings.NewReader(script)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s does not understand it: %v\n%s", shell, err, out)
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

func TestBashCompletes(t *testing.T) {
	t.Parallel()
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip("no bash")
	}
	for line, want := range map[string]string{
		"virtlockctl sta":              "status",
		"virtlockctl list --lo":        "--lockspace",
		"virtlockctl list -o js":       "json",
		"virtlockctl -c /x events --f": "--follow",
		"virtlockctl completion f":     "fish",
		"virtlockctl events --kind re": "released refused recovered",
	} {
		words := strings.Fields(line)
		quoted := make([]string, len(words))
		for i, w := range words {
			quoted[i] = "'" + w + "'"
		}
		// compopt works within a completion only.
		script := bashCompletion + "\ncompopt() { :; }\nCOMP_WORDS=(" + strings.Join(quoted, " ") + ")\nCOMP_CWORD=$((${#COMP_WORDS[@]} - 1))\n_virtlockctl\necho \"${COMPREPLY[*]}\"\n"
		cmd := exec.Command(bash, "--norc", "-s")
		cmd.Stdin = strings.NewReader(script)
		out, err := cmd.CombinedOutput()
		if got := strings.TrimSpace(string(out)); err != nil || got != want {
			t.Errorf("%s: %q, %v, want %q", line, got, err, want)
		}
	}
}
