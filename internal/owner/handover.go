// SPDX-License-Identifier: LGPL-2.1-or-later

package owner

import (
	"bytes"
	"fmt"
	"os"
	"strconv"

	"virtlockd/internal/state"
)

// Freeze stops every change of the registry until Thaw, for the time of a hand-over: no owner comes, goes or
// dies for us. The lock table is to be frozen before. Between the two, Place,
// Snapshot and an owner's PIDFD may be called, and nothing else.
func (r *Registry) Freeze() {
	r.mu.Lock()
	r.placed = nil
}

// Thaw ends Freeze.
func (r *Registry) Thaw() {
	for _, o := range r.placed {
		o.place.Store(0)
	}
	r.placed = nil
	r.mu.Unlock()
}

// Place returns where in the snapshot an owner stands, and enters it there first if need be:
// the snapshot has the owners that somebody refers to. Several goroutines may call it.
func (r *Registry) Place(o *Owner) int32 {
	if place := o.place.Load(); place != 0 {
		return place - 1
	}
	r.placing.Lock()
	defer r.placing.Unlock()
	if o.place.Load() == 0 {
		r.placed = append(r.placed, o)
		o.place.Store(int32(len(r.placed)))
	}
	return o.place.Load() - 1
}

// Snapshot returns the owners that were given a place, and those that are being ended. Their pidfds are ours still.
func (r *Registry) Snapshot() []state.Owner {
	for _, o := range r.byPID {
		if o.ending {
			r.Place(o)
		}
	}
	all := make([]state.Owner, len(r.placed))
	for i, o := range r.placed {
		all[i] = o.state()
	}
	return all
}

// PIDFD returns the owner's pidfd, state.NoFD if it has none. It is as good as State's, and may be asked for while the registry is frozen.
func (o *Owner) PIDFD() int32 {
	if o.proc == nil {
		return state.NoFD
	}
	return int32(o.proc.fd)
}

// State returns what there is to keep of an owner. Its pidfd stays ours, as long as somebody refers to the owner.
func (o *Owner) State() state.Owner {
	o.reg.mu.Lock()
	defer o.reg.mu.Unlock()
	return o.state()
}

func (o *Owner) state() state.Owner {
	s := state.Owner{Details: state.Details(*o.Details()), Kind: state.Unverified, PIDFD: o.PIDFD()}
	s.PID = o.PID
	if o.proc != nil {
		s.Kind = state.Watched
		if o.kind == Verified {
			s.Kind = state.Verified
		}
		s.Ending, s.Stopped = o.ending, o.stopped
	}
	return s
}

// Adopt takes an owner over from a snapshot. What a C daemon knew is a bare number: the process that has it
// now is watched. An owner that has ended meanwhile is adopted too; its end is noticed as
// soon as the poller runs. Release it when everything that holds something for it has
// been adopted. If there is an error, the descriptor is still the caller's.
func (r *Registry) Adopt(s *state.Owner) (*Owner, error) {
	d := Details(s.Details)
	p, err := inherited(s)
	if err != nil {
		return nil, err
	}
	if p == nil {
		return r.number(&d), nil
	}
	kind := Watched
	if s.Kind == state.Verified {
		kind = Verified
	}
	o, err := r.enter(&d, p, kind)
	if err == nil && s.Stopped {
		o.setStopped(true)
	}
	switch {
	case err != nil && s.PIDFD == state.NoFD:
		p.close()
	case err == nil && s.Ending:
		r.HangUp(o)
	}
	return o, err
}

// inherited returns the process of a snapshot's owner, nil if it is only a number.
func inherited(s *state.Owner) (*process, error) {
	if s.PIDFD != state.NoFD {
		if err := isPIDFD(int(s.PIDFD), s.PID); err != nil {
			return nil, fmt.Errorf("cannot take over owner %d of domain %q: %w", s.PID, s.Name, err)
		}
		return &process{pid: s.PID, fd: int(s.PIDFD)}, nil
	}
	if s.Kind == state.Unverified || s.PID <= 0 {
		return nil, nil
	}
	p, err := openProcess(s.PID)
	if err != nil && !noSuchProcess(err) {
		return nil, fmt.Errorf("cannot watch process %d, the owner of domain %q: %w", s.PID, s.Name, err)
	}
	return p, nil
}

// isPIDFD tells why fd is not a pidfd of that process. Its fdinfo has a line "Pid:", -1 when it has been
// reaped (proc_pid_fdinfo(5)).
func isPIDFD(fd int, pid int32) error {
	info, err := os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(fd))
	if err != nil {
		return err
	}
	for line := range bytes.Lines(info) {
		if value, ok := bytes.CutPrefix(line, []byte("Pid:")); ok {
			n, err := strconv.Atoi(string(bytes.TrimSpace(value)))
			if err == nil && (n == int(pid) || n == -1) {
				return nil
			}
			return fmt.Errorf("descriptor %d is of process %s", fd, bytes.TrimSpace(value))
		}
	}
	return fmt.Errorf("descriptor %d is not a pidfd", fd)
}
