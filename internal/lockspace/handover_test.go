// SPDX-License-Identifier: LGPL-2.1-or-later

package lockspace

import (
	"fmt"
	"os/exec"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/filelock"
	"virtlockd/internal/owner"
	"virtlockd/internal/vault"
)

// Each lock that was adopted is looked at once, unless it was released meanwhile; one that was lost is reported.
func TestConfirm(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	o := f.number()
	const n = 200 // several batches
	for i := range n {
		f.want("acquire", f.acquire(f.touch(fmt.Sprint("disk", i)), 0, o), nil)
	}
	for _, r := range f.Table.spaces[""].resources {
		f.Table.adopted = append(f.Table.adopted, r)
	}
	set := func(fd int, kind int16) {
		t.Helper()
		lk := unix.Flock_t{Type: kind, Len: 1}
		if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lk); err != nil {
			t.Fatal(err)
		}
	}
	free, taken := f.path("disk7"), f.path("disk150")
	for _, path := range []string{free, taken} {
		fd, _ := f.Table.spaces[""].resources[path].lock.State()
		set(fd, unix.F_UNLCK)
	}
	other, err := unix.Open(taken, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(other)
	set(other, unix.F_WRLCK)
	f.want("release", f.release(f.path("disk1"), o), nil)

	var got []string
	f.Table.Confirm(func(path string, holder *owner.Owner, found filelock.Finding) {
		if holder != o {
			t.Errorf("%s: the holder is %v", path, holder)
		}
		got = append(got, path+" "+found.String())
	})
	if want := []string{taken + " lost"}; !slices.Equal(got, want) {
		t.Errorf("reported: %q, want %q", got, want)
	}
	if !f.kernelLocked(free) {
		t.Error("a lock that nobody had was not taken again")
	}
	if f.kernelLocked(f.path("disk1")) {
		t.Error("a lock that was released is held")
	}
	if f.Table.adopted != nil {
		t.Error("not all were looked at")
	}
}

// A binary that is replaced while a lost lock, just taken again, is being stored leaves the hold in a cell with the lost one. The next binary has
// the new lock all the time, and the hold is in the vault at every instant.
func TestAdoptMoving(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name     string
		copied   bool // it was stored, and the binary before did not hear of it
		released bool // before it is stored once more
		two      bool // there is another holder, who was moved already
	}{
		{name: "not stored yet"},
		{name: "stored too late", copied: true},
		{name: "released before it is stored", released: true},
		{name: "another one is moved", two: true},
		{name: "another one is moved, and this stored too late", two: true, copied: true},
		{name: "another one is moved, and this released before it is stored", two: true, released: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			disk := remoteFile(t)
			f := newFixture(t)
			v := f.withVault()
			var owners []*owner.Owner
			for range 1 + one(tt.two) {
				o := f.number()
				defer o.Release()
				owners = append(owners, o)
				f.want("acquire", f.acquire(disk, Shared, o), nil)
			}
			moving := owners[len(owners)-1]
			place := func(o *owner.Owner) int32 { return int32(slices.Index(owners, o)) }

			// As move leaves it when it waits for the disk.
			r := f.lookup("", disk)
			lost := r.lock
			forget(t, lost)
			fresh, err := f.gate.Files.Lock(disk, filelock.Shared, false, nil)
			if err != nil {
				t.Fatal(err)
			}
			f.mu.Lock()
			for i := range r.holders {
				r.holders[i].cell.Word().Store(vault.Moving)
			}
			r.lock = fresh
			f.mu.Unlock()
			for i := range len(r.holders) - 1 {
				h := &r.holders[i]
				cell := f.keep(r, h.owner, vault.Origin{}, h.since)
				v.Release(h.cell)
				h.cell = cell
				f.mu.Unlock()
			}
			f.Freeze(time.Now())
			def, _ := f.Snapshot(place)
			var copied *vault.Cell
			last := vault.Hold{Since: r.holders[len(owners)-1].since, Name: disk, Flags: Shared, Owner: moving.State()}
			if tt.copied {
				if copied, err = f.store(v, r, moving, vault.Origin{}, last.Since); err != nil {
					t.Fatal(err)
				}
			}

			// The next binary.
			next := New(Config{Locker: f.gate, Logger: f.cfg.Logger})
			next.SetVault(v)
			res := &def[0]
			own, err := unix.FcntlInt(uintptr(res.FD), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			lock, err := f.gate.Files.Takeover(1).Ours(disk, own, filelock.Shared, res.File)
			if err != nil {
				t.Fatal(err)
			}
			if fd, _ := fresh.State(); res.Cells[0] == 0 || v.Cell(res.Cells[0]).FD() != fd {
				unix.Close(fd) // the binary before is gone
			}
			f.Thaw()
			if _, err := next.Adopt("", res, owners, lock); err != nil {
				t.Fatal(err)
			}
			held := func(when string) {
				t.Helper()
				if !f.kernelLocked(disk) {
					t.Errorf("%s: nobody has the lock", when)
				}
				if n := holdsOf(t, v, moving); n == 0 {
					t.Errorf("%s: the hold is not in the vault", when)
				}
			}
			held("taken over")
			if tt.copied {
				if has, taken := next.StoredAgain(&last, copied); !has || !taken {
					t.Errorf("the copy: known %t, taken %t", has, taken)
				}
				held("with its copy")
			}
			release := func(o *owner.Owner) {
				t.Helper()
				f.want("release", next.Release(Request{Resource: disk}, o.PID, true), nil)
			}
			if tt.released {
				release(moving)
			} else {
				if n := next.StoreAll(); n != 1-one(tt.copied) {
					t.Errorf("%d holds were stored", n)
				}
				held("stored")
				if n := next.Stored(); n != len(owners) || next.Safe() != 1 {
					t.Errorf("%d holds are stored, want %d; %d resources are safe", n, len(owners), next.Safe())
				}
				f.eventually("each hold has one cell", func() bool { _, used := v.Size(); return used == len(owners) })
				if tt.two {
					release(owners[0])
					held("alone")
				}
				release(moving)
			}
			if tt.two && tt.released {
				if !f.kernelLocked(disk) {
					t.Error("the release of one of two gives up the lock")
				}
				release(owners[0])
			}
			if f.kernelLocked(disk) {
				t.Error("it stays locked")
			}
			f.eventually("the vault is empty", func() bool { _, used := v.Size(); return used == 0 })
			if n := holdsOf(t, v, moving); n != 0 {
				t.Errorf("%d holds are left in the vault", n)
			}

			// The table of the binary before is as if it were not there.
			for _, o := range owners {
				f.byOwner[o][0].holders = nil
				delete(f.byOwner, o)
				o.Release()
			}
			delete(f.files, fresh.ID())
			f.slots.remove(r)
			delete(f.spaces[""].resources, disk)
			f.count(r, -1)
		})
	}
}

func one(is bool) int {
	if is {
		return 1
	}
	return 0
}

// remoteFile returns a file that is left to worker processes, since its file system is not known to be local.
func remoteFile(t *testing.T) string {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return fmt.Sprintf("/proc/%d/comm", cmd.Process.Pid)
}

// forget makes the kernel forget a remote lock, as a server does.
func forget(t *testing.T, lock *filelock.Lock) {
	t.Helper()
	cell, _ := lock.State()
	fd, err := filelock.PeekCell(cell)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_UNLCK, Len: 1}); err != nil {
		t.Fatal(err)
	}
}

// holdsOf counts the holds of an owner that a process that comes after this one finds and does not release.
func holdsOf(t *testing.T, v *vault.Vault, o *owner.Owner) (n int) {
	t.Helper()
	root, err := unix.FcntlInt(uintptr(v.Root()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	other, err := vault.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	found, err := other.Contents()
	if err != nil {
		t.Fatal(err)
	}
	for i := range found {
		if f := &found[i]; f.Hold != nil && f.Hold.Owner.PID == o.PID && f.Cell.Word().Load() != vault.Releasing {
			n++
		}
	}
	return n
}
