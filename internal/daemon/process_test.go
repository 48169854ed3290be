// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/slowdisk"
	"virtlockd/test/wire"
)

// The tests below run the real binary on a private host.

const (
	runDir      = "/run/libvirt"
	lockSocket  = runDir + "/virtlockd-sock"
	adminSocket = runDir + "/virtlockd-admin-sock"
	pidFile     = "/run/virtlockd.pid"
	logFile     = "/var/log/libvirt/virtlockd.log"

	// strangerPID is a process id that no process has: the kernel's limit is far below.
	strangerPID = 0x70000001
)

func TestMain(m *testing.M) {
	if os.Getenv(clientEnv) != "" {
		os.Exit(beClient(os.Args[1]))
	}
	host.Main(m)
}

// clientEnv makes the test binary a client that registers with the socket that its argument names: a
// process can be another user, a connection can't.
const clientEnv = "DAEMON_TEST_CLIENT"

func beClient(path string) int {
	c, err := wire.Dial(path, wire.LockProgram)
	if err == nil {
		err = c.Register(wire.VM(strangerPID))
	}
	if err == nil {
		err = c.Acquire("", "/tmp/vlv/by-user", wire.Autocreate)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// command runs the binary where nothing of the host matters, and returns what it said.
func command(t *testing.T, env []string, argv ...string) (stdout, stderr string, code int) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := exec.Cmd{Path: host.Ours(t), Args: argv, Env: env, Stdout: &out, Stderr: &errs}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

func TestHelp(t *testing.T) {
	t.Parallel()
	for _, args := range []string{"-h", "--help", "--he", "-hV", "-h -x", "-vh"} {
		stdout, stderr, code := command(t, nil, append([]string{"/some where/virtlockd"}, strings.Fields(args)...)...)
		if stdout != "" || code != 0 {
			t.Errorf("%s: stdout %q, exit code %d", args, stdout, code)
		}
		for _, want := range []string{"\nUsage:\n  /some where/virtlockd [options]\n", "-h | --help", "-v | --verbose", "-d | --daemon",
			"-t | --timeout <secs>", "-f | --config <file>", "-V | --version", "-p | --pid-file <file>",
			"      /etc/libvirt/virtlockd.conf\n", "      /run/libvirt/virtlockd-sock\n", "      /run/libvirt/virtlockd-admin-sock\n",
			"      /run/virtlockd.pid\n"} {
			if !strings.Contains(stderr, want) {
				t.Errorf("%s: no %q in\n%s", args, want, stderr)
			}
		}
	}
}

func TestHelpOfUser(t *testing.T) {
	t.Parallel()
	var errs bytes.Buffer
	cmd := exec.Command("/proc/self/exe", "--help")
	binary, err := os.Open(host.Ours(t))
	if err != nil {
		t.Fatal(err)
	}
	defer binary.Close()
	cmd.Path = fmt.Sprintf("/proc/self/fd/%d", 3)
	cmd.ExtraFiles = []*os.File{binary}
	cmd.Env = []string{"HOME=/h", "XDG_RUNTIME_DIR=/r", "XDG_CONFIG_HOME=/c"}
	cmd.Stderr = &errs
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: nobody}
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"/c/libvirt/virtlockd.conf\n", "/r/libvirt/virtlockd-sock\n", "/r/libvirt/virtlockd-admin-sock\n", "/r/libvirt/virtlockd.pid\n"} {
		if !strings.Contains(errs.String(), want) {
			t.Errorf("no %q in\n%s", want, &errs)
		}
	}
}

func TestVersion(t *testing.T) {
	t.Parallel()
	for _, args := range []string{"-V", "--version", "--vers", "-vV", "-Vh", "-Vx", "-t5 -V", "--da -V", "-v extra -V", "-d -V"} {
		stdout, stderr, code := command(t, nil, append([]string{"nAmE"}, strings.Fields(args)...)...)
		first, rest, _ := strings.Cut(stdout, "\n")
		if first != "nAmE (libvirt) 9.0.0" || !strings.HasPrefix(rest, "virtlockd (Go) ") || !strings.HasSuffix(rest, "\nstate file version 1\n") || strings.Count(rest, "\n") != 2 || stderr != "" || code != 0 {
			t.Errorf("%s: exit code %d\n%s%s", args, code, stdout, stderr)
		}
	}
}

func TestWrongUsage(t *testing.T) {
	t.Parallel()
	for args, want := range map[string]string{
		"-x":         "invalid option -- 'x'",
		"-?":         "invalid option -- '?'",
		"-x -V":      "invalid option -- 'x'",
		"--bogus":    "unrecognized option '--bogus'",
		"--bogus=3":  "unrecognized option '--bogus=3'",
		"--help=1":   "option '--help' doesn't allow an argument",
		"--ver":      "option '--ver' is ambiguous; possibilities: '--verbose' '--version'",
		"--con":      "option '--config' requires an argument",
		"-f":         "option requires an argument -- 'f'",
		"-p":         "option requires an argument -- 'p'",
		"-t":         "option requires an argument -- 't'",
		"--pid-file": "option '--pid-file' requires an argument",
	} {
		stdout, stderr, code := command(t, nil, append([]string{"virtlockd"}, strings.Fields(args)...)...)
		if stdout != "" || code != 1 || !strings.HasPrefix(stderr, "virtlockd: "+want+"\n\nUsage:\n") {
			t.Errorf("%s: exit code %d, want 1 and %q\n%s%s", args, code, want, stdout, stderr)
		}
	}
}

func TestWrongTimeout(t *testing.T) {
	t.Parallel()
	for _, value := range []string{"", "abc", "-1", "1x", "1.5", "0x1", "2147483648"} {
		stdout, stderr, code := command(t, nil, "virtlockd", "-t", value)
		if stdout != "" || code != 1 || !strings.Contains(stderr, "nvalid value for timeout: "+strconv.Quote(value)) {
			t.Errorf("%q: exit code %d\n%s%s", value, code, stdout, stderr)
		}
	}
}

// The prefixes and versions that the Makefile sets end up in the binary.
func TestBuildSettings(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("builds a binary")
	}
	out, err := exec.Command("make", "-s", "-C", "../..", "-n", "build", "LIBVIRT_VERSION=10.3.2", "VERSION=7.8", "COMMIT=c0ffee",
		"RUNSTATEDIR=/r", "SYSCONFDIR=/s", "LOCALSTATEDIR=/l").Output()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	line := strings.Replace(strings.TrimSpace(string(out)), "-o bin/", "-o "+dir+"/", 1)
	cmd := exec.Command("sh", "-c", line)
	cmd.Dir = "../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	version, err := exec.Command(dir+"/virtlockd", "-V").Output()
	if want := dir + "/virtlockd (libvirt) 10.3.2\nvirtlockd (Go) 7.8 (c0ffee)\nstate file version 1\n"; err != nil || string(version) != want {
		t.Errorf("version %q, %v; want %q", version, err, want)
	}
	help, err := exec.Command(dir+"/virtlockd", "-h").CombinedOutput()
	if err != nil || !strings.Contains(string(help), "/s/libvirt/virtlockd.conf") || !strings.Contains(string(help), "/r/libvirt/virtlockd-sock") ||
		!strings.Contains(string(help), "/r/virtlockd.pid") {
		t.Errorf("%v\n%s", err, help)
	}
	if static, err := exec.Command("readelf", "-l", dir+"/virtlockd").Output(); err == nil && bytes.Contains(static, []byte("INTERP")) {
		t.Error("the binary isn't static")
	}
}

// umask sets the umask that processes on the host start with.
func umask(h *host.Host, mask int) {
	h.Must(func() error { unix.Umask(mask); return nil })
}

func mode(t *testing.T, h *host.Host, path string) fs.FileMode {
	t.Helper()
	st, err := os.Lstat(h.Path(path))
	if err != nil {
		t.Error(err)
		return 0
	}
	return st.Mode()
}

func TestSystemMode(t *testing.T) {
	t.Parallel()
	for _, mask := range []int{0, 0o022, 0o077} {
		h := host.New(t)
		umask(h, mask)
		d := h.Start(host.Ours(t), host.Options{NoConfig: true})
		for path, want := range map[string]fs.FileMode{
			runDir:      fs.ModeDir | 0o755,
			lockSocket:  fs.ModeSocket | 0o700,
			adminSocket: fs.ModeSocket | 0o700,
			pidFile:     0o644 &^ fs.FileMode(mask),
		} {
			if got := mode(t, h, path); got != want {
				t.Errorf("umask %#o: %s has mode %v, want %v", mask, path, got, want)
			}
		}
		if got := h.ReadFile(pidFile); got != strconv.Itoa(d.PID()) {
			t.Errorf("pid file %q, want %d", got, d.PID())
		}
		// Lease files and directories get what the umask leaves, as with the C daemon.
		c := d.Client(strangerPID)
		if err := c.CreateLockspace(host.Data + "/a/b"); err != nil {
			t.Fatal(err)
		}
		if err := c.Acquire(host.Data+"/a/b", "lease", wire.Autocreate); err != nil {
			t.Fatal(err)
		}
		for path, want := range map[string]fs.FileMode{
			"/a":         fs.ModeDir | 0o700&^fs.FileMode(mask),
			"/a/b":       fs.ModeDir | 0o700&^fs.FileMode(mask),
			"/a/b/lease": 0o600 &^ fs.FileMode(mask),
		} {
			if got := mode(t, h, host.Data+path); got != want {
				t.Errorf("umask %#o: %s has mode %v, want %v", mask, path, got, want)
			}
		}
		if code := d.Stop(); code != 0 {
			t.Errorf("exit code %d", code)
		}
		for _, path := range []string{lockSocket, adminSocket, pidFile, host.Data + "/a/b/lease"} {
			if h.Exists(path) {
				t.Errorf("%s is left", path)
			}
		}
		if !h.Exists(runDir) {
			t.Errorf("%s is gone", runDir)
		}
	}
}

// The system's daemon serves root only.
func TestSystemModeRefusesUsers(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	d := h.Start(host.Ours(t), host.Options{})
	h.Must(func() error { return os.Chmod(lockSocket, 0o777) })
	if out, err := clientAs(h, nobody, lockSocket); err == nil {
		t.Errorf("a user was served: %s", out)
	}
	if !host.Eventually(func() bool { return strings.Contains(d.Stderr(), "uid 65534") }) {
		t.Errorf("nothing in the log\n%s", d.Stderr())
	}
	if out, err := clientAs(h, nil, lockSocket); err != nil {
		t.Errorf("root isn't served: %v\n%s", err, out)
	}
}

// publicBinary returns a path of the binary that every user may run.
func publicBinary(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{dir, filepath.Dir(dir)} {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "virtlockd")
	// By another process: a child that some other test starts meanwhile would inherit a descriptor that
	// the file is written with, and the file couldn't be run.
	if out, err := exec.Command("install", "-m", "0755", host.Ours(t), path).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return path
}

// start starts our daemon as whoever the options say.
func start(t *testing.T, h *host.Host, o host.Options) *host.Daemon {
	t.Helper()
	binary := host.Ours(t)
	if o.Credential != nil {
		binary = publicBinary(t)
	}
	return h.Start(binary, o)
}

var nobody = &syscall.Credential{Uid: 65534, Gid: 65534}

// clientAs registers as a user on a socket of the host.
func clientAs(h *host.Host, as *syscall.Credential, socket string) (string, error) {
	var out bytes.Buffer
	cmd := exec.Command("/proc/self/exe", socket)
	cmd.Env = []string{clientEnv + "=1"}
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: as}
	h.Must(cmd.Start)
	err := cmd.Wait()
	return out.String(), err
}

func TestUserMode(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name         string
		env          string
		run, config  string
		made, notNew string // a directory that is made, one that was there
	}{
		{"XDG", "HOME=/tmp/home XDG_RUNTIME_DIR=/tmp/rt XDG_CONFIG_HOME=/tmp/home/cfg", "/tmp/rt/libvirt", "/tmp/home/cfg/libvirt", "/tmp/rt/libvirt", "/tmp/rt"},
		{"home", "HOME=/tmp/home", "/tmp/home/.cache/libvirt", "/tmp/home/.config/libvirt", "/tmp/home/.cache", "/tmp/home"},
		{"cache", "HOME=/tmp/home XDG_CACHE_HOME=/tmp/rt/c", "/tmp/rt/c/libvirt", "/tmp/home/.config/libvirt", "/tmp/rt/c", "/tmp/rt"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h := host.New(t)
			h.Must(func() error {
				for _, dir := range []string{"/tmp/home", "/tmp/rt"} {
					if err := os.Mkdir(dir, 0o755); err != nil {
						return err
					}
					if err := os.Chown(dir, 65534, 65534); err != nil {
						return err
					}
				}
				return os.Chmod(host.Data, 0o777)
			})
			h.WriteFile(tt.config+"/virtlockd.conf", "log_level = 2\n", 0o644)
			umask(h, 0)
			d := start(t, h, host.Options{NoConfig: true, Env: strings.Fields(tt.env), RunDir: tt.run, Credential: nobody})
			for path, want := range map[string]fs.FileMode{
				tt.made:                          fs.ModeDir | 0o700,
				tt.run:                           fs.ModeDir | 0o700,
				tt.notNew:                        fs.ModeDir | 0o755,
				tt.run + "/virtlockd-sock":       fs.ModeSocket | 0o700,
				tt.run + "/virtlockd-admin-sock": fs.ModeSocket | 0o700,
				tt.run + "/virtlockd.pid":        0o644,
			} {
				if got := mode(t, h, path); got != want {
					t.Errorf("%s has mode %v, want %v", path, got, want)
				}
			}
			if out, err := clientAs(h, nobody, tt.run+"/virtlockd-sock"); err != nil {
				t.Errorf("its own user isn't served: %v\n%s", err, out)
			}
			if out, err := clientAs(h, nil, tt.run+"/virtlockd-sock"); err == nil {
				t.Errorf("root was served: %s", out)
			}
			// Refusals of root's connections are warnings; info shows that the configuration was read.
			d.Signal(syscall.SIGHUP)
			if !host.Eventually(func() bool {
				return strings.Contains(d.Stderr(), "info : ") && strings.Contains(d.Stderr(), "SIGHUP: configuration read")
			}) {
				t.Errorf("the user's configuration wasn't read\n%s", d.Stderr())
			}
			if code := d.Stop(); code != 0 {
				t.Errorf("exit code %d", code)
			}
			left, err := os.ReadDir(h.Path(tt.run))
			if err != nil || len(left) > 0 {
				t.Errorf("left: %v, %v", left, err)
			}
		})
	}
}

func TestUserModeWithoutDirectory(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	d := start(t, h, host.Options{NoConfig: true, NoWait: true, Credential: nobody, Env: []string{"HOME=/nowhere"}})
	if code := d.Wait(); code != 1 || !strings.Contains(d.Stderr(), "cannot create user runtime directory '/nowhere/.cache/libvirt': Permission denied") {
		t.Errorf("exit code %d\n%s", code, d.Stderr())
	}
}

// failing starts a daemon that must refuse to, and returns its words.
func failing(t *testing.T, h *host.Host, code int, o host.Options) string {
	t.Helper()
	o.NoWait = true
	d := start(t, h, o)
	if got := d.Wait(); got != code {
		t.Errorf("%v: exit code %d, want %d\n%s", o.Args, got, code, d.Stderr())
	}
	return d.Stderr()
}

func contains(t *testing.T, text string, wants ...string) {
	t.Helper()
	for _, want := range wants {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
}

func TestRunDirIsAFile(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	h.WriteFile(runDir, "", 0o600)
	contains(t, failing(t, h, 2, host.Options{}), "unable to create rundir /run/libvirt: Not a directory")
	contains(t, failing(t, h, 2, host.Options{Args: []string{"-d"}}), "virtlockd: error: unable to create rundir /run/libvirt: Not a directory")
	if h.Exists(pidFile) {
		t.Error("a pid file is left")
	}
}

func TestSocketInTheWay(t *testing.T) {
	t.Parallel()
	for what, put := range map[string]func(path string) error{
		"stale socket": func(path string) error {
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
			if err != nil {
				return err
			}
			l.SetUnlinkOnClose(false)
			return l.Close()
		},
		"regular file": func(path string) error { return os.WriteFile(path, nil, 0o644) },
	} {
		h := host.New(t)
		h.Must(func() error {
			if err := os.Mkdir(runDir, 0o755); err != nil {
				return err
			}
			return errors.Join(put(lockSocket), put(adminSocket))
		})
		d := h.Start(host.Ours(t), host.Options{})
		if _, err := d.Dial("admin").Call(wire.ProcAdminOpen, wire.FlagsArgs(0)); err != nil {
			t.Errorf("%s: admin socket: %v", what, err)
		}
		d.Client(strangerPID)
	}

	h := host.New(t)
	h.Must(func() error { return os.MkdirAll(lockSocket, 0o755) })
	contains(t, failing(t, h, 6, host.Options{}), "Failed to bind socket to '/run/libvirt/virtlockd-sock': Address already in use")
	contains(t, failing(t, h, 6, host.Options{Args: []string{"-d"}}), "virtlockd: error: Failed to bind socket to '/run/libvirt/virtlockd-sock': Address already in use")
	if h.Exists(pidFile) {
		t.Error("a pid file is left")
	}

	// The first socket goes again if the second one fails.
	h = host.New(t)
	h.Must(func() error { return os.MkdirAll(adminSocket, 0o755) })
	contains(t, failing(t, h, 6, host.Options{}), "Failed to bind socket to '/run/libvirt/virtlockd-admin-sock': Address already in use")
	if h.Exists(lockSocket) || h.Exists(pidFile) {
		t.Error("the lock socket or the pid file is left")
	}
}

func TestSocketPathTooLong(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	dir := "/tmp/" + strings.Repeat("x", 100)
	h.Must(func() error {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		return os.Chown(dir, 65534, 65534)
	})
	contains(t, failing(t, h, 6, host.Options{NoConfig: true, Credential: nobody, Env: []string{"HOME=/tmp", "XDG_RUNTIME_DIR=" + dir}}),
		"path '"+dir+"/libvirt/virtlockd-sock' is too long for a UNIX socket", "XDG_RUNTIME_DIR")
}

// A predecessor that was killed leaves sockets and a pid file.
func TestAfterCrash(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	d := h.Start(host.Ours(t), host.Options{})
	d.Signal(syscall.SIGKILL)
	d.Wait()
	if !h.Exists(lockSocket) || !h.Exists(pidFile) {
		t.Fatal("nothing is left of the killed daemon: the test shows nothing")
	}
	d = h.Start(host.Ours(t), host.Options{})
	if got := h.ReadFile(pidFile); got != strconv.Itoa(d.PID()) {
		t.Errorf("pid file %q, want %d", got, d.PID())
	}
	d.Client(strangerPID)
	if code := d.Stop(); code != 0 || h.Exists(lockSocket) || h.Exists(pidFile) {
		t.Errorf("exit code %d, or something is left", code)
	}
}

func TestSecondInstance(t *testing.T) {
	t.Parallel()
	for first, binary := range map[string]string{"ours": host.Ours(t), "C": host.C(t)} {
		t.Run("after "+first, func(t *testing.T) {
			t.Parallel()
			h := host.New(t)
			d := h.Start(binary, host.Options{})
			c := d.Client(strangerPID)

			refused := fmt.Sprintf("Failed to acquire pid file '/run/virtlockd.pid': Resource temporarily unavailable (process %d", d.PID())
			contains(t, failing(t, h, 1, host.Options{}), "error : ", refused)
			contains(t, failing(t, h, 1, host.Options{Args: []string{"-d"}}), "virtlockd: error: "+refused)

			// W9: another pid file is no way to the sockets.
			live := fmt.Sprintf("process %d listens on socket '/run/libvirt/virtlockd-sock' already", d.PID())
			for _, args := range []string{"-p /run/other.pid", "-p", "-d -p /run/other.pid"} {
				fields := strings.Split(args, " ")
				if args == "-p" {
					fields = []string{"-p", ""}
				}
				contains(t, failing(t, h, 6, host.Options{Args: fields}), live)
			}
			if h.Exists("/run/other.pid") {
				t.Error("the refused instance's pid file is left")
			}
			if got := h.ReadFile(pidFile); got != strconv.Itoa(d.PID()) {
				t.Errorf("pid file %q, want %d", got, d.PID())
			}
			if err := c.Acquire("", host.Data+"/x", wire.Autocreate); err != nil {
				t.Errorf("the first daemon on its old connection: %v", err)
			}
			d.Client(strangerPID)
			d.Dial("admin")
		})
	}
	// And the C daemon doesn't start beside ours.
	h := host.New(t)
	h.Start(host.Ours(t), host.Options{})
	if code := h.Start(host.C(t), host.Options{NoWait: true}).Wait(); code != 1 {
		t.Errorf("the C daemon beside ours: exit code %d", code)
	}
}

func TestPIDFileOption(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	d := h.Start(host.Ours(t), host.Options{Args: []string{"-p", "/run/my.pid"}})
	if got := h.ReadFile("/run/my.pid"); got != strconv.Itoa(d.PID()) || h.Exists(pidFile) {
		t.Errorf("pid file %q, want %d; or the default one exists", got, d.PID())
	}
	d.Stop()
	d = h.Start(host.Ours(t), host.Options{Args: []string{"-p", "rel.pid"}})
	if got := h.ReadFile(host.Cwd + "/rel.pid"); got != strconv.Itoa(d.PID()) {
		t.Errorf("relative pid file %q, want %d", got, d.PID())
	}
	d.Stop()
	d = h.Start(host.Ours(t), host.Options{Args: []string{"-p", ""}})
	if h.Exists(pidFile) {
		t.Error("a pid file was written though none is wanted")
	}
	d.Stop()
	contains(t, failing(t, h, 1, host.Options{Args: []string{"-p", "/nodir/my.pid"}}), "Failed to open pid file '/nodir/my.pid': No such file or directory")
	contains(t, failing(t, h, 1, host.Options{Args: []string{"-p", "/run"}}), "Failed to open pid file '/run': Is a directory")
	contains(t, failing(t, h, 1, host.Options{Args: []string{"-d", "-p", "/nodir/my.pid"}}),
		"virtlockd: error: Failed to open pid file '/nodir/my.pid': No such file or directory")
}

func TestOperandsAreIgnored(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	d := h.Start(host.Ours(t), host.Options{Args: []string{"extra", "--", "-x"}})
	d.Client(strangerPID)
	d.Stop() // the log is written by then
	contains(t, d.Stderr(), "warning : ", "extra", "-x")
}

// background is a daemon that was started by -d.
type background struct {
	t   *testing.T
	h   *host.Host
	pid int
}

// startBackground starts a daemon by -d. It serves when this returns, without any waiting.
func startBackground(t *testing.T, h *host.Host, o host.Options) background {
	t.Helper()
	o.NoWait = true
	o.Args = append([]string{"-d"}, o.Args...)
	parent := start(t, h, o)
	code := parent.Wait()
	b := background{t, h, 0}
	for _, pid := range h.Processes() {
		b.pid = pid // there is only the daemon
	}
	t.Cleanup(func() {
		if b.pid != 0 && b.alive() {
			unix.Kill(b.pid, unix.SIGKILL)
		}
	})
	if code != 0 || parent.Stderr() != "" || b.pid == 0 {
		t.Fatalf("-d: exit code %d, daemon %d\n%s", code, b.pid, parent.Stderr())
	}
	return b
}

func (b background) alive() bool {
	for _, pid := range b.h.Processes() {
		if pid == b.pid {
			return true
		}
	}
	return false
}

// stop ends the daemon by SIGTERM.
func (b background) stop() {
	b.t.Helper()
	if err := unix.Kill(b.pid, unix.SIGTERM); err != nil {
		b.t.Error(err)
	}
	if !host.Eventually(func() bool { return !b.alive() }) {
		b.t.Error("the daemon doesn't end")
	}
}

func (b background) proc(name string) string { return fmt.Sprintf("/proc/%d/%s", b.pid, name) }

func TestDetach(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b := startBackground(t, h, host.Options{Args: []string{"-p", "rel.pid"}, Argv0: "my-virtlockd", Files: []*os.File{w}, Env: []string{"KEPT=yes"}})
	// At once, without a second try.
	c, err := wire.Dial(h.Path(lockSocket), wire.LockProgram)
	if err != nil {
		t.Fatalf("the daemon doesn't serve yet when -d returns: %v", err)
	}
	defer c.Close()
	if err := c.Register(wire.VM(strangerPID)); err != nil {
		t.Error(err)
	}

	stat, err := os.ReadFile(b.proc("stat"))
	if err != nil {
		t.Fatal(err)
	}
	name, rest, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(rest) // state, ppid, pgrp, session, tty_nr
	session, err := strconv.Atoi(fields[3])
	if err != nil || session == b.pid || session == 0 {
		t.Errorf("session %s of daemon %d: want one that it doesn't lead", fields[3], b.pid)
	}
	if own, err := unix.Getsid(0); err != nil || session == own {
		t.Errorf("session %d is ours, %v", session, err)
	}
	if err := unix.Kill(session, 0); err != unix.ESRCH {
		t.Errorf("the session's leader: %v; want it to be gone", err)
	}
	if fields[4] != "0" {
		t.Errorf("terminal %s", fields[4])
	}
	if fields[1] == strconv.Itoa(os.Getpid()) {
		t.Error("the daemon is our child")
	}
	if !strings.HasSuffix(name, "(virtlockd") {
		t.Errorf("process name %s)", name)
	}
	if got := h.ReadFile(host.Cwd + "/rel.pid"); got != strconv.Itoa(b.pid) {
		t.Errorf("pid file %q, want %d", got, b.pid)
	}
	if cwd, err := os.Readlink(b.proc("cwd")); err != nil || cwd != "/" {
		t.Errorf("working directory %q, %v", cwd, err)
	}
	for fd := range 3 {
		if to, err := os.Readlink(b.proc("fd/" + strconv.Itoa(fd))); err != nil || to != "/dev/null" {
			t.Errorf("descriptor %d is %q, %v", fd, to, err)
		}
	}
	args, err := os.ReadFile(b.proc("cmdline"))
	if want := "my-virtlockd\x00-f\x00/tmp/virtlockd.conf\x00-d\x00-p\x00rel.pid\x00"; err != nil || string(args) != want {
		t.Errorf("arguments %q, %v; want %q", args, err, want)
	}
	if mask := statusField(t, b.pid, "Umask"); mask != "0022" {
		t.Errorf("umask %s", mask)
	}

	// Nothing that was open in the caller is kept open: the pipe's end is seen.
	w.Close()
	r.SetReadDeadline(time.Now().Add(host.Patience))
	if n, err := r.Read(make([]byte, 1)); n != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the caller's pipe is kept open: %d, %v", n, err)
	}
	b.stop()
	for _, path := range []string{lockSocket, adminSocket, host.Cwd + "/rel.pid"} {
		if h.Exists(path) {
			t.Errorf("%s is left", path)
		}
	}
}

func statusField(t *testing.T, pid int, name string) string {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if k, v, ok := strings.Cut(line, ":"); ok && k == name {
			return strings.TrimSpace(v)
		}
	}
	t.Fatalf("no %s in the status of process %d", name, pid)
	return ""
}

func TestDetachLogsToFile(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		options host.Options
		log     string
		dir     fs.FileMode // of the log's directory
	}{
		{"system", host.Options{}, logFile, 0o700}, // it was there
		{"user", host.Options{Credential: nobody, RunDir: "/tmp/rt/libvirt", Env: []string{"XDG_RUNTIME_DIR=/tmp/rt", "XDG_CACHE_HOME=/tmp/rt/cache"}},
			"/tmp/rt/cache/libvirt/virtlockd.log", 0o700},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h := host.New(t)
			h.Must(func() error {
				if err := os.Mkdir("/tmp/rt", 0o755); err != nil {
					return err
				}
				return os.Chown("/tmp/rt", 65534, 65534)
			})
			tt.options.Args = []string{"-v"}
			b := startBackground(t, h, tt.options)
			unix.Kill(b.pid, unix.SIGHUP)
			if !host.Eventually(func() bool { return h.Exists(tt.log) && strings.Contains(h.ReadFile(tt.log), "SIGHUP") }) {
				t.Fatal("nothing in the log file")
			}
			if got := mode(t, h, tt.log); got != 0o600 {
				t.Errorf("log file has mode %v", got)
			}
			if got := mode(t, h, filepath.Dir(tt.log)); got != fs.ModeDir|tt.dir {
				t.Errorf("its directory has mode %v", got)
			}
			b.stop()
			contains(t, h.ReadFile(tt.log), "the daemon ends, as a signal asks for")
		})
	}
}

func TestTimeout(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	start := time.Now()
	d := h.Start(host.Ours(t), host.Options{Args: []string{"-t", "1"}, NoWait: true})
	if code := d.Wait(); code != 0 || time.Since(start) < time.Second {
		t.Errorf("exit code %d after %v", code, time.Since(start))
	}
	if h.Exists(lockSocket) || h.Exists(pidFile) {
		t.Error("something is left")
	}
}

func TestTimeoutIsKeptFromExpiring(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	// Its first client has come before it starts, so that there is no second in which it has none.
	files := []*os.File{listen(t, h, lockSocket), listen(t, h, adminSocket)}
	admin, err := wire.Dial(h.Path(adminSocket), wire.AdminProgram)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(admin.Close)
	d := h.Start(host.Ours(t), host.Options{Args: []string{"--timeout=1"}, Files: files, Activate: []string{}, NoWait: true})
	lives := func(why string) {
		t.Helper()
		if host.Within(2500*time.Millisecond, func() bool { return !d.Alive() }) {
			t.Fatalf("%s doesn't keep the daemon alive", why)
		}
	}
	lives("an admin client")
	c := d.Client(strangerPID)
	admin.Close()
	lives("a lock client")
	// W10: the client goes, its lock stays.
	if err := c.Acquire("", host.Data+"/x", wire.Autocreate); err != nil {
		t.Fatal(err)
	}
	c.Close()
	lives("a lock")
	if !h.Exists(host.Data + "/x") {
		t.Fatal("the lease file is gone")
	}
	c = d.Client(strangerPID)
	if err := c.Release("", host.Data+"/x"); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if code := d.Wait(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// lockLines are the log lines about locks given up at the end.
func lockLines(d *host.Daemon) []string {
	var lines []string
	for line := range strings.Lines(d.Stderr()) {
		if strings.Contains(line, "lock given up") {
			lines = append(lines, line)
		}
	}
	return lines
}

func TestStop(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			h := host.New(t)
			d := h.Start(host.Ours(t), host.Options{})
			guest := h.Spawn(host.ProcessOptions{})
			own := guest.Dial(d, "lock")
			if err := own.Register(wire.VM(guest.PID())); err != nil {
				t.Fatal(err)
			}
			c := d.Client(guest.PID())
			h.WriteFile(host.Data+"/data", "precious", 0o600)
			for path, flags := range map[string]uint32{"/lease": wire.Autocreate, "/data": wire.Autocreate, "/shared": wire.Autocreate | wire.Shared} {
				if err := c.Acquire("", host.Data+path, flags); err != nil {
					t.Fatal(err)
				}
			}
			d.Signal(sig)
			if code := d.Wait(); code != 0 {
				t.Errorf("exit code %d", code)
			}
			for _, path := range []string{lockSocket, adminSocket, pidFile, host.Data + "/lease", host.Data + "/shared"} {
				if h.Exists(path) {
					t.Errorf("%s is left", path)
				}
			}
			if got := h.ReadFile(host.Data + "/data"); got != "precious" {
				t.Errorf("the data file is now %q", got)
			}
			lines := lockLines(d)
			if len(lines) != 3 {
				t.Errorf("%d lines about 3 locks:\n%s", len(lines), d.Stderr())
			}
			for _, line := range lines {
				contains(t, line, "vm", "11111111-1111-1111-1111-111111111111", strconv.Itoa(guest.PID()), host.Data+"/")
			}
			// W18: the daemon's end is no reason to end a guest. C kills within 1.6 s of its end.
			if host.Within(2*time.Second, guest.Dead) {
				t.Error("the guest was ended")
			}
		})
	}
}

func TestSignalsThatDoNotEndIt(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	d := h.Start(host.Ours(t), host.Options{Config: "log_level = 2\nlog_outputs = \"2:stderr\"\n"})
	c := d.Client(strangerPID)
	if err := c.Acquire("", host.Data+"/x", wire.Autocreate); err != nil {
		t.Fatal(err)
	}
	upgrades := 0
	for _, sig := range []syscall.Signal{syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGPIPE, syscall.SIGALRM, syscall.SIGVTALRM,
		syscall.SIGPROF, syscall.SIGIO, syscall.SIGPWR, syscall.SIGXCPU, syscall.SIGXFSZ, syscall.SIGWINCH, syscall.SIGURG, syscall.SIGCHLD, 35, 50, 64} {
		for range 3 {
			d.Signal(sig)
			if sig != syscall.SIGUSR1 {
				continue
			}
			// In the midst of exec a signal that asks for the end has its default action, and one comes at the end.
			upgrades++
			if !host.Eventually(func() bool { return strings.Count(d.Stderr(), "this binary has taken over") == upgrades }) {
				t.Fatalf("live upgrade %d is not over\n%s", upgrades, d.Stderr())
			}
		}
		if err := c.Ping(); err != nil {
			t.Fatalf("after signal %d (%v): %v", int(sig), sig, err)
		}
	}
	if err := c.Release("", host.Data+"/x"); err != nil {
		t.Error(err)
	}
	if code := d.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// Signals are taken care of before anything else is done.
func TestSignalsDuringStart(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	const pipe = 1 << (uint(syscall.SIGPIPE) - 1)
	for i := range 10 {
		d := h.Start(host.Ours(t), host.Options{NoWait: true})
		// SIGPIPE is ignored last of all signals. Before that the run-time of the language isn't up yet.
		if !host.Eventually(func() bool {
			ignored, err := strconv.ParseUint(statusField(t, d.PID(), "SigIgn"), 16, 64)
			return err == nil && ignored&pipe != 0
		}) {
			t.Fatal("signals aren't set up")
		}
		if i%2 == 0 {
			for range 5 {
				for _, sig := range []syscall.Signal{syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGPIPE} {
					d.Signal(sig)
				}
			}
			d.Client(strangerPID)
			// SIGUSR1 has begun a live upgrade, and there is an instant in which SIGTERM ends it at once (see
			// TestTermDuringUpgrade in test/upgrade).
			if code := d.Stop(); code != 0 && code != -1-int(syscall.SIGTERM) {
				t.Errorf("exit code %d", code)
			}
			continue
		}
		if code := d.Stop(); code != 0 {
			t.Errorf("SIGTERM during the start: exit code %d\n%s", code, d.Stderr())
		}
		if h.Exists(lockSocket) || h.Exists(pidFile) {
			t.Error("SIGTERM during the start: something is left")
		}
	}
}

func TestReload(t *testing.T) {
	t.Parallel()
	const conf = "/tmp/virtlockd.conf"
	h := host.New(t)
	d := h.Start(host.Ours(t), host.Options{Config: "max_clients = 1\n"})
	first := d.Client(strangerPID)
	waiting := d.Dial("lock")
	if err := waiting.Send(wire.Request(wire.ProcRegister, 0, wire.RegisterArgs(wire.VM(strangerPID)))); err != nil {
		t.Fatal(err)
	}
	if m, err := waiting.RecvWithin(300 * time.Millisecond); err == nil {
		t.Fatalf("a client above the limit was served: %v", m)
	}

	// A bad file changes nothing and is reported with file and line.
	h.WriteFile(conf, "log_level = 2\nmax_clients = \"many\"\n", 0o644)
	d.Signal(syscall.SIGHUP)
	if !host.Eventually(func() bool { return strings.Contains(d.Stderr(), "SIGHUP: the configuration is not usable") }) {
		t.Fatalf("a bad file isn't reported\n%s", d.Stderr())
	}
	contains(t, d.Stderr(), conf, "expected an unsigned integer for 'max_clients' parameter", "2")
	h.WriteFile(conf, "log_level = 2\nlog_outputs = \"3:nonsense\"\nmax_clients = 2\n", 0o644)
	d.Signal(syscall.SIGHUP)
	if !host.Eventually(func() bool { return strings.Contains(d.Stderr(), "3:nonsense") }) {
		t.Fatalf("a bad log output isn't reported\n%s", d.Stderr())
	}
	contains(t, d.Stderr(), conf+":2: ")
	h.Must(func() error { return os.Remove(conf) })
	d.Signal(syscall.SIGHUP)
	if !host.Eventually(func() bool { return strings.Contains(d.Stderr(), "No such file or directory") }) {
		t.Fatalf("a missing file isn't reported\n%s", d.Stderr())
	}
	if strings.Contains(d.Stderr(), "configuration read") {
		t.Errorf("the level changed though the file was bad\n%s", d.Stderr())
	}
	if m, err := waiting.RecvWithin(100 * time.Millisecond); err == nil {
		t.Fatalf("the limit changed though the file was bad: %v", m)
	}

	// A good one applies at once.
	h.WriteFile(conf, "log_level = 2\nmax_clients = 2\nmisspelt = 1\n", 0o644)
	d.Signal(syscall.SIGHUP)
	if m, err := waiting.Recv(); err != nil || m.Err() != nil {
		t.Errorf("the waiting client: %v, %v", m, err)
	}
	if !host.Eventually(func() bool { return strings.Contains(d.Stderr(), "SIGHUP: configuration read") }) {
		t.Errorf("the level didn't change\n%s", d.Stderr())
	}
	contains(t, d.Stderr(), "misspelt")
	if err := first.Ping(); err != nil {
		t.Error(err)
	}
}

// logrotate renames the file and sends SIGHUP.
func TestReloadReopensLogFiles(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	d := h.Start(host.Ours(t), host.Options{Config: "log_level = 2\nlog_outputs = \"2:file:/run/v.log\"\n"})
	hangUp := func() {
		t.Helper()
		d.Signal(syscall.SIGHUP)
		if !host.Eventually(func() bool {
			return h.Exists("/run/v.log") && strings.Contains(h.ReadFile("/run/v.log"), "SIGHUP: configuration read")
		}) {
			t.Fatal("nothing in the log")
		}
	}
	hangUp()
	h.Must(func() error { return os.Rename("/run/v.log", "/run/v.log.1") })
	old := h.ReadFile("/run/v.log.1")
	hangUp()
	if now := h.ReadFile("/run/v.log.1"); now != old {
		t.Errorf("written to the old file: %q", strings.TrimPrefix(now, old))
	}
}

func TestBadConfiguration(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	h.WriteFile("/run/bad.conf", "log_level = 3\nmax_clients = \"unterminated\n", 0o644)
	h.WriteFile("/run/level.conf", "\nlog_level = 5\n", 0o644)
	h.WriteFile("/run/outputs.conf", "# c\n\nlog_outputs = '1:nowhere'\n", 0o644)
	for args, wants := range map[string][]string{
		"-f /nonexistent.conf":                  {"Can't load config file: ", "'/nonexistent.conf'", "No such file or directory"},
		"--config=/nonexistent.conf":            {"Can't load config file: ", "'/nonexistent.conf'", "No such file or directory"},
		"-f /etc":                               {"Can't load config file: ", "'/etc'", "Is a directory"},
		"-f /run/bad.conf":                      {"Can't load config file: ", "/run/bad.conf:2: unterminated string"},
		"-f /dev/null -f /run/bad.conf":         {"Can't load config file: ", "/run/bad.conf:2: unterminated string"},
		"-f /run/level.conf":                    {"/run/level.conf:2", "logging priority, argument '5'"},
		"-f /run/outputs.conf":                  {"/run/outputs.conf:3: ", "1:nowhere"},
		"-d -f /run/bad.conf":                   {"virtlockd: error: Can't load config file: ", "/run/bad.conf:2: unterminated string"},
		"-d -p /run/x.pid -f /run/level.conf":   {"virtlockd: error: ", "/run/level.conf:2"},
		"-p /run/x.pid -t 0 -f /run/level.conf": {"/run/level.conf:2"},
	} {
		contains(t, failing(t, h, 1, host.Options{NoConfig: true, Args: strings.Fields(args)}), wants...)
	}
	contains(t, failing(t, h, 1, host.Options{NoConfig: true, Args: []string{"-f", ""}}), "Can't load config file: ", "''")
	contains(t, failing(t, h, 1, host.Options{Env: []string{"LIBVIRT_DEBUG=nonsense"}}), "LIBVIRT_DEBUG", "nonsense")
	for _, path := range []string{runDir, pidFile, "/run/x.pid"} {
		if h.Exists(path) {
			t.Errorf("%s was made before the configuration was known to be good", path)
		}
	}
}

// The reason of a failed start is on stderr also when the log goes elsewhere, and in the log.
func TestReasonOnStderr(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	h.WriteFile(runDir, "", 0o600)
	out := failing(t, h, 2, host.Options{Argv0: "vlv", Config: "log_outputs = \"3:file:/run/v.log\"\n"})
	const reason = "unable to create rundir /run/libvirt: Not a directory"
	if out != "vlv: error: "+reason+"\n" {
		t.Errorf("stderr %q", out)
	}
	contains(t, h.ReadFile("/run/v.log"), "error : ", reason)
}

func TestHealthyStartIsSilent(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	d := h.Start(host.Ours(t), host.Options{NoConfig: true})
	c := d.Client(strangerPID)
	if err := c.Acquire("", host.Data+"/x", wire.Autocreate); err != nil {
		t.Fatal(err)
	}
	if err := c.Release("", host.Data+"/x"); err != nil {
		t.Fatal(err)
	}
	c.Close()
	d.Signal(syscall.SIGHUP)
	if code := d.Stop(); code != 0 || d.Stderr() != "" {
		t.Errorf("exit code %d\n%s", code, d.Stderr())
	}
}

func TestFileLimitIsRaised(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	d := h.Start(host.Ours(t), host.Options{})
	var l unix.Rlimit
	if err := unix.Prlimit(d.PID(), unix.RLIMIT_NOFILE, nil, &l); err != nil || l.Cur != l.Max {
		t.Errorf("limit of open files %+v, %v; want the hard limit", l, err)
	}
}

func TestGoEnvironmentDoesNotMatter(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	d := h.Start(host.Ours(t), host.Options{Env: []string{"GOMEMLIMIT=1", "GODEBUG=gctrace=1"}})
	// Before the daemon has got rid of them they had an effect: each collection is on stderr.
	before := d.Stderr()
	if !strings.Contains(before, "gc 1 ") {
		t.Error("no trace at all: the test shows nothing")
	}
	c := d.Client(strangerPID)
	for range 100 {
		if err := c.CreateLockspace(host.Data); err != nil {
			t.Fatal(err)
		}
	}
	d.Stop()
	if after := d.Stderr(); after != before {
		t.Errorf("the environment has an effect\n%s", after)
	}
}

// A disk that hangs doesn't keep the daemon from ending; what was left is said.
func TestStopWithHungDisk(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	d := h.Start(host.Ours(t), host.Options{})
	disk := slowdisk.Mount(t, h, "/mnt", slowdisk.Options{})
	disk.Add("hung")
	other := d.Client(strangerPID)
	if err := other.Acquire("", host.Data+"/lease", wire.Autocreate); err != nil {
		t.Fatal(err)
	}
	disk.Hang(slowdisk.Open)
	c := d.Client(strangerPID + 1)
	if err := c.Send(wire.Request(wire.ProcAcquire, 1, wire.ResourceArgs("", "/mnt/hung", 0))); err != nil {
		t.Fatal(err)
	}
	disk.AwaitHang(slowdisk.Open)
	d.Signal(syscall.SIGTERM)
	code := d.Wait() // while the disk still hangs
	if disk.Waiting(slowdisk.Open) == 0 {
		t.Error("nothing hung: the test shows nothing")
	}
	disk.Resume(slowdisk.Open)
	if code != 1 {
		t.Errorf("exit code %d, want 1: something was left", code)
	}
	contains(t, d.Stderr(), "/mnt/hung")
	if len(lockLines(d)) != 1 || h.Exists(host.Data+"/lease") {
		t.Errorf("the other lock wasn't given up in order\n%s", d.Stderr())
	}
	for _, path := range []string{lockSocket, adminSocket, pidFile} {
		if h.Exists(path) {
			t.Errorf("%s is left", path)
		}
	}
}

// listen makes a listening socket on the host, as systemd does.
func listen(t *testing.T, h *host.Host, path string) *os.File {
	t.Helper()
	var f *os.File
	h.Must(func() error {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			return err
		}
		l.SetUnlinkOnClose(false)
		defer l.Close()
		f, err = l.File()
		return err
	})
	t.Cleanup(func() { f.Close() })
	return f
}

func TestActivation(t *testing.T) {
	t.Parallel()
	const lock, admin = "virtlockd.socket", "virtlockd-admin.socket"
	for _, tt := range []struct {
		name  string
		paths []string
		names []string // an empty list: LISTEN_FDNAMES is empty
		args  []string
	}{
		{"both", []string{lockSocket, adminSocket}, []string{lock, admin}, nil},
		{"other order", []string{adminSocket, lockSocket}, []string{admin, lock}, nil},
		{"by path", []string{adminSocket, lockSocket}, []string{}, nil},
		{"wrong number of names", []string{lockSocket, adminSocket}, []string{"x"}, nil},
		{"by name, other path", []string{"/run/other"}, []string{lock}, nil},
		{"lock only", []string{lockSocket}, []string{lock}, nil},
		{"admin only", []string{adminSocket}, []string{admin}, nil},
		{"detached", []string{adminSocket, lockSocket}, []string{admin, lock}, []string{"-d"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h := host.New(t)
			var files []*os.File
			for _, path := range tt.paths {
				files = append(files, listen(t, h, path))
			}
			o := host.Options{Files: files, Activate: tt.names, NoWait: true}
			var end func()
			if tt.args != nil {
				o.Args = tt.args[1:]
				end = startBackground(t, h, o).stop
			} else {
				d := h.Start(host.Ours(t), o)
				end = func() {
					t.Helper()
					if code := d.Stop(); code != 0 {
						t.Errorf("exit code %d\n%s", code, d.Stderr())
					}
				}
			}
			for _, path := range tt.paths {
				program, proc, args := wire.LockProgram, wire.ProcRegister, wire.RegisterArgs(wire.VM(strangerPID))
				if path == adminSocket {
					program, proc, args = wire.AdminProgram, wire.ProcAdminOpen, wire.FlagsArgs(0)
				}
				c, err := wire.Dial(h.Path(path), program)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				if m, err := c.Call(proc, args); err != nil || m.Err() != nil {
					t.Errorf("%s: %v, %v", path, m, err)
				}
			}
			// Nothing is served but what was passed.
			for _, path := range []string{lockSocket, adminSocket} {
				passed := false
				for _, p := range tt.paths {
					passed = passed || p == path
				}
				if !passed && h.Exists(path) {
					t.Errorf("%s was made besides", path)
				}
			}
			end()
			for _, path := range tt.paths {
				if !h.Exists(path) {
					t.Errorf("systemd's socket %s was removed", path)
				}
			}
		})
	}
}

func TestActivationFaults(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	other := listen(t, h, "/run/other")
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	contains(t, failing(t, h, 6, host.Options{Files: []*os.File{other}, Activate: []string{"x.socket"}}), "x.socket", "/run/other", "neither the lock socket")
	contains(t, failing(t, h, 6, host.Options{Files: []*os.File{null}, Activate: []string{"virtlockd.socket"}}), "is not a socket")
	const script = `LISTEN_PID=$$; LISTEN_FDS=$2; export LISTEN_PID LISTEN_FDS; exec "$1"`
	for n, want := range map[string]string{
		"-1":         "is not a possible number of descriptors",
		"2147483647": "is not a possible number of descriptors",
		"one":        "is not a possible number of descriptors",
		"50":         "is not open",
	} {
		d := h.Start("/bin/sh", host.Options{NoConfig: true, NoWait: true, Files: []*os.File{other}, Args: []string{"-c", script, "sh", host.Ours(t), n}})
		if code := d.Wait(); code != 6 {
			t.Errorf("LISTEN_FDS=%s: exit code %d", n, code)
		}
		contains(t, d.Stderr(), "LISTEN_FDS", n, want)
	}
}

// Variables that are meant for another process are left alone.
func TestActivationForOthers(t *testing.T) {
	t.Parallel()
	for _, env := range []string{"LISTEN_PID=1 LISTEN_FDS=1", "LISTEN_PID=text LISTEN_FDS=1", "LISTEN_FDS=1", "LISTEN_PID=1 LISTEN_FDS=-1"} {
		h := host.New(t)
		d := h.Start(host.Ours(t), host.Options{Env: strings.Fields(env)})
		d.Client(strangerPID)
		d.Dial("admin")
		if code := d.Stop(); code != 0 || h.Exists(lockSocket) {
			t.Errorf("%s: exit code %d, or the socket is left", env, code)
		}
	}
}

func TestNotify(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	var conn *net.UnixConn
	h.Must(func() (err error) {
		conn, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: "/run/notify", Net: "unixgram"})
		return err
	})
	defer conn.Close()
	receive := func() string {
		t.Helper()
		buf := make([]byte, 1000)
		conn.SetReadDeadline(time.Now().Add(host.Patience))
		for {
			n, err := conn.Read(buf) // what is attached is closed, so there is no store here
			if err != nil {
				t.Fatal(err)
			}
			got := string(buf[:n])
			if !strings.HasPrefix(got, "FDSTORE") && got != "BARRIER=1" {
				return got
			}
		}
	}
	d := h.Start(host.Ours(t), host.Options{Env: []string{"NOTIFY_SOCKET=/run/notify"}, NoWait: true})
	if got := receive(); got != "READY=1" {
		t.Errorf("first message %q", got)
	}
	// It is ready now: no second try.
	if c, err := wire.Dial(h.Path(lockSocket), wire.LockProgram); err != nil {
		t.Error(err)
	} else {
		c.Close()
	}
	d.Signal(syscall.SIGTERM)
	if got := receive(); got != "STOPPING=1" {
		t.Errorf("second message %q", got)
	}
	d.Wait()

	d = h.Start(host.Ours(t), host.Options{Env: []string{"NOTIFY_SOCKET=/run/nobody"}})
	if !host.Eventually(func() bool { return strings.Contains(d.Stderr(), "systemd was not told of the daemon's state") }) {
		t.Errorf("a failed notification isn't in the log\n%s", d.Stderr())
	}
	d.Client(strangerPID)
}

func TestAdminTimeout(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	d := h.Start(host.Ours(t), host.Options{})
	admin := d.Dial("admin")
	if m, err := admin.Call(19, wire.Payload(nil).Uint32(1).Uint32(0)); err != nil || m.Err() != nil {
		t.Fatalf("SET_DAEMON_TIMEOUT: %v, %v", m, err)
	}
	admin.Close()
	if code := d.Wait(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

func TestAdminShutdown(t *testing.T) {
	t.Parallel()
	h := host.New(t)
	d := h.Start(host.Ours(t), host.Options{})
	c := d.Client(strangerPID)
	if err := c.Acquire("", host.Data+"/x", wire.Autocreate); err != nil {
		t.Fatal(err)
	}
	admin := d.Dial("admin")
	shutdown := func(flags uint32) error {
		m, err := admin.Call(20, wire.FlagsArgs(flags))
		if err != nil {
			return err
		}
		return m.Err()
	}
	if err := shutdown(0); err == nil || !strings.Contains(err.Error(), "1 lock is held") {
		t.Errorf("while a lock is held: %v", err)
	}
	if err := shutdown(1); err == nil || !strings.Contains(err.Error(), "1 lock is held") {
		t.Errorf("preserve, while a lock is held: %v", err)
	}
	if err := c.Release("", host.Data+"/x"); err != nil {
		t.Fatal(err)
	}
	if err := shutdown(0); err != nil {
		t.Errorf("without locks: %v", err)
	}
	if code := d.Wait(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
