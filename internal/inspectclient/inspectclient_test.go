// SPDX-License-Identifier: LGPL-2.1-or-later

package inspectclient

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/inspect"
	"virtlockd/internal/xdr"
)

// frame makes a message as a daemon sends it; serial 0 means that of the first call.
func frame(kind, serial, status uint32, payload []byte) []byte {
	b := make([]byte, headerSize, headerSize+len(payload))
	for i, w := range []uint32{uint32(headerSize + len(payload)), inspect.ReadProgram, 1, inspect.ProcStatus, kind, serial, status} {
		binary.BigEndian.PutUint32(b[4*i:], w)
	}
	return append(b, payload...)
}

// against runs f on a connection to a daemon that answers each call with the next of these.
func against(t *testing.T, answers [][]byte, timeout time.Duration, f func(*Conn)) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "socket")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		for _, a := range answers {
			var length [4]byte
			if _, err := io.ReadFull(c, length[:]); err != nil {
				return
			}
			if _, err := io.CopyN(io.Discard, c, int64(binary.BigEndian.Uint32(length[:]))-4); err != nil {
				return
			}
			if a == nil { // none
				_, _ = io.Copy(io.Discard, c)
				return
			}
			if _, err := c.Write(a); err != nil {
				return
			}
		}
	}()
	c, err := Dial(t.Context(), path, timeout)
	if err != nil {
		t.Fatal(err)
	}
	f(c)
	c.Close()
	l.Close()
	<-done
}

func value(t *testing.T, v any) []byte {
	t.Helper()
	b, err := inspect.Append(nil, v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func refusalOf(code, domain int32, text string) []byte {
	return xdr.AppendOptionalString(xdr.AppendInt32(xdr.AppendInt32(nil, code), domain), &text)
}

func TestAnswers(t *testing.T) {
	t.Parallel()
	huge := frame(typeReply, 1, 0, nil)
	binary.BigEndian.PutUint32(huge, 1<<31)
	small := frame(typeReply, 1, 0, nil)
	binary.BigEndian.PutUint32(small, 8)
	good := value(t, inspect.Status{PID: 7})
	for _, c := range []struct {
		name   string
		answer []byte
		ok     bool
		is     error
	}{
		{"good", frame(typeReply, 1, 0, good), true, nil},
		{"a program that is unknown", frame(typeReply, 1, statusError, refusalOf(39, 7, "Cannot find program")), false, ErrForeign},
		{"another refusal", frame(typeReply, 1, statusError, refusalOf(55, 62, "no")), false, nil},
		{"an error that is cut", frame(typeReply, 1, statusError, []byte{0, 0, 0, 1}), false, xdr.ErrDecode},
		{"closed at once, by one of the same user", []byte{}, false, ErrLost},
		{"closed within", frame(typeReply, 1, 0, good)[:40], false, nil},
		{"no answer", nil, false, os.ErrDeadlineExceeded},
		{"too long", huge, false, nil},
		{"too short", small, false, nil},
		{"to another call", frame(typeReply, 2, 0, good), false, nil},
		{"no reply", frame(2, 1, 0, good), false, nil},
		{"no opaque", frame(typeReply, 1, 0, []byte("xx")), false, xdr.ErrDecode},
		{"no JSON", frame(typeReply, 1, 0, xdr.AppendBytes(nil, []byte("{"))), false, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			timeout := 10 * time.Second
			if c.answer == nil {
				timeout = 50 * time.Millisecond
			}
			against(t, [][]byte{c.answer}, timeout, func(conn *Conn) {
				s, err := conn.Status()
				if c.ok != (err == nil) || c.ok && s.PID != 7 {
					t.Errorf("%+v, %v", s, err)
				}
				if c.is != nil && !errors.Is(err, c.is) {
					t.Errorf("%v is not %v", err, c.is)
				}
			})
		})
	}
}

// A daemon that has no time to accept.
func TestBusy(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "socket")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		c, err := Dial(t.Context(), path, 10*time.Second)
		if errors.Is(err, ErrBusy) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	t.Error("everybody is accepted")
}

// A daemon whose parts never end does not keep us for ever.
func TestPartsThatGoBack(t *testing.T) {
	t.Parallel()
	part := func(serial uint32, next int) []byte {
		return frame(typeReply, serial, 0, value(t, inspect.Locks{Locks: make([]inspect.Lock, 2), Next: next}))
	}
	against(t, [][]byte{part(1, 5), part(2, 9), part(3, 9), part(4, 9)}, 10*time.Second, func(c *Conn) {
		n := 0
		for _, err := range c.Locks() {
			if err != nil {
				t.Error(err)
			}
			n++
		}
		if n != 6 {
			t.Errorf("%d locks", n)
		}
	})
}

// What was read of one table does not go with what is read of the next one.
func TestReplacedWhileRead(t *testing.T) {
	t.Parallel()
	against(t, [][]byte{
		frame(typeReply, 1, 0, value(t, inspect.Locks{Locks: make([]inspect.Lock, 2), Table: 1, Next: 5})),
		frame(typeReply, 2, 0, value(t, inspect.Locks{Locks: make([]inspect.Lock, 2), Table: 2})),
		frame(typeReply, 3, 0, value(t, inspect.Checks{Table: 1, Next: 5})),
		frame(typeReply, 4, 0, value(t, inspect.Checks{Table: 2})),
	}, 10*time.Second, func(c *Conn) {
		n, last := 0, error(nil)
		for _, err := range c.Locks() {
			n, last = n+1, err
		}
		if n != 3 || !errors.Is(last, ErrReplaced) {
			t.Errorf("%d locks, %v", n, last)
		}
		for _, err := range c.Checks() {
			last = err
		}
		if !errors.Is(last, ErrReplaced) {
			t.Errorf("checks: %v", last)
		}
	})
}

func TestNobodyThere(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, path := range []string{filepath.Join(dir, "none"), filepath.Join(dir, "none/none")} {
		if _, err := Dial(t.Context(), path, 10*time.Second); !errors.Is(err, ErrNoDaemon) {
			t.Errorf("%s: %v", path, err)
		}
	}
	stale := filepath.Join(dir, "stale")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if _, err := Dial(t.Context(), stale, 10*time.Second); !errors.Is(err, ErrNoDaemon) {
		t.Errorf("a stale socket: %v", err)
	}
}
