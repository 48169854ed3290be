// SPDX-License-Identifier: LGPL-2.1-or-later

package state

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// pad makes the file for the C daemon exactly n bytes long, by lockspaces without resources.
func pad(s *Snapshot, n int) {
	const frame = len(`{"directory":"","resources":[]},`)
	const most = 60_000 // less than a string of the protocol
	missing := n - len(encode(nil, s, C).b)
	for i := 0; missing > 0; i++ {
		dir := min(missing-frame, most)
		if rest := missing - frame - dir; 0 < rest && rest < 2*frame {
			dir -= 2 * frame // leave room for one more
		}
		name := fmt.Sprintf("/%06d/", i)
		s.Lockspaces = append(s.Lockspaces, Lockspace{Dir: name + strings.Repeat("x", dir-len(name))})
		missing -= frame + dir
	}
}

func TestForC(t *testing.T) {
	t.Parallel()
	text := "x"
	number := uint32(5)
	for _, tt := range []struct {
		name   string
		change func(s *Snapshot)
		want   []Obstacle // without Why
		blocks bool
	}{
		{"nothing", func(s *Snapshot) {}, nil, false},
		{"unregistered client", func(s *Snapshot) { s.Lock.Clients[0].Registered = false; s.Lock.Clients[0].Owner = Details{} }, nil, false},
		{"what ours adds", func(s *Snapshot) {
			s.Lock.Clients[0].Self = 0
			s.Owners[0].Kind = Verified
			s.Upgrades, s.StartTime, s.PIDFile = 3, 5, 99
			s.Default[0].File = File{Dev: 1, Ino: 2}
		}, nil, false},
		{"exactly the limit", func(s *Snapshot) { pad(s, MaxC) }, nil, false},
		{"one byte too many", func(s *Snapshot) { pad(s, MaxC+1) }, []Obstacle{{Hurdle: TooBig, Size: MaxC + 1, Excess: 1}}, true},
		{"no lock server", func(s *Snapshot) { s.Lock = nil }, []Obstacle{{Hurdle: NoLockServer, Server: "virtlockd"}}, true},
		{"no admin server", func(s *Snapshot) { s.Admin = nil }, nil, false},
		{"owner's name", func(s *Snapshot) { s.Lock.Clients[1].Owner.Name = "\xff" }, []Obstacle{{Hurdle: BadText, Server: "virtlockd", Client: 3}}, true},
		{"owner's name with a zero byte", func(s *Snapshot) { s.Lock.Clients[1].Owner.Name = "a\x00b" }, []Obstacle{{Hurdle: BadText, Server: "virtlockd", Client: 3}}, true},
		{"directory", func(s *Snapshot) { s.Lockspaces[0].Dir = "/\xc3" }, []Obstacle{{Hurdle: BadText, Lockspace: "/\xc3"}}, true},
		{"name", func(s *Snapshot) { s.Lockspaces[0].Resources[0].Name = "\xed\xa0\x80" },
			[]Obstacle{{Hurdle: BadText, Lockspace: "/tmp/vlv/l1", Resource: "\xed\xa0\x80"}}, true},
		{"path", func(s *Snapshot) { s.Default[0].Path = "\xc0\xaf" }, []Obstacle{{Hurdle: BadText, Resource: "/tmp/vlv/plain"}}, true},
		{"resource without descriptor", func(s *Snapshot) { s.Default[0].FD = NoFD }, []Obstacle{{Hurdle: NoDescriptor, Resource: "/tmp/vlv/plain"}}, true},
		{"client without descriptor", func(s *Snapshot) { s.Admin.Clients[0].FD = NoFD }, []Obstacle{{Hurdle: NoDescriptor, Server: "admin", Client: 1}}, true},
		{"resource without owners", func(s *Snapshot) { s.Default[0].Owners = nil }, []Obstacle{{Hurdle: NotOwned, Resource: "/tmp/vlv/plain"}}, false},
		{"limits", func(s *Snapshot) { s.Admin.MaxUnauth = 8 }, []Obstacle{{Hurdle: Limits, Server: "admin"}}, true},
		{"authentication", func(s *Snapshot) { s.Lock.Clients[0].AuthPending = true }, []Obstacle{{Hurdle: Authentication, Server: "virtlockd", Client: 2}}, true},
		{"half a request", func(s *Snapshot) { s.Lock.Clients[0].Unread = []byte{0} }, []Obstacle{{Hurdle: HalfRequest, Server: "virtlockd", Client: 2}}, true},
		{"rest of a request", func(s *Snapshot) { s.Admin.Clients[0].Dropped = 1 }, []Obstacle{{Hurdle: HalfRequest, Server: "admin", Client: 1}}, true},
		{"half a reply", func(s *Snapshot) { s.Lock.Clients[0].Unsent = []byte{0} }, []Obstacle{{Hurdle: HalfReply, Server: "virtlockd", Client: 2}}, true},
		{"client to be closed", func(s *Snapshot) { s.Lock.Clients[0].Closing = true }, []Obstacle{{Hurdle: ToBeClosed, Server: "virtlockd", Client: 2}}, true},
		{"settings", func(s *Snapshot) { s.Timeout, s.LogLevel, s.LogFilters, s.LogOutputs = &number, &text, &text, &text },
			[]Obstacle{{Hurdle: Setting}, {Hurdle: Setting}, {Hurdle: Setting}, {Hurdle: Setting}}, false},
		{"owners with one number", func(s *Snapshot) {
			s.Owners = append(s.Owners, Owner{Details: Details{PID: 53, Name: "other"}, Kind: Unverified, PIDFD: NoFD}, Owner{Details: Details{PID: 53}, PIDFD: NoFD})
			s.Default[1].Owners = []int32{2, 3}
		}, []Obstacle{{Hurdle: Identity}}, false},
		{"owner with the same number that holds nothing", func(s *Snapshot) {
			s.Owners = append(s.Owners, Owner{Details: Details{PID: 53, Name: "other"}, PIDFD: NoFD})
		}, nil, false},
		{"several", func(s *Snapshot) {
			s.Lock = nil
			s.LogLevel = &text
		}, []Obstacle{{Hurdle: NoLockServer, Server: "virtlockd"}, {Hurdle: Setting}}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := sampleSnapshot(t)
			tt.change(s)
			got, err := ForC(s)
			if err != nil {
				t.Fatal(err)
			}
			var why []string
			for i := range got {
				t.Log(got[i])
				why = append(why, got[i].Why)
				got[i].Why = ""
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("obstacles (-want +got):\n%s", diff)
			}
			data, err := Encode(s, C)
			var not *NotForCError
			if errors.As(err, &not) != tt.blocks || (err != nil) != tt.blocks {
				t.Fatalf("error is %v, want one: %t", err, tt.blocks)
			}
			if tt.blocks {
				if data != nil {
					t.Error("something is returned with the error")
				}
				if !strings.Contains(err.Error(), why[0]) {
					t.Errorf("error is %q, which does not say %q", err, why[0])
				}
			}
			// Ours takes everything.
			ours, err := Encode(s, Ours)
			if err != nil {
				t.Fatal(err)
			}
			back, _, err := Decode(ours, s.PID)
			if err != nil {
				t.Fatal(err)
			}
			if tt.name != "no lock server" && tt.name != "several" && tt.name != "limits" && tt.name != "authentication" && tt.name != "client without descriptor" {
				if diff := cmp.Diff(s, back, equal); diff != "" {
					t.Errorf("snapshot (-want +got):\n%s", diff)
				}
			}
		})
	}
}

func TestNotForCErrorIsShort(t *testing.T) {
	t.Parallel()
	s := populated(0, 1000)
	for i := range s.Lock.Clients {
		s.Lock.Clients[i].Unread = []byte("x")
	}
	_, err := Encode(s, C)
	if err == nil || !strings.HasSuffix(err.Error(), "; and 997 more") || len(err.Error()) > 500 {
		t.Errorf("error is %v", err)
	}
}

func TestEncodeRefusesBadReferences(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(s *Snapshot){
		"client":            func(s *Snapshot) { s.Lock.Clients[0].Self = 2 },
		"client, negative":  func(s *Snapshot) { s.Lock.Clients[0].Self = -2 },
		"resource":          func(s *Snapshot) { s.Lockspaces[1].Resources[0].Owners = []int32{0, 2} },
		"default, negative": func(s *Snapshot) { s.Default[0].Owners = []int32{None} },
	} {
		s := sampleSnapshot(t)
		change(s)
		for _, r := range readers {
			if _, err := Encode(s, r.Reader); err == nil || !strings.Contains(err.Error(), "refers to owner") {
				t.Errorf("%s, for %s: error is %v", name, r.name, err)
			}
		}
		if _, err := ForC(s); err == nil {
			t.Errorf("%s: ForC has no error", name)
		}
	}
}
