// SPDX-License-Identifier: LGPL-2.1-or-later

package libvirt_test

import (
	"encoding/json"
	"testing"
	"time"

	"virtlockd/internal/inspect"
)

// virtlockctl names the guest that holds a disk, by whatever name libvirt has locked it.
func TestWho(t *testing.T) {
	each(t, []string{direct, indirect}, func(m *machine) {
		if m.daemon.name == reference.name {
			m.Skip("the C daemon can't be asked")
		}
		who := func(disk string) (locks []inspect.Lock) {
			r, err := m.host.Run(m.Context(), ctl, "who", "-o", "json", disk)
			if err != nil && r.Out == "" {
				m.Fatal(err)
			}
			var answer struct{ Locks []inspect.Lock }
			if err := json.Unmarshal([]byte(r.Out), &answer); err != nil {
				m.Fatalf("%v: %s", err, r.Out)
			}
			return answer.Locks
		}
		a := m.guest("a", m.exclusive("a.qcow2", "sda"))
		begin := time.Now()
		m.start(a)
		locks := who(m.path("a.qcow2"))
		if len(locks) != 1 || len(locks[0].Owners) != 1 {
			m.Fatalf("held by %+v", locks)
		}
		o := locks[0].Owners[0]
		if string(o.Name) != a.Name || o.UUID != a.UUID || int(o.PID) != m.pid(a) || o.Kind != "verified" || o.Since.Before(begin) {
			m.Errorf("held by %+v, want %s, uuid %s, pid %d", o, a.Name, a.UUID, m.pid(a))
		}
		m.run(ctl, "check")
		m.virsh("suspend", a.Name)
		if locks := who(m.path("a.qcow2")); len(locks) != 0 {
			m.Errorf("a guest that is suspended holds %+v", locks)
		}
		m.virsh("resume", a.Name)
		// libvirtd asks for the lock now, in the guest's name.
		locks = who(m.path("a.qcow2"))
		if len(locks) != 1 || int(locks[0].Owners[0].PID) != m.pid(a) {
			m.Errorf("resumed, it is held by %+v", locks)
		}
		m.run(ctl, "check")
	})
}
