// SPDX-License-Identifier: LGPL-2.1-or-later

package killpoint

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// After a release nothing keeps the file system of a disk from being unmounted: neither the daemon nor the vault, which has a copy of
// each locked file. The first try succeeds where the reply has come; the end of a guest is noticed a little later.
func TestUmount(t *testing.T) {
	t.Parallel()
	s := startKept(t, local)
	const mount, on = "/tmp/volume", "/tmp/volume/disk"
	s.Must(func() error { return os.Mkdir(mount, 0o755) })
	umount := func() (err error) {
		s.Must(func() error { err = unix.Unmount(mount, 0); return nil })
		return err
	}
	// locked mounts it and locks a file there, for a guest.
	locked := func(guest *host.Process, flags uint32) *wire.Conn {
		t.Helper()
		s.Must(func() error { return unix.Mount("volume", mount, "tmpfs", 0, "") })
		s.WriteFile(on, "", 0o644)
		c := guest.Dial(s.Daemon, "lock")
		must(t, c.Register(wire.VM(guest.PID())))
		must(t, c.Acquire("", on, flags))
		if umount() != unix.EBUSY {
			t.Fatal("a file system with a locked file can be unmounted: nothing is tested")
		}
		return c
	}
	crash := func() {
		t.Helper()
		pid := s.Kept()
		host.Settled(t, pid)
		must(t, unix.Kill(pid, unix.SIGKILL))
		if !host.Eventually(func() bool { now := s.Kept(); return now != 0 && now != pid }) {
			t.Fatal("there is no daemon after a kill")
		}
		must(t, s.bystand.Ping())
	}
	for _, tt := range []struct {
		name string
		end  func(c *wire.Conn)
	}{
		{"release", func(c *wire.Conn) { must(t, c.Release("", on)) }},
		{"release after a crash", func(c *wire.Conn) {
			crash()
			if umount() != unix.EBUSY {
				t.Error("a crash has lost the file")
			}
			err := c.Release("", on)
			if errors.Is(err, wire.ErrClosed) { // the daemon had just sent the reply before, and was killed before it knew
				err = s.client().Release("", on)
			}
			must(t, err)
		}},
	} {
		for _, flags := range []uint32{0, wire.Shared} {
			s.nextGuest()
			c := locked(s.guest, flags)
			tt.end(c)
			if err := umount(); err != nil {
				t.Fatalf("%s: umount: %v", tt.name, err)
			}
			c.Close()
		}
	}
	for _, crashed := range []bool{false, true} {
		guest := s.Spawn(host.ProcessOptions{})
		locked(guest, 0)
		if crashed {
			crash()
		}
		guest.Kill()
		if !host.Eventually(func() bool { return umount() == nil }) {
			t.Errorf("a guest has ended (after a crash: %v): its file system can't be unmounted", crashed)
		}
	}
	for _, w := range s.waiters {
		w.Asleep()
	}
	s.end()
}
