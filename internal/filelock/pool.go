// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"cmp"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/vault"
)

// maxIdle is how many workers may wait for work; the others end, one after the other.
const maxIdle = 8

// startTime is how long a new worker may keep others from being started, and endTime how long one that ends keeps others from that.
const (
	startTime = 100 * time.Millisecond
	endTime   = 100 * time.Millisecond
)

// pool starts workers, lends each to one call at a time, and ends them.
//
// A call needs a place on its mount first, then a worker. The places on a
// mount are few, so that a dead server can't fill the machine with processes.
// When all are taken, a call waits, unless nothing has come back from that mount
// for a while: then it fails at once. Releases wait in any case, since a lock
// that can't be released now has to be released later.
type pool struct {
	files     *Files
	self      string
	perMount  int
	max       int
	hungAfter time.Duration
	idleAfter time.Duration
	stop      chan struct{} // closed by close
	starting  sync.Mutex    // held while a worker starts: it takes a processor some milliseconds, which others wait for
	mu        sync.Mutex
	closed    bool
	places    int       // taken, over all mounts
	progress  time.Time // when one was last taken or given back
	mounts    map[string]*mountUse
	waiting   []*waiter // in order
	idle      []*worker // the last one was busy last
	busy      map[*worker]bool
	trim      *time.Timer // ends idle workers; nil: none is idle
	thinning  bool        // thin runs
	thinned   sync.WaitGroup
}

// mountUse is how much a mount, or block device, is in use.
type mountUse struct {
	places   int       // taken
	progress time.Time // when one was last taken or given back
}

// waiter waits for a place on a mount.
type waiter struct {
	mount string
	ready chan struct{}
}

// worker is a worker process.
type worker struct {
	control *control
	pid     int
	ready   bool // it has said so
	idle    time.Time
}

func (p *pool) init(cfg Config, f *Files) {
	*p = pool{
		files:     f,
		self:      cmp.Or(cfg.Self, "/proc/self/exe"),
		perMount:  cmp.Or(cfg.MaxWorkersPerMount, 32),
		max:       cmp.Or(cfg.MaxWorkers, 512),
		hungAfter: cmp.Or(cfg.HungAfter, 2*time.Second),
		idleAfter: cmp.Or(cfg.WorkerIdle, 30*time.Second),
		stop:      make(chan struct{}),
		mounts:    map[string]*mountUse{},
		busy:      map[*worker]bool{},
	}
}

// close ends the idle workers and waits for them. The busy ones lose their
// control socket: their calls fail, and they end by themselves.
func (p *pool) close() {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return
	}
	p.closed = true
	close(p.stop)
	idle := p.idle
	p.idle = nil
	if p.trim != nil {
		p.trim.Stop()
	}
	for w := range p.busy {
		w.control.shutdown()
	}
	p.mu.Unlock()
	for _, w := range idle {
		w.control.close()
	}
	for _, w := range idle {
		reap(w.pid)
	}
	p.thinned.Wait()
}

// call has a worker do r: w, or with nil any one. An error of type *Error
// means that no worker did it, or none could report; any other error is what
// became of the call itself.
func (p *pool) call(o *op, mount string, w *worker, r request) (reply, error) {
	if err := p.takePlace(o, mount, r.op == workRelease); err != nil {
		return reply{}, err
	}
	defer p.freePlace(mount)
	return p.callHere(o, mount, w, r)
}

// callHere is call for who has a place on mount.
func (p *pool) callHere(o *op, mount string, w *worker, r request) (reply, error) {
	answer, err := p.try(o, mount, w, r)
	switch {
	case err != nil:
		return answer, &Error{Op: OpWorker, Err: err} // the caller knows the path
	case answer.step == stepNotDir:
		return answer, ErrNotDir
	}
	return answer, errnoError(answer.errno)
}

func (p *pool) try(o *op, mount string, w *worker, r request) (reply, error) {
	holder := w != nil
	if holder {
		p.mu.Lock()
		p.busy[w] = true
		p.mu.Unlock()
	}
	for tries := 1; ; tries++ {
		if w == nil {
			var err error
			if w, err = p.get(); err != nil {
				return reply{}, err
			}
		}
		answer, err := p.ask(o, mount, w, r)
		switch {
		case err == errNotBegun && holder:
			return reply{}, fmt.Errorf("worker process %d, which held the lock: %w", w.pid, errDied)
		case err == errNotBegun && tries < 4:
			w = nil
		case err != nil:
			return reply{}, err
		case answer.posix:
			answer.holder = w // it has to stay: it holds the lock
			p.mu.Lock()
			delete(p.busy, w)
			p.mu.Unlock()
			return answer, nil
		default:
			p.put(w)
			return answer, nil
		}
	}
}

// errDied says that the worker ended before it answered.
var errDied = errors.New("it was killed or crashed")

// errNotBegun says that the worker was gone before it began.
var errNotBegun = errors.New("the worker processes end before they begin; see whether the program can still be executed")

// ask sends a request to w and waits for the reply. After an error w is gone.
func (p *pool) ask(o *op, mount string, w *worker, r request) (reply, error) {
	p.files.working(o, mount, w.pid)
	defer p.files.working(o, mount, 0)
	if r.busy != nil {
		if r.op == workShare {
			r.busy.Store(vault.Filling(w.pid))
		} else {
			r.busy.Store(vault.Busy(w.pid))
		}
	}
	buf := make([]byte, max(maxReply, requestHeader+len(r.record)+len(r.path)))
	err := w.control.send(appendRequest(buf[:0], r), r.fds...)
	for err == nil {
		var n int
		if n, err = w.control.receive(buf); err != nil {
			break
		}
		answer, ok := parseReply(buf[:n])
		if !ok {
			break // it ended
		}
		if w.ready {
			return answer, nil
		}
		w.ready = true
	}
	// An error, ECONNRESET above all, means that it didn't even read the request.
	begun := err == nil && w.ready
	p.end(w)
	p.mu.Lock()
	closed := p.closed
	p.mu.Unlock()
	switch {
	case closed:
		return reply{}, ErrClosed
	case errors.Is(err, unix.ETOOMANYREFS):
		return reply{errno: unix.ETOOMANYREFS, step: stepStore}, nil
	case !begun:
		return reply{}, errNotBegun
	}
	return reply{}, fmt.Errorf("worker process %d: %w", w.pid, errDied)
}

// takePlace takes a place on mount. A patient caller waits as long as it takes. An error is of type *Error.
//
// Hundreds may wait here at the same instant, so not much is to be made before, and little stack used.
func (p *pool) takePlace(o *op, mount string, patient bool) error {
	p.files.waiting()
	p.files.working(o, mount, 0)
	if err := p.awaitPlace(mount, patient); err != nil {
		return &Error{Op: OpWorker, Err: err}
	}
	return nil
}

func (p *pool) awaitPlace(mount string, patient bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return ErrClosed
	}
	w := &waiter{mount: mount, ready: make(chan struct{})}
	p.waiting = append(p.waiting, w)
	p.grant()
	for {
		select {
		case <-w.ready:
			return nil
		default:
		}
		if p.closed {
			p.forget(w)
			return ErrClosed
		}
		var again <-chan time.Time
		if !patient {
			left, calls, hung := p.patience(mount)
			if left <= 0 {
				p.forget(w)
				return &HungError{Mount: hung, Calls: calls, Oldest: since(p.files.oldest(hung))}
			}
			again = time.After(left)
		}
		p.mu.Unlock()
		select {
		case <-w.ready:
		case <-again:
		case <-p.stop:
		}
		p.mu.Lock()
	}
}

// patience returns for how long it is worth waiting for a place on mount, as
// things are, how many calls are in progress, and on which mount ("": on all
// together).
func (p *pool) patience(mount string) (left time.Duration, calls int, hung string) {
	if use := p.mounts[mount]; use != nil && use.places >= p.perMount {
		return p.hungAfter - time.Since(use.progress), use.places, mount
	}
	return p.hungAfter - time.Since(p.progress), p.places, ""
}

// grant gives free places to those who wait, in order. mu is held.
func (p *pool) grant() {
	left := p.waiting[:0]
	for _, w := range p.waiting {
		use := p.mounts[w.mount]
		if p.places >= p.max || use != nil && use.places >= p.perMount {
			left = append(left, w)
			continue
		}
		if use == nil {
			use = &mountUse{}
			p.mounts[w.mount] = use
		}
		use.places++
		p.places++
		use.progress = time.Now()
		p.progress = use.progress
		close(w.ready)
	}
	clear(p.waiting[len(left):])
	p.waiting = left
}

// forget takes w out of those who wait. mu is held.
func (p *pool) forget(w *waiter) {
	for i, other := range p.waiting {
		if other == w {
			p.waiting = append(p.waiting[:i], p.waiting[i+1:]...)
			return
		}
	}
}

func (p *pool) freePlace(mount string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	use := p.mounts[mount]
	use.progress, p.progress = now, now
	p.places--
	if use.places--; use.places == 0 {
		delete(p.mounts, mount)
	}
	p.grant()
}

// get returns a worker for one call: an idle one or a new one.
func (p *pool) get() (*worker, error) {
	if w, err := p.takeIdle(); w != nil || err != nil {
		return w, err
	}
	p.starting.Lock()
	defer p.starting.Unlock()
	if w, err := p.takeIdle(); w != nil || err != nil {
		return w, err // things have changed while others were started
	}
	w, err := p.start()
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	p.busy[w] = true
	closed := p.closed
	p.mu.Unlock()
	if closed {
		p.end(w)
		return nil, ErrClosed
	}
	// Until it has said that it is ready; one that is long about it is waited for by its call alone.
	w.control.await(startTime)
	return w, nil
}

// takeIdle returns a worker that was idle, or nil.
func (p *pool) takeIdle() (*worker, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, ErrClosed
	}
	n := len(p.idle)
	if n == 0 {
		return nil, nil
	}
	w := p.idle[n-1]
	p.idle = p.idle[:n-1]
	p.busy[w] = true
	return w, nil
}

// put takes back a worker that has answered.
func (p *pool) put(w *worker) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		p.dispose(w)
		return
	}
	delete(p.busy, w)
	w.idle = time.Now()
	p.idle = append(p.idle, w)
	if p.trim == nil {
		p.trim = time.AfterFunc(p.idleAfter, p.trimIdle)
	}
	if len(p.idle) > maxIdle && !p.thinning {
		p.thinning = true
		p.thinned.Go(p.thin)
	}
}

// thin ends idle workers until there are not too many. If hundreds ended in the same instant, when their disk answers again, everybody would
// have to wait for a processor.
func (p *pool) thin() {
	for {
		p.mu.Lock()
		if p.closed || len(p.idle) <= maxIdle {
			p.thinning = false
			p.mu.Unlock()
			return
		}
		w := p.idle[0]
		p.idle = p.idle[1:]
		p.mu.Unlock()
		w.control.close()
		ended := make(chan struct{})
		go func() {
			reap(w.pid)
			close(ended)
		}()
		select {
		case <-ended:
		case <-time.After(endTime):
		}
	}
}

// trimIdle ends the workers that have been idle for long.
func (p *pool) trimIdle() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.trim = nil
	if p.closed {
		return
	}
	for len(p.idle) > 0 {
		w := p.idle[0]
		if left := p.idleAfter - time.Since(w.idle); left > 0 {
			p.trim = time.AfterFunc(left, p.trimIdle)
			return
		}
		p.idle = p.idle[1:]
		p.dispose(w)
	}
	p.idle = nil
}

// end ends a worker that is in busy.
func (p *pool) end(w *worker) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dispose(w)
}

// dispose closes the control socket, for which the worker ends, and sees to
// it that it doesn't remain a zombie. mu is held, so that close never shuts
// down a descriptor that is somebody else's by then.
func (p *pool) dispose(w *worker) {
	delete(p.busy, w)
	w.control.close()
	go reap(w.pid)
}

// reap waits until the process pid has ended, which may take as long as its
// call hangs.
func reap(pid int) {
	for {
		if _, err := unix.Wait4(pid, nil, 0, nil); err != unix.EINTR {
			return
		}
	}
}

// start starts a worker.
func (p *pool) start() (*worker, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make a worker's socket: %w", err)
	}
	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		unix.Close(pair[0])
		unix.Close(pair[1])
		return nil, fmt.Errorf("open /dev/null for a worker: %w", err)
	}
	pid, err := syscall.ForkExec(p.self, []string{workerName}, &syscall.ProcAttr{
		Dir: "/",
		// The runtime as small as it gets, since one request needs a few hundred
		// bytes, and without the files of its cgroup open.
		Env:   []string{"GOMAXPROCS=1", "GOGC=off", "GOMEMLIMIT=4MiB", "GODEBUG=containermaxprocs=0", "GOTRACEBACK=none"},
		Files: []uintptr{uintptr(null), uintptr(null), uintptr(null), uintptr(pair[1])},
		// A signal to the daemon's process group isn't meant for it.
		Sys: &syscall.SysProcAttr{Setpgid: true},
	})
	unix.Close(null)
	unix.Close(pair[1])
	if err != nil {
		unix.Close(pair[0])
		return nil, fmt.Errorf("start a worker process, %s: %w", p.self, err)
	}
	control, err := newControl(pair[0])
	if err != nil {
		go reap(pid)
		return nil, fmt.Errorf("use a worker's socket: %w", err)
	}
	return &worker{control: control, pid: pid}, nil
}
