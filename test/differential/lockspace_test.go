// SPDX-License-Identifier: LGPL-2.1-or-later

package differential

import (
	"testing"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// libvirt's own unit test of lockspaces has seven cases. Here they are through the wire, with both daemons. The
// outcome that is asked for is stated besides, so that an error of both would be seen.

const lockspace = data + "/ls"

// expect sends a request and says whether it is to succeed.
func (p *pair) expect(client string, r request, refused func(error) bool) {
	p.t.Helper()
	p.call(client, r)
	// Both gave the same answer: a second request would be another one, so the trace has it.
	last := p.trace[len(p.trace)-1]
	if refused == nil && !containsOK(last) {
		p.fail("%s: %s should succeed", client, r)
	}
	if refused != nil && containsOK(last) {
		p.fail("%s: %s should be refused", client, r)
	}
}

func lockspacePair(t *testing.T) *pair {
	t.Helper()
	p := newPair(t, host.Options{})
	p.connect("A", "B")
	p.calls("A", register(ownerA))
	p.calls("B", register(ownerB))
	return p
}

// exists checks a file on both hosts.
func (p *pair) exists(path string, want bool) {
	p.t.Helper()
	p.same()
	for _, w := range []*world{p.c, p.ours} {
		if got := w.h.Exists(path); got != want {
			p.fail("%s: %s exists: %v, want %v", w.name, path, got, want)
		}
	}
}

func TestLockspaceCreate(t *testing.T) {
	t.Parallel()
	p := lockspacePair(t)
	p.expect("A", newLockspace(lockspace), nil)
	p.exists(lockspace, true)
	p.expect("A", newLockspace(lockspace), wire.IsLocked)
	p.expect("A", createLockspace(lockspace), nil)
}

func TestLockspaceResourceLifecycle(t *testing.T) {
	t.Parallel()
	p := lockspacePair(t)
	p.expect("A", newLockspace(lockspace), nil)
	p.expect("A", create(lockspace, "foo"), nil)
	p.exists(lockspace+"/foo", true)
	p.expect("A", acquire(lockspace, "foo", 0), nil)
	for _, client := range []string{"A", "B"} {
		p.expect(client, create(lockspace, "foo"), wire.IsLocked)
		p.expect(client, remove(lockspace, "foo"), wire.IsLocked)
	}
	p.exists(lockspace+"/foo", true)
	p.expect("A", release(lockspace, "foo"), nil)
	p.expect("A", remove(lockspace, "foo"), nil)
	p.exists(lockspace+"/foo", false)
	p.expect("A", remove(lockspace, "foo"), nil)
}

func TestLockspaceExclusive(t *testing.T) {
	t.Parallel()
	p := lockspacePair(t)
	p.expect("A", newLockspace(lockspace), nil)
	p.expect("A", create(lockspace, "foo"), nil)
	p.expect("A", acquire(lockspace, "foo", 0), nil)
	p.expect("A", acquire(lockspace, "foo", 0), wire.IsLocked)
	p.expect("B", acquire(lockspace, "foo", 0), wire.IsLocked)
	p.expect("B", acquire(lockspace, "foo", wire.Shared), wire.IsLocked)
	p.expect("B", release(lockspace, "foo"), wire.IsNotLocked)
	p.same()
	p.expect("A", release(lockspace, "foo"), nil)
	p.expect("A", release(lockspace, "foo"), wire.IsNotLocked)
	p.expect("B", acquire(lockspace, "foo", 0), nil)
	p.expect("B", release(lockspace, "foo"), nil)
	p.exists(lockspace+"/foo", true)
	p.expect("A", remove(lockspace, "foo"), nil)
	p.exists(lockspace+"/foo", false)
}

func TestLockspaceExclusiveAutocreate(t *testing.T) {
	t.Parallel()
	p := lockspacePair(t)
	p.expect("A", newLockspace(lockspace), nil)
	p.expect("A", acquire(lockspace, "foo", 0), wire.IsLocked)
	p.exists(lockspace+"/foo", false)
	p.expect("A", acquire(lockspace, "foo", wire.Autocreate), nil)
	p.exists(lockspace+"/foo", true)
	p.expect("A", acquire(lockspace, "foo", wire.Autocreate), wire.IsLocked)
	p.expect("B", acquire(lockspace, "foo", wire.Autocreate), wire.IsLocked)
	p.expect("A", release(lockspace, "foo"), nil)
	p.exists(lockspace+"/foo", false)
}

func TestLockspaceShared(t *testing.T) {
	t.Parallel()
	p := lockspacePair(t)
	p.expect("A", newLockspace(lockspace), nil)
	p.expect("A", create(lockspace, "foo"), nil)
	p.expect("A", acquire(lockspace, "foo", wire.Shared), nil)
	p.expect("B", acquire(lockspace, "foo", wire.Shared), nil)
	p.expect("B", acquire(lockspace, "foo", 0), wire.IsLocked)
	p.expect("A", release(lockspace, "foo"), nil)
	p.expect("A", acquire(lockspace, "foo", 0), wire.IsLocked)
	p.same()
	p.expect("B", release(lockspace, "foo"), nil)
	p.expect("A", acquire(lockspace, "foo", 0), nil)
	p.expect("A", release(lockspace, "foo"), nil)
	p.exists(lockspace+"/foo", true)
}

func TestLockspaceSharedAutocreate(t *testing.T) {
	t.Parallel()
	p := lockspacePair(t)
	const flags = wire.Shared | wire.Autocreate
	p.expect("A", newLockspace(lockspace), nil)
	p.expect("A", acquire(lockspace, "foo", wire.Shared), wire.IsLocked)
	p.expect("A", acquire(lockspace, "foo", flags), nil)
	p.expect("B", acquire(lockspace, "foo", flags), nil)
	p.expect("A", release(lockspace, "foo"), nil)
	p.exists(lockspace+"/foo", true)
	p.expect("B", release(lockspace, "foo"), nil)
	p.exists(lockspace+"/foo", false)
}

func TestLockspaceDefault(t *testing.T) {
	t.Parallel()
	p := lockspacePair(t)
	foo := data + "/foo"
	p.expect("A", acquire("", foo, 0), wire.IsLocked)
	p.expect("A", create("", foo), nil)
	p.exists(foo, true)
	p.expect("A", acquire("", foo, 0), nil)
	p.expect("B", acquire("", foo, 0), wire.IsLocked)
	p.expect("B", remove("", foo), wire.IsLocked)
	p.expect("A", release("", foo), nil)
	p.expect("B", remove("", foo), nil)
	p.exists(foo, false)
	p.expect("B", acquire("", foo, wire.Autocreate), nil)
	p.expect("B", release("", foo), nil)
	p.exists(foo, false)
}
