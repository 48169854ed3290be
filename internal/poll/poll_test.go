// SPDX-License-Identifier: LGPL-2.1-or-later

package poll

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const patience = 20 * time.Second

func TestMain(m *testing.M) {
	goroutines, files := runtime.NumGoroutine(), openFiles()
	code := m.Run()
	for end := time.Now().Add(patience); code == 0 && runtime.NumGoroutine() > goroutines; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			fmt.Printf("%d goroutines at the start, %d at the end\n", goroutines, runtime.NumGoroutine())
			code = 1
		}
	}
	if n := openFiles(); code == 0 && n > files {
		fmt.Printf("%d descriptors at the start, %d at the end\n", files, n)
		code = 1
	}
	os.Exit(code)
}

func openFiles() int {
	// The runtime's own poller comes with the first pipe or timer, and stays.
	time.AfterFunc(0, func() {})
	entries, _ := os.ReadDir("/proc/self/fd")
	return len(entries)
}

// start returns a running poller that ends with the test.
func start(t testing.TB) *Poller {
	t.Helper()
	p, err := New()
	if err != nil {
		t.Fatal(err)
	}
	ran := make(chan error, 1)
	go func() { ran <- p.Run(context.Background()) }()
	t.Cleanup(func() {
		p.Close()
		if err := <-ran; err != nil && err != ErrClosed {
			t.Error("Run: ", err)
		}
	})
	return p
}

// handler calls a function.
type handler func(events uint32)

func (h handler) Ready(events uint32) { h(events) }

// eventfd returns a descriptor that is readable while its count is not zero.
func eventfd(t testing.TB, count uint) int {
	t.Helper()
	fd, err := unix.Eventfd(count, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func raise(t testing.TB, fd int) {
	t.Helper()
	if _, err := unix.Write(fd, binary.NativeEndian.AppendUint64(nil, 1)); err != nil {
		t.Fatal(err)
	}
}

func await[T any](t testing.TB, ch <-chan T, what string) (v T) {
	t.Helper()
	select {
	case v = <-ch:
	case <-time.After(patience):
		t.Fatal("waited in vain for ", what)
	}
	return v
}

func TestEvents(t *testing.T) {
	t.Parallel()
	p := start(t)
	fd := eventfd(t, 0)
	got := make(chan uint32, 10)
	tok, err := p.Add(fd, unix.EPOLLIN|unix.EPOLLET, handler(func(e uint32) { got <- e }))
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		raise(t, fd)
		if e := await(t, got, "an event"); e != unix.EPOLLIN {
			t.Errorf("events 0x%x", e)
		}
	}
	if err := p.Modify(tok, fd, unix.EPOLLOUT|unix.EPOLLONESHOT); err != nil {
		t.Fatal(err)
	}
	if e := await(t, got, "an event that holds already"); e != unix.EPOLLOUT {
		t.Errorf("events 0x%x", e)
	}
	if err := p.Modify(tok, fd, unix.EPOLLOUT|unix.EPOLLONESHOT); err != nil {
		t.Fatal(err)
	}
	await(t, got, "the event again")
	if err := p.Remove(tok, fd); err != nil {
		t.Fatal(err)
	}
	if err := p.Remove(tok, fd); err != nil {
		t.Error("removing twice: ", err)
	}
	if err := p.Modify(tok, fd, unix.EPOLLIN); err == nil {
		t.Error("modified what was removed")
	}
	if len(got) > 0 {
		t.Error("more events than reasons")
	}
}

func TestAddErrors(t *testing.T) {
	t.Parallel()
	p := start(t)
	h := handler(func(uint32) {})
	if _, err := p.Add(-1, unix.EPOLLIN, h); err == nil {
		t.Error("added descriptor -1")
	}
	if len(p.free) != 1 {
		t.Errorf("%d free slots after the failure, want 1", len(p.free))
	}
	p.Close()
	if _, err := p.Add(eventfd(t, 0), unix.EPOLLIN, h); err != ErrClosed {
		t.Errorf("adding after the end: %v", err)
	}
	if err := p.Modify(Token{1, 1}, 0, unix.EPOLLIN); err != ErrClosed {
		t.Errorf("modifying after the end: %v", err)
	}
}

// TestStale: the events of a registration that is gone reach nobody, although
// slot and descriptor have a new user.
func TestStale(t *testing.T) {
	t.Parallel()
	p, err := New()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	fd := eventfd(t, 0)
	old, err := p.Add(fd, unix.EPOLLIN, handler(func(uint32) { t.Error("the old handler was called") }))
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Remove(old, fd); err != nil {
		t.Fatal(err)
	}
	if h := p.lookup(old.slot, old.gen); h != nil {
		t.Error("found after it was removed")
	}
	tok, err := p.Add(fd, unix.EPOLLIN, handler(func(uint32) {}))
	if err != nil {
		t.Fatal(err)
	}
	if tok.slot != old.slot || tok.gen == old.gen {
		t.Errorf("token %v after %v", tok, old)
	}
	if h := p.lookup(old.slot, old.gen); h != nil {
		t.Error("an event of the old registration finds the new one")
	}
	if h := p.lookup(tok.slot, tok.gen); h == nil {
		t.Error("the new registration is not found")
	}
	if err := p.Remove(old, fd); err != nil || p.lookup(tok.slot, tok.gen) == nil {
		t.Error("the old token has removed the new registration")
	}
}

// TestBlocked: handlers that block keep nobody from being called, and leave no
// more goroutines behind than before.
func TestBlocked(t *testing.T) {
	t.Parallel()
	p := start(t)
	release := make(chan struct{})
	entered := make(chan struct{}, 100)
	var returned sync.WaitGroup
	for range 50 {
		fd := eventfd(t, 1)
		returned.Add(1)
		if _, err := p.Add(fd, unix.EPOLLIN|unix.EPOLLET, handler(func(uint32) {
			defer returned.Done()
			entered <- struct{}{}
			<-release
		})); err != nil {
			t.Fatal(err)
		}
	}
	for range 50 {
		await(t, entered, "a handler")
	}
	quick := make(chan uint32)
	fd := eventfd(t, 1)
	if _, err := p.Add(fd, unix.EPOLLIN|unix.EPOLLET, handler(func(e uint32) { quick <- e })); err != nil {
		t.Fatal(err)
	}
	await(t, quick, "one more handler")
	close(release)
	returned.Wait()
	for range 1000 {
		if n := p.waiting.Load(); n > most {
			t.Fatalf("%d goroutines wait, want at most %d", n, most)
		}
		runtime.Gosched()
	}
	raise(t, fd)
	await(t, quick, "a handler after the rush")
}

// stuck registers a handler that hangs until the test ends, and returns when it is called.
func stuck(t *testing.T, p *Poller) {
	t.Helper()
	entered, release := make(chan struct{}), make(chan struct{})
	t.Cleanup(func() { close(release) })
	if _, err := p.Add(eventfd(t, 1), unix.EPOLLIN|unix.EPOLLET, handler(func(uint32) {
		close(entered)
		<-release
	})); err != nil {
		t.Fatal(err)
	}
	await(t, entered, "the handler that hangs")
}

// echo registers a handler that answers each event of the descriptor at once.
func echo(t *testing.T, p *Poller) (fd int, answer <-chan uint32) {
	t.Helper()
	ch := make(chan uint32, 1)
	fd = eventfd(t, 0)
	if _, err := p.Add(fd, unix.EPOLLIN|unix.EPOLLET, handler(func(e uint32) { ch <- e })); err != nil {
		t.Fatal(err)
	}
	return fd, ch
}

// TestHang: a handler that hangs without having said that it waits delays others
// once, and for two ticks; those that hang soon after it delay nobody.
func TestHang(t *testing.T) {
	t.Parallel()
	p := start(t)
	fd, answer := echo(t, p)
	stuck(t, p)
	begin := time.Now()
	raise(t, fd)
	await(t, answer, "an event beside a handler that hangs")
	t.Logf("it took %s", time.Since(begin))
	// How soon is soon depends on the machine: a handler that came too late is the first one again.
	for soon, late := 0, 0; soon < 20; {
		until := p.wary.Load()
		stuck(t, p)
		if p.ticks.Load() >= until {
			if late++; late > 20 {
				t.Fatal("a handler that hangs has no effect on the next ones")
			}
			raise(t, fd)
			await(t, answer, "an event beside a handler that hangs")
			continue
		}
		soon, late = soon+1, 0
		if p.waiting.Load() == 0 {
			t.Fatal("a handler is called while nobody waits for the next event")
		}
		raise(t, fd)
		await(t, answer, "an event beside handlers that hang")
	}
}

// TestFails: that waiting is impossible is told at once, also while a handler hangs.
func TestFails(t *testing.T) {
	t.Parallel()
	p, err := New()
	if err != nil {
		t.Fatal(err)
	}
	ran := make(chan error, 1)
	go func() { ran <- p.Run(context.Background()) }()
	fd, _ := echo(t, p)
	release, waiting := make(chan struct{}), make(chan int32)
	if _, err := p.Add(eventfd(t, 1), unix.EPOLLIN|unix.EPOLLET, handler(func(uint32) {
		p.Waiting()
		waiting <- p.waiting.Load()
		<-release
	})); err != nil {
		t.Fatal(err)
	}
	await(t, waiting, "the handler")
	if err := unix.Dup3(eventfd(t, 0), p.epfd, unix.O_CLOEXEC); err != nil { // no epoll set any more
		t.Fatal(err)
	}
	raise(t, fd) // whoever waits comes back once more, if he was waiting already
	if err := await(t, ran, "the error"); !errors.Is(err, unix.EINVAL) {
		t.Errorf("got %v, want EINVAL", err)
	}
	close(release)
	p.Close()
}

// TestWaiting: when a handler has said that it waits, somebody waits for events.
func TestWaiting(t *testing.T) {
	t.Parallel()
	p := start(t)
	fd, answer := echo(t, p)
	release, waiting := make(chan struct{}), make(chan int32)
	if _, err := p.Add(eventfd(t, 1), unix.EPOLLIN|unix.EPOLLET, handler(func(uint32) {
		p.Waiting()
		p.Waiting()
		waiting <- p.waiting.Load()
		<-release
	})); err != nil {
		t.Fatal(err)
	}
	if n := await(t, waiting, "the handler"); n != 1 {
		t.Errorf("%d goroutines wait for events, want 1", n)
	}
	raise(t, fd)
	await(t, answer, "an event beside a handler that waits")
	close(release)
	p.Close()
	p.Waiting() // harmless
}

// TestRest: the watcher sleeps while nothing happens, also beside a handler that
// hangs, and not while something does.
func TestRest(t *testing.T) {
	t.Parallel()
	p := start(t)
	fd, answer := echo(t, p)
	stuck(t, p)
	for range 3 {
		for end := time.Now().Add(patience); !p.resting.Load(); time.Sleep(tick) {
			if time.Now().After(end) {
				t.Fatal("the watcher does not sleep")
			}
		}
		ticks := p.ticks.Load()
		time.Sleep(5 * tick)
		if now := p.ticks.Load(); now != ticks {
			t.Errorf("%d ticks while nothing happened", now-ticks)
		}
		raise(t, fd)
		await(t, answer, "an event")
		stuck(t, p)
		raise(t, fd)
		await(t, answer, "an event after the rest")
	}
}

// TestEveryEvent: with many descriptors and goroutines each event is delivered
// exactly once.
func TestEveryEvent(t *testing.T) {
	t.Parallel()
	p := start(t)
	const descriptors, rounds = 20, 500
	var wg sync.WaitGroup
	var total atomic.Int32
	for range descriptors {
		fd := eventfd(t, 0)
		got := make(chan struct{}, rounds)
		if _, err := p.Add(fd, unix.EPOLLIN|unix.EPOLLET, handler(func(uint32) {
			total.Add(1)
			got <- struct{}{}
		})); err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			for range rounds {
				raise(t, fd)
				await(t, got, "an event")
			}
		})
	}
	wg.Wait()
	if n := total.Load(); n != descriptors*rounds {
		t.Errorf("%d events, want %d", n, descriptors*rounds)
	}
}

func TestRun(t *testing.T) {
	t.Parallel()
	t.Run("ends with its context", func(t *testing.T) {
		t.Parallel()
		p, err := New()
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		ctx, cancel := context.WithCancel(context.Background())
		ran := make(chan error)
		go func() { ran <- p.Run(ctx) }()
		cancel()
		if err := await(t, ran, "Run"); err != nil {
			t.Error(err)
		}
	})
	t.Run("waits for handlers", func(t *testing.T) {
		t.Parallel()
		p := start(t)
		release, entered := make(chan struct{}), make(chan struct{})
		if _, err := p.Add(eventfd(t, 1), unix.EPOLLIN|unix.EPOLLET, handler(func(uint32) {
			close(entered)
			<-release
		})); err != nil {
			t.Fatal(err)
		}
		await(t, entered, "the handler")
		var released atomic.Bool
		closed := make(chan bool)
		go func() { p.Close(); closed <- released.Load() }()
		released.Store(true)
		close(release)
		if !await(t, closed, "Close") {
			t.Error("Close did not wait")
		}
	})
	t.Run("once only", func(t *testing.T) {
		t.Parallel()
		p, err := New()
		if err != nil {
			t.Fatal(err)
		}
		p.Close()
		p.Close()
		if err := p.Run(context.Background()); err != ErrClosed {
			t.Errorf("running after the end: %v", err)
		}
	})
	t.Run("reports why it cannot wait", func(t *testing.T) {
		t.Parallel()
		p, err := New()
		if err != nil {
			t.Fatal(err)
		}
		real := p.epfd
		p.epfd = -1
		if err := p.Run(context.Background()); err == nil {
			t.Error("no error")
		}
		p.epfd = real
		p.Close()
	})
}

// A set that is inherited serves what is registered anew, in place of what it had, and nothing else: what was left in it is
// another one's, though it may have the same slot.
func TestInherit(t *testing.T) {
	t.Parallel()
	before, err := New()
	if err != nil {
		t.Fatal(err)
	}
	kept, left, late := eventfd(t, 0), eventfd(t, 0), eventfd(t, 0)
	ignore := handler(func(uint32) { t.Error("a handler of before was called") })
	for _, fd := range []int{left, kept, late} { // the one that is left has the first slot
		if _, err := before.Add(fd, unix.EPOLLIN|unix.EPOLLET, ignore); err != nil {
			t.Fatal(err)
		}
	}
	raise(t, kept) // before: not lost
	epfd, gen := before.State()
	if epfd, err = unix.FcntlInt(uintptr(epfd), unix.F_DUPFD_CLOEXEC, 0); err != nil { // as if exec had kept it
		t.Fatal(err)
	}
	before.Close()

	p, err := Inherit(epfd, gen)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	got := make(chan string, 10)
	register := func(name string, fd int) {
		if _, err := p.Add(fd, unix.EPOLLIN|unix.EPOLLET, handler(func(uint32) { got <- name })); err != nil {
			t.Fatal(err)
		}
	}
	fresh := eventfd(t, 0)
	register("kept", kept)
	register("fresh", fresh)
	ran := make(chan error, 1)
	go func() { ran <- p.Run(context.Background()) }()
	if name := await(t, got, "an event of before"); name != "kept" {
		t.Errorf("an event of %s", name)
	}
	register("late", late) // while it runs
	raise(t, left)
	for name, fd := range map[string]int{"kept": kept, "fresh": fresh, "late": late} {
		raise(t, fd)
		if is := await(t, got, "an event"); is != name {
			t.Errorf("an event of %s, want %s", is, name)
		}
	}
	if _, again := p.State(); again <= gen {
		t.Errorf("generation %d after %d", again, gen)
	}
	p.Close()
	if err := <-ran; err != nil {
		t.Error(err)
	}
	if len(got) > 0 {
		t.Errorf("one more event, of %s", <-got)
	}
}

func TestInheritRefuses(t *testing.T) {
	t.Parallel()
	if p, err := Inherit(eventfd(t, 0), 1); err == nil {
		p.Close()
		t.Error("an eventfd was taken for an epoll set")
	}
}
