// SPDX-License-Identifier: LGPL-2.1-or-later

package libvirt_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"virtlockd/test/host"
	"virtlockd/test/vmhost"
)

// An ordinary user of a private host. The uid is one that no Debian system gives to anybody.
const (
	userUID     = 47110
	userName    = "vmtest"
	userHome    = "/run/home/" + userName
	userRuntime = "/run/user/47110"
)

// A session is an ordinary user's libvirtd, which starts the lock daemon itself when it needs it.
type session struct {
	*machine
	lockd string // path of the lock daemon in the host
	found string // the directory that libvirt is told to find it in
}

// wrapper is what an administrator puts in the place of the lock daemon that libvirt starts, to give it an option.
const wrapper = "#!/bin/sh\nexec %s --keeper \"$@\"\n"

// newSession makes a host and the user's libvirtd on it.
func newSession(t *testing.T, d daemon, kind string, keeper bool) *session {
	t.Helper()
	opts := hostOptions(strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(t.Name(), "Test")), "/", "-"), kind)
	opts.Cache = "" // the system's is not the user's
	opts.Files = map[string]string{
		"/etc/passwd": "root:x:0:0:root:/root:/bin/sh\n" +
			fmt.Sprintf("%s:x:%d:%d::%s:/bin/sh\n", userName, userUID, userUID, userHome),
		"/etc/group":                                  fmt.Sprintf("root:x:0:\n%s:x:%d:\n", userName, userUID),
		userHome + "/.config/libvirt/qemu.conf":       "lock_manager = \"lockd\"\n",
		userHome + "/.config/libvirt/qemu-lockd.conf": qemuLockd[kind],
	}
	h, err := vmhost.Start(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	s := &session{machine: onHost(t, h, d, kind, "session"), lockd: "/run/lockd/virtlockd", found: "/run/lockd"}
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		logs, _ := filepath.Glob(h.Path(userHome + "/.cache/libvirt/*.log"))
		for _, log := range logs {
			text, err := os.ReadFile(log)
			t.Logf("%s: %v\n%s", filepath.Base(log), err, tail(string(text)))
		}
	})
	// The daemon under test may lie where the user can't read.
	binary, err := os.ReadFile(d.path)
	if err != nil {
		t.Fatal(err)
	}
	s.program(s.lockd, string(binary))
	if keeper {
		s.found = "/run/wrapper"
		s.program(s.found+"/virtlockd", fmt.Sprintf(wrapper, s.lockd))
	}
	if err := os.MkdirAll(h.Path(userRuntime), 0o755); err != nil {
		t.Fatal(err)
	}
	s.give(userHome, userRuntime, vmhost.LeasesDir, s.path(""))
	if err := s.user("/usr/sbin/libvirtd", "--daemon"); err != nil {
		t.Fatal(err)
	}
	return s
}

// program writes a program of the host.
func (s *session) program(path, content string) {
	s.Helper()
	if err := s.host.WriteFile(path, content); err != nil {
		s.Fatal(err)
	}
	if err := os.Chmod(s.host.Path(path), 0o755); err != nil {
		s.Fatal(err)
	}
}

// give makes the user the owner of directories with all that is in them.
func (s *session) give(dirs ...string) {
	s.Helper()
	for _, dir := range dirs {
		err := filepath.WalkDir(s.host.Path(dir), func(path string, _ fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			return os.Chown(path, userUID, userUID)
		})
		if err != nil {
			s.Fatal(err)
		}
	}
}

// user runs a command as the user.
func (s *session) user(argv ...string) error {
	_, err := s.host.RunAs(s.Context(), userUID, userUID, []string{
		"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + userHome, "USER=" + userName, "LOGNAME=" + userName,
		"XDG_RUNTIME_DIR=" + userRuntime, "VIRTLOCKD_PATH=" + s.found,
	}, argv...)
	return err
}

// virsh runs virsh on the user's libvirtd.
func (s *session) virsh(args ...string) {
	s.Helper()
	if err := s.tryVirsh(args...); err != nil {
		s.Fatal(err)
	}
}

func (s *session) tryVirsh(args ...string) error {
	return s.user(append([]string{"virsh", "--quiet", "--connect", "qemu:///session"}, args...)...)
}

func (s *session) create(g vmhost.Guest) {
	s.Helper()
	path := "/run/xml/" + g.Name + ".xml"
	if err := s.host.WriteFile(path, g.XML()); err != nil {
		s.Fatal(err)
	}
	s.virsh("create", path)
}

// pidIn reads a pid file of the user's.
func (s *session) pidIn(file string) int {
	s.Helper()
	pid, err := s.host.ReadPID(userRuntime + "/libvirt/" + file)
	if err != nil {
		s.Fatal(err)
	}
	return pid
}

// daemonPID returns the lock daemon's pid, and pid a guest's, in the host.
func (s *session) daemonPID() int { s.Helper(); return s.pidIn("virtlockd.pid") }

func (s *session) pid(g vmhost.Guest) int { s.Helper(); return s.pidIn("qemu/run/" + g.Name + ".pid") }

// An ordinary user's guests; nothing has started the lock daemon before.
func TestSession(t *testing.T) {
	t.Parallel()
	for _, d := range daemons {
		for _, kind := range bothLockspaces {
			t.Run(d.name+"/"+kind, func(t *testing.T) {
				t.Parallel()
				sessionLife(newSession(t, d, kind, false))
			})
		}
	}
}

func sessionLife(s *session) {
	data := s.shareable("data.raw", "sdb")
	a, b := s.guest("a", s.exclusive("a.qcow2", "sda"), data), s.guest("b", s.exclusive("b.qcow2", "sda"), data)
	s.give(s.path(""))
	s.create(a)
	s.locks("started", "a.qcow2 exclusive", "data.raw shared")

	proc := fmt.Sprintf("/proc/%d", s.daemonPID())
	if exe := s.run("readlink", proc+"/exe"); exe != s.lockd {
		s.Errorf("lock daemon is %s, want %s", exe, s.lockd)
	}
	if uid := s.run("stat", "-c", "%u", proc); uid != fmt.Sprint(userUID) {
		s.Errorf("lock daemon runs as uid %s, want %d", uid, userUID)
	}

	s.create(b)
	s.locks("second guest started", "a.qcow2 exclusive", "b.qcow2 exclusive", "data.raw shared")
	s.booted(a, 1)
	s.virsh("suspend", a.Name)
	s.locks("suspended", "b.qcow2 exclusive", "data.raw shared")
	s.virsh("resume", a.Name)
	s.locks("resumed", "a.qcow2 exclusive", "b.qcow2 exclusive", "data.raw shared")
	s.virsh("suspend", a.Name)
	release := s.outsider(a.Disks[0].Path, true)
	s.give(vmhost.LeasesDir)
	s.refused(s.tryVirsh("resume", a.Name), s.busy(a.Disks[0].Path))
	release()
	s.virsh("resume", a.Name)
	s.signal("KILL", s.pid(a))
	s.locks("killed", "b.qcow2 exclusive", "data.raw shared")
	s.virsh("destroy", b.Name)
	s.locks("destroyed")
}

// A lock daemon that libvirt itself starts, through a wrapper, has a keeper: a crash loses nothing in a session either.
func TestSessionWithKeeper(t *testing.T) {
	t.Parallel()
	for _, kind := range bothLockspaces {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			s := newSession(t, ours, kind, true)
			disk := s.exclusive("a.qcow2", "sda")
			a := s.guest("a", disk)
			s.give(s.path(""))
			s.create(a)
			s.booted(a, 1)
			guest := s.pid(a)
			for range 3 {
				s.locks("as before", "a.qcow2 exclusive")
				lock, daemon := host.Wait(t, s.lockOf(disk)), s.daemonPID()
				s.signal("KILL", daemon)
				s.eventually("another lock daemon", func() (bool, error) {
					pid, err := s.host.ReadPID(userRuntime + "/libvirt/virtlockd.pid")
					return err == nil && pid != daemon, nil
				}, func() string { return fmt.Sprint(daemon) })
				s.locks("after a crash", "a.qcow2 exclusive")
				lock.Asleep()
				if now := s.pid(a); now != guest {
					t.Fatalf("the guest is process %d, was %d", now, guest)
				}
				// Over a new connection: it serves, and the guest runs.
				s.virsh("suspend", a.Name)
				lock.Wakes()
				s.locks("suspended")
				s.virsh("resume", a.Name)
			}
			s.locks("resumed", "a.qcow2 exclusive")
			s.virsh("destroy", a.Name)
			s.locks("destroyed")
		})
	}
}
