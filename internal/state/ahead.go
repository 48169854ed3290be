// SPDX-License-Identifier: LGPL-2.1-or-later

package state

import "bytes"

// ahead reads the lockspaces on a goroutine of its own, while the servers before them are read, because everybody waits for
// a hand-over. It believes that they stand where they seem to. What it has read is used where the reader of the
// whole file arrives at the same places, and only of a file that nothing is wrong with: so it makes no difference.
type ahead struct {
	*decoder
	done     chan struct{} // closed when it has read all that it can
	from, to [2]int        // where in the file the default lockspace and the others stand
}

// aheadSize is the size of a file, in bytes, from which on it pays.
const aheadSize = 128 << 10

// decodeAhead is decode in less time. nil: there is something to say about the file, by who reads all of it in order.
func decodeAhead(data []byte, pid int32) *Snapshot {
	a := &ahead{decoder: newDecoder(data), done: make(chan struct{})}
	go func() {
		defer close(a.done)
		a.depth = 1
		// By the part of the key that begins with a rare byte: that is found ten times as fast.
		begin, rare := next(documentDefault), len(`,"default`)
		if at := bytes.Index(data, begin[rare:]); at >= rare {
			a.pos = at - rare
			a.section(documentDefault, func() { a.lockspace(true) })
			a.section(documentLockspaces, func() { a.array(func(int) { a.lockspace(false) }) })
		}
	}()
	s, problems, err := decode(data, pid, a)
	<-a.done // data is the caller's
	if err != nil || len(problems) > 0 {
		return nil
	}
	return s
}

// next is how a key of the document begins that is not the first one.
func next(key int) []byte { return []byte(`,"` + documentKeys[key] + `":`) }

// section reads the value of a key of the document, if that comes now.
func (a *ahead) section(key int, read func()) {
	begin := next(key)
	if a.err != nil || !bytes.HasPrefix(a.data[a.pos:], begin) {
		return
	}
	a.pos += len(begin)
	a.from[key-documentDefault] = a.pos
	a.at = []step{{key: []byte(documentKeys[key])}}
	read()
	a.to[key-documentDefault] = a.pos
}

// catchUp takes over what was read ahead of a key of the document, if that is what stands here.
func (d *decoder) catchUp(key int) bool {
	a := d.ahead
	if a == nil {
		return false
	}
	<-a.done
	i := key - documentDefault
	ok := a.err == nil && len(a.problems) == 0 && d.err == nil && d.pos == a.from[i]
	if ok && key == documentDefault {
		// All at once: if the others were read ahead too, they come next.
		if ok = len(d.ordered) == 0 && d.fds.join(a.fds); ok {
			d.spaces, d.ordered = a.spaces, a.ordered
		}
	}
	if !ok {
		d.ahead = nil
		return false
	}
	d.pos = a.to[i]
	return true
}

// join adds the other set. false: they have something in common.
func (s descriptors) join(other descriptors) bool {
	for at, part := range other {
		mine := s[at]
		if mine == nil {
			s[at] = part
			continue
		}
		for i := range mine {
			if mine[i]&part[i] != 0 {
				return false
			}
			mine[i] |= part[i]
		}
	}
	return true
}
