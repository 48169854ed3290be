// SPDX-License-Identifier: LGPL-2.1-or-later

package libvirt_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/test/vmhost"
)

// patience is how long a condition may take to come true. Nothing takes nearly as long on a machine that isn't overloaded.
const patience = 40 * time.Second

// A machine is a host as one test sees it: a directory for its disks, the guests that it starts, and the locks on those disks.
// Its methods end the test if something fails.
type machine struct {
	*testing.T
	host   *vmhost.Host
	daemon daemon
	kind   string   // of the host
	slug   string   // prefix of guests' names and name of the disks' directory
	known  []string // paths of disks whose locks are of interest
	leases []string // keys of leases in LeasesDir that are of interest
	guests []string
}

// each runs a test for both daemons on hosts of the given kinds.
func each(t *testing.T, kinds []string, test func(*machine)) {
	t.Parallel()
	for _, d := range daemons {
		for _, kind := range kinds {
			t.Run(d.name+"/"+kind, func(t *testing.T) {
				t.Parallel()
				test(newMachine(t, d, kind, hostOptions(d.name+"-"+kind, kind)))
			})
		}
	}
}

// hostOptions returns what all hosts of the tests have in common.
func hostOptions(name, kind string) vmhost.Options {
	return vmhost.Options{
		Name: name, UUID: uuid(name), Cache: filepath.Join(scratch, "cache"), QEMULockd: qemuLockd[kind],
	}
}

// newMachine returns a machine on the shared host that opts describe.
func newMachine(t *testing.T, d daemon, kind string, opts vmhost.Options) *machine {
	t.Helper()
	h, err := hosts.get(opts, d)
	if err != nil {
		t.Fatal(err)
	}
	test, _, _ := strings.Cut(strings.TrimPrefix(t.Name(), "Test"), "/")
	return onHost(t, h, d, kind, strings.ToLower(test))
}

// onHost returns a machine on h.
func onHost(t *testing.T, h *vmhost.Host, d daemon, kind, slug string) *machine {
	t.Helper()
	m := &machine{T: t, host: h, daemon: d, kind: kind, slug: slug}
	if err := os.MkdirAll(h.Path(m.path("")), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.cleanUp)
	return m
}

// onEachKind runs a test on a host of its own for each kind of lockspace. Nothing runs there yet.
func onEachKind(t *testing.T, name string, d daemon, test func(m *machine)) {
	for _, kind := range bothLockspaces {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			h, err := vmhost.Start(hostOptions(name+"-"+kind, kind))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := h.Close(); err != nil {
					t.Error(err)
				}
			})
			test(onHost(t, h, d, kind, name))
		})
	}
}

// cleanUp ends the test's guests, and shows the logs if the test has failed.
func (m *machine) cleanUp() {
	ctx := context.Background() // the test's own is done
	if m.Failed() {
		m.Logf("lock daemon's log:\n%s", tail(m.host.Log(vmhost.Lockd)))
		if text, err := os.ReadFile(m.host.Path("/var/log/libvirt/libvirtd.log")); err == nil {
			m.Logf("libvirtd's log:\n%s", tail(string(text)))
		}
	}
	for _, g := range m.guests {
		m.host.Virsh(ctx, "destroy", g)
		m.host.Virsh(ctx, "undefine", g, "--managed-save", "--snapshots-metadata")
	}
}

// noise is what libvirtd says about any host and guest in bare namespaces.
var noise = regexp.MustCompile("dnsmasq|GetSystemBus|firewalld|udevGetDMIData|dmidecode|virSecurityManagerNew|/dev/kvm|^$|" +
	"virCgroupDetectControllers|cgroup.controllers|virGetHostnameImpl|qemuDomainObjTaintMsg")

// tail returns the end of a log.
func tail(log string) string {
	lines := strings.Split(strings.TrimSpace(log), "\n")
	lines = slices.DeleteFunc(lines, noise.MatchString)
	return strings.Join(lines[max(0, len(lines)-15):], "\n")
}

// path returns the path, in the host, of a file of this test.
func (m *machine) path(file string) string { return filepath.Join(vmhost.ImagesDir, m.slug, file) }

// disk makes a disk image and returns its path in the host. Its name's extension is its format.
func (m *machine) disk(file string) string {
	m.Helper()
	path := m.path(file)
	if err := os.WriteFile(m.host.Path(path), vmhost.BootDisk(), 0o644); err != nil {
		m.Fatal(err)
	}
	if format := filepath.Ext(file)[1:]; format != "raw" {
		m.run("mv", path, path+".raw")
		m.run("qemu-img", "convert", "-f", "raw", "-O", format, path+".raw", path)
		m.run("rm", path+".raw")
	}
	m.know(path)
	return path
}

// know makes the locks on a disk be of interest.
func (m *machine) know(path string) {
	if !slices.Contains(m.known, path) {
		m.known = append(m.known, path)
	}
}

// guest describes a guest of this test with a name of its own and disks as they come: sda, sdb, ...
func (m *machine) guest(name string, disks ...vmhost.Disk) vmhost.Guest {
	g := vmhost.Guest{Name: m.slug + "-" + name, Disks: disks, Console: m.path(name + ".console")}
	g.UUID = uuid(g.Name) // so that the guest can be defined again, with another description
	m.guests = append(m.guests, g.Name)
	return g
}

// exclusive describes a new disk that one guest may have.
func (m *machine) exclusive(file, target string) vmhost.Disk {
	m.Helper()
	return vmhost.Disk{Path: m.disk(file), Target: target, Format: filepath.Ext(file)[1:]}
}

// shareable describes a new disk that several guests may have, if they all call it shareable.
func (m *machine) shareable(file, target string) vmhost.Disk {
	m.Helper()
	d := m.exclusive(file, target)
	d.Shareable = true
	return d
}

// start defines and starts a guest.
func (m *machine) start(g vmhost.Guest) {
	m.Helper()
	m.define(g)
	m.virsh("start", g.Name)
}

func (m *machine) define(g vmhost.Guest) {
	m.Helper()
	if err := m.host.Define(m.Context(), g); err != nil {
		m.Fatal(err)
	}
}

func (m *machine) run(argv ...string) string {
	m.Helper()
	r, err := m.host.Run(m.Context(), argv...)
	if err != nil {
		m.Fatal(err)
	}
	return r.Out
}

func (m *machine) virsh(args ...string) string {
	m.Helper()
	out, err := m.host.Virsh(m.Context(), args...)
	if err != nil {
		m.Fatal(err)
	}
	return out
}

// refused makes sure that err is there and contains the text.
func (m *machine) refused(err error, text string) {
	m.Helper()
	switch {
	case err == nil:
		m.Fatalf("worked; want an error with %q", text)
	case !strings.Contains(err.Error(), text):
		m.Fatalf("error %q; want it to contain %q", err, text)
	}
}

// virshRefused runs a virsh command that has to fail with an error that contains the text.
func (m *machine) virshRefused(text string, args ...string) {
	m.Helper()
	_, err := m.host.Virsh(m.Context(), args...)
	m.refused(err, text)
}

// busy is the error of a refused lock on a disk, as virsh shows it.
func (m *machine) busy(disk string) string {
	if m.kind == indirect {
		disk = vmhost.LeaseName(disk)
	}
	return fmt.Sprintf("resource busy: Lockspace resource '%s' is locked", disk)
}

// eventually waits for a condition. show describes what is the case instead, if it does not come true.
func (m *machine) eventually(what string, cond func() (bool, error), show func() string) {
	m.Helper()
	ctx, cancel := context.WithTimeout(m.Context(), patience)
	defer cancel()
	err := vmhost.Poll(ctx, cond)
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		m.Fatalf("%s: still %s", what, show())
	case err != nil:
		m.Fatalf("%s: %v", what, err)
	}
}

// state waits until a guest is in a state as virsh names it: "running", "paused", "shut off"; "none": it does not exist.
func (m *machine) state(g vmhost.Guest, want string) {
	m.Helper()
	var got string
	m.eventually(g.Name+" to be "+want, func() (bool, error) {
		var err error
		if got, err = m.host.Virsh(m.Context(), "domstate", g.Name); err != nil {
			if !strings.Contains(err.Error(), "failed to get domain") && !strings.Contains(err.Error(), "Domain not found") {
				return false, err
			}
			got = "none"
		}
		return got == want, nil
	}, func() string { return got })
}

// booted waits until a guest has booted n times since it was started or restored (a restored guest doesn't boot).
func (m *machine) booted(g vmhost.Guest, n int) {
	m.Helper()
	var got int
	m.eventually(fmt.Sprintf("%s to boot %d times", g.Name, n), func() (bool, error) {
		text, err := os.ReadFile(m.host.Path(g.Console))
		got = strings.Count(string(text), "B")
		return got == n, err
	}, func() string { return fmt.Sprint(got, " times") })
}

// press presses a key of a guest: R resets it, P switches it off.
func (m *machine) press(g vmhost.Guest, key string) {
	m.Helper()
	_, err := m.host.Virsh(m.Context(), "send-key", g.Name, "KEY_"+key)
	if err != nil && key == "P" && strings.Contains(err.Error(), "Unable to read from monitor") {
		return // it was off before QEMU's answer was read; whoever calls sees whether it is
	}
	if err != nil {
		m.Fatal(err)
	}
}

// pid returns a running guest's pid in the host.
func (m *machine) pid(g vmhost.Guest) int {
	m.Helper()
	pid, err := m.host.GuestPID(g.Name)
	if err != nil {
		m.Fatal(err)
	}
	return pid
}

func (m *machine) signal(signal string, pid int) {
	m.Helper()
	if err := m.host.Signal(m.Context(), signal, pid); err != nil {
		m.Fatal(err)
	}
}

// locks waits until the locks on this test's disks and leases are exactly the ones wanted, each "FILE exclusive" or "FILE shared".
// A lock in the wrong place (on the disk in an indirect lockspace, say), of the wrong kind, by somebody else, or a lease file without a
// lock on it shows up as an entry that no test wants.
func (m *machine) locks(when string, want ...string) {
	m.Helper()
	slices.Sort(want)
	var got []string
	m.eventually(when, func() (bool, error) {
		var err error
		got, err = m.observe()
		return slices.Equal(got, want), err
	}, func() string { return fmt.Sprintf("locked %q; want %q", got, want) })
}

// observe returns the locks as the method locks wants them.
func (m *machine) observe() ([]string, error) {
	table, err := vmhost.ReadLocks()
	if err != nil {
		return nil, err
	}
	seen := []string{}
	note := func(what string, locks []vmhost.Lock) {
		for _, l := range locks {
			entry := what + " " + l.Mode()
			if l.Kind != m.daemon.kind {
				entry += " by somebody else"
			}
			seen = append(seen, entry)
		}
	}
	for _, disk := range m.known {
		name := filepath.Base(disk)
		lease := m.host.Path(filepath.Join(vmhost.LeasesDir, vmhost.LeaseName(disk)))
		onDisk, onLease := table.On(m.host.Path(disk)), table.On(lease)
		if m.kind == direct {
			note(name, onDisk)
			note("lease file of "+name, onLease)
		} else {
			note(name, onLease)
			note("disk itself "+name, onDisk)
		}
		if _, err := os.Stat(lease); err == nil && len(onLease) == 0 {
			seen = append(seen, "unlocked lease file of "+name)
		}
	}
	for _, key := range m.leases {
		note("lease "+key, table.On(m.host.Path(filepath.Join(vmhost.LeasesDir, key))))
	}
	slices.Sort(seen)
	return slices.Compact(seen), nil
}

// outsider takes the lock on a disk away from under the daemon, as another host would, or a program that knows nothing of it. It
// takes the kind of lock that the daemon doesn't, since either has to be respected. The returned function gives it up.
func (m *machine) outsider(disk string, exclusive bool) (release func()) {
	m.Helper()
	path := m.host.Path(disk)
	if m.kind != direct {
		path = m.host.Path(filepath.Join(vmhost.LeasesDir, vmhost.LeaseName(disk)))
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		m.Fatal(err)
	}
	m.Cleanup(func() { f.Close() })
	lock := unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart, Len: 1}
	if exclusive {
		lock.Type = unix.F_WRLCK
	}
	cmd := unix.F_OFD_SETLK
	if m.daemon.kind == "OFDLCK" {
		cmd = unix.F_SETLK
	}
	if err := unix.FcntlFlock(f.Fd(), cmd, &lock); err != nil {
		m.Fatalf("lock %s from outside: %v", path, err)
	}
	return func() {
		if m.kind != direct {
			os.Remove(path)
		}
		f.Close()
	}
}
