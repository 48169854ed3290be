// SPDX-License-Identifier: LGPL-2.1-or-later

package vault

import (
	"errors"
	"slices"
	"time"
)

// A free cell costs some two kilobytes of the kernel's memory and a descriptor. Where there are far more than are needed, those
// that nobody has taken for a while are closed.
//
// Descriptors can't be taken out of the midst of the root's queue. So that is turned once: the cells of the first messages
// that stay are sent again, behind all others, and only then these messages are taken out. A process that dies in
// between leaves cells that are named twice, which does no harm, and empty ones, which are free for the next process. An index
// may be given to another cell while a message is left that names the one before: the later message counts, and when the queue is
// turned the earlier one is the first to go.

// idleTime is how long free cells were not needed that are given up.
const idleTime = 5 * time.Second

// enough is how many free cells there should be. v.mu is held.
func (v *Vault) enough() int {
	used := v.count - len(v.free)
	return used + 2*minBatch
}

// watch begins to watch whether free cells are needed, if there are far more than enough. v.mu is held, or nobody else has the
// vault yet.
func (v *Vault) watch() {
	if v.watched || v.count == 0 || len(v.free) <= 2*v.enough() {
		return
	}
	v.watched, v.idle = true, len(v.free)
	time.AfterFunc(idleTime, v.shrink)
}

// shrink gives up the cells that were not needed since watch.
func (v *Vault) shrink() {
	retired, _ := v.retire() // what the kernel does not let us give up stays free, until the next time
	// Nobody waits for this, and nothing of them is in flight any more: before Linux 6.10 the kernel looks at each socket in
	// flight when one is closed (net/unix/garbage.c).
	for _, c := range retired {
		c.Close()
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.watched = false
	v.watch()
}

// retire takes cells that are not needed out of the vault, also in case of an error; the caller closes them.
func (v *Vault) retire() (retired []*Cell, err error) {
	v.grow.Lock()
	defer v.grow.Unlock()
	idle := v.takeIdle()
	if len(idle) == 0 {
		return nil, nil
	}
	turns, err := v.turns(idle)
	for _, t := range turns {
		if err = v.turn(t); err != nil {
			break
		}
		retired = append(retired, v.leave(t.gone)...)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, c := range idle {
		if v.cells[c.index-1] == c {
			v.free = append(v.free, c)
		}
	}
	return retired, err
}

// takeIdle takes cells that are not needed out of the free ones.
func (v *Vault) takeIdle() []*Cell {
	v.mu.Lock()
	defer v.mu.Unlock()
	n := v.idle - v.enough()
	if n <= v.enough() {
		return nil
	}
	idle := v.free[:n]
	v.free, v.idle = slices.Clone(v.free[n:]), 0
	return idle
}

// leave makes cells no longer the vault's. v.grow is held.
func (v *Vault) leave(indexes []int) (cells []*Cell) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, index := range indexes {
		cells = append(cells, v.cells[index-1])
		v.cells[index-1] = nil
	}
	v.count -= len(indexes)
	return cells
}

// A turn replaces the first messages of the root by one behind the others.
type turn struct {
	send []int // what stays of what is in them, by index
	gone []int // the cells that do not
	drop int   // how many messages
}

// turns plans how to turn the root's queue once, so that everything is in it once, but for the cells to be given up. v.grow is
// held.
func (v *Vault) turns(giveUp []*Cell) (all []turn, err error) {
	messages, err := v.root.messages(make([]byte, MaxRecord))
	if err != nil {
		return nil, err
	}
	// By index, until they were seen.
	stays, goes := make([]bool, len(v.cells)+1), make([]bool, len(v.cells)+1)
	for i, c := range v.cells {
		stays[i+1] = c != nil
	}
	stays[wordsIndex] = true
	for _, c := range giveUp {
		stays[c.index], goes[c.index] = false, true
	}
	var t turn
	for _, m := range messages {
		indexes, err := openRoot(m)
		if err != nil {
			return nil, err
		}
		send, gone := take(indexes, stays), take(indexes, goes)
		if len(t.send)+len(send) > MaxFDs {
			all, t = append(all, t), turn{}
		}
		t.send, t.gone, t.drop = append(t.send, send...), append(t.gone, gone...), t.drop+1
	}
	return append(all, t), nil
}

// take returns those of indexes that are in a set, and takes them out of it.
func take(indexes []int, set []bool) (taken []int) {
	for _, i := range indexes {
		if set[i] {
			taken = append(taken, i)
			set[i] = false
		}
	}
	return taken
}

// turn makes one. v.grow is held.
func (v *Vault) turn(t turn) error {
	if len(t.send) > 0 {
		fds := make([]int, len(t.send))
		for i, index := range t.send {
			if fds[i] = v.memory; index != wordsIndex {
				fds[i] = v.cells[index-1].FD()
			}
		}
		if err := v.root.Put(rootRecord(t.send), fds...); err != nil {
			return err
		}
	}
	for range t.drop {
		if !v.root.Drop() {
			return errors.New("the root of the vault lacks a message")
		}
	}
	return nil
}
