// SPDX-License-Identifier: LGPL-2.1-or-later

package adminproto_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"pgregory.net/rapid"

	"virtlockd/internal/adminproto"
	"virtlockd/internal/logging"
	"virtlockd/internal/owner"
	"virtlockd/internal/rpc"
	"virtlockd/test/wire"
)

// noReply is how long a reply that must not come is waited for.
const noReply = 50 * time.Millisecond

// text is an optional string.
func text(s string) wire.Payload { return wire.Payload(nil).Uint32(1).String(s) }

func server(name string) wire.Payload { return wire.Payload(nil).String(name) }

// client is the struct that names a client; nobody looks at its last two fields.
func client(srv string, id uint64) wire.Payload { return server(srv).Uint64(id).Uint64(9).Uint32(9) }

// uints is a list of parameters "name", value, ...
func uints(p wire.Payload, v ...any) wire.Payload {
	p = p.Uint32(uint32(len(v) / 2))
	for i := 0; i < len(v); i += 2 {
		p = p.String(v[i].(string)).Uint32(2).Uint32(uint32(v[i+1].(int)))
	}
	return p
}

// want is the wire error that a call must get.
func want(code, domain int32, template, detail string) string {
	none := int32(-1)
	return (&wire.Error{Code: code, Domain: domain, Level: 2, Message: ptr(strings.Replace(template, "%s", detail, 1)),
		Str1: &template, Str2: &detail, Int1: none, Int2: none}).Error()
}

func decodeError() string {
	return want(wire.CodeRPC, wire.DomainRPC, "%s", "Unable to decode message payload")
}

func flagsError(function string, unknown uint32) string {
	m := fmt.Sprintf("unsupported flags (0x%x) in function %s", unknown, function)
	return (&wire.Error{Code: wire.CodeInvalidArg, Domain: wire.DomainAdmin, Level: 2, Message: &m, Str1: &function, Str2: ptr("flags")}).Error()
}

func ptr(s string) *string { return &s }

// The errors below were seen from the C daemon.
func TestErrors(t *testing.T) {
	t.Parallel()
	b := newBench(t, defaults, defaults, nil)
	c := b.dial("admin")
	const v = "virtlockd"
	long := strings.Repeat("b", 80)
	noServer := want(95, 7, "Server not found: %s", "No server named 'nosuch'")
	noServer2 := want(95, 62, "Server not found: %s", "no server with matching name 'nosuch' found")
	noClient := want(96, 7, "Client not found: %s", "No client with matching ID '99'")
	noClient2 := want(96, 62, "Client not found: %s", "no client with matching id '99' found")
	param := func(name string, kind uint32, value ...byte) wire.Payload {
		return server(v).Uint32(1).String(name).Uint32(kind).Bytes(value...).Uint32(0)
	}
	wrongType := func(name string) string {
		return want(8, 0, "invalid argument: %s", "invalid type '"+name+"' for parameter 'minWorkers', expected 'uint'")
	}
	unsupported := func(name string) string {
		return want(74, 0, "argument unsupported: %s", "parameter '"+name+"' not supported")
	}
	invalid := func(detail string) string { return want(8, 0, "invalid argument: %s", detail) }
	four, eight := []byte{0, 0, 0, 1}, []byte{0, 0, 0, 0, 0, 0, 0, 1}
	for _, tt := range []struct {
		name string
		proc uint32
		args wire.Payload
		want string // "": success
	}{
		{"server before flags", 6, server("nosuch").Uint32(1), noServer},
		{"thread pool flags", 6, server(v).Uint32(1), flagsError("adminServerGetThreadPoolParameters", 1)},
		{"server before parameters", 7, uints(server("nosuch"), "bogus", 1).Uint32(1), noServer2},
		{"flags before names", 7, uints(server(v), "bogus", 1).Uint32(1), flagsError("adminServerSetThreadPoolParameters", 1)},
		{"79 bytes of name", 7, uints(server(v), long[1:], 1).Uint32(0), unsupported(long[1:])},
		{"80 bytes of name", 7, uints(server(v), long, 1).Uint32(0), want(1, 0, "internal error: %s", "parameter "+long+" too big for destination")},
		{"80 bytes of name before flags", 7, uints(server(v), long, 1).Uint32(1), want(1, 0, "internal error: %s", "parameter "+long+" too big for destination")},
		{"type 0", 7, param("minWorkers", 0, four...), decodeError()},
		{"type 8", 7, param("minWorkers", 8, eight...), decodeError()},
		{"int", 7, param("minWorkers", 1, four...), wrongType("int")},
		{"llong", 7, param("minWorkers", 3, eight...), wrongType("llong")},
		{"ullong", 7, param("minWorkers", 4, eight...), wrongType("ullong")},
		{"double", 7, param("minWorkers", 5, eight...), wrongType("double")},
		{"boolean", 7, param("minWorkers", 6, four...), wrongType("boolean")},
		{"string", 7, param("minWorkers", 7, wire.Payload(nil).String("x")...), wrongType("string")},
		{"32 parameters", 7, uints(server(v), slices.Repeat([]any{"a", 1}, 32)...).Uint32(0), unsupported("a")},
		{"33 parameters", 7, uints(server(v), slices.Repeat([]any{"a", 1}, 33)...).Uint32(0), decodeError()},
		{"a list of four thousand million", 7, server(v).Uint32(0xffffffff), decodeError()},
		{"errors in the order of names", 7, uints(server(v), "zz", 1, "bogus", 1).Uint32(0), unsupported("bogus")},
		{"nWorkers can't be set", 7, uints(server(v), "nWorkers", 1).Uint32(0), unsupported("nWorkers")},
		{"twice", 7, uints(server(v), "maxWorkers", 0, "minWorkers", 0, "maxWorkers", 0).Uint32(0), invalid("parameter 'maxWorkers' occurs multiple times")},
		{"an unknown one twice", 7, uints(server(v), "aa", 0, "aa", 0).Uint32(0), unsupported("aa")},
		{"name cut at NUL", 7, uints(server(v), "minWorkers\x00x", 1).Uint32(0), invalid("minWorkers cannot be larger than maxWorkers")},
		{"min above max", 7, uints(server(v), "prioWorkers", 3, "minWorkers", 7, "maxWorkers", 5).Uint32(0), invalid("minWorkers cannot be larger than maxWorkers")},
		{"max above 0", 7, uints(server(v), "minWorkers", 3, "maxWorkers", 5).Uint32(0), invalid("maxWorkers must not be switched from zero to non-zero and vice versa")},
		{"zeros", 7, uints(server(v), "minWorkers", 0, "maxWorkers", 0).Uint32(0), ""},
		{"no parameters", 7, uints(server(v)).Uint32(0), ""},
		{"list of clients: server", 8, server("nosuch").Uint32(1).Uint32(1), noServer},
		{"list of clients: flags", 8, server(v).Uint32(1).Uint32(1), flagsError("adminServerListClients", 1)},
		{"look up client: server", 9, server("nosuch").Uint64(99).Uint32(1), noServer},
		{"look up client: flags before client", 9, server("admin").Uint64(99).Uint32(1), flagsError("adminServerLookupClient", 1)},
		{"look up client", 9, server("admin").Uint64(99).Uint32(0), noClient},
		{"look up client: largest id", 9, server("admin").Uint64(1<<64 - 1).Uint32(0), want(96, 7, "Client not found: %s", "No client with matching ID '18446744073709551615'")},
		{"client info: server", 10, client("nosuch", 99).Uint32(1), noServer2},
		{"client info: client before flags", 10, client("admin", 99).Uint32(1), noClient2},
		{"client info: flags", 10, client("admin", 1).Uint32(1), flagsError("adminClientGetInfo", 1)},
		{"client close: server", 11, client("nosuch", 99).Uint32(1), noServer},
		{"client close: client before flags", 11, client("admin", 99).Uint32(1), noClient},
		{"client close: flags", 11, client("admin", 1).Uint32(1), flagsError("adminClientClose", 1)},
		{"limits: server", 12, server("nosuch").Uint32(1), noServer},
		{"set limits: server", 13, uints(server("nosuch"), "bogus", 1).Uint32(1), noServer2},
		{"set limits: flags", 13, uints(server(v), "bogus", 1).Uint32(1), flagsError("adminServerSetClientLimits", 1)},
		{"set limits: above", 13, uints(server(v), "nclients_unauth_max", 21).Uint32(0), want(8, 7, "invalid argument: %s", "The overall maximum number of clients waiting for authentication must not be less than the overall maximum number of clients")},
		{"outputs: flags", 14, wire.FlagsArgs(3), flagsError("adminConnectGetLoggingOutputs", 3)},
		{"filters: flags", 15, wire.FlagsArgs(3), flagsError("adminConnectGetLoggingFilters", 3)},
		{"set outputs: flags", 16, text("x").Uint32(8), flagsError("adminConnectSetLoggingOutputs", 8)},
		{"set filters: flags", 17, text("x").Uint32(8), flagsError("adminConnectSetLoggingFilters", 8)},
		{"any word but zero is true", 16, wire.Payload(nil).Uint32(2).String("x").Uint32(0), ""},
		{"TLS: flags", 18, server(v).Uint32(1), flagsError("adminServerUpdateTlsFiles", 1)},
		{"TLS: server", 18, server("nosuch").Uint32(1), noServer},
		{"timeout: short", 19, wire.Payload(nil).Uint32(1), decodeError()},
		{"timeout: flags", 19, wire.Payload(nil).Uint32(1).Uint32(1), flagsError("adminConnectSetDaemonTimeout", 1)},
		{"shutdown: flags", 20, wire.FlagsArgs(7), flagsError("adminConnectDaemonShutdown", 6)},
		{"no such procedure", 21, nil, want(39, 7, "%s", "unknown procedure: 21")},
		{"bytes behind the arguments", 3, wire.Payload(nil).Uint32(0), ""},
	} {
		m, err := c.Call(tt.proc, tt.args)
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		got := ""
		if err := m.Err(); err != nil {
			got = err.Error()
		}
		if got != tt.want {
			t.Errorf("%s:\n got %s\nwant %s", tt.name, got, tt.want)
		}
	}
}

// A refused change changes nothing, an accepted one is seen at once.
func TestThreadPool(t *testing.T) {
	t.Parallel()
	b := newBench(t, defaults, defaults, nil)
	c := b.dial("admin")
	pool := func(srv string) []byte {
		m, err := c.Call(6, server(srv).Uint32(0))
		if err != nil || m.Err() != nil {
			t.Fatal(err, m.Err())
		}
		return m.Payload
	}
	shown := func(prio int) []byte {
		return uints(nil, "minWorkers", 0, "maxWorkers", 0, "nWorkers", 0, "freeWorkers", 0, "prioWorkers", prio, "jobQueueDepth", 0)
	}
	call(t, c, 7, uints(server("virtlockd"), "prioWorkers", 4).Uint32(0))
	if m, err := c.Call(7, uints(server("virtlockd"), "maxWorkers", 1, "prioWorkers", 5).Uint32(0)); err != nil || m.Err() == nil {
		t.Errorf("got %v %v, want a refusal", m, err)
	}
	if got := pool("virtlockd"); !bytes.Equal(got, shown(4)) {
		t.Errorf("virtlockd: got %x", got)
	}
	if got := pool("admin"); !bytes.Equal(got, shown(0)) {
		t.Errorf("admin: got %x", got)
	}
}

// call is a call that must succeed without a result.
func call(t testing.TB, c *wire.Conn, proc uint32, args []byte) {
	t.Helper()
	m, err := c.Call(proc, args)
	if err != nil || m.Err() != nil || len(m.Payload) > 0 {
		t.Fatalf("procedure %d: %v, %s", proc, err, m)
	}
}

func TestClients(t *testing.T) {
	t.Parallel()
	b := newBench(t, defaults, defaults, nil)
	before := time.Now().Unix()
	admin, guest := b.dial("admin"), b.dial("lock")
	if err := guest.Register(wire.VM(os.Getpid())); err != nil {
		t.Fatal(err)
	}

	list, err := admin.AdminClients("virtlockd")
	if err != nil || len(list) != 1 || list[0].ID != 1 || list[0].Transport != 0 {
		t.Fatalf("got %+v, %v", list, err)
	}
	if at := list[0].Timestamp; at < before || at > time.Now().Unix() {
		t.Errorf("connected at %d", at)
	}
	m, err := admin.Call(8, server("virtlockd").Uint32(0).Uint32(0))
	if err != nil || !bytes.Equal(m.Payload, wire.Payload(nil).Uint32(0).Uint32(1)) {
		t.Errorf("number of clients: got %s, %v", m, err)
	}
	m, err = admin.Call(9, server("virtlockd").Uint64(1).Uint32(0))
	found := server("virtlockd").Uint64(1).Uint64(uint64(list[0].Timestamp)).Uint32(0)
	if err != nil || !bytes.Equal(m.Payload, found) {
		t.Errorf("look-up: got %s, %v", m, err)
	}

	self, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	group, err := user.LookupGroupId(self.Gid)
	if err != nil {
		t.Fatal(err)
	}
	uid, _ := strconv.Atoi(self.Uid)
	gid, _ := strconv.Atoi(self.Gid)
	const isInt, isBool, isString = 1, 6, 7
	info := wire.Payload(nil).String("readonly").Uint32(isBool).Uint32(0).
		String("unix_user_id").Uint32(isInt).Uint32(uint32(uid)).
		String("unix_user_name").Uint32(isString).String(self.Username).
		String("unix_group_id").Uint32(isInt).Uint32(uint32(gid)).
		String("unix_group_name").Uint32(isString).String(group.Name).
		String("unix_process_id").Uint32(isInt).Uint32(uint32(os.Getpid()))
	m, err = admin.Call(10, client("virtlockd", 1).Uint32(0))
	if err != nil || m.Err() != nil || !bytes.HasPrefix(m.Payload[4:], info) {
		t.Errorf("info: got %s, %v", m, err)
	}

	// Disconnecting is not taken for the peer's hang-up.
	if err := admin.AdminClientClose("virtlockd", 1); err != nil {
		t.Fatal(err)
	}
	if list, err := admin.AdminClients("virtlockd"); err != nil || len(list) > 0 {
		t.Errorf("after it was disconnected: %+v, %v", list, err)
	}
	if err := admin.AdminClientClose("virtlockd", 1); err == nil {
		t.Error("it can be disconnected twice")
	}
	if _, err := guest.Recv(); !errors.Is(err, wire.ErrClosed) {
		t.Errorf("guest: %v, want a closed connection", err)
	}
	<-b.peers.closed
	b.peers.mu.Lock()
	defer b.peers.mu.Unlock()
	if b.peers.byPeer[1] {
		t.Error("a client that we disconnected is taken for one that hung up")
	}
}

// A guest's own connection is not closed while it holds locks; every other one is. (D-admin-guest)
func TestGuard(t *testing.T) {
	t.Parallel()
	var guarded atomic.Pointer[owner.Details]
	b := newBench(t, defaults, defaults, func(b *bench) {
		b.cfg.Guards = func(c *rpc.Client) *owner.Details {
			if c.ID() == 1 && b.lock.Client(1) == c {
				return guarded.Load()
			}
			return nil
		}
	})
	guarded.Store(&owner.Details{Name: "web1", UUID: [16]byte{0x11, 0x22}, PID: 4711})
	admin, guest := b.dial("admin"), b.dial("lock")
	if err := guest.Ping(); err != nil {
		t.Fatal(err)
	}
	other := b.dial("lock")
	if err := other.Ping(); err != nil {
		t.Fatal(err)
	}
	err := admin.AdminClientClose("virtlockd", 1)
	expected := want(55, 62, "Requested operation is not valid: %s", "client '1' is the running guest 'web1' (uuid 11220000-0000-0000-0000-000000000000, pid 4711) itself, "+
		"which holds locks; stop or migrate the guest instead")
	if err == nil || err.Error() != expected {
		t.Errorf("got %v\nwant %s", err, expected)
	}
	if err := guest.Ping(); err != nil {
		t.Errorf("the guest has lost its connection: %v", err)
	}
	if err := admin.AdminClientClose("virtlockd", 2); err != nil {
		t.Error(err)
	}
	if _, err := other.Recv(); !errors.Is(err, wire.ErrClosed) {
		t.Errorf("another client: %v, want a closed connection", err)
	}
	guarded.Store(nil)
	if err := admin.AdminClientClose("virtlockd", 1); err != nil {
		t.Error(err)
	}
	if _, err := guest.Recv(); !errors.Is(err, wire.ErrClosed) {
		t.Errorf("a guest without locks: %v, want a closed connection", err)
	}
}

// Two administrators who disconnect each other end both, and nobody else waits.
func TestCloseEachOther(t *testing.T) {
	t.Parallel()
	b := newBench(t, defaults, defaults, nil)
	dial := func() (*wire.Conn, uint64) {
		c := b.dial("admin")
		if err := c.AdminOpen(); err != nil {
			t.Fatal(err)
		}
		list := b.admin.Clients()
		return c, list[len(list)-1].ID()
	}
	for range 50 {
		one, idOne := dial()
		two, idTwo := dial()
		for c, victim := range map[*wire.Conn]uint64{one: idTwo, two: idOne} {
			h := wire.Header{Program: wire.AdminProgram, Version: 1, Proc: wire.ProcAdminClientClose}
			if err := c.Send(wire.Frame(h, client("admin", victim).Uint32(0))); err != nil && !errors.Is(err, wire.ErrClosed) {
				t.Fatal(err)
			}
		}
		closed := 0
		for _, c := range []*wire.Conn{one, two} {
			m, err := c.Recv()
			if err == nil && m.Err() == nil { // it won; the other one may have been too late
				m, err = c.RecvWithin(noReply)
			}
			if errors.Is(err, wire.ErrClosed) {
				closed++
			} else if !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatalf("got %s, %v", m, err)
			}
			c.Close()
		}
		if closed == 0 {
			t.Fatal("nobody was disconnected")
		}
	}
}

func TestLimits(t *testing.T) {
	t.Parallel()
	b := newBench(t, rpc.Limits{MaxClients: 1, MaxUnauth: 1}, defaults, nil)
	admin, first := b.dial("admin"), b.dial("lock")
	if err := first.Ping(); err != nil {
		t.Fatal(err)
	}
	second := b.dial("lock")
	if err := second.Send(wire.Ping()); err != nil {
		t.Fatal(err)
	}
	if _, err := second.RecvWithin(noReply); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("a client beyond the limit: %v", err)
	}
	call(t, admin, 13, uints(server("virtlockd"), "nclients_max", 2).Uint32(0))
	if _, err := second.Recv(); err != nil {
		t.Errorf("after the limit was raised: %v", err)
	}
	call(t, admin, 13, uints(server("virtlockd"), "nclients_unauth_max", 0, "nclients_max", 1).Uint32(0))
	for _, c := range []*wire.Conn{first, second} {
		if err := c.Ping(); err != nil {
			t.Errorf("after the limit was lowered: %v", err)
		}
	}
	m, err := admin.Call(12, server("virtlockd").Uint32(0))
	if shown := uints(nil, "nclients_max", 1, "nclients", 2, "nclients_unauth_max", 0, "nclients_unauth", 0); err != nil || !bytes.Equal(m.Payload, shown) {
		t.Errorf("got %s, %v", m, err)
	}
}

// Two changes at once never end in limits that neither could have set.
func TestLimitsAtOnce(t *testing.T) {
	t.Parallel()
	b := newBench(t, defaults, defaults, nil)
	done := make(chan error)
	for _, name := range []string{"nclients_max", "nclients_unauth_max"} {
		c := b.dial("admin")
		go func() {
			var err error
			for i := 0; i < 300 && err == nil; i++ {
				_, err = c.Call(13, uints(server("virtlockd"), name, 10+i*7%11).Uint32(0))
			}
			done <- err
		}()
	}
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if l := b.lock.Limits(); l.MaxUnauth > l.MaxClients {
		t.Errorf("got %+v", l)
	}
}

func TestLogging(t *testing.T) {
	t.Parallel()
	b := newBench(t, defaults, defaults, nil)
	c := b.dial("admin")
	reply := func(proc uint32) []byte {
		t.Helper()
		m, err := c.Call(proc, wire.FlagsArgs(0))
		if err != nil || m.Err() != nil {
			t.Fatal(err, m.Err())
		}
		return m.Payload
	}
	if got := reply(15); !bytes.Equal(got, wire.Payload(nil).Uint32(0).Uint32(0)) {
		t.Errorf("no filters: got %x", got)
	}
	b.logs.mu.Lock()
	b.logs.nfilters = 1
	b.logs.mu.Unlock()
	call(t, c, 17, text("1:*a* ").Uint32(0))
	if got := reply(15); !bytes.Equal(got, text("1:*a* ").Uint32(1)) {
		t.Errorf("one filter: got %x", got)
	}
	call(t, c, 16, text("3:stderr").Uint32(0))
	if got := reply(14); !bytes.Equal(got, wire.Payload(nil).String("3:stderr").Uint32(1)) {
		t.Errorf("one output: got %x", got)
	}
	// An absent string is an empty one.
	call(t, c, 16, wire.Payload(nil).Uint32(0).Uint32(0))
	if got := reply(14); !bytes.Equal(got, wire.Payload(nil).String("").Uint32(1)) {
		t.Errorf("no output: got %x", got)
	}
	// What the peer would refuse is not sent.
	b.logs.mu.Lock()
	b.logs.outputs = strings.Repeat("x", 4<<20+1)
	b.logs.mu.Unlock()
	if m, err := c.Call(14, wire.FlagsArgs(0)); err != nil || m.Err() == nil || m.Err().Error() != want(39, 7, "%s", "Unable to encode message payload") {
		t.Errorf("too long: got %s, %v", m.Err(), err)
	}

	for _, tt := range []struct {
		err  error
		want string
	}{
		{&logging.InvalidError{Detail: "Invalid priority '9' for filter '9:foo'"}, want(8, 0, "invalid argument: %s", "Invalid priority '9' for filter '9:foo'")},
		{&logging.OpenError{Path: "/nodir/x", Err: syscall.ENOENT}, (&wire.Error{Code: 38, Level: 2, Message: ptr((&logging.OpenError{Path: "/nodir/x", Err: syscall.ENOENT}).Error()),
			Str1: ptr("%s"), Str2: ptr((&logging.OpenError{Path: "/nodir/x", Err: syscall.ENOENT}).Error()), Int1: int32(syscall.ENOENT), Int2: -1}).Error()},
		{errors.New("something else"), want(55, 62, "Requested operation is not valid: %s", "something else")},
	} {
		b.logs.mu.Lock()
		b.logs.err = tt.err
		b.logs.mu.Unlock()
		for _, proc := range []uint32{16, 17} {
			m, err := c.Call(proc, text("x").Uint32(0))
			if err != nil || m.Err() == nil || m.Err().Error() != tt.want {
				t.Errorf("procedure %d: got %v, %v\nwant %s", proc, m.Err(), err, tt.want)
			}
		}
	}
}

// An error whose text is too long for the peer closes the connection, as it does with the C daemon. Nothing else suffers.
func TestLongest(t *testing.T) {
	t.Parallel()
	b := newBench(t, defaults, defaults, nil)
	const fits = 4<<20 - len("Server not found: No server named ''")
	c := b.dial("admin")
	m, err := c.Call(5, server(strings.Repeat("x", fits)).Uint32(0))
	if e := wire.AsError(m.Err()); err != nil || e == nil || len(e.Text()) != 4<<20 {
		t.Errorf("the longest text: %v", err)
	}
	m, err = c.Call(5, server(strings.Repeat("x", 4<<20+1)).Uint32(0))
	if err != nil || m.Err() == nil || m.Err().Error() != decodeError() {
		t.Errorf("a longer string: %s, %v", m.Err(), err)
	}
	if _, err = c.Call(5, server(strings.Repeat("x", fits+1)).Uint32(0)); !errors.Is(err, wire.ErrClosed) {
		t.Errorf("a longer text: %v", err)
	}
	if err := b.dial("admin").AdminOpen(); err != nil {
		t.Error(err)
	}
}

func TestTimeout(t *testing.T) {
	t.Parallel()
	set := make(chan uint32, 8)
	b := newBench(t, defaults, defaults, func(b *bench) {
		b.cfg.SetTimeout = func(seconds uint32) { set <- seconds }
	})
	c := b.dial("admin")
	for _, v := range []uint32{100, 0, 0, 1<<32 - 1} {
		call(t, c, 19, wire.Payload(nil).Uint32(v).Uint32(0))
		if got := <-set; got != v {
			t.Errorf("got %d, want %d", got, v)
		}
	}
}

// The daemon ends after the administrator has heard that it does. (D-admin-shutdown)
func TestShutdown(t *testing.T) {
	t.Parallel()
	for _, preserve := range []bool{false, true} {
		began := make(chan bool, 2)
		b := newBench(t, defaults, defaults, func(b *bench) {
			b.cfg.Shutdown = func(preserve bool) (func(), error) {
				return func() { began <- preserve }, nil
			}
		})
		c := b.dial("admin")
		flags := uint32(0)
		if preserve {
			flags = 1
		}
		call(t, c, 20, wire.FlagsArgs(flags))
		if got := <-began; got != preserve {
			t.Errorf("preserve: got %t, want %t", got, preserve)
		}
		if _, err := c.Recv(); !errors.Is(err, wire.ErrClosed) {
			t.Errorf("after the reply: %v", err)
		}
		if err := b.dial("admin").AdminOpen(); err != nil {
			t.Error(err)
		}
		if len(began) > 0 {
			t.Error("began twice")
		}
	}
}

// As long as the reply is on its way the daemon is ending, so nothing is handed over that would go on.
func TestEnding(t *testing.T) {
	t.Parallel()
	b := newBench(t, defaults, defaults, func(b *bench) {
		b.cfg.Shutdown = func(bool) (func(), error) { return func() {}, nil }
	})
	if err := b.dial("admin").AdminOpen(); err != nil {
		t.Fatal(err)
	}
	if b.prog.Ending() {
		t.Error("before it was asked for")
	}
	// The reply is not out before the call returns.
	c := new(rpc.Client)
	if _, err := b.prog.Call(c, 20, wire.FlagsArgs(0), nil); err != nil {
		t.Fatal(err)
	}
	if !b.prog.Ending() {
		t.Error("not while the reply is on its way")
	}
	b.prog.Closed(c, false)
	if b.prog.Ending() {
		t.Error("still, when it is out")
	}
}

func TestShutdownRefused(t *testing.T) {
	t.Parallel()
	var reason atomic.Pointer[error]
	b := newBench(t, defaults, defaults, func(b *bench) {
		b.cfg.Shutdown = func(bool) (func(), error) { return nil, *reason.Load() }
	})
	c := b.dial("admin")
	const next = " and would be lost; stop, migrate or suspend the guests first; to replace the program use the live upgrade (SIGUSR1), which keeps them"
	for _, tt := range []struct {
		err  error
		want string
	}{
		{&adminproto.LocksHeldError{Locks: 1}, "1 lock is held" + next},
		{&adminproto.LocksHeldError{Locks: 12}, "12 locks are held" + next},
		{errNotWanted, "not wanted here"},
	} {
		reason.Store(&tt.err)
		m, err := c.Call(20, wire.FlagsArgs(0))
		if w := want(55, 62, "Requested operation is not valid: %s", tt.want); err != nil || m.Err() == nil || m.Err().Error() != w {
			t.Errorf("got %v, %v\nwant %s", m.Err(), err, w)
		}
	}
	if err := c.AdminOpen(); err != nil {
		t.Errorf("the connection: %v", err)
	}
}

// Whatever the arguments are, the answer is a reply that decodes, or a closed connection where the
// call asks for that.
func TestAnyArguments(t *testing.T) {
	t.Parallel()
	b := newBench(t, defaults, defaults, nil)
	rapid.Check(t, func(r *rapid.T) {
		args := wire.Payload(nil)
		for range rapid.IntRange(0, 8).Draw(r, "pieces") {
			switch rapid.IntRange(0, 3).Draw(r, "piece") {
			case 0:
				args = args.Uint32(rapid.OneOf(rapid.Uint32Range(0, 10), rapid.Uint32()).Draw(r, "word"))
			case 1:
				args = args.String(rapid.SampledFrom([]string{"", "virtlockd", "admin", "nclients_max", "minWorkers"}).Draw(r, "name"))
			case 2:
				args = args.String(rapid.String().Draw(r, "string"))
			case 3:
				args = args.Bytes(rapid.SliceOf(rapid.Byte()).Draw(r, "bytes")...)
			}
		}
		c := b.dial("admin")
		defer c.Close()
		m, err := c.Call(rapid.Uint32Range(0, 22).Draw(r, "procedure"), args)
		if errors.Is(err, wire.ErrClosed) {
			return
		}
		if err != nil {
			r.Fatal(err)
		}
		if err := m.Err(); err != nil && wire.AsError(err) == nil {
			r.Fatal(err)
		}
	})
	if err := b.dial("admin").AdminOpen(); err != nil {
		t.Error(err)
	}
}
