// SPDX-License-Identifier: LGPL-2.1-or-later

package vault

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) {
	if os.Getenv(restlessEnv) != "" {
		beRestless()
	}
	os.Exit(m.Run())
}

// unneeded says that nobody has needed what is free just now.
func (v *Vault) unneeded() { v.idle = len(v.free) }

// checkRoot checks that everything is named once in the root.
func checkRoot(t rapid.TB, v *Vault) {
	t.Helper()
	messages, err := v.root.messages(make([]byte, MaxRecord))
	if err != nil {
		t.Fatal(err)
	}
	var got []int
	want := []int{wordsIndex}
	for _, m := range messages {
		indexes, err := openRoot(m)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, indexes...)
	}
	for i, c := range v.cells {
		if c != nil {
			want = append(want, i+1)
		}
	}
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("in the root -want +got:\n%s", diff)
	}
}

// What was not needed is given up, and only that.
func TestShrink(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	defer v.GiveUp()
	const n, stay = 3000, 100
	fd, _ := lockedFile(t, "disk")
	defer unix.Close(fd)
	cells := make([]*Cell, n)
	for i := range cells {
		cells[i] = storeHold(t, v, hold(i), fd)
	}
	stays := map[uint32]bool{}
	for i, c := range cells {
		if i%(n/stay) == 0 { // all over the root
			stays[c.Index()] = true
			c.Word().Store(uint64(c.Index()))
			continue
		}
		v.Release(c)
	}
	if !v.watched {
		t.Error("nobody watches")
	}
	v.unneeded()
	v.shrink()
	enough := 2*stay + 2*minBatch
	if cells, used := v.Size(); used != stay || cells != enough {
		t.Errorf("%d of %d cells are in use, want %d of %d", used, cells, stay, enough)
	}
	if v.watched {
		t.Error("it is still watched")
	}
	checkRoot(t, v)
	if messages, err := v.root.messages(make([]byte, MaxRecord)); err != nil || len(messages) > n/maxBatch {
		t.Errorf("%d messages, %v: they are not joined", len(messages), err)
	}
	next := reopened(t, v)
	defer closeTable(next)
	found, err := next.Contents()
	if err != nil || len(found) != stay {
		t.Fatalf("%d records, %v", len(found), err)
	}
	for i := range found {
		if c := found[i].Cell; !stays[c.Index()] || c.Word().Load() != uint64(c.Index()) {
			t.Errorf("cell %d has the word %d", c.Index(), c.Word().Load())
		}
	}
}

// Nothing is given up that was needed meanwhile, or is no more than usual.
func TestShrinkOnlyIdle(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	defer v.GiveUp()
	take := func(n int) {
		var cells []*Cell
		for range n {
			c, err := v.Take()
			if err != nil {
				t.Fatal(err)
			}
			cells = append(cells, c)
		}
		for _, c := range cells {
			v.Return(c)
		}
	}
	take(2 * 2 * minBatch)
	if v.watched {
		t.Error("a usual vault is watched")
	}
	take(1000)
	before, _ := v.Size()
	take(1000)
	v.shrink()
	if cells, _ := v.Size(); cells != before {
		t.Errorf("%d cells of %d are left, and all were needed", cells, before)
	}
	if !v.watched {
		t.Error("nobody watches")
	}
	v.shrink() // later, and nobody has come
	if cells, _ := v.Size(); cells != 2*minBatch {
		t.Errorf("%d cells are left", cells)
	}
}

// A vault that was given up while it was watched is left alone.
func TestShrinkGivenUp(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	var cells []*Cell
	for range 500 {
		c, err := v.Take()
		if err != nil {
			t.Fatal(err)
		}
		cells = append(cells, c)
	}
	for _, c := range cells {
		v.Return(c)
	}
	v.unneeded()
	v.GiveUp()
	v.shrink()
	if v.watched {
		t.Error("it is still watched")
	}
}

// Whatever is stored, released and given up in whatever order: whoever comes after a crash at any point, also in the midst of
// giving up, finds each record that there is, once and in its cell.
func TestShrinkAtAnyPoint(t *testing.T) {
	t.Parallel()
	fd, _ := lockedFile(t, "disk")
	defer unix.Close(fd)
	rapid.Check(t, func(t *rapid.T) {
		v, err := New()
		if err != nil {
			t.Fatal(err)
		}
		defer func() { v.GiveUp() }()
		stored := map[uint32]string{} // by cell
		// crash looks what the next process finds, which may go on with it: this one has died, or was upgraded.
		crash := func(goOn bool) {
			root, err := unix.FcntlInt(uintptr(v.Root()), unix.F_DUPFD_CLOEXEC, 3)
			if err != nil {
				t.Fatal(err)
			}
			next, err := Open(root)
			if err != nil {
				t.Fatal(err)
			}
			if rapid.Bool().Draw(t, "upgrade") {
				if strays, err := next.Claim(slices.Collect(maps.Keys(stored))); err != nil || len(strays) > 0 {
					t.Fatalf("strays %+v, %v", strays, err)
				}
			} else {
				found, err := next.Contents()
				if err != nil || len(found) != len(stored) {
					t.Fatalf("%d records, %v, want %d", len(found), err, len(stored))
				}
				for i := range found {
					if h := found[i].Hold; h == nil || stored[found[i].Cell.Index()] != h.Name {
						t.Fatalf("cell %d has %+v, want %q", found[i].Cell.Index(), found[i], stored[found[i].Cell.Index()])
					}
				}
			}
			if _, used := next.Size(); used != len(stored) {
				t.Fatalf("%d cells are in use, want %d", used, len(stored))
			}
			if goOn {
				next, v = v, next
			}
			closeTable(next)
			// There may be so many mappings, and a vault never takes its own back.
			if err := unix.MunmapPtr(unsafe.Pointer(next.words), unsafe.Sizeof(*next.words)); err != nil {
				t.Fatal(err)
			}
		}
		n := 0
		store := func(t *rapid.T) {
			for range rapid.IntRange(1, 200).Draw(t, "n") {
				n++
				h := hold(n)
				r := h.Record(nil)
				SetFile(r, h.File)
				c, err := v.Store(r, fd)
				if err != nil {
					t.Fatal(err)
				}
				if stored[c.Index()] != "" {
					t.Fatalf("cell %d was given twice", c.Index())
				}
				stored[c.Index()] = h.Name
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"store": store,
			"peak": func(t *rapid.T) {
				store(t)
				store(t)
			},
			"release": func(t *rapid.T) {
				for index := range stored {
					if rapid.IntRange(0, 9).Draw(t, "stays") > 0 {
						v.Release(v.Cell(index))
						delete(stored, index)
					}
				}
			},
			"shrink": func(t *rapid.T) {
				v.unneeded()
				retired, err := v.retire()
				if err != nil {
					t.Fatal(err)
				}
				for _, c := range retired {
					c.Close()
				}
				if len(retired) > 0 {
					checkRoot(t, v)
				}
			},
			// As far as the kernel lets us.
			"shrink in part": func(t *rapid.T) {
				v.unneeded()
				idle := v.takeIdle()
				turns, err := v.turns(idle)
				if err != nil {
					t.Fatal(err)
				}
				for _, turn := range turns[:rapid.IntRange(0, len(turns)).Draw(t, "turns")] {
					if err := v.turn(turn); err != nil {
						t.Fatal(err)
					}
					for _, c := range v.leave(turn.gone) {
						c.Close()
						idle = slices.DeleteFunc(idle, func(of *Cell) bool { return of == c })
					}
				}
				v.free = append(v.free, idle...)
			},
			"crash in the midst": func(t *rapid.T) {
				v.unneeded()
				turns, err := v.turns(v.takeIdle())
				if err != nil {
					t.Fatal(err)
				}
				last := rapid.IntRange(0, len(turns)-1).Draw(t, "last")
				for _, done := range turns[:last] {
					if err := v.turn(done); err != nil {
						t.Fatal(err)
					}
					for _, c := range v.leave(done.gone) {
						c.Close()
					}
				}
				cut := turns[last]
				cut.drop = rapid.IntRange(0, cut.drop).Draw(t, "dropped")
				if err := v.turn(cut); err != nil {
					t.Fatal(err)
				}
				crash(true)
			},
			"crash": func(*rapid.T) { crash(true) },
			"":      func(*rapid.T) { crash(false) },
		})
	})
}

// Of two messages in the root that name a cell the later one counts: the earlier one may be about one that was given up.
func TestLaterCellCounts(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	defer v.GiveUp()
	old, err := NewCell()
	if err != nil {
		t.Fatal(err)
	}
	if err := v.root.Put(rootRecord([]int{1, 3, 7}), old.FD(), old.FD(), old.FD()); err != nil {
		t.Fatal(err)
	}
	old.Close()
	fd, _ := lockedFile(t, "disk")
	defer unix.Close(fd)
	for i := range minBatch {
		storeHold(t, v, hold(i), fd)
	}
	next := reopened(t, v)
	defer closeTable(next)
	if found, err := next.Contents(); err != nil || len(found) != minBatch {
		t.Errorf("%d records, %v", len(found), err)
	}
}

// Where the kernel refuses to take a message, what is free stays free, and nothing is lost.
func TestShrinkFails(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	defer v.GiveUp()
	fd, locked := lockedFile(t, "disk")
	var cells []*Cell
	for i := range 2000 {
		cells = append(cells, storeHold(t, v, hold(i), fd))
	}
	unix.Close(fd)
	for _, c := range cells[1:] {
		v.Release(c)
	}
	before, _ := v.Size()
	for _, o := range []int{unix.SO_SNDBUF, unix.SO_SNDBUFFORCE} {
		size := 1
		if o == unix.SO_SNDBUFFORCE {
			size = rootBuffer
		}
		if err := unix.SetsockoptInt(v.Root(), unix.SOL_SOCKET, o, size); err != nil {
			t.Skip(err)
		}
		v.unneeded()
		v.shrink()
		cells, used := v.Size()
		if fails := o == unix.SO_SNDBUF; fails != (cells == before) || used != 1 || !locked() {
			t.Errorf("%d cells of %d are left, and %d in use; locked: %v", cells, before, used, locked())
		}
		checkRoot(t, v)
	}
}

// Whoever takes and returns cells meanwhile has each to himself, and what he has stored stays.
func TestShrinkBusy(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	defer v.GiveUp()
	var busy sync.WaitGroup
	for worker := range 4 {
		busy.Go(func() {
			for round := range 50 {
				var cells []*Cell
				record := func(i int) []byte { return lockspaceRecord(fmt.Sprint(worker, round, i)) }
				for i := range 20 + worker*100 {
					c, err := v.Store(record(i))
					if err != nil {
						t.Error(err)
						return
					}
					cells = append(cells, c)
				}
				for i, c := range cells {
					if all, err := c.messages(make([]byte, 1024)); err != nil || len(all) != 1 || !bytes.Equal(all[0], record(i)) {
						t.Errorf("cell %d has %q, %v, want %q", c.Index(), all, err, record(i))
					}
					v.Release(c)
				}
			}
		})
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		busy.Wait()
	}()
	for done := false; !done; {
		select {
		case <-ended:
			done = true
		default:
		}
		v.mu.Lock()
		v.unneeded()
		v.mu.Unlock()
		v.shrink()
	}
	checkRoot(t, v)
	if cells, used := v.Size(); used != 0 || cells > 4*minBatch {
		t.Errorf("%d of %d cells are in use", used, cells)
	}
}

// restlessEnv tells a process that a test started to be restless.
const restlessEnv = "VIRTLOCKD_VAULT_TEST_RESTLESS"

// beRestless goes on with a vault, whose root is the first descriptor that was passed, and lets it grow and shrink until it is killed.
func beRestless() {
	must := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	v, err := Open(3)
	must(err)
	found, err := v.Contents()
	must(err)
	for i := range found {
		if found[i].Hold.Lockspace == "churn" {
			v.Release(found[i].Cell)
		}
	}
	h := hold(0)
	h.Lockspace = "churn"
	record := h.Record(nil)
	SetFile(record, h.File)
	fmt.Println("ready")
	for {
		var cells []*Cell
		for range 500 {
			c, err := v.Store(record, 0)
			must(err)
			cells = append(cells, c)
		}
		for _, c := range cells {
			v.Release(c)
		}
		v.unneeded()
		retired, err := v.retire()
		must(err)
		for _, c := range retired {
			c.Close()
		}
	}
}

// The same with processes that are killed while they give up cells.
func TestShrinkKilled(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	fd, locked := lockedFile(t, "disk")
	const n = 200
	for i := range n {
		storeHold(t, v, hold(i), fd)
	}
	unix.Close(fd)
	root, err := unix.FcntlInt(uintptr(v.Root()), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(root), "root")
	defer file.Close()
	closeTable(v)
	check := func() {
		t.Helper()
		again, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			t.Fatal(err)
		}
		next, err := Open(again)
		if err != nil {
			t.Fatal(err)
		}
		defer closeTable(next)
		found, err := next.Contents()
		if err != nil {
			t.Fatal(err)
		}
		names := map[string]int{}
		for i := range found {
			if h := found[i].Hold; h == nil {
				t.Errorf("found %+v", found[i])
			} else if h.Lockspace != "churn" {
				names[h.Name]++
			}
		}
		for i := range n {
			if names[hold(i).Name] != 1 {
				t.Fatalf("hold %d was found %d times", i, names[hold(i).Name])
			}
		}
		if !locked() {
			t.Fatal("the lock is gone")
		}
	}
	for range 40 {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), restlessEnv+"=1")
		cmd.ExtraFiles = []*os.File{file}
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(out, make([]byte, len("ready\n"))); err != nil {
			t.Error(err)
		}
		time.Sleep(rand.N(20 * time.Millisecond)) // any instant will do
		if err := cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		_ = cmd.Wait()
		check()
	}
}
