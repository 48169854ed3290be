// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"errors"
	"io/fs"
	"os"
	"testing"
)

// No note outlives a hand-over to the C daemon, whoever is first: a hand-over does not go on while one is being written, and none is
// written once it has begun.
func TestNoteAtHandOver(t *testing.T) {
	t.Parallel()
	d := &daemon{paths: paths{runDir: t.TempDir()}}
	put := func() error { return d.putNote([]byte("a lock\n")) }
	if err := put(); err != nil {
		t.Fatal(err)
	}
	d.noting.Lock() // it is being written
	if _, err := d.leaveNote(); !errors.Is(err, errBusy) {
		t.Errorf("a hand-over while a note is being written: %v, want errBusy", err)
	}
	d.noting.Unlock()
	release, err := d.leaveNote()
	if err != nil {
		t.Fatal(err)
	}
	d.noted.Store(1) // by who writes one, a moment later
	if err := put(); err == nil {
		t.Error("a note is written while a hand-over is under way")
	}
	if _, err := os.Stat(d.paths.note()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("there is a note: %v", err)
	}
	release() // it has failed
	if d.noted.Load() != unnoted {
		t.Error("nobody knows that the note is missing")
	}
	if err := put(); err != nil {
		t.Error(err)
	}
}
