// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"errors"
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
	"time"

	"virtlockd/internal/buildinfo"
	"virtlockd/internal/cmdline"
	"virtlockd/internal/state"
)

// options is what the command line asks for.
type options struct {
	verbose bool
	detach  bool
	timeout time.Duration // 0: none
	config  *string       // nil: the default file, which need not exist
	pidFile *string       // nil: the default one; "": none
	keeper  *bool         // whether a keeper is wanted; nil: with detach
	ignored []string      // operands, which mean nothing
}

// errHelp and errVersion end the parsing: the user wants a text, not a daemon.
var (
	errHelp    = errors.New("help asked for")
	errVersion = errors.New("version asked for")
)

// parseOptions reads the command line without the program's name.
//
// Errors: errHelp, errVersion, *cmdline.UsageError, or another one for a value that makes no sense.
func parseOptions(args []string) (o options, err error) {
	yes, no := true, false
	o.ignored, err = cmdline.Parse([]cmdline.Option{
		{Short: 'v', Long: "verbose", Do: func(string) error { o.verbose = true; return nil }},
		{Short: 'd', Long: "daemon", Do: func(string) error { o.detach = true; return nil }},
		{Short: 'f', Long: "config", Arg: true, Do: func(s string) error { o.config = &s; return nil }},
		{Short: 't', Long: "timeout", Arg: true, Do: func(s string) (err error) { o.timeout, err = parseTimeout(s); return err }},
		{Short: 'p', Long: "pid-file", Arg: true, Do: func(s string) error { o.pidFile = &s; return nil }},
		{Long: "keeper", Do: func(string) error { o.keeper = &yes; return nil }},
		{Long: "no-keeper", Do: func(string) error { o.keeper = &no; return nil }},
		{Short: 'V', Long: "version", Do: func(string) error { return errVersion }},
		{Short: 'h', Long: "help", Do: func(string) error { return errHelp }},
	}, args)
	return o, err
}

// wantsKeeper tells whether a process of ours is to keep the locks while the daemon is being replaced: in the background, where
// nobody else would start it again, unless told otherwise.
func (o *options) wantsKeeper() bool {
	if o.keeper != nil {
		return *o.keeper
	}
	return o.detach
}

// argumentsFor returns the arguments for a binary that is to go on in this process: the C daemon knows all but our own options, and
// would end.
func argumentsFor(reader state.Reader, args []string) []string {
	if reader == state.Ours {
		return args
	}
	var kept []string
	value := false // of the option before it
	for i, arg := range args {
		name, _, _ := strings.Cut(arg, "=")
		switch {
		case i == 0 || value:
			value = false
		case arg == "--":
			return append(kept, args[i:]...)
		case len(name) > 2 && (strings.HasPrefix("--keeper", name) || strings.HasPrefix("--no-keeper", name)):
			continue
		case strings.HasPrefix(arg, "--"):
			value = name == arg && len(name) > 2 && (strings.HasPrefix("--config", name) || strings.HasPrefix("--pid-file", name) || strings.HasPrefix("--timeout", name))
		case strings.HasPrefix(arg, "-"):
			// Bundled: the first one that takes a value takes the rest, or the next argument.
			at := strings.IndexAny(arg, "ftp")
			value = at > 0 && at == len(arg)-1
		}
		kept = append(kept, arg)
	}
	return kept
}

// parseTimeout takes a whole number of seconds that fits a C int. Blanks around it, a '+' and leading
// zeros are fine, as strtol(3) takes them; unlike the C daemon, text behind the number is not.
func parseTimeout(s string) (time.Duration, error) {
	n, err := strconv.ParseInt(strings.TrimSpace(s), 10, 64)
	if err != nil || n < 0 || n > math.MaxInt32 {
		return 0, &startError{exitUsage, fmt.Errorf("invalid value for timeout: %q is not a whole number of seconds from 0 (no timeout) to %d", s, math.MaxInt32)}
	}
	return time.Duration(n) * time.Second, nil
}

// printUsage writes the help text; name is the program's name as typed.
func printUsage(w io.Writer, name string, p paths) {
	config, pidFile, sockets := p.config, p.pidFile, p.lockSocket+"\n      "+p.adminSocket
	if p.err != nil {
		config, pidFile, sockets = "unknown: "+p.err.Error(), "unknown", "unknown"
	}
	fmt.Fprintf(w, `
Usage:
  %s [options]

Options:
  -h | --help            Show this text.
  -v | --verbose         Log what happens (level info).
  -d | --daemon          Run in the background.
  -t | --timeout <secs>  End after so many seconds without client and without lock.
  -f | --config <file>   Read this configuration file.
  -V | --version         Show the versions.
  -p | --pid-file <file> Write this PID file; an empty name means none.
       --keeper          Have a second process that keeps all locks if this one
                         dies, and starts it again. On by default with --daemon.
       --no-keeper       Have none.

libvirt lock management daemon:

  Default paths:

    Configuration file (unless overridden by -f):
      %s

    Sockets:
      %s

    PID file (unless overridden by -p):
      %s

`, name, config, sockets, pidFile)
}

// printVersion writes the libvirt release that we speak, in the form that scripts know, then our own
// version, by which the two daemons can be told apart, and that of the state file, by which one that could not read it is.
func printVersion(w io.Writer, name string) {
	fmt.Fprintf(w, "%s (libvirt) %s\n%s %s (%s)\n%s%d\n", name, buildinfo.LibvirtVersion,
		buildinfo.Product, buildinfo.Version, buildinfo.CommitName(), stateVersion, state.Version)
}

// stateVersion is what the third line begins with.
const stateVersion = "state file version "

// readsOurs tells whether a program whose --version has that third line reads a state file of ours. Before there was such a line
// the version was 1.
func readsOurs(line string) error {
	text, told := strings.CutPrefix(line, stateVersion)
	if !told {
		text = "1"
	}
	if n, err := strconv.Atoi(text); err != nil || n < state.Version {
		return fmt.Errorf("it reads version %.20q of our state file, this one writes version %d", text, state.Version)
	}
	return nil
}
