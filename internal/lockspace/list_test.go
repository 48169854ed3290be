// SPDX-License-Identifier: LGPL-2.1-or-later

package lockspace

import (
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"
	"time"
)

// listAll lists the table in pieces of limit places.
func (f *fixture) listAll(limit int) []Entry {
	var all []Entry
	for from := 0; ; {
		entries, next := f.Table.List(from, limit)
		if len(entries) > limit {
			f.Errorf("a piece of %d has %d entries", limit, len(entries))
		}
		all = append(all, entries...)
		if next == 0 {
			return all
		}
		if next <= from {
			f.Fatalf("List goes on at %d after %d", next, from)
		}
		from = next
	}
}

func names(entries []Entry) []string {
	var names []string
	for _, e := range entries {
		names = append(names, e.Resource)
	}
	slices.Sort(names)
	return names
}

func TestList(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	if got := f.listAll(10); len(got) != 0 {
		t.Errorf("an empty table has %d entries", len(got))
	}
	a, b := f.number(), f.number()
	dir := f.path("space")
	if err := f.Table.Add(dir); err != nil {
		t.Fatal(err)
	}
	before := time.Now().UnixNano()
	var want []string
	for i := range 20 {
		name := fmt.Sprintf("r%02d", i)
		f.want("acquire", f.take(Request{Lockspace: dir, Resource: name, Flags: Shared | AutoCreate, Owner: a}), nil)
		if i%3 == 0 {
			f.want("release", f.Table.Release(Request{Lockspace: dir, Resource: name}, a.PID, true), nil)
			continue
		}
		want = append(want, name)
	}
	f.want("share", f.take(Request{Lockspace: dir, Resource: "r01", Flags: Shared, Owner: b}), nil)
	for _, limit := range []int{1, 3, 7, 1000} {
		if got := names(f.listAll(limit)); !slices.Equal(got, want) {
			t.Errorf("in pieces of %d: %q, want %q", limit, got, want)
		}
	}
	for _, e := range f.listAll(100) {
		if e.Lockspace != dir || e.Path != dir+"/"+e.Resource || !e.Shared || !e.AutoCreate || e.Exclusive {
			t.Errorf("entry %+v", e)
		}
		for _, h := range e.Holds {
			if h.Since < before || h.Since > time.Now().UnixNano() {
				t.Errorf("held since %d", h.Since)
			}
		}
		if holds, ok := f.Table.Current(&e); !ok || !slices.Equal(holds, e.Holds) {
			t.Errorf("%s is not current", e.Resource)
		}
	}
	// Numbers that nobody was given.
	if entries, next := f.Table.List(1<<40, 1000); len(entries) != 0 || next != 0 {
		t.Errorf("%d entries far behind the end, next %d", len(entries), next)
	}
	entry := f.listAll(100)[0]
	f.Table.ReleaseOwner(a)
	f.Table.ReleaseOwner(b)
	if _, ok := f.Table.Current(&entry); ok {
		t.Error("a lock that was given up is current")
	}
	a.Release()
	b.Release()
}

// What is held all the time is listed once, whatever happens around it.
func TestListWhileOthersWork(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	o := f.number()
	defer o.Release()
	var want []string
	for i := range 100 {
		name := f.touch(fmt.Sprintf("kept%03d", i))
		f.want("acquire", f.acquire(name, 0, o), nil)
		want = append(want, name)
	}
	stop := make(chan struct{})
	var others sync.WaitGroup
	for w := range 3 {
		busy := f.number()
		others.Go(func() {
			defer busy.Release()
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				name := f.path(fmt.Sprintf("busy%d-%d", w, i%10))
				if err := f.acquire(name, AutoCreate, busy); err != nil {
					t.Error(err)
				}
				if err := f.release(name, busy); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 100 {
		var kept []string
		for _, name := range names(f.listAll(16)) {
			if slices.Contains(want, name) {
				kept = append(kept, name)
			}
		}
		if !slices.Equal(kept, want) {
			t.Fatalf("%d of %d are listed", len(kept), len(want))
		}
	}
	close(stop)
	others.Wait()
}

func TestBreak(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	a, b := f.number(), f.number()
	disk := f.touch("disk")
	pull := func(pid *int32) (string, int, error) {
		who, left, done, err := f.Table.Break(Request{Resource: disk}, pid, 0)
		if err != nil {
			return "", left, err
		}
		<-done
		return fmt.Sprint(who.PID), left, nil
	}
	_, _, err := pull(nil)
	f.want("break what is free", err, ErrNotLocked)
	_, _, _, err = f.Table.Break(Request{Lockspace: "/none", Resource: disk}, nil, 0)
	f.want("break in no lockspace", err, ErrNoLockspace)
	f.want("acquire", f.acquire(disk, Shared, a), nil)
	f.want("acquire again", f.acquire(disk, Shared, a), nil)
	f.want("share", f.acquire(disk, Shared, b), nil)
	_, _, err = pull(nil)
	f.want("break one of two", err, ErrSeveral)
	_, _, err = pull(new(int32(1)))
	f.want("break a stranger's", err, ErrNotOwner)
	// Both holds of that owner go, the other's stays.
	if who, left, err := pull(&a.PID); err != nil || who != fmt.Sprint(a.PID) || left != 1 {
		t.Errorf("broken of %s, %d left, %v", who, left, err)
	}
	if f.Table.Holds(a) || !f.Table.Holds(b) {
		t.Error("the wrong owner lost it")
	}
	if who, left, err := pull(nil); err != nil || who != fmt.Sprint(b.PID) || left != 0 {
		t.Errorf("broken of %s, %d left, %v", who, left, err)
	}
	f.want("acquire what was broken", f.acquire(disk, 0, b), nil)
	f.Table.ReleaseOwner(b)
	a.Release()
	b.Release()
}

func TestEvents(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	a, b := f.number(), f.number()
	disk, hard := f.touch("disk"), f.path("hard")
	if err := os.Link(disk, hard); err != nil {
		t.Fatal(err)
	}
	f.want("acquire", f.acquire(disk, 0, a), nil)
	f.want("again", f.acquire(disk, 0, b), ErrLocked)
	_ = f.acquire(hard, 0, b)
	_ = f.acquire(f.path("none"), 0, b)
	_ = f.take(Request{Lockspace: "/none", Resource: "x", Owner: b})
	f.want("release", f.release(disk, a), nil)
	h, err := f.Table.Acquire(Request{Resource: disk, Flags: Shared, Owner: a})
	f.want("acquire", err, nil)
	f.want("undo", f.Table.Undo(h), nil)
	f.want("acquire", f.acquire(disk, 0, a), nil)
	f.Table.ReleaseOwner(a)
	f.want("acquire", f.acquire(disk, 0, b), nil)
	f.Table.Close()
	got, _, _ := f.events.Since(nil, 0, 1000)
	var lines []string
	for _, e := range got {
		lines = append(lines, fmt.Sprintf("%s %s shared=%t pid=%d", e.Kind, e.Reason, e.Shared, e.PID-a.PID))
		if e.Owner != "guest" || e.Resource == "" {
			t.Errorf("event %+v", e)
		}
	}
	want := []string{
		"acquired  shared=false pid=0",
		"refused held shared=false pid=1",
		"refused outside shared=false pid=1", // the kernel says so, before the table sees that it is one file
		"refused missing shared=false pid=1",
		"refused missing shared=false pid=1",
		"released request shared=false pid=0",
		"acquired  shared=true pid=0",
		"released gone shared=true pid=0",
		"acquired  shared=false pid=0",
		"released owner-dead shared=false pid=0",
		"acquired  shared=false pid=1",
		"released stop shared=false pid=1",
	}
	if !slices.Equal(lines, want) {
		t.Errorf("got\n%q\nwant\n%q", lines, want)
	}
	a.Release()
	b.Release()
}
