// SPDX-License-Identifier: LGPL-2.1-or-later

package vmhost

import (
	"bytes"
	"context"
	"encoding/xml"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// A Guest describes a virtual machine: emulated, 32 MiB, no network, no graphics.
type Guest struct {
	Name          string
	UUID          string // empty: libvirt chooses
	Disks         []Disk // the first one is booted from
	Leases        []Lease
	OnLockFailure string // empty: libvirt's default
	OnReboot      string
	Console       string // file that gets what the guest prints; empty: nowhere
}

// A Disk is a disk of a guest. It is a block device if its path is below /dev, else a file.
type Disk struct {
	Path      string // empty: a drive without a medium
	Target    string // such as sda; its first letters choose the bus: sd SCSI, vd virtio, hd IDE, fd floppy
	Device    string // "disk" if empty, "cdrom", "floppy"
	Format    string // "raw" if empty
	Cache     string // "none" if empty, which a file system in memory may not know
	Shareable bool
	ReadOnly  bool
}

// A Lease is a <lease> element: Key is a file in the directory Path/Lockspace.
type Lease struct{ Lockspace, Key, Path string }

func attr(s string) string {
	var b bytes.Buffer
	xml.EscapeText(&b, []byte(s)) // a bytes.Buffer never fails
	return b.String()
}

// XML returns the disk as libvirt's <disk> element.
func (d Disk) XML() string {
	device, format, cache := d.Device, d.Format, d.Cache
	if device == "" {
		device = "disk"
	}
	if format == "" {
		format = "raw"
	}
	if cache == "" {
		cache = "none"
	}
	kind, source := "file", "file"
	if strings.HasPrefix(d.Path, "/dev/") {
		kind, source = "block", "dev"
	}
	bus := map[string]string{"sd": "scsi", "vd": "virtio", "hd": "ide", "fd": "fdc"}[d.Target[:2]]
	var b strings.Builder
	fmt.Fprintf(&b, "<disk type='%s' device='%s'><driver name='qemu' type='%s' cache='%s'/>", kind, device, format, cache)
	if d.Path != "" {
		fmt.Fprintf(&b, "<source %s='%s'/>", source, attr(d.Path))
	}
	fmt.Fprintf(&b, "<target dev='%s' bus='%s'/>", d.Target, bus)
	if d.Shareable {
		b.WriteString("<shareable/>")
	}
	if d.ReadOnly {
		b.WriteString("<readonly/>")
	}
	b.WriteString("</disk>")
	return b.String()
}

// XML returns the lease as libvirt's <lease> element.
func (l Lease) XML() string {
	return fmt.Sprintf("<lease><lockspace>%s</lockspace><key>%s</key><target path='%s'/></lease>",
		attr(l.Lockspace), attr(l.Key), attr(l.Path))
}

// XML returns the guest as libvirt's <domain> element.
func (g Guest) XML() string {
	var b strings.Builder
	fmt.Fprintf(&b, "<domain type='qemu'><name>%s</name>", attr(g.Name))
	if g.UUID != "" {
		fmt.Fprintf(&b, "<uuid>%s</uuid>", g.UUID)
	}
	b.WriteString("<memory unit='MiB'>32</memory><vcpu>1</vcpu><os><type arch='x86_64' machine='pc'>hvm</type></os>" +
		"<features><acpi/></features><on_poweroff>destroy</on_poweroff>")
	if g.OnReboot != "" {
		fmt.Fprintf(&b, "<on_reboot>%s</on_reboot>", g.OnReboot)
	}
	if g.OnLockFailure != "" {
		fmt.Fprintf(&b, "<on_lockfailure>%s</on_lockfailure>", g.OnLockFailure)
	}
	b.WriteString("<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>" +
		"<controller type='usb' model='none'/><controller type='scsi' model='virtio-scsi'/><memballoon model='none'/>")
	for _, d := range g.Disks {
		b.WriteString(d.XML())
	}
	for _, l := range g.Leases {
		b.WriteString(l.XML())
	}
	if g.Console != "" {
		fmt.Fprintf(&b, "<serial type='file'><source path='%s'/></serial>", attr(g.Console))
	}
	b.WriteString("</devices></domain>")
	return b.String()
}

// WriteFile writes a file of the host, for its commands to read.
func (h *Host) WriteFile(path, text string) error {
	path = h.Path(path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(text), 0o644)
}

// Define defines a persistent guest.
func (h *Host) Define(ctx context.Context, g Guest) error {
	return h.withXML(ctx, g.Name, g.XML(), "define")
}

// Create starts a transient guest.
func (h *Host) Create(ctx context.Context, g Guest) error {
	return h.withXML(ctx, g.Name, g.XML(), "create")
}

// withXML runs a virsh command that reads XML from a file, which is given as the last argument.
func (h *Host) withXML(ctx context.Context, name, text string, args ...string) error {
	path := "/run/xml/" + name + "-" + args[0] + ".xml"
	if err := h.WriteFile(path, text); err != nil {
		return err
	}
	_, err := h.Virsh(ctx, append(args, path)...)
	return err
}

// Attach and Detach change a running guest's devices: element is a Disk's or Lease's XML.
func (h *Host) Attach(ctx context.Context, guest, element string) error {
	return h.withXML(ctx, guest, element, "attach-device", "--live", guest)
}

// Detach takes a device from a running guest.
func (h *Host) Detach(ctx context.Context, guest, element string) error {
	return h.withXML(ctx, guest, element, "detach-device", "--live", guest)
}
