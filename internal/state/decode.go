// SPDX-License-Identifier: LGPL-2.1-or-later

package state

import (
	"encoding/base64"
	"fmt"
	"math"
	"math/bits"
	"slices"
	"strconv"
	"strings"
)

// Version of the keys that only our own daemon writes. It rises when an older one would
// misread them; keys that are merely new do not count.
const Version = 1

// extra is the key of what the C daemon has no place for.
const extra = "virtlockd-go"

// Decode reads a hand-over file of process pid: ours, or the C daemon's of any release since 1.0.1. It goes on
// where something is wrong with a part: problems then say what, and what became of it. The snapshot is
// nil with an error.
//
// Errors: *SyntaxError, *MagicError.
func Decode(data []byte, pid int32) (*Snapshot, []Problem, error) {
	if len(data) >= aheadSize {
		if s := decodeAhead(data, pid); s != nil {
			return s, nil, nil
		}
	}
	return decode(data, pid, nil)
}

func decode(data []byte, pid int32, a *ahead) (*Snapshot, []Problem, error) {
	d := newDecoder(data)
	d.ahead = a
	if d.peek() != '{' {
		d.unexpected()
	}
	magic := d.document()
	if d.err == nil && (d.peek() != 0 || d.pos < len(data)) {
		d.unexpected()
	}
	if d.err != nil {
		return nil, nil, d.err
	}
	if magic != strconv.Itoa(int(pid)) {
		return nil, nil, &MagicError{Got: magic, Want: pid}
	}
	d.snap.PID = pid
	return d.snap, d.problems, nil
}

func newDecoder(data []byte) *decoder {
	return &decoder{
		scanner: scanner{data: data},
		snap:    &Snapshot{PIDFile: NoFD, Vault: NoFD},
		fds:     descriptors{},
		spaces:  map[string]*space{},
	}
}

type decoder struct {
	scanner
	ahead    *ahead // nil: nobody reads ahead
	at       []step
	problems []Problem
	snap     *Snapshot
	fds      descriptors       // all in the snapshot
	pending  []pending         // of the lockspace that is being read
	spaces   map[string]*space // by directory, "": the default one
	ordered  []*space          // the same
	numbers  []int32           // see take
	times    []int64           // the same
}

// object reads an object, calling f for each of the keys that it has; f reads the value. Others are
// skipped, like in the C daemon. It returns the keys seen, as bits.
func (d *decoder) object(keys []string, f func(k int)) (seen uint32, ok bool) {
	if d.peek() != '{' {
		d.skip()
		return 0, false
	}
	next := 0 // where the next key is in a file whose writer has our order
	for more := d.enter('}'); more; more = d.more('}') {
		name := d.expect(keys, next)
		if name == nil {
			name = d.key()
		}
		k := next
		for n := 0; k >= len(keys) || keys[k] != string(name); n++ {
			if n > len(keys) {
				k = -1
				break
			}
			if k++; k >= len(keys) {
				k = 0
			}
		}
		if k < 0 {
			d.skip()
			continue
		}
		next = k + 1
		d.at = append(d.at, step{key: name})
		if seen&(1<<k) != 0 {
			d.skip()
			d.kept(Duplicate, "the key is there twice; the first one counts")
		} else {
			seen |= 1 << k
			f(k)
		}
		d.at = d.at[:len(d.at)-1]
	}
	return seen, true
}

// expect reads the key keys[next] and its colon if that is what comes, as it does in a file of our own.
func (d *decoder) expect(keys []string, next int) []byte {
	if next >= len(keys) {
		return nil
	}
	n, rest := len(keys[next]), d.data[d.pos:]
	if len(rest) < n+3 || rest[0] != '"' || string(rest[1:n+1]) != keys[next] || rest[n+1] != '"' || rest[n+2] != ':' {
		return nil
	}
	d.pos += n + 3
	return rest[1 : n+1]
}

// room is for how many clients or resources to make room: hardly more fit into the rest of the file. To grow step by
// step is to touch twice the memory, and new memory costs nothing until it is touched.
func (d *decoder) room() int { return (len(d.data)-d.pos)/128 + 1 }

// array reads an array, calling f for each element.
func (d *decoder) array(f func(i int)) {
	if d.peek() != '[' {
		d.skip()
		d.kept(WrongType, "not an array; taken as empty")
		return
	}
	i := 0
	for more := d.enter(']'); more; more = d.more(']') {
		d.at = append(d.at, step{index: i})
		f(i)
		d.at = d.at[:len(d.at)-1]
		i++
	}
}

// integer reads a whole number between lo and hi. It returns def, after a report, for anything else.
func (d *decoder) integer(lo int64, hi uint64, def int64) (neg bool, n uint64) {
	defNeg, defN := def < 0, uint64(max(def, -def))
	c := d.peek()
	if n, ok := d.digits(hi); ok {
		return false, n
	}
	if c != '-' && (c < '0' || c > '9') {
		d.skip()
		d.kept(WrongType, fmt.Sprintf("not a number; taken as %d", def))
		return defNeg, defN
	}
	text := d.number()
	if d.err != nil {
		return defNeg, defN
	}
	digits := text
	if neg = text[0] == '-'; neg {
		digits = text[1:]
	}
	ok := true
	for _, c := range digits {
		if c < '0' || c > '9' {
			ok = false // a fraction or an exponent
			break
		}
		high, low := bits.Mul64(n, 10)
		sum, carry := bits.Add64(low, uint64(c-'0'), 0)
		ok = ok && high == 0 && carry == 0
		n = sum
	}
	if n == 0 {
		neg = false
	}
	if !ok || neg && n > uint64(-lo) || !neg && n > hi {
		d.kept(OutOfRange, fmt.Sprintf("%s is not a whole number from %d to %d; taken as %d", clip(text), lo, hi, def))
		return defNeg, defN
	}
	return neg, n
}

// digits reads a whole number up to hi in its usual form: up to 18 digits.
func (d *decoder) digits(hi uint64) (n uint64, ok bool) {
	i := d.pos
	for ; i < len(d.data) && i < d.pos+18; i++ {
		c := d.data[i] - '0'
		if c > 9 {
			break
		}
		n = 10*n + uint64(c)
	}
	if i == d.pos || i == len(d.data) || n > hi || d.data[d.pos] == '0' && i > d.pos+1 {
		return 0, false
	}
	if c := d.data[i]; c != ',' && c != '}' && c != ']' {
		return 0, false
	}
	d.pos = i
	return n, true
}

// clip shortens what a file says for a log.
func clip(text []byte) string {
	const most = 64
	if len(text) > most {
		return string(text[:most]) + "..."
	}
	return string(text)
}

func (d *decoder) u64() uint64 {
	_, n := d.integer(0, math.MaxUint64, 0)
	return n
}

func (d *decoder) u32(def uint32) uint32 {
	_, n := d.integer(0, math.MaxUint32, int64(def))
	return uint32(n)
}

func (d *decoder) i32(lo, def int32) int32 {
	neg, n := d.integer(int64(lo), math.MaxInt32, int64(def))
	if neg {
		return int32(-int64(n))
	}
	return int32(n)
}

func (d *decoder) fd() int32 { return d.i32(-1, NoFD) }

// claim enters a descriptor into the snapshot, once only.
func (d *decoder) claim(fd int32) bool {
	if fd < 0 {
		return false
	}
	return d.fds.add(fd)
}

// descriptors is a set of them, in which those with near numbers share their memory.
type descriptors map[int32]*[64]uint64

// add tells whether fd was not in the set.
func (s descriptors) add(fd int32) bool {
	part := s[fd>>12]
	if part == nil {
		part = new([64]uint64)
		s[fd>>12] = part
	}
	word, bit := &part[fd>>6&63], uint64(1)<<(fd&63)
	if *word&bit != 0 {
		return false
	}
	*word |= bit
	return true
}

// pid reads a process id: 32 bits that the C daemon writes without sign, extended to 64 in a list.
func (d *decoder) pid() (int32, bool) {
	before := len(d.problems)
	neg, n := d.integer(math.MinInt32, math.MaxUint64, 0)
	switch {
	case len(d.problems) > before:
		return 0, false
	case neg:
		return int32(-int64(n)), true
	case n <= math.MaxUint32, n >= math.MaxUint64-math.MaxInt32:
		return int32(uint32(n)), true
	}
	d.kept(OutOfRange, fmt.Sprintf("%d is not a process id; taken as 0", n))
	return 0, false
}

func (d *decoder) boolean(def bool) bool {
	switch d.peek() {
	case 't':
		d.literal("true")
		return true
	case 'f':
		d.literal("false")
		return false
	}
	d.skip()
	d.kept(WrongType, fmt.Sprintf("neither true nor false; taken as %t", def))
	return def
}

// text reads a string. It is part of the file's bytes.
func (d *decoder) text() ([]byte, bool) {
	if d.peek() == '"' {
		return d.str(), true
	}
	d.skip()
	d.kept(WrongType, "not a string; taken as empty")
	return nil, false
}

// base64 reads bytes.
func (d *decoder) base64() ([]byte, bool) {
	text, ok := d.text()
	if !ok || len(text) == 0 {
		return nil, false
	}
	b, err := base64.StdEncoding.Strict().AppendDecode(nil, text)
	if err != nil {
		d.kept(OutOfRange, "not base64; taken as empty")
		return nil, false
	}
	return b, true
}

// name is a string with the key of its exact bytes.
type name struct {
	text, bytes []byte
	exact       bool
}

func (n *name) String() string {
	if n.exact {
		return string(n.bytes)
	}
	return string(n.text)
}

func (d *decoder) name(n *name)  { n.text, _ = d.text() }
func (d *decoder) bytes(n *name) { n.bytes, n.exact = d.base64() }

func (d *decoder) uuid() [16]byte {
	text, ok := d.text()
	if !ok {
		return [16]byte{}
	}
	u, ok := parseUUID(text)
	if !ok {
		d.kept(OutOfRange, fmt.Sprintf("%q is not a UUID; taken as zeros", clip(text)))
	}
	return u
}

var documentKeys = []string{"daemon", "defaultLockspace", "lockspaces", "magic", extra, "server"}

const (
	documentDaemon = iota
	documentDefault
	documentLockspaces
	documentMagic
	documentExtra
	documentServer
)

// document reads the whole file and returns its magic.
func (d *decoder) document() (magic string) {
	var old int // where the value of "server" stands
	seen, _ := d.object(documentKeys, func(k int) {
		switch k {
		case documentDaemon:
			d.daemon()
		case documentDefault:
			if !d.catchUp(k) {
				d.lockspace(true)
			}
		case documentLockspaces:
			if !d.catchUp(k) {
				d.array(func(int) { d.lockspace(false) })
			}
		case documentMagic:
			if text, ok := d.text(); ok {
				magic = string(text)
			}
		case documentExtra:
			d.extra()
		case documentServer:
			d.peek()
			old = d.pos
			d.skip()
		}
	})
	required := uint32(1<<documentDaemon | 1<<documentDefault | 1<<documentLockspaces)
	if seen&(1<<documentDaemon|1<<documentServer) == 1<<documentServer {
		// Releases 1.0.1 to 1.2: one server, without a name.
		required &^= 1 << documentDaemon
		if d.err == nil {
			end := d.pos
			d.pos = old
			d.at = append(d.at, step{key: []byte("server")})
			d.snap.Lock = d.server(false)
			d.at = d.at[:0]
			d.pos = end
		}
	}
	d.missing(documentKeys, seen, required, "not in the file; taken as empty")
	if d.snap.Lock == nil {
		d.lost(Missing, "there is no server virtlockd: its sockets and clients are not known")
	}
	d.finish()
	return magic
}

func (d *decoder) daemon() {
	seen, ok := d.object([]string{"servers"}, func(int) {
		switch d.peek() {
		case '{':
			d.servers()
		case '[':
			// Before servers had names: the first is virtlockd.
			d.array(func(i int) {
				if i == 0 {
					d.snap.Lock = d.server(false)
				} else {
					d.forget("a list of servers has virtlockd alone")
				}
			})
		default:
			d.skip()
			d.kept(WrongType, "neither an object nor an array; taken as empty")
		}
	})
	switch {
	case !ok:
		d.kept(WrongType, "not an object; taken as empty")
	case seen == 0:
		d.kept(Missing, "has no servers; taken as empty")
	}
}

func (d *decoder) servers() {
	var admin, lock bool
	for more := d.enter('}'); more; more = d.more('}') {
		key := d.key()
		d.at = append(d.at, step{key: key})
		switch {
		case string(key) == "virtlockd" && !lock:
			lock = true
			d.snap.Lock = d.server(false)
		case string(key) == "admin" && !admin:
			admin = true
			d.snap.Admin = d.server(true)
		default:
			d.forget("a server that virtlockd does not have, or has once")
		}
		d.at = d.at[:len(d.at)-1]
	}
}

// forget reads a server without keeping it, but for its descriptors.
func (d *decoder) forget(why string) {
	known := d.fds
	mark := len(d.problems)
	d.fds = descriptors{}
	s := d.server(false)
	d.fds = known
	var fds []int32
	for _, p := range d.problems[mark:] {
		fds = append(fds, p.FDs...)
	}
	d.problems = d.problems[:mark]
	if s != nil {
		for _, v := range s.Services {
			for _, k := range v.Sockets {
				fds = append(fds, k.FD)
			}
		}
		for i := range s.Clients {
			fds = append(fds, s.Clients[i].FD)
		}
	}
	d.lost(Foreign, why, fds...)
}

var serverKeys = []string{"min_workers", "max_workers", "priority_workers", "max_clients", "max_anonymous_clients",
	"keepaliveInterval", "keepaliveCount", "next_client_id", "services", "clients"}

const (
	serverMinWorkers = iota
	serverMaxWorkers
	serverPriorityWorkers
	serverMaxClients
	serverMaxUnauth
	serverKeepaliveInterval
	serverKeepaliveCount
	serverNextClientID
	serverServices
	serverClients
)

func (d *decoder) server(admin bool) *Server {
	s := &Server{}
	seen, ok := d.object(serverKeys, func(k int) {
		switch k {
		case serverMinWorkers:
			s.MinWorkers = d.u32(0)
		case serverMaxWorkers:
			s.MaxWorkers = d.u32(0)
		case serverPriorityWorkers:
			s.PriorityWorkers = d.u32(0)
		case serverMaxClients:
			s.MaxClients = d.u32(0)
		case serverMaxUnauth:
			s.MaxUnauth = d.u32(0)
		case serverKeepaliveInterval:
			s.KeepaliveInterval = d.u32(math.MaxUint32)
		case serverKeepaliveCount:
			s.KeepaliveCount = d.u32(0)
		case serverNextClientID:
			_, s.NextClientID = d.integer(0, maxClientID+1, 0)
		case serverServices:
			d.array(func(int) { d.service(s) })
		case serverClients:
			d.array(func(i int) {
				if i == 0 && !admin {
					s.Clients = make([]Client, 0, d.room())
				}
				d.client(s, admin)
			})
		}
	})
	if !ok {
		d.lost(WrongType, "not an object")
		return nil
	}
	const optional = 1<<serverMaxUnauth | 1<<serverNextClientID
	d.missing(serverKeys, seen, (1<<len(serverKeys)-1)&^optional, "not in the file; taken as 0, or as empty")
	switch {
	case seen&(1<<serverMaxUnauth) == 0:
		s.MaxUnauth = s.MaxClients
	case s.MaxUnauth > s.MaxClients:
		d.kept(Contradiction, fmt.Sprintf("max_anonymous_clients is %d, above max_clients; taken as %d", s.MaxUnauth, s.MaxClients))
		s.MaxUnauth = s.MaxClients
	}
	d.assignIDs(s, seen&(1<<serverNextClientID) != 0)
	return s
}

// maxClientID leaves room to count on.
const maxClientID = math.MaxInt64

// assignIDs gives an id to clients that have none, or one that another has already.
func (d *decoder) assignIDs(s *Server, told bool) {
	if told && s.ascend() {
		return // as in a file of our own
	}
	ids := make(map[uint64]struct{}, len(s.Clients))
	top := uint64(0)
	for i := range s.Clients {
		c := &s.Clients[i]
		if _, taken := ids[c.ID]; taken {
			d.kept(Duplicate, fmt.Sprintf("two clients have the id %d; the one with descriptor %d gets a new one", c.ID, c.FD))
			c.ID = 0
		}
		if c.ID != 0 {
			ids[c.ID] = struct{}{}
			top = max(top, c.ID)
		}
	}
	switch {
	case !told:
		s.NextClientID = top + 1
		d.kept(Missing, fmt.Sprintf("next_client_id is not in the file; taken as %d", s.NextClientID))
	case s.NextClientID <= top:
		d.kept(Contradiction, fmt.Sprintf("next_client_id is %d, but there is a client %d; taken as %d", s.NextClientID, top, top+1))
		s.NextClientID = top + 1
	}
	next := uint64(1) // for the case that there is no room above
	for i := range s.Clients {
		c := &s.Clients[i]
		if c.ID != 0 {
			continue
		}
		if s.NextClientID <= maxClientID {
			c.ID = s.NextClientID
			s.NextClientID++
			continue
		}
		for ; ; next++ {
			if _, taken := ids[next]; !taken {
				break
			}
		}
		c.ID = next
		next++
	}
}

// ascend tells whether the ids of clients rise up to the next one.
func (s *Server) ascend() bool {
	last := uint64(0)
	for i := range s.Clients {
		if s.Clients[i].ID <= last {
			return false
		}
		last = s.Clients[i].ID
	}
	return last < s.NextClientID
}

var (
	serviceKeys = []string{"auth", "readonly", "nrequests_client_max", "socks"}
	socketKeys  = []string{"fd", "isClient", "unlinkUNIX"}
)

func (d *decoder) service(s *Server) {
	v := Service{MaxRequests: 1}
	seen, ok := d.object(serviceKeys, func(k int) {
		switch serviceKeys[k] {
		case "auth":
			v.Auth = d.i32(0, 0)
		case "readonly":
			v.ReadOnly = d.boolean(false)
		case "nrequests_client_max":
			v.MaxRequests = d.u32(1)
		case "socks":
			d.array(func(int) {
				fd, unlink := d.socket(false)
				switch {
				case fd == NoFD:
					d.lost(Missing, "a listening socket without descriptor")
				case !d.claim(fd):
					d.lost(Duplicate, fmt.Sprintf("descriptor %d is named already; this socket is left out", fd))
				default:
					v.Sockets = append(v.Sockets, Socket{FD: fd, Unlink: unlink})
				}
			})
		}
	})
	if !ok {
		d.lost(WrongType, "not an object")
		return
	}
	d.missing(serviceKeys, seen, 1<<len(serviceKeys)-1, "not in the file; taken as off, 1, or empty")
	s.Services = append(s.Services, v)
}

// socket reads a socket's object.
func (d *decoder) socket(client bool) (fd int32, unlink bool) {
	fd = NoFD
	isClient := client
	seen, _ := d.object(socketKeys, func(k int) {
		switch socketKeys[k] {
		case "fd":
			fd = d.fd()
		case "isClient":
			isClient = d.boolean(client)
		case "unlinkUNIX":
			unlink = d.boolean(!client)
		}
	})
	if seen&(1<<2) == 0 {
		unlink = !isClient
	}
	return fd, unlink
}

var clientKeys = []string{"id", "auth", "auth_pending", "readonly", "nrequests_max", "conn_time", "sock", "privateData", extra}

const (
	clientID = iota
	clientAuth
	clientAuthPending
	clientReadOnly
	clientMaxRequests
	clientConnTime
	clientSock
	clientPrivateData
	clientExtra
)

func (d *decoder) client(s *Server, admin bool) {
	const ns = 1_000_000_000
	c := Client{FD: NoFD, MaxRequests: 1, Self: None}
	var x clientExtras
	private := false
	var connTime, connNsec int64
	seen, ok := d.object(clientKeys, func(k int) {
		switch k {
		case clientID:
			if _, c.ID = d.integer(0, maxClientID, 0); c.ID == 0 {
				d.kept(OutOfRange, "not the id of a client; it gets a new one")
			}
		case clientAuth:
			c.Auth = d.i32(0, 0)
		case clientAuthPending:
			c.AuthPending = d.boolean(false)
		case clientReadOnly:
			c.ReadOnly = d.boolean(false)
		case clientMaxRequests:
			c.MaxRequests = d.u32(1)
		case clientConnTime:
			_, n := d.integer(0, math.MaxInt64/ns-1, 0)
			connTime = int64(n) * ns
		case clientSock:
			c.FD, _ = d.socket(true)
		case clientPrivateData:
			private = d.privateData(&c, admin)
		case clientExtra:
			d.clientExtra(&c, &x)
			connNsec = int64(x.connNsec)
		}
	})
	if seen&(1<<clientAuthPending) == 0 {
		c.AuthPending = c.Auth != 0
	}
	c.ConnectTime = connTime + connNsec
	if x.told {
		if c.Registered = !x.unregistered; x.unregistered {
			c.Owner = Details{}
		}
	}
	if admin {
		c.Self = None
	}
	switch {
	case !ok:
		d.lost(WrongType, "not an object")
		return
	case c.FD == NoFD:
		d.lost(Missing, "a client without descriptor")
		return
	case c.AuthPending && c.Auth == 0:
		d.lost(Contradiction, "the client has yet to authenticate, but need not", c.FD)
		return
	case !private:
		d.lost(Missing, "the client has no privateData", c.FD)
		return
	case !d.claim(c.FD):
		d.lost(Duplicate, fmt.Sprintf("descriptor %d is named already; this client is left out", c.FD))
		return
	}
	const optional = 1<<clientID | 1<<clientAuthPending | 1<<clientConnTime | 1<<clientExtra
	d.missing(clientKeys, seen, (1<<len(clientKeys)-1)&^optional, "not in the file; taken as off, or 1")
	s.Clients = append(s.Clients, c)
}

var privateKeys = []string{"restricted", "ownerPid", "ownerId", "ownerName", "ownerUUID", "ownerNameBytes"}

const (
	privateRestricted = iota
	privatePID
	privateID
	privateName
	privateUUID
	privateNameBytes
)

// privateData reads what a program keeps of its client. The admin program keeps nothing.
func (d *decoder) privateData(c *Client, admin bool) bool {
	if admin {
		_, ok := d.object(nil, nil)
		return ok
	}
	var n name
	null, havePID := false, false
	seen, ok := d.object(privateKeys, func(k int) {
		switch k {
		case privateRestricted:
			// In doubt a client may do less.
			c.Restricted = d.boolean(true)
		case privatePID:
			c.Owner.PID, havePID = d.pid()
		case privateID:
			c.Owner.ID = d.u32(0)
		case privateName:
			if null = d.peek() == 'n'; null {
				d.literal("null")
				return
			}
			d.name(&n)
		case privateUUID:
			c.Owner.UUID = d.uuid()
		case privateNameBytes:
			d.bytes(&n)
		}
	})
	if !ok {
		return false
	}
	c.Owner.Name = n.String()
	if seen&(1<<privateRestricted) == 0 {
		c.Restricted = true
	}
	const all = 1<<privatePID | 1<<privateID | 1<<privateName | 1<<privateUUID
	c.Registered = havePID
	switch {
	case c.Owner == Details{} && (null || seen&all == all || seen&all == 0):
		// A client that has not registered. The C daemon itself ends rather than write one, but reads
		// what Encode writes for it, and writes that again.
		c.Registered = false
		seen |= all
	case null:
		d.kept(Missing, "ownerName is null; taken as empty")
	}
	d.missing(privateKeys, seen, all|1<<privateRestricted, "not in the file; taken as empty, 0 or true")
	if !c.Registered {
		c.Owner = Details{}
	}
	return true
}

// clientExtras are those of a client's extra keys that are not fields of their own.
type clientExtras struct {
	connNsec           uint64
	told, unregistered bool
}

var clientExtraKeys = []string{"connNsec", "peer", "uptime", "self", "unregistered", "unread", "dropped", "fds", "lastFD", "unsent",
	"closing", "undo", "cell"}

func (d *decoder) clientExtra(c *Client, x *clientExtras) {
	_, ok := d.object(clientExtraKeys, func(k int) {
		switch clientExtraKeys[k] {
		case "connNsec":
			_, x.connNsec = d.integer(0, 999_999_999, 0)
		case "peer":
			c.Peer = d.i32(0, 0)
		case "uptime":
			_, n := d.integer(0, math.MaxInt64, 0)
			c.Uptime = int64(n)
		case "self":
			c.Self = d.i32(0, None)
		case "unregistered":
			x.told, x.unregistered = true, d.boolean(false)
		case "unread":
			c.Unread, _ = d.base64()
		case "dropped":
			c.Dropped = d.u32(0)
		case "fds":
			c.FDs = d.u32(0)
		case "lastFD":
			c.LastFD = d.boolean(false)
		case "unsent":
			c.Unsent, _ = d.base64()
		case "closing":
			c.Closing = d.boolean(false)
		case "undo":
			c.Undo = d.undo()
		case "cell":
			c.Cell = d.u32(0)
		}
	})
	if !ok {
		d.kept(WrongType, "not an object; ignored")
	}
}

var undoKeys = []string{"lockspace", "resource", "lockspaceBytes", "resourceBytes"}

func (d *decoder) undo() *Undo {
	var space, resource name
	_, ok := d.object(undoKeys, func(k int) {
		switch undoKeys[k] {
		case "lockspace":
			d.name(&space)
		case "resource":
			d.name(&resource)
		case "lockspaceBytes":
			d.bytes(&space)
		case "resourceBytes":
			d.bytes(&resource)
		}
	})
	if !ok {
		d.kept(WrongType, "not an object; ignored")
		return nil
	}
	return &Undo{Lockspace: space.String(), Resource: resource.String()}
}

// space is a lockspace while its file is read.
type space struct {
	at        []step // where it is
	dir       string
	cell      uint32
	resources []Resource
	waiting   []waiting      // what is still to be found for each of them
	names     map[string]int // places in resources
}

// waiting are the owners of a resource. They are found when the whole file has been read, because their table may stand
// behind it.
type waiting struct {
	index        int // of the resource in the file
	pids, places []int32
}

var lockspaceKeys = []string{"directory", "resources", "directoryBytes", extra}

var lockspaceExtraKeys = []string{"cell"}

func (d *decoder) lockspace(isDefault bool) {
	var dir name
	var cell uint32
	var s *space
	if isDefault {
		s = d.space("", 0, d.room())
	}
	d.pending = d.pending[:0]
	seen, ok := d.object(lockspaceKeys, func(k int) {
		switch lockspaceKeys[k] {
		case "directory":
			d.name(&dir)
		case "resources":
			d.array(func(i int) {
				switch {
				case i > 0:
				case isDefault:
					s.names = make(map[string]int, d.room()/2) // unlike an array it touches all its memory
				case cap(d.pending) < 2:
					d.pending = make([]pending, 0, d.room())
				}
				if d.resource(i); isDefault { // its directory is known: there is nothing to wait for
					for j := range d.pending {
						d.enroll(s, &d.pending[j])
					}
					d.pending = d.pending[:0]
				}
			})
		case "directoryBytes":
			d.bytes(&dir)
		case extra:
			if _, ok := d.object(lockspaceExtraKeys, func(int) { cell = d.u32(0) }); !ok {
				d.kept(WrongType, "not an object; ignored")
			}
		}
	})
	if !ok {
		d.lost(WrongType, "not an object")
		return
	}
	path, rs := dir.String(), d.pending
	if path == "" && !isDefault {
		var fds []int32
		for i := range rs {
			fds = append(fds, rs[i].fd)
		}
		d.lost(Missing, "a lockspace without directory", fds...)
		return
	}
	d.missing(lockspaceKeys, seen, 1<<1, "not in the file; taken as empty")
	if isDefault {
		return
	}
	if s = d.spaces[path]; s == nil {
		s = d.space(path, cell, len(rs))
		s.names = make(map[string]int, len(rs))
	} else {
		d.kept(Duplicate, "the lockspace is there twice; its resources are taken together")
	}
	d.at = append(d.at, step{key: []byte("resources")}, step{})
	for i := range rs {
		d.at[len(d.at)-1].index = rs[i].index
		d.enroll(s, &rs[i])
	}
	d.at = d.at[:len(d.at)-2]
}

// space enters a lockspace, with room for so many resources.
func (d *decoder) space(dir string, cell uint32, room int) *space {
	s := &space{
		at: slices.Clone(d.at), dir: dir, cell: cell,
		resources: make([]Resource, 0, room), waiting: make([]waiting, 0, room),
	}
	d.spaces[dir] = s
	d.ordered = append(d.ordered, s)
	return s
}

var resourceKeys = []string{"name", "path", "fd", "lockHeld", "flags", "owners", extra, "nameBytes", "pathBytes"}

const (
	resourceName = iota
	resourcePath
	resourceFD
	resourceHeld
	resourceFlags
	resourceOwners
	resourceExtra
	resourceNameBytes
	resourcePathBytes
)

// pending is a resource as the file has it.
type pending struct {
	index        int
	seen         uint32
	name, path   name
	fd           int32
	held         bool
	flags        uint32
	pids, places []int32
	since        []int64
	file         File
	cells        []uint32
}

func (d *decoder) resource(index int) {
	d.pending = append(d.pending, pending{index: index, fd: NoFD, held: true})
	r := &d.pending[len(d.pending)-1]
	seen, ok := d.object(resourceKeys, func(k int) {
		switch k {
		case resourceName:
			d.name(&r.name)
		case resourcePath:
			d.name(&r.path)
		case resourceFD:
			r.fd = d.fd()
		case resourceHeld:
			r.held = d.boolean(true)
		case resourceFlags:
			r.flags = d.u32(0)
		case resourceOwners:
			start := len(d.numbers)
			d.array(func(int) {
				if pid, ok := d.pid(); ok {
					d.numbers = append(d.numbers, pid)
				}
			})
			r.pids = d.take(start)
		case resourceExtra:
			d.resourceExtra(r)
		case resourceNameBytes:
			d.bytes(&r.name)
		case resourcePathBytes:
			d.bytes(&r.path)
		}
	})
	if !ok {
		d.lost(WrongType, "not an object")
		d.pending = d.pending[:len(d.pending)-1]
		return
	}
	r.seen = seen
}

// take returns the numbers from start on. Thousands of lists with one number each share their memory.
func (d *decoder) take(start int) []int32 { return slices.Clip(d.numbers[start:]) }

var resourceExtraKeys = []string{"owners", "since", "dev", "ino", "block", "posix", "remote", "exclusive", "cells"}

func (d *decoder) resourceExtra(r *pending) {
	_, ok := d.object(resourceExtraKeys, func(k int) {
		switch resourceExtraKeys[k] {
		case "owners":
			start := len(d.numbers)
			d.array(func(int) { d.numbers = append(d.numbers, d.i32(0, None)) })
			r.places = d.take(start)
		case "since":
			start := len(d.times)
			d.array(func(int) {
				_, t := d.integer(0, math.MaxInt64, 0)
				d.times = append(d.times, int64(t))
			})
			r.since = slices.Clip(d.times[start:])
		case "dev":
			r.file.Dev = d.u64()
		case "ino":
			r.file.Ino = d.u64()
		case "block":
			r.file.Block = d.boolean(false)
		case "posix":
			r.file.POSIX = d.boolean(false)
		case "remote":
			r.file.Remote = d.boolean(false)
		case "exclusive":
			r.file.Exclusive = d.boolean(false)
		case "cells":
			d.array(func(int) { r.cells = append(r.cells, d.u32(0)) })
		}
	})
	if !ok {
		d.kept(WrongType, "not an object; ignored")
	}
}

// enroll enters a resource into its lockspace.
func (d *decoder) enroll(s *space, p *pending) {
	r := Resource{Path: p.path.String(), FD: p.fd, Held: p.held, Flags: p.flags, Since: p.since, File: p.file, Cells: p.cells}
	prefix := ""
	if s.dir != "" {
		prefix = s.dir + "/"
	}
	text := p.name.text
	if p.name.exact {
		text = p.name.bytes
	}
	// Mostly the same bytes in memory are good for both.
	if r.Name = strings.TrimPrefix(r.Path, prefix); len(text) > 0 && string(text) != r.Name {
		r.Name = string(text)
	}
	if r.Name == "" {
		d.lost(Missing, "a resource without name", p.fd)
		return
	}
	if r.Path == "" {
		r.Path = prefix + r.Name
	}
	const required = 1<<resourceName | 1<<resourcePath | 1<<resourceHeld | 1<<resourceFlags
	d.missing(resourceKeys, p.seen, required, "not in the file; taken as the other of name and path, true, or 0")
	if first, taken := s.names[r.Name]; taken {
		f := &s.waiting[first]
		f.pids = append(f.pids, p.pids...)
		f.places = append(f.places, p.places...)
		d.lost(Duplicate, fmt.Sprintf("the lockspace has a resource %q already; only the owners of this one are kept, with that one", r.Name), p.fd)
		return
	}
	switch {
	case r.FD == NoFD:
		d.kept(Missing, "no descriptor: the lock is lost")
	case !d.claim(r.FD):
		d.kept(Duplicate, fmt.Sprintf("descriptor %d is named already, so it is not that of this resource: the lock is lost", r.FD))
		r.FD = NoFD
	}
	s.names[r.Name] = len(s.resources)
	s.resources = append(s.resources, r)
	s.waiting = append(s.waiting, waiting{p.index, p.pids, p.places})
}

var extraKeys = []string{"version", "startTime", "upgrades", "pidFile", "timeout", "owners",
	"logLevel", "logFilters", "logOutputs", "logLevelBytes", "logFiltersBytes", "logOutputsBytes", "startDir", "startDirBytes", "frozen", "epoll",
	"recoveries", "vault", "cell", "configuredClients", "configuredAdminClients", "began", "anotherVault", "vaultKept"}

const (
	extraLog      = 6 // the first of the log settings
	extraLogBytes = 9
)

func (d *decoder) extra() {
	var log [3]name
	var dir name
	seen, ok := d.object(extraKeys, func(k int) {
		switch extraKeys[k] {
		case "version":
			if v := d.u32(Version); v > Version {
				d.kept(Foreign, fmt.Sprintf("written by a newer virtlockd with version %d of its keys, we know %d; read as far as we know them", v, Version))
			}
		case "startTime":
			_, n := d.integer(0, math.MaxInt64, 0)
			d.snap.StartTime = int64(n)
		case "upgrades":
			d.snap.Upgrades = d.u64()
		case "frozen":
			_, n := d.integer(0, math.MaxInt64, 0)
			d.snap.Frozen = int64(n)
		case "pidFile":
			d.snap.PIDFile = d.ownFD()
		case "epoll":
			d.snap.Epoll = d.epoll()
		case "timeout":
			v := d.u32(0)
			d.snap.Timeout = &v
		case "owners":
			d.array(func(i int) {
				if i == 0 {
					d.snap.Owners = slices.Grow(d.snap.Owners, d.room())
				}
				d.owner()
			})
		case "recoveries":
			d.snap.Recoveries = d.u64()
		case "configuredClients":
			d.snap.Configured[0] = d.u32(0)
		case "configuredAdminClients":
			d.snap.Configured[1] = d.u32(0)
		case "vault":
			d.snap.Vault = d.ownFD()
		case "cell":
			d.snap.Cell = d.u32(0)
		case "vaultKept":
			d.snap.VaultKept = d.boolean(false)
		case "anotherVault":
			d.snap.AnotherVault = d.boolean(false)
		case "began":
			d.snap.Began = d.u64()
		case "startDir":
			d.name(&dir)
		case "startDirBytes":
			d.bytes(&dir)
		default:
			if k < extraLogBytes {
				d.name(&log[k-extraLog])
			} else {
				d.bytes(&log[k-extraLogBytes])
			}
		}
	})
	if !ok {
		d.kept(WrongType, "not an object; ignored")
	}
	d.snap.StartDir = dir.String()
	for i, setting := range []**string{&d.snap.LogLevel, &d.snap.LogFilters, &d.snap.LogOutputs} {
		if seen&(1<<(extraLog+i)|1<<(extraLogBytes+i)) != 0 {
			v := log[i].String()
			*setting = &v
		}
	}
}

var epollKeys = []string{"fd", "generation"}

func (d *decoder) epoll() *Epoll {
	e := Epoll{FD: NoFD}
	seen, ok := d.object(epollKeys, func(k int) {
		switch epollKeys[k] {
		case "fd":
			e.FD = d.ownFD()
		case "generation":
			e.Generation = d.i32(math.MinInt32, 0)
		}
	})
	switch {
	case !ok:
		d.kept(WrongType, "not an object; ignored")
		return nil
	case seen != 1<<len(epollKeys)-1:
		d.kept(Missing, "a key of the epoll set is not in the file; ignored")
		return nil
	case e.FD == NoFD:
		return nil
	}
	return &e
}

// ownFD reads a descriptor that is of use to our own daemon only.
func (d *decoder) ownFD() int32 {
	fd := d.fd()
	if fd != NoFD && !d.claim(fd) {
		d.kept(Duplicate, fmt.Sprintf("descriptor %d is named already; ignored here", fd))
		fd = NoFD
	}
	return fd
}

var ownerKeys = []string{"pid", "kind", "name", "id", "uuid", "pidfd", "ending", "stopped", "startTime", "nameBytes"}

// owner reads an entry of the table. Even a wrong one takes its place, because others are counted.
func (d *decoder) owner() {
	o := Owner{PIDFD: NoFD}
	var n name
	seen, ok := d.object(ownerKeys, func(k int) {
		switch ownerKeys[k] {
		case "pid":
			o.PID, _ = d.pid()
		case "kind":
			text, _ := d.text()
			k := slices.Index(kinds[:], string(text))
			if k < 0 {
				d.kept(OutOfRange, fmt.Sprintf("%q is no kind of owner that we know; taken as %s", clip(text), Unknown))
				k = int(Unknown)
			}
			o.Kind = Kind(k)
		case "name":
			d.name(&n)
		case "id":
			o.ID = d.u32(0)
		case "uuid":
			o.UUID = d.uuid()
		case "pidfd":
			o.PIDFD = d.ownFD()
		case "ending":
			o.Ending = d.boolean(false)
		case "stopped":
			o.Stopped = d.boolean(false)
		case "startTime":
			o.StartTime = d.u64()
		case "nameBytes":
			d.bytes(&n)
		}
	})
	if !ok {
		d.kept(WrongType, "not an object; taken as an unknown owner with process id 0")
	} else {
		d.missing(ownerKeys, seen, 1, "not in the file; taken as 0")
	}
	o.Name = n.String()
	d.snap.Owners = append(d.snap.Owners, o)
}

// finish puts together what stood in different places of the file.
func (d *decoder) finish() {
	told := len(d.snap.Owners) // those after them have been found by their number alone
	byPID := make(map[int32]int32, told)
	for i := range d.snap.Owners {
		if _, known := byPID[d.snap.Owners[i].PID]; !known {
			byPID[d.snap.Owners[i].PID] = int32(i)
		}
	}
	for _, s := range d.ordered {
		if d.err != nil {
			return
		}
		d.at = append(append(d.at[:0], s.at...), step{key: []byte("resources")}, step{})
		for i := range s.resources {
			w := &s.waiting[i]
			d.at[len(d.at)-1].index = w.index
			res := &s.resources[i]
			res.Owners = d.owners(w, told, byPID)
			if len(res.Cells) != 0 && len(res.Cells) != len(res.Owners) {
				d.kept(Contradiction, "there are not as many cells as owners; they are ignored")
				res.Cells = nil
			}
		}
		rs := s.resources
		if len(rs) == 0 {
			rs = nil
		}
		if s.dir == "" {
			d.snap.Default = rs
		} else {
			d.snap.Lockspaces = append(d.snap.Lockspaces, Lockspace{Dir: s.dir, Resources: rs, Cell: s.cell})
		}
	}
	d.at = d.at[:0]
	if d.snap.Lock == nil {
		return
	}
	for i := range d.snap.Lock.Clients {
		c := &d.snap.Lock.Clients[i]
		if c.Self != None && (!c.Registered || int(c.Self) >= told || d.snap.Owners[c.Self].PID != c.Owner.PID) {
			d.kept(Contradiction, fmt.Sprintf("client %d is said to be owner %d, which is another process or none; taken as not proven", c.ID, c.Self))
			c.Self = None
		}
		if place, known := byPID[c.Owner.PID]; c.Registered && known && int(place) >= told {
			// The latest to speak for it.
			d.snap.Owners[place].Details = c.Owner
		}
	}
}

// owners finds the owners of a resource, in the table as the file told it, or by their numbers.
func (d *decoder) owners(r *waiting, told int, byPID map[int32]int32) []int32 {
	good := len(r.places) == len(r.pids)
	for i := 0; good && i < len(r.places); i++ {
		place := int(r.places[i])
		good = 0 <= place && place < told && d.snap.Owners[place].PID == r.pids[i]
	}
	switch {
	case len(r.pids) == 0:
		d.kept(NoOwners, "the resource has no owners")
		return nil
	case good:
		return r.places
	}
	if r.places != nil {
		d.kept(Contradiction, "the table of owners names other processes; the numbers here count")
	}
	owners := make([]int32, len(r.pids))
	for i, pid := range r.pids {
		place, known := byPID[pid]
		if !known {
			place = int32(len(d.snap.Owners))
			byPID[pid] = place
			d.snap.Owners = append(d.snap.Owners, Owner{Details: Details{PID: pid}, PIDFD: NoFD})
		}
		owners[i] = place
	}
	return owners
}
