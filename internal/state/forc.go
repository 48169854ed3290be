// SPDX-License-Identifier: LGPL-2.1-or-later

package state

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

// MaxC is the size of the largest file that the C daemon reads, in bytes.
const MaxC = 10 << 20

// Hurdle is a kind of thing that the C daemon can't take.
type Hurdle uint8

// What the C daemon can't take. Some would make it end, with the loss of every lock; some would make it wrong; the rest
// it merely does not keep, and goes on without.
const (
	TooBig         Hurdle = iota // the file: Size and Excess
	NoLockServer                 // it ends
	BadText                      // a name that is not UTF-8, or has a zero byte: it ends, or cuts it
	NoDescriptor                 // of a resource whose lock is lost: it ends
	Limits                       // max_anonymous_clients above max_clients: it ends
	Authentication               // a client that has yet to authenticate though it need not: it ends
	HalfRequest                  // of a client: it would take the rest for a new one
	HalfReply                    // to a client: the rest would never come
	ToBeClosed                   // a client that would stay
	Setting                      // changed at run time: as configured afterwards
	Identity                     // two owners with one number: one owner afterwards
	NotOwned                     // a resource that nobody holds: it stays so
)

// Blocks tells whether the C daemon must not be started because of it.
func (h Hurdle) Blocks() bool { return h < Setting }

// Obstacle is one thing that the C daemon can't take.
type Obstacle struct {
	Hurdle Hurdle
	// Client is the id of the client of Server that closing would solve it; 0: it is not a client's.
	Client uint64
	Server string // "virtlockd" or "admin" if it is a client's or server's
	// Lockspace and Resource name the one that it is about, if any.
	Lockspace, Resource string
	// Size of the file and how much of it is too much, in bytes, if it is TooBig.
	Size, Excess int
	Why          string
}

func (o Obstacle) String() string { return o.Why }

// NotForCError says why the C daemon can't take over.
type NotForCError struct {
	Obstacles []Obstacle // all of them block
}

func (e *NotForCError) Error() string {
	const most = 3
	var b strings.Builder
	b.WriteString("the C daemon cannot take over: ")
	for i, o := range e.Obstacles {
		if i == most {
			fmt.Fprintf(&b, "; and %d more", len(e.Obstacles)-most)
			break
		}
		if i > 0 {
			b.WriteString("; ")
		}
		b.WriteString(o.Why)
	}
	return b.String()
}

// ForC returns what the C daemon (9.0.0) can't take, nil if it can take everything. The caller may make the
// snapshot digestible, by closing a client, say, or go on without those that do not block, or stay.
//
// A client that has not registered is none: it is written so that the C daemon can read it.
func ForC(s *Snapshot) ([]Obstacle, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	return encode(nil, s, C).obstacles(s), nil
}

func blocking(os []Obstacle) []Obstacle {
	var b []Obstacle
	for _, o := range os {
		if o.Hurdle.Blocks() {
			b = append(b, o)
		}
	}
	return b
}

// obstacles judges s, which the encoder has written for the C daemon.
func (e *encoder) obstacles(s *Snapshot) []Obstacle {
	var os []Obstacle
	if n := len(e.b); n > MaxC {
		os = append(os, Obstacle{Hurdle: TooBig, Size: n, Excess: n - MaxC,
			Why: fmt.Sprintf("its state file has %d bytes, %d more than the C daemon reads (%d)", n, n-MaxC, MaxC)})
	}
	if s.Lock == nil {
		os = append(os, Obstacle{Hurdle: NoLockServer, Server: "virtlockd", Why: "there is no server virtlockd"})
	}
	for _, srv := range []struct {
		name string
		*Server
	}{{"admin", s.Admin}, {"virtlockd", s.Lock}} {
		if srv.Server == nil {
			continue
		}
		if srv.MaxUnauth > srv.MaxClients {
			os = append(os, Obstacle{Hurdle: Limits, Server: srv.name,
				Why: fmt.Sprintf("server %s has a limit of unauthenticated clients (%d) above that of all (%d)", srv.name, srv.MaxUnauth, srv.MaxClients)})
		}
		for i := range srv.Clients {
			c := &srv.Clients[i]
			client := func(h Hurdle, format string, a ...any) {
				os = append(os, Obstacle{Hurdle: h, Server: srv.name, Client: c.ID,
					Why: fmt.Sprintf("client %d of server %s ", c.ID, srv.name) + fmt.Sprintf(format, a...)})
			}
			if c.FD < 0 {
				client(NoDescriptor, "has no descriptor")
			}
			if c.AuthPending && c.Auth == 0 {
				client(Authentication, "has yet to authenticate, but need not")
			}
			if c.Registered && !digestible(c.Owner.Name) {
				client(BadText, "is registered with the name %q, which JSON for the C daemon cannot hold", c.Owner.Name)
			}
			if len(c.Unread) > 0 || c.Dropped > 0 {
				client(HalfRequest, "has sent %d bytes that were read and not executed yet", uint64(len(c.Unread))+uint64(c.Dropped))
			}
			if len(c.Unsent) > 0 {
				client(HalfReply, "has yet to be sent %d bytes of a reply", len(c.Unsent))
			}
			if c.Closing {
				client(ToBeClosed, "is to be closed")
			}
		}
	}
	for dir, rs := range s.spaces() {
		if !digestible(dir) {
			os = append(os, Obstacle{Hurdle: BadText, Lockspace: dir,
				Why: fmt.Sprintf("the name of lockspace %q is one that JSON for the C daemon cannot hold", dir)})
		}
		for i := range rs {
			r := &rs[i]
			resource := func(h Hurdle, why string) {
				os = append(os, Obstacle{Hurdle: h, Lockspace: dir, Resource: r.Name,
					Why: fmt.Sprintf("resource %q of lockspace %q %s", r.Name, dir, why)})
			}
			if !digestible(r.Name) || !digestible(r.Path) {
				resource(BadText, fmt.Sprintf("with the path %q has a name that JSON for the C daemon cannot hold", r.Path))
			}
			if r.FD < 0 {
				resource(NoDescriptor, "has lost its lock")
			}
			if len(r.Owners) == 0 {
				resource(NotOwned, "has no owners, so nobody could release it")
			}
		}
	}
	for _, setting := range []struct {
		name string
		set  bool
	}{
		{"timeout", s.Timeout != nil}, {"log level", s.LogLevel != nil},
		{"log filters", s.LogFilters != nil}, {"log outputs", s.LogOutputs != nil},
	} {
		if setting.set {
			os = append(os, Obstacle{Hurdle: Setting,
				Why: "the " + setting.name + " set at run time would be as configured again"})
		}
	}
	return append(os, s.sameNumbers()...)
}

// digestible tells whether the C daemon reads a string as it is.
func digestible(v string) bool { return utf8.ValidString(v) && strings.IndexByte(v, 0) < 0 }

// sameNumbers finds different owners of resources that have one number, and so are one to the C daemon.
func (s *Snapshot) sameNumbers() []Obstacle {
	var os []Obstacle
	byPID := make(map[int32]int32, len(s.Owners))
	for _, rs := range s.spaces() {
		for i := range rs {
			for _, o := range rs[i].Owners {
				pid := s.Owners[o].PID
				first, known := byPID[pid]
				switch {
				case !known:
					byPID[pid] = o
				case first >= 0 && first != o:
					byPID[pid] = -1 // said once
					os = append(os, Obstacle{Hurdle: Identity,
						Why: fmt.Sprintf("different owners with process id %d (domains %q and %q) would become one", pid, s.Owners[first].Name, s.Owners[o].Name)})
				}
			}
		}
	}
	return os
}
