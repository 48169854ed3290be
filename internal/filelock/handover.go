// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"virtlockd/internal/state"
	"virtlockd/internal/vault"
)

// State returns what another binary in this process needs to go on with the lock: the
// descriptor of the file, or of the cell that it lies in, and what is known of the file.
func (l *Lock) State() (fd int, file state.File) {
	return int(l.fd), state.File{
		Dev: l.id.Dev, Ino: l.id.Ino, Block: l.id.Block,
		POSIX: l.kind == POSIX, Remote: l.mount != "", Exclusive: l.mode == Exclusive,
	}
}

// Mode returns what the kernel has. It differs from what was asked for only after a take-over.
func (l *Lock) Mode() Mode { return l.mode }

// PeekCell opens in this process what lies in the cell of a remote lock, for a reader that knows nothing of
// cells: the C daemon. Close it if it is not handed over.
func PeekCell(cell int) (int, error) {
	fd, err := lyingIn(cell)
	if err != nil {
		return -1, fmt.Errorf("look into the cell of a locked file: %w", err)
	}
	return fd, nil
}

// lyingIn opens the file that lies in a cell: the last descriptor in it.
func lyingIn(cell int) (int, error) {
	fds, err := vault.At(cell).All()
	if err != nil {
		return -1, err
	}
	for _, fd := range fds[:len(fds)-1] {
		unix.Close(fd)
	}
	return fds[len(fds)-1], nil
}

// cellErrno returns the error number of a call on a cell; 0 without error.
func cellErrno(err error) syscall.Errno {
	var errno syscall.Errno
	switch {
	case err == nil:
		return 0
	case errors.Is(err, vault.ErrEmpty):
		return unix.ENODATA
	case errors.Is(err, vault.ErrTruncated):
		return unix.EMFILE
	case errors.As(err, &errno):
		return errno
	}
	return unix.EIO
}

// Finding says how a lock was found that was taken over.
type Finding uint8

const (
	Kept     Finding = iota // as it should be
	Regained                // nobody had it: it had been lost, and was taken again
	Weakened                // a sharer came in while it was converted: it is shared until Strengthen works
	Lost                    // somebody else has a conflicting lock
)

func (f Finding) String() string {
	return [...]string{"kept", "regained", "weakened", "lost"}[f]
}

// A Takeover collects the locks that this process had before its binary was replaced. It is used by one goroutine.
type Takeover struct {
	scratch
	*takeover
	rival int32
}

// Rival is the process that has the lock that the last C found to be Lost; 0: the kernel does not name it.
func (t *Takeover) Rival() int32 { return t.rival }

// takeover is what several have in common.
type takeover struct {
	files *Files
	known map[inode]*Lock   // the first one taken over of each file
	more  map[inode][]*Lock // the others
}

// inode is what the kernel tells locks apart by; two device nodes of one disk are two.
type inode struct{ dev, ino uint64 }

// Takeover begins to take n locks over.
func (f *Files) Takeover(n int) *Takeover {
	return &Takeover{takeover: &takeover{files: f, known: make(map[inode]*Lock, n), more: map[inode][]*Lock{}}}
}

// Another returns one for another goroutine to take part, with Ours alone.
func (t *Takeover) Another() *Takeover { return &Takeover{takeover: t.takeover} }

// Ours takes over a lock that our own daemon had. fd is the Takeover's from now on, if there is no
// error. The error says that fd is not what the state says; it is left open then, since
// closing it could drop a lock. Rejoin is to follow. Whether the kernel has the lock is for Confirm to ask.
func (t *Takeover) Ours(path string, fd int, mode Mode, file state.File) (*Lock, error) {
	id := FileID{Dev: file.Dev, Ino: file.Ino, Block: file.Block}
	if file.Exclusive {
		mode = Exclusive // never to be weakened, whatever this name of the file needs
	}
	l := &Lock{files: t.files, id: id, path: path, fd: int32(fd), mode: mode}
	fail := func(err error) (*Lock, error) {
		return nil, fmt.Errorf("descriptor %d is not the lock on %q: %w", fd, path, err)
	}
	if file.Remote {
		if err := isCell(fd); err != nil {
			return fail(err)
		}
		l.private = true // unless the holds say otherwise, see LiesIn
		points, err := t.files.mounts.get()
		if err != nil {
			return fail(err)
		}
		if l.mount, _ = points.find(path); id.Block {
			l.mount = deviceName(id.Dev)
		}
		return l, nil
	}
	info, errno := t.fstat(fd)
	switch {
	case errno != 0:
		return fail(errno)
	case info.id != id:
		return fail(fmt.Errorf("it is file %d:%d, not %d:%d", info.id.Dev, info.id.Ino, id.Dev, id.Ino))
	}
	l.gap()
	return l, nil
}

// Confirm asks the kernel for a lock that Ours has taken over. It is ours, so it is granted; if it is not, it was lost
// before. Nothing on the way of a hand-over can lose it, so this can wait until everybody is served again.
func (l *Lock) Confirm() Finding {
	if l.mount != "" {
		return Kept // in a cell, where to ask could hang
	}
	var fl unix.Flock_t
	if setLock(&fl, int(l.fd), unix.F_OFD_SETLK, lockType(l.mode)) == 0 {
		return Kept
	}
	l.mode = Shared // for Strengthen
	if setLock(&fl, int(l.fd), unix.F_OFD_SETLK, unix.F_RDLCK) == 0 {
		return Weakened
	}
	return Lost
}

// Rejoin finds out whether a lock from Ours shares its open file description with another one that was taken over before, as
// share made it in an earlier life of this process.
func (t *Takeover) Rejoin(l *Lock) error {
	key := inode{l.id.Dev, l.id.Ino}
	first := t.known[key]
	if first == nil {
		t.known[key] = l
		return nil
	}
	for _, other := range append([]*Lock{first}, t.more[key]...) {
		same, err := l.sameDescription(other)
		if err != nil {
			return fmt.Errorf("cannot tell whether two names share the lock on %q: %w", l.path, err)
		}
		if same {
			l.join(other)
			break
		}
	}
	t.more[key] = append(t.more[key], l)
	return nil
}

func (l *Lock) join(other *Lock) {
	if other.shares == nil {
		other.shares = new(atomic.Int32)
		other.shares.Store(1)
	}
	l.shares = other.shares
	l.shares.Add(1)
}

// sameDescription compares the open file descriptions of two locks (kcmp(2), KCMP_FILE).
func (l *Lock) sameDescription(other *Lock) (bool, error) {
	var fds [2]int
	for i, lock := range []*Lock{l, other} {
		fds[i] = int(lock.fd)
		if lock.mount != "" {
			fd, err := PeekCell(int(lock.fd))
			if err != nil {
				return false, err
			}
			defer unix.Close(fd)
			fds[i] = fd
		}
	}
	const kcmpFile = 0
	pid := uintptr(os.Getpid())
	order, _, errno := unix.Syscall6(unix.SYS_KCMP, pid, pid, kcmpFile, uintptr(fds[0]), uintptr(fds[1]), 0)
	if errno != 0 {
		return false, os.NewSyscallError("kcmp", errno)
	}
	return order == 0, nil
}

// C takes over a lock that the C daemon had in this process: a POSIX record lock becomes an
// OFD lock, and at no instant could anybody else take the file exclusively:
//
//	POSIX write -> POSIX read   in place
//	            -> OFD read     beside it
//	drop POSIX                  closing any descriptor of the file is harmless from here on
//	            -> OFD write    in place; a sharer that came in refuses this: Weakened
//
// A file that the C daemon let two names own, which it cannot tell apart, has one lock in the
// kernel: the Locks share it. fd is the Takeover's from now on, if there is no error.
//
// It may block, if the file is on a disk that hangs.
func (t *Takeover) C(path string, fd int, mode Mode) (*Lock, Finding, error) {
	s := &t.scratch
	t.rival = 0
	info, errno := s.fstat(fd)
	if errno != 0 {
		return nil, Lost, fmt.Errorf("descriptor %d is not the lock on %q: %w", fd, path, errno)
	}
	if errno := s.isLock(fd, path, info.id); errno != nil {
		return nil, Lost, fmt.Errorf("descriptor %d is not the lock on %q: %w", fd, path, errno)
	}
	l := &Lock{files: t.files, id: info.id, path: path, fd: int32(fd), mode: mode}
	key := inode{uint64(s.st.Dev), s.st.Ino} // other widths on other architectures
	if first := t.known[key]; first != nil {
		return t.share(s, l, first, key)
	}
	found, rival, errno := s.convert(fd, l)
	t.rival = rival
	if errno != 0 {
		return nil, Lost, fmt.Errorf("cannot make the POSIX lock on %q an OFD lock: %w", path, errno)
	}
	t.known[key] = l
	if err := t.store(l, fd, info); err != nil {
		return nil, Lost, err
	}
	return l, found, nil
}

// isLock tells why an open file can't be what the C daemon had locked at path. That file may have been replaced since, but
// then the kernel says that it is locked by us.
func (s *scratch) isLock(fd int, path string, id FileID) error {
	if now, errno := stat(path); errno == 0 && now.id == id {
		return nil
	}
	before, errno := s.blocker(fd, unix.F_GETLK, unix.F_WRLCK)
	if errno != 0 {
		return errno
	}
	now, errno := s.blocker(fd, unix.F_OFD_GETLK, unix.F_WRLCK)
	switch {
	case errno != 0:
		return errno
	case now.Type != unix.F_UNLCK && int(now.Pid) == os.Getpid(): // a POSIX lock of this process
	case before.Type != unix.F_UNLCK && before.Pid == -1 && now.Type == unix.F_UNLCK: // the OFD lock of this description
	default:
		return errors.New("it is another file")
	}
	return nil
}

// share makes l a second Lock on the open file description of first.
func (t *Takeover) share(s *scratch, l, first *Lock, key inode) (*Lock, Finding, error) {
	var copied int
	var err error
	if first.mount == "" {
		copied, err = unix.FcntlInt(uintptr(first.fd), unix.F_DUPFD_CLOEXEC, 3)
	} else {
		copied, err = lyingIn(int(first.fd))
	}
	if err != nil {
		return nil, Lost, fmt.Errorf("cannot share the lock on %q: %w", l.path, err)
	}
	found := Kept
	if first.mode == Exclusive {
		l.mode = Exclusive
	} else if l.mode == Exclusive {
		if s.setLock(copied, unix.F_OFD_SETLK, unix.F_WRLCK) == 0 {
			first.mode = Exclusive
			for _, other := range t.more[key] {
				other.mode = Exclusive
			}
		} else {
			l.mode, found = Shared, Weakened
		}
	}
	own := int(l.fd)
	l.fd = int32(copied)
	l.join(first)
	t.more[key] = append(t.more[key], l)
	if err := t.store(l, copied, fileInfo{id: l.id, mode: s.st.Mode}); err != nil {
		return nil, Lost, err
	}
	unix.Close(own) // its own lock went with the first one's conversion
	return l, found, nil
}

// store puts the file of a remote lock into a cell, as if a worker had opened it.
func (t *Takeover) store(l *Lock, fd int, info fileInfo) error {
	mount, local, err := t.mountOf(fd)
	if err != nil {
		return fmt.Errorf("cannot tell where %q lies: %w", l.path, err)
	}
	switch {
	case info.kind() == unix.S_IFBLK:
		mount = deviceName(info.rdev)
	case local:
		return nil
	}
	cell, err := vault.NewCell()
	if err != nil {
		return &Error{OpStore, l.path, err}
	}
	if err := cell.Put([]byte{1}, fd); err != nil {
		cell.Close()
		return &Error{OpStore, l.path, err}
	}
	l.mount, l.fd, l.private = mount, int32(cell.FD()), true
	unix.Close(fd)
	return nil
}

// mountOf tells the mount that an open file is on, without asking the disk.
func (t *Takeover) mountOf(fd int) (mount string, local bool, err error) {
	points, err := t.files.mounts.get()
	if err != nil {
		return "", false, err
	}
	name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return "", false, err
	}
	mount, local = points.find(name)
	return mount, local, nil
}

// convert does the steps that C describes. l.mode becomes what the kernel has in the end. A lock that
// came from our own binary before the C daemon had it is an OFD lock already. rival has it if it is Lost; 0: the
// kernel does not name the owner of an OFD lock.
func (s *scratch) convert(fd int, l *Lock) (found Finding, rival int32, errno syscall.Errno) {
	// Asked as a process, the kernel names OFD locks, those on this very descriptor too.
	before, errno := s.blocker(fd, unix.F_GETLK, unix.F_WRLCK)
	if errno != 0 {
		return Lost, 0, errno
	}
	refusal := s.setLock(fd, unix.F_OFD_SETLK, lockType(l.mode))
	if refusal != 0 && !refused(refusal) {
		return Lost, 0, refusal
	}
	// Asked as a description, it names POSIX locks, those of this very process too.
	now, errno := s.blocker(fd, unix.F_OFD_GETLK, unix.F_WRLCK)
	mine := now.Type != unix.F_UNLCK && int(now.Pid) == os.Getpid()
	switch {
	case errno != 0:
		return Lost, 0, errno
	case refusal != 0 && !mine:
		l.mode = Shared // for Strengthen
		return Lost, max(0, now.Pid), 0
	case refusal == 0:
		// Exclusive: it was ours, or nobody's. Shared: beside our own POSIX lock, or in its stead.
		found = Kept
		if before.Type == unix.F_UNLCK && now.Type == unix.F_UNLCK {
			found = Regained
		}
		return found, 0, s.setLock(fd, unix.F_SETLK, unix.F_UNLCK)
	}
	// Exclusive; also where a shared one is refused, because another name of the file has made
	// the process's only lock on it exclusive.
	l.mode = Exclusive
	for _, step := range []struct {
		cmd  int
		kind int16
	}{{unix.F_SETLK, unix.F_RDLCK}, {unix.F_OFD_SETLK, unix.F_RDLCK}, {unix.F_SETLK, unix.F_UNLCK}} {
		if errno := s.setLock(fd, step.cmd, step.kind); errno != 0 {
			return Lost, 0, errno
		}
	}
	if errno := s.setLock(fd, unix.F_OFD_SETLK, unix.F_WRLCK); errno != 0 {
		l.mode = Shared
		return Weakened, 0, 0
	}
	return Kept, 0, 0
}

// blocker returns a lock that would refuse one of that type on fd, with type F_UNLCK if there is none.
func (s *scratch) blocker(fd, cmd int, typ int16) (unix.Flock_t, syscall.Errno) {
	s.fl = unix.Flock_t{Type: typ, Len: 1}
	err := unix.FcntlFlock(uintptr(fd), cmd, &s.fl)
	return s.fl, toErrno(err)
}

// Strengthen makes a lock exclusive that was Weakened, and tells whether it is now.
func (l *Lock) Strengthen() bool {
	fd := int(l.fd)
	if l.mount != "" {
		var err error
		if fd, err = lyingIn(fd); err != nil {
			return false
		}
		defer unix.Close(fd)
	}
	var s scratch
	if s.setLock(fd, unix.F_OFD_SETLK, unix.F_WRLCK) != 0 {
		return false
	}
	l.mode = Exclusive
	return true
}

// isCell tells why fd is no cell with something in it.
func isCell(fd int) error {
	kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return err
	}
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if err := retry(func() error { _, err := unix.Poll(fds, 0); return err }); err != 0 {
		return err
	}
	if kind != unix.SOCK_DGRAM || fds[0].Revents != unix.POLLIN {
		return errors.New("it is not a socket that a locked file lies in")
	}
	return nil
}
