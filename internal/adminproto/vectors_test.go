// SPDX-License-Identifier: LGPL-2.1-or-later

package adminproto_test

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"virtlockd/internal/rpc"
	"virtlockd/test/vectors"
	"virtlockd/test/wire"
)

// What was recorded on the C daemon's admin socket comes out of the program, byte by byte.
func TestVectors(t *testing.T) {
	t.Parallel()
	scenarios, err := vectors.Load("../../test/vectors/testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, s := range scenarios {
		if !strings.HasPrefix(s.Name, "adm-") && !strings.HasPrefix(s.Name, "mal-admin-") || s.Name == "mal-admin-program-on-lock" {
			continue
		}
		n++
		t.Run(s.Name, func(t *testing.T) {
			t.Parallel()
			replay(t, s)
		})
	}
	if n < 11 {
		t.Errorf("%d scenarios, there should be 11", n)
	}
}

func replay(t *testing.T, s vectors.Scenario) {
	lock, admin := uint32(1024), uint32(5000)
	for line := range strings.Lines(s.Config) {
		// A line that is neither leaves them alone.
		_, _ = fmt.Sscanf(line, "max_clients = %d", &lock)
		_, _ = fmt.Sscanf(line, "admin_max_clients = %d", &admin)
	}
	b := newBench(t, rpc.Limits{MaxClients: lock, MaxUnauth: lock}, rpc.Limits{MaxClients: admin, MaxUnauth: admin}, nil)
	// The recorder connected once before the first step.
	b.dial("lock").Close()
	<-b.peers.closed

	clients := map[string]*wire.Conn{}
	for i, step := range s.Steps {
		fail := func(format string, v ...any) {
			t.Helper()
			t.Fatalf("step %d (%s): %s", i, step, fmt.Sprintf(format, v...))
		}
		switch step.Op {
		case "connect":
			clients[step.Client] = b.dial(step.Socket)
			continue
		case "send":
			m := frame(t, step.SendHex)
			b, err := m.Bytes()
			if err != nil {
				fail("%v", err)
			}
			if err := clients[step.Client].Send(b); err != nil && (step.Expect != "closed" || !errors.Is(err, wire.ErrClosed)) {
				fail("%v", err)
			}
		case "recv":
		default:
			fail("unknown")
		}
		switch step.Expect {
		case "none":
			continue
		case "closed":
			if m, err := clients[step.Client].Recv(); !errors.Is(err, wire.ErrClosed) {
				fail("got %s, %v; want a closed connection", m, err)
			}
			continue
		case "no-reply":
			// A later step shows that nothing is left to come.
			if m, err := clients[step.Client].RecvWithin(noReply); !errors.Is(err, os.ErrDeadlineExceeded) {
				fail("got %s, %v; want none", m, err)
			}
			continue
		}
		m, err := clients[step.Client].Recv()
		if err != nil {
			fail("%v", err)
		}
		alternatives := append([]string{step.ExpectHex}, step.ExpectHexAlt...)
		if !slices.ContainsFunc(alternatives, func(want string) bool { p := frame(t, want); return p.Matches(m.Raw) }) {
			fail("got %s\n%x\nwant\n%s", m, m.Raw, strings.Join(alternatives, "\nor\n"))
		}
	}
}

func frame(t *testing.T, s string) vectors.Pattern {
	t.Helper()
	p, err := vectors.ParsePattern(s, func(string) (uint32, error) { return uint32(os.Getpid()), nil })
	if err != nil {
		t.Fatal(err)
	}
	return p
}
