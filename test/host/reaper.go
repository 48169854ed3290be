// SPDX-License-Identifier: LGPL-2.1-or-later

package host

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The reaper is a process that outlives the test binary, however that ends, and then ends what is left on its hosts. A parent death signal
// does not: it is lost when a daemon becomes another program, and a daemon and its keeper start each other again.
//
// It knows a host by a descriptor of its mount namespace, which also keeps the kernel from giving the namespace's number to another one.

// reaperFD is the reaper's end of the connection to the test binary.
const reaperFD = 3

// reaper is the test binary's end, -1 in a program that has none. A message comes with a namespace, or names one that has ended.
var reaper = -1

// StartReaper is called before there are hosts. Main does so; a program that is no test binary can.
func StartReaper() error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socketpair", err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "reaper")
	defer theirs.Close()
	cmd := exec.Cmd{
		Path:        "/proc/self/exe",
		Args:        []string{"virtlockd-test-reaper"},
		Env:         append(os.Environ(), partEnv+"=reaper"),
		ExtraFiles:  []*os.File{theirs},
		SysProcAttr: &syscall.SysProcAttr{Setsid: true}, // control-C is not for it
	}
	if err := cmd.Start(); err != nil {
		_ = unix.Close(pair[0])
		return fmt.Errorf("reaper: %w", err)
	}
	reaper = pair[0]
	return cmd.Process.Release()
}

// endTime is how long EndAll waits.
const endTime = 2 * time.Second

// EndAll has the reaper end everything on this program's hosts, and waits for that, but not for what hangs on a disk of this program and ends with
// it. There can be no more hosts.
func EndAll() {
	if unix.Shutdown(reaper, unix.SHUT_WR) != nil {
		return // there is none
	}
	// It says nothing, but closes its end.
	for fds := []unix.PollFd{{Fd: int32(reaper), Events: unix.POLLIN}}; ; {
		if _, err := unix.Poll(fds, int(endTime.Milliseconds())); err != unix.EINTR {
			return
		}
	}
}

// guard tells the reaper of the namespace that the calling thread is in, and returns its number.
func guard() (ino uint64, err error) {
	ns, err := os.Open("/proc/thread-self/ns/mnt")
	if err != nil {
		return 0, err
	}
	defer ns.Close()
	if ino, err = inode(int(ns.Fd())); err != nil || reaper < 0 {
		return ino, err
	}
	return ino, os.NewSyscallError("sendmsg", unix.Sendmsg(reaper, []byte("+"), unix.UnixRights(int(ns.Fd())), nil, unix.MSG_NOSIGNAL))
}

// unguard tells the reaper that nothing is left in a namespace.
func unguard(ino uint64) error {
	if reaper < 0 {
		return nil
	}
	return os.NewSyscallError("send", unix.Send(reaper, strconv.AppendUint(nil, ino, 10), unix.MSG_NOSIGNAL))
}

func inode(fd int) (uint64, error) {
	var st unix.Stat_t
	err := unix.Fstat(fd, &st)
	return st.Ino, os.NewSyscallError("fstat", err)
}

// reap is what the reaper does.
func reap() error {
	guarded := map[uint64]int{}
	buf, oob := make([]byte, 64), make([]byte, unix.CmsgSpace(4))
	for {
		n, oobn, _, _, err := unix.Recvmsg(reaperFD, buf, oob, unix.MSG_CMSG_CLOEXEC)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return os.NewSyscallError("recvmsg", err)
		case n == 0: // the test binary has ended
			for ino := range guarded {
				endAll(ino)
			}
			return nil
		case oobn > 0:
			fd, err := passed(oob[:oobn])
			if err != nil {
				return err
			}
			ino, err := inode(fd)
			if err != nil {
				return err
			}
			guarded[ino] = fd
		default:
			ino, err := strconv.ParseUint(string(buf[:n]), 10, 64)
			if err != nil {
				return err
			}
			_ = unix.Close(guarded[ino])
			delete(guarded, ino)
		}
	}
}

// endAll kills all processes in a namespace, and those that they start meanwhile.
func endAll(ino uint64) {
	Eventually(func() bool {
		// All at once, before one sees that another has ended. By descriptors, since numbers are used again.
		var inside []int
		for _, pid := range processes() {
			fd, err := unix.PidfdOpen(pid, 0)
			if err != nil {
				continue // it has ended
			}
			if in(pid, ino) {
				inside = append(inside, fd)
			} else {
				_ = unix.Close(fd)
			}
		}
		for _, fd := range inside {
			_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		}
		for _, fd := range inside {
			_ = unix.Close(fd)
		}
		return len(inside) == 0
	})
}

// processes returns the ids of all there are.
func processes() (pids []int) {
	entries, _ := os.ReadDir("/proc") // always there
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// in tells whether a process is in a mount namespace.
func in(pid int, ino uint64) bool {
	var st unix.Stat_t
	return unix.Stat(fmt.Sprintf("/proc/%d/ns/mnt", pid), &st) == nil && st.Ino == ino
}
