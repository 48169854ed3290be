// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"fmt"
	"log/slog"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/internal/state"
	"virtlockd/internal/vault"
)

// What becomes of the holds of one shared resource, by the words of their cells, and of those words: what was going on is over, and
// what is done to an owner is noted there again. A process that died may have had a worker process at
// one of them; that is said by the pid of one that lives, ours.
func TestRecoveredHolds(t *testing.T) {
	t.Parallel()
	us := os.Getpid()
	for _, tt := range []struct {
		name    string
		words   []uint64 // of holds of the guests 1, 2, ... in cells with rising indexes
		same    bool     // all are the hold of one guest
		asked   bool     // by requests of clients that there are no more
		held    []int    // the cells that are taken over, from 1
		end     []int    // of these, those that end with the recovery
		waiting bool     // ... when the worker has ended
		filling bool     // a worker may be about to put a hold into another cell
		after   []uint64 // the words of held ones afterwards, if they are others
	}{
		{name: "all well", words: []uint64{0, 0}, held: []int{1, 2}},
		{name: "the later one is just put in", words: []uint64{0, vault.Filling(us)}, held: []int{1, 2}, after: []uint64{0, 0}},
		{name: "the earlier cell is filled last", words: []uint64{vault.Filling(us), 0}, held: []int{1, 2}, after: []uint64{0, 0}},
		{name: "only one, just put in", words: []uint64{vault.Filling(us)}, held: []int{1}, after: []uint64{0}},
		{name: "one that was answered, and one just put in", words: []uint64{0, vault.Filling(us)}, asked: true, held: []int{1, 2}, end: []int{2}, after: []uint64{0, vault.Releasing}},
		{name: "the last one is released by a worker", words: []uint64{vault.Busy(us)}, held: []int{1}, end: []int{1}, waiting: true},
		{name: "a replaced lock is released by a worker", words: []uint64{vault.Busy(us), 0}, same: true, held: []int{2}},
		{name: "one is released", words: []uint64{vault.Releasing, 0}, held: []int{1, 2}, end: []int{1}},
		{name: "replaced, and not marked yet", words: []uint64{vault.Moving, 0}, same: true, held: []int{1, 2}, end: []int{1}},
		{name: "to be replaced", words: []uint64{vault.Moving}, held: []int{1}, after: []uint64{0}},
		{name: "to be replaced, beside others", words: []uint64{vault.Moving, vault.Moving}, held: []int{1, 2}, after: []uint64{0, 0}},
		{name: "to be replaced, beside one that is", words: []uint64{vault.Moving, 0}, held: []int{1, 2}},
		{name: "to be replaced at any moment", words: []uint64{vault.Moving}, held: []int{1}, filling: true},
		{name: "stopped", words: []uint64{vault.Stopped, 0}, held: []int{1, 2}},
		{name: "being ended", words: []uint64{vault.Ending, 0}, held: []int{1, 2}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			v, err := vault.New()
			if err != nil {
				t.Fatal(err)
			}
			defer v.GiveUp()
			file, err := os.CreateTemp(t.TempDir(), "disk")
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			var cells []*vault.Cell
			for range tt.words {
				c, err := v.Take()
				if err != nil {
					t.Fatal(err)
				}
				cells = append(cells, c)
			}
			slices.SortFunc(cells, func(a, b *vault.Cell) int { return int(a.Index()) - int(b.Index()) })
			for i, word := range tt.words {
				h := vault.Hold{
					Since: 1, Name: "disk", Flags: 1,
					Owner: state.Owner{Details: state.Details{Name: fmt.Sprint("guest", i), PID: int32(1 + i)}, Kind: state.Unverified, PIDFD: state.NoFD},
				}
				if tt.asked {
					h.Origin = vault.Origin{Client: uint64(1 + i), Request: 1}
				}
				if tt.same {
					h.Owner.PID = 1
				}
				record := h.Record(nil)
				vault.SetFile(record, state.File{Dev: 1, Ino: 2, Remote: true})
				if err := cells[i].Put(record, int(file.Fd())); err != nil {
					t.Fatal(err)
				}
				cells[i].Word().Store(word)
			}
			if tt.filling {
				empty, err := v.Take()
				if err != nil {
					t.Fatal(err)
				}
				empty.Word().Store(vault.Filling(us))
			}
			// As the next process finds it.
			root, err := unix.FcntlInt(uintptr(v.Root()), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			d := &daemon{log: slog.New(slog.DiscardHandler)}
			r, err := d.recoverVault([]int{root})
			if err != nil {
				t.Fatal(err)
			}
			if len(r.snapshot.Default) != 1 {
				t.Fatalf("%d resources, want 1", len(r.snapshot.Default))
			}
			want := func(what string, got []uint32, want []int) {
				t.Helper()
				var all []int
				for _, index := range got {
					all = append(all, 1+slices.IndexFunc(cells, func(c *vault.Cell) bool { return c.Index() == index }))
				}
				slices.Sort(all)
				if !slices.Equal(all, want) {
					t.Errorf("%s: cells %v, want %v", what, all, want)
				}
			}
			want("taken over", r.snapshot.Default[0].Cells, tt.held)
			var end []uint32
			for _, u := range r.unsettled {
				end = append(end, u.cell)
				if waits := u.worker == us; waits != tt.waiting {
					t.Errorf("it ends with process %d", u.worker)
				}
			}
			want("end", end, tt.end)
			if tt.after == nil {
				tt.after = tt.words
			}
			for _, i := range tt.held {
				if word := cells[i-1].Word().Load(); word != tt.after[i-1] {
					t.Errorf("beside cell %d stands %#x, want %#x", i, word, tt.after[i-1])
				}
			}
			for i, o := range r.snapshot.Owners {
				if word := tt.words[o.PID-1]; o.Stopped != (word == vault.Stopped) || o.Ending != (word == vault.Ending) {
					t.Errorf("owner %d with word %d: stopped %v, being ended %v", i, word, o.Stopped, o.Ending)
				}
			}
		})
	}
}

// A hold that can't be opened is counted, and so is a vault that can't be opened beside one that can: the daemon must not give up what
// they keep locked.
func TestRecoveryLeaves(t *testing.T) {
	t.Parallel()
	newVault := func() (*vault.Vault, int) {
		v, err := vault.New()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(v.GiveUp)
		root, err := unix.FcntlInt(uintptr(v.Root()), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		return v, root
	}
	v, root := newVault()
	broken, brokenRoot := newVault()
	if err := vault.At(broken.Root()).Put([]byte("of a later version")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(brokenRoot) })
	h := vault.Hold{Name: "disk", Owner: state.Owner{PIDFD: state.NoFD}}
	record := h.Record(nil)
	vault.SetFile(record, state.File{Dev: 1, Ino: 2})
	for range 2 {
		if _, err := v.Store(record, root); err != nil { // any file
			t.Fatal(err)
		}
	}
	d := &daemon{log: slog.New(slog.DiscardHandler)}
	next, found, err := d.openVault([]int{brokenRoot, root})
	if err != nil || len(found) != 2 {
		t.Fatalf("%d records, %v", len(found), err)
	}
	defer next.Close()
	found[0].Cell.Close()
	r, err := d.recoverContents(next, found)
	if err != nil || len(r.snapshot.Default) != 1 {
		t.Fatalf("%+v, %v", r, err)
	}
	if !d.safety.another || d.safety.orphans != 1 {
		t.Errorf("another vault: %v, want true; holds that were left: %d, want 1", d.safety.another, d.safety.orphans)
	}
	for _, res := range r.snapshot.Default {
		unix.Close(int(res.FD))
	}
}

// A hold that was being moved goes on to be the one that loses, if not everything could be opened, be it found late: the other one may be there.
func TestRecoveryLeavesMoving(t *testing.T) {
	t.Parallel()
	v, err := vault.New()
	if err != nil {
		t.Fatal(err)
	}
	defer v.GiveUp()
	h := vault.Hold{Name: "disk", Owner: state.Owner{PIDFD: state.NoFD}}
	record := h.Record(nil)
	vault.SetFile(record, state.File{Dev: 1, Ino: 2})
	for range 2 {
		c, err := v.Store(record, v.Root()) // any file
		if err != nil {
			t.Fatal(err)
		}
		c.Word().Store(vault.Moving)
	}
	root, err := unix.FcntlInt(uintptr(v.Root()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{log: slog.New(slog.DiscardHandler)}
	next, found, err := d.openVault([]int{root})
	if err != nil || len(found) != 2 {
		t.Fatalf("%d records, %v", len(found), err)
	}
	defer next.Close()
	found[1].Cell.Close()
	r, err := d.recoverContents(next, found)
	if err != nil || len(r.snapshot.Default) != 1 || d.safety.orphans != 1 {
		t.Fatalf("%+v, %v, %d left", r, err, d.safety.orphans)
	}
	defer unix.Close(int(r.snapshot.Default[0].FD))
	if word := found[0].Cell.Word().Load(); word != vault.Moving {
		t.Errorf("beside the first one stands %#x, want %#x", word, vault.Moving)
	}
}

// Who is being ended was verified, though not yet when his hold was stored; nobody else is taken for that.
func TestRecoveredKind(t *testing.T) {
	t.Parallel()
	for word, want := range map[uint64]state.Kind{0: state.Watched, vault.Stopped: state.Watched, vault.Ending: state.Verified} {
		v, err := vault.New()
		if err != nil {
			t.Fatal(err)
		}
		defer v.GiveUp()
		pidfd, err := unix.PidfdOpen(os.Getpid(), 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(pidfd)
		h := vault.Hold{
			Name:  "disk",
			Owner: state.Owner{Details: state.Details{PID: int32(os.Getpid())}, Kind: state.Watched, PIDFD: int32(pidfd)},
		}
		record := h.Record(nil)
		vault.SetFile(record, state.File{Dev: 1, Ino: 2})
		cell, err := v.Store(record, pidfd, v.Root()) // any file
		if err != nil {
			t.Fatal(err)
		}
		cell.Word().Store(word)
		root, err := unix.FcntlInt(uintptr(v.Root()), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		d := &daemon{log: slog.New(slog.DiscardHandler)}
		r, err := d.recoverVault([]int{root})
		if err != nil || len(r.snapshot.Owners) != 1 || len(r.snapshot.Default) != 1 {
			t.Fatalf("%+v, %v", r, err)
		}
		o := r.snapshot.Owners[0]
		if o.Kind != want {
			t.Errorf("an owner with the word %d is %v, want %v", word, o.Kind, want)
		}
		unix.Close(int(o.PIDFD))
		unix.Close(int(r.snapshot.Default[0].FD))
		r.vault.Close()
	}
}
