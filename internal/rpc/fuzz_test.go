// SPDX-License-Identifier: LGPL-2.1-or-later

package rpc

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/internal/poll"
)

// fuzzLimit is a small MaxMessage, so that short inputs get beyond it.
const fuzzLimit = 200

// model says in the simplest way what a stream of bytes is answered with, and
// whether the connection is closed for what is in it. It knows procEcho only.
func model(in []byte) (out []byte, closed bool) {
	for len(in) >= 4 {
		n := binary.BigEndian.Uint32(in)
		if n <= 4 || n > 32<<20+4 {
			return out, true
		}
		if uint64(len(in)) < uint64(n) {
			return out, false
		}
		m := in[:n]
		in = in[n:]
		if n < 28 {
			return out, true
		}
		h := parseHeader(m)
		args := m[28:min(len(m), fuzzLimit)]
		if h.kind == typeCallFDs {
			if len(args) < 4 {
				return out, true
			}
			fds := binary.BigEndian.Uint32(args)
			if fds > 32 || fds > 0 && len(in) > 0 {
				return out, true
			}
			if fds > 0 {
				return out, false
			}
			args = args[4:]
		}
		switch call := h.kind == typeCall || h.kind == typeCallFDs; {
		case h.program == 0x6b656570 && h.version == 1 && h.kind == typeMessage:
			if h.proc == 1 {
				out = append(out, pong...)
			}
		case !call:
		case h.program != lockProgram || h.version != 1:
			out = append(out, rpcError(m, fmt.Sprintf("Cannot find program %d version %d", int32(h.program), int32(h.version)))...)
		case h.status != 0:
			out = append(out, rpcError(m, fmt.Sprintf("Unexpected message status %d", h.status))...)
		case h.proc != procEcho:
			out = append(out, rpcError(m, fmt.Sprintf("unknown procedure: %d", int32(h.proc)))...)
		default:
			out = append(out, reply(procEcho, h.serial, args)...)
		}
	}
	return out, false
}

// echoOnly is what the model knows.
type echoOnly struct{ *lab }

func (e echoOnly) Call(_ *Client, proc uint32, args, out []byte) ([]byte, error) {
	if proc != procEcho {
		return out, ErrNoProc
	}
	return append(out, args...), nil
}

// FuzzFraming sends bytes in pieces of any size and compares what comes back with
// the model.
func FuzzFraming(f *testing.F) {
	data, err := os.ReadFile("testdata/exchanges.txt")
	if err != nil {
		f.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if m, ok := strings.CutPrefix(strings.TrimSpace(line), "> "); ok {
			if b, err := hex.DecodeString(m); err == nil {
				f.Add(b, []byte{17})
			}
		}
	}
	f.Add(bytes.Join([][]byte{request(procEcho, 1, make([]byte, 500)), ping, request(procEcho, 2, []byte("x"))}, nil), []byte{1, 200, 3})

	p, err := poll.New() // never run: the test takes the turns itself
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(p.Close)
	s := NewServer(p, Config{MaxMessage: fuzzLimit, Programs: []Program{echoOnly{newLab()}}})
	f.Fuzz(func(t *testing.T, in, cuts []byte) {
		if len(in) > 32<<10 {
			return // more than the sockets take at once
		}
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fds[0])
		defer unix.Close(fds[1])
		c := &Client{server: s, fd: fds[0]}
		want, wantClosed := model(in)

		var got []byte
		buf := make([]byte, 64<<10)
		closed := false
		for rest, i := in, 0; len(rest) > 0 && !closed; i++ {
			n := len(rest)
			if len(cuts) > 0 {
				n = min(n, 1+int(cuts[i%len(cuts)]))
			}
			if _, err := unix.Write(fds[1], rest[:n]); err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
			switch v := c.turn(); v {
			case starved:
			case endByUs:
				closed = true
			default:
				t.Fatalf("verdict %d", v)
			}
			for {
				n, err := unix.Read(fds[1], buf)
				if err != nil {
					break
				}
				got = append(got, buf[:n]...)
			}
			if kept := s.kept.Load(); kept > 2*int64(len(in))+2*inputSize {
				t.Fatalf("%d bytes are kept for %d", kept, len(in))
			}
		}
		c.in, c.out = nil, nil
		c.charge()
		if err := p.Remove(c.token, c.fd); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) || closed != wantClosed {
			t.Fatalf("closed %v, want %v; replies\n got %x\nwant %x", closed, wantClosed, got, want)
		}
	})
}
