// SPDX-License-Identifier: LGPL-2.1-or-later

package systemd

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
)

// partEnv tells a process that a test started which part it plays.
const partEnv = "VIRTLOCKD_SYSTEMD_PART"

const (
	keeperPart = "keeper"
	initPart   = "init"
	guestPart  = "guest"
)

// dirPrefix begins the names of a machine's directory and of its control group.
const dirPrefix = "virtlockd-systemd-"

// Descriptors that a started process finds.
const (
	controlFD = 3
	statusFD  = 4
)

// reapTime bounds the wait for the end of all processes of a machine. One that waits for a disk in the kernel can't
// be hurried.
const reapTime = 20 * time.Second

// setup is what the keeper and the machine's init are told.
type setup struct {
	Dir       string // for mounts; the keeper removes it
	Installed string // what "make install" made; "": nothing
	Files     map[string]string
}

// Main is what TestMain calls. It runs the tests; in a process that a test started it plays its part instead.
func Main(m *testing.M) {
	var err error
	switch part := os.Getenv(partEnv); part {
	case "":
		host.Main(m)
		return
	case keeperPart:
		err = keep()
	case initPart:
		err = boot()
		fmt.Fprint(os.NewFile(statusFD, "status"), err) // it never returns without
	case guestPart:
		err = guest()
	default:
		err = fmt.Errorf("no part is called %q", part)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "process of a test: %v\n", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// keep starts a machine, ends it when the test wants that or is gone, and removes what is left. It lives in a mount
// namespace of its own, and outlives the test for that.
func keep() error {
	// The control group namespace is the thread's, and the machine's PID 1 gets its parent death signal when the thread
	// that started it ends.
	runtime.LockOSThread()
	control, status := bufio.NewReader(os.NewFile(controlFD, "control")), os.NewFile(statusFD, "status")
	unix.CloseOnExec(controlFD)
	unix.CloseOnExec(statusFD)
	var s setup
	if err := json.NewDecoder(control).Decode(&s); err != nil {
		return fmt.Errorf("read what to set up: %w", err)
	}
	k := keeper{setup: s}
	pid, err := k.start()
	if err != nil {
		fmt.Fprint(status, err)
	} else {
		fmt.Fprint(status, pid)
	}
	status.Close()
	// Until the test closes it or is gone.
	_, _ = io.Copy(io.Discard, control)
	return k.end()
}

type keeper struct {
	setup
	cgroup string
	init   *exec.Cmd
}

// start returns the process id of the machine's PID 1, which runs systemd then.
func (k *keeper) start() (int, error) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return 0, fmt.Errorf("make mounts private: %w", err)
	}
	// A machine's groups are below the one that we are in. And the options of a mount that the initial namespace makes
	// would be the real machine's from then on (nsdelegate and others); those of any other namespace are ignored.
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return 0, fmt.Errorf("make a control group namespace: %w", err)
	}
	mounted := filepath.Join(k.Dir, "cgroup")
	if err := os.Mkdir(mounted, 0o755); err != nil {
		return 0, err
	}
	if err := unix.Mount("cgroup2", mounted, "cgroup2", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return 0, fmt.Errorf("mount control groups version 2 (the kernel needs CONFIG_CGROUPS): %w", err)
	}
	k.cgroup = filepath.Join(mounted, filepath.Base(k.Dir))
	if err := os.Mkdir(k.cgroup, 0o755); err != nil {
		k.cgroup = ""
		return 0, fmt.Errorf("make a control group (is the hierarchy read-only, as in an unprivileged container?): %w", err)
	}
	// A machine can limit memory where the group that we are in hands that on, which only the topmost one can while there are processes
	// in it. Most systems have it so anyway.
	_ = os.WriteFile(filepath.Join(mounted, "cgroup.subtree_control"), []byte("+memory"), 0)
	group, err := os.Open(k.cgroup)
	if err != nil {
		return 0, err
	}
	defer group.Close()
	files, w, err := pipes()
	if err != nil {
		return 0, err
	}
	k.init = &exec.Cmd{
		Path:       "/proc/self/exe",
		Args:       []string{"virtlockd-test-init"},
		Env:        []string{partEnv + "=" + initPart},
		Stderr:     os.Stderr,
		ExtraFiles: files,
		SysProcAttr: &syscall.SysProcAttr{
			Cloneflags:  unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
			UseCgroupFD: true,
			CgroupFD:    int(group.Fd()),
			Pdeathsig:   unix.SIGKILL,
			Setsid:      true,
		},
	}
	err = k.init.Start()
	for _, f := range files {
		f.Close()
	}
	defer w.status.Close()
	defer w.control.Close()
	if err != nil {
		k.init = nil
		return 0, fmt.Errorf("make namespaces: %w", err)
	}
	if err := json.NewEncoder(w.control).Encode(k.setup); err != nil {
		return 0, err
	}
	answer, err := io.ReadAll(w.status) // ends when systemd is executed
	if err != nil {
		return 0, err
	}
	if len(answer) > 0 {
		return 0, fmt.Errorf("%s", answer)
	}
	return k.init.Process.Pid, nil
}

// ends are the keeper's ends of the pipes to the init.
type ends struct{ control, status *os.File }

// pipes returns the descriptors for a started process, in their order, and the other ends.
func pipes() ([]*os.File, ends, error) {
	control, controlW, err := os.Pipe()
	if err != nil {
		return nil, ends{}, err
	}
	status, statusW, err := os.Pipe()
	if err != nil {
		control.Close()
		controlW.Close()
		return nil, ends{}, err
	}
	return []*os.File{control, statusW}, ends{controlW, status}, nil
}

// end kills the machine and removes its control groups and its directory.
func (k *keeper) end() error {
	var errs []error
	if k.init != nil {
		// With PID 1 the kernel kills everything in its namespace, and wait returns when all of it has ended.
		_ = k.init.Process.Kill()
		_ = k.init.Wait() // how it ended is known
	}
	if k.cgroup != "" {
		errs = append(errs, removeGroups(k.cgroup))
	}
	mounted := filepath.Join(k.Dir, "cgroup")
	if err := unix.Unmount(mounted, unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
		errs = append(errs, fmt.Errorf("unmount %s: %w", mounted, err))
		return errors.Join(errs...) // don't remove what is behind it
	}
	errs = append(errs, os.RemoveAll(k.Dir))
	return errors.Join(errs...)
}

// removeGroups removes a control group and those in it, once they are empty.
func removeGroups(top string) error {
	for end := time.Now().Add(reapTime); ; time.Sleep(host.Poll) {
		err := tryRemoveGroups(top)
		if err == nil || time.Now().After(end) {
			return err
		}
	}
}

func tryRemoveGroups(top string) error {
	var groups []string
	err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if d != nil && d.IsDir() {
			groups = append(groups, path)
		}
		return err
	})
	if err != nil {
		return err
	}
	for i := len(groups) - 1; i >= 0; i-- { // those in it come after a group
		if err := os.Remove(groups[i]); err != nil {
			procs, _ := os.ReadFile(filepath.Join(groups[i], "cgroup.procs"))
			return fmt.Errorf("remove control group (processes: %s): %w", strings.Fields(string(procs)), err)
		}
	}
	return nil
}
