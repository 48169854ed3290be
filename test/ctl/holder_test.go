// SPDX-License-Identifier: LGPL-2.1-or-later

package ctl

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"strings"
	"testing"
	"unicode"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// refusal returns what a refused client is told, whose form must be right.
func refusal(t *testing.T, err error) string {
	t.Helper()
	e := wire.AsError(err)
	if e == nil || !wire.IsLocked(err) || e.Str1 == nil || *e.Str1 != "resource busy: %s" || *e.Str2 != strings.TrimPrefix(e.Text(), "resource busy: ") {
		t.Fatalf("refused with %v", err)
	}
	return e.Text()
}

func wantText(t *testing.T, text string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("%q is not in %q", part, text)
		}
	}
}

func leaseOf(disk string) string {
	sum := sha256.Sum256([]byte(disk))
	return hex.EncodeToString(sum[:])
}

// Who is refused hears who holds the resource.
func TestHolderInError(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	name, err := os.Hostname()
	must(t, err)
	p, alpha := guest(t, h, d, "alpha")
	_, beta := guest(t, h, d, "beta")
	disk, shared := file(h, "disk"), file(h, "shared")
	who := fmt.Sprintf(`by domain "alpha" (UUID 11111111-1111-1111-1111-111111111111, pid %d) on host %q since 2`, p.PID(), name)
	must(t, alpha.Acquire("", disk, 0))
	text := refusal(t, beta.Acquire("", disk, 0))
	if !strings.HasPrefix(text, "resource busy: Lockspace resource '"+disk+"' is locked: held exclusively "+who) {
		t.Errorf("said %q", text)
	}
	wantText(t, refusal(t, beta.Delete("", disk)), who)
	h.Must(func() error { return os.Link(disk, host.Data+"/link") })
	wantText(t, refusal(t, beta.Acquire("", host.Data+"/link", wire.Shared)), "held exclusively "+who)
	must(t, alpha.Acquire("", shared, wire.Shared))
	must(t, beta.Acquire("", shared, wire.Shared))
	wantText(t, refusal(t, beta.Acquire("", shared, 0)), "held shared "+who, ", and 1 more")

	// A hash says nothing to anybody: the holder has the disk open.
	space := host.Data + "/leases"
	must(t, alpha.CreateLockspace(space))
	must(t, alpha.Acquire(space, leaseOf(disk), wire.Autocreate))
	p.Lock(disk, "W", 100, 1) // as QEMU does
	wantText(t, refusal(t, beta.Acquire(space, leaseOf(disk), wire.Autocreate)), who, fmt.Sprintf("; the disk is %q", disk))
	must(t, alpha.Acquire(space, leaseOf("/none"), wire.Autocreate))
	if text := refusal(t, beta.Acquire(space, leaseOf("/none"), wire.Autocreate)); strings.Contains(text, "the disk is") {
		t.Errorf("said %q", text)
	}
}

// Whoever holds the lease outside, as a C daemon on another host: the guest that is refused has the disk open.
func TestDiskInErrorWithoutHolder(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	p, c := guest(t, h, d, "alpha")
	disk, space := file(h, "disk"), host.Data+"/leases"
	must(t, c.CreateLockspace(space))
	lease := space + "/" + leaseOf(disk)
	h.WriteFile(lease, "", 0o600)
	h.Spawn(host.ProcessOptions{}).Lock(lease, "W", 0, 1)
	locked := "resource busy: Lockspace resource '" + leaseOf(disk) + "' is locked"
	if text := refusal(t, c.Acquire(space, leaseOf(disk), wire.Autocreate)); text != locked {
		t.Errorf("said %q", text)
	}
	p.Lock(disk, "W", 100, 1) // as QEMU does
	if text := refusal(t, c.Acquire(space, leaseOf(disk), wire.Autocreate)); text != locked+fmt.Sprintf(": the disk is %q", disk) {
		t.Errorf("said %q", text)
	}
}

// Names are printable and short, whatever a client has called itself.
func TestHolderIsEscaped(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	c := d.Dial("lock")
	vm := wire.VM(0x70000001)
	vm.Name = "a\x1b[31m\"b\nc\xff\u202e%s" + strings.Repeat("x", 60000)
	must(t, c.Register(vm))
	disk := file(h, "disk")
	must(t, c.Acquire("", disk, 0))
	text := refusal(t, d.Client(0x70000002).Acquire("", disk, 0))
	if len(text) > 1000 || strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
		t.Errorf("said %q", text)
	}
	wantText(t, text, `a\x1b[31m\"b\nc\xff\u202e%s`)
}
