// SPDX-License-Identifier: LGPL-2.1-or-later

package events

import (
	"strings"
	"sync"
	"testing"
)

func add(l *Log, n int) {
	for range n {
		l.Add(Event{Kind: Acquired, Resource: "/disk"})
	}
}

func TestSince(t *testing.T) {
	t.Parallel()
	l := New()
	if got, next, missed := l.Since(nil, 0, 10); len(got) != 0 || next != l.base || missed != 0 {
		t.Errorf("an empty log has %d events, next %d, missed %d", len(got), next, missed)
	}
	add(l, 200)
	got, next, missed := l.Since(nil, 0, 1000)
	if len(got) != 200 || next != l.last || missed != 0 {
		t.Fatalf("%d events, next %d of %d, missed %d", len(got), next, l.last, missed)
	}
	for i, e := range got {
		if e.Seq != l.base+uint64(i)+1 || e.Time == 0 {
			t.Fatalf("event %d has number %d after %d, time %d", i, e.Seq, l.base, e.Time)
		}
	}
	// In pieces, whatever their size.
	for _, limit := range []int{1, 63, 64, 65, 199, 200} {
		n, next := 0, uint64(0)
		for {
			var got []Event
			if got, next, _ = l.Since(nil, next, limit); len(got) == 0 {
				break
			}
			n += len(got)
		}
		if n != 200 {
			t.Errorf("%d events in pieces of %d", n, limit)
		}
	}
	if got, again, _ := l.Since(nil, next, 1000); len(got) != 0 || again != next {
		t.Errorf("nothing has happened, but there are %d events, next %d after %d", len(got), again, next)
	}
}

func TestMissed(t *testing.T) {
	t.Parallel()
	l := New()
	add(l, 10)
	seen := l.last
	add(l, capacity+7)
	got, next, missed := l.Since(nil, seen, 1<<20)
	if len(got) != capacity || missed != 7 || next != l.last {
		t.Errorf("%d events, missed %d, next %d of %d", len(got), missed, next, l.last)
	}
	if _, _, missed := l.Since(nil, 0, 1); missed != 0 {
		t.Errorf("who has seen nothing yet has missed %d", missed)
	}
}

// A follower goes on with the number that an earlier binary gave him.
func TestOtherBinary(t *testing.T) {
	t.Parallel()
	before := New()
	add(before, 100)
	l := New()
	l.Add(Event{Kind: Upgraded})
	if l.base < before.base {
		t.Fatal("time runs backwards")
	}
	got, next, missed := l.Since(nil, min(before.last, l.base), 100)
	if len(got) != 1 || got[0].Kind != Upgraded || missed != 0 || next != l.last {
		t.Errorf("%d events, missed %d", len(got), missed)
	}
	// A number that is yet to come is that of one whose clock was ahead.
	if got, next, missed := l.Since(nil, l.last+1000, 100); len(got) != 1 || next != l.last || missed != 0 {
		t.Errorf("%d events after one that is ahead, next %d, %d missed", len(got), next, missed)
	}
	if got, next, _ := New().Since(nil, l.last+1<<40, 100); len(got) != 0 || next >= l.last+1<<40 {
		t.Errorf("%d events of an empty log, next %d", len(got), next)
	}
}

func TestCounts(t *testing.T) {
	t.Parallel()
	l := New()
	add(l, 3)
	l.Add(Event{Kind: Refused, Reason: Held})
	n := map[string]uint64{}
	for _, c := range l.Counts() {
		n[c.Kind.String()+" "+string(c.Reason)] = c.N
	}
	if n["acquired "] != 3 || n["refused held"] != 1 {
		t.Errorf("counted %v", n)
	}
	if zero, ok := n["killed SIGKILL"]; zero != 0 || !ok {
		t.Error("what has not happened yet is not counted as 0")
	}
}

// Long names must not stay in memory.
func TestLongTexts(t *testing.T) {
	t.Parallel()
	l := New()
	l.Add(Event{Kind: Refused, Reason: Missing, Resource: strings.Repeat("x", 1<<20)})
	got, _, _ := l.Since(nil, 0, 1)
	if n := len(got[0].Resource); n != maxText {
		t.Errorf("%d bytes are kept", n)
	}
}

// Nobody who reports has to know whether anybody listens.
func TestNil(t *testing.T) {
	t.Parallel()
	var l *Log
	l.Add(Event{Kind: Acquired})
}

func TestAddAllocatesNothing(t *testing.T) {
	l := New()
	add(l, capacity)
	e := Event{Kind: Acquired, Resource: "/disk", Owner: "vm"}
	if n := testing.AllocsPerRun(1000, func() { l.Add(e) }); n > 0 {
		t.Errorf("%v allocations for each event", n)
	}
}

func TestConcurrent(t *testing.T) {
	t.Parallel()
	l := New()
	var writers sync.WaitGroup
	for range 4 {
		writers.Go(func() { add(l, 1000) })
	}
	seen, lost, next := uint64(0), uint64(0), l.base
	done := make(chan struct{})
	go func() { writers.Wait(); close(done) }()
	for more := true; more; {
		select {
		case <-done:
			more = false // and once more
		default:
		}
		var got []Event
		var missed uint64
		got, next, missed = l.Since(nil, next, 1<<20)
		seen, lost = seen+uint64(len(got)), lost+missed
	}
	if seen+lost != 4000 {
		t.Errorf("%d events seen and %d missed of 4000", seen, lost)
	}
}

func BenchmarkAdd(b *testing.B) {
	l := New()
	e := Event{Kind: Acquired, Resource: "/disk", Owner: "vm"}
	for b.Loop() {
		l.Add(e)
	}
}
