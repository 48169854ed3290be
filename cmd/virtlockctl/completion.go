// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	_ "embed"
	"io"

	"github.com/spf13/pflag"
)

// Completion scripts. A test sees to it that they know every command, option and kind of events.
var (
	//go:embed completion/virtlockctl.bash
	bashCompletion string
	//go:embed completion/_virtlockctl
	zshCompletion string
	//go:embed completion/virtlockctl.fish
	fishCompletion string
)

func completion(*pflag.FlagSet) func(*tool, []string) error {
	return func(t *tool, args []string) error {
		script, ok := map[string]string{"bash": bashCompletion, "zsh": zshCompletion, "fish": fishCompletion}[args[0]]
		if !ok {
			return misuse("completion: there is none for %q, only for bash, zsh and fish", args[0])
		}
		_, err := io.WriteString(t.out, script)
		return err
	}
}
