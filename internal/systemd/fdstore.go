// SPDX-License-Identifier: LGPL-2.1-or-later

package systemd

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// The file descriptor store of who started us (sd_pid_notify_with_fds(3), sd_notify(3)): descriptors that it holds for us, and
// passes to the next process as those of socket activation. systemd has one (FileDescriptorStoreMax=), and so has our keeper.

// MaxName is how long the name of a stored descriptor may be, in bytes (FDNAME_MAX of systemd).
const MaxName = 255

// maxPassed is how many descriptors one message can carry (SCM_MAX_FD, unix(7)).
const maxPassed = 253

// ErrNoStore says that what is stored is thrown away.
var ErrNoStore = errors.New("descriptors that are stored are thrown away: see FileDescriptorStoreMax= and NotifyAccess= of the unit")

// ValidName tells whether a stored descriptor may have this name: printable ASCII without the ':' that separates names in the
// environment.
func ValidName(name string) bool {
	if name == "" || len(name) > MaxName {
		return false
	}
	for _, c := range []byte(name) {
		if c < ' ' || c >= 0x7f || c == ':' {
			return false
		}
	}
	return true
}

// Store has copies of the descriptors stored under name. That the receiver has accepted them is not known before Barrier, and then
// still not for sure: see ProbeStore. It doesn't look at them: one that has hung up stays stored (FDPOLL=0).
func (n Notifier) Store(name string, fds ...int) error {
	if !ValidName(name) {
		return fmt.Errorf("store descriptors: %q is not a possible name", name)
	}
	for len(fds) > 0 {
		some := fds[:min(len(fds), maxPassed)]
		if err := n.Send("FDSTORE=1\nFDNAME="+name+"\nFDPOLL=0", some...); err != nil {
			return fmt.Errorf("store %d descriptors as %q: %w", len(some), name, err)
		}
		fds = fds[len(some):]
	}
	return nil
}

// Remove has all descriptors of that name closed in the store. They are after Barrier.
func (n Notifier) Remove(name string) error {
	if !ValidName(name) {
		return fmt.Errorf("remove stored descriptors: %q is not a possible name", name)
	}
	if err := n.Send("FDSTOREREMOVE=1\nFDNAME=" + name); err != nil {
		return fmt.Errorf("remove the stored descriptors %q: %w", name, err)
	}
	return nil
}

// Barrier waits until the receiver has worked off all that was sent before, for timeout at most; then the error wraps
// os.ErrDeadlineExceeded. See sd_notify_barrier(3).
func (n Notifier) Barrier(timeout time.Duration) error {
	if n.address == "" {
		return nil
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return fmt.Errorf("notify barrier: %w", os.NewSyscallError("pipe2", err))
	}
	defer unix.Close(pipe[0])
	err := n.Send("BARRIER=1", pipe[1])
	unix.Close(pipe[1])
	if err != nil {
		return fmt.Errorf("notify barrier: %w", err)
	}
	done, err := ready(pipe[0], 0, timeout)
	if err == nil && !done {
		err = fmt.Errorf("%s did not answer in %v: %w", n.address, timeout, os.ErrDeadlineExceeded)
	}
	if err != nil {
		return fmt.Errorf("notify barrier: %w", err)
	}
	return nil
}

// asideTime is how long a refused descriptor may stay open after a barrier. systemd before 254 closes it first; later versions
// close it aside, which takes microseconds.
const asideTime = 5 * time.Millisecond

// ProbeStore finds out whether there is a store at all, because systemd refuses silently: it stores one end of a pair under name,
// looks whether it is still open after a barrier, and removes it. The error wraps ErrNoStore if it isn't. It takes a few
// milliseconds, timeout at most.
func (n Notifier) ProbeStore(name string, timeout time.Duration) error {
	fail := func(err error) error { return fmt.Errorf("probe the descriptor store: %w", err) }
	if n.address == "" {
		return fail(ErrNoStore)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fail(os.NewSyscallError("socketpair", err))
	}
	defer unix.Close(pair[1])
	// What processes have left there that were killed in the midst of this would fill it.
	err = n.Remove(name)
	if err == nil {
		err = n.Store(name, pair[0])
	}
	unix.Close(pair[0])
	if err == nil {
		err = n.Barrier(timeout)
	}
	if err != nil {
		return fail(err)
	}
	thrown, err := ready(pair[1], 0, asideTime)
	if err == nil && thrown {
		err = ErrNoStore
	}
	if err != nil {
		return fail(err)
	}
	return n.Remove(name)
}
