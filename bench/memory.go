// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"fmt"
	"os"
	"path/filepath"
)

// resident is a server whose memory is looked at.
type resident struct {
	k    kind
	t    *subject
	rows *memoryRows
	last float64 // what was private to it when it was looked at last
}

// memoryRows are what is told of one form of a server.
type memoryRows struct {
	locks                                              int
	pss, private, perLock, heldPSS, perClient, manyPSS *row
}

// memory at rest, of each lock, and of each client. What several processes map counts only in part for each, so no two of ours have the same
// file: a host has one. The C daemon, whose libraries can't be copied, is there once.
func (b *bench) memory(s *scope) {
	b.results.section(fmt.Sprintf("memory, %d s after the load", b.pick(1, 10)))
	clients := b.pick(1000, 4000)
	row := func(name string, most float64) *row {
		g := goal{}
		if b.full && most > 0 { // the quick form looks too soon
			g = atMost(most)
		}
		return b.results.row(name, bytesUnit, g)
	}
	rows := func(with string, locks int) *memoryRows {
		return &memoryRows{
			locks:     locks,
			pss:       row("at rest"+with+", PSS", 6<<20),
			private:   row("at rest"+with+", private", 0),
			perLock:   row(fmt.Sprintf("private per held lock (%d)%s", locks, with), 0.6*1024),
			heldPSS:   row(fmt.Sprintf("with %d held locks%s, PSS", locks, with), 0),
			perClient: row(fmt.Sprintf("private per idle client (%d)%s", clients, with), 2.5*1024),
			manyPSS:   row(fmt.Sprintf("with these, and %d idle clients%s, PSS", clients, with), 0),
		}
	}
	plain := rows("", 10000)
	kept := rows(", with a keeper", 5000) // each takes two descriptors
	keeper := row("the keeper itself, private", 1.5*(1<<20))

	var all []*resident
	if b.c != "" {
		all = append(all, &resident{k: cOne, t: b.start(s, cOne, false), rows: plain})
	}
	for range b.pick(1, enough) {
		all = append(all,
			&resident{k: ours, t: b.copied(s).start(s, ours, false), rows: plain},
			&resident{k: ours, t: b.copied(s).kept(s, false), rows: kept})
	}
	b.rest()
	for _, r := range all {
		if r.rows == kept {
			u, err := memoryOf(r.t.d.PID())
			s.must(err)
			keeper.add(ours, u.private)
		}
		r.look(r.rows.private, 1, r.rows.pss)
		r.t.lock(r.rows.locks)
	}
	b.rest()
	for _, r := range all {
		r.look(r.rows.perLock, r.rows.locks, r.rows.heldPSS)
		r.t.connect(clients)
	}
	b.rest()
	for _, r := range all {
		r.look(r.rows.perClient, clients, r.rows.manyPSS)
	}
}

// look notes what n things have added to what is private since the last look, and all that there is.
func (r *resident) look(each *row, n int, pss *row) {
	u, err := memoryOf(r.t.process())
	r.t.s.must(err)
	each.add(r.k, (u.private-r.last)/float64(n))
	pss.add(r.k, u.pss)
	r.last = u.private
}

// copied is the same with another copy of our daemon's file.
func (b *bench) copied(s *scope) *bench {
	dir, err := os.MkdirTemp(b.dir, "copy-")
	s.must(err)
	program, err := os.ReadFile(b.ours)
	s.must(err)
	other := *b
	other.ours = filepath.Join(dir, "virtlockd")
	s.must(os.WriteFile(other.ours, program, 0o755))
	return &other
}
