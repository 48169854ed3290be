// SPDX-License-Identifier: LGPL-2.1-or-later

package verify

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"virtlockd/internal/filelock"
	"virtlockd/internal/lockspace"
	"virtlockd/internal/owner"
	"virtlockd/internal/poll"
)

type fixture struct {
	*testing.T
	table   *lockspace.Table
	owners  *owner.Registry
	checker *Checker
	dir     string
}

// newFixture makes a table whose owners' ends nobody notices: no poller runs.
func newFixture(t *testing.T) *fixture {
	t.Helper()
	files, err := filelock.New(filelock.Config{})
	if err != nil {
		t.Fatal(err)
	}
	p, err := poll.New()
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	table := lockspace.New(lockspace.Config{Locker: files, Logger: log})
	f := &fixture{T: t, table: table, checker: New(table), dir: t.TempDir()}
	f.owners = owner.NewRegistry(owner.Config{Poller: p, Logger: log, Died: table.ReleaseOwner})
	t.Cleanup(func() {
		table.Close()
		f.owners.Close()
		p.Close()
		files.Close()
	})
	return f
}

func (f *fixture) acquire(name string, o *owner.Owner) *lockspace.Entry {
	f.Helper()
	path := filepath.Join(f.dir, name)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		f.Fatal(err)
	}
	if _, err := f.table.Acquire(lockspace.Request{Resource: path, Owner: o}); err != nil {
		f.Fatal(err)
	}
	entries, _ := f.table.List(0, 100)
	for i := range entries {
		if entries[i].Resource == path {
			return &entries[i]
		}
	}
	f.Fatalf("%s is not listed", path)
	return nil
}

func (f *fixture) want(e *lockspace.Entry, want ...Kind) {
	f.Helper()
	found := f.checker.Check(e)
	ok := len(found) == len(want)
	for i := range found {
		ok = ok && found[i].Kind == want[i] && found[i].Text != ""
	}
	if !ok {
		f.Errorf("found %v, want %v", found, want)
	}
}

func TestOwners(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	cmd := exec.Command("sleep", "100")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	o, err := f.owners.Named(&owner.Details{PID: int32(cmd.Process.Pid)}, true)
	if err != nil {
		t.Fatal(err)
	}
	e := f.acquire("a", o)
	f.want(e)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	f.want(e, OwnerDead)
	// Together with what else is wrong.
	if err := os.Remove(e.Path); err != nil {
		t.Fatal(err)
	}
	f.want(e, Deleted, OwnerDead)
	// Its locks are being released, a moment later than seen.
	var released sync.WaitGroup
	released.Go(func() { f.table.ReleaseOwner(o) })
	f.want(e)
	released.Wait()
	o.Release()

	nobody, err := f.owners.Named(&owner.Details{PID: 0x70000001}, false)
	if err != nil {
		t.Fatal(err)
	}
	f.want(f.acquire("b", nobody), OwnerGone)
	nobody.Release()
	none, err := f.owners.Named(&owner.Details{PID: 0}, false)
	if err != nil {
		t.Fatal(err)
	}
	f.want(f.acquire("c", none))
	none.Release()
}

// What was released, and perhaps acquired again, since it was listed is not a finding, and says nothing of its disk.
func TestStale(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	o, err := f.owners.Named(&owner.Details{PID: 0}, false)
	if err != nil {
		t.Fatal(err)
	}
	defer o.Release()
	e := f.acquire("a", o)
	if err := f.table.Release(lockspace.Request{Resource: e.Resource}, 0, true); err != nil {
		t.Fatal(err)
	}
	f.want(e)
	again := f.acquire("a", o)
	f.want(e)
	f.want(again)
	for _, tt := range []struct {
		*lockspace.Entry
		want bool
	}{{e, false}, {again, true}} {
		if answered, trouble := f.checker.Ask(tt.Entry); answered != tt.want || trouble != nil {
			t.Errorf("asked: %v, %v, want %v", answered, trouble, tt.want)
		}
	}
}

// Checks go on while locks come and go.
func TestConcurrent(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	o, err := f.owners.Named(&owner.Details{PID: 0}, false)
	if err != nil {
		t.Fatal(err)
	}
	defer o.Release()
	kept := f.acquire("kept", o)
	path := filepath.Join(f.dir, "busy")
	stop := make(chan struct{})
	var worker sync.WaitGroup
	worker.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := f.table.Acquire(lockspace.Request{Resource: path, Flags: lockspace.AutoCreate, Owner: o}); err != nil {
				t.Error(err)
				return
			}
			if err := f.table.Release(lockspace.Request{Resource: path}, 0, true); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for range 200 {
		f.want(kept)
		entries, _ := f.table.List(0, 100)
		for i := range entries {
			f.want(&entries[i])
		}
	}
	close(stop)
	worker.Wait()
}

// Disks that hang, however many, keep nobody from looking at the locks on others.
func TestManyHungDisks(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	o, err := f.owners.Named(&owner.Details{Name: "guest", PID: int32(os.Getpid())}, true)
	if err != nil {
		t.Fatal(err)
	}
	local := f.acquire("local", o)
	for i := range maxElsewhere {
		if found := f.checker.enter(fmt.Sprint("/mnt/", i), false); found != nil {
			t.Fatalf("hung disk %d: %v", i, found)
		}
	}
	f.want(local)
	if err := os.Remove(local.Path); err != nil {
		t.Fatal(err)
	}
	f.want(local, Deleted)
	if found := f.checker.enter("/mnt/more", false); len(found) != 1 || found[0].Kind != NotChecked {
		t.Errorf("one disk more: %v", found)
	}
	for i := range maxHere {
		// A check that has just answered counts for a moment still.
		var found []Finding
		for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
			if found = f.checker.enter(fmt.Sprint(i), true); found == nil || time.Now().After(end) {
				break
			}
		}
		if found != nil {
			t.Fatalf("hung local file %d: %v", i, found)
		}
	}
	f.want(local, NotChecked)
	f.checker.leave("0")
	f.want(local, Deleted)
}
