// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"fmt"

	"github.com/spf13/pflag"

	"virtlockd/internal/inspect"
	"virtlockd/internal/inspectclient"
)

func resume(*pflag.FlagSet) func(*tool, []string) error {
	return func(t *tool, args []string) error {
		var who *inspect.Owner
		err := t.ask(func(c *inspectclient.Conn) (err error) {
			who, err = c.Resume(args[0])
			return err
		})
		switch {
		case err != nil:
			return err
		case t.json:
			return t.printJSON(who)
		}
		_, err = fmt.Fprintf(t.out, "resumed: %s; its locks are held\n", ownerText(who))
		return err
	}
}
