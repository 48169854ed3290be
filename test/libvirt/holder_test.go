// SPDX-License-Identifier: LGPL-2.1-or-later

package libvirt_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"virtlockd/test/vmhost"
)

// virshNames runs a virsh command whose error has to be the C daemon's text and behind it all that is known of the holder.
func (m *machine) virshNames(holder *machine, g vmhost.Guest, disk string, more []string, args ...string) {
	m.Helper()
	_, err := m.host.Virsh(m.Context(), args...)
	want := []string{
		fmt.Sprintf("%s: held exclusively by domain %q (UUID %s, pid %d) on host %q since 2", m.busy(disk), g.Name, g.UUID, holder.pid(g), holder.host.Name()),
	}
	for _, text := range append(want, more...) {
		if err == nil || !strings.Contains(err.Error(), text) {
			m.Fatalf("virsh %q: %v; want an error with %q", args, err, text)
		}
	}
}

// Who starts a second guest on a disk reads which one has it.
func TestHolderOnHost(t *testing.T) {
	each(t, bothLockspaces, func(m *machine) {
		if m.daemon.name == reference.name {
			m.Skip("the C daemon does not say it")
		}
		// QEMU itself locks a disk, too, but the node: another one of the same name and number does for it as another
		// host's would.
		loop := m.loop("a.raw")
		disk := vmhost.Disk{Path: "/dev/" + m.slug + "-" + m.kind, Target: "sda"}
		m.device(loop, disk.Path)
		a, b := m.guest("a", disk), m.guest("b", disk)
		m.start(a)
		m.run("rm", disk.Path)
		m.device(loop, disk.Path)
		m.define(b)
		var more []string
		if m.kind == indirect {
			more = []string{fmt.Sprintf("the disk is %q", disk.Path)}
		}
		m.virshNames(m, a, disk.Path, more, "start", b.Name)
		m.state(b, "shut off")
		m.virsh("destroy", a.Name)
		m.virsh("start", b.Name)
		m.state(b, "running")
	})
}

// The same between hosts that share a lockspace: the lease file says who has it, as far as the other host's daemon writes it.
func TestHolderOnOtherHost(t *testing.T) {
	routes(t, func(r *route) {
		lease := r.host.Path(filepath.Join(vmhost.LeasesDir, vmhost.LeaseName(r.device)))
		content := func() string {
			text, err := os.ReadFile(lease)
			if err != nil {
				r.Fatal(err)
			}
			return string(text)
		}
		r.to.define(r.guest)
		if r.daemon.name == ours.name && !strings.HasPrefix(content(), `{"virtlockd":1,`) || r.daemon.name == reference.name && content() != "" {
			r.Errorf("the lease of a guest with daemon %s has %q", r.daemon.name, content())
		}
		if r.daemon.name == ours.name && r.to.daemon.name == ours.name {
			r.to.virshNames(r.machine, r.guest, r.device, []string{", as its lease file says"}, "start", r.guest.Name)
		} else {
			r.to.virshRefused(r.busy(r.device), "start", r.guest.Name)
		}
		r.held("the second host was refused", r.machine)
		r.virsh("destroy", r.guest.Name)
		r.locks("destroyed")
		if _, err := os.Stat(lease); !os.IsNotExist(err) {
			r.Errorf("the lease is left: %v", err)
		}
		r.to.virsh("start", r.guest.Name)
		r.held("started at the second host", r.to)
		// A host that ends without a word leaves a record that means nothing: the next one takes the lock.
		r.to.virsh("destroy", r.guest.Name)
		r.locks("destroyed at the second host")
		stale := fmt.Sprintf(`{"virtlockd":1,"host":"dead","domain":"other","uuid":%q,"pid":1,"since":"2024-05-06T07:08:09Z"}`+"\n", r.guest.UUID)
		if err := os.WriteFile(lease, []byte(stale), 0o600); err != nil {
			r.Fatal(err)
		}
		r.virsh("start", r.guest.Name)
		if strings.Contains(content(), "dead") != (r.daemon.name == reference.name) {
			r.Errorf("the lease has %q", content())
		}
		r.virsh("destroy", r.guest.Name)
		r.locks("destroyed again")
	})
}
