// SPDX-License-Identifier: LGPL-2.1-or-later

// Package vault keeps locks and connections alive beyond the process: descriptors, and the records of what they
// mean, in the queues of sockets that somebody else holds open.
//
// A descriptor in flight in a Unix socket's queue stays open with no process involved, and with it an open file
// description lock (fcntl(2)). Each hold of a resource, each connection and each lockspace has a [Cell]: a datagram
// socket connected to itself. To store is one sendmsg(2) of the record together with the descriptors, so the
// two can't come apart; to release is one recvmsg(2), after which the kernel has no reference to the file left.
//
// The cells' own descriptors lie in the queue of the *root*, a cell too, which is written only when the pool of
// cells grows or shrinks. The root is all that has to be kept open by somebody else: the service manager's descriptor
// store, or our keeper. Beside each cell there is a word in a memory file, which lies in the root as well, for
// what changes with each request.
//
//	keeper ----> root: memory file with words
//	                   cells 1 to 16, cells 17 to 32, ...
//	                     cell 1:  hold of a disk by guest a + its pidfd + the locked file
//	                     cell 2:  connection of guest a + the socket + its pidfd
//	                     ...
//
// Recovery only ever peeks (MSG_PEEK): a process that dies in its midst changes nothing.
package vault

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// maxCells is how many cells there can be: the kernel has as many names for sockets that ask it for one
	// (unix(7), autobind).
	maxCells = 1 << 20
	// A batch of new cells is one message in the root.
	minBatch, maxBatch = 16, MaxFDs
	// rootBuffer is the root's send buffer, in bytes, as far as it may be set: room for maxCells.
	rootBuffer = 16 << 20
)

// Vault is a set of cells that outlives the process if somebody else keeps its root open.
type Vault struct {
	root   *Cell
	memory int                      // the memory file
	words  *[maxCells]atomic.Uint64 // by Cell.index; a mapping of it, never unmapped

	grow sync.Mutex // taken before mu by whoever changes the root and which cells there are

	mu      sync.Mutex // never held over a system call that can block
	cells   []*Cell    // cells[i] has the index i+1; nil: there is none
	count   int        // of cells
	free    []*Cell    // empty ones, of which the last is taken first
	idle    int        // how many of the first free ones were not taken since watch
	watched bool       // shrink will be called

	unknown int // cells whose records are not understood, as it was when they were read
}

// New makes an empty vault.
func New() (*Vault, error) {
	root, err := NewCell()
	if err != nil {
		return nil, fmt.Errorf("make a vault: %w", err)
	}
	// Without privilege the usual size has to do: some ten thousand cells.
	_ = unix.SetsockoptInt(root.FD(), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, rootBuffer)
	v := &Vault{root: root, memory: -1}
	if err := v.makeWords(); err != nil {
		v.close()
		root.Close()
		return nil, fmt.Errorf("make a vault: %w", err)
	}
	return v, nil
}

// makeWords makes the memory file and puts it into the root.
func (v *Vault) makeWords() error {
	fd, err := unix.MemfdCreate("virtlockd-vault", unix.MFD_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("memfd_create", err)
	}
	// Sparse: pages that were never written take no memory.
	if err := unix.Ftruncate(fd, int64(unsafe.Sizeof(*v.words))); err != nil {
		unix.Close(fd)
		return os.NewSyscallError("ftruncate", err)
	}
	if err := v.mapWords(fd); err != nil {
		return err
	}
	return v.root.Put(rootRecord([]int{wordsIndex}), fd)
}

// mapWords takes the memory file over.
func (v *Vault) mapWords(fd int) error {
	v.memory = fd
	p, err := unix.MmapPtr(fd, 0, nil, unsafe.Sizeof(*v.words), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return os.NewSyscallError("mmap", err)
	}
	v.words = (*[maxCells]atomic.Uint64)(p)
	return nil
}

// Root returns the descriptor that somebody else has to keep open. It stays the vault's.
func (v *Vault) Root() int { return v.root.FD() }

// Cell returns the cell of that index, nil if there is none.
func (v *Vault) Cell(index uint32) *Cell {
	v.mu.Lock()
	defer v.mu.Unlock()
	if index == 0 || index > uint32(len(v.cells)) {
		return nil
	}
	return v.cells[index-1]
}

// Size returns how many cells there are and how many of them are in use.
func (v *Vault) Size() (cells, used int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.count, v.count - len(v.free)
}

// Take returns an empty cell whose word is 0. Release it.
func (v *Vault) Take() (*Cell, error) {
	if c := v.pop(); c != nil {
		return c, nil
	}
	v.grow.Lock()
	defer v.grow.Unlock()
	if c := v.pop(); c != nil { // somebody was faster
		return c, nil
	}
	c, err := v.add()
	if err != nil {
		return nil, fmt.Errorf("the vault cannot grow: %w", err)
	}
	return c, nil
}

func (v *Vault) pop() *Cell {
	v.mu.Lock()
	defer v.mu.Unlock()
	n := len(v.free)
	if n == 0 {
		return nil
	}
	c := v.free[n-1]
	v.free = v.free[:n-1]
	v.idle = min(v.idle, n-1)
	return c
}

// errFull says that the kernel has no more names for sockets.
var errFull = errors.New("it has as many cells as there can be")

// add makes a batch of cells, of which the first is the caller's: others take the free ones as soon as there are any. v.grow is held.
func (v *Vault) add() (_ *Cell, err error) {
	n := min(max(v.count, minBatch), maxBatch) // only whoever holds grow changes it
	batch := make([]*Cell, 0, n)
	indexes := make([]int, 0, n)
	fds := make([]int, 0, n)
	defer func() {
		if err != nil {
			for _, c := range batch {
				c.Close()
			}
		}
	}()
	if v.count+n >= maxCells {
		return nil, errFull
	}
	for index := 1; len(batch) < n; index++ {
		if index <= len(v.cells) && v.cells[index-1] != nil {
			continue
		}
		c, err := NewCell()
		if err != nil {
			if len(batch) > 0 {
				break // the last descriptors that there are
			}
			return nil, err
		}
		c.index = uint32(index)
		c.word = &v.words[index]
		c.word.Store(0)
		batch = append(batch, c)
		indexes = append(indexes, index)
		fds = append(fds, c.FD())
	}
	if err := v.root.Put(rootRecord(indexes), fds...); err != nil {
		return nil, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, c := range batch {
		v.enter(c)
	}
	v.free = append(v.free, batch[1:]...)
	return batch[0], nil
}

// enter makes a cell one of the vault's, in place of another one of its index. v.mu is held, or nobody else has the vault yet.
func (v *Vault) enter(c *Cell) {
	for len(v.cells) < int(c.index) {
		v.cells = append(v.cells, nil)
	}
	if other := v.cells[c.index-1]; other != nil {
		other.Close()
	} else {
		v.count++
	}
	v.cells[c.index-1] = c
}

// Store puts a record with descriptors into a cell of its own.
func (v *Vault) Store(record []byte, fds ...int) (*Cell, error) { return v.store(0, record, fds...) }

// store sets the cell's word first: who finds the record finds that too.
func (v *Vault) store(word uint64, record []byte, fds ...int) (*Cell, error) {
	c, err := v.Take()
	if err != nil {
		return nil, err
	}
	c.word.Store(word)
	if err := c.Put(record, fds...); err != nil {
		v.Release(c)
		return nil, fmt.Errorf("the vault cannot take more: %w", err)
	}
	return c, nil
}

// Replace puts another record into a cell in place of what lies there; at no instant there is none. After an
// error the cell is as it was.
func (v *Vault) Replace(c *Cell, record []byte, fds ...int) error {
	if err := c.Put(record, fds...); err != nil {
		return fmt.Errorf("the vault cannot take more: %w", err)
	}
	c.Drop()
	return nil
}

// Release empties a cell and takes it back. One of a vault that was given up is left alone: its descriptor may be somebody else's by now.
func (v *Vault) Release(c *Cell) {
	if v.Has(c) {
		c.Empty()
		v.Return(c)
	}
}

// Return takes back a cell that is empty. One of a vault that was given up is left alone.
func (v *Vault) Return(c *Cell) {
	if !v.Has(c) {
		return
	}
	c.word.Store(0)
	v.mu.Lock()
	v.free = append(v.free, c)
	v.watch()
	v.mu.Unlock()
}

// Has tells whether a cell is one of the vault's. None is of a nil vault.
func (v *Vault) Has(c *Cell) bool {
	if v == nil {
		return false
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	return c.index != 0 && int(c.index) <= len(v.cells) && v.cells[c.index-1] == c
}

// StoreClient stores a connection, with what its word is to be; its descriptor and the peer's pidfd stay the caller's.
func (v *Vault) StoreClient(c *Client, word uint64) (*Cell, error) {
	var b [512]byte
	return v.store(word, c.record(b[:0]), c.fds()...)
}

// ReplaceClient stores what a connection has told us since.
func (v *Vault) ReplaceClient(cell *Cell, c *Client) error {
	var b [512]byte
	return v.Replace(cell, c.record(b[:0]), c.fds()...)
}

func (c *Client) fds() []int {
	if one(c.PIDFD) == 0 {
		return []int{int(c.State.FD)}
	}
	return []int{int(c.State.FD), int(c.PIDFD)}
}

// StoreLockspace stores that there is a lockspace.
func (v *Vault) StoreLockspace(dir string) (*Cell, error) { return v.Store(lockspaceRecord(dir)) }

// StoreDaemon stores the daemon's own settings, in place of what lies in the cell if that is not nil.
func (v *Vault) StoreDaemon(cell *Cell, d *Daemon) (*Cell, error) {
	if cell == nil {
		return v.Store(d.record(), d.FDs...)
	}
	return cell, v.Replace(cell, d.record(), d.FDs...)
}

// GiveUp empties and closes all cells and the root. The descriptors in them are closed, but for copies elsewhere. The
// vault is not usable afterwards, while words may still be written to.
func (v *Vault) GiveUp() {
	v.grow.Lock()
	defer v.grow.Unlock()
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, c := range v.cells {
		if c != nil {
			c.Empty()
		}
	}
	v.close()
	v.root.Empty()
	v.root.Close()
}

// Unknown returns how many cells have a record that is not understood. What lies there is somebody's lock, probably.
func (v *Vault) Unknown() int { return v.unknown }

// Close closes our descriptors. The vault is not usable afterwards; what somebody else keeps of it stays as it is.
func (v *Vault) Close() {
	v.grow.Lock()
	defer v.grow.Unlock()
	v.mu.Lock()
	defer v.mu.Unlock()
	v.close()
	v.root.Close()
}

// close closes our descriptors of everything but the root, in which it stays.
func (v *Vault) close() {
	for _, c := range v.cells {
		if c != nil {
			c.Close()
		}
	}
	if v.memory >= 0 {
		unix.Close(v.memory)
	}
	v.cells, v.free, v.count, v.idle, v.memory = nil, nil, 0, 0, -1
}
