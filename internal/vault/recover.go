// SPDX-License-Identifier: LGPL-2.1-or-later

package vault

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"virtlockd/internal/fdtable"
)

// Open opens the vault whose root was kept. The root's descriptor is the vault's from now on, if there is no
// error. Nothing in it is changed.
//
// Errors: ErrEmpty of a vault that was given up; ErrTruncated, ErrVersion, ErrBroken, or what the kernel says.
func Open(root int) (_ *Vault, err error) {
	v := &Vault{root: At(root), memory: -1}
	defer func() {
		if err != nil {
			v.close()
			err = fmt.Errorf("open the vault: %w", err)
		}
	}()
	messages, err := v.root.messages(make([]byte, MaxRecord))
	if err != nil {
		return nil, err
	}
	if len(messages) == 0 {
		return nil, ErrEmpty
	}
	fdtable.Reserve(len(messages) * maxBatch * perCell)
	at := 0
	for _, m := range messages {
		if err := v.openBatch(m, at); err != nil {
			return nil, err
		}
		at += len(m)
	}
	if v.words == nil {
		return nil, errors.New("its root has no memory file")
	}
	for _, c := range v.cells {
		if c != nil {
			c.word = &v.words[c.index]
		}
	}
	return v, nil
}

// perCell is how many descriptors a cell and what lies in it take.
const perCell = 3

// openBatch opens what a message in the root has, which begins so many bytes behind the first one. Of two that name a cell
// the later one counts: see shrink.
func (v *Vault) openBatch(m []byte, at int) error {
	indexes, err := openRoot(m)
	if err != nil {
		return err
	}
	fds, err := v.root.peekAt(at, len(indexes))
	if err != nil {
		return err
	}
	for i, fd := range fds {
		switch index := indexes[i]; {
		case index != wordsIndex:
			v.enter(newCell(fd, uint32(index)))
		case v.words == nil && err == nil:
			err = v.mapWords(fd)
		default: // the same file again
			unix.Close(fd)
		}
	}
	return err
}

// Found is what lies in a cell. One of the pointers is set, or Err; none where nothing lies in a cell that a worker process of an
// earlier daemon may still put something into.
type Found struct {
	Cell      *Cell
	Hold      *Hold
	Client    *Client
	Lockspace *string
	Daemon    *Daemon
	// Err says why the record can't be used. The cell is left as it is.
	Err error

	fds int
}

// Contents reads the records of all cells, in the order of their indexes; empty ones are free from now on. Descriptors are not opened. A
// cell in which a record was just being replaced is left with the later one.
func (v *Vault) Contents() ([]Found, error) {
	return v.contents(func(*Cell) bool { return true })
}

func (v *Vault) contents(of func(*Cell) bool) ([]Found, error) {
	buf := make([]byte, MaxRecord)
	var all []Found
	v.free = v.free[:0]
	for _, c := range slices.Backward(v.cells) {
		if c == nil || !of(c) {
			continue
		}
		// A hold's record is never replaced: it is the only one. That is nearly all there is.
		if n, _, errno := receive(c.FD(), buf, nil, unix.MSG_PEEK); errno == 0 {
			if f := decode(buf[:n]); f.Hold != nil {
				f.Cell = c
				all = append(all, f)
				continue
			}
		}
		messages, err := c.messages(buf)
		if err != nil {
			return nil, fmt.Errorf("read cell %d of the vault: %w", c.index, err)
		}
		switch {
		case len(messages) == 0 && Worker(c.word.Load()) != 0:
			all = append(all, Found{Cell: c})
			continue
		case len(messages) == 0:
			c.word.Store(0)
			v.free = append(v.free, c)
			continue
		}
		f := decode(messages[len(messages)-1])
		f.Cell = c
		if f.Err == nil && f.Hold == nil { // a worker process that looks into it, too, can make us see a message twice
			for range len(messages) - 1 {
				c.Drop()
			}
		}
		if f.Err != nil {
			v.unknown++
		}
		all = append(all, f)
	}
	slices.Reverse(all)
	v.watch() // the process before this one may have had more to do
	return all, nil
}

// ErrKind is the Err of a record that a later version of this program has written.
var ErrKind = errors.New("the record is of a kind that this program does not know")

func decode(record []byte) (f Found) {
	kind, fds, d, err := open(record)
	f.fds = fds
	if err != nil {
		f.Err = err
		return f
	}
	switch kind {
	case KindHold:
		var h Hold
		h, f.Err = decodeHold(&d)
		f.Hold = &h
	case KindClient:
		var c Client
		c, f.Err = decodeClient(&d)
		f.Client = &c
	case KindLockspace:
		s := d.String(maxString)
		f.Lockspace, f.Err = &s, d.Err()
	case KindDaemon:
		f.Daemon = &Daemon{State: slices.Clone(d.Bytes(MaxRecord))}
		f.Err = d.Err()
	default:
		f.Err = ErrKind
	}
	if f.Err != nil {
		return Found{Err: f.Err, fds: fds}
	}
	return f
}

// Descriptors opens those that came with the record, in the order of its kind; of the hold of a file on a disk that may hang only the
// pidfd, because even to close such a file can hang.
func (f *Found) Descriptors() ([]int, error) {
	n := f.fds
	if f.Hold != nil && f.Hold.File.Remote {
		n--
	}
	fds, err := f.Cell.Peek(n)
	if err != nil {
		return nil, fmt.Errorf("cell %d of the vault: %w", f.Cell.index, err)
	}
	return fds, nil
}

// HasPIDFD tells whether the first descriptor of a hold, or the second one of a client, is a pidfd.
func (f *Found) HasPIDFD() bool { return f.fds > 1 }

// Claim says which cells are in use, after a live upgrade: all others are free, but for those in which something lies. These are
// returned. After an error the vault is closed, but for its root, which is the caller's again.
func (v *Vault) Claim(used []uint32) ([]Found, error) {
	claimed := make([]bool, len(v.cells)+1)
	for _, i := range used {
		if int(i) < len(claimed) {
			claimed[i] = true
		}
	}
	strays, err := v.contents(func(c *Cell) bool { return !claimed[c.index] })
	if err != nil {
		v.close()
	}
	return strays, err
}
