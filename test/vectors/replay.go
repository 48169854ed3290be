// SPDX-License-Identifier: LGPL-2.1-or-later

package vectors

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// Silence is how long a connection is watched where no answer may come and no later answer can prove it.
const Silence = 300 * time.Millisecond

// replay is one scenario on its way through a daemon.
type replay struct {
	t       *testing.T
	h       *host.Host
	d       *host.Daemon
	conns   map[string]*wire.Conn
	procs   map[string]*host.Process
	lockers map[string]*host.Process
	last    []byte // the request sent last, whose reply is awaited
	wanted  map[int]Want
}

// Run replays a scenario against a fresh daemon. wanted replaces what was recorded for single steps. Every other
// difference fails the test, as does one in wanted that does not differ from the recording.
func Run(t *testing.T, binary string, s Scenario, wanted map[int]Want) {
	h := host.New(t)
	r := &replay{
		t:       t,
		h:       h,
		d:       h.Start(binary, host.Options{Config: s.Config}),
		conns:   map[string]*wire.Conn{},
		procs:   map[string]*host.Process{},
		lockers: map[string]*host.Process{},
		wanted:  wanted,
	}
	for i, step := range s.Steps {
		// Whether a daemon sees a request before the connection ends must not be a matter of speed: it is
		// stopped meanwhile.
		together := step.Op == "send" && step.Expect == "none" && i+1 < len(s.Steps) && s.Steps[i+1].Op == "close"
		if together {
			r.d.Pause()
		}
		if err := r.step(i, step); err != nil {
			t.Errorf("step %d: %s: %v", i, step, err)
		}
		if step.Op == "close" {
			r.d.Continue()
			// Where the end of a connection has no effect there is nothing else to wait for.
			if !host.Eventually(func() bool { return host.InState(r.d.PID(), 'S') || !r.d.Alive() }) {
				t.Fatalf("step %d: %s: the daemon is always busy", i, step)
			}
		}
	}
	switch {
	case s.Crashed && len(wanted) == 0:
		if got := r.d.Wait(); got != -1-int(syscall.SIGSEGV) {
			t.Errorf("daemon ended with %d, it should have crashed", got)
		}
	case s.Ended:
		if got := r.d.Wait(); got != 0 {
			t.Errorf("daemon ended with %d, want 0", got)
		}
	default:
		if !r.d.Alive() {
			t.Errorf("daemon has ended with %d", r.d.Wait())
		} else if got := r.d.Stop(); got != 0 {
			t.Errorf("after SIGTERM the daemon ended with %d, want 0", got)
		}
	}
}

// Want is what ours does instead of what was recorded.
type Want interface {
	// apply changes the step to what is wanted. request is what was sent before.
	apply(step *Step, request []byte) error
}

func (r *replay) step(i int, s Step) error {
	want, differs := r.wanted[i]
	if s.Op == "send" {
		p, err := ParsePattern(s.SendHex, r.pid)
		if err != nil {
			return err
		}
		if r.last, err = p.Bytes(); err != nil {
			return err
		}
	}
	if differs {
		recorded := s
		if err := want.apply(&s, r.last); err != nil {
			return err
		}
		if reflect.DeepEqual(recorded, s) {
			return errors.New("what is wanted of ours is what was recorded")
		}
	}
	switch s.Op {
	case "connect":
		return r.connect(s)
	case "send":
		return r.send(s)
	case "recv":
		return r.receive(s)
	case "close":
		r.conns[s.Client].Close()
		return nil
	case "shutdown_wr":
		return r.conns[s.Client].CloseWrite()
	case "fs":
		return r.change(s)
	case "check":
		return until(func() error { return r.check(s) })
	case "locks":
		return until(func() error { return r.locks(s) })
	case "extlock":
		p := r.h.Spawn(host.ProcessOptions{})
		p.Lock(s.Path, s.Kind, s.Start, s.Len)
		r.lockers[s.ID] = p
		return nil
	case "extunlock":
		r.lockers[s.ID].Close()
		return nil
	case "check_client_process":
		return r.process(s)
	case "signal":
		sig := unix.SignalNum("SIG" + s.Signal)
		if sig == 0 {
			return fmt.Errorf("no signal is called %q", s.Signal)
		}
		r.d.Signal(sig)
		r.d.Wait()
		return nil
	default:
		return errors.New("unknown kind of step")
	}
}

// until repeats a look until it is satisfied: effects of a closed connection come when they come.
func until(look func() error) error {
	var err error
	host.Eventually(func() bool {
		err = look()
		return err == nil
	})
	return err
}

func (r *replay) pid(client string) (uint32, error) {
	if p := r.procs[client]; p != nil {
		return uint32(p.PID()), nil
	}
	if r.conns[client] == nil {
		return 0, fmt.Errorf("there is no client %q", client)
	}
	return uint32(os.Getpid()), nil
}

func (r *replay) connect(s Step) error {
	if !s.OwnProcess {
		r.conns[s.Client] = r.d.Dial(s.Socket)
		return nil
	}
	p := r.h.Spawn(host.ProcessOptions{})
	r.procs[s.Client] = p
	r.conns[s.Client] = p.Dial(r.d, s.Socket)
	return nil
}

func (r *replay) send(s Step) error {
	c := r.conns[s.Client]
	ask := func() error {
		if err := c.Send(r.last); err != nil && !(errors.Is(err, wire.ErrClosed) && s.Expect == "closed") {
			return err
		}
		return r.receive(s)
	}
	if countsClients(r.last) {
		return until(ask)
	}
	return ask()
}

// countsClients tells whether a request asks for the clients of a server: one that has just closed its connection
// may still be among them. Asking again changes nothing.
func countsClients(request []byte) bool {
	m, err := wire.Parse(request)
	return err == nil && m.Program == wire.AdminProgram &&
		(m.Proc == wire.ProcAdminListClients || m.Proc == wire.ProcAdminGetLimits)
}

func (r *replay) receive(s Step) error {
	c := r.conns[s.Client]
	switch s.Expect {
	case "":
		m, err := c.Recv()
		if err != nil {
			return err
		}
		return r.compare(s, m)
	case "none":
		return nil
	case "closed":
		m, err := c.Recv()
		if err == nil {
			return fmt.Errorf("want the connection closed, got %s", m)
		}
		if !errors.Is(err, wire.ErrClosed) {
			return fmt.Errorf("want the connection closed: %w", err)
		}
		return nil
	case "no-reply":
		return r.silent(s)
	default:
		return fmt.Errorf("unknown expectation %q", s.Expect)
	}
}

// silent proves that no answer comes: after a whole message by a PING, whose answer has to be the next thing to
// come, else by waiting.
func (r *replay) silent(s Step) error {
	c := r.conns[s.Client]
	if m, err := wire.Parse(r.last); err == nil && m.Type != wire.TypeCallWithFDs && m.Type != wire.TypeCall {
		return c.Ping()
	}
	m, err := c.RecvWithin(Silence)
	if err == nil {
		return fmt.Errorf("want no answer, got %s", m)
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("want no answer: %w", err)
	}
	return nil
}

func (r *replay) compare(s Step, m wire.Message) error {
	m = wire.WithoutHolder(m) // D-holder
	var want Pattern
	for _, alt := range append([]string{s.ExpectHex}, s.ExpectHexAlt...) {
		p, err := ParsePattern(alt, r.pid)
		if err != nil {
			return err
		}
		if p.Matches(m.Raw) {
			return nil
		}
		if alt == s.ExpectHex {
			want = p
		}
	}
	w, err := wire.Parse(want.bytes)
	if err != nil {
		return fmt.Errorf("recorded frame: %w", err)
	}
	return fmt.Errorf("answers differ\n got %s\nwant %s", host.Shorten(m.String()), host.Shorten(w.String()))
}

func (r *replay) change(s Step) error {
	path := r.h.Path(s.Path)
	switch s.Action {
	case "touch":
		return r.create(path, "")
	case "write":
		return r.create(path, s.Arg)
	case "mkdir":
		return os.Mkdir(path, 0o755)
	case "symlink":
		return os.Symlink(s.Arg, path)
	case "link":
		return os.Link(r.h.Path(s.Arg), path)
	case "unlink", "rmdir":
		return os.Remove(path)
	case "rename":
		return os.Rename(path, r.h.Path(s.Arg))
	case "chmod":
		var mode os.FileMode
		if _, err := fmt.Sscanf(s.Arg, "%o", &mode); err != nil {
			return err
		}
		return os.Chmod(path, mode)
	case "mkfifo":
		return unix.Mkfifo(path, 0o644)
	default:
		return fmt.Errorf("unknown change %q", s.Action)
	}
}

func (r *replay) create(path, content string) error {
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		return err
	}
	return os.Chmod(path, 0o644) // whatever the umask is
}

func (r *replay) check(s Step) error {
	fi, err := os.Lstat(r.h.Path(s.Path))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		if s.Exists {
			return errors.New("it does not exist")
		}
		return nil
	}
	if err != nil {
		return err
	}
	if !s.Exists {
		return fmt.Errorf("it exists: %s, %d bytes", fi.Mode(), fi.Size())
	}
	kinds := map[fs.FileMode]string{0: "file", fs.ModeDir: "dir", fs.ModeSymlink: "symlink"}
	kind := kinds[fi.Mode().Type()]
	mode := fmt.Sprintf("%04o", fi.Mode().Perm())
	n := r.h.SizeWithoutRecord(r.d, s.Path, fi) // D-record
	if kind != s.Type || s.Mode != "" && mode != s.Mode || s.Size != nil && n != *s.Size {
		return fmt.Errorf("it is a %s with mode %s and %d bytes, want a %s with mode %s and size %s",
			kind, mode, n, s.Type, s.Mode, size(s.Size))
	}
	return nil
}

func size(n *int64) string {
	if n == nil {
		return "any"
	}
	return fmt.Sprint(*n)
}

func (r *replay) locks(s Step) error {
	var got []string
	for _, l := range r.h.Locks(r.d, s.Path) {
		got = append(got, strings.Join([]string{l.Type, l.Start, l.End}, " "))
	}
	slices.Sort(got)
	want := slices.Sorted(slices.Values(s.Locks))
	if !slices.Equal(got, want) {
		return fmt.Errorf("the daemon holds %q, want %q", got, want)
	}
	return nil
}

func (r *replay) process(s Step) error {
	p := r.procs[s.Client]
	if !s.Alive {
		p.Gone()
		return nil
	}
	if host.Within(350*time.Millisecond, p.Dead) {
		return errors.New("it was killed")
	}
	return nil
}
