// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"virtlockd/internal/inspect"
)

// call is what a daemon was asked for.
type call struct{ program, proc uint32 }

// connection is how a daemon treats one: it answers its calls, in their order, with these, and then closes it; after silence the client does.
type connection []any

type silence struct{}

// daemon is one that does what a test wants, which a real one does at times only.
type daemon struct {
	path  string
	mu    sync.Mutex
	calls []call
}

// listen begins one that treats its connections in this way, one after the other, and all later ones as the last of these.
func listen(t *testing.T, all ...connection) *daemon {
	t.Helper()
	d := &daemon{path: filepath.Join(t.TempDir(), "socket")}
	l, err := net.Listen("unix", d.path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; ; i++ {
			c, err := l.Accept()
			if err != nil {
				return
			}
			d.serve(c, all[min(i, len(all)-1)])
			c.Close()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	return d
}

// serve answers until the answers, or the client, come to an end.
func (d *daemon) serve(c net.Conn, answers connection) {
	for _, answer := range answers {
		head := make([]byte, 28)
		if _, err := io.ReadFull(c, head); err != nil {
			return
		}
		word := func(i int) uint32 { return binary.BigEndian.Uint32(head[4*i:]) }
		if _, err := io.CopyN(io.Discard, c, int64(word(0))-int64(len(head))); err != nil {
			return
		}
		d.mu.Lock()
		d.calls = append(d.calls, call{word(1), word(3)})
		d.mu.Unlock()
		if (answer == silence{}) {
			_, _ = io.Copy(io.Discard, c)
			return
		}
		reply, err := inspect.Append(head, answer)
		if err != nil {
			panic(err)
		}
		binary.BigEndian.PutUint32(reply, uint32(len(reply)))
		binary.BigEndian.PutUint32(reply[16:], 1) // a reply
		if _, err := c.Write(reply); err != nil {
			return
		}
	}
}

// asked returns what it was asked for.
func (d *daemon) asked() []call {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.calls)
}

// output is what a tool prints meanwhile.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// Whatever a daemon does that ends and begins, who follows waits for it.
func TestFollowGoesOn(t *testing.T) {
	t.Parallel()
	event := func(n uint64, text string) inspect.Events {
		return inspect.Events{Next: n, Events: []inspect.Event{{Seq: n, Kind: "recovered", Text: inspect.Text(text)}}}
	}
	d := listen(t,
		connection{event(1, "before"), inspect.Events{Next: 1}},
		connection{},          // it ends before it has answered,
		connection{silence{}}, // and the next one begins slowly
		connection{event(2, "after"), inspect.Events{Next: 2}, silence{}})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var out, errs output
	code := make(chan int, 1)
	go func() {
		code <- (&tool{ctx: ctx, out: &out, err: &errs, patience: time.Second}).main([]string{"events", "--follow", "-c", d.path})
	}()
	deadline := time.After(30 * time.Second)
	for !strings.Contains(out.String(), "after") {
		select {
		case code := <-code:
			t.Fatalf("it ends with %d: %s", code, errs.String())
		case <-deadline:
			t.Fatalf("it has printed %s", out.String())
		case <-time.After(time.Millisecond):
		}
	}
	cancel()
	if code := <-code; code != exitOK {
		t.Errorf("interrupted it ends with %d", code)
	}
	if text := errs.String(); strings.Count(text, "waiting for it") != 1 {
		t.Errorf("it says %s", text)
	}
	if !strings.Contains(out.String(), "before") {
		t.Errorf("it has printed %s", out.String())
	}
}

// Who asks once hears what has happened, and that it is no matter of rights.
func TestEndBeforeAnswer(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"status"}, {"events", "--follow"}} {
		d := listen(t, connection{})
		var out, errs output
		code := (&tool{ctx: t.Context(), out: &out, err: &errs, patience: 30 * time.Second}).main(append(args, "-c", d.path))
		if text := errs.String(); code != exitFailure || !strings.Contains(text, "has closed the connection") || !strings.Contains(text, "try again") {
			t.Errorf("%q ends with %d and says %s", args, code, text)
		}
	}
}

// What serves metrics gives up the right to change anything before all else, on each connection.
func TestMetricsOnlyRead(t *testing.T) {
	t.Parallel()
	want := []call{{inspect.ReadProgram, inspect.ProcReadOnly}, {inspect.ReadProgram, inspect.ProcStatus}}
	d := listen(t, connection{nil, inspect.Status{}, silence{}})
	var out, errs output
	code := (&tool{ctx: t.Context(), out: &out, err: &errs, patience: 30 * time.Second}).main([]string{"metrics", "-c", d.path})
	if code != exitOK || !strings.Contains(out.String(), "\nvirtlockd_up 1\n") {
		t.Errorf("it ends with %d: %s", code, errs.String())
	}
	if got := d.asked(); !slices.Equal(got, want) {
		t.Errorf("metrics asks %v, want %v", got, want)
	}

	d = listen(t, connection{nil, inspect.Status{}, silence{}})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	said, saying := io.Pipe()
	ended := make(chan int, 1)
	go func() {
		ended <- (&tool{ctx: ctx, out: &out, err: saying, patience: 30 * time.Second}).main([]string{"exporter", "--listen", "127.0.0.1:0", "-c", d.path})
	}()
	line, err := bufio.NewReader(said).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		r, err := http.Get(line[strings.LastIndexByte(line, ' ')+1 : len(line)-1])
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(r.Body)
		if r.Body.Close(); err != nil || !strings.Contains(string(body), "\nvirtlockd_up 1\n") {
			t.Errorf("%v: %s", err, body)
		}
	}
	cancel()
	if code := <-ended; code != exitOK {
		t.Errorf("the exporter ends with %d", code)
	}
	if got := d.asked(); !slices.Equal(got, slices.Concat(want, want)) {
		t.Errorf("the exporter asks %v, want twice %v", got, want)
	}
}
