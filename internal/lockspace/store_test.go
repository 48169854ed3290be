// SPDX-License-Identifier: LGPL-2.1-or-later

package lockspace

import (
	"bufio"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/owner"
	"virtlockd/internal/vault"
)

// withVault has everything stored in a vault.
func (f *fixture) withVault() *vault.Vault {
	f.Helper()
	v, err := vault.New()
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(v.GiveUp)
	f.SetVault(v)
	return v
}

// What can't be stored is held all the same, and counted; what is stored is so until its release.
func TestStored(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	v := f.withVault()
	o := f.number()
	defer o.Release()
	// No message of a socket has room for such a name.
	long, err := f.owners.Named(&owner.Details{PID: f.pid + 1, Name: strings.Repeat("x", 1<<20)}, false)
	if err != nil {
		t.Fatal(err)
	}
	defer long.Release()
	alone, both, lost := f.touch("alone"), f.touch("both"), f.touch("lost")
	f.want("alone", f.acquire(alone, 0, o), nil)
	f.want("both", f.acquire(both, Shared, o), nil)
	f.want("both again", f.acquire(both, Shared, o), nil)
	f.want("lost", f.acquire(lost, 0, long), nil)
	check := func(unstored uint64, held, stored, safe int) {
		t.Helper()
		if u, h, s := f.Unstored(), f.Held(), f.Stored(); u != unstored || h != held || s != stored {
			t.Errorf("%d could not be stored, %d are held, %d holds are stored; want %d, %d, %d", u, h, s, unstored, held, stored)
		}
		if n := f.Safe(); n != safe {
			t.Errorf("%d are safe, want %d", n, safe)
		}
		if _, used := v.Size(); used != stored {
			t.Errorf("%d cells are in use for %d holds", used, stored)
		}
	}
	check(1, 3, 3, 2)
	f.want("share it without store", f.acquire(both, Shared, long), nil)
	check(2, 3, 3, 1)
	f.want("release that", f.release(both, long), nil)
	check(2, 3, 3, 2)
	f.want("release of one of two", f.release(both, o), nil)
	check(2, 3, 2, 2)
	f.want("release of the other", f.release(both, o), nil)
	f.want("release", f.release(alone, o), nil)
	f.want("release of what is not stored", f.release(lost, long), nil)
	check(2, 0, 0, 0)
}

// An owner who hangs up while another lock of his is being stored is noted there, too, as one who is being ended.
func TestNotedWhileStored(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	v := f.withVault()
	cmd := exec.Command("/bin/sh", "-c", "trap '' TERM; echo ready; read x")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	pidfd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	o, err := f.owners.Self(&owner.Details{PID: int32(cmd.Process.Pid)}, pidfd)
	if err != nil {
		t.Fatal(err)
	}
	defer o.Release()
	disk := f.touch("disk")
	open := f.gate.hold(disk)
	acquired := make(chan error, 1)
	go func() { acquired <- f.acquire(disk, 0, o) }()
	<-f.gate.reached
	f.mu.Lock() // before the hold is entered
	open()
	f.eventually("it is being stored", func() bool { _, used := v.Size(); return used == 1 })
	f.owners.HangUp(o)
	f.owners.Close() // it is not killed
	f.mu.Unlock()
	f.want("acquire", <-acquired, nil)
	f.mu.Lock()
	word := f.lookup("", disk).holders[0].cell.Word().Load()
	f.mu.Unlock()
	if word != vault.Ending {
		t.Errorf("beside the hold is noted %d, want %d", word, vault.Ending)
	}
	f.want("release", f.release(disk, o), nil)
}

// A hold that was stored while the table was frozen, in a vault that was given up then for a binary that did not come, is stored in the next
// one.
func TestStoredInVaultGivenUp(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	first := f.withVault()
	o := f.number()
	defer o.Release()
	disk := f.touch("disk")
	open := f.gate.hold(disk)
	acquired := make(chan error, 1)
	go func() { acquired <- f.acquire(disk, 0, o) }()
	<-f.gate.reached
	f.Freeze(time.Now())
	open()
	f.eventually("it is stored", func() bool { _, used := first.Size(); return used == 1 })
	if err := f.LeaveVault(); err != nil {
		t.Error(err)
	}
	first.GiveUp()
	second := f.withVault()
	f.Thaw()
	f.want("acquire", <-acquired, nil)
	if _, used := second.Size(); used != 1 || f.Safe() != 1 {
		t.Errorf("%d cells are in use, %d resources are said to be safe", used, f.Safe())
	}
	f.want("release", f.release(disk, o), nil)
	if _, used := second.Size(); used != 0 {
		t.Errorf("%d cells are in use after the release", used)
	}
}
