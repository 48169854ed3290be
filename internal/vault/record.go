// SPDX-License-Identifier: LGPL-2.1-or-later

package vault

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"sync"

	"virtlockd/internal/state"
	"virtlockd/internal/xdr"
)

// A record is one message in a cell: what the descriptors that came with it mean.
//
//	offset 0   magic        4 bytes
//	       4   version      2
//	       6   kind         1
//	       7   descriptors  1, how many came with it
//	       8   checksum     4, CRC-32C of the whole record with zeros here
//	      12   fields       in XDR (RFC 4506)
//
// All numbers are big-endian. A program that does not know a version or a kind leaves the cell alone.
const (
	magic      = 0x764C636B // "vLck"
	version    = 1
	headerSize = 12

	offKind     = 6
	offFDs      = 7
	offChecksum = 8
)

// MaxRecord is the size of the largest record, in bytes: an owner's name has up to 64 KiB, the two paths of a lock
// together less than 16 KiB. A larger one is not stored.
const MaxRecord = 96 << 10

// Kind says what a record is about.
type Kind uint8

// The kinds of records, with their descriptors in order.
const (
	KindRoot      Kind = iota + 1 // the vault itself: its words, or some cells
	KindDaemon                    // the daemon's own settings: pid file and listening sockets, as its fields say
	KindLockspace                 // a lockspace: none
	KindHold                      // one owner's hold of one resource: its pidfd, if any; the locked file
	KindClient                    // a connection: itself; its pidfd, if the peer is an owner that registered itself
)

// maxString bounds each string of a record, in bytes, as the lock protocol does.
const maxString = 65536

// castagnoli is made when it is first needed: that takes a tenth of a millisecond, for which each start would have to wait.
var castagnoli = sync.OnceValue(func() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) })

// begin appends the header of a record. seal completes it.
func begin(b []byte, kind Kind, fds int) []byte {
	b = binary.BigEndian.AppendUint32(b, magic)
	b = binary.BigEndian.AppendUint16(b, version)
	return append(b, byte(kind), byte(fds), 0, 0, 0, 0)
}

// seal sets the checksum.
func seal(record []byte) []byte {
	sum := record[offChecksum:headerSize]
	clear(sum)
	binary.BigEndian.PutUint32(sum, crc32.Checksum(record, castagnoli()))
	return record
}

// Errors of a record that cannot be used.
var (
	ErrBroken  = errors.New("the record is damaged")
	ErrVersion = errors.New("the record was written by a later version of this program")
)

// open checks a record and returns what is in it.
func open(record []byte) (kind Kind, fds int, fields xdr.Decoder, err error) {
	if len(record) < headerSize || binary.BigEndian.Uint32(record) != magic {
		return 0, 0, fields, ErrBroken
	}
	if v := binary.BigEndian.Uint16(record[4:]); v != version {
		return 0, 0, fields, fmt.Errorf("%w: %d, and this one knows %d", ErrVersion, v, version)
	}
	sum := binary.BigEndian.Uint32(record[offChecksum:])
	var zeros [4]byte
	actual := crc32.Update(0, castagnoli(), record[:offChecksum])
	actual = crc32.Update(actual, castagnoli(), zeros[:])
	actual = crc32.Update(actual, castagnoli(), record[headerSize:])
	if sum != actual {
		return 0, 0, fields, ErrBroken
	}
	return Kind(record[offKind]), int(record[offFDs]), xdr.NewDecoder(record[headerSize:]), nil
}

// wordsIndex stands for the memory file with the words in a record of the root, where cells have their indexes.
const wordsIndex = 0

// rootRecord says what a message in the root has, by indexes: runs of them, each as its first one and how many.
func rootRecord(indexes []int) []byte {
	b := begin(nil, KindRoot, len(indexes))
	for len(indexes) > 0 {
		n := 1
		for n < len(indexes) && indexes[n] == indexes[0]+n {
			n++
		}
		b = xdr.AppendUint32(b, uint32(indexes[0]))
		b = xdr.AppendUint32(b, uint32(n))
		indexes = indexes[n:]
	}
	return seal(b)
}

// openRoot returns the indexes in a message of the root.
func openRoot(m []byte) ([]int, error) {
	kind, n, d, err := open(m)
	if err != nil {
		return nil, err
	}
	if kind != KindRoot || n > MaxFDs {
		return nil, ErrBroken
	}
	indexes := make([]int, 0, n)
	for len(indexes) < n {
		first, count := int(d.Uint32()), int(d.Uint32())
		if d.Err() != nil || count == 0 || count > n-len(indexes) || first+count > maxCells {
			return nil, ErrBroken
		}
		for i := range count {
			indexes = append(indexes, first+i)
		}
	}
	return indexes, nil
}

// Origin names the request that a hold was acquired by: the n-th of a client.
type Origin struct{ Client, Request uint64 }

// Hold is one owner's hold of one resource.
type Hold struct {
	Origin
	Since           int64 // when it was acquired, ns since the epoch
	Lockspace, Name string
	Flags           uint32 // of the resource's first acquisition
	Owner           state.Owner
	File            state.File
}

// Layout of File, at the beginning of a hold's fields, so that a worker process can fill it in.
const (
	fileBlock = 1 << iota
	fileRemote
	fileExclusive
)

// Record appends the hold's record, with room for its File: SetFile completes it.
func (h *Hold) Record(b []byte) []byte {
	b = begin(b, KindHold, 1+one(h.Owner.PIDFD))
	b = xdr.AppendUint64(b, 0) // File, see SetFile
	b = xdr.AppendUint64(b, 0)
	b = xdr.AppendUint32(b, 0)
	b = xdr.AppendUint64(b, h.Client)
	b = xdr.AppendUint64(b, h.Request)
	b = xdr.AppendInt64(b, h.Since)
	b = xdr.AppendString(b, h.Lockspace)
	b = xdr.AppendString(b, h.Name)
	b = xdr.AppendUint32(b, h.Flags)
	return appendOwner(b, &h.Owner.Details, h.Owner.Kind)
}

// one is how many descriptors an optional one is.
func one(fd int32) int {
	if fd == state.NoFD {
		return 0
	}
	return 1
}

// SetFile completes a hold's record by what its file is.
func SetFile(record []byte, f state.File) {
	binary.BigEndian.PutUint64(record[headerSize:], f.Dev)
	binary.BigEndian.PutUint64(record[headerSize+8:], f.Ino)
	var flags uint32
	for _, bit := range []struct {
		set  bool
		flag uint32
	}{{f.Block, fileBlock}, {f.Remote, fileRemote}, {f.Exclusive, fileExclusive}} {
		if bit.set {
			flags |= bit.flag
		}
	}
	binary.BigEndian.PutUint32(record[headerSize+16:], flags)
	seal(record)
}

func appendOwner(b []byte, o *state.Details, kind state.Kind) []byte {
	b = xdr.AppendUint32(b, uint32(kind))
	b = xdr.AppendInt32(b, o.PID)
	b = xdr.AppendUint32(b, o.ID)
	b = append(b, o.UUID[:]...)
	return xdr.AppendString(b, o.Name)
}

func decodeOwner(d *xdr.Decoder) (o state.Details, kind state.Kind) {
	kind = state.Kind(d.Uint32())
	o.PID = d.Int32()
	o.ID = d.Uint32()
	copy(o.UUID[:], d.Fixed(len(o.UUID)))
	o.Name = d.String(maxString)
	return o, kind
}

func decodeHold(d *xdr.Decoder) (h Hold, err error) {
	h.File.Dev = d.Uint64()
	h.File.Ino = d.Uint64()
	flags := d.Uint32()
	h.File.Block = flags&fileBlock != 0
	h.File.Remote = flags&fileRemote != 0
	h.File.Exclusive = flags&fileExclusive != 0
	h.Client = d.Uint64()
	h.Request = d.Uint64()
	h.Since = d.Int64()
	h.Lockspace = d.String(maxString)
	h.Name = d.String(maxString)
	h.Flags = d.Uint32()
	h.Owner.Details, h.Owner.Kind = decodeOwner(d)
	h.Owner.PIDFD = state.NoFD
	return h, d.Err()
}

// Client is a connection and what it has told us. Of State all is kept that does not change with each request.
type Client struct {
	Admin bool // of the admin server
	State state.Client
	// PIDFD is the peer's own, if it has registered itself, else state.NoFD.
	PIDFD int32
}

func (c *Client) record(b []byte) []byte {
	s := &c.State
	b = begin(b, KindClient, 1+one(c.PIDFD))
	b = xdr.AppendBool(b, c.Admin)
	b = xdr.AppendUint64(b, s.ID)
	b = xdr.AppendInt64(b, s.ConnectTime)
	b = xdr.AppendInt64(b, s.Uptime)
	b = xdr.AppendBool(b, s.Registered)
	b = xdr.AppendBool(b, s.Restricted)
	b = xdr.AppendBool(b, s.ReadOnly)
	return seal(appendOwner(b, &s.Owner, state.Verified))
}

func decodeClient(d *xdr.Decoder) (c Client, err error) {
	s := &c.State
	c.PIDFD = state.NoFD
	c.Admin = d.Bool()
	s.ID = d.Uint64()
	s.ConnectTime = d.Int64()
	s.Uptime = d.Int64()
	s.Registered = d.Bool()
	s.Restricted = d.Bool()
	s.ReadOnly = d.Bool()
	s.Owner, _ = decodeOwner(d)
	s.FD, s.MaxRequests, s.Self = state.NoFD, 1, state.None
	return c, d.Err()
}

func lockspaceRecord(dir string) []byte {
	return seal(xdr.AppendString(begin(nil, KindLockspace, 0), dir))
}

// Daemon is what the daemon itself wants to find again.
type Daemon struct {
	// State is a snapshot in the form of package state, without locks and clients, whose descriptors are the
	// places of those in FDs.
	State []byte
	FDs   []int
}

func (d *Daemon) record() []byte {
	return seal(xdr.AppendBytes(begin(nil, KindDaemon, len(d.FDs)), d.State))
}
