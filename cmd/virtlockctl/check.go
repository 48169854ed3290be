// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"fmt"

	"github.com/spf13/pflag"

	"virtlockd/internal/inspect"
	"virtlockd/internal/inspectclient"
)

// checked is the result of check for scripts.
type checked struct {
	Checked int               `json:"checked"`
	Faulty  []inspect.Finding `json:"faulty"`
}

func check(flags *pflag.FlagSet) func(*tool, []string) error {
	quiet := flags.BoolP("quiet", "q", false, "say nothing: the exit code is the answer")
	return func(t *tool, _ []string) error {
		var all checked
		err := t.readAll(func(c *inspectclient.Conn) error {
			all = checked{Faulty: []inspect.Finding{}}
			for part, err := range c.Checks() {
				if err != nil {
					return err
				}
				all.Checked += part.Checked
				all.Faulty = append(all.Faulty, part.Faulty...)
			}
			return nil
		})
		switch {
		case err != nil:
			return err
		case *quiet:
		case t.json:
			err = t.printJSON(all)
		default:
			err = t.printFindings(&all)
		}
		if err == nil && len(all.Faulty) > 0 {
			return exit(exitFound)
		}
		return err
	}
}

func (t *tool) printFindings(all *checked) error {
	for _, f := range all.Faulty {
		l := &f.Lock
		where := clean(string(l.Resource))
		if l.Lockspace != "" {
			where += " in " + clean(string(l.Lockspace))
		}
		fmt.Fprintf(t.out, "%s, %s:\n", t.paint(bold, where), clean(l.Mode))
		for _, o := range l.Owners {
			fmt.Fprintf(t.out, "  held for %s\n", ownerText(&o))
		}
		for _, p := range f.Problems {
			fmt.Fprintf(t.out, "  %s: %s\n", t.paint(red, clean(p.Kind)), clean(string(p.Text)))
		}
	}
	verdict, c := "all as they should be", green
	if n := len(all.Faulty); n > 0 {
		verdict, c = fmt.Sprintf("%d not as they should be", n), red
	}
	_, err := fmt.Fprintf(t.out, "%d locks checked, %s\n", all.Checked, t.paint(c, verdict))
	return err
}
