// SPDX-License-Identifier: LGPL-2.1-or-later

package weakness

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// memory reads a field of /proc/PID/status in bytes.
func memory(t *testing.T, d *host.Daemon, field string) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.PID()))
	must(t, err)
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			var kib int
			_, err := fmt.Sscan(rest, &kib)
			must(t, err)
			return kib << 10
		}
	}
	t.Fatalf("no %s in the status of process %d", field, d.PID())
	return 0
}

// A length word reserves no memory before the bytes arrive.
func TestW19LengthWord(t *testing.T) {
	t.Parallel()
	const clients, most = 30, 32 << 20
	_, d := start(t, host.Options{})
	d.Client(noOne)
	size := memory(t, d, "VmSize")
	h := wire.Header{Program: wire.LockProgram, Version: wire.Version, Proc: wire.ProcRegister}
	for range clients {
		c := d.Dial("lock")
		must(t, c.Send(wire.FrameLen(most, h, wire.RegisterArgs(wire.VM(noOne)))))
	}
	must(t, d.Client(noOne).Ping())
	if grown := memory(t, d, "VmSize") - size; grown > clients*most/4 {
		t.Errorf("the address space has grown by %d MiB", grown>>20)
	}
}

// What is sent beyond the largest message that makes sense is not kept.
func TestW19LongMessages(t *testing.T) {
	t.Parallel()
	const clients, length = 24, 8 << 20
	_, d := start(t, host.Options{})
	d.Client(noOne)
	size := memory(t, d, "VmRSS")
	h := wire.Header{Program: wire.LockProgram, Version: wire.Version, Proc: wire.ProcRegister}
	// All but the last byte of a message that is answered at its last byte: so it was read until there.
	args := append(wire.RegisterArgs(wire.VM(noOne)), make([]byte, length)...)
	var conns []*wire.Conn
	for range clients {
		c := d.Dial("lock")
		f := wire.Frame(h, args)
		must(t, c.Send(f[:len(f)-1]))
		conns = append(conns, c)
	}
	must(t, d.Client(noOne).Ping())
	if grown := memory(t, d, "VmRSS") - size; grown > clients*length/4 {
		t.Errorf("%d unfinished messages of %d MiB take %d MiB", clients, length>>20, grown>>20)
	}
	for _, c := range conns {
		must(t, c.Send([]byte{0}))
		m, err := c.Recv()
		must(t, err)
		must(t, m.Err())
	}
}

// A client that asks and never listens is not served for ever, and keeps nobody else waiting.
func TestW19DeafClient(t *testing.T) {
	t.Parallel()
	_, d := start(t, host.Options{})
	size := memory(t, d, "VmRSS")
	// The answer is three times as long as the question.
	question := wire.Request(wire.ProcAcquire, 0, wire.ResourceArgs("/"+strings.Repeat("x", 20000), "x", 0))
	for range 4 {
		c := d.Client(noOne)
		raw, err := c.SyscallConn()
		must(t, err)
		full := false
		for !full {
			must(t, raw.Write(func(fd uintptr) bool {
				n, err := syscall.SendmsgN(int(fd), question, nil, nil, syscall.MSG_DONTWAIT)
				full = err == syscall.EAGAIN && !host.Within(moment, func() bool { return writable(int(fd)) })
				if err != nil && err != syscall.EAGAIN {
					t.Errorf("send: %v", err)
					full = true
				}
				if err == nil && n < len(question) {
					question = append(question[n:len(question):len(question)], question[:n]...)
				}
				return true
			}))
		}
	}
	works(t, d.Client(noOneElse), path("mine"))
	if grown := memory(t, d, "VmRSS") - size; grown > 64<<20 {
		t.Errorf("answers that nobody reads take %d MiB", grown>>20)
	}
}

// writable tells whether a socket takes more.
func writable(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n > 0
}

// The log says that the limit is reached, and which setting to raise.
func TestW19LimitIsLogged(t *testing.T) {
	t.Parallel()
	_, d := start(t, host.Options{Config: "max_clients = 1\n"})
	one := d.Client(noOne)
	two := d.Dial("lock")
	must(t, two.Send(wire.Ping()))
	eventually(t, "limit is logged", func() bool { return strings.Contains(d.Stderr(), "max_clients") })
	one.Close()
	m, err := two.Recv()
	must(t, err)
	if !bytes.Equal(m.Raw, wire.Pong()) {
		t.Errorf("got %s", m)
	}
}

// A limit of no client at all is refused at start.
func TestW19NoClients(t *testing.T) {
	t.Parallel()
	for _, setting := range []string{"max_clients", "admin_max_clients"} {
		h := host.New(t)
		d := h.Start(host.Ours(t), host.Options{Config: setting + " = 0\n", NoWait: true})
		if got := d.Wait(); got <= 0 {
			t.Errorf("%s: exit status %d", setting, got)
		}
		if !strings.Contains(d.Stderr(), " "+setting+" must be") {
			t.Errorf("message does not name %s:\n%s", setting, d.Stderr())
		}
	}
}

// After a crash the daemon starts again.
func TestW21StaleSockets(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	d.Signal(syscall.SIGKILL)
	d.Wait()
	if !h.Exists(d.SocketPath("lock")) {
		t.Fatal("no stale socket, nothing to test")
	}
	d = h.Start(host.Ours(t), host.Options{})
	must(t, d.Client(noOne).Acquire("", path("a"), wire.Autocreate))
	if got := d.Stop(); got != 0 {
		t.Errorf("exit status %d", got)
	}
	for _, s := range []string{"lock", "admin"} {
		if h.Exists(d.SocketPath(s)) {
			t.Errorf("%s socket is left", s)
		}
	}
}

// What a client sends can't forge lines of the log, nor speak to the terminal of who reads it.
func TestW21LogInjection(t *testing.T) {
	t.Parallel()
	const forged = "2026-01-01 00:00:00.000+0000: 1: error : forged:1 : all is well"
	_, d := start(t, host.Options{})
	c := d.Dial("lock")
	vm := wire.VM(noOne)
	vm.Name = "vm\n" + forged + "\x1b[31m\r\x07"
	must(t, c.Register(vm))
	if err := c.Acquire("", path("missing")+"\n"+forged+"\x1b[2J", 0); wire.AsError(err) == nil {
		t.Fatalf("got %v", err)
	}
	if err := c.Acquire("nowhere\n"+forged+"\x9b", "\x00", 0); wire.AsError(err) == nil {
		t.Fatalf("got %v", err)
	}
	eventually(t, "refusal is logged", func() bool { return strings.Contains(d.Stderr(), "missing") && strings.Contains(d.Stderr(), "nowhere") })
	for line := range strings.Lines(d.Stderr()) {
		if strings.HasPrefix(line, forged) {
			t.Errorf("forged line: %q", line)
		}
		for _, r := range strings.TrimSuffix(line, "\n") {
			if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
				t.Errorf("control character in %q", line)
				break
			}
		}
		if strings.ContainsRune(line, 0x9b) || strings.Contains(line, "\x9b") {
			t.Errorf("control byte in %q", line)
		}
	}
}

// A journal that nobody reads blocks nobody.
func TestW22StuckJournal(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	const socket = "/run/systemd/journal/socket"
	h.Must(func() error { return os.MkdirAll("/run/systemd/journal", 0o755) })
	journal, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: h.Path(socket)})
	must(t, err)
	defer journal.Close()
	d := h.Start(host.Ours(t), host.Options{Config: "log_outputs = \"1:journald\"\n"})
	c := d.Client(noOne)
	// The C daemon stops after 166 of them.
	for range 3000 {
		if err := c.Acquire("nowhere", "x", 0); wire.AsError(err) == nil {
			t.Fatalf("got %v", err)
		}
	}
	b := make([]byte, 1<<16)
	n, err := journal.Read(b)
	must(t, err)
	if !bytes.Contains(b[:n], []byte("MESSAGE")) {
		t.Errorf("the journal got %q", b[:n])
	}
	if got := d.Stop(); got != 0 {
		t.Errorf("exit status %d", got)
	}
}
