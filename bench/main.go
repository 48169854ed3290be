// SPDX-License-Identifier: LGPL-2.1-or-later

// Bench measures our lock daemon side by side with the C one and with a bare server that does only the unavoidable
// socket and file calls, the floor. Each runs in a mount namespace of its own; rounds alternate, since absolute times
// drift. It prints a table with medians and ratios, and says for each row whether its goal is reached.
//
// It needs root. What it starts ends with it, and the machine's own libvirt isn't touched.
package main

import (
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"runtime"
	"runtime/debug"
	"syscall"
	"time"

	"virtlockd/test/host"
)

func main() {
	if os.Getenv(floorEnv) != "" {
		floor() // doesn't return
	}
	if os.Getenv(idleEnv) != "" {
		idle() // neither
	}
	host.Play()
	var b bench
	flag.StringVar(&b.ours, "ours", "bin/virtlockd", "our daemon")
	flag.StringVar(&b.c, "c", "/usr/sbin/virtlockd", "the C daemon; left out if it is not there")
	flag.BoolVar(&b.full, "full", false, "all rows and more rounds (under 10 minutes; else under 50 s)")
	flag.StringVar(&b.dir, "dir", "/var/tmp", "a directory on a disk")
	flag.StringVar(&b.env, "env", "", "NAME=VALUE for our daemon's environment, to try something")
	only := flag.String("run", "", "only the groups that this regular expression matches")
	jsonFile := flag.String("json", "", "write the results there, too")
	svgFile := flag.String("svg", "", "draw the cost against idle clients and held locks")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "bench: argument %q means nothing; see -help\n", flag.Arg(0))
		os.Exit(2)
	}
	if err := b.main(*only, *jsonFile, *svgFile); err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

// bench is one run.
type bench struct {
	ours, c string
	env     string
	full    bool
	dir     string // on a disk; ours alone, inside of what -dir said
	disk    string // its file system
	cpu     int    // that pinned daemons and clients share
	results results
}

// group is a number of rows that are measured together.
type group struct {
	name string
	run  func(*bench, *scope)
}

// groups in the order of the table.
var groups = []group{
	{"pairs", (*bench).pairs},
	{"clients", (*bench).manyClients},
	{"safety", (*bench).safety},
	{"connect", (*bench).connect},
	{"idle", (*bench).idleClients},
	{"held", (*bench).heldLocks},
	{"memory", (*bench).memory},
	{"start", (*bench).startUp},
	{"upgrade", (*bench).upgrade},
	{"kill", (*bench).recovery},
	{"storm", (*bench).storm},
	{"hang", (*bench).hangs},
	{"death", (*bench).deaths},
	{"list", (*bench).listing},
}

func (b *bench) main(only, jsonFile, svgFile string) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("private mount namespaces need root")
	}
	match, err := regexp.Compile(only)
	if err != nil {
		return fmt.Errorf("-run: %w", err)
	}
	if _, err := os.Stat(b.ours); err != nil {
		return fmt.Errorf("our daemon: %w; make build makes it", err)
	}
	if b.ours, err = absolute(b.ours); err != nil {
		return err
	}
	if _, err := os.Stat(b.c); err != nil {
		fmt.Fprintf(os.Stderr, "bench: no C daemon to compare with: %v\n", err)
		b.c = ""
	}
	settle()
	if err := host.StartReaper(); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp(b.dir, "virtlockd-bench-"); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		<-interrupted
		host.EndAll()
		os.RemoveAll(b.dir)
		os.Exit(1)
	}()
	if b.disk, err = fileSystem(b.dir); err != nil {
		return err
	}
	b.cpu = lastCPU()

	b.results = b.describe()
	failed := 0
	for _, g := range groups {
		if !match.MatchString(g.name) {
			continue
		}
		begin := time.Now()
		if err := inScope(func(s *scope) { g.run(b, s) }); err != nil {
			fmt.Fprintf(os.Stderr, "bench: %s: %v\n", g.name, err)
			failed++
		}
		fmt.Fprintf(os.Stderr, "bench: %s took %.1f s\n", g.name, time.Since(begin).Seconds())
	}
	b.results.Seconds = time.Since(b.results.Date).Seconds()
	if only == "" {
		b.results.section("this program")
		b.results.row("the "+b.results.Form+" form", seconds, atMost(float64(b.pick(50, 600)))).add(ours, b.results.Seconds)
	}
	b.results.print(os.Stdout)
	if jsonFile != "" {
		if err := b.results.writeJSON(jsonFile); err != nil {
			return err
		}
	}
	if svgFile != "" {
		if err := b.results.writeSVG(svgFile); err != nil {
			return err
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d groups could not be measured", failed)
	}
	return nil
}

// settle keeps this process's own run-time out of what is measured.
func settle() {
	debug.SetGCPercent(-1)
	// A thread in a raw system call keeps its processor of the run-time.
	runtime.GOMAXPROCS(8)
	raiseLimit()
}

// rounds of a row of pairs. Many short ones tell more than a few long ones where the machine does something else, too.
func (b *bench) rounds() int { return b.pick(5, 25) }

// pick chooses between the quick form and the full one.
func (b *bench) pick(quick, full int) int {
	if b.full {
		return full
	}
	return quick
}

// span is the length of a measurement.
func (b *bench) span() time.Duration {
	return time.Duration(b.pick(40, 100)) * time.Millisecond
}
