// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"virtlockd/internal/inspect"
	"virtlockd/internal/inspectclient"
)

// filter says which locks are meant. What is empty does not matter.
type filter struct {
	lockspace, resource, owner, mode *string
	unsafe                           *bool
}

func list(flags *pflag.FlagSet) func(*tool, []string) error {
	f := filter{
		lockspace: flags.StringP("lockspace", "l", "", "only those in this lockspace (/ for the default one)"),
		resource:  flags.StringP("resource", "r", "", "only those whose resource or path contains this"),
		owner:     flags.StringP("owner", "u", "", "only those of this domain: its name, UUID or process id"),
		mode:      flags.StringP("mode", "m", "", "only exclusive or only shared ones"),
		unsafe:    flags.Bool("unsafe", false, "only those that a crash of the daemon would give up"),
	}
	return func(t *tool, _ []string) error {
		if m := *f.mode; m != "" && m != "exclusive" && m != "shared" {
			return misuse("list: there is no mode %q, only exclusive and shared", m)
		}
		locks, err := t.locks(f.matches)
		if err != nil {
			return err
		}
		if t.json {
			return t.printJSON(locks)
		}
		return t.printLocks(locks)
	}
}

func (f *filter) matches(l *inspect.Lock) bool {
	switch space := *f.lockspace; {
	case space == "/" && l.Lockspace != "",
		space != "" && space != "/" && string(l.Lockspace) != space,
		*f.mode != "" && l.Mode != *f.mode,
		*f.unsafe && l.CrashSafe,
		!strings.Contains(string(l.Resource), *f.resource) && !strings.Contains(string(l.Path), *f.resource):
		return false
	}
	return *f.owner == "" || slices.ContainsFunc(l.Owners, func(o inspect.Owner) bool {
		return string(o.Name) == *f.owner || o.UUID == *f.owner || strconv.Itoa(int(o.PID)) == *f.owner
	})
}

// locks returns the locks that are wanted, in the order of their names.
func (t *tool) locks(wanted func(*inspect.Lock) bool) ([]inspect.Lock, error) {
	var locks []inspect.Lock
	err := t.readAll(func(c *inspectclient.Conn) error {
		locks = []inspect.Lock{}
		for l, err := range c.Locks() {
			if err != nil {
				return err
			}
			if wanted(l) {
				locks = append(locks, *l)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(locks, func(a, b inspect.Lock) int {
		return cmp.Or(cmp.Compare(a.Lockspace, b.Lockspace), cmp.Compare(a.Resource, b.Resource))
	})
	// One that was released and acquired again while we read is there twice.
	return slices.CompactFunc(locks, func(a, b inspect.Lock) bool {
		return a.Lockspace == b.Lockspace && a.Resource == b.Resource
	}), nil
}

func (t *tool) printLocks(locks []inspect.Lock) error {
	b := table{heads: []string{"LOCKSPACE", "RESOURCE", "MODE", "OWNER", "UUID", "PID", "AGE", "KIND", "CRASH-SAFE"}}
	now := time.Now()
	for i := range locks {
		l := &locks[i]
		safe := cell{"yes", green}
		if !l.CrashSafe {
			safe = cell{"no", yellow}
		}
		for _, o := range l.Owners {
			b.add(lockspaceCell(l.Lockspace), text(string(l.Resource)), text(l.Mode), text(string(o.Name)), text(o.UUID),
				text(strconv.Itoa(int(o.PID))), text(age(o.Since, now)), text(l.Kind), safe)
		}
	}
	return b.write(t, t.out)
}

func lockspaceCell(s inspect.Text) cell {
	if s == "" {
		return cell{"-", dim}
	}
	return text(string(s))
}
