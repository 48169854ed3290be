// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/term"

	"virtlockd/internal/inspectclient"
	"virtlockd/internal/rundir"
)

// Exit codes. The manual page has them.
const (
	exitOK      = 0
	exitFound   = 1 // check: something is wrong; who: nobody holds it
	exitUsage   = 2
	exitAbsent  = 3 // no daemon, or one that does not know our program
	exitDenied  = 4
	exitFailure = 5 // the daemon refused, or something else failed
)

// exit is an end with a code and nothing more to say.
type exit int

func (e exit) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// usageError is a command line that makes no sense.
type usageError struct{ text string }

func (e *usageError) Error() string { return e.text }

func misuse(format string, v ...any) error { return &usageError{fmt.Sprintf(format, v...)} }

// answerTime bounds each wait for the daemon.
const answerTime = 15 * time.Second

// tool is one run.
type tool struct {
	ctx      context.Context
	in       io.Reader
	out, err io.Writer
	colours  bool
	socket   string
	json     bool
	patience time.Duration // answerTime, but for tests
}

// command is one word behind the program's name.
type command struct {
	name, args, short string
	output            bool                                             // it knows -o json
	setup             func(*pflag.FlagSet) func(*tool, []string) error // declares the options, and returns what it does
	min, max          int                                              // operands
}

// commands are in the order of the help text.
var commands = []command{
	{name: "list", short: "Show the locks that are held.", output: true, setup: list},
	{name: "who", args: "PATH|RESOURCE", short: "Show who holds a disk, whatever libvirt calls it.", output: true, setup: who, min: 1, max: 1},
	{name: "events", short: "Show what has happened to locks.", output: true, setup: showEvents},
	{name: "check", short: "See whether each lock is what it should be.", output: true, setup: check},
	{name: "status", short: "Show how the daemon is.", output: true, setup: status},
	{name: "release", args: "RESOURCE", short: "Take a lock from its owner, in an emergency.", output: true, setup: release, min: 1, max: 1},
	{name: "resume", args: "DOMAIN|PID", short: "Continue a guest that was stopped because a lock was lost.", output: true, setup: resume, min: 1, max: 1},
	{name: "top", short: "Show what happens, live.", setup: top},
	{name: "metrics", short: "Print metrics for Prometheus' textfile collector.", setup: printMetrics},
	{name: "exporter", short: "Serve metrics to Prometheus.", setup: exporter},
	{name: "completion", args: "bash|zsh|fish", short: "Print a completion script.", setup: completion, min: 1, max: 1},
	{name: "version", short: "Show the tool's version.", setup: version},
	{name: "help", args: "[COMMAND]", short: "Show this text, or a command's options.", max: 1},
}

// run is the program. It returns the exit code.
func run(ctx context.Context, args []string, in io.Reader, out, errs io.Writer) int {
	return (&tool{ctx: ctx, in: in, out: out, err: errs, patience: answerTime}).main(args)
}

// main runs a command line and says why it fails.
func (t *tool) main(args []string) int {
	err := t.run(args)
	var code exit
	var usage *usageError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &code):
		return int(code)
	case errors.Is(err, syscall.EPIPE): // who reads us has seen enough
		return exitOK
	}
	fmt.Fprintf(t.err, "virtlockctl: %s\n", clean(err.Error()))
	if hint := hint(err, t.socket); hint != "" {
		fmt.Fprintf(t.err, "hint: %s\n", hint)
	}
	switch {
	case errors.As(err, &usage):
		return exitUsage
	case errors.Is(err, inspectclient.ErrDenied):
		return exitDenied
	case errors.Is(err, inspectclient.ErrNoDaemon), errors.Is(err, inspectclient.ErrForeign):
		return exitAbsent
	}
	return exitFailure
}

// hint says what to do about an error.
func hint(err error, socket string) string {
	var usage *usageError
	switch {
	case errors.As(err, &usage):
		return "virtlockctl help shows the commands, virtlockctl help COMMAND its options"
	case errors.Is(err, inspectclient.ErrNoDaemon):
		return "start it (systemctl start virtlockd-admin.socket virtlockd.socket), or name the admin socket of the one that runs (--socket)"
	case errors.Is(err, inspectclient.ErrDenied):
		return "the system's daemon answers root only: try sudo; a user's own daemon answers that user only"
	case errors.Is(err, inspectclient.ErrForeign):
		if filepath.Base(socket) == rundir.LockSocket {
			return "that is the socket for libvirt; the one to ask is " + rundir.AdminSocket
		}
		return "libvirt's own virtlockd runs there, or one of ours that is older; install this one and take over by systemctl reload virtlockd (no lock is lost)"
	case errors.Is(err, inspectclient.ErrLost):
		return "it ended, or a live upgrade came in between: try again"
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, inspectclient.ErrBusy):
		return "it is very busy or stopped; see systemctl status virtlockd"
	}
	return ""
}

func (t *tool) run(args []string) error {
	global := pflag.NewFlagSet("virtlockctl", pflag.ContinueOnError)
	global.SetInterspersed(false) // options of a command come behind it
	global.SetOutput(io.Discard)
	socket := socketOption(global)
	help := global.BoolP("help", "h", false, "")
	wantVersion := global.BoolP("version", "V", false, "")
	if err := global.Parse(args); err != nil {
		return misuse("%v", err)
	}
	args = global.Args()
	switch {
	case *wantVersion:
		args = []string{"version"}
	case *help || len(args) > 0 && args[0] == "help":
		return t.help(args)
	case len(args) == 0:
		return misuse("which command?")
	}
	i := slices.IndexFunc(commands, func(c command) bool { return c.name == args[0] })
	if i < 0 {
		return misuse("there is no command %q", args[0])
	}
	return t.command(&commands[i], args[1:], *socket)
}

func socketOption(f *pflag.FlagSet) *string {
	return f.StringP("socket", "c", "", "the daemon's admin socket (default: the system's for root, else one's own)")
}

// command runs one command.
func (t *tool) command(c *command, args []string, socket string) error {
	flags := pflag.NewFlagSet(c.name, pflag.ContinueOnError)
	flags.SetOutput(io.Discard)
	do, opts := c.declare(flags)
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, pflag.ErrHelp) {
			return t.help([]string{"help", c.name})
		}
		return misuse("%s: %v", c.name, err)
	}
	if *opts.help {
		return t.help([]string{"help", c.name})
	}
	if n := flags.NArg(); n < c.min || n > c.max {
		return misuse("%s: it wants %s", c.name, operands(c))
	}
	switch opts.format() {
	case "text":
	case "json":
		t.json = true
	default:
		return misuse("%s: there is no output format %q, only text and json", c.name, opts.format())
	}
	t.socket = socket
	if *opts.socket != "" {
		t.socket = *opts.socket
	}
	if t.socket == "" {
		dir, err := rundir.Find(os.Geteuid(), os.Getenv)
		if err != nil {
			return fmt.Errorf("cannot tell where the daemon's socket is: %w", err)
		}
		t.socket = filepath.Join(dir, rundir.AdminSocket)
	}
	t.colours = coloured(t.out)
	return do(t, flags.Args())
}

// commandOptions are those that each command has.
type commandOptions struct {
	socket *string
	help   *bool
	output *string // nil: there is no choice
}

func (o *commandOptions) format() string {
	if o.output == nil {
		return "text"
	}
	return *o.output
}

// declare declares a command's options.
func (c *command) declare(flags *pflag.FlagSet) (do func(*tool, []string) error, o commandOptions) {
	flags.SortFlags = false
	do = c.setup(flags)
	if c.output {
		o.output = flags.StringP("output", "o", "text", "how to print: text or json")
	}
	o.socket = socketOption(flags)
	o.help = flags.BoolP("help", "h", false, "show these options")
	return do, o
}

func operands(c *command) string {
	if c.args == "" {
		return "nothing but options"
	}
	return c.args
}

// help shows all commands, or one.
func (t *tool) help(args []string) error {
	if len(args) > 1 {
		i := slices.IndexFunc(commands, func(c command) bool { return c.name == args[1] })
		if i < 0 || commands[i].setup == nil {
			return misuse("there is no command %q", args[1])
		}
		c := &commands[i]
		flags := pflag.NewFlagSet(c.name, pflag.ContinueOnError)
		c.declare(flags)
		_, err := fmt.Fprintf(t.out, "%s\n\nUsage:\n  virtlockctl %s\n\nOptions:\n%s", c.short,
			strings.Join(strings.Fields(c.name+" [options] "+c.args), " "), flags.FlagUsages())
		return err
	}
	var b strings.Builder
	b.WriteString("Look at virtlockd, the lock daemon of libvirt's virtual machines.\n\nUsage:\n  virtlockctl [--socket PATH] COMMAND [options]\n\nCommands:\n")
	for _, c := range commands {
		fmt.Fprintf(&b, "  %-24s %s\n", strings.TrimSpace(c.name+" "+c.args), c.short)
	}
	b.WriteString("\nThe manual page, virtlockctl(8), says more.\n")
	_, err := io.WriteString(t.out, b.String())
	return err
}

// coloured tells whether an output likes colours (https://no-color.org).
func coloured(out io.Writer) bool {
	return os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" && isTerminal(out)
}

func isTerminal(out io.Writer) bool {
	f, ok := out.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// dial connects to the daemon.
func (t *tool) dial() (*inspectclient.Conn, error) {
	return inspectclient.Dial(t.ctx, t.socket, t.patience)
}

// ask runs f on a connection.
func (t *tool) ask(f func(*inspectclient.Conn) error) error {
	c, err := t.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	// Who waits for an answer can be interrupted.
	defer context.AfterFunc(t.ctx, func() { c.Close() })()
	err = f(c)
	if t.ctx.Err() != nil {
		return exit(exitFailure)
	}
	return err
}

// readAll runs f, which reads a list, on a connection, and again if a live upgrade comes meanwhile. f begins anew each time.
func (t *tool) readAll(f func(*inspectclient.Conn) error) error {
	const tries = 10
	return t.ask(func(c *inspectclient.Conn) (err error) {
		for range tries {
			if err = f(c); !errors.Is(err, inspectclient.ErrReplaced) {
				break
			}
		}
		return err
	})
}

// printJSON prints a value for scripts.
func (t *tool) printJSON(v any) error {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(v); err != nil {
		return err
	}
	return t.writeJSON(b.Bytes())
}

// writeJSON writes JSON text. On a terminal it says the same in characters that do nothing to it.
func (t *tool) writeJSON(text []byte) error {
	if isTerminal(t.out) {
		text = cleanJSON(text)
	}
	_, err := t.out.Write(text)
	return err
}
