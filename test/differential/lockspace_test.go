// SPDX-License-Identifier: LGPL-2.1-or-later

package differential

import (
	"strings"
	"testing"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// libvirt's own unit test of lockspaces has seven cases. Here they are through the wire, with both daemons. The
// outcome that is asked for is stated besides, so that an error of both would be seen.

const lockspace = data + "/ls"

// What refusals say.
const (
	isLocked    = "' is locked"
	isNotLocked = "' is not locked"
	notOwner    = "does not hold the resource lock"
	exists      = "already exists"
	noFile      = "No such file or directory"
)

// expect sends a request and says whether it is to succeed (refusal ""), or what the refusal is to say.
func (p *pair) expect(client string, r request, refusal string) {
	p.t.Helper()
	p.call(client, r)
	// Both gave the same answer: a second request would be another one, so the trace has it.
	last := p.trace[len(p.trace)-1]
	switch {
	case refusal == "" && !containsOK(last):
		p.fail("%s: %s should succeed", client, r)
	case refusal != "" && (containsOK(last) || !strings.Contains(last, refusal)):
		p.fail("%s: %s should be refused because %q", client, r, refusal)
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
	p.expect("A", newLockspace(lockspace), "")
	p.exists(lockspace, true)
	p.expect("A", newLockspace(lockspace), exists)
	p.expect("A", createLockspace(lockspace), "")
}

func TestLockspaceResourceLifecycle(t *testing.T) {
	t.Parallel()
	p := lockspacePair(t)
	p.expect("A", newLockspace(lockspace), "")
	p.expect("A", create(lockspace, "foo"), "")
	p.exists(lockspace+"/foo", true)
	p.expect("A", acquire(lockspace, "foo", 0), "")
	for _, client := range []string{"A", "B"} {
		p.expect(client, create(lockspace, "foo"), isLocked)
		p.expect(client, remove(lockspace, "foo"), isLocked)
	}
	p.exists(lockspace+"/foo", true)
	p.expect("A", release(lockspace, "foo"), "")
	p.expect("A", remove(lockspace, "foo"), "")
	p.exists(lockspace+"/foo", false)
	p.expect("A", remove(lockspace, "foo"), "")
}

func TestLockspaceExclusive(t *testing.T) {
	t.Parallel()
	p := lockspacePair(t)
	p.expect("A", newLockspace(lockspace), "")
	p.expect("A", create(lockspace, "foo"), "")
	p.expect("A", acquire(lockspace, "foo", 0), "")
	p.expect("A", acquire(lockspace, "foo", 0), isLocked)
	p.expect("B", acquire(lockspace, "foo", 0), isLocked)
	p.expect("B", acquire(lockspace, "foo", wire.Shared), isLocked)
	p.expect("B", release(lockspace, "foo"), notOwner)
	p.same()
	p.expect("A", release(lockspace, "foo"), "")
	p.expect("A", release(lockspace, "foo"), isNotLocked)
	p.expect("B", acquire(lockspace, "foo", 0), "")
	p.expect("B", release(lockspace, "foo"), "")
	p.exists(lockspace+"/foo", true)
	p.expect("A", remove(lockspace, "foo"), "")
	p.exists(lockspace+"/foo", false)
}

func TestLockspaceExclusiveAutocreate(t *testing.T) {
	t.Parallel()
	p := lockspacePair(t)
	p.expect("A", newLockspace(lockspace), "")
	p.expect("A", acquire(lockspace, "foo", 0), noFile)
	p.exists(lockspace+"/foo", false)
	p.expect("A", acquire(lockspace, "foo", wire.Autocreate), "")
	p.exists(lockspace+"/foo", true)
	p.expect("A", acquire(lockspace, "foo", wire.Autocreate), isLocked)
	p.expect("B", acquire(lockspace, "foo", wire.Autocreate), isLocked)
	p.expect("A", release(lockspace, "foo"), "")
	p.exists(lockspace+"/foo", false)
}

func TestLockspaceShared(t *testing.T) {
	t.Parallel()
	p := lockspacePair(t)
	p.expect("A", newLockspace(lockspace), "")
	p.expect("A", create(lockspace, "foo"), "")
	p.expect("A", acquire(lockspace, "foo", wire.Shared), "")
	p.expect("B", acquire(lockspace, "foo", wire.Shared), "")
	p.expect("B", acquire(lockspace, "foo", 0), isLocked)
	p.expect("A", release(lockspace, "foo"), "")
	p.expect("A", acquire(lockspace, "foo", 0), isLocked)
	p.same()
	p.expect("B", release(lockspace, "foo"), "")
	p.expect("A", acquire(lockspace, "foo", 0), "")
	p.expect("A", release(lockspace, "foo"), "")
	p.exists(lockspace+"/foo", true)
}

func TestLockspaceSharedAutocreate(t *testing.T) {
	t.Parallel()
	p := lockspacePair(t)
	const flags = wire.Shared | wire.Autocreate
	p.expect("A", newLockspace(lockspace), "")
	p.expect("A", acquire(lockspace, "foo", wire.Shared), noFile)
	p.expect("A", acquire(lockspace, "foo", flags), "")
	p.expect("B", acquire(lockspace, "foo", flags), "")
	p.expect("A", release(lockspace, "foo"), "")
	p.exists(lockspace+"/foo", true)
	p.expect("B", release(lockspace, "foo"), "")
	p.exists(lockspace+"/foo", false)
}

func TestLockspaceDefault(t *testing.T) {
	t.Parallel()
	p := lockspacePair(t)
	foo := data + "/foo"
	p.expect("A", acquire("", foo, 0), noFile)
	p.expect("A", create("", foo), "")
	p.exists(foo, true)
	p.expect("A", acquire("", foo, 0), "")
	p.expect("B", acquire("", foo, 0), isLocked)
	p.expect("B", remove("", foo), isLocked)
	p.expect("A", release("", foo), "")
	p.expect("B", remove("", foo), "")
	p.exists(foo, false)
	p.expect("B", acquire("", foo, wire.Autocreate), "")
	p.expect("B", release("", foo), "")
	p.exists(foo, false)
}
