// SPDX-License-Identifier: LGPL-2.1-or-later

package rpc

import (
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"virtlockd/internal/poll"
)

func TestPeerPIDFD(t *testing.T) {
	t.Parallel()
	b := serve(t, nil)
	info := string(b.dial().call(procPIDFD, nil))
	if !strings.Contains(info, fmt.Sprintf("Pid:\t%d\n", os.Getpid())) {
		t.Errorf("no pidfd of ours:\n%s", info)
	}
	_, err := (&Client{pid: 0}).PeerPIDFD()
	if !errors.Is(err, ErrNoPeerPID) {
		t.Errorf("pid 0: %v", err)
	}
}

// TestOpenPeer tests what is done on kernels without SO_PEERPIDFD.
func TestOpenPeer(t *testing.T) {
	t.Parallel()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	cmd := exec.Command("/bin/cat") // lives until its standard input ends
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := int32(cmd.Process.Pid)
	started, err := startTime(pid)
	if err != nil {
		t.Fatal(err)
	}
	now, err := uptime()
	if err != nil {
		t.Fatal(err)
	}
	if started <= 0 || started > now || now-started > int64(patience) {
		t.Errorf("started %d ns after boot, now it is %d", started, now)
	}

	fd, err := openPeer(pid, now, pair[0])
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if poll.Ended(fd) {
		t.Error("it has ended already")
	}
	gone := func(what string, pid int32, accepted int64) {
		t.Helper()
		if fd, err := openPeer(pid, accepted, pair[0]); !errors.Is(err, ErrPeerGone) {
			t.Errorf("%s: descriptor %d, %v", what, fd, err)
		}
	}
	gone("started after the connection", pid, started-1)
	gone("no such process", math.MaxInt32, now)
	in.Close()
	eventually(t, "the child to be a zombie", func() bool { return poll.Ended(fd) })
	gone("zombie", pid, now)
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	gone("reaped", pid, now)
	unix.Close(pair[1])
	gone("hung up", int32(os.Getpid()), now)
}
