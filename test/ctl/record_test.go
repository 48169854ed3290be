// SPDX-License-Identifier: LGPL-2.1-or-later

package ctl

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"unicode"
	"unicode/utf8"

	"virtlockd/internal/lease"
	"virtlockd/test/host"
	"virtlockd/test/slowdisk"
	"virtlockd/test/wire"
)

const (
	leases    = host.Data + "/leases"
	alphaUUID = "11111111-1111-1111-1111-111111111111"
)

// record reads what a lease file says of its holder.
func record(t *testing.T, h *host.Host, path string) lease.Record {
	t.Helper()
	content := h.ReadFile(path)
	r, ok := lease.Parse([]byte(content))
	if !ok {
		t.Fatalf("%s has no record: %q", path, content)
	}
	return r
}

// A record is emptied with the release, by whichever process that is.
func TestRecordIsEmptied(t *testing.T) {
	t.Parallel()
	for name, next := range map[string]func(*testing.T, *host.Host, *host.Daemon){
		"same process": func(*testing.T, *host.Host, *host.Daemon) {}, "live upgrade": upgrade, "kill -9": crash,
	} {
		for _, ends := range []string{"release", "guest's end"} {
			t.Run(name+"/"+ends, func(t *testing.T) {
				t.Parallel()
				h, d := start(t, host.Options{Args: []string{"--keeper"}})
				p, c := guest(t, h, d, "alpha")
				must(t, c.CreateLockspace(leases))
				must(t, c.Acquire(leases, "a", wire.Autocreate))
				path, other := leases+"/a", leases+"/another-name"
				h.Must(func() error { return os.Link(path, other) }) // it stays when the lease is removed
				before := record(t, h, path)
				if before.Domain != "alpha" || before.UUID != alphaUUID || before.PID != int32(p.PID()) || before.Host == "" || before.Since.IsZero() {
					t.Errorf("the record says %+v", before)
				}
				if text := h.ReadFile(path); strings.Count(text, "\n") != 1 || !json.Valid([]byte(text)) {
					t.Errorf("the record is %q", text)
				}
				next(t, h, d)
				if after := record(t, h, path); after != before {
					t.Errorf("it says %+v afterwards, and said %+v", after, before)
				}
				if ends == "release" {
					must(t, c.Release(leases, "a"))
				} else {
					p.Kill()
				}
				if !host.Eventually(func() bool { return !h.Exists(path) }) {
					t.Error("the lease is left")
				}
				if text := h.ReadFile(other); text != "" {
					t.Errorf("after the release there is %q", text)
				}
				end(t, h, d)
			})
		}
	}
}

// Only exclusive holders write one, and only where the lease is made for the lock.
func TestRecordOnlyInLeases(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	_, c := guest(t, h, d, "alpha")
	must(t, c.CreateLockspace(leases))
	h.WriteFile(leases+"/plain", "", 0o600)
	h.WriteFile(host.Data+"/disk", "", 0o600)
	must(t, c.Acquire(leases, "shared", wire.Shared|wire.Autocreate))
	must(t, c.Acquire(leases, "plain", 0))
	must(t, c.Acquire("", host.Data+"/disk", 0))
	for _, path := range []string{leases + "/shared", leases + "/plain", host.Data + "/disk"} {
		if text := h.ReadFile(path); text != "" {
			t.Errorf("%s has %q", path, text)
		}
	}
}

// What is not a lease of ours is neither written nor removed, though it lies where one could be and is locked as one.
func TestForeignFileInLockspace(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	_, c := guest(t, h, d, "alpha")
	must(t, c.CreateLockspace(leases))
	ours := lease.Record{Host: "dead", Domain: "beta", UUID: alphaUUID, PID: 1}
	r := string(ours.Bytes())
	for name, content := range map[string]string{
		"image": strings.Repeat("disk", 1<<16), "byte": "x", "newline": "\n", "zeros": strings.Repeat("\x00", 512), "record and more": r + "x", "two records": r + r,
		"half a record": r[:len(r)/2], "another version": strings.Replace(r, `"virtlockd":1`, `"virtlockd":2`, 1), "JSON": `{"host":"a"}` + "\n", "large": strings.Repeat(" ", lease.Max+1),
	} {
		for flags, mode := range map[uint32]string{wire.Autocreate: "exclusive", wire.Autocreate | wire.Shared: "shared"} {
			path := leases + "/" + name
			h.WriteFile(path, content, 0o600)
			before, err := os.Stat(h.Path(path))
			must(t, err)
			must(t, c.Acquire(leases, name, flags))
			if h.Free(path, true) {
				t.Errorf("%s, %s: not locked", name, mode)
			}
			must(t, c.Release(leases, name))
			after, err := os.Stat(h.Path(path))
			if err != nil || h.ReadFile(path) != content || !after.ModTime().Equal(before.ModTime()) || !os.SameFile(before, after) {
				t.Errorf("%s, %s: written or removed: %v", name, mode, err)
			}
		}
		// It becomes foreign while it is held as a lease.
		path := leases + "/late " + name
		must(t, c.Acquire(leases, "late "+name, wire.Autocreate))
		h.WriteFile(path, content, 0o600)
		must(t, c.Release(leases, "late "+name))
		if !h.Exists(path) || h.ReadFile(path) != content {
			t.Errorf("late %s: written or removed", name)
		}
	}
}

// A record that can't be written never costs the lock.
func TestRecordCannotBeWritten(t *testing.T) {
	t.Parallel()
	for _, errno := range []syscall.Errno{syscall.EDQUOT, syscall.EIO, syscall.EROFS, syscall.ENOSPC, syscall.EFBIG} {
		t.Run(errno.Error(), func(t *testing.T) {
			t.Parallel()
			h, d := start(t, host.Options{})
			disk := slowdisk.Mount(t, h, "/tmp/slow", slowdisk.Options{})
			disk.FailWrites(errno)
			_, c := guest(t, h, d, "alpha")
			must(t, c.CreateLockspace("/tmp/slow"))
			for _, name := range []string{"a", "b"} {
				must(t, c.Acquire("/tmp/slow", name, wire.Autocreate))
				if h.Free("/tmp/slow/"+name, false) {
					t.Error("it is not locked")
				}
			}
			wantChecks(t, h, 2, "")
			if !host.Eventually(func() bool { return strings.Contains(d.Stderr(), "can't say by whom") }) ||
				!strings.Contains(d.Stderr(), errno.Error()) || strings.Count(d.Stderr(), "can't say by whom") != 1 {
				t.Errorf("the log says %s", host.Shorten(d.Stderr()))
			}
			for _, name := range []string{"a", "b"} {
				must(t, c.Release("/tmp/slow", name))
				if disk.Has(name) {
					t.Errorf("lease %s is left", name)
				}
			}
		})
	}
}

// A file system that was remounted read-only takes no new lease, as with the C daemon, since it can't be opened for writing. The kernel
// does not remount one with locks on it, whose files are open for writing; one that turns read-only by itself is tried above.
func TestLeaseOnReadOnlyMount(t *testing.T) {
	t.Parallel()
	for _, binary := range []string{host.C(t), host.Ours(t)} {
		h := host.New(t)
		d := h.Start(binary, host.Options{})
		const dir = "/tmp/ro"
		remount := func(flags uintptr) error { return syscall.Mount("tmpfs", dir, "tmpfs", flags, "") }
		h.Must(func() error { return os.Mkdir(dir, 0o755) })
		h.Must(func() error { return remount(0) })
		c := d.Client(0x70000001)
		must(t, c.CreateLockspace(dir))
		h.WriteFile(dir+"/there", "", 0o600)
		must(t, c.Acquire(dir, "held", wire.Autocreate))
		if err := h.Do(func() error { return remount(syscall.MS_REMOUNT | syscall.MS_RDONLY) }); !errors.Is(err, syscall.EBUSY) {
			t.Errorf("remounted under a lock: %v", err)
		}
		must(t, c.Release(dir, "held"))
		h.Must(func() error { return remount(syscall.MS_REMOUNT | syscall.MS_RDONLY) })
		for _, name := range []string{"there", "new"} {
			if err := c.Acquire(dir, name, wire.Autocreate); err == nil || !strings.Contains(err.Error(), "Read-only file system") {
				t.Errorf("%s: acquired %s: %v", binary, name, err)
			}
		}
	}
}

// pair starts two daemons on hosts that share a directory, and returns a guest of each.
func pair(t *testing.T, first, second string) (h [2]*host.Host, d [2]*host.Daemon, p [2]*host.Process, c [2]*wire.Conn) {
	t.Helper()
	h[0], h[1] = host.New(t), host.New(t)
	h[0].Must(func() error { return os.Mkdir(leases, 0o755) })
	h[0].Share(leases, h[1])
	for i, binary := range []string{first, second} {
		d[i] = h[i].Start(binary, host.Options{})
		p[i] = h[i].Spawn(host.ProcessOptions{})
		c[i] = p[i].Dial(d[i], "lock")
		o := wire.VM(p[i].PID())
		o.Name = []string{"alpha", "beta"}[i]
		must(t, c[i].Register(o))
		must(t, c[i].CreateLockspace(leases))
	}
	return h, d, p, c
}

// Hosts that share a directory tell each other who holds a lease, as far as they know it.
func TestHolderOnOtherHost(t *testing.T) {
	t.Parallel()
	this, err := os.Hostname()
	must(t, err)
	const path = leases + "/a"
	t.Run("ours and ours", func(t *testing.T) {
		t.Parallel()
		h, d, p, c := pair(t, host.Ours(t), host.Ours(t))
		must(t, c[0].Acquire(leases, "a", wire.Autocreate))
		said := fmt.Sprintf("held exclusively by domain \"alpha\" (UUID %s, pid %d) on host %q since 2", alphaUUID, p[0].PID(), this)
		for _, flags := range []uint32{wire.Autocreate, wire.Autocreate | wire.Shared, 0} {
			text := refusal(t, c[1].Acquire(leases, "a", flags))
			wantText(t, text, said, ", as its lease file says")
		}
		if r := want(t, h[1], ok, "events", "-k", "refused"); !strings.Contains(r.out, "alpha") {
			t.Errorf("events: %v", r)
		}
		// A shared holder says nothing of himself.
		must(t, c[0].Release(leases, "a"))
		must(t, c[0].Acquire(leases, "a", wire.Autocreate|wire.Shared))
		if text := refusal(t, c[1].Acquire(leases, "a", wire.Autocreate)); strings.Contains(text, "held") {
			t.Errorf("said %q", text)
		}
		must(t, c[0].Release(leases, "a"))
		// The host dies, with all that is on it.
		must(t, c[0].Acquire(leases, "a", wire.Autocreate))
		host.Settled(t, d[0].PID())
		syscall.Kill(d[0].PID(), syscall.SIGKILL)
		d[0].Wait()
		p[0].Kill()
		if r := record(t, h[1], path); r.Domain != "alpha" {
			t.Errorf("left is %+v", r)
		}
		must(t, c[1].Acquire(leases, "a", wire.Autocreate))
		if r := record(t, h[1], path); r.Domain != "beta" {
			t.Errorf("now it says %+v", r)
		}
		must(t, c[1].Release(leases, "a"))
		if h[1].Exists(path) {
			t.Error("the lease is left")
		}
	})
	t.Run("ours and C", func(t *testing.T) {
		t.Parallel()
		h, d, _, c := pair(t, host.Ours(t), host.C(t))
		must(t, c[0].Acquire(leases, "a", wire.Autocreate))
		if text := wire.AsError(c[1].Acquire(leases, "a", wire.Autocreate)); text == nil || text.Text() != "resource busy: Lockspace resource 'a' is locked" {
			t.Errorf("C says %v", text)
		}
		if r := record(t, h[1], path); r.Domain != "alpha" || h[0].Free(path, false) {
			t.Errorf("after C was refused: %+v", r)
		}
		must(t, c[0].Release(leases, "a"))
		// The other way round: an empty file, and nobody knows whose.
		must(t, c[1].Acquire(leases, "a", wire.Autocreate))
		if text := refusal(t, c[0].Acquire(leases, "a", wire.Autocreate)); text != "resource busy: Lockspace resource 'a' is locked" {
			t.Errorf("ours says %q", text)
		}
		if h[0].ReadFile(path) != "" {
			t.Error("something was written to the file of C")
		}
		must(t, c[1].Release(leases, "a"))
		must(t, c[0].Acquire(leases, "a", wire.Autocreate))
		// C has a lease in which our record stands: it is not disturbed, and removes it.
		host.Settled(t, d[0].PID())
		syscall.Kill(d[0].PID(), syscall.SIGKILL)
		d[0].Wait()
		must(t, c[1].Acquire(leases, "a", wire.Autocreate))
		record(t, h[1], path)
		must(t, c[1].Release(leases, "a"))
		if h[1].Exists(path) {
			t.Error("C leaves the lease")
		}
	})
}

// Whatever stands in a lease file, it does nothing to an error or a terminal.
func TestHostileRecord(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	_, c := guest(t, h, d, "alpha")
	must(t, c.CreateLockspace(leases))
	valid := func(host, domain string) string {
		text := func(s string) string { b, _ := json.Marshal(s); return string(b) }
		return `{"virtlockd":1,"host":` + text(host) + `,"domain":` + text(domain) + `,"uuid":"` + alphaUUID + `","pid":1,"since":"2024-05-06T07:08:09Z"}` + "\n"
	}
	for i, r := range []struct{ content, named string }{
		{valid("node7", "web"), `held exclusively by domain "web" (UUID ` + alphaUUID + `, pid 1) on host "node7" since 2024-05-06T07:08:09Z, as its lease file says`},
		{valid("a\x1b[31m\nb", "\x1b]0;x\x07\u202e"), `domain "\x1b]0;x\a\u202e"`},
		{valid("h", strings.Repeat("x", 700)), strings.Repeat("x", 128) + `" (`},
		{valid("h", strings.Repeat("x", 5000)), ""},
		{valid("h", "%s%n%!d"), "%s%n%!d"},
		{strings.Replace(valid("h", "d"), `"pid":1`, `"pid":"1"`, 1), ""},
		{strings.Replace(valid("h", "d"), `"pid":1`, `"pid":99999999999`, 1), ""},
		{strings.Replace(valid("h", "d"), alphaUUID, "\\u001b[31m", 1), ""},
		{strings.Replace(valid("h", "d"), `"2024-05-06T07:08:09Z"`, `"yesterday"`, 1), ""},
		{strings.Replace(valid("h", "d"), `"domain":"d"`, `"domain":["d"]`, 1), ""},
		{strings.Replace(valid("h", "d"), `"host":"h"`, `"host":null`, 1), ""},
		{strings.TrimSuffix(valid("h", "d"), "\n"), ""},
		{valid("h", "d") + valid("h", "d"), ""},
		{`{"virtlockd":1,` + strings.Repeat("[", 900) + "\n", ""},
		{"\x1b[2J\x1b]0;title\x07", ""},
		{strings.Repeat("\xff\x00", 400), ""},
		{"{}\n", ""},
	} {
		name := fmt.Sprint(i)
		path := leases + "/" + name
		h.WriteFile(path, r.content, 0o600)
		outsider := h.Spawn(host.ProcessOptions{})
		outsider.Lock(path, "W", 0, 1)
		text := refusal(t, c.Acquire(leases, name, wire.Autocreate))
		if len(text) > 1000 || !utf8.ValidString(text) || strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("%q: said %q", r.content, text)
		}
		if r.named == "" && strings.Contains(text, "held") || !strings.Contains(text, r.named) {
			t.Errorf("%q: said %q", r.content, text)
		}
		if h.ReadFile(path) != r.content {
			t.Errorf("%q was written", r.content)
		}
		outsider.Kill()
	}
	for _, args := range [][]string{{"events"}, {"events", "-o", "json"}, {"who", "/none"}, {"list"}} {
		if r := ctl(t, h, args...); strings.ContainsFunc(r.out+r.errs, func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) }) {
			t.Errorf("%q: %q", args, r.out)
		}
	}
}
