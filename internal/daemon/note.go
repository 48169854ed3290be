// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"runtime/debug"
	"time"

	"virtlockd/internal/events"
	"virtlockd/internal/state"
)

// The note in the run directory says which locks there are, a few seconds late. It is read when everything else was lost: the daemon was
// killed together with whoever kept its locks. Then the next one can at least say whose they were.
const (
	noteName  = "virtlockd-locks.note"
	noteEvery = 4 * time.Second
	noteMost  = 1000 // locks in it
	noteBytes = 128  // of a guest's name, which can be long; a path can't
)

func (p paths) note() string { return filepath.Join(p.runDir, noteName) }

// keepNote writes the note whenever locks have changed, until ctx ends. When they have not for a while, what the changes have left
// in memory goes back to the kernel: a host that has started its guests may not change anything for days.
func (d *daemon) keepNote(ctx context.Context) {
	tick := time.NewTicker(noteEvery)
	defer tick.Stop()
	for untidy := true; ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if now := d.table.Serial(); d.noted.Swap(now) == now {
				if untidy {
					debug.FreeOSMemory()
				}
				untidy = false
			} else {
				untidy = true
				if err := d.writeNote(); err != nil {
					d.log.Debug("the note of what is locked was not written", "error", err)
				}
			}
		}
	}
}

func (d *daemon) writeNote() error {
	var b bytes.Buffer
	for from, n := 0, 0; ; {
		entries, next := d.table.List(from, 16)
		for i := range entries {
			for _, h := range entries[i].Holds {
				if n++; n > noteMost {
					fmt.Fprintln(&b, "and more")
					return d.putNote(b.Bytes())
				}
				o := h.Owner.Details()
				fmt.Fprintf(&b, "%q held by domain %q (%s), process %d\n", entries[i].Path, o.Name[:min(len(o.Name), noteBytes)], o.UUIDString(), h.Owner.PID)
			}
		}
		if from = next; from == 0 {
			break
		}
	}
	return d.putNote(b.Bytes())
}

// putNote replaces the note, or with nothing in it removes it.
func (d *daemon) putNote(text []byte) error {
	if !d.noting.TryLock() {
		d.noted.Store(unnoted)
		return errors.New("a hand-over to the C daemon is under way, which it would outlive")
	}
	defer d.noting.Unlock()
	if len(text) == 0 {
		return state.Remove(d.paths.note())
	}
	return state.Write(d.paths.note(), text)
}

// readNote says what an earlier daemon has lost. It is called where nothing was taken over: nobody kept its locks.
func (d *daemon) readNote() {
	data, err := state.Read(d.paths.note())
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err == nil {
		for line := range bytes.Lines(data) { // of any length
			line = bytes.TrimSuffix(line, []byte("\n"))
			d.log.Error("a lock was lost: the daemon before this one was killed together with whoever kept its locks, or nobody did; suspend and resume the guest to lock its disk again",
				"lock", string(line))
			d.events.Add(events.Event{Kind: events.Lost, Reason: events.Gone, Text: "by the daemon before this one, which was killed: " + string(line)})
		}
	}
	if err := errors.Join(err, state.Remove(d.paths.note())); err != nil {
		d.log.Warn("the note of what was locked is of no use", "error", err)
	}
}

// unnoted is a number that the table never has.
const unnoted = ^uint64(0)

// leaveNote is forgetNote for a hand-over. Nobody writes another one before release is called. It does not wait for one that is being written.
func (d *daemon) leaveNote() (release func(), err error) {
	if !d.noting.TryLock() {
		return nil, fmt.Errorf("the note of what is locked is just being written, %w", errBusy)
	}
	d.forgetNote()
	return d.noting.Unlock, nil
}

// forgetNote removes the note, because no lock is lost. If the daemon goes on after all, it writes another one.
func (d *daemon) forgetNote() {
	d.noted.Store(unnoted)
	if err := state.Remove(d.paths.note()); err != nil {
		d.log.Warn("the note of what was locked stays", "error", err)
	}
}
