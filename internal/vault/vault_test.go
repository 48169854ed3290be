// SPDX-License-Identifier: LGPL-2.1-or-later

package vault

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"virtlockd/internal/state"
)

func newVault(t testing.TB) *Vault {
	t.Helper()
	v, err := New()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// reopened is what the next process finds, which has its own copy of the root alone.
func reopened(t testing.TB, v *Vault) *Vault {
	t.Helper()
	root, err := unix.FcntlInt(uintptr(v.Root()), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Open(root)
	if err != nil {
		t.Fatal(err)
	}
	return again
}

// closeTable closes the vault's descriptors, as the end of a process does.
func closeTable(v *Vault) {
	v.close()
	v.root.Close()
}

// lockedFile makes a file with an OFD lock, and returns a function that tells whether it is locked.
func lockedFile(t testing.TB, name string) (fd int, locked func() bool) {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	open := func() int {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	fd = open()
	lock := unix.Flock_t{Type: unix.F_WRLCK, Len: 1}
	if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lock); err != nil {
		t.Fatal(err)
	}
	other := open()
	t.Cleanup(func() { unix.Close(other) })
	return fd, func() bool {
		lock := unix.Flock_t{Type: unix.F_WRLCK, Len: 1}
		if err := unix.FcntlFlock(uintptr(other), unix.F_OFD_GETLK, &lock); err != nil {
			t.Fatal(err)
		}
		return lock.Type != unix.F_UNLCK
	}
}

func hold(n int) Hold {
	return Hold{
		Origin: Origin{Client: 7, Request: uint64(n)}, Since: 5, Lockspace: "/space", Name: fmt.Sprint("lease", n), Flags: 2,
		Owner: state.Owner{Details: state.Details{Name: "guest", ID: 3, PID: 4711, UUID: [16]byte{1, 2}}, Kind: state.Watched, PIDFD: state.NoFD},
		File:  state.File{Dev: 1, Ino: uint64(n), Exclusive: true},
	}
}

func storeHold(t testing.TB, v *Vault, h Hold, fd int) *Cell {
	t.Helper()
	r := h.Record(nil)
	SetFile(r, h.File)
	c, err := v.Store(r, fd)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// A lock lives as long as its cell, with no process that has the file open, and no longer.
func TestLockOutlivesTable(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	fd, locked := lockedFile(t, "disk")
	c := storeHold(t, v, hold(1), fd)
	unix.Close(fd)
	if !locked() {
		t.Fatal("the lock went with the descriptor")
	}
	next := reopened(t, v)
	closeTable(v)
	if !locked() {
		t.Fatal("the lock went with the process")
	}
	found, err := next.Contents()
	if err != nil || len(found) != 1 {
		t.Fatalf("found %+v, %v", found, err)
	}
	want := hold(1)
	if diff := cmp.Diff(&want, found[0].Hold); diff != "" {
		t.Errorf("the hold -want +got:\n%s", diff)
	}
	if found[0].Cell.Index() != c.Index() {
		t.Errorf("in cell %d, want %d", found[0].Cell.Index(), c.Index())
	}
	next.Release(found[0].Cell)
	if locked() {
		t.Error("the lock outlives its cell's content")
	}
	next.GiveUp()
}

// To look changes nothing, however often and however far.
func TestPeekChangesNothing(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	const n = 400 // more than two batches
	fd, locked := lockedFile(t, "disk")
	for i := range n {
		storeHold(t, v, hold(i), fd)
	}
	unix.Close(fd)
	for range 3 {
		next := reopened(t, v)
		found, err := next.Contents()
		if err != nil || len(found) != n {
			t.Fatalf("%d records, %v", len(found), err)
		}
		for i := range found {
			fds, err := found[i].Descriptors()
			if err != nil || len(fds) != 1 {
				t.Fatalf("%v, %v", fds, err)
			}
			unix.Close(fds[0])
		}
		closeTable(next)
	}
	if !locked() {
		t.Error("the lock is gone")
	}
	v.GiveUp()
	if locked() {
		t.Error("a vault that was given up keeps a lock")
	}
}

// Whoever dies while he looks leaves nothing behind that keeps others from looking.
func TestPeekIsInterrupted(t *testing.T) {
	t.Parallel()
	for _, at := range []int{0, 1, 1000} {
		v := newVault(t)
		fd, _ := lockedFile(t, "disk")
		cell := storeHold(t, v, hold(1), fd)
		unix.Close(fd)
		for _, look := range []func() ([]int, error){cell.All, func() ([]int, error) { return cell.Peek(1) }} {
			if err := cell.peekFrom(at); err != nil {
				t.Fatal(err)
			}
			fds, err := look()
			if err != nil || len(fds) != 1 {
				t.Fatalf("at %d: %v, %v", at, fds, err)
			}
			unix.Close(fds[0])
		}
		if err := cell.peekFrom(at); err != nil {
			t.Fatal(err)
		}
		next := reopened(t, v)
		for range 2 {
			found, err := next.Contents()
			if err != nil || len(found) != 1 || found[0].Hold == nil {
				t.Fatalf("at %d: found %+v, %v", at, found, err)
			}
			fds, err := found[0].Descriptors()
			if err != nil || len(fds) != 1 {
				t.Fatalf("at %d: %v, %v", at, fds, err)
			}
			unix.Close(fds[0])
		}
		closeTable(next)
		v.GiveUp()
	}
}

// At the limit of descriptors a vault is not opened, and is whole afterwards.
func TestOpenAtLimit(t *testing.T) {
	v := newVault(t) // not parallel: the limit is the process's
	fd, locked := lockedFile(t, "disk")
	for i := range 100 {
		storeHold(t, v, hold(i), fd)
	}
	unix.Close(fd)
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	root, err := unix.FcntlInt(uintptr(v.Root()), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(len(entries)) + 20, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	_, err = Open(root)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(err, ErrTruncated) {
		t.Errorf("opened at the limit: %v", err)
	}
	next, err := Open(root)
	if err != nil {
		t.Fatal(err)
	}
	if found, err := next.Contents(); err != nil || len(found) != 100 || !locked() {
		t.Errorf("%d records, %v; locked: %v", len(found), err, locked())
	}
	closeTable(next)
	v.GiveUp()
}

// Near the limit of descriptors the vault grows by one cell, which is for him who has let it grow, however many take what is free.
func TestTakeAtLimit(t *testing.T) {
	v := newVault(t) // not parallel: the limit is the process's
	defer v.GiveUp()
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &old)
	next, err := unix.FcntlInt(uintptr(v.Root()), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(next)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(next) + 1, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	started, done := make(chan struct{}), make(chan struct{})
	var others sync.WaitGroup
	for range 3 {
		others.Go(func() {
			started <- struct{}{}
			for {
				select {
				case <-done:
					return
				default:
				}
				v.mu.Lock()
				v.free = v.free[:max(0, len(v.free)-1)]
				time.Sleep(3 * time.Millisecond) // so long that a mutex goes to who waits for it, in their order
				v.mu.Unlock()
			}
		})
	}
	for range 3 {
		<-started
	}
	taken, err := v.Take()
	close(done)
	others.Wait()
	if cells, _ := v.Size(); cells != 1 || taken == nil || err != nil {
		t.Errorf("of %d cells: %v, %v", cells, taken, err)
	}
}

// A record that is being replaced is there at each instant; the later one counts.
func TestReplace(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	defer v.GiveUp()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[1])
	client := &Client{State: state.Client{ID: 9, FD: int32(pair[0]), MaxRequests: 1, Self: state.None}, PIDFD: state.NoFD}
	cell, err := v.StoreClient(client, 0)
	if err != nil {
		t.Fatal(err)
	}
	client.State.Registered, client.State.Restricted = true, true
	client.State.Owner = state.Details{Name: "guest", PID: 1, ID: 2}
	// In the midst of it.
	if err := cell.Put(client.record(nil), client.fds()...); err != nil {
		t.Fatal(err)
	}
	next := reopened(t, v)
	defer closeTable(next)
	found, err := next.Contents()
	if err != nil || len(found) != 1 || found[0].Client == nil {
		t.Fatalf("found %+v, %v", found, err)
	}
	want := *client
	want.State.FD = state.NoFD
	if diff := cmp.Diff(&want, found[0].Client); diff != "" {
		t.Errorf("the client -want +got:\n%s", diff)
	}
	if fds, err := found[0].Descriptors(); err != nil || len(fds) != 1 {
		t.Errorf("descriptors %v, %v", fds, err)
	} else {
		unix.Close(fds[0])
	}
	if !cell.Drop() || cell.Drop() {
		t.Error("the earlier record was left, too")
	}
	unix.Close(pair[0])
}

// What is not understood is reported and stays, with its descriptor.
func TestUnknownStays(t *testing.T) {
	t.Parallel()
	good := seal(lockspaceRecord("/x"))
	later := bytes.Clone(good)
	later[5]++
	seal(later)
	kind := bytes.Clone(good)
	kind[offKind] = 77
	seal(kind)
	damaged := bytes.Clone(good)
	damaged[len(damaged)-1] ^= 1
	for _, tt := range []struct {
		name   string
		record []byte
		want   error
	}{{"later version", later, ErrVersion}, {"unknown kind", kind, ErrKind}, {"damaged", damaged, ErrBroken}, {"noise", []byte("x"), ErrBroken}} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			v := newVault(t)
			fd, locked := lockedFile(t, "disk")
			if _, err := v.Store(tt.record, fd); err != nil {
				t.Fatal(err)
			}
			unix.Close(fd)
			next := reopened(t, v)
			closeTable(v)
			found, err := next.Contents()
			if err != nil || len(found) != 1 || !errors.Is(found[0].Err, tt.want) {
				t.Fatalf("found %+v, %v", found, err)
			}
			// Its cell is given to nobody.
			for range 3 * minBatch {
				if c, err := next.Take(); err != nil || c.Index() == found[0].Cell.Index() {
					t.Fatalf("cell %d, %v", c.Index(), err)
				}
			}
			if !locked() {
				t.Error("the lock is gone")
			}
			next.GiveUp()
		})
	}
}

// Words outlive the process, and a cell that a worker may still use is not given to anybody else.
func TestWords(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	a, err := v.Take()
	if err != nil {
		t.Fatal(err)
	}
	b, err := v.Take()
	if err != nil {
		t.Fatal(err)
	}
	a.Word().Store(Busy(4711))
	b.Word().Store(Releasing) // and it was emptied
	next := reopened(t, v)
	closeTable(v)
	found, err := next.Contents()
	if err != nil || len(found) != 1 || found[0].Cell.Index() != a.Index() || Worker(found[0].Cell.Word().Load()) != 4711 {
		t.Fatalf("found %+v, %v", found, err)
	}
	cells, used := next.Size()
	if cells != minBatch || used != 1 {
		t.Errorf("%d of %d cells are in use", used, cells)
	}
	next.GiveUp()
}

// After a live upgrade those cells are free that nobody claims.
func TestClaim(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	fd, _ := lockedFile(t, "disk")
	defer unix.Close(fd)
	used, stray := storeHold(t, v, hold(1), fd), storeHold(t, v, hold(2), fd)
	next := reopened(t, v)
	closeTable(v)
	strays, err := next.Claim([]uint32{0, used.Index(), 99999})
	if err != nil || len(strays) != 1 || strays[0].Cell.Index() != stray.Index() {
		t.Errorf("strays %+v, %v", strays, err)
	}
	if cells, busy := next.Size(); cells-busy != minBatch-2 {
		t.Errorf("%d cells are free of %d", cells-busy, cells)
	}
	next.GiveUp()
}

// What cannot be stored leaves the cell free.
func TestStoreFails(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	defer v.GiveUp()
	if _, err := v.Store(seal(lockspaceRecord("/x")), -1); !errors.Is(err, unix.EBADF) {
		t.Errorf("got %v", err)
	}
	if _, err := v.Store(make([]byte, MaxRecord+1)); !errors.Is(err, unix.EMSGSIZE) {
		t.Errorf("got %v", err)
	}
	if _, used := v.Size(); used != 0 {
		t.Errorf("%d cells are in use", used)
	}
}

// Whatever can be stored can be read, and what can't be stored leaves what lies there.
func TestLongestRecord(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	defer v.GiveUp()
	longest := &Daemon{State: make([]byte, MaxRecord-headerSize-4)}
	cell, err := v.StoreDaemon(nil, longest)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.StoreDaemon(cell, &Daemon{State: append(longest.State, 0)}); !errors.Is(err, unix.EMSGSIZE) {
		t.Errorf("one byte more: %v", err)
	}
	found, err := v.Contents()
	if err != nil || len(found) != 1 || found[0].Daemon == nil || len(found[0].Daemon.State) != len(longest.State) {
		t.Errorf("found %+v, %v", found, err)
	}
}

// What is written is read, and nothing else is.
func TestRecords(t *testing.T) {
	t.Parallel()
	text := rapid.Custom(func(t *rapid.T) string { // a name ends at its first NUL
		return string(bytes.ReplaceAll(rapid.SliceOfN(rapid.Byte(), 0, 100).Draw(t, "text"), []byte{0}, []byte{1}))
	})
	rapid.Check(t, func(t *rapid.T) {
		h := Hold{
			Origin: Origin{rapid.Uint64().Draw(t, "client"), rapid.Uint64().Draw(t, "request")}, Since: rapid.Int64().Draw(t, "since"),
			Lockspace: text.Draw(t, "lockspace"), Name: text.Draw(t, "name"), Flags: rapid.Uint32().Draw(t, "flags"),
			Owner: state.Owner{
				Details: state.Details{Name: text.Draw(t, "owner"), ID: rapid.Uint32().Draw(t, "id"), PID: rapid.Int32().Draw(t, "pid")},
				Kind:    state.Kind(rapid.IntRange(0, 3).Draw(t, "kind")), PIDFD: state.NoFD,
			},
			File: state.File{
				Dev: rapid.Uint64().Draw(t, "dev"), Ino: rapid.Uint64().Draw(t, "ino"), Block: rapid.Bool().Draw(t, "block"),
				Remote: rapid.Bool().Draw(t, "remote"), Exclusive: rapid.Bool().Draw(t, "exclusive"),
			},
		}
		r := h.Record(nil)
		SetFile(r, h.File)
		f := decode(r)
		if f.Err != nil {
			t.Fatal(f.Err)
		}
		if diff := cmp.Diff(&h, f.Hold); diff != "" {
			t.Fatalf("-want +got:\n%s", diff)
		}
		// Any byte that is another one is noticed.
		r[rapid.IntRange(0, len(r)-1).Draw(t, "at")] ^= byte(rapid.IntRange(1, 255).Draw(t, "bits"))
		if f := decode(r); f.Err == nil {
			t.Fatalf("a damaged record is believed: %+v", f)
		}
		for n := range r {
			if f := decode(r[:n]); f.Err == nil {
				t.Fatalf("%d of %d bytes are believed", n, len(r))
			}
		}
	})
}

func FuzzRecord(f *testing.F) {
	h := hold(1)
	r := h.Record(nil)
	SetFile(r, h.File)
	f.Add(r)
	f.Add(seal(lockspaceRecord("/x")))
	f.Add((&Client{State: state.Client{ID: 1}, PIDFD: 3}).record(nil))
	f.Add((&Daemon{State: []byte("{}"), FDs: []int{1}}).record())
	f.Fuzz(func(t *testing.T, record []byte) {
		if len(record) >= headerSize {
			record = seal(bytes.Clone(record)) // past the checksum
		}
		if found := decode(record); found.Err == nil && found.Hold == nil && found.Client == nil && found.Lockspace == nil && found.Daemon == nil {
			t.Error("neither an error nor anything else")
		}
	})
}

func BenchmarkStore(b *testing.B) {
	v := newVault(b)
	defer v.GiveUp()
	fd, _ := lockedFile(b, "disk")
	defer unix.Close(fd)
	h := hold(1)
	for b.Loop() {
		var buf [512]byte
		r := h.Record(buf[:0])
		SetFile(r, h.File)
		c, err := v.Store(r, fd)
		if err != nil {
			b.Fatal(err)
		}
		v.Release(c)
	}
}

// Cells of a vault that was given up are nobody's, whoever still has them.
func TestCellsOfAVaultThatWasGivenUp(t *testing.T) {
	t.Parallel()
	old, err := New()
	if err != nil {
		t.Fatal(err)
	}
	c, err := old.Take()
	if err != nil {
		t.Fatal(err)
	}
	old.GiveUp()
	v, err := New()
	if err != nil {
		t.Fatal(err)
	}
	defer v.GiveUp()
	v.Return(c)
	v.Release(c)
	(*Vault)(nil).Release(c)
	if cells, used := v.Size(); cells != 0 || used != 0 {
		t.Errorf("the next vault has %d cells, %d in use", cells, used)
	}
	if err := c.Put([]byte{1}); err == nil || c.FD() >= 0 {
		t.Errorf("something was put into a descriptor that may be somebody else's: %d, %v", c.FD(), err)
	}
}
