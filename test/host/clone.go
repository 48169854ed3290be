// SPDX-License-Identifier: LGPL-2.1-or-later

package host

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// cloneArgs is struct clone_args of clone3(2), as of Linux 5.5 (set_tid).
type cloneArgs struct {
	flags, pidfd, childTID, parentTID, exitSignal, stack, stackSize, tls, setTID, setTIDSize uint64
}

// forkExec starts a program with a given process id (clone3 with set_tid, Linux 5.5; needs CAP_SYS_ADMIN or
// CAP_CHECKPOINT_RESTORE) and with fds as its descriptors 3 and up. os/exec can't choose the id.
func forkExec(pid int, path string, argv, env []string, fds [2]int) error {
	path0, err := syscall.BytePtrFromString(path)
	if err != nil {
		return err
	}
	argvp, err := syscall.SlicePtrFromStrings(argv)
	if err != nil {
		return err
	}
	envp, err := syscall.SlicePtrFromStrings(env)
	if err != nil {
		return err
	}
	tid := int32(pid)
	args := cloneArgs{
		exitSignal: uint64(unix.SIGCHLD),
		setTID:     uint64(uintptr(unsafe.Pointer(&tid))),
		setTIDSize: 1,
	}
	// Nobody opens a descriptor without CLOEXEC in the meantime.
	syscall.ForkLock.Lock()
	defer syscall.ForkLock.Unlock()
	if errno := rawForkExec(&args, path0, &argvp[0], &envp[0], &fds); errno != 0 {
		return errno
	}
	return nil
}

// rawForkExec makes only raw system calls in the child, a copy of this process with one thread.
//
//go:norace
//go:noinline
func rawForkExec(args *cloneArgs, path *byte, argv, env **byte, fds *[2]int) syscall.Errno {
	pid, _, errno := syscall.RawSyscall(unix.SYS_CLONE3, uintptr(unsafe.Pointer(args)), unsafe.Sizeof(*args), 0)
	if errno != 0 || pid != 0 {
		return errno
	}
	syscall.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0)
	for i := range fds {
		// A copy made by dup3 without O_CLOEXEC stays open.
		syscall.RawSyscall(unix.SYS_DUP3, uintptr(fds[i]), uintptr(3+i), 0)
	}
	syscall.RawSyscall(unix.SYS_EXECVE, uintptr(unsafe.Pointer(path)), uintptr(unsafe.Pointer(argv)), uintptr(unsafe.Pointer(env)))
	for {
		syscall.RawSyscall(unix.SYS_EXIT_GROUP, 127, 0, 0)
	}
}
