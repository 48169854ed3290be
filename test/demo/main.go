// SPDX-License-Identifier: LGPL-2.1-or-later

// Demo shows a lock daemon keep two hosts from writing to one disk: real libvirtd, real QEMU guests, in private namespaces that
// end with it. It prints an account of what it does and exits with a status other than 0 if anything was not as it should be.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"virtlockd/test/vmhost"
)

// limit ends a demonstration that hangs.
const limit = 110 * time.Second

func main() {
	vmhost.Init()
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: demo LOCK-DAEMON")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP,
		syscall.SIGPIPE)
	defer stop()
	begin := time.Now()
	d := &demo{ctx: ctx, lockd: os.Args[1]}
	err := d.run()
	took := time.Since(begin).Round(100 * time.Millisecond)
	fmt.Println()
	switch {
	case err != nil && ctx.Err() != nil:
		fmt.Println("Interrupted. Everything is cleaned up.")
		stop()
		os.Exit(130)
	case err != nil:
		where := fmt.Sprintf("in step %d", d.steps)
		if d.steps == 0 {
			where = "before the first step"
		}
		fmt.Printf("wrong: %v\n\nFAIL %s, after %v.\n", err, where, took)
		stop()
		os.Exit(1)
	}
	fmt.Printf("PASS: all %d steps, in %v.\n", d.steps, took)
}

// The guests' disk, the same block device on both hosts.
const disk = "/dev/san-disk"

// A demo is the state of the demonstration.
type demo struct {
	ctx          context.Context
	lockd        string
	dir          string // of the two hosts' common things, on the machine
	north, south *vmhost.Host
	lease        string // the disk's lease file as this process reaches it
	steps        int
}

// run prepares everything, goes through the steps, and cleans up.
func (d *demo) run() (err error) {
	ctx, cancel := context.WithTimeout(d.ctx, limit)
	defer cancel()
	d.ctx = ctx
	if d.dir, err = os.MkdirTemp("", "virtlockd-demo-"); err != nil {
		return err
	}
	defer os.RemoveAll(d.dir)
	loop, err := d.makeDisk()
	if err != nil {
		return err
	}
	defer loop.Close()
	defer func() {
		for _, h := range []*vmhost.Host{d.north, d.south} {
			if h != nil {
				err = errors.Join(err, h.Close())
			}
		}
	}()

	heading("Two hosts, one disk")
	if d.north, err = d.host("north", loop); err != nil {
		return err
	}
	if d.south, err = d.host("south", loop); err != nil {
		return err
	}
	d.lease = filepath.Join(d.dir, "leases", vmhost.LeaseName(disk))
	if err := d.introduce(); err != nil {
		return err
	}
	for _, step := range []func() error{d.start, d.refuse, d.pause, d.resume, d.kill, d.moveOn, d.end} {
		d.steps++
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// makeDisk makes the block device.
func (d *demo) makeDisk() (*vmhost.LoopDevice, error) {
	file := filepath.Join(d.dir, "disk")
	if err := os.WriteFile(file, vmhost.BootDisk(), 0o600); err != nil {
		return nil, err
	}
	return vmhost.AttachLoop(file)
}

// host starts a host that sees the disk and knows a guest on it.
func (d *demo) host(name string, disks *vmhost.LoopDevice) (_ *vmhost.Host, err error) {
	h, err := vmhost.Start(vmhost.Options{
		Name:      name,
		UUID:      map[string]string{"north": "6f1f7d0a-6c5e-4d0c-9f6b-2b1f0e3a9a01", "south": "6f1f7d0a-6c5e-4d0c-9f6b-2b1f0e3a9a02"}[name],
		Leases:    filepath.Join(d.dir, "leases"),
		Cache:     filepath.Join(d.dir, "cache"),
		QEMULockd: fmt.Sprintf("file_lockspace_dir = %q\n", vmhost.LeasesDir),
	})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			h.Close()
		}
	}()
	if err := h.AddDevice(disks, disk); err != nil {
		return nil, err
	}
	if err := h.StartAll(d.ctx, d.lockd); err != nil {
		return nil, err
	}
	guest := vmhost.Guest{
		Name: "guest-" + name, Disks: []vmhost.Disk{{Path: disk, Target: "sda"}}, Console: vmhost.ImagesDir + "/console",
	}
	return h, h.Define(d.ctx, guest)
}

// introduce says what there is.
func (d *demo) introduce() error {
	version, err := d.north.Run(d.ctx, d.path(), "--version")
	if err != nil {
		return err
	}
	libvirtd, err := d.north.Run(d.ctx, "/usr/sbin/libvirtd", "--version")
	if err != nil {
		return err
	}
	for _, l := range [][2]string{
		{"hosts", "north and south: private namespaces of this machine"},
		{"on each", filepath.Base(libvirtd.Out) + " with lock_manager = \"lockd\", QEMU, a guest"},
		{"lock daemon", d.path()},
		{"", strings.ReplaceAll(version.Out, "\n", "\n"+strings.Repeat(" ", 16))},
		{"disk", disk + ": one block device, with a node of its own on each host,"},
		{"", "so that QEMU's own lock does not reach the other host"},
		{"lease file", vmhost.LeasesDir + "/" + shorten(filepath.Base(d.lease))},
		{"", "in a directory that both hosts share; named by the hash of the disk's path"},
	} {
		fmt.Printf("    %-12s%s\n", l[0], l[1])
	}
	return nil
}

// path returns the lock daemon's absolute path.
func (d *demo) path() string {
	path, err := filepath.Abs(d.lockd)
	if err != nil {
		return d.lockd
	}
	return path
}

func (d *demo) start() error {
	d.title("north starts a guest on the disk")
	if err := d.virsh(d.north, "start", "guest-north"); err != nil {
		return err
	}
	if err := d.booted(d.north); err != nil {
		return err
	}
	return d.locked("the guest has booted, its disk is locked", d.north)
}

func (d *demo) refuse() error {
	d.title("south starts its guest on the same disk")
	if err := d.refused(d.south, "start", "guest-south"); err != nil {
		return err
	}
	return d.locked("refused by virtlockd on south, north's guest is unharmed", d.north)
}

func (d *demo) pause() error {
	d.title("north pauses its guest")
	if err := d.virsh(d.north, "suspend", "guest-north"); err != nil {
		return err
	}
	return d.unlocked("a guest that stands still needs no lock: it is given up")
}

func (d *demo) resume() error {
	d.title("north lets its guest go on")
	if err := d.virsh(d.north, "resume", "guest-north"); err != nil {
		return err
	}
	if err := d.locked("the lock is taken back before the guest runs", d.north); err != nil {
		return err
	}
	return d.refused(d.south, "start", "guest-south")
}

func (d *demo) kill() error {
	d.title("the guest on north is killed")
	pid, err := d.north.GuestPID("guest-north")
	if err != nil {
		return err
	}
	fmt.Printf("    north# kill -9 %d\n", pid)
	if err := d.north.Signal(d.ctx, "KILL", pid); err != nil {
		return err
	}
	if err := d.unlocked("nobody has told virtlockd: it has seen the guest's end itself"); err != nil {
		return err
	}
	// libvirtd notices on its own, maybe later; until then it would say that the guest is running.
	ctx, cancel := context.WithTimeout(d.ctx, 10*time.Second)
	defer cancel()
	return vmhost.Poll(ctx, func() (bool, error) {
		state, err := d.north.Virsh(ctx, "domstate", "guest-north")
		return state == "shut off", err
	})
}

func (d *demo) moveOn() error {
	d.title("south starts its guest now")
	if err := d.virsh(d.south, "start", "guest-south"); err != nil {
		return err
	}
	if err := d.booted(d.south); err != nil {
		return err
	}
	if err := d.locked("the guest has booted on the other host", d.south); err != nil {
		return err
	}
	return d.refused(d.north, "start", "guest-north")
}

func (d *demo) end() error {
	d.title("south ends its guest")
	if err := d.virsh(d.south, "destroy", "guest-south"); err != nil {
		return err
	}
	return d.unlocked("the lock is gone, and the lease file with it")
}

// virsh runs a command that has to work.
func (d *demo) virsh(h *vmhost.Host, args ...string) error {
	fmt.Printf("    %s# virsh %s\n", h.Name(), strings.Join(args, " "))
	_, err := h.Virsh(d.ctx, args...)
	return err
}

// refused runs a virsh command that virtlockd has to refuse.
func (d *demo) refused(h *vmhost.Host, args ...string) error {
	fmt.Printf("    %s# virsh %s\n", h.Name(), strings.Join(args, " "))
	r, err := h.Run(d.ctx, append([]string{"virsh", "--quiet"}, args...)...)
	if err == nil {
		return errors.New("this should have been refused: two guests write to one disk")
	}
	name := filepath.Base(d.lease)
	for _, line := range strings.Split(r.Err, "\n") {
		if line != "" {
			fmt.Println("    " + strings.ReplaceAll(line, name, shorten(name)))
		}
	}
	if want := "resource busy: Lockspace resource '" + name + "' is locked"; !strings.Contains(r.Err, want) {
		return fmt.Errorf("this was refused, but not by virtlockd: %w", err)
	}
	return nil
}

// locked makes sure that the disk is locked by the host's lock daemon and by nobody else, and shows it.
func (d *demo) locked(what string, by *vmhost.Host) error {
	return d.see(what, func(table vmhost.LockTable) (string, error) {
		locks := table.On(d.lease)
		if len(locks) != 1 || !locks[0].Exclusive {
			return "", fmt.Errorf("want one exclusive lock on the lease file, the kernel has %v", locks)
		}
		if locks := append(table.On(d.north.Path(disk)), table.On(d.south.Path(disk))...); len(locks) > 0 {
			return "", fmt.Errorf("want no lock on the disk itself, the kernel has %v", locks)
		}
		pid, err := by.DaemonPID(vmhost.Lockd)
		if err != nil {
			return "", err
		}
		held, err := by.Holds(pid, d.lease)
		if err != nil {
			return "", err
		}
		if !held {
			return "", fmt.Errorf("the lock is not virtlockd's on %s", by.Name())
		}
		return fmt.Sprintf("%s lock (%s), held by virtlockd on %s, pid %d there", locks[0].Mode(), locks[0].Kind, by.Name(), pid), nil
	})
}

// unlocked makes sure that nobody has a lock on the disk and that no lease file is left.
func (d *demo) unlocked(what string) error {
	return d.see(what, func(table vmhost.LockTable) (string, error) {
		if locks := table.On(d.lease); len(locks) > 0 {
			return "", fmt.Errorf("want no lock on the lease file, the kernel has %v", locks)
		}
		if _, err := os.Stat(d.lease); !errors.Is(err, os.ErrNotExist) {
			return "", errors.New("the lease file is left behind")
		}
		return "no lock, no lease file", nil
	})
}

// see looks at the kernel's locks until they are as look wants them, for some seconds at most, and prints what look says of them.
func (d *demo) see(what string, look func(vmhost.LockTable) (string, error)) error {
	ctx, cancel := context.WithTimeout(d.ctx, 10*time.Second)
	defer cancel()
	var locks string
	var wrong error
	err := vmhost.Poll(ctx, func() (bool, error) {
		table, err := vmhost.ReadLocks()
		if err != nil {
			return false, err
		}
		locks, wrong = look(table)
		return wrong == nil, nil
	})
	if wrong != nil {
		return wrong
	}
	if err != nil {
		return err
	}
	fmt.Printf("    locks: %s\n", locks)
	fmt.Printf("ok: %s\n", what)
	return nil
}

// booted waits until the host's guest has printed something.
func (d *demo) booted(h *vmhost.Host) error {
	ctx, cancel := context.WithTimeout(d.ctx, 30*time.Second)
	defer cancel()
	err := vmhost.Poll(ctx, func() (bool, error) {
		text, err := os.ReadFile(h.Path(vmhost.ImagesDir + "/console"))
		return len(text) > 0, err
	})
	if err != nil {
		return fmt.Errorf("guest-%s does not boot: %w", h.Name(), err)
	}
	return nil
}

// title prints a step's.
func (d *demo) title(text string) { heading(fmt.Sprintf("%d. %s", d.steps, text)) }

func heading(text string) { fmt.Printf("\n%s\n", text) }

// shorten makes a lease file's name readable.
func shorten(name string) string { return name[:8] + "..." + name[len(name)-8:] }
