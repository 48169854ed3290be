// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"bufio"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"

	"github.com/spf13/pflag"
	"golang.org/x/term"

	"virtlockd/internal/inspect"
	"virtlockd/internal/inspectclient"
)

func release(flags *pflag.FlagSet) func(*tool, []string) error {
	lockspace := flags.StringP("lockspace", "l", "", "the lockspace's directory (default: the default lockspace)")
	pid := flags.Int64P("pid", "p", 0, "the owner's process id, where several share the resource")
	yes := flags.BoolP("yes", "y", false, "do not ask")
	return func(t *tool, args []string) error {
		req := inspect.ReleaseRequest{Lockspace: inspect.Text(*lockspace), Resource: inspect.Text(args[0])}
		if flags.Changed("pid") {
			if *pid < math.MinInt32 || *pid > math.MaxInt32 {
				return misuse("release: %d is no process id", *pid)
			}
			req.PID = new(int32(*pid))
		}
		if !*yes {
			if err := t.confirm(&req); err != nil {
				return err
			}
		}
		var done *inspect.Released
		err := t.ask(func(c *inspectclient.Conn) (err error) {
			done, err = c.Release(&req)
			return err
		})
		if err != nil {
			return err
		}
		if t.json {
			return t.printJSON(done)
		}
		if done.Waiting {
			_, err = fmt.Fprintf(t.out, "being released: %s was held for %s; its disk has not answered yet, and the lock is free when it does\n",
				clean(args[0]), ownerText(&done.Owner))
			return err
		}
		_, err = fmt.Fprintf(t.out, "released: %s was held for %s; %d other holds are left\n", clean(args[0]), ownerText(&done.Owner), done.Left)
		return err
	}
}

// confirm says whom it would hit, and asks whether it is really meant: that very hold, and not one of whoever has the lock later.
func (t *tool) confirm(req *inspect.ReleaseRequest) error {
	in, ok := t.in.(*os.File)
	if !ok || !term.IsTerminal(int(in.Fd())) {
		return misuse("release: nobody is there to be asked; say --yes if it is meant")
	}
	locks, err := t.locks(func(l *inspect.Lock) bool { return l.Lockspace == req.Lockspace && l.Resource == req.Resource })
	if err != nil {
		return err
	}
	var owners []inspect.Owner
	for i := range locks {
		for _, o := range locks[i].Owners {
			if req.PID != nil && *req.PID != o.PID {
				continue
			}
			if slices.ContainsFunc(owners, func(known inspect.Owner) bool { return known.PID == o.PID }) {
				continue // one hold tells which owner it is
			}
			owners = append(owners, o)
			running := "no such process is seen from here"
			if lives(o.PID) {
				running = t.paint(red, "that process runs")
			}
			fmt.Fprintf(t.err, "%s is held for %s; %s.\n", clean(string(req.Resource)), ownerText(&o), running)
		}
	}
	switch len(owners) {
	case 0:
		return fmt.Errorf("%s is held by nobody whom that would hit: nothing was done", string(req.Resource))
	case 1:
		req.PID, req.Since = &owners[0].PID, owners[0].Since
	default:
		return misuse("release: several owners hold it: say which one by --pid")
	}
	fmt.Fprint(t.err, "Without the lock another guest can write to the same disk and destroy it.\nType yes to release it: ")
	answer := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(t.in).ReadString('\n')
		answer <- line
	}()
	select {
	case <-t.ctx.Done():
	case line := <-answer:
		if strings.TrimSpace(line) == "yes" {
			return nil
		}
	}
	fmt.Fprintln(t.err, "nothing was done")
	return exit(exitFailure)
}
