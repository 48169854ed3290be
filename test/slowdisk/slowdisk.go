// SPDX-License-Identifier: LGPL-2.1-or-later

// Package slowdisk is a file system in memory, mounted on a test's host, whose operations can be made to hang as
// those of a dead NFS server or SAN do. It is for the tests that a hung disk delays nobody but who asked.
package slowdisk

import (
	"context"
	"fmt"
	"io"
	"log"
	"maps"
	"os"
	"sync"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"virtlockd/test/host"
)

// Op is an operation that can hang.
type Op string

// Operations. Lock is asked of the disk only if it was mounted with Locks.
const (
	Lookup Op = "lookup"
	Open   Op = "open"
	Create Op = "create"
	Unlink Op = "unlink"
	Lock   Op = "lock"
	Write  Op = "write"
	Read   Op = "read"
	Flush  Op = "flush" // asked at each close of a descriptor
)

// Options of a mount.
type Options struct {
	// Locks makes the disk itself decide on locks, as a network file system does; else the kernel does.
	Locks bool
}

// Place is a mount namespace: a *host.Host, for example. Do runs a function in it, Must one that can't fail.
type Place interface {
	Do(func() error) error
	Must(func() error)
}

// Disk is a mounted file system.
type Disk struct {
	t      testing.TB
	h      Place
	path   string
	server *fuse.Server
	root   *directory

	mu   sync.Mutex
	hung map[Op]*hang
	torn bool          // see Tear
	full syscall.Errno // what a write fails with; 0: nothing
	shut syscall.Errno // what an open fails with
}

// hang makes operations wait.
type hang struct {
	waiting int
	resume  chan struct{}
}

// Mount makes an empty disk at path, which is made, too. Mount it after the daemon was started: then it resumes
// before the daemon is ended.
func Mount(t testing.TB, h Place, path string, o Options) *Disk {
	t.Helper()
	d := &Disk{t: t, h: h, path: path, hung: map[Op]*hang{}}
	d.root = &directory{disk: d}
	fd := -1
	h.Must(func() (err error) {
		if err = os.MkdirAll(path, 0o755); err != nil {
			return err
		}
		if fd, err = unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
			return fmt.Errorf("open /dev/fuse: %w", err)
		}
		opts := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", fd)
		if err = unix.Mount("slowdisk", path, "fuse.slowdisk", unix.MS_NOSUID|unix.MS_NODEV, opts); err != nil {
			return fmt.Errorf("mount %s: %w", path, err)
		}
		return nil
	})
	raw := fs.NewNodeFS(d.root, &fs.Options{Logger: log.New(io.Discard, "", 0)})
	// The server takes over the mounted descriptor.
	server, err := fuse.NewServer(raw, fmt.Sprintf("/dev/fd/%d", fd), &fuse.MountOptions{
		Name:        "slowdisk",
		EnableLocks: o.Locks,
		Logger:      log.New(io.Discard, "", 0),
	})
	if err != nil {
		t.Fatalf("slowdisk: %v", err)
	}
	d.server = server
	go server.Serve()
	t.Cleanup(d.unmount)
	if err := server.WaitMount(); err != nil {
		t.Fatalf("slowdisk: %v", err)
	}
	return d
}

func (d *Disk) unmount() {
	for _, op := range []Op{Lookup, Open, Create, Unlink, Lock, Write, Read, Flush} {
		d.Resume(op)
	}
	// Force aborts what is under way, detach does not mind who has files open.
	err := d.h.Do(func() error { return unix.Unmount(d.path, unix.MNT_FORCE|unix.MNT_DETACH) })
	if err != nil {
		d.t.Errorf("unmount %s: %v", d.path, err)
	}
	d.server.Wait()
}

// Hang makes every operation of that kind wait from now on.
func (d *Disk) Hang(op Op) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.hung[op] == nil {
		d.hung[op] = &hang{resume: make(chan struct{})}
	}
}

// Resume lets those that wait and all later ones of that kind go on.
func (d *Disk) Resume(op Op) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if h := d.hung[op]; h != nil {
		close(h.resume)
		delete(d.hung, op)
	}
}

// Pass lets those that wait go on, and makes later ones of that kind wait.
func (d *Disk) Pass(op Op) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if h := d.hung[op]; h != nil {
		close(h.resume)
		d.hung[op] = &hang{resume: make(chan struct{})}
	}
}

// Waiting tells how many operations of that kind wait now.
func (d *Disk) Waiting(op Op) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	if h := d.hung[op]; h != nil {
		return h.waiting
	}
	return 0
}

// AwaitHang waits until an operation of that kind hangs.
func (d *Disk) AwaitHang(op Op) {
	d.t.Helper()
	if !host.Eventually(func() bool { return d.Waiting(op) > 0 }) {
		d.t.Fatalf("no %s came to the slow disk", op)
	}
}

// pass waits while the operation hangs.
func (d *Disk) pass(op Op) {
	d.mu.Lock()
	h := d.hung[op]
	if h == nil {
		d.mu.Unlock()
		return
	}
	h.waiting++
	d.mu.Unlock()
	<-h.resume
}

// Add makes an empty file.
func (d *Disk) Add(name string) {
	ctx := context.Background()
	d.root.AddChild(name, d.root.NewPersistentInode(ctx, &file{disk: d, locks: map[uint64]lock{}}, fs.StableAttr{Mode: syscall.S_IFREG}), true)
}

// Fill makes a file with something in it.
func (d *Disk) Fill(name string) { d.AddSize(name, 4096) }

// AddSize makes a file of that size in bytes. What is written to it is not kept.
func (d *Disk) AddSize(name string, size uint64) {
	ctx := context.Background()
	d.root.AddChild(name, d.root.NewPersistentInode(ctx, &file{disk: d, size: size, locks: map[uint64]lock{}}, fs.StableAttr{Mode: syscall.S_IFREG}), true)
}

// Tear makes every read fail from now on, as one does whose server has taken the lock away.
func (d *Disk) Tear() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.torn = true
}

// Expire makes reads fail through what is open now, as one does that has lost its lock on a server. What is opened from now on can be read.
func (d *Disk) Expire(name string) {
	f := d.file(name)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.expired = f.opened
}

// Steal gives the server's lock on a file to somebody on another host.
func (d *Disk) Steal(name string) {
	f := d.file(name)
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.locks)
	f.locks[0] = lock{typ: syscall.F_WRLCK}
}

// FailWrites makes every write fail in that way from now on; 0: none.
func (d *Disk) FailWrites(errno syscall.Errno) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.full = errno
}

// FailOpens makes every open of a file fail in that way from now on; 0: none.
func (d *Disk) FailOpens(errno syscall.Errno) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.shut = errno
}

// Forget makes the server forget all locks on a file, as one does that was restarted.
func (d *Disk) Forget(name string) {
	f := d.file(name)
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.locks)
}

// Locked tells whether the server has a lock on a file.
func (d *Disk) Locked(name string) bool {
	f := d.file(name)
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.locks) > 0
}

func (d *Disk) file(name string) *file {
	f, ok := d.root.GetChild(name).Operations().(*file)
	if !ok {
		panic("no file is called " + name)
	}
	return f
}

// Has tells whether a file exists.
func (d *Disk) Has(name string) bool { return d.root.GetChild(name) != nil }

// directory is the root, the only one.
type directory struct {
	fs.Inode
	disk *Disk
}

var (
	_ fs.NodeLookuper = (*directory)(nil)
	_ fs.NodeCreater  = (*directory)(nil)
	_ fs.NodeUnlinker = (*directory)(nil)
)

// Lookup implements fs.NodeLookuper.
func (r *directory) Lookup(_ context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	r.disk.pass(Lookup)
	child := r.GetChild(name)
	if child == nil {
		return nil, syscall.ENOENT
	}
	child.Operations().(*file).fill(&out.Attr)
	return child, 0
}

// Create implements fs.NodeCreater.
func (r *directory) Create(_ context.Context, name string, _, _ uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	r.disk.pass(Create)
	r.disk.Add(name)
	child := r.GetChild(name)
	f := child.Operations().(*file)
	f.fill(&out.Attr)
	return child, f.handle(), 0, 0
}

// Unlink implements fs.NodeUnlinker. The inode itself goes when nobody uses it.
func (r *directory) Unlink(context.Context, string) syscall.Errno {
	r.disk.pass(Unlink)
	return 0
}

// file has zeros in it, or nothing, and stays so.
type file struct {
	fs.Inode
	disk *Disk
	size uint64

	mu      sync.Mutex
	locks   map[uint64]lock // by owner
	opened  handle          // the last one
	expired handle          // this one and those before it are
}

// lock covers the whole file.
type lock struct {
	typ uint32 // F_RDLCK, F_WRLCK
	by  handle // it was asked for
}

// handle is an open file, numbered from 1.
type handle uint64

func (f *file) handle() handle {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.opened++
	return f.opened
}

var (
	_ fs.NodeOpener    = (*file)(nil)
	_ fs.NodeFlusher   = (*file)(nil)
	_ fs.NodeReleaser  = (*file)(nil)
	_ fs.NodeGetattrer = (*file)(nil)
	_ fs.NodeReader    = (*file)(nil)
	_ fs.NodeGetlker   = (*file)(nil)
	_ fs.NodeSetlker   = (*file)(nil)
)

func (f *file) fill(a *fuse.Attr) {
	a.Mode = syscall.S_IFREG | 0o600
	a.Nlink = 1
	a.Size = f.size
}

// Open implements fs.NodeOpener.
func (f *file) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	f.disk.pass(Open)
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	if f.disk.shut != 0 {
		return nil, 0, f.disk.shut
	}
	return f.handle(), 0, 0
}

// Flush implements fs.NodeFlusher.
func (f *file) Flush(context.Context, fs.FileHandle) syscall.Errno {
	f.disk.pass(Flush)
	return 0
}

// Release implements fs.NodeReleaser. The kernel unlocks nothing when an open file description goes that has a lock of a disk that decides
// itself: it leaves that to the disk. So does a process that was killed while it waited for a lock, which is granted all the same.
func (f *file) Release(_ context.Context, fh fs.FileHandle) syscall.Errno {
	f.mu.Lock()
	defer f.mu.Unlock()
	maps.DeleteFunc(f.locks, func(_ uint64, l lock) bool { return l.by == fh.(handle) })
	return 0
}

// Getattr implements fs.NodeGetattrer.
func (f *file) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	f.fill(&out.Attr)
	return 0
}

// conflict returns the type of another owner's lock that excludes one of type typ.
func (f *file) conflict(owner uint64, typ uint32) (uint32, bool) {
	for o, l := range f.locks {
		if o != owner && (l.typ == syscall.F_WRLCK || typ == syscall.F_WRLCK) {
			return l.typ, true
		}
	}
	return 0, false
}

// Getlk implements fs.NodeGetlker.
func (f *file) Getlk(_ context.Context, _ fs.FileHandle, owner uint64, lk *fuse.FileLock, _ uint32, out *fuse.FileLock) syscall.Errno {
	f.mu.Lock()
	defer f.mu.Unlock()
	*out = *lk
	out.Typ = syscall.F_UNLCK
	if typ, ok := f.conflict(owner, lk.Typ); ok {
		out.Typ = typ
	}
	return 0
}

// Setlk implements fs.NodeSetlker.
func (f *file) Setlk(_ context.Context, fh fs.FileHandle, owner uint64, lk *fuse.FileLock, _ uint32) syscall.Errno {
	if lk.Typ != syscall.F_UNLCK {
		f.disk.pass(Lock)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if lk.Typ == syscall.F_UNLCK {
		delete(f.locks, owner)
		return 0
	}
	if _, ok := f.conflict(owner, lk.Typ); ok {
		return syscall.EAGAIN
	}
	f.locks[owner] = lock{lk.Typ, fh.(handle)}
	return 0
}

// Read implements fs.NodeReader.
func (f *file) Read(_ context.Context, by fs.FileHandle, dest []byte, _ int64) (fuse.ReadResult, syscall.Errno) {
	f.disk.pass(Read)
	f.mu.Lock()
	expired := by.(handle) <= f.expired
	f.mu.Unlock()
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	if f.disk.torn || expired {
		return nil, syscall.EIO
	}
	clear(dest)
	return fuse.ReadResultData(dest), 0
}

func (f *file) Write(_ context.Context, _ fs.FileHandle, data []byte, _ int64) (uint32, syscall.Errno) {
	f.disk.pass(Write)
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	if f.disk.full != 0 {
		return 0, f.disk.full
	}
	return uint32(len(data)), 0
}
