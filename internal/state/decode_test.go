// SPDX-License-Identifier: LGPL-2.1-or-later

package state

import (
	"bytes"
	"encoding/json"
	"errors"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.TrimSpace(data)
}

// sample is the state of a C daemon 9.0.0 as it was observed.
func sample(t testing.TB) []byte { return readFile(t, "testdata/c-9.0.0.json") }

const samplePID = 52

func mustDecode(t testing.TB, data []byte, pid int32) *Snapshot {
	t.Helper()
	s, problems, err := Decode(data, pid)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("problem: %v", p)
	}
	return s
}

func uuid(t testing.TB, text string) [16]byte {
	t.Helper()
	u, ok := parseUUID([]byte(text))
	if !ok {
		t.Fatalf("%q is not a UUID", text)
	}
	return u
}

func sampleSnapshot(t testing.TB) *Snapshot {
	const off = math.MaxUint32
	ones := uuid(t, "11111111-1111-1111-1111-111111111111")
	vmA := Details{Name: "vmA", UUID: uuid(t, "00010203-0405-0607-0809-0a0b0c0d0e0f"), ID: 7, PID: 53}
	vmB := Details{Name: "vmB", UUID: ones, ID: 9, PID: 1879048194}
	restr := Details{Name: "restr", UUID: ones, ID: 1, PID: 1879048195}
	const when = 1795335851_000000000
	client := func(id uint64, fd int32, restricted bool, d Details) Client {
		return Client{ID: id, ConnectTime: when, FD: fd, MaxRequests: 1, Registered: d != Details{}, Restricted: restricted, Owner: d, Self: None}
	}
	services := func(fd int32) []Service {
		return []Service{{MaxRequests: 1, Sockets: []Socket{{FD: fd, Unlink: true}}}}
	}
	const odd = "q\"uo\\te\tñ\x01"
	return &Snapshot{
		PID:     samplePID,
		PIDFile: NoFD, Vault: NoFD,
		Admin: &Server{MaxClients: 7, MaxUnauth: 7, KeepaliveInterval: off, NextClientID: 2,
			Services: services(5), Clients: []Client{client(1, 12, false, Details{})}},
		Lock: &Server{MaxClients: 20, MaxUnauth: 20, KeepaliveInterval: off, NextClientID: 5,
			Services: services(4), Clients: []Client{client(2, 9, false, vmA), client(3, 10, false, vmB), client(4, 11, true, restr)}},
		Default: []Resource{
			{Name: "/tmp/vlv/plain", Path: "/tmp/vlv/plain", FD: 13, Held: true, Owners: []int32{0}},
			{Name: "/tmp/vlv/auto", Path: "/tmp/vlv/auto", FD: 14, Held: true, Flags: 2, Owners: []int32{0}},
			{Name: "/tmp/vlv/sh1", Path: "/tmp/vlv/sh1", FD: 17, Held: true, Flags: 3, Owners: []int32{1, 1}},
		},
		Lockspaces: []Lockspace{
			{Dir: "/tmp/vlv/l1", Resources: []Resource{
				{Name: "sh", Path: "/tmp/vlv/l1/sh", FD: 15, Held: true, Flags: 3, Owners: []int32{0, 1}},
			}},
			{Dir: "/tmp/vlv/l2", Resources: []Resource{
				{Name: odd, Path: "/tmp/vlv/l2/" + odd, FD: 18, Held: true, Flags: 2, Owners: []int32{0}},
				{Name: "x", Path: "/tmp/vlv/l2/x", FD: 16, Held: true, Flags: 2, Owners: []int32{1}},
			}},
			{Dir: "/tmp/vlv/empty"},
		},
		Owners: []Owner{{Details: vmA, PIDFD: NoFD}, {Details: vmB, PIDFD: NoFD}},
	}
}

func TestDecodeC(t *testing.T) {
	t.Parallel()
	got := mustDecode(t, sample(t), samplePID)
	if diff := cmp.Diff(sampleSnapshot(t), got); diff != "" {
		t.Errorf("snapshot (-want +got):\n%s", diff)
	}
}

// What is encoded for the C daemon is what it writes itself, but for white space.
func TestEncodeC(t *testing.T) {
	t.Parallel()
	got, err := Encode(sampleSnapshot(t), C)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(compact(t, sample(t)), string(got)); diff != "" {
		t.Errorf("file (-want +got):\n%s", diff)
	}
}

func compact(t testing.TB, data []byte) string {
	t.Helper()
	var b bytes.Buffer
	if err := json.Compact(&b, data); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestHistory(t *testing.T) {
	t.Parallel()
	old := Details{Name: "old", UUID: uuid(t, "c7a5fdbd-edaf-9455-926a-d65c16db1809"), ID: 3, PID: 2001}
	older := Details{Name: "older", UUID: uuid(t, "c7a5fdbd-edaf-9455-926a-d65c16db180a"), ID: 4, PID: 2002}
	// What all three forms say.
	want := func(change func(s *Server)) *Snapshot {
		s := &Server{MinWorkers: 1, MaxWorkers: 1, MaxClients: 100, MaxUnauth: 100, KeepaliveInterval: math.MaxUint32, NextClientID: 3,
			Services: []Service{{MaxRequests: 1, Sockets: []Socket{{FD: 6, Unlink: true}}}},
			Clients: []Client{
				{ID: 1, FD: 7, MaxRequests: 1, Registered: true, Restricted: true, Owner: old, Self: None},
				{ID: 2, FD: 8, Auth: 2, AuthPending: true, ReadOnly: true, MaxRequests: 5, Registered: true, Owner: older, Self: None},
			}}
		change(s)
		const dir = "/var/lib/libvirt/lockd/files"
		return &Snapshot{PID: 4711, PIDFile: NoFD, Vault: NoFD, Lock: s,
			Lockspaces: []Lockspace{{Dir: dir, Resources: []Resource{
				{Name: "abc", Path: dir + "/abc", FD: 9, Held: true, Flags: 2, Owners: []int32{0}}}}},
			Owners: []Owner{{Details: old, PIDFD: NoFD}}}
	}
	for _, tt := range []struct {
		file     string
		change   func(s *Server)
		problems []string
	}{
		{"1.0.1-server.json", func(*Server) {}, []string{"server next_client_id is not in the file; taken as 1"}},
		{"1.2-servers-array.json", func(*Server) {}, []string{"daemon.servers[0] next_client_id is not in the file; taken as 1"}},
		{"2.3-servers-object.json", func(s *Server) {
			s.MaxUnauth = 20
			s.NextClientID = 9
			s.Services[0].Sockets[0].Unlink = false
			for i := range s.Clients {
				s.Clients[i].ID = uint64(5 + i)
				s.Clients[i].ConnectTime = int64(1234567890+i) * 1e9
				s.Clients[i].AuthPending = false
			}
		}, nil},
	} {
		t.Run(tt.file, func(t *testing.T) {
			t.Parallel()
			got, problems, err := Decode(readFile(t, filepath.Join("testdata/history", tt.file)), 4711)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want(tt.change), got); diff != "" {
				t.Errorf("snapshot (-want +got):\n%s", diff)
			}
			var said []string
			for _, p := range problems {
				if p.Trouble != Missing || !p.Kept {
					t.Errorf("problem is %+v", p)
				}
				said = append(said, p.Where+" "+p.Why)
			}
			if diff := cmp.Diff(tt.problems, said); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
		})
	}
}

// edit is one replacement in a file.
func edit(t testing.TB, data []byte, old, new string) []byte {
	t.Helper()
	if n := strings.Count(string(data), old); n != 1 {
		t.Fatalf("%q is %d times in the sample", old, n)
	}
	return []byte(strings.Replace(string(data), old, new, 1))
}

// Each defect is told by itself, and everything else is read.
func TestProblems(t *testing.T) {
	t.Parallel()
	const (
		lock     = "daemon.servers.virtlockd"
		client   = lock + ".clients[0]"
		private  = client + ".privateData"
		plain    = "defaultLockspace.resources[0]"
		sh       = "lockspaces[0].resources[0]"
		clientFD = `"sock":{"fd":9,`
		aPrivate = `"privateData":{"restricted":false,"ownerPid":53,"ownerId":7,"ownerName":"vmA","ownerUUID":"00010203-0405-0607-0809-0a0b0c0d0e0f"}`
		shText   = `{"name":"sh","path":"/tmp/vlv/l1/sh","fd":15,"lockHeld":true,"flags":3,"owners":[53,1879048194]}`
	)
	// Nobody else speaks for the owner then.
	unnamed := func(s *Snapshot) { s.Owners[0].Details = Details{PID: 53} }
	dropClient := func(s *Snapshot) {
		s.Lock.Clients = s.Lock.Clients[1:]
		unnamed(s)
	}
	noLock := func(s *Snapshot) {
		s.Lock = nil
		unnamed(s)
		s.Owners[1].Details = Details{PID: 1879048194}
	}
	noServers := func(s *Snapshot) {
		noLock(s)
		s.Admin = nil
	}
	unregister := func(s *Snapshot) {
		s.Lock.Clients[0].Registered = false
		s.Lock.Clients[0].Owner = Details{}
		unnamed(s)
	}
	dropSh := func(s *Snapshot) {
		s.Lockspaces[0].Resources = nil
	}
	tests := []struct {
		name     string
		old, new string
		change   func(s *Snapshot) // of what the sample says
		problems []Problem         // without Why
	}{
		{"server unknown", `"admin":{`, `"nobody":{`, func(s *Snapshot) { s.Admin = nil },
			[]Problem{{Where: "daemon.servers.nobody", Trouble: Foreign, FDs: []int32{5, 12}}}},
		{"server twice", `"virtlockd":{"min_workers":0`, `"virtlockd":{},"virtlockd":{"min_workers":0`, func(s *Snapshot) {
			s.Lock = &Server{NextClientID: 1}
			unnamed(s)
			s.Owners[1].Details = Details{PID: 1879048194}
		}, []Problem{
			{Where: lock + ".min_workers", Trouble: Missing, Kept: true},
			{Where: lock + ".max_workers", Trouble: Missing, Kept: true},
			{Where: lock + ".priority_workers", Trouble: Missing, Kept: true},
			{Where: lock + ".max_clients", Trouble: Missing, Kept: true},
			{Where: lock + ".keepaliveInterval", Trouble: Missing, Kept: true},
			{Where: lock + ".keepaliveCount", Trouble: Missing, Kept: true},
			{Where: lock + ".services", Trouble: Missing, Kept: true},
			{Where: lock + ".clients", Trouble: Missing, Kept: true},
			{Where: lock, Trouble: Missing, Kept: true},
			{Where: lock, Trouble: Foreign, FDs: []int32{4, 9, 10, 11}},
		}},
		{"no lock server", `"virtlockd":{`, `"other":{`, noLock, []Problem{
			{Where: "daemon.servers.other", Trouble: Foreign, FDs: []int32{4, 9, 10, 11}},
			{Where: "", Trouble: Missing},
		}},
		{"no servers", `"servers":{`, `"server":{`, noServers, []Problem{
			{Where: "daemon", Trouble: Missing, Kept: true}, {Where: "", Trouble: Missing},
		}},
		{"no daemon", `"daemon":{`, `"demon":{`, noServers, []Problem{
			{Where: "daemon", Trouble: Missing, Kept: true}, {Where: "", Trouble: Missing},
		}},
		{"no default lockspace", `"defaultLockspace":{`, `"x":{`, func(s *Snapshot) { s.Default = nil },
			[]Problem{{Where: "defaultLockspace", Trouble: Missing, Kept: true}}},
		{"no lockspaces", `"lockspaces":[`, `"x":[`, func(s *Snapshot) { s.Lockspaces = nil },
			[]Problem{{Where: "lockspaces", Trouble: Missing, Kept: true}}},
		{"lockspaces no array", `"lockspaces":[`, `"lockspaces":7,"x":[`, func(s *Snapshot) { s.Lockspaces = nil },
			[]Problem{{Where: "lockspaces", Trouble: WrongType, Kept: true}}},
		{"more anonymous clients than clients", `"max_anonymous_clients":20`, `"max_anonymous_clients":21`, nil,
			[]Problem{{Where: lock, Trouble: Contradiction, Kept: true}}},
		{"next id below an id", `"next_client_id":5`, `"next_client_id":4`, nil,
			[]Problem{{Where: lock, Trouble: Contradiction, Kept: true}}},
		{"no next id", `"next_client_id":5,`, ``, nil, []Problem{{Where: lock, Trouble: Missing, Kept: true}}},
		{"next id is text", `"next_client_id":5`, `"next_client_id":"5"`, nil,
			[]Problem{{Where: lock + ".next_client_id", Trouble: WrongType, Kept: true}, {Where: lock, Trouble: Contradiction, Kept: true}}},
		{"id twice", `"id":3`, `"id":2`, func(s *Snapshot) { s.Lock.Clients[1].ID = 5; s.Lock.NextClientID = 6 },
			[]Problem{{Where: lock, Trouble: Duplicate, Kept: true}}},
		{"client without nrequests_max", `"id":3,"auth":0,"auth_pending":false,"readonly":false,"nrequests_max":1,`, `"id":3,"auth":0,"auth_pending":false,"readonly":false,`, nil,
			[]Problem{{Where: lock + ".clients[1].nrequests_max", Trouble: Missing, Kept: true}}},
		{"service without auth", `"next_client_id":5,"services":[{"auth":0,`, `"next_client_id":5,"services":[{`, nil,
			[]Problem{{Where: lock + ".services[0].auth", Trouble: Missing, Kept: true}}},
		{"socket without descriptor", `"socks":[{"fd":4,`, `"socks":[{`, func(s *Snapshot) { s.Lock.Services[0].Sockets = nil },
			[]Problem{{Where: lock + ".services[0].socks[0]", Trouble: Missing}}},
		{"socket twice", `"socks":[{"fd":4,`, `"socks":[{"fd":4},{"fd":4,`, nil,
			[]Problem{{Where: lock + ".services[0].socks[1]", Trouble: Duplicate}}},
		{"service is no object", `"next_client_id":5,"services":[`, `"next_client_id":5,"services":[1,`, nil,
			[]Problem{{Where: lock + ".services[0]", Trouble: WrongType}}},
		{"id missing", `"id":3,`, ``, func(s *Snapshot) { s.Lock.Clients[1].ID = 5; s.Lock.NextClientID = 6 }, nil},
		{"authentication pending without any", `{"id":2,"auth":0,"auth_pending":false`, `{"id":2,"auth":0,"auth_pending":true`, dropClient,
			[]Problem{{Where: client, Trouble: Contradiction, FDs: []int32{9}}}},
		{"no privateData", aPrivate, `"private":{}`, dropClient, []Problem{{Where: client, Trouble: Missing, FDs: []int32{9}}}},
		{"privateData null", aPrivate, `"privateData":null`, dropClient, []Problem{{Where: client, Trouble: Missing, FDs: []int32{9}}}},
		{"client without socket", `"sock":{"fd":9,`, `"suck":{"fd":9,`, dropClient, []Problem{{Where: client, Trouble: Missing}}},
		{"client with negative descriptor", clientFD, `"sock":{"fd":-1,`, dropClient, []Problem{{Where: client, Trouble: Missing}}},
		{"client's descriptor out of range", clientFD, `"sock":{"fd":2147483648,`, dropClient, []Problem{
			{Where: client + ".sock.fd", Trouble: OutOfRange, Kept: true}, {Where: client, Trouble: Missing}}},
		{"client's descriptor is the socket's", clientFD, `"sock":{"fd":5,`, dropClient, []Problem{{Where: client, Trouble: Duplicate}}},
		{"client is no object", `"clients":[{"id":2,`, `"clients":[null,{"id":2,`, nil, []Problem{{Where: client, Trouble: WrongType}}},
		{"unregistered, as we write it", aPrivate, `"privateData":{"restricted":false,"ownerPid":0,"ownerId":0,"ownerName":"","ownerUUID":"00000000-0000-0000-0000-000000000000"}`,
			unregister, nil},
		{"unregistered, as an old release may write it", aPrivate, `"privateData":{"restricted":false,"ownerPid":0,"ownerId":0,"ownerName":null,"ownerUUID":"00000000000000000000000000000000"}`,
			unregister, nil},
		{"owner's name null", `"ownerName":"vmA"`, `"ownerName":null`, func(s *Snapshot) { s.Lock.Clients[0].Owner.Name = ""; s.Owners[0].Name = "" },
			[]Problem{{Where: private, Trouble: Missing, Kept: true}}},
		{"no owner's name", `"ownerName":"vmA",`, ``, func(s *Snapshot) { s.Lock.Clients[0].Owner.Name = ""; s.Owners[0].Name = "" },
			[]Problem{{Where: private + ".ownerName", Trouble: Missing, Kept: true}}},
		{"no owner's pid", `"ownerPid":53,`, ``, unregister, []Problem{{Where: private + ".ownerPid", Trouble: Missing, Kept: true}}},
		{"no restriction told", `"restricted":false,"ownerPid":53`, `"ownerPid":53`, func(s *Snapshot) { s.Lock.Clients[0].Restricted = true },
			[]Problem{{Where: private + ".restricted", Trouble: Missing, Kept: true}}},
		{"restriction is text", `"restricted":false,"ownerPid":53`, `"restricted":"no","ownerPid":53`, func(s *Snapshot) { s.Lock.Clients[0].Restricted = true },
			[]Problem{{Where: private + ".restricted", Trouble: WrongType, Kept: true}}},
		{"UUID too short", `"ownerUUID":"00010203-0405-0607-0809-0a0b0c0d0e0f"`, `"ownerUUID":"0001"`, func(s *Snapshot) {
			s.Lock.Clients[0].Owner.UUID = [16]byte{}
			s.Owners[0].UUID = [16]byte{}
		}, []Problem{{Where: private + ".ownerUUID", Trouble: OutOfRange, Kept: true}}},
		{"negative pid", `"ownerPid":53`, `"ownerPid":4294967295`, func(s *Snapshot) {
			s.Lock.Clients[0].Owner.PID = -1
			s.Owners[0].Details = Details{PID: 53}
		}, nil},
		{"pid out of range", `"ownerPid":53`, `"ownerPid":4294967296`, unregister, []Problem{{Where: private + ".ownerPid", Trouble: OutOfRange, Kept: true}}},
		{"owner with negative pid", `"owners":[53,1879048194]`, `"owners":[18446744071562067968,18446744073709551615]`, func(s *Snapshot) {
			s.Lockspaces[0].Resources[0].Owners = []int32{2, 3}
			s.Owners = append(s.Owners, Owner{Details: Details{PID: math.MinInt32}, PIDFD: NoFD}, Owner{Details: Details{PID: -1}, PIDFD: NoFD})
		}, nil},
		{"owner out of range", `"owners":[53,1879048194]`, `"owners":[18446744071562067967,53]`, func(s *Snapshot) {
			s.Lockspaces[0].Resources[0].Owners = []int32{0}
		}, []Problem{{Where: sh + ".owners[0]", Trouble: OutOfRange, Kept: true}}},
		{"owner is not whole", `"owners":[53,1879048194]`, `"owners":[53,5e3]`, func(s *Snapshot) {
			s.Lockspaces[0].Resources[0].Owners = []int32{0}
		}, []Problem{{Where: sh + ".owners[1]", Trouble: OutOfRange, Kept: true}}},
		{"owner is huge", `"owners":[53,1879048194]`, `"owners":[53,` + strings.Repeat("9", 500) + `]`, func(s *Snapshot) {
			s.Lockspaces[0].Resources[0].Owners = []int32{0}
		}, []Problem{{Where: sh + ".owners[1]", Trouble: OutOfRange, Kept: true}}},
		{"resource without owners", `"owners":[53,1879048194]`, `"owners":[]`, func(s *Snapshot) {
			s.Lockspaces[0].Resources[0].Owners = nil
		}, []Problem{{Where: sh, Trouble: NoOwners, Kept: true}}},
		{"resource without key owners", `,"owners":[53,1879048194]`, ``, func(s *Snapshot) {
			s.Lockspaces[0].Resources[0].Owners = nil
		}, []Problem{{Where: sh, Trouble: NoOwners, Kept: true}}},
		{"resource without lockHeld", `"fd":15,"lockHeld":true`, `"fd":15`, nil, []Problem{{Where: sh + ".lockHeld", Trouble: Missing, Kept: true}}},
		{"resource not held", `"fd":15,"lockHeld":true`, `"fd":15,"lockHeld":false`, func(s *Snapshot) { s.Lockspaces[0].Resources[0].Held = false }, nil},
		{"resource without descriptor", `"fd":15,`, ``, func(s *Snapshot) { s.Lockspaces[0].Resources[0].FD = NoFD },
			[]Problem{{Where: sh, Trouble: Missing, Kept: true}}},
		{"resource's descriptor is another's", `"fd":15`, `"fd":13`, func(s *Snapshot) { s.Lockspaces[0].Resources[0].FD = NoFD },
			[]Problem{{Where: sh, Trouble: Duplicate, Kept: true}}},
		{"resource without path", `"path":"/tmp/vlv/l1/sh",`, ``, nil, []Problem{{Where: sh + ".path", Trouble: Missing, Kept: true}}},
		{"resource without name", `"name":"sh",`, ``, nil, []Problem{{Where: sh + ".name", Trouble: Missing, Kept: true}}},
		{"resource without name and path", `"name":"sh","path":"/tmp/vlv/l1/sh",`, ``, dropSh, []Problem{{Where: sh, Trouble: Missing, FDs: []int32{15}}}},
		{"resource in default lockspace without path", `"path":"/tmp/vlv/plain",`, ``, nil, []Problem{{Where: plain + ".path", Trouble: Missing, Kept: true}}},
		{"resource in default lockspace without name", `"name":"/tmp/vlv/plain",`, ``, nil, []Problem{{Where: plain + ".name", Trouble: Missing, Kept: true}}},
		{"resource is no object", shText, `[]`, dropSh, []Problem{{Where: sh, Trouble: WrongType}}},
		{"resource twice", shText, shText + `,{"name":"sh","path":"/tmp/vlv/l1/sh","fd":99,"lockHeld":true,"flags":0,"owners":[53]}`, func(s *Snapshot) {
			s.Lockspaces[0].Resources[0].Owners = []int32{0, 1, 0}
		}, []Problem{{Where: "lockspaces[0].resources[1]", Trouble: Duplicate, FDs: []int32{99}}}},
		{"lockspace without directory", `"directory":"/tmp/vlv/l1",`, ``, func(s *Snapshot) { s.Lockspaces = s.Lockspaces[1:] },
			[]Problem{{Where: "lockspaces[0]", Trouble: Missing, FDs: []int32{15}}}},
		{"lockspace twice", `"directory":"/tmp/vlv/l2"`, `"directory":"/tmp/vlv/l1"`, func(s *Snapshot) {
			s.Lockspaces[0].Resources = append(s.Lockspaces[0].Resources, s.Lockspaces[1].Resources...)
			s.Lockspaces = append(s.Lockspaces[:1], s.Lockspaces[2])
		}, []Problem{{Where: "lockspaces[1]", Trouble: Duplicate, Kept: true}}},
		{"key twice", `"fd":15,`, `"fd":15,"fd":16,`, nil, []Problem{{Where: sh + ".fd", Trouble: Duplicate, Kept: true}}},
		{"newer version", `"magic":"52"`, `"magic":"52","virtlockd-go":{"version":2,"upgrades":3,"future":[]}`, func(s *Snapshot) { s.Upgrades = 3 },
			[]Problem{{Where: extra + ".version", Trouble: Foreign, Kept: true}}},
		{"table of owners lies", `"owners":[53,1879048194]`, `"owners":[53,1879048194],"virtlockd-go":{"owners":[0,1]}`, nil,
			[]Problem{{Where: sh, Trouble: Contradiction, Kept: true}}},
		{"identity without proof", `"id":2,`, `"id":2,"virtlockd-go":{"self":0},`, nil, []Problem{{Where: "", Trouble: Contradiction, Kept: true}}},
		{"bytes that are not base64", `"id":2,`, `"id":2,"virtlockd-go":{"unread":"AAA"},`, nil,
			[]Problem{{Where: client + "." + extra + ".unread", Trouble: OutOfRange, Kept: true}}},
		{"kind of owner unknown", `"magic":"52"`, `"magic":"52","virtlockd-go":{"owners":[{"pid":53,"kind":"friend"},5]}`, func(s *Snapshot) {
			s.Owners = []Owner{{Details: Details{PID: 53}, PIDFD: NoFD}, {PIDFD: NoFD}, s.Owners[1]}
			for _, rs := range s.spaces() {
				for i := range rs {
					for j := range rs[i].Owners {
						rs[i].Owners[j] *= 2
					}
				}
			}
		}, []Problem{
			{Where: extra + ".owners[0].kind", Trouble: OutOfRange, Kept: true},
			{Where: extra + ".owners[1]", Trouble: WrongType, Kept: true},
		}},
		{"pid file is a client", `"magic":"52"`, `"magic":"52","virtlockd-go":{"pidFile":9}`, nil,
			[]Problem{{Where: extra + ".pidFile", Trouble: Duplicate, Kept: true}}},
	}
	base := []byte(compact(t, sample(t)))
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			want := sampleSnapshot(t)
			if tt.change != nil {
				tt.change(want)
			}
			got, problems, err := Decode(edit(t, base, tt.old, tt.new), samplePID)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("snapshot (-want +got):\n%s", diff)
			}
			for i := range problems {
				t.Log(problems[i])
				if problems[i].Why == "" {
					t.Error("no reason is told")
				}
				problems[i].Why = ""
			}
			if diff := cmp.Diff(tt.problems, problems); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
		})
	}
}

// A daemon from before there was an admin server has none afterwards, which is no problem.
func TestNoAdminServer(t *testing.T) {
	t.Parallel()
	s := sampleSnapshot(t)
	s.Admin = nil
	data, err := Encode(s, C)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(s, mustDecode(t, data, samplePID)); diff != "" {
		t.Errorf("snapshot (-want +got):\n%s", diff)
	}
}

func TestMagic(t *testing.T) {
	t.Parallel()
	base := []byte(compact(t, sample(t)))
	for _, tt := range []struct{ name, magic, got string }{
		{"of another process", `"magic":"53"`, "53"},
		{"with a zero before it", `"magic":"052"`, "052"},
		{"number", `"magic":52`, ""},
		{"null", `"magic":null`, ""},
		{"empty", `"magic":""`, ""},
		{"not there", `"magi":"52"`, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s, problems, err := Decode(edit(t, base, `"magic":"52"`, tt.magic), samplePID)
			var magic *MagicError
			if !errors.As(err, &magic) || *magic != (MagicError{Got: tt.got, Want: samplePID}) {
				t.Errorf("error is %v, want a MagicError", err)
			}
			if s != nil || problems != nil {
				t.Error("something is returned with the error")
			}
		})
	}
}

func TestSyntax(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, data string
		offset     int
	}{
		{"empty", "", 0},
		{"white space", " \n", 2},
		{"array", "[]", 0},
		{"text", `"magic"`, 0},
		{"zero byte", "{\x00}", 1},
		{"not closed", `{"a":1`, 6},
		{"comma at the end", `{"a":1,}`, 7},
		{"comma in an array", `{"a":[1,]}`, 8},
		{"no comma", `{"a":1 "b":2}`, 7},
		{"no colon", `{"a" 1}`, 5},
		{"key is a number", `{1:1}`, 1},
		{"something behind", `{} {}`, 3},
		{"zero byte behind", "{}\x00", 2},
		{"word", `{"a":nul}`, 5},
		{"zeros before a number", `{"a":01}`, 6},
		{"plus", `{"a":+1}`, 5},
		{"fraction without digits", `{"a":1.}`, 7},
		{"exponent without digits", `{"a":1e+}`, 8},
		{"line break in a string", "{\"a\":\"\n\"}", 6},
		{"unknown escape", `{"a":"\x"}`, 7},
		{"escape too short", `{"a":"\u12"}`, 10},
		{"half of a surrogate pair", `{"a":"\ud800"}`, 12},
		{"wrong half of a surrogate pair", `{"a":"\udc00\ud800"}`, 18},
		{"string not closed", `{"a":"x`, 7},
		{"escape not closed", `{"a":"\`, 7},
		{"too deep", strings.Repeat(`{"a":`, maxDepth+1), 5 * maxDepth},
		{"too deep, in a value that is read", `{"daemon":` + strings.Repeat(`[`, maxDepth), 9 + maxDepth},
		{"comment", `{/**/}`, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s, problems, err := Decode([]byte(tt.data), samplePID)
			var syntax *SyntaxError
			if !errors.As(err, &syntax) {
				t.Fatalf("error is %v, want a SyntaxError", err)
			}
			if syntax.Offset != tt.offset {
				t.Errorf("%v; want offset %d", err, tt.offset)
			}
			if s != nil || problems != nil {
				t.Error("something is returned with the error")
			}
		})
	}
}

// Whatever Go's own decoder refuses we refuse, and the other way round, but for what is documented.
func TestStrictness(t *testing.T) {
	t.Parallel()
	for _, value := range []string{`0`, `-0`, `-`, `1.5e-3`, `1E5`, `.5`, `0x1`, `NaN`, `"\/\b\f\n\r\t\\\""`, `"\u00e9\ud83d\ude00"`,
		`"\u00E9"`, `'a'`, `[]`, `[1,2]`, `[,]`, `{}`, `{"a":{}}`, `{a:1}`, `true`, `True`, `tru`, "\"\x7f\"", "\"\x1f\"", `1 2`} {
		data := []byte(`{"magic":"1","x":` + value + `}`)
		_, _, err := Decode(data, 1)
		if valid := json.Valid(data); valid != (err == nil) {
			t.Errorf("%s: error is %v, valid JSON is %t", value, err, valid)
		}
	}
}

// Every string form means what it means to Go's decoder.
func TestStrings(t *testing.T) {
	t.Parallel()
	for _, text := range []string{`""`, `"plain"`, `"\/\b\f\n\r\t\\\""`, `"a\u00e9b\ud83d\ude00c"`, `"\u0000"`, `"ñ"`, `"\"`, `"\\"`, "\"\x7f\""} {
		var want string
		if json.Unmarshal([]byte(text), &want) != nil {
			continue
		}
		s := scanner{data: []byte(text)}
		if got := string(s.str()); got != want || s.err != nil || s.pos != len(text) {
			t.Errorf("%s is read as %q, want %q (%v)", text, got, want, s.err)
		}
	}
	// The C daemon's own writer lets this through, and to replace it would lock another file.
	s := scanner{data: []byte("\"\xed\xa0\x80\\n\xff\"")}
	if got := string(s.str()); got != "\xed\xa0\x80\n\xff" || s.err != nil {
		t.Errorf("bytes that are not UTF-8 are read as %q (%v)", got, s.err)
	}
}

func TestNoPrefixDecodes(t *testing.T) {
	t.Parallel()
	ours, err := Encode(sampleSnapshot(t), Ours)
	if err != nil {
		t.Fatal(err)
	}
	for _, data := range [][]byte{sample(t), ours, readFile(t, "testdata/history/1.0.1-server.json")} {
		for n := range len(data) {
			var syntax *SyntaxError
			if _, _, err := Decode(data[:n], samplePID); !errors.As(err, &syntax) {
				t.Fatalf("the first %d of %d bytes: error is %v, want a SyntaxError", n, len(data), err)
			}
		}
	}
}

// Keys that we do not know are ignored at every level, and no order of keys is needed.
func TestUnknownKeysAndOrder(t *testing.T) {
	t.Parallel()
	ours, err := Encode(sampleSnapshot(t), Ours)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"c": sample(t), "ours": ours} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := json.NewDecoder(bytes.NewReader(data))
			d.UseNumber()
			var document any
			if err := d.Decode(&document); err != nil {
				t.Fatal(err)
			}
			strange(document, "")
			// Go sorts keys, the daemons do not.
			changed, err := json.Marshal(document)
			if err != nil {
				t.Fatal(err)
			}
			whole := mustDecode(t, changed, samplePID)
			if diff := cmp.Diff(sampleSnapshot(t), whole); diff != "" {
				t.Errorf("snapshot (-want +got):\n%s", diff)
			}
		})
	}
}

// strange adds keys to every object below v, but for the one whose keys are names of servers.
func strange(v any, key string) {
	switch v := v.(type) {
	case map[string]any:
		for k, member := range v {
			strange(member, k)
		}
		if key != "servers" {
			v["aaa"] = map[string]any{"fd": []any{1.5, nil, "x"}}
			v["zzz"] = "y"
		}
	case []any:
		for _, element := range v {
			strange(element, "")
		}
	}
}

func TestUUID(t *testing.T) {
	t.Parallel()
	want := [16]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0xff}
	text := string(appendUUID(nil, &want))
	if text != "00010203-0405-0607-0809-0a0b0c0d0eff" {
		t.Errorf("UUID is %s", text)
	}
	for _, in := range []string{text, strings.ToUpper(text), strings.ReplaceAll(text, "-", "")} {
		if got, ok := parseUUID([]byte(in)); !ok || got != want {
			t.Errorf("%s is read as %x (%t)", in, got, ok)
		}
	}
	for _, in := range []string{"", text[1:], text + "0", "x" + text[1:]} {
		if u, ok := parseUUID([]byte(in)); ok || u != [16]byte{} {
			t.Errorf("%q is read as %x", in, u)
		}
	}
}

func TestNamesOfConstants(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for tr := Missing; tr <= Foreign; tr++ {
		seen[tr.String()] = true
	}
	if len(seen) != int(Foreign)+1 {
		t.Errorf("troubles are called %v", seen)
	}
	if got := Kind(99).String(); got != "Kind(99)" {
		t.Errorf("an unknown kind is called %s", got)
	}
	if !reflect.DeepEqual(kinds, [...]string{"unknown", "unverified", "watched", "verified"}) {
		t.Errorf("kinds are called %v; files have these names", kinds)
	}
}
