// SPDX-License-Identifier: LGPL-2.1-or-later

package rpc

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/poll"
	"virtlockd/internal/xdr"
)

// patience is how long a test waits for something that has to happen.
const patience = 20 * time.Second

// childEnv makes the test binary a server of its own: its value is the path of
// the socket. childFiles limits its descriptors. childRefuses lets it refuse those
// that peers attach, if the kernel can.
const (
	childEnv     = "RPC_TEST_SOCKET"
	childFiles   = "RPC_TEST_FILES"
	childRefuses = "RPC_TEST_REFUSES"
)

func TestMain(m *testing.M) {
	if os.Getenv(childRefuses) == "" {
		passRights = -1 // for what is done where the kernel can't
	}
	if path := os.Getenv(childEnv); path != "" {
		child(path)
		return
	}
	// The runtime opens its own poller with the first pipe, and keeps it.
	if r, w, err := os.Pipe(); err == nil {
		r.Close()
		w.Close()
	}
	goroutines, files := runtime.NumGoroutine(), openFiles()
	code := m.Run()
	// Fuzzing leaves a goroutine that waits for signals.
	if f := flag.Lookup("test.fuzz"); code == 0 && f.Value.String() == "" {
		code = leaks(goroutines, files)
	}
	os.Exit(code)
}

// leaks reports goroutines and descriptors that the tests have left behind.
func leaks(goroutines int, files map[string]string) int {
	for end := time.Now().Add(patience); runtime.NumGoroutine() > goroutines; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			b := make([]byte, 1<<20)
			fmt.Printf("%d goroutines at the start, %d at the end:\n%s\n", goroutines, runtime.NumGoroutine(), b[:runtime.Stack(b, true)])
			return 1
		}
	}
	code := 0
	for fd, what := range openFiles() {
		if files[fd] == "" {
			fmt.Printf("descriptor %s is left open: %s\n", fd, what)
			code = 1
		}
	}
	return code
}

// openFiles returns what the descriptors of this process are, but for the one
// that reads the directory.
func openFiles() map[string]string {
	files := make(map[string]string)
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		if what, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && !strings.HasPrefix(what, "/proc/") {
			files[e.Name()] = what
		}
	}
	return files
}

// child serves until its standard input ends. Its log goes to standard output.
func child(path string) {
	check := func(err error) {
		if err != nil {
			fmt.Println("child:", err)
			os.Exit(1)
		}
	}
	l := listenAt(path)
	if n, _ := strconv.ParseUint(os.Getenv(childFiles), 10, 32); n > 0 {
		check(unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: n}))
	}
	p, err := poll.New()
	check(err)
	go p.Run(context.Background())
	s := NewServer(p, Config{
		Name: "test", MaxClients: 100_000, AllowUID: uint32(os.Geteuid()),
		Programs: []Program{newLab()},
		Logger:   slog.New(slog.NewTextHandler(os.Stdout, nil)),
	})
	check(s.Listen(l))
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
	s.Shutdown()
	p.Close()
}

// startChild runs a server in a process of its own. stop ends it and returns
// what it has logged.
func startChild(t testing.TB, files int) (path string, pid int, stop func() []string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "s")
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+path, childFiles+"="+strconv.Itoa(files))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	if !lines.Scan() || lines.Text() != "ready" {
		t.Fatal("the child did not start: ", lines.Text())
	}
	var once sync.Once
	var log []string
	stop = func() []string {
		once.Do(func() {
			in.Close()
			for lines.Scan() {
				log = append(log, lines.Text())
			}
			if err := cmd.Wait(); err != nil {
				t.Error("child: ", err)
			}
		})
		return log
	}
	t.Cleanup(func() { stop() })
	return path, cmd.Process.Pid, stop
}

// Procedures of the lab program beyond those of the lock program.
const (
	procEcho = 100 + iota
	procBlock
	procBusy
	procPlainError
	procSystem
	procLastReply
	procBig
	procCloseSelf
	procPIDFD
)

const (
	lockProgram  = 0x0ea7beef
	adminProgram = 0x06900690
)

// lab is a program that does what tests need, and takes the lock program's calls
// as the lock program does as far as decoding goes.
type lab struct {
	number  uint32
	entered chan *Client  // gets the client when procBlock has begun
	release chan struct{} // lets procBlock go on

	calls atomic.Int32

	mu     sync.Mutex
	opened []uint64
	order  []string // arguments of procEcho as they came
	undone []uint64
	closed map[uint64]bool // by peer?
}

func newLab() *lab {
	return &lab{
		number:  lockProgram,
		entered: make(chan *Client, 10_000),
		release: make(chan struct{}),
		closed:  make(map[uint64]bool),
	}
}

func (l *lab) ID() (uint32, uint32) { return l.number, 1 }

func (l *lab) Opened(c *Client) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.opened = append(l.opened, c.ID())
}

func (l *lab) Call(c *Client, proc uint32, args, out []byte) ([]byte, error) {
	l.calls.Add(1)
	d := xdr.NewDecoder(args)
	switch {
	case l.number == adminProgram && proc == 1:
		d.Uint32()
		return out, d.Err()
	case l.number == lockProgram && proc == 1: // REGISTER
		d.Fixed(16)
		d.String(65536)
		d.Uint32()
		d.Uint32()
		d.Uint32()
		if d.Err() != nil {
			return out, ErrDecode
		}
		return out, nil
	case proc == procEcho:
		l.mu.Lock()
		l.order = append(l.order, string(args))
		l.mu.Unlock()
		return append(out, args...), nil
	case proc == procBlock:
		l.entered <- c
		select {
		case <-l.release:
		case <-c.Done():
		}
		return append(out, args...), nil
	case proc == procBusy:
		return out, Ordinary(CodeResourceBusy, DomainLockspace, "resource busy: %s", "Lockspace resource '%s' is locked")
	case proc == procPlainError:
		return out, errors.New("no such luck")
	case proc == procSystem:
		return out, fmt.Errorf("wrapped: %w", System(DomainLockspace, unix.ENOTDIR, "Unable to create lockspace /x: Not a directory"))
	case proc == procLastReply:
		c.CloseAfterReply()
		return append(out, make([]byte, d.Uint32())...), nil
	case proc == procBig:
		return append(out, make([]byte, d.Uint32())...), nil
	case proc == procCloseSelf:
		c.Close()
		return out, nil
	case proc == procPIDFD:
		fd, err := c.PeerPIDFD()
		if err != nil {
			return out, err
		}
		defer unix.Close(fd)
		info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
		return append(out, info...), err
	}
	return out, ErrNoProc
}

func (l *lab) Undo(c *Client) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.undone = append(l.undone, c.ID())
}

func (l *lab) Closed(c *Client, byPeer bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, twice := l.closed[c.ID()]; twice {
		panic("closed twice")
	}
	l.closed[c.ID()] = byPeer
}

// end waits until the client has been closed and returns who did it.
func (l *lab) end(t testing.TB, id uint64) (byPeer bool) {
	t.Helper()
	eventually(t, "the client to end", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		var ok bool
		byPeer, ok = l.closed[id]
		return ok
	})
	return byPeer
}

// executed returns the arguments of all calls of procEcho, joined by blanks.
func (l *lab) executed() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.order, " ")
}

func (l *lab) undos() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.undone)
}

// eventually waits for a condition.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !cond(); time.Sleep(200 * time.Microsecond) {
		if time.Now().After(end) {
			t.Fatal("waited in vain for ", what)
		}
	}
}

// logbook collects log messages.
type logbook struct {
	mu    sync.Mutex
	lines []string
}

func (b *logbook) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelWarn }
func (b *logbook) WithAttrs([]slog.Attr) slog.Handler           { return b }
func (b *logbook) WithGroup(string) slog.Handler                { return b }
func (b *logbook) Handle(_ context.Context, r slog.Record) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lines = append(b.lines, r.Message)
	return nil
}

// count returns how many lines contain the text.
func (b *logbook) count(text string) (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, l := range b.lines {
		if strings.Contains(l, text) {
			n++
		}
	}
	return n
}

func listenAt(path string) int {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrUnix{Name: path})
	}
	if err != nil {
		panic(err)
	}
	return fd
}

// bench is a running server with its lab program.
type bench struct {
	*Server
	t    testing.TB
	path string
	lab  *lab
	log  *logbook
}

// serve starts a server that ends with the test. change may adapt its
// configuration.
func serve(t testing.TB, change func(*Config)) *bench {
	t.Helper()
	b := &bench{t: t, path: filepath.Join(t.TempDir(), "s"), lab: newLab(), log: new(logbook)}
	p, err := poll.New()
	if err != nil {
		t.Fatal(err)
	}
	ran := make(chan error, 1)
	go func() { ran <- p.Run(context.Background()) }()
	cfg := Config{
		Name: "test", MaxClients: 10_000, MaxUnauth: 10_000, AllowUID: uint32(os.Geteuid()),
		Programs: []Program{b.lab},
		Logger:   slog.New(b.log),
	}
	if change != nil {
		change(&cfg)
	}
	b.Server = NewServer(p, cfg)
	if err := b.Listen(listenAt(b.path)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		b.Shutdown()
		if n := b.kept.Load(); n != 0 {
			t.Errorf("%d bytes are accounted for after the end", n)
		}
		p.Close()
		if err := <-ran; err != nil {
			t.Error(err)
		}
	})
	return b
}

// peer is the other end of a connection.
type peer struct {
	t       testing.TB
	fd      int
	senders sync.WaitGroup // of sendAside
}

func dial(t testing.TB, path string) *peer {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	p := &peer{t: t, fd: fd}
	t.Cleanup(p.close)
	for _, opt := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
		tv := unix.NsecToTimeval(int64(patience))
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, opt, &tv); err != nil {
			t.Fatal(err)
		}
	}
	if err := retry(func() error { return unix.Connect(fd, &unix.SockaddrUnix{Name: path}) }); err != nil {
		t.Fatal("connect: ", err)
	}
	return p
}

func (b *bench) dial() *peer { b.t.Helper(); return dial(b.t, b.path) }

// client dials and returns our end of it, too.
func (b *bench) client() (*peer, *Client) {
	b.t.Helper()
	p := b.dial()
	p.call(procEcho, nil)
	all := b.Clients()
	return p, all[len(all)-1]
}

// retry repeats a system call that a signal has interrupted: the runtime
// preempts goroutines by signals.
func retry(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}

func (p *peer) close() {
	p.senders.Wait()
	if p.fd >= 0 {
		unix.Close(p.fd)
		p.fd = -1
	}
}

func (p *peer) send(m []byte) {
	p.t.Helper()
	for len(m) > 0 {
		n, err := unix.SendmsgN(p.fd, m, nil, nil, unix.MSG_NOSIGNAL)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			p.t.Fatal("send: ", err)
		}
		m = m[n:]
	}
}

// trySend sends to a server that may have closed the connection already.
func (p *peer) trySend(m []byte) {
	for len(m) > 0 {
		n, err := unix.SendmsgN(p.fd, m, nil, nil, unix.MSG_NOSIGNAL)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return
		}
		m = m[n:]
	}
}

// sendAside sends while the caller goes on.
func (p *peer) sendAside(m []byte) { p.senders.Go(func() { p.trySend(m) }) }

func (p *peer) read(m []byte) (n int, err error) {
	err = retry(func() error { n, err = unix.Read(p.fd, m); return err })
	return n, err
}

func (p *peer) full(m []byte) {
	p.t.Helper()
	for len(m) > 0 {
		n, err := p.read(m)
		if err != nil || n == 0 {
			p.t.Fatalf("%d bytes of a reply are missing: %v", len(m), err)
		}
		m = m[n:]
	}
}

// recv returns one whole message.
func (p *peer) recv() []byte {
	p.t.Helper()
	var length [4]byte
	p.full(length[:])
	m := make([]byte, binary.BigEndian.Uint32(length[:]))
	copy(m, length[:])
	p.full(m[4:])
	return m
}

// closed expects that the server has closed the connection and sent nothing more.
func (p *peer) closed() {
	p.t.Helper()
	var b [100]byte
	if n, err := p.read(b[:]); n > 0 || err != nil && err != unix.ECONNRESET {
		p.t.Fatalf("want a closed connection, got %d bytes %x, %v", n, b[:max(n, 0)], err)
	}
}

// silence expects that nothing comes, not even the end.
func (p *peer) silence() {
	p.t.Helper()
	fds := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}
	end := time.Now().Add(40 * time.Millisecond)
	for left := time.Until(end); left > 0; left = time.Until(end) {
		if n, err := unix.Poll(fds, int(left.Milliseconds())+1); n > 0 || err != nil && err != unix.EINTR {
			p.t.Fatalf("want silence, got events 0x%x, %v", fds[0].Revents, err)
		}
	}
}

// half says that we send nothing more.
func (p *peer) half() {
	p.t.Helper()
	if err := unix.Shutdown(p.fd, unix.SHUT_WR); err != nil {
		p.t.Fatal(err)
	}
}

// request returns a call of the lab program.
func request(proc, serial uint32, args []byte) []byte {
	h := header{program: lockProgram, version: 1, proc: proc, serial: serial}
	m := append(make([]byte, headerSize), args...)
	h.put(m)
	return m
}

// reply returns the reply to such a call.
func reply(proc, serial uint32, payload []byte) []byte {
	h := header{program: lockProgram, version: 1, proc: proc, kind: typeReply, serial: serial}
	m := append(make([]byte, headerSize), payload...)
	h.put(m)
	return m
}

// call makes a call and expects its success.
func (p *peer) call(proc uint32, args []byte) []byte {
	p.t.Helper()
	p.send(request(proc, 7, args))
	m := p.recv()
	if h := parseHeader(m); h.kind != typeReply || h.status != statusOK || h.proc != proc || h.serial != 7 {
		p.t.Fatalf("procedure %d: reply %x", proc, m)
	}
	return m[headerSize:]
}

// expect expects one message.
func (p *peer) expect(want []byte) {
	p.t.Helper()
	if got := p.recv(); !bytes.Equal(got, want) {
		p.t.Fatalf("reply\n got %x\nwant %x", got, want)
	}
}

var (
	ping = func() []byte {
		h := header{program: keepaliveProgram, version: 1, proc: keepalivePing, kind: typeMessage}
		m := make([]byte, headerSize)
		h.put(m)
		return m
	}()
	pong = func() []byte {
		h := header{program: keepaliveProgram, version: 1, proc: keepalivePong, kind: typeMessage}
		m := make([]byte, headerSize)
		h.put(m)
		return m
	}()
)

func u32(v ...uint32) (b []byte) {
	for _, v := range v {
		b = xdr.AppendUint32(b, v)
	}
	return b
}
