// SPDX-License-Identifier: LGPL-2.1-or-later

package state

import (
	"encoding/base64"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"unicode/utf8"
)

// Reader is the daemon that a file is written for.
type Reader uint8

// The readers.
const (
	Ours Reader = iota // ours, in this or another version
	C                  // the C daemon: its keys and nothing else
)

// Encode writes a snapshot. The file for Ours can be read by the C daemon as well, as far as ForC says that
// the snapshot can.
//
// Errors: *NotForCError when the C daemon would end, losing every lock, or be wrong; or that the snapshot
// refers to an owner that it does not have.
func Encode(s *Snapshot, r Reader) ([]byte, error) { return AppendTo(nil, s, r) }

// AppendTo is Encode into the memory behind b, as far as there is enough of it.
func AppendTo(b []byte, s *Snapshot, r Reader) ([]byte, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	e := encode(b, s, r)
	if r == C {
		if obstacles := blocking(e.obstacles(s)); len(obstacles) > 0 {
			return nil, &NotForCError{Obstacles: obstacles}
		}
	}
	return e.b, nil
}

// Room is how much memory the encoding of so many clients and resources usually takes, in bytes.
func Room(clients, resources int) int {
	return 4096 + clients*(clientRoom+ownerRoom) + resources*resourceRoom
}

// What is usual, so that growing is the exception.
const (
	clientRoom, resourceRoom, ownerRoom = 448, 384, 256
)

// check finds references to nothing, which would be a mistake of the caller.
func (s *Snapshot) check() error {
	n := int32(len(s.Owners))
	if s.Lock != nil {
		for i := range s.Lock.Clients {
			if c := &s.Lock.Clients[i]; c.Self < None || c.Self >= n {
				return fmt.Errorf("cannot encode the state: client %d refers to owner %d of %d", c.ID, c.Self, n)
			}
		}
	}
	for dir, rs := range s.spaces() {
		for i := range rs {
			for _, o := range rs[i].Owners {
				if o < 0 || o >= n {
					return fmt.Errorf("cannot encode the state: resource %q of lockspace %q refers to owner %d of %d", rs[i].Name, dir, o, n)
				}
			}
		}
	}
	return nil
}

// spaces ranges over all lockspaces, the default one as "".
func (s *Snapshot) spaces() func(yield func(string, []Resource) bool) {
	return func(yield func(string, []Resource) bool) {
		if !yield("", s.Default) {
			return
		}
		for i := range s.Lockspaces {
			if !yield(s.Lockspaces[i].Dir, s.Lockspaces[i].Resources) {
				return
			}
		}
	}
}

// encode writes the servers and the rest side by side, because everybody waits for a hand-over.
func encode(b []byte, s *Snapshot, r Reader) *encoder {
	resources, clients := 0, 0
	for _, rs := range s.spaces() {
		resources += len(rs)
	}
	for _, srv := range []*Server{s.Admin, s.Lock} {
		if srv != nil {
			clients += len(srv.Clients)
		}
	}
	front := 2048 + clientRoom*clients
	whole := slices.Grow(b, front+2048+resourceRoom*resources+ownerRoom*len(s.Owners))
	start := len(whole)
	middle := start + front
	first, second := &encoder{reader: r, b: whole[:start:middle]}, &encoder{reader: r, b: whole[middle:middle]}
	if clients >= worthwhile {
		var both sync.WaitGroup
		both.Go(func() { second.rest(s) })
		first.servers(s)
		both.Wait()
	} else {
		first.servers(s)
		second.rest(s)
	}
	if cap(first.b) == middle { // it had room enough, and goes on where the other one began
		first.b = whole[:len(first.b)]
	}
	first.b = append(first.b, second.b...)
	return first
}

// worthwhile is from how many clients on it pays to work side by side: to begin with that takes some 50 us.
const worthwhile = 250

// An encoder appends JSON without white space.
type encoder struct {
	b      []byte
	reader Reader
}

// open begins an object or array.
func (e *encoder) open(c byte) { e.b = append(e.b, c) }

// end ends an object or array, with the comma that may stand behind its last member.
func (e *encoder) end(c byte) {
	if last := len(e.b) - 1; e.b[last] == ',' {
		e.b = e.b[:last]
	}
	e.b = append(e.b, c, ',')
}

// key appends a key that needs no escapes.
func (e *encoder) key(k string) {
	e.b = append(e.b, '"')
	e.b = append(e.b, k...)
	e.b = append(e.b, '"', ':')
}

func (e *encoder) uint(k string, v uint64) {
	e.key(k)
	e.b = append(strconv.AppendUint(e.b, v, 10), ',')
}

func (e *encoder) int(k string, v int64) {
	e.key(k)
	e.b = append(strconv.AppendInt(e.b, v, 10), ',')
}

func (e *encoder) bool(k string, v bool) {
	e.key(k)
	e.b = append(strconv.AppendBool(e.b, v), ',')
}

// yes is bool for a key that is left out when false.
func (e *encoder) yes(k string, v bool) {
	if v {
		e.bool(k, v)
	}
}

// some is uint for a key that is left out when 0.
func (e *encoder) some(k string, v uint64) {
	if v != 0 {
		e.uint(k, v)
	}
}

func (e *encoder) base64(k string, v []byte) {
	e.key(k)
	e.b = append(e.b, '"')
	e.b = base64.StdEncoding.AppendEncode(e.b, v)
	e.b = append(e.b, '"', ',')
}

// string appends text, and beside it its exact bytes where they can't be text.
func (e *encoder) string(k, v string) {
	e.key(k)
	exact := e.quote(v)
	e.b = append(e.b, ',')
	if !exact && e.reader == Ours {
		e.base64(k+"Bytes", []byte(v))
	}
}

// escapes are the control characters with a short form.
var escapes = [0x20]byte{'\b': 'b', '\f': 'f', '\n': 'n', '\r': 'r', '\t': 't'}

// quote appends a JSON string. Bytes that are not UTF-8 become U+FFFD; exact tells that there were none.
func (e *encoder) quote(v string) (exact bool) {
	const hex = "0123456789ABCDEF"
	exact = true
	e.b = append(e.b, '"')
	start := 0
	for i := 0; i < len(v); {
		c := v[i]
		switch {
		case c >= utf8.RuneSelf:
			r, n := utf8.DecodeRuneInString(v[i:])
			if r == utf8.RuneError && n == 1 {
				exact = false
				e.b = append(e.b, v[start:i]...)
				e.b = append(e.b, "\uFFFD"...)
				start = i + n
			}
			i += n
			continue
		case c == '"' || c == '\\':
			e.b = append(e.b, v[start:i]...)
			e.b = append(e.b, '\\', c)
			start = i + 1
		case c < 0x20:
			e.b = append(e.b, v[start:i]...)
			if short := escapes[c]; short != 0 {
				e.b = append(e.b, '\\', short)
			} else {
				e.b = append(e.b, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
			}
			start = i + 1
		}
		i++
	}
	e.b = append(e.b, v[start:]...)
	e.b = append(e.b, '"')
	return exact
}

func (e *encoder) uuid(k string, u *[16]byte) {
	e.key(k)
	e.b = append(e.b, '"')
	e.b = append(appendUUID(e.b, u), '"', ',')
}

// extra begins an object of extra keys; the function that it returns ends it, or takes it back where nothing
// is in it.
func (e *encoder) extra() (end func()) {
	start := len(e.b)
	e.key(extra)
	e.open('{')
	empty := len(e.b)
	return func() {
		if len(e.b) == empty {
			e.b = e.b[:start]
			return
		}
		e.end('}')
	}
}

// servers begins the document with the servers, which are most of it together with the rest.
func (e *encoder) servers(s *Snapshot) {
	e.open('{')
	e.key("daemon")
	e.open('{')
	e.key("servers")
	e.open('{')
	if s.Admin != nil {
		e.key("admin")
		e.server(s.Admin, true)
	}
	if s.Lock != nil {
		e.key("virtlockd")
		e.server(s.Lock, false)
	}
	e.end('}')
	e.end('}')
}

// rest goes on where servers has ended.
func (e *encoder) rest(s *Snapshot) {
	e.key("defaultLockspace")
	e.open('{')
	e.resources(s, s.Default)
	e.end('}')
	e.key("lockspaces")
	e.open('[')
	for i := range s.Lockspaces {
		e.open('{')
		e.string("directory", s.Lockspaces[i].Dir)
		e.resources(s, s.Lockspaces[i].Resources)
		if e.reader == Ours {
			end := e.extra()
			e.some("cell", uint64(s.Lockspaces[i].Cell))
			end()
		}
		e.end('}')
	}
	e.end(']')
	e.key("magic")
	e.b = append(e.b, '"')
	e.b = strconv.AppendInt(e.b, int64(s.PID), 10)
	e.b = append(e.b, '"', ',')
	if e.reader == Ours {
		e.extras(s)
	}
	e.end('}')
	e.b = e.b[:len(e.b)-1]
}

func (e *encoder) extras(s *Snapshot) {
	end := e.extra()
	e.uint("version", Version)
	e.some("began", s.Began)
	if s.StartTime != 0 {
		e.int("startTime", s.StartTime)
	}
	e.uint("upgrades", s.Upgrades)
	e.some("recoveries", s.Recoveries)
	e.some("configuredClients", uint64(s.Configured[0]))
	e.some("configuredAdminClients", uint64(s.Configured[1]))
	if s.Frozen != 0 {
		e.int("frozen", s.Frozen)
	}
	if s.PIDFile != NoFD {
		e.int("pidFile", int64(s.PIDFile))
	}
	if s.Vault != NoFD {
		e.int("vault", int64(s.Vault))
	}
	e.yes("vaultKept", s.VaultKept)
	e.some("cell", uint64(s.Cell))
	e.yes("anotherVault", s.AnotherVault)
	if s.Epoll != nil {
		e.key("epoll")
		e.open('{')
		e.int("fd", int64(s.Epoll.FD))
		e.int("generation", int64(s.Epoll.Generation))
		e.end('}')
	}
	if s.StartDir != "" {
		e.string("startDir", s.StartDir)
	}
	if s.Timeout != nil {
		e.uint("timeout", uint64(*s.Timeout))
	}
	for _, setting := range []struct {
		key   string
		value *string
	}{{"logLevel", s.LogLevel}, {"logFilters", s.LogFilters}, {"logOutputs", s.LogOutputs}} {
		if setting.value != nil {
			e.string(setting.key, *setting.value)
		}
	}
	e.key("owners")
	e.open('[')
	for i := range s.Owners {
		o := &s.Owners[i]
		e.open('{')
		e.int("pid", int64(o.PID))
		e.key("kind")
		e.quote(o.Kind.String())
		e.b = append(e.b, ',')
		e.string("name", o.Name)
		e.uint("id", uint64(o.ID))
		e.uuid("uuid", &o.UUID)
		if o.PIDFD != NoFD {
			e.int("pidfd", int64(o.PIDFD))
		}
		e.yes("ending", o.Ending)
		e.yes("stopped", o.Stopped)
		if o.StartTime != 0 {
			e.uint("startTime", o.StartTime)
		}
		e.end('}')
	}
	e.end(']')
	end()
}

func (e *encoder) server(s *Server, admin bool) {
	e.open('{')
	e.uint("min_workers", uint64(s.MinWorkers))
	e.uint("max_workers", uint64(s.MaxWorkers))
	e.uint("priority_workers", uint64(s.PriorityWorkers))
	e.uint("max_clients", uint64(s.MaxClients))
	e.uint("max_anonymous_clients", uint64(s.MaxUnauth))
	e.uint("keepaliveInterval", uint64(s.KeepaliveInterval))
	e.uint("keepaliveCount", uint64(s.KeepaliveCount))
	e.uint("next_client_id", s.NextClientID)
	e.key("services")
	e.open('[')
	for i := range s.Services {
		v := &s.Services[i]
		e.open('{')
		e.int("auth", int64(v.Auth))
		e.bool("readonly", v.ReadOnly)
		e.uint("nrequests_client_max", uint64(v.MaxRequests))
		e.key("socks")
		e.open('[')
		for _, k := range v.Sockets {
			e.socket(k.FD, false, k.Unlink)
		}
		e.end(']')
		e.end('}')
	}
	e.end(']')
	e.key("clients")
	e.open('[')
	for i := range s.Clients {
		e.client(&s.Clients[i], admin)
	}
	e.end(']')
	e.end('}')
}

func (e *encoder) socket(fd int32, client, unlink bool) {
	e.open('{')
	e.int("fd", int64(fd))
	e.b = append(e.b, `"errfd":-1,"pid":0,`...)
	e.bool("isClient", client)
	e.bool("unlinkUNIX", unlink)
	e.end('}')
}

func (e *encoder) client(c *Client, admin bool) {
	const ns = 1_000_000_000
	e.open('{')
	e.uint("id", c.ID)
	e.int("auth", int64(c.Auth))
	e.bool("auth_pending", c.AuthPending)
	e.bool("readonly", c.ReadOnly)
	e.uint("nrequests_max", uint64(c.MaxRequests))
	e.int("conn_time", c.ConnectTime/ns)
	e.key("sock")
	e.socket(c.FD, true, false)
	e.key("privateData")
	e.open('{')
	if !admin {
		// The C daemon ends when the name of one that has not registered is null or not there, but takes id 0
		// for "not registered".
		o := Details{}
		if c.Registered {
			o = c.Owner
		}
		e.bool("restricted", c.Restricted)
		e.uint("ownerPid", uint64(uint32(o.PID)))
		e.uint("ownerId", uint64(o.ID))
		e.string("ownerName", o.Name)
		e.uuid("ownerUUID", &o.UUID)
	}
	e.end('}')
	if e.reader == Ours {
		end := e.extra()
		if nsec := c.ConnectTime % ns; nsec != 0 {
			e.int("connNsec", nsec)
		}
		if c.Peer != 0 {
			e.int("peer", int64(c.Peer))
		}
		if c.Uptime != 0 {
			e.int("uptime", c.Uptime)
		}
		if !admin {
			if c.Self != None {
				e.int("self", int64(c.Self))
			}
			if c.Owner == (Details{}) || !c.Registered {
				// Its privateData alone says "not registered".
				e.bool("unregistered", !c.Registered)
			}
		}
		if len(c.Unread) > 0 {
			e.base64("unread", c.Unread)
		}
		if c.Dropped != 0 {
			e.uint("dropped", uint64(c.Dropped))
		}
		if c.FDs != 0 {
			e.uint("fds", uint64(c.FDs))
		}
		e.yes("lastFD", c.LastFD)
		if len(c.Unsent) > 0 {
			e.base64("unsent", c.Unsent)
		}
		e.yes("closing", c.Closing)
		e.some("cell", uint64(c.Cell))
		if c.Undo != nil {
			e.key("undo")
			e.open('{')
			e.string("lockspace", c.Undo.Lockspace)
			e.string("resource", c.Undo.Resource)
			e.end('}')
		}
		end()
	}
	e.end('}')
}

func (e *encoder) resources(s *Snapshot, rs []Resource) {
	e.key("resources")
	e.open('[')
	for i := range rs {
		r := &rs[i]
		e.open('{')
		e.string("name", r.Name)
		e.string("path", r.Path)
		e.int("fd", int64(r.FD))
		e.bool("lockHeld", r.Held)
		e.uint("flags", uint64(r.Flags))
		e.key("owners")
		e.open('[')
		for _, o := range r.Owners {
			// The C daemon's way with a negative number.
			e.b = append(strconv.AppendUint(e.b, uint64(int64(s.Owners[o].PID)), 10), ',')
		}
		e.end(']')
		if e.reader == Ours {
			e.resourceExtra(r)
		}
		e.end('}')
	}
	e.end(']')
}

func (e *encoder) resourceExtra(r *Resource) {
	end := e.extra()
	if len(r.Owners) > 0 {
		e.key("owners")
		e.open('[')
		for _, o := range r.Owners {
			e.b = append(strconv.AppendInt(e.b, int64(o), 10), ',')
		}
		e.end(']')
	}
	if slices.ContainsFunc(r.Since, func(t int64) bool { return t != 0 }) {
		e.key("since")
		e.open('[')
		for _, t := range r.Since {
			e.b = append(strconv.AppendInt(e.b, t, 10), ',')
		}
		e.end(']')
	}
	if r.File.Dev != 0 {
		e.uint("dev", r.File.Dev)
	}
	if r.File.Ino != 0 {
		e.uint("ino", r.File.Ino)
	}
	e.yes("block", r.File.Block)
	e.yes("posix", r.File.POSIX)
	e.yes("remote", r.File.Remote)
	e.yes("exclusive", r.File.Exclusive)
	if len(r.Cells) > 0 {
		e.key("cells")
		e.open('[')
		for _, c := range r.Cells {
			e.b = append(strconv.AppendUint(e.b, uint64(c), 10), ',')
		}
		e.end(']')
	}
	end()
}
