// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Files works on files. It is safe for concurrent use; a call that hangs
// delays only its own goroutine.
type Files struct {
	log     *slog.Logger
	dir     string
	waiting func()
	mounts  *mountTable
	openat2 bool // the kernel (5.6) can refuse symbolic links; else everything goes to workers
	posix   posixTable
	pool    pool
	ops     sync.Pool // of *op

	mu         sync.Mutex
	calls      op // head of the ring of calls in progress
	warned     map[string]bool
	complained time.Time // about records of leases
}

// op is a call in progress and its scratch memory.
type op struct {
	prev, next *op  // Files.mu
	call       Call // its fields Mount and Worker: Files.mu
	links      int  // how many symbolic links were followed
	linked     bool // whether one in the last place was
	scratch
}

// New makes a Files. It starts no worker before one is needed.
func New(cfg Config) (*Files, error) {
	f := &Files{log: cfg.Logger, dir: cfg.Dir, waiting: cfg.Waiting, warned: map[string]bool{}}
	f.calls.prev, f.calls.next = &f.calls, &f.calls
	f.ops.New = func() any { return new(op) }
	if f.waiting == nil {
		f.waiting = func() {}
	}
	if f.log == nil {
		f.log = slog.New(slog.DiscardHandler)
	}
	if f.dir == "" {
		dir, err := os.Getwd()
		if err != nil {
			return nil, fmt.Errorf("find the working directory: %w", err)
		}
		f.dir = dir
	}
	var err error
	if f.mounts, err = newMountTable(); err != nil {
		return nil, err
	}
	f.pool.init(cfg, f)
	o := new(op)
	_, errno := o.statPath("/")
	f.openat2 = errno == 0
	return f, nil
}

// Close ends the workers; calls in progress there fail with ErrClosed, and
// what they still achieve is undone. It waits for the workers that are idle,
// not for ones that hang. Locks are to be released before.
func (f *Files) Close() error {
	f.pool.close()
	f.mounts.close()
	return nil
}

// InFlight returns the calls in progress, the oldest first.
func (f *Files) InFlight() []Call {
	f.mu.Lock()
	defer f.mu.Unlock()
	var calls []Call
	for o := f.calls.next; o != &f.calls; o = o.next {
		calls = append(calls, o.call)
	}
	return calls
}

func (f *Files) begin(name, path string) *op {
	o := f.ops.Get().(*op)
	o.call = Call{Op: name, Path: path, Since: time.Now()}
	f.mu.Lock()
	o.prev, o.next = f.calls.prev, &f.calls
	o.prev.next, f.calls.prev = o, o
	f.mu.Unlock()
	return o
}

func (f *Files) end(o *op) {
	f.mu.Lock()
	o.prev.next, o.next.prev = o.next, o.prev
	f.mu.Unlock()
	o.prev, o.next, o.call = nil, nil, Call{}
	f.ops.Put(o)
}

// working notes where and by whom the call is being worked on.
func (f *Files) working(o *op, mount string, worker int) {
	f.mu.Lock()
	o.call.Mount, o.call.Worker = mount, worker
	f.mu.Unlock()
}

// oldest returns since when the oldest call on mount is in progress; mount ""
// means any one that a worker works on.
func (f *Files) oldest(mount string) time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	for o := f.calls.next; o != &f.calls; o = o.next {
		if o.call.Worker != 0 && (mount == "" || o.call.Mount == mount) {
			return o.call.Since
		}
	}
	return time.Now()
}

// absolute makes path absolute. It refuses what the kernel would.
func (f *Files) absolute(path string) (string, syscall.Errno) {
	if path == "" {
		return "", unix.ENOENT
	}
	if strings.IndexByte(path, 0) >= 0 {
		return "", unix.EINVAL
	}
	if len(path) > pathMax {
		return "", unix.ENAMETOOLONG
	}
	if path[0] != '/' {
		if path = f.dir + "/" + path; len(path) > pathMax {
			return "", unix.ENAMETOOLONG
		}
	}
	return path, 0
}

// outcome is what a direct attempt came to.
type outcome uint8

const (
	done     outcome = iota
	atLink           // a symbolic link is on the way
	toWorker         // not a thing to touch from this process
)

// direct does work on path if that leads nowhere but to local file systems.
// work gets a tidy path and must follow no link: it returns atLink then, and
// is called again with what that leads to; last says whether a link in the
// last place is followed too. With ok false a worker has to do it, and mount
// is whom it will wait for.
func (f *Files) direct(o *op, path string, last bool, work func(path string) outcome) (mount string, ok bool, err error) {
	points, err := f.mounts.get()
	if err != nil {
		return "", false, err
	}
	mount = "/"
	o.links, o.linked = 0, false
	for {
		path, ok = tidy(path)
		if !ok || len(path) > pathMax {
			return mount, false, nil
		}
		var local bool
		if mount, local = points.find(path); !local || !f.openat2 {
			return mount, false, nil
		}
		switch work(path) {
		case done:
			return mount, true, nil
		case toWorker:
			return mount, false, nil
		}
		if o.links++; o.links > maxLinks {
			return mount, false, nil // ELOOP is the kernel's to say
		}
		if path, ok = o.follow(path, last); !ok {
			return mount, false, nil
		}
	}
}

// Stat returns the identity of the file at path, links followed.
func (f *Files) Stat(path string) (FileID, error) {
	o := f.begin("stat", path)
	defer f.end(o)
	id, err := f.stat(o, path)
	if err != nil {
		return FileID{}, wrap(OpStat, path, err)
	}
	return id, nil
}

func (f *Files) stat(o *op, path string) (FileID, error) {
	path, errno := f.absolute(path)
	if errno != 0 {
		return FileID{}, errno
	}
	var info fileInfo
	mount, ok, err := f.direct(o, path, true, func(path string) outcome {
		info, errno = o.statPath(path)
		return linkOrDone(errno)
	})
	if err != nil {
		return FileID{}, err
	}
	if !ok {
		r, err := f.pool.call(o, mount, nil, request{op: workStat, path: path})
		return r.id, err
	}
	return info.id, errnoError(errno)
}

// errnoError is needed because a syscall.Errno of 0 isn't a nil error.
func errnoError(errno syscall.Errno) error {
	if errno != 0 {
		return errno
	}
	return nil
}

func linkOrDone(errno syscall.Errno) outcome {
	if errno == unix.ELOOP {
		return atLink
	}
	return done
}

// MakeDir makes the directory path, and its parents where they are missing,
// with mode 0700 less the umask. An existing directory is left as it is.
func (f *Files) MakeDir(path string) error {
	o := f.begin("mkdir", path)
	defer f.end(o)
	if err := f.makeDir(o, path); err != nil {
		return wrap(OpMkdir, path, err)
	}
	return nil
}

func (f *Files) makeDir(o *op, path string) error {
	path, errno := f.absolute(path)
	if errno != 0 {
		return errno
	}
	if path = strings.TrimRight(path, "/"); path == "" {
		return nil // the root
	}
	notDir := false
	mount, ok, err := f.direct(o, path, true, func(path string) outcome {
		var info fileInfo
		if info, errno = o.statPath(path); errno == 0 {
			notDir = info.kind() != unix.S_IFDIR
		} else if errno == unix.ENOENT && o.links > 0 {
			return toWorker // mkdir(2) doesn't follow a dangling link
		} else if errno == unix.ENOENT {
			errno = o.makeDirs(path)
		}
		return linkOrDone(errno)
	})
	switch {
	case err != nil:
		return err
	case !ok:
		_, err := f.pool.call(o, mount, nil, request{op: workMakeDir, path: path})
		return err
	case notDir:
		return ErrNotDir
	}
	return errnoError(errno)
}

// makeDirs makes path and what is missing above it.
func (s *scratch) makeDirs(path string) syscall.Errno {
	dir, errno := s.openDir(path)
	if errno == unix.ENOENT {
		if errno = s.makeDirs(path[:strings.LastIndexByte(path, '/')]); errno != 0 {
			return errno
		}
		dir, errno = s.openDir(path)
	}
	if errno != 0 {
		return errno
	}
	defer unix.Close(dir)
	if errno = s.mkdirAt(dir); errno != unix.EEXIST {
		return errno
	}
	// Somebody was faster; a directory is what we wanted.
	info, errno := s.statAt(dir)
	if errno == 0 && info.kind() != unix.S_IFDIR {
		errno = unix.ENOTDIR // as the C daemon calls it
	}
	return errno
}

// Create makes an empty regular file with mode 0600 less the umask. An
// existing file is left alone and not even opened; EISDIR if it is a
// directory.
func (f *Files) Create(path string) error {
	o := f.begin("create", path)
	defer f.end(o)
	if err := f.create(o, path); err != nil {
		return wrap(OpCreate, path, err)
	}
	return nil
}

func (f *Files) create(o *op, path string) error {
	path, errno := f.absolute(path)
	if errno != 0 {
		return errno
	}
	mount, ok, err := f.direct(o, path, true, func(path string) outcome {
		var dir int
		if dir, errno = o.openDir(path); errno != 0 {
			return linkOrDone(errno)
		}
		defer unix.Close(dir)
		if errno = o.createAt(dir); errno != unix.EEXIST {
			return done
		}
		var info fileInfo
		switch info, errno = o.statAt(dir); info.kind() {
		case unix.S_IFLNK:
			return atLink
		case unix.S_IFDIR:
			errno = unix.EISDIR
		}
		if errno == unix.ENOENT {
			return toWorker // it went in between
		}
		return done
	})
	if err != nil {
		return err
	}
	if !ok {
		_, err := f.pool.call(o, mount, nil, request{op: workCreate, path: path})
		return err
	}
	return errnoError(errno)
}

// Delete removes the name path. A missing one is fine. Before it removes
// anything it asks held, once at most, about the file that path leads to, and
// gives up with ErrLocked if that says true. held may note the identity, so
// that nobody locks the file under another name until Delete returns. Locks
// of others in the kernel aren't looked at, as in the C daemon.
func (f *Files) Delete(path string, held func(FileID) bool) error {
	o := f.begin("delete", path)
	defer f.end(o)
	if err := f.delete(o, path, held); err != nil {
		return wrap(OpUnlink, path, err)
	}
	return nil
}

func (f *Files) delete(o *op, path string, held func(FileID) bool) error {
	if path == "" {
		return nil // as the C daemon answers
	}
	id, err := f.stat(o, path)
	var noWorker *Error
	switch {
	case err == nil:
		if held(id) {
			return ErrLocked
		}
	case errors.As(err, &noWorker) || errors.Is(err, ErrClosed):
		return err
	}
	path, errno := f.absolute(path)
	if errno != 0 {
		return errno
	}
	mount, ok, err := f.direct(o, path, false, func(path string) outcome {
		var dir int
		if dir, errno = o.openDir(path); errno != 0 {
			return linkOrDone(errno)
		}
		errno = o.unlinkAt(dir)
		unix.Close(dir)
		return done
	})
	if err != nil {
		return err
	}
	if !ok {
		_, err = f.pool.call(o, mount, nil, request{op: workUnlink, path: path})
	} else {
		err = errnoError(errno)
	}
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// warnOnce logs a warning, once for each mount.
func (f *Files) warnOnce(mount, text string) {
	f.mu.Lock()
	before := f.warned[mount]
	f.warned[mount] = true
	f.mu.Unlock()
	if !before {
		f.log.Warn(text, "mount", mount)
	}
}
