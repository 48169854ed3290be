// SPDX-License-Identifier: LGPL-2.1-or-later

package state

import (
	"encoding/json"
	"fmt"
	"math"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"
)

// A list that is empty is a list that is not there.
var equal = cmpopts.EquateEmpty()

// texts draws what must be text for the C daemon and any bytes for ours.
func texts(r Reader) *rapid.Generator[string] {
	if r == C {
		return rapid.String().Filter(utf8.ValidString)
	}
	return rapid.Custom(func(t *rapid.T) string {
		if rapid.Bool().Draw(t, "text") {
			return rapid.String().Draw(t, "string")
		}
		return string(rapid.SliceOfN(rapid.Byte(), 0, 12).Draw(t, "bytes"))
	})
}

// snapshots draws any state that a daemon can have.
func snapshots(r Reader) *rapid.Generator[*Snapshot] {
	return rapid.Custom(func(t *rapid.T) *Snapshot {
		next := rapid.Int32Range(0, math.MaxInt32-10_000).Draw(t, "first fd")
		fd := func() int32 { next++; return next }
		text := texts(r)
		bytes := rapid.SliceOfN(rapid.Byte(), 0, 40)
		details := rapid.Custom(func(t *rapid.T) Details {
			d := Details{
				Name: text.Draw(t, "name"),
				ID:   rapid.Uint32().Draw(t, "id"),
				PID:  rapid.Int32().Draw(t, "pid"),
			}
			copy(d.UUID[:], rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "uuid"))
			if rapid.IntRange(0, 9).Draw(t, "empty") == 0 {
				return Details{}
			}
			return d
		})
		maybe := func(label string) *string {
			if !rapid.Bool().Draw(t, label+" set") {
				return nil
			}
			v := text.Draw(t, label)
			return &v
		}
		s := &Snapshot{
			PID:       rapid.Int32Range(1, math.MaxInt32).Draw(t, "pid"),
			StartTime: rapid.Int64Min(0).Draw(t, "start"),
			Began:     rapid.Uint64().Draw(t, "began"),
			Upgrades:  rapid.Uint64().Draw(t, "upgrades"), Recoveries: rapid.Uint64().Draw(t, "recoveries"),
			Cell: rapid.Uint32().Draw(t, "cell"), AnotherVault: rapid.Bool().Draw(t, "another vault"), VaultKept: rapid.Bool().Draw(t, "kept"),
			Configured: [2]uint32{rapid.Uint32().Draw(t, "clients"), rapid.Uint32().Draw(t, "admin clients")},
			PIDFile:    NoFD, Vault: NoFD,
			Frozen:   rapid.Int64Min(0).Draw(t, "frozen"),
			StartDir: text.Draw(t, "directory"),
			LogLevel: maybe("level"), LogFilters: maybe("filters"), LogOutputs: maybe("outputs"),
		}
		if rapid.Bool().Draw(t, "pid file") {
			s.PIDFile = fd()
		}
		if rapid.Bool().Draw(t, "vault") {
			s.Vault = fd()
		}
		if rapid.Bool().Draw(t, "epoll") {
			s.Epoll = &Epoll{FD: fd(), Generation: rapid.Int32().Draw(t, "generation")}
		}
		if rapid.Bool().Draw(t, "timeout set") {
			v := rapid.Uint32().Draw(t, "timeout")
			s.Timeout = &v
		}
		for range rapid.IntRange(0, 4).Draw(t, "owners") {
			o := Owner{
				Details:   details.Draw(t, "owner"),
				Kind:      rapid.SampledFrom([]Kind{Unknown, Unverified, Watched, Verified}).Draw(t, "kind"),
				PIDFD:     NoFD,
				Ending:    rapid.Bool().Draw(t, "ending"),
				Stopped:   rapid.Bool().Draw(t, "stopped"),
				StartTime: rapid.Uint64().Draw(t, "start"),
			}
			if rapid.Bool().Draw(t, "pidfd") {
				o.PIDFD = fd()
			}
			s.Owners = append(s.Owners, o)
		}
		server := func(admin bool) *Server {
			v := &Server{
				MinWorkers: rapid.Uint32().Draw(t, "min"), MaxWorkers: rapid.Uint32().Draw(t, "max"), PriorityWorkers: rapid.Uint32().Draw(t, "priority"),
				MaxClients:        rapid.Uint32().Draw(t, "clients"),
				KeepaliveInterval: rapid.Uint32().Draw(t, "interval"), KeepaliveCount: rapid.Uint32().Draw(t, "count"),
			}
			v.MaxUnauth = rapid.Uint32Max(v.MaxClients).Draw(t, "unauth")
			for range rapid.IntRange(0, 2).Draw(t, "services") {
				w := Service{Auth: rapid.Int32Min(0).Draw(t, "auth"), ReadOnly: rapid.Bool().Draw(t, "ro"), MaxRequests: rapid.Uint32().Draw(t, "requests")}
				for range rapid.IntRange(0, 2).Draw(t, "sockets") {
					w.Sockets = append(w.Sockets, Socket{FD: fd(), Unlink: rapid.Bool().Draw(t, "unlink")})
				}
				v.Services = append(v.Services, w)
			}
			id := rapid.Uint64Max(maxClientID-10).Draw(t, "id before the first")
			for range rapid.IntRange(0, 4).Draw(t, "clients") {
				id++
				c := Client{
					ID: id, ConnectTime: rapid.Int64Range(0, math.MaxInt64/1e9*1e9-1e9).Draw(t, "time"), FD: fd(),
					Auth: rapid.Int32Min(0).Draw(t, "auth"), ReadOnly: rapid.Bool().Draw(t, "ro"), MaxRequests: rapid.Uint32().Draw(t, "requests"),
					Self: None,
					Peer: rapid.Int32Min(0).Draw(t, "peer"), Uptime: rapid.Int64Min(0).Draw(t, "uptime"), Unread: bytes.Draw(t, "unread"), Unsent: bytes.Draw(t, "unsent"),
					Dropped: rapid.Uint32().Draw(t, "dropped"), FDs: rapid.Uint32().Draw(t, "fds"), LastFD: rapid.Bool().Draw(t, "last fd"),
					Closing: rapid.Bool().Draw(t, "closing"), Cell: rapid.Uint32().Draw(t, "cell"),
				}
				c.AuthPending = c.Auth != 0 && rapid.Bool().Draw(t, "pending")
				if rapid.Bool().Draw(t, "undo") {
					c.Undo = &Undo{Lockspace: text.Draw(t, "lockspace"), Resource: text.Draw(t, "resource")}
				}
				if !admin {
					c.Restricted = rapid.Bool().Draw(t, "restricted")
					if c.Registered = rapid.Bool().Draw(t, "registered"); c.Registered {
						c.Owner = details.Draw(t, "owner")
						if len(s.Owners) > 0 && rapid.Bool().Draw(t, "self") {
							c.Self = int32(rapid.IntRange(0, len(s.Owners)-1).Draw(t, "self"))
							c.Owner.PID = s.Owners[c.Self].PID
						}
					}
				}
				v.Clients = append(v.Clients, c)
			}
			v.NextClientID = rapid.Uint64Range(id+1, maxClientID+1).Draw(t, "next id")
			return v
		}
		if rapid.Bool().Draw(t, "admin") {
			s.Admin = server(true)
		}
		s.Lock = server(false)
		resources := func() []Resource {
			var rs []Resource
			for i := range rapid.IntRange(0, 3).Draw(t, "resources") {
				r := Resource{
					// Names are unique, paths need not be.
					Name: fmt.Sprint(i) + text.Draw(t, "name"), Path: "/" + text.Draw(t, "path"), FD: NoFD,
					Held: rapid.Bool().Draw(t, "held"), Flags: rapid.Uint32().Draw(t, "flags"),
					File: File{
						Dev: rapid.Uint64().Draw(t, "dev"), Ino: rapid.Uint64().Draw(t, "ino"), Block: rapid.Bool().Draw(t, "block"),
						POSIX: rapid.Bool().Draw(t, "posix"), Remote: rapid.Bool().Draw(t, "remote"), Exclusive: rapid.Bool().Draw(t, "exclusive"),
					},
				}
				if rapid.IntRange(0, 5).Draw(t, "lost") > 0 {
					r.FD = fd()
				}
				if len(s.Owners) > 0 {
					r.Owners = rapid.SliceOfN(rapid.Int32Range(0, int32(len(s.Owners)-1)), 0, 4).Draw(t, "owners")
				}
				if n := len(r.Owners); n > 0 && rapid.Bool().Draw(t, "timed") {
					r.Since = append(rapid.SliceOfN(rapid.Int64Min(0), n-1, n-1).Draw(t, "since"), 1)
				}
				if rapid.Bool().Draw(t, "stored") {
					for range r.Owners {
						r.Cells = append(r.Cells, rapid.Uint32().Draw(t, "cell"))
					}
				}
				rs = append(rs, r)
			}
			return rs
		}
		s.Default = resources()
		for i := range rapid.IntRange(0, 3).Draw(t, "lockspaces") {
			s.Lockspaces = append(s.Lockspaces, Lockspace{Dir: fmt.Sprint("/", i) + text.Draw(t, "dir"), Resources: resources(), Cell: rapid.Uint32().Draw(t, "cell")})
		}
		return s
	})
}

// clean fails on problems other than those that a valid state can have.
func clean(t rapid.TB, problems []Problem) {
	t.Helper()
	for _, p := range problems {
		if p.Trouble != NoOwners && (p.Trouble != Missing || p.Why != "no descriptor: the lock is lost") {
			t.Errorf("problem: %v", p)
		}
	}
}

func TestRoundTripOurs(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		want := snapshots(Ours).Draw(t, "snapshot")
		data, err := Encode(want, Ours)
		if err != nil {
			t.Fatal(err)
		}
		if !json.Valid(data) || !utf8.Valid(data) {
			t.Fatalf("not JSON: %s", data)
		}
		got, problems, err := Decode(data, want.PID)
		if err != nil {
			t.Fatal(err)
		}
		clean(t, problems)
		checkAhead(t, data, want.PID, got, len(problems) == 0)
		if diff := cmp.Diff(want, got, equal); diff != "" {
			t.Fatalf("snapshot (-want +got):\n%s", diff)
		}
	})
}

func TestRoundTripC(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		s := snapshots(C).Draw(t, "snapshot")
		e := encode(nil, s, C)
		if !json.Valid(e.b) || !utf8.Valid(e.b) {
			t.Fatalf("not JSON: %s", e.b)
		}
		got, problems, err := Decode(e.b, s.PID)
		if err != nil {
			t.Fatal(err)
		}
		clean(t, problems)
		if diff := cmp.Diff(asC(s), got, equal); diff != "" {
			t.Fatalf("snapshot (-want +got):\n%s", diff)
		}
	})
}

// asC returns what is left of a state in a file of the C daemon.
func asC(s *Snapshot) *Snapshot {
	c := &Snapshot{PID: s.PID, PIDFile: NoFD, Vault: NoFD}
	server := func(s *Server) *Server {
		if s == nil {
			return nil
		}
		v := *s
		v.Clients = nil
		for _, o := range s.Clients {
			v.Clients = append(v.Clients, Client{
				ID: o.ID, ConnectTime: o.ConnectTime / 1e9 * 1e9, FD: o.FD,
				Auth: o.Auth, AuthPending: o.AuthPending, ReadOnly: o.ReadOnly, MaxRequests: o.MaxRequests,
				// All zeros mean "not registered" to the C daemon too.
				Registered: o.Registered && o.Owner != Details{}, Restricted: o.Restricted, Owner: o.Owner, Self: None,
			})
		}
		return &v
	}
	c.Admin, c.Lock = server(s.Admin), server(s.Lock)
	places := map[int32]int32{}
	resources := func(rs []Resource) []Resource {
		var out []Resource
		for _, r := range rs {
			n := Resource{Name: r.Name, Path: r.Path, FD: r.FD, Held: r.Held, Flags: r.Flags}
			for _, o := range r.Owners {
				pid := s.Owners[o].PID
				place, known := places[pid]
				if !known {
					place = int32(len(c.Owners))
					places[pid] = place
					c.Owners = append(c.Owners, Owner{Details: Details{PID: pid}, PIDFD: NoFD})
					for _, client := range c.Lock.Clients {
						if client.Registered && client.Owner.PID == pid {
							c.Owners[place].Details = client.Owner
						}
					}
				}
				n.Owners = append(n.Owners, place)
			}
			out = append(out, n)
		}
		return out
	}
	c.Default = resources(s.Default)
	for _, l := range s.Lockspaces {
		c.Lockspaces = append(c.Lockspaces, Lockspace{Dir: l.Dir, Resources: resources(l.Resources)})
	}
	return c
}

// Who reads ahead comes to the same result, and to none if there is something to say about the file.
func checkAhead(t rapid.TB, data []byte, pid int32, want *Snapshot, faultless bool) {
	t.Helper()
	got := decodeAhead(data, pid)
	if (got != nil) != faultless {
		t.Fatalf("read ahead: a snapshot %t, want %t\nfile:\n%s", got != nil, faultless, data)
	}
	if faultless {
		if diff := cmp.Diff(want, got, equal); diff != "" {
			t.Fatalf("read ahead (-without +with):\n%s\nfile:\n%s", diff, data)
		}
	}
}

// Whatever decodes encodes to a file that decodes to the same, for both readers.
func checkStable(t rapid.TB, data []byte, pid int32) {
	s, problems, err := Decode(data, pid)
	checkAhead(t, data, pid, s, err == nil && len(problems) == 0)
	if err != nil {
		if s != nil {
			t.Fatal("a snapshot is returned with an error")
		}
		return
	}
	ours, err := Encode(s, Ours)
	if err != nil {
		t.Fatalf("what was decoded can't be encoded: %v", err)
	}
	again, problems, err := Decode(ours, pid)
	checkAhead(t, ours, pid, again, err == nil && len(problems) == 0)
	if err != nil {
		t.Fatalf("what was encoded can't be decoded: %v\n%s", err, ours)
	}
	for _, p := range problems {
		if !p.Kept && s.Lock != nil {
			t.Errorf("of what was encoded something is not kept: %v", p)
		}
	}
	if diff := cmp.Diff(s, again, equal); diff != "" {
		t.Fatalf("snapshot (-first +second):\n%s\nfile:\n%s", diff, ours)
	}
	c := encode(nil, s, C).b
	if !json.Valid(c) || !utf8.Valid(c) {
		t.Fatalf("not JSON for C: %s", c)
	}
	first, _, err := Decode(c, pid)
	if err != nil {
		t.Fatalf("what was encoded for C can't be decoded: %v\n%s", err, c)
	}
	second, _, err := Decode(encode(nil, first, C).b, pid)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(first, second, equal); diff != "" {
		t.Fatalf("snapshot by way of C (-first +second):\n%s", diff)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(sample(f))
	for _, name := range []string{"1.0.1-server", "1.2-servers-array", "2.3-servers-object"} {
		f.Add(readFile(f, "testdata/history/"+name+".json"))
	}
	ours, err := Encode(populated(2, 2), Ours)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(ours)
	for _, r := range readers {
		for seed := range 20 {
			data, err := Encode(snapshots(r.Reader).Example(seed), Ours)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(data)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		// Whatever the file says who wrote it.
		for _, pid := range []int32{samplePID, 4711, 1} {
			checkStable(t, data, pid)
		}
		var m struct{ Magic string }
		if json.Unmarshal(data, &m) == nil {
			var pid int32
			if _, err := fmt.Sscanf(m.Magic, "%d", &pid); err == nil {
				checkStable(t, data, pid)
			}
		}
	})
}

// Files with one value replaced are as good as any input for a reader that goes on after a problem.
func TestMutations(t *testing.T) {
	t.Parallel()
	ours, err := Encode(populated(2, 2), Ours)
	if err != nil {
		t.Fatal(err)
	}
	var document map[string]any
	if err := json.Unmarshal(ours, &document); err != nil {
		t.Fatal(err)
	}
	values := []any{nil, true, "", "x", "\x00", 0, -1, 1 << 31, uint64(math.MaxUint64), 0.5, []any{}, []any{nil}, map[string]any{}}
	n := 0
	var walk func(v any)
	try := func() {
		data, err := json.Marshal(document)
		if err != nil {
			t.Fatal(err)
		}
		n++
		checkStable(t, data, 4711)
	}
	walk = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			for k, old := range v {
				for _, value := range values {
					v[k] = value
					try()
				}
				delete(v, k)
				try()
				v[k] = old
				walk(old)
			}
		case []any:
			for i, old := range v {
				for _, value := range values {
					v[i] = value
					try()
				}
				v[i] = old
				walk(old)
			}
		}
	}
	walk(document)
	t.Logf("%d files", n)
}

// A file whose lockspaces are not where they seem to be, or are there twice, is read as by one who does not read ahead.
func TestMisleading(t *testing.T) {
	t.Parallel()
	large := populated(1000, 1000)
	large.Default, large.Lockspaces[0].Resources = large.Lockspaces[0].Resources[:500], large.Lockspaces[0].Resources[500:]
	for i := range large.Default {
		large.Default[i].Name = large.Default[i].Path
	}
	data, err := Encode(large, Ours)
	if err != nil {
		t.Fatal(err)
	}
	spaces := string(next(documentDefault)) + `{"resources":[{"name":"/x","path":"/x","fd":77777,"lockHeld":true,"flags":0,"owners":[1]}]},"lockspaces":[]`
	for _, tt := range []struct{ name, old, new string }{
		{name: "as it is"},
		{"unknown key with the same inside", `{"daemon":`, `{"unknown":{"a":1` + spaces + `},"daemon":`},
		{"the same before", `{"daemon":`, `{"unknown":1` + spaces + `,"daemon":`},
		{"the others before", `{"daemon":`, `{"lockspaces":[],"daemon":`},
		{"the others before, with one", `{"daemon":`, `{"lockspaces":[{"directory":"/d","resources":[]}],"daemon":`},
		{"the same behind", `,"magic":`, spaces + `,"magic":`},
		{"broken", `,"magic":`, `,"magic"`},
		{"broken lockspaces", `"lockspaces":[`, `"lockspaces":{`},
		{"one descriptor twice", `"fd":10,`, `"fd":11,`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			changed := []byte(strings.Replace(string(data), tt.old, tt.new, 1))
			want, wantProblems, wantErr := decode(changed, large.PID, nil)
			got, problems, err := Decode(changed, large.PID)
			if fmt.Sprint(err) != fmt.Sprint(wantErr) {
				t.Fatalf("error %v, want %v", err, wantErr)
			}
			if diff := cmp.Diff(want, got, equal); diff != "" {
				t.Errorf("snapshot (-without +with):\n%s", diff)
			}
			if diff := cmp.Diff(wantProblems, problems, equal); diff != "" {
				t.Errorf("problems (-without +with):\n%s", diff)
			}
			checkAhead(t, changed, large.PID, want, wantErr == nil && len(wantProblems) == 0)
		})
	}
}
