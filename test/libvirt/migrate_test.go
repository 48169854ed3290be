// SPDX-License-Identifier: LGPL-2.1-or-later

package libvirt_test

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/test/vmhost"
)

// A route is a pair of hosts on one SAN: each has a device node of its own for the same disk, so that neither QEMU's lock nor one on
// the node reaches the other host, and both use one lockspace on a shared file system.
type route struct {
	*machine          // the first host
	to       *machine // the second one
	guest    vmhost.Guest
	device   string
}

// routes runs a test between two hosts for each combination of daemons that the issue wants.
func routes(t *testing.T, test func(*route)) {
	t.Parallel()
	for _, r := range []struct {
		name     string
		from, to daemon
	}{{"c to c", reference, reference}, {"ours to ours", ours, ours}, {"c to ours", reference, ours}, {"ours to c", ours, reference}} {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			test(newRoute(t, r.from, r.to))
		})
	}
}

// sanHost describes the first or second host with the given daemon.
func sanHost(letter string, d daemon) vmhost.Options {
	opts := hostOptions(letter+"-"+d.name, indirect)
	opts.Images = filepath.Join(scratch, "san", "images")
	opts.Leases = filepath.Join(scratch, "san", "leases")
	opts.Shared = filepath.Join(scratch, "san", "shared")
	return opts
}

// newRoute returns a pair of hosts with a disk between them, and the description of a guest on it.
func newRoute(t *testing.T, from, to daemon) *route {
	t.Helper()
	r := &route{
		machine: newMachine(t, from, indirect, sanHost("first", from)),
		to:      newMachine(t, to, indirect, sanHost("second", to)),
	}
	name := r.slug + "-" + from.name + "-" + to.name
	r.device = "/dev/" + name
	loop := r.loop(name + ".raw")
	for _, m := range []*machine{r.machine, r.to} {
		m.device(loop, r.device)
	}
	disk := vmhost.Disk{Path: r.device, Target: "sda"}
	r.guest = r.machine.guest(from.name+"-"+to.name, disk)
	r.to.guests = append(r.to.guests, r.guest.Name)
	r.start(r.guest)
	r.booted(r.guest, 1)
	return r
}

// loop makes a block device of a new disk image. It is on no host yet.
func (m *machine) loop(file string) *vmhost.LoopDevice {
	m.Helper()
	path := m.host.Path(m.path(file))
	if err := os.WriteFile(path, vmhost.BootDisk(), 0o600); err != nil {
		m.Fatal(err)
	}
	loop, err := vmhost.AttachLoop(path)
	if err != nil {
		m.Fatal(err)
	}
	m.Cleanup(func() { loop.Close() })
	return loop
}

// device makes a node of a block device on the host.
func (m *machine) device(loop *vmhost.LoopDevice, path string) {
	m.Helper()
	if err := m.host.AddDevice(loop, path); err != nil {
		m.Fatal(err)
	}
	m.know(path)
}

// held waits until the disk's lock is the one that a guest running at one of the two hosts has. Then it makes sure that the lock is
// really that host's, by having the guest give it up and take it again.
func (r *route) held(when string, by *machine) {
	r.Helper()
	by.state(r.guest, "running")
	name := filepath.Base(r.device)
	by.locks(when, name+" exclusive")
	by.virsh("suspend", r.guest.Name)
	by.locks(when + ", and suspended")
	by.virsh("resume", r.guest.Name)
	by.locks(when+", and resumed", name+" exclusive")
}

// migrate migrates the guest from one host to the other, over UNIX sockets.
func (r *route) migrate(ctx context.Context, from, to *machine, flags ...string) error {
	socket := vmhost.SharedDir + "/" + r.guest.Name + ".sock"
	args := append([]string{
		"migrate", "--live", "--persistent", "--undefinesource", "--domain", r.guest.Name, "--desturi",
		"qemu+unix:///system?socket=" + to.host.SharedSocket(), "--migrateuri", "unix://" + socket,
	}, flags...)
	_, err := from.host.Virsh(ctx, args...)
	os.Remove(from.host.Path(socket))
	return err
}

// The same disk on two hosts.
func TestTwoHosts(t *testing.T) {
	routes(t, func(r *route) {
		rival := r.to.guest("rival-"+r.guest.Name, vmhost.Disk{Path: r.device, Target: "sda"})
		r.to.define(rival)
		r.to.virshRefused(r.busy(r.device), "start", rival.Name)
		r.held("second host refused", r.machine)
		r.virsh("suspend", r.guest.Name)
		r.to.virsh("start", rival.Name)
		r.virshRefused(r.busy(r.device), "resume", r.guest.Name)
		r.to.locks("second host has it", filepath.Base(r.device)+" exclusive")
		r.to.signal("KILL", r.to.pid(rival))
		r.locks("second guest killed")
		r.to.state(rival, "shut off")
		r.virsh("resume", r.guest.Name)
		r.held("first host has it again", r.machine)
		r.to.virshRefused(r.busy(r.device), "start", rival.Name)
		r.signal("KILL", r.pid(r.guest))
		r.locks("killed")
		r.to.virsh("start", rival.Name)
		r.to.locks("second host has it again", filepath.Base(r.device)+" exclusive")
	})
}

// There and back, by the client and from host to host.
func TestMigration(t *testing.T) {
	routes(t, func(r *route) {
		if err := r.migrate(r.Context(), r.machine, r.to); err != nil {
			r.Fatal(err)
		}
		r.state(r.guest, "none")
		r.held("migrated", r.to)
		if err := r.migrate(r.Context(), r.to, r.machine, "--p2p"); err != nil {
			r.Fatal(err)
		}
		r.to.state(r.guest, "none")
		r.held("migrated back", r.machine)

		r.virsh("suspend", r.guest.Name)
		if err := r.migrate(r.Context(), r.machine, r.to); err != nil {
			r.Fatal(err)
		}
		r.to.state(r.guest, "paused")
		r.locks("migrated while paused")
		r.to.virsh("resume", r.guest.Name)
		r.held("resumed there", r.to)
		r.to.signal("KILL", r.to.pid(r.guest))
		r.locks("killed there")
	})
}

// migrateSlowly starts a migration that takes seconds and returns when it is under way.
func (r *route) migrateSlowly() (result <-chan error) {
	r.Helper()
	done := make(chan error, 1)
	go func() { done <- r.migrate(r.Context(), r.machine, r.to, "--bandwidth", "1") }()
	var info string
	r.eventually("migration to be under way", func() (bool, error) {
		var err error
		if len(done) > 0 {
			err = <-done
			r.Fatalf("migration ended early: %v", err)
		}
		info, err = r.host.Virsh(r.Context(), "domjobinfo", r.guest.Name)
		return strings.Contains(info, "Memory processed"), err
	}, func() string { return info })
	return done
}

// A migration is cancelled, or the destination's QEMU dies in the middle of it.
func TestMigrationStopped(t *testing.T) {
	routes(t, func(r *route) {
		done := r.migrateSlowly()
		r.virsh("domjobabort", r.guest.Name)
		r.refused(<-done, "canceled by client")
		r.to.state(r.guest, "none")
		r.held("cancelled", r.machine)

		done = r.migrateSlowly()
		r.to.signal("KILL", r.to.pid(r.guest))
		r.refused(<-done, "")
		r.to.state(r.guest, "none")
		r.held("destination's QEMU killed", r.machine)

		if err := r.migrate(r.Context(), r.machine, r.to); err != nil {
			r.Fatal(err)
		}
		r.state(r.guest, "none")
		r.held("migrated at last", r.to)
	})
}

// Somebody else gets one of the locks at the moment when the source has given it up, so that the destination is refused.
func TestMigrationRefused(t *testing.T) {
	routes(t, func(r *route) {
		r.virsh("destroy", r.guest.Name)
		key := r.guest.Name
		lease := vmhost.Lease{Lockspace: filepath.Base(vmhost.LeasesDir), Key: key, Path: filepath.Dir(vmhost.LeasesDir)}
		f, err := os.OpenFile(r.host.Path(filepath.Join(vmhost.LeasesDir, key)), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			r.Fatal(err)
		}
		defer f.Close()
		r.guest.Leases = []vmhost.Lease{lease}
		r.start(r.guest)
		r.booted(r.guest, 1)

		got := make(chan error, 1)
		go func() {
			lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Len: 1}
			got <- unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLKW, &lock)
		}()
		busy := "resource busy: Lockspace resource '" + key + "' is locked"
		r.refused(r.migrate(r.Context(), r.machine, r.to), busy)
		if err := <-got; err != nil {
			r.Fatal(err)
		}
		r.to.state(r.guest, "shut off")
		r.state(r.guest, "paused")
		r.locks("refused")
		r.virshRefused(busy, "resume", r.guest.Name)
		r.locks("resume refused")
		f.Close()
		r.virsh("resume", r.guest.Name)
		r.held("resumed", r.machine)
	})
}
