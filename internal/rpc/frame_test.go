// SPDX-License-Identifier: LGPL-2.1-or-later

package rpc

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestExchanges replays what the C daemon was seen to do.
func TestExchanges(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("testdata/exchanges.txt")
	if err != nil {
		t.Fatal(err)
	}
	scenarios := strings.Split(string(data), "\n= ")[1:]
	if len(scenarios) < 50 {
		t.Fatalf("only %d scenarios", len(scenarios))
	}
	for _, sc := range scenarios {
		lines := strings.Split(strings.TrimSpace(sc), "\n")
		name, program, _ := strings.Cut(lines[0], " ")
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := serve(t, func(c *Config) {
				if program == "admin" {
					c.Programs[0].(*lab).number = adminProgram
				}
			})
			p := b.dial()
			for _, line := range lines[1:] {
				op, arg, _ := strings.Cut(line, " ")
				switch op {
				case ">":
					p.trySend(unhex(t, arg))
				case "|":
					p.half()
				case "!":
					eventually(t, "the log line "+arg, func() bool { return b.log.count(arg) > 0 })
				case "<":
					switch arg {
					case "closed":
						p.closed()
					case "silence":
						p.silence()
					default:
						p.expect(unhex(t, arg))
					}
				default:
					t.Fatalf("line %q", line)
				}
			}
		})
	}
}

// unhex decodes hexadecimal digits, and BB*N after a blank.
func unhex(t *testing.T, s string) []byte {
	t.Helper()
	s, times, _ := strings.Cut(s, " ")
	b, err := hex.DecodeString(s)
	if err == nil && times != "" {
		value, count, _ := strings.Cut(times, "*")
		v, err1 := strconv.ParseUint(value, 16, 8)
		n, err2 := strconv.Atoi(count)
		if err1 != nil || err2 != nil {
			t.Fatalf("repetition %q", times)
		}
		b = append(b, bytes.Repeat([]byte{byte(v)}, n)...)
	}
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// message returns any message.
func message(h header, payload []byte) []byte {
	m := append(make([]byte, headerSize), payload...)
	h.put(m)
	return m
}

// rpcError returns the error reply to m.
func rpcError(m []byte, text string) []byte {
	h := parseHeader(m)
	h.kind, h.status = typeReply, statusError
	return message(h, appendError(nil, Protocol(text)))
}

// TestMessages has what the recorded exchanges lack. Each answer was seen from
// the C daemon; the follow-up shows that the connection lives or not.
func TestMessages(t *testing.T) {
	t.Parallel()
	echo := func(h header, payload []byte) []byte {
		h.program, h.version, h.proc = lockProgram, 1, procEcho
		return message(h, payload)
	}
	bigProgram := message(header{program: 0xfffffff0, version: 0xffffffff, proc: 1}, nil)
	badStatus := message(header{program: lockProgram, version: 1, proc: 0, status: 1, serial: 3}, nil)
	unknownFDs := message(header{program: 5, version: 1, kind: typeCallFDs}, u32(0))
	length := func(n uint32) []byte { return append(u32(n), make([]byte, 40)...) }
	for _, tt := range []struct {
		name string
		send []byte
		want []byte // nil: none
		log  string
		dies bool
	}{
		{"length 2", length(2), nil, "packet 2 bytes received from server too small, want 4", true},
		{"length 5", length(5), nil, "Unable to decode message header", true},
		{"length 27", length(27), nil, "Unable to decode message header", true},
		{"program as signed numbers", bigProgram, rpcError(bigProgram, "Cannot find program -16 version -1"), "Cannot find program -16", false},
		{"status before procedure", badStatus, rpcError(badStatus, "Unexpected message status 1"), "Unexpected message status 1", false},
		{"type 2 of another program", echo(header{kind: 2}, nil), nil, "Unexpected message type 2", false},
		{"stream", echo(header{kind: typeStream}, []byte("data")), nil, "", false},
		{"stream of unknown program", message(header{program: 5, kind: typeStream}, nil), nil, "", false},
		{"reply of unknown program", message(header{program: 5, kind: typeReply}, nil), nil, "", false},
		{"ping with odd fields", message(header{program: keepaliveProgram, version: 1, proc: 1, kind: 2, status: 7, serial: 5}, []byte("abcdefg")), pong, "", false},
		{"keepalive procedure 3", message(header{program: keepaliveProgram, version: 1, proc: 3, kind: 2}, nil), nil, "", false},
		{"call with 0 descriptors", echo(header{kind: typeCallFDs, serial: 4}, u32(0, 42)), reply(procEcho, 4, u32(42)), "", false},
		{"unknown program with descriptors", unknownFDs, rpcError(unknownFDs, "Cannot find program 5 version 1"), "Cannot find program 5", false},
		{"descriptors without count", echo(header{kind: typeCallFDs}, nil), nil, "Unable to decode number of FDs", true},
		{"33 descriptors", echo(header{kind: typeCallFDs}, u32(33)), nil, "Received too many FDs 33, expected 32 maximum", true},
		{"2^32-1 descriptors", echo(header{kind: typeCallFDs}, u32(0xffffffff)), nil, "Received too many FDs -1, expected 32 maximum", true},
		{"bytes instead of descriptors", append(echo(header{kind: typeCallFDs}, u32(1)), 'x'), nil, "Failed to recv file descriptor: Permission denied", true},
		{"error of the program", request(procBusy, 1, nil), func() []byte {
			h := parseHeader(reply(procBusy, 1, nil))
			h.status = statusError
			return message(h, appendError(nil, Ordinary(CodeResourceBusy, DomainLockspace, "resource busy: %s", "Lockspace resource '%s' is locked")))
		}(), "", false},
		{"wrapped error of the program", request(procSystem, 1, nil), func() []byte {
			h := parseHeader(reply(procSystem, 1, nil))
			h.status = statusError
			return message(h, appendError(nil, System(DomainLockspace, unix.ENOTDIR, "Unable to create lockspace /x: Not a directory")))
		}(), "", false},
		{"plain error of the program", request(procPlainError, 1, nil), func() []byte {
			h := parseHeader(reply(procPlainError, 1, nil))
			h.status = statusError
			return message(h, appendError(nil, Ordinary(CodeInternal, DomainRPC, "internal error: %s", "no such luck")))
		}(), "no such luck", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := serve(t, nil)
			p := b.dial()
			p.send(tt.send)
			if tt.want != nil {
				p.expect(tt.want)
			}
			if tt.dies {
				p.closed()
				if b.lab.end(t, 1) {
					t.Error("our closing was taken for the peer's")
				}
			} else {
				p.send(ping)
				p.expect(pong)
			}
			if tt.log != "" && b.log.count(tt.log) != 1 || tt.log == "" && b.log.count("") > 0 {
				t.Errorf("the log is not %q", tt.log)
			}
		})
	}
}

// TestPrefix: no part of a message is answered.
func TestPrefix(t *testing.T) {
	t.Parallel()
	b := serve(t, nil)
	m := request(procEcho, 9, []byte("lockspace resource"))
	for n := range m {
		p := b.dial()
		p.send(m[:n])
		p.half()
		p.closed()
		p.close()
	}
	if n := b.lab.calls.Load(); n != 0 {
		t.Errorf("%d calls from incomplete messages", n)
	}
}

func TestByteByByte(t *testing.T) {
	t.Parallel()
	b := serve(t, nil)
	p := b.dial()
	args := make([]byte, 300)
	for _, x := range request(procEcho, 9, args) {
		p.send([]byte{x})
		// Until it is stored, so that each byte is a read of its own.
		eventually(t, "the byte", func() bool { return b.kept.Load() > 0 || b.lab.calls.Load() == 1 })
	}
	p.expect(reply(procEcho, 9, args))
	eventually(t, "the buffer to be given back", func() bool { return b.kept.Load() == 0 })
}

func TestPipelined(t *testing.T) {
	t.Parallel()
	b := serve(t, nil)
	p := b.dial()
	var all []byte
	const n = 2000
	for i := range uint32(n) {
		all = append(all, request(procEcho, i, bytes.Repeat([]byte{byte(i)}, int(i%90)))...)
		if i%10 == 0 {
			all = append(all, ping...)
		}
	}
	p.sendAside(all)
	for i := range uint32(n) {
		p.expect(reply(procEcho, i, bytes.Repeat([]byte{byte(i)}, int(i%90))))
		if i%10 == 0 {
			p.expect(pong)
		}
	}
}

// TestLong: a message is kept up to the limit, and what is beyond dropped. Its
// length reserves nothing.
func TestLong(t *testing.T) {
	t.Parallel()
	const limit = 64 << 10
	for _, length := range []int{limit - 1, limit, limit + 1, limit + 4, limit + 3*inputSize, 16 << 20, maxLength} {
		t.Run(strconv.Itoa(length), func(t *testing.T) {
			t.Parallel()
			b := serve(t, func(c *Config) { c.MaxMessage = limit })
			p := b.dial()
			args := make([]byte, length-headerSize)
			for i := range args {
				args[i] = byte(i / 7)
			}
			m := request(procEcho, 1, args)
			p.send(m[:headerSize])
			p.silence()
			if n := b.kept.Load(); n > 4*headerSize {
				t.Errorf("%d bytes are kept for a length word", n)
			}
			p.sendAside(bytes.Join([][]byte{m[headerSize:], m, request(procEcho, 2, []byte("next"))}, nil))
			want := args[:min(len(args), limit-headerSize)]
			p.expect(reply(procEcho, 1, want))
			p.expect(reply(procEcho, 1, want))
			p.expect(reply(procEcho, 2, []byte("next")))
			eventually(t, "the buffer to be given back", func() bool { return b.kept.Load() == 0 })
		})
	}
}

// rights sends bytes with descriptors attached.
func (p *peer) rights(m []byte, fds ...int) {
	p.t.Helper()
	if err := retry(func() error { return unix.Sendmsg(p.fd, m, unix.UnixRights(fds...), nil, unix.MSG_NOSIGNAL) }); err != nil {
		p.t.Fatal("sendmsg: ", err)
	}
}

// TestDescriptors: descriptors of a peer are counted and never get here. Not
// parallel, because it looks at all descriptors of the process.
func TestDescriptors(t *testing.T) {
	path, pid, stop := startChild(t, 0)
	table := fmt.Sprintf("/proc/%d/fd", pid)
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	pipe := fmt.Sprintf("/proc/self/fd/%d", fds[0])
	target, err := os.Readlink(pipe)
	if err != nil {
		t.Fatal(err)
	}
	call := func(serial, n uint32) []byte {
		return message(header{program: lockProgram, version: 1, proc: procEcho, kind: typeCallFDs, serial: serial}, u32(n, serial))
	}

	p := dial(t, path)
	absent := func() {
		t.Helper()
		entries, err := os.ReadDir(table)
		if err != nil || len(entries) == 0 {
			t.Fatal(entries, err)
		}
		for _, e := range entries {
			if what, _ := os.Readlink(table + "/" + e.Name()); what == target {
				t.Fatal("the server has got our descriptor")
			}
		}
	}
	for name, send := range map[string]func(){
		"one": func() { p.send(call(1, 1)); p.rights([]byte{0}, fds[0]) },
		"three, slowly": func() {
			p.send(call(1, 3))
			for range 3 {
				p.silence()
				p.rights([]byte{0}, fds[0])
			}
		},
		"two and a pipelined call": func() {
			p.send(call(1, 2))
			p.rights([]byte{0}, fds[0])
			p.rights([]byte{0}, fds[0])
			p.send(call(2, 0))
		},
		"two calls with one each": func() {
			p.send(call(1, 1))
			p.rights([]byte{0}, fds[0])
			p.send(call(2, 1))
			p.rights([]byte{0}, fds[0])
		},
		"at a plain call": func() { p.rights(request(procEcho, 1, u32(1)), fds[0], fds[1]) },
		"32": func() {
			p.send(call(1, 32))
			for range 32 {
				p.rights([]byte{0}, fds[0])
			}
		},
	} {
		send()
		p.expect(reply(procEcho, 1, u32(1)))
		if strings.Contains(name, "call") && name != "at a plain call" {
			p.expect(reply(procEcho, 2, u32(2)))
		}
		absent()
	}
	// Attached to the frame itself they are lost, and it goes on waiting.
	p.rights(call(1, 1), fds[0])
	p.silence()
	absent()
	p.send([]byte("x"))
	p.closed()
	absent()
	if log := strings.Join(stop(), "\n"); !strings.Contains(log, "Failed to recv file descriptor: Permission denied") {
		t.Errorf("log %s", log)
	}
}

// TestDescriptorsRefused: where the kernel can refuse them it does, also on a connection that is older than that.
func TestDescriptorsRefused(t *testing.T) {
	t.Setenv(childRefuses, "1")
	path, pid, _ := startChild(t, 0)
	p := dial(t, path)
	attach := func() error {
		return retry(func() error {
			return unix.Sendmsg(p.fd, request(procEcho, 1, nil), unix.UnixRights(p.fd), nil, unix.MSG_NOSIGNAL)
		})
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	if _, err := unix.GetsockoptInt(p.fd, unix.SOL_SOCKET, 83); err == unix.ENOPROTOOPT {
		t.Skip("Linux before 6.16 refuses none")
	}
	// Before it is accepted, too.
	if err := unix.PidfdSendSignal(pidfd, unix.SIGSTOP, nil, 0); err != nil {
		t.Fatal(err)
	}
	p = dial(t, path)
	err = attach()
	if err := unix.PidfdSendSignal(pidfd, unix.SIGCONT, nil, 0); err != nil {
		t.Fatal(err)
	}
	if err != unix.EPERM {
		t.Errorf("before it is accepted: %v", err)
	}
	p.call(procEcho, nil)
	if err := attach(); err != unix.EPERM {
		t.Errorf("then: %v", err)
	}
	p.call(procEcho, nil)
}

// TestOlderConnectionsRefuse: those that were made before their listening socket was ours, and those of a binary that did not
// know of it.
func TestOlderConnectionsRefuse(t *testing.T) {
	descriptor := func(c *Client) int {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.fd
	}
	accepts := func(fd int) bool {
		on, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, 83)
		if err == unix.ENOPROTOOPT {
			t.Skip("Linux before 6.16 refuses none")
		}
		return on != 0
	}
	before := passRights
	t.Cleanup(func() { passRights = before }) // not before the servers have ended
	passRights = 83
	fd := listenAt(filepath.Join(t.TempDir(), "old"))
	if err := unix.Listen(fd, 1); err != nil {
		t.Fatal(err)
	}
	if !accepts(fd) {
		t.Fatal("a socket refuses descriptors that was not told to")
	}
	old, next := serve(t, nil), serve(t, nil)
	at, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	p := dial(t, at.(*unix.SockaddrUnix).Name)
	if err := old.Listen(fd); err != nil {
		t.Fatal(err)
	}
	p.call(procEcho, nil)
	c := old.Clients()[0]
	if accepts(descriptor(c)) {
		t.Error("a connection takes descriptors that was made before its socket was ours")
	}
	if err := unix.SetsockoptInt(descriptor(c), unix.SOL_SOCKET, passRights, 1); err != nil {
		t.Fatal(err)
	}
	handOver(t, old, next, c)
	p.call(procEcho, nil)
	if accepts(descriptor(next.Clients()[0])) {
		t.Error("a connection takes descriptors that was handed over")
	}
	old.Thaw()
}

// TestReadEndsEarly: a read ends at descriptors, and what is behind them must not
// be forgotten. The client is let in when all has been sent.
func TestReadEndsEarly(t *testing.T) {
	t.Parallel()
	b := serve(t, func(c *Config) { c.MaxClients = 0 })
	p, q := b.dial(), b.dial()
	p.rights(request(procEcho, 1, nil), p.fd)
	p.rights(request(procEcho, 2, nil), p.fd)
	p.send(request(procEcho, 3, nil))
	// Here the descriptor comes with the second byte behind the call, not with the first.
	q.send(message(header{program: lockProgram, version: 1, proc: procEcho, kind: typeCallFDs}, u32(1)))
	q.send([]byte{0})
	q.rights([]byte{0}, p.fd)
	b.SetLimits(Limits{MaxClients: 2})
	for serial := range uint32(3) {
		p.expect(reply(procEcho, serial+1, nil))
	}
	q.closed()
	if n := b.log.count("Failed to recv file descriptor: Permission denied"); n != 1 {
		t.Errorf("%d lines in the log, want 1", n)
	}
}

// TestLengthReservesNothing: not even for a moment.
func TestLengthReservesNothing(t *testing.T) {
	t.Parallel()
	b := serve(t, func(c *Config) { c.MaxMessage = 4 << 20; c.MaxKept = 3 * inputSize })
	p := b.dial()
	m := request(procEcho, 1, make([]byte, 1<<20))
	p.send(m[:1000])
	p.silence()
	p.send(m[1000:2000])
	p.silence()
	if n := b.log.count(""); n != 0 || b.Count() != 1 {
		t.Error("closed for a promise")
	}
}

// TestUrgent: out-of-band data makes a read end early. Nothing may be forgotten
// behind it.
func TestUrgent(t *testing.T) {
	t.Parallel()
	b := serve(t, nil)
	for range 50 {
		p := b.dial()
		p.send(request(procEcho, 1, nil))
		if err := retry(func() error { return unix.Sendmsg(p.fd, []byte("!"), nil, nil, unix.MSG_OOB) }); err != nil {
			t.Skip("no out-of-band data on Unix sockets: ", err)
		}
		p.send(request(procEcho, 2, nil))
		p.expect(reply(procEcho, 1, nil))
		p.expect(reply(procEcho, 2, nil))
		p.close()
	}
}
