// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"errors"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"virtlockd/internal/vault"
)

const (
	workerName    = "virtlockd-worker" // argv[0]
	workerComm    = "virtlockd-work"   // what top shows: 15 bytes are all there is
	workerControl = 3                  // its control socket
)

// IsWorker reports whether this process was started as a worker.
func IsWorker() bool {
	if len(os.Args) != 1 || os.Args[0] != workerName {
		return false
	}
	typ, err := unix.GetsockoptInt(workerControl, unix.SOL_SOCKET, unix.SO_TYPE)
	return err == nil && typ == unix.SOCK_SEQPACKET
}

// WorkerMain works, and doesn't return. If IsWorker, main has to call it
// before anything else.
//
// A worker does what may hang: one request at a time from its control socket,
// until that is closed. Then it gives up a lock that it had just taken but
// could not report, and ends.
func WorkerMain() {
	// The worker ends when the daemon does. A signal to the whole group or
	// unit, whose daemon still wants to release its locks in order, must not
	// end it before.
	signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGQUIT, unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2, unix.SIGALRM, unix.SIGPIPE)
	unix.CloseOnExec(workerControl)
	closeStrays()
	keepReserve()
	if fd, err := unix.Open("/proc/self/comm", unix.O_WRONLY|unix.O_CLOEXEC, 0); err == nil {
		unix.Write(fd, []byte(workerComm))
		unix.Close(fd)
	}
	w := &work{held: -1}
	for ready := w.send(reply{}); ready; ready = w.serve() {
	}
	unix.Exit(0)
}

// AwaitWorker waits until a worker process that an earlier daemon has left behind has ended, which it does by itself, but not before its
// disk answers. It returns at once if no worker has that process id.
func AwaitWorker(pid int) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return
	}
	defer unix.Close(pidfd)
	comm, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/comm")
	if err != nil || strings.TrimSpace(string(comm)) != workerComm {
		return
	}
	retry(func() error {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, -1)
		return err
	})
}

// closeStrays closes what the daemon itself inherited open from whoever
// started it. What the Go runtime has opened stays.
func closeStrays() {
	dir, err := unix.Open("/proc/self/fd", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(dir)
	entries, link := make([]byte, 4096), make([]byte, 16)
	for {
		n, err := unix.ReadDirent(dir, entries)
		if err != nil || n <= 0 {
			return
		}
		_, _, names := unix.ParseDirent(entries[:n], -1, nil)
		for _, name := range names {
			fd, err := strconv.Atoi(name)
			if err != nil || fd <= workerControl || fd == dir {
				continue
			}
			n, err := unix.Readlinkat(dir, name, link)
			if err == nil && !strings.HasPrefix(string(link[:n]), "anon_inode:") {
				unix.Close(fd)
			}
		}
	}
}

// keepReserve lowers the limit of descriptors, which also says how many this
// user may have in flight in sockets. The kernel looks at the sender's limit;
// so the workers, who fill the cells, meet it before the daemon does, which has to
// send cells around to get them emptied.
func keepReserve() {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) == nil {
		limit.Cur -= min(64, limit.Cur/8)
		unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	}
}

// work is the state of a worker.
type work struct {
	scratch
	held   int // the file with the POSIX lock that this process holds, or -1
	in     [maxRequest]byte
	out    [maxReply]byte
	rights [64]byte
}

// serve answers one request; false: there will be no more.
func (w *work) serve() bool {
	n, oobn, err := receiveMessage(workerControl, w.in[:], w.rights[:])
	if err != nil || n == 0 {
		return false
	}
	r, ok := parseRequest(w.in[:n])
	r.fds = vault.Passed(w.rights[:oobn])
	if !ok || r.op == workLock && len(r.fds) != 1 || r.op == workShare && len(r.fds) < 2 {
		return false
	}
	answer := w.do(r)
	sent := w.send(answer)
	if !sent && r.op == workLock && answer.errno == 0 && answer.step == stepNone {
		// Nobody knows of this lock, nor of a lease file that was made for it.
		undo := request{op: workRelease, fds: r.fds}
		if r.create {
			undo.path = r.path
		}
		w.release(undo)
	}
	for _, fd := range r.fds {
		unix.Close(fd)
	}
	return sent
}

func (w *work) send(r reply) bool {
	return sendMessage(workerControl, appendReply(w.out[:0], r)) == nil
}

func (w *work) do(r request) reply {
	switch r.op {
	case workLock:
		return w.lock(r)
	case workRelease:
		return w.release(r)
	case workMakeDir:
		return makeDirs(r.path)
	case workCreate:
		return create(r.path)
	case workShare:
		return share(r)
	case workAgain:
		return w.again(r)
	case workUnlink:
		return other(retry(func() error { return unix.Unlink(r.path) }))
	case workCheck:
		return w.check(r)
	default:
		info, errno := stat(r.path)
		return reply{errno: errno, step: stepOther, id: info.id}
	}
}

func other(errno syscall.Errno) reply { return reply{errno: errno, step: stepOther} }

// retry repeats a call that a signal interrupted.
func retry(call func() error) syscall.Errno {
	for {
		if err := call(); err != unix.EINTR {
			return toErrno(err)
		}
	}
}

func open(path string, flags int) (fd int, errno syscall.Errno) {
	errno = retry(func() (err error) { fd, err = unix.Open(path, openFlags|flags, fileMode); return err })
	return fd, errno
}

func stat(path string) (fileInfo, syscall.Errno) {
	var st unix.Stat_t
	errno := retry(func() error { return unix.Stat(path, &st) })
	return infoOfStat(&st), errno
}

func lstat(path string) (fileInfo, syscall.Errno) {
	var st unix.Stat_t
	errno := retry(func() error { return unix.Lstat(path, &st) })
	return infoOfStat(&st), errno
}

// lock is Lock, with the kernel following all links.
func (w *work) lock(r request) reply {
	flags := 0
	var recordErrno syscall.Errno
	if r.create {
		flags = unix.O_CREAT
	}
	for range 1000 {
		fd, errno := open(r.path, flags)
		if errno != 0 {
			return reply{errno: errno, step: stepOpen}
		}
		info, errno := w.fstat(fd)
		if errno != 0 {
			unix.Close(fd)
			return reply{errno: errno, step: stepOpen}
		}
		cmd := unix.F_OFD_SETLK
		errno = w.setLock(fd, cmd, lockType(r.mode))
		if errno == unix.EINVAL {
			cmd = unix.F_SETLK
			errno = w.setLock(fd, cmd, lockType(r.mode))
		}
		if errno != 0 {
			answer := reply{errno: errno, step: stepLock, id: info.id}
			if refused(errno) {
				answer.record = readRecord(fd, info)
			}
			unix.Close(fd)
			return answer
		}
		if r.create {
			now, errno := lstat(r.path)
			link := errno == 0 && now.kind() == unix.S_IFLNK
			if link {
				now, errno = stat(r.path)
			}
			if errno != 0 || now.id != info.id {
				w.giveUp(fd, cmd)
				continue
			}
			if !link { // nothing is written to what a link leads to
				// On NFS others see it when the worker has closed the file, below.
				recordErrno = writeRecord(fd, now, r.record)
			}
		}
		if cmd == unix.F_SETLK {
			// Such a lock belongs to this process and goes with the descriptor.
			w.held = fd
			return reply{id: info.id, posix: true, recordErrno: recordErrno}
		}
		if err := vault.At(r.fds[0]).Put([]byte{1}, fd); err != nil {
			w.giveUp(fd, cmd)
			return reply{errno: cellErrno(err), step: stepStore}
		}
		unix.Close(fd)
		return reply{id: info.id, recordErrno: recordErrno}
	}
	return reply{errno: unix.EAGAIN, step: stepOpen}
}

func (w *work) giveUp(fd, cmd int) {
	w.setLock(fd, cmd, unix.F_UNLCK)
	unix.Close(fd)
}

// release is Release.
func (w *work) release(r request) reply {
	fd, cmd := w.held, unix.F_SETLK
	w.held = -1
	if len(r.fds) > 0 {
		var err error
		cmd = unix.F_OFD_SETLK
		if fd, err = lyingIn(r.fds[0]); errors.Is(err, vault.ErrEmpty) {
			return other(0) // it was released before, by a worker that then died
		} else if err != nil {
			return other(cellErrno(err))
		}
		// It leaves the cell last: whoever finds it there after a crash releases it again.
		defer unix.Close(fd)
	}
	var errno syscall.Errno
	if r.path != "" && w.setLock(fd, cmd, unix.F_WRLCK) == 0 {
		errno = w.unlinkLease(fd, r.path)
	}
	if len(r.fds) > 0 {
		w.setLock(fd, cmd, unix.F_UNLCK)
		vault.At(r.fds[0]).Drop()
	} else {
		w.giveUp(fd, cmd)
	}
	return reply{errno: errno, step: stepOther}
}

// share is Lock.Store.
func share(r request) reply {
	file, err := lyingIn(r.fds[0])
	if err == nil {
		err = vault.At(r.fds[1]).Put([]byte(r.path), append(r.fds[2:], file)...)
		unix.Close(file)
	}
	return other(cellErrno(err))
}

func (w *work) unlinkLease(fd int, path string) syscall.Errno {
	locked, errno := w.fstat(fd)
	if errno != 0 {
		return errno
	}
	gone := false
	now, errno := lstat(path)
	if errno == 0 {
		gone, errno = removeLease(fd, now, locked.id, 0, func() syscall.Errno { return retry(func() error { return unix.Unlink(path) }) })
	}
	if !gone {
		emptyRecord(fd, locked, 0)
	}
	if errno == unix.ENOENT {
		return 0
	}
	return errno
}

// makeDirs is MakeDir; path is absolute.
func makeDirs(path string) reply {
	info, errno := stat(path)
	if errno == 0 && info.kind() != unix.S_IFDIR {
		return reply{step: stepNotDir}
	}
	if errno != unix.ENOENT {
		return other(errno)
	}
	for i := 1; i <= len(path); i++ {
		if i < len(path) && path[i] != '/' {
			continue
		}
		part := path[:i]
		if info, errno = stat(part); errno == unix.ENOENT {
			errno = retry(func() error { return unix.Mkdir(part, dirMode) })
			if errno == unix.EEXIST {
				switch again, e := stat(part); {
				case e == 0 && again.kind() == unix.S_IFDIR:
					errno = 0 // somebody was faster
				case i < len(path):
					errno = 0 // a dangling link: what is below it says so
				default:
					errno = unix.ENOTDIR // as the C daemon calls it
				}
			}
		} else if errno == 0 && info.kind() != unix.S_IFDIR {
			errno = unix.ENOTDIR
		}
		if errno != 0 {
			return other(errno)
		}
	}
	return reply{}
}

// create is Create. A dangling link is followed, as open(2) with O_CREAT does.
func create(path string) reply {
	for range 100 {
		info, errno := stat(path)
		switch {
		case errno == 0 && info.kind() == unix.S_IFDIR:
			return other(unix.EISDIR)
		case errno != unix.ENOENT:
			return other(errno)
		}
		flags := unix.O_CREAT
		if link, errno := lstat(path); errno != 0 || link.kind() != unix.S_IFLNK {
			flags |= unix.O_EXCL
		}
		fd, errno := open(path, flags)
		if errno == unix.EEXIST {
			continue // it came in between
		}
		if errno == 0 {
			unix.Close(fd)
		}
		return other(errno)
	}
	return other(unix.EAGAIN)
}
