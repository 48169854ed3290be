// SPDX-License-Identifier: LGPL-2.1-or-later

package pidfile

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMain lets the test binary be the other process: one that holds a POSIX lock on byte 0, as the C
// daemon does, until its stdin ends.
func TestMain(m *testing.M) {
	if path := os.Getenv("PIDFILE_TEST_POSIX_HOLDER"); path != "" {
		if err := holdPOSIX(path); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func holdPOSIX(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	lock := unix.Flock_t{Type: unix.F_WRLCK, Len: 1}
	if err := unix.FcntlFlock(f.Fd(), unix.F_SETLK, &lock); err != nil {
		return err
	}
	fmt.Println("locked")
	bufio.NewReader(os.Stdin).ReadByte()
	return nil
}

func TestAcquireRemove(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.pid")
	// A longer content of a crashed predecessor must be gone.
	if err := os.WriteFile(path, []byte("123456789012345"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := Acquire(path)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil || string(got) != strconv.Itoa(os.Getpid()) {
		t.Errorf("content %q, %v; want our pid without a newline", got, err)
	}
	flags, err := unix.FcntlInt(uintptr(f.fd), unix.F_GETFD, 0)
	if err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("descriptor flags %#x, %v; want CLOEXEC", flags, err)
	}

	_, err = Acquire(path)
	var locked *LockedError
	if !errors.As(err, &locked) || locked.PID != os.Getpid() {
		t.Errorf("second Acquire: %v; want a LockedError with pid %d", err, os.Getpid())
	}
	want := fmt.Sprintf("Failed to acquire pid file '%s': Resource temporarily unavailable (process %d ", path, os.Getpid())
	if err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("text %q; want prefix %q", err, want)
	}

	if err := f.Remove(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Remove: %v; want it gone", err)
	}
	f, err = Acquire(path)
	if err != nil {
		t.Fatal(err)
	}
	f.Remove()
}

func TestMode(t *testing.T) {
	old := unix.Umask(0o027)
	defer unix.Umask(old)
	path := filepath.Join(t.TempDir(), "x.pid")
	f, err := Acquire(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Remove()
	if st, err := os.Stat(path); err != nil || st.Mode() != 0o640 {
		t.Errorf("mode %v, %v; want 0640", st.Mode(), err)
	}
}

func TestPOSIXHolder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.pid")
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "PIDFILE_TEST_POSIX_HOLDER="+path)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer stdin.Close()
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
		t.Fatalf("holder said %q, %v", line, err)
	}

	_, err = Acquire(path)
	var locked *LockedError
	if !errors.As(err, &locked) || locked.PID != cmd.Process.Pid {
		t.Fatalf("got %v; want a LockedError with pid %d", err, cmd.Process.Pid)
	}
	if got, err := os.ReadFile(path); err != nil || len(got) != 0 {
		t.Errorf("the refused instance wrote %q, %v", got, err)
	}
}

func TestReplacedIsLeftAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.pid")
	f, err := Acquire(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("1"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := f.Remove(); !errors.Is(err, errNotOurs) {
		t.Errorf("Remove: %v; want errNotOurs", err)
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != "1" {
		t.Errorf("the other file: %q, %v", got, err)
	}

	f, err = Acquire(path)
	if err != nil {
		t.Fatal(err)
	}
	os.Remove(path)
	if err := f.Remove(); err != nil {
		t.Errorf("Remove of a missing file: %v", err)
	}
}

func TestUnusablePaths(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mkfifo(dir+"/fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ path, want string }{
		{dir + "/none/x.pid", "Failed to open pid file '" + dir + "/none/x.pid': No such file or directory"},
		{dir, "Failed to open pid file '" + dir + "': Is a directory"},
		{dir + "/fifo", "Failed to open pid file '" + dir + "/fifo': it is not a regular file"},
		{"/dev/null", "Failed to open pid file '/dev/null': it is not a regular file"},
	} {
		f, err := Acquire(tt.path)
		if err == nil || err.Error() != tt.want {
			t.Errorf("got %v; want %s", err, tt.want)
		}
		if f != nil {
			t.Errorf("%s: got a file", tt.path)
		}
	}
}

// An owner that removes its file between our open and our lock must not leave us with a lock on a
// nameless file.
func TestAcquireRacesRemove(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.pid")
	for range 300 {
		old, err := Acquire(path)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			old.Remove()
		}()
		var f *File
		for {
			f, err = Acquire(path)
			var locked *LockedError
			if !errors.As(err, &locked) {
				break
			}
		}
		<-done
		if err != nil {
			t.Fatal(err)
		}
		var at unix.Stat_t
		if err := unix.Stat(path, &at); err != nil || at.Ino != f.ino {
			t.Fatalf("path %v, inode %d; ours is %d", err, at.Ino, f.ino)
		}
		if err := f.Remove(); err != nil {
			t.Fatal(err)
		}
	}
}

// What was yielded can be regained, unless somebody else has it.
func TestYield(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "pid")
	f, err := Acquire(path)
	if err != nil {
		t.Fatal(err)
	}
	var locked *LockedError
	if _, err := Acquire(path); !errors.As(err, &locked) {
		t.Fatalf("while it is locked: %v", err)
	}
	// Another reference to the open file does not keep the lock.
	other, err := unix.FcntlInt(uintptr(f.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(other)
	if err := f.Yield(); err != nil {
		t.Fatal(err)
	}
	g, err := Acquire(path)
	if err != nil {
		t.Fatalf("while it is yielded: %v", err)
	}
	if err := f.Regain(); !errors.As(err, &locked) {
		t.Errorf("while somebody else has it: %v", err)
	}
	if err := g.Yield(); err != nil {
		t.Fatal(err)
	}
	if err := f.Regain(); err != nil {
		t.Error(err)
	}
	if err := f.Remove(); err != nil {
		t.Error(err)
	}
}

// The file of a process that has ended names whoever goes on with it, and was nobody's meanwhile.
func TestAdopt(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pid")
	before, err := Acquire(path)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Dup(before.FD())
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(before.FD())
	if err := os.WriteFile(path, []byte("1234567890"), 0); err != nil {
		t.Fatal(err)
	}
	var locked *LockedError
	if _, err := Acquire(path); !errors.As(err, &locked) || locked.PID != 1234567890 {
		t.Errorf("before Adopt: %v", err)
	}
	f, err := Adopt(path, fd)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil || string(got) != strconv.Itoa(os.Getpid()) {
		t.Errorf("the file says %q (%v)", got, err)
	}
	if err := f.Remove(); err != nil {
		t.Error(err)
	}
}
