// SPDX-License-Identifier: LGPL-2.1-or-later

package differential

import (
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

func TestMain(m *testing.M) {
	// Random scripts are the same in each run. More of them, and others:
	// go test ./test/differential -run Random -rapid.checks=1000 -rapid.seed=0
	for name, value := range map[string]string{"rapid.seed": "1", "rapid.checks": "150", "rapid.nofailfile": "true"} {
		if err := flag.Set(name, value); err != nil {
			panic(err)
		}
	}
	host.Main(m)
}

// Owners whose process ids belong to no process: nothing is ever done to them.
const (
	ownerA = 0x70000001 + iota
	ownerB
	ownerC
)

// data is the directory that scripts work in.
const data = host.Data

// world is one daemon with its clients.
type world struct {
	name  string
	h     *host.Host
	d     *host.Daemon
	conns map[string]*wire.Conn
	procs map[string]*host.Process
}

// tester is what a script reports to: a test, or one of rapid's.
type tester interface {
	Helper()
	Fatalf(format string, args ...any)
	Logf(format string, args ...any)
}

// pair is both daemons.
type pair struct {
	t       tester
	c, ours *world
	trace   []string
}

// newPair starts both.
func newPair(t *testing.T, o host.Options) *pair {
	t.Helper()
	start := func(name, binary string) *world {
		h := host.New(t)
		return &world{
			name: name, h: h, d: h.Start(binary, o),
			conns: map[string]*wire.Conn{}, procs: map[string]*host.Process{},
		}
	}
	return &pair{t: t, c: start("C", host.C(t)), ours: start("ours", host.Ours(t))}
}

// both does something to each, at the same time, and fails the test if one of them fails.
func (p *pair) both(what string, do func(w *world) error) {
	p.t.Helper()
	p.trace = append(p.trace, what)
	var wg sync.WaitGroup
	var errs [2]error
	for i, w := range []*world{p.c, p.ours} {
		wg.Go(func() { errs[i] = do(w) })
	}
	wg.Wait()
	for i, w := range []*world{p.c, p.ours} {
		if errs[i] != nil {
			p.fail("%s: %s: %v", w.name, what, errs[i])
		}
	}
}

// fail ends the script with what was done so far.
func (p *pair) fail(format string, args ...any) {
	p.t.Helper()
	const most = 80
	trace := p.trace
	if n := len(trace) - most; n > 0 {
		trace = trace[n:]
	}
	p.t.Logf("done so far:\n  %s", strings.Join(trace, "\n  "))
	p.t.Fatalf(format, args...)
}

// connect opens a connection from the test's own process.
func (p *pair) connect(clients ...string) {
	p.t.Helper()
	for _, client := range clients {
		p.both("connect "+client, func(w *world) error {
			if old := w.conns[client]; old != nil {
				old.Close()
			}
			c, err := w.d.TryDial("lock")
			w.conns[client] = c
			return err
		})
	}
}

// guest opens a connection from a process of its own, of the same name.
func (p *pair) guest(name string) {
	p.t.Helper()
	p.trace = append(p.trace, "guest "+name)
	for _, w := range []*world{p.c, p.ours} { // may end the test
		w.procs[name] = w.h.Spawn(host.ProcessOptions{})
		w.conns[name] = w.procs[name].Dial(w.d, "lock")
	}
}

// close closes a connection.
func (p *pair) close(client string) {
	p.t.Helper()
	p.both("close "+client, func(w *world) error {
		w.conns[client].Close()
		return nil
	})
}

// outcome is what came back: a frame, or how the connection ended.
type outcome struct {
	frame string
	text  string
}

func receive(c *wire.Conn) outcome {
	m, err := c.Recv()
	if errors.Is(err, wire.ErrClosed) {
		return outcome{text: "closed"}
	}
	if err != nil {
		return outcome{text: "failed: " + err.Error()}
	}
	m = wire.WithoutHolder(m) // D-holder
	return outcome{frame: string(m.Raw), text: m.String()}
}

// send writes bytes to both and compares so many replies. It tells whether the connections are still open.
func (p *pair) send(client, what string, b []byte, replies int) bool {
	p.t.Helper()
	return p.exchange(client, what, func(*world) [][]byte { return [][]byte{b} }, replies)
}

// exchange is send with bytes of each world's own, in several writes.
func (p *pair) exchange(client, what string, writes func(w *world) [][]byte, replies int) bool {
	p.t.Helper()
	var got [2][]outcome
	index := map[*world]int{p.c: 0, p.ours: 1}
	p.both(client+" "+what, func(w *world) error {
		c := w.conns[client]
		for _, b := range writes(w) {
			if err := c.Send(b); err != nil && !errors.Is(err, wire.ErrClosed) {
				return err
			}
		}
		for range replies {
			o := receive(c)
			got[index[w]] = append(got[index[w]], o)
			if o.frame == "" {
				break
			}
		}
		return nil
	})
	if !slices.Equal(got[0], got[1]) && !slices.Equal(p.withoutPIDs(p.c, got[0]), p.withoutPIDs(p.ours, got[1])) {
		p.fail("%s: %s\n   C: %s\nours: %s", client, what, describe(got[0]), describe(got[1]))
	}
	p.trace[len(p.trace)-1] += " -> " + describe(got[0])
	return len(got[0]) == replies && (replies == 0 || got[0][replies-1].frame != "")
}

// withoutPIDs replaces the process ids of guests, which differ, by their names.
func (p *pair) withoutPIDs(w *world, got []outcome) []outcome {
	var replace []string
	for name, proc := range w.procs {
		replace = append(replace, fmt.Sprint(proc.PID()), name)
	}
	r := strings.NewReplacer(replace...)
	var out []outcome
	for _, o := range got {
		o.text = r.Replace(o.text)
		if o.frame != "" {
			o.frame = "a frame" // text has all of it
		}
		out = append(out, o)
	}
	return out
}

func describe(list []outcome) string {
	var out []string
	for _, o := range list {
		out = append(out, host.Shorten(o.text))
	}
	return strings.Join(out, "\n      ")
}

// call sends one request of the lock program.
func (p *pair) call(client string, r request) bool {
	p.t.Helper()
	return p.send(client, r.String(), r.frame(), 1)
}

// request is one call of the lock program.
type request struct {
	proc            uint32
	owner           wire.Owner
	lockspace, name string
	flags           uint32
	serial          uint32
}

func (r request) args() []byte {
	switch r.proc {
	case wire.ProcRegister:
		return wire.RegisterArgs(r.owner)
	case wire.ProcRestrict:
		return wire.FlagsArgs(r.flags)
	case wire.ProcNew:
		return wire.PathArgs(r.lockspace, r.flags)
	case wire.ProcCreateLockspace:
		return wire.LockspaceArgs(r.lockspace)
	default:
		return wire.ResourceArgs(r.lockspace, r.name, r.flags)
	}
}

func (r request) frame() []byte { return wire.Request(r.proc, r.serial, r.args()) }

var procNames = map[uint32]string{
	wire.ProcRegister: "REGISTER", wire.ProcRestrict: "RESTRICT", wire.ProcNew: "NEW", wire.ProcCreateResource: "CREATE",
	wire.ProcDeleteResource: "DELETE", wire.ProcAcquire: "ACQUIRE", wire.ProcRelease: "RELEASE", wire.ProcCreateLockspace: "CREATE_LOCKSPACE",
}

func (r request) String() string {
	switch r.proc {
	case wire.ProcRegister:
		return fmt.Sprintf("REGISTER name %.40q id %d pid %d flags %#x", r.owner.Name, r.owner.ID, int32(r.owner.PID), r.owner.Flags)
	case wire.ProcRestrict, wire.ProcNew, wire.ProcCreateLockspace:
		return fmt.Sprintf("%s %.60q %#x", procNames[r.proc], r.lockspace, r.flags)
	default:
		return fmt.Sprintf("%s %.60q:%.60q %#x", procNames[r.proc], r.lockspace, r.name, r.flags)
	}
}

func register(pid int) request {
	return request{proc: wire.ProcRegister, owner: wire.VM(pid)}
}

func acquire(lockspace, name string, flags uint32) request {
	return request{proc: wire.ProcAcquire, lockspace: lockspace, name: name, flags: flags}
}

func release(lockspace, name string) request {
	return request{proc: wire.ProcRelease, lockspace: lockspace, name: name}
}

func create(lockspace, name string) request {
	return request{proc: wire.ProcCreateResource, lockspace: lockspace, name: name}
}

func remove(lockspace, name string) request {
	return request{proc: wire.ProcDeleteResource, lockspace: lockspace, name: name}
}

func newLockspace(path string) request {
	return request{proc: wire.ProcNew, lockspace: path}
}

func createLockspace(path string) request {
	return request{proc: wire.ProcCreateLockspace, lockspace: path}
}

// calls sends requests of one client, one after the other.
func (p *pair) calls(client string, list ...request) {
	p.t.Helper()
	for _, r := range list {
		p.call(client, r)
	}
}

// fs changes the file system of both.
func (p *pair) fs(what string, change func() error) {
	p.t.Helper()
	p.both(what, func(w *world) error { return w.h.Do(change) })
}

func (p *pair) touch(path string) {
	p.t.Helper()
	p.fs("touch "+path, func() error { return os.WriteFile(path, nil, 0o644) })
}

func (p *pair) mkdir(path string) {
	p.t.Helper()
	p.fs("mkdir "+path, func() error { return os.Mkdir(path, 0o755) })
}

// same compares what both did to the files and what they hold, as soon as it is the same, or in the end.
func (p *pair) same() {
	p.t.Helper()
	p.sameBelow(data, host.Cwd)
}

func (p *pair) sameBelow(dirs ...string) {
	p.t.Helper()
	var c, ours []string
	equal := host.Eventually(func() bool {
		c, ours = p.c.state(dirs), p.ours.state(dirs)
		return slices.Equal(c, ours)
	})
	if !equal {
		p.fail("files and locks\n   C: %s\nours: %s", strings.Join(c, "\n      "), strings.Join(ours, "\n      "))
	}
	for _, w := range []*world{p.c, p.ours} {
		if !w.d.Alive() {
			p.fail("%s: the daemon has ended", w.name)
		}
	}
	p.trace = append(p.trace, "compared: "+strings.Join(c, ", "))
}

// state describes all files below directories, with the daemon's locks on them, and which guests live.
func (w *world) state(dirs []string) []string {
	var out []string
	for _, dir := range dirs {
		root := w.h.Path(dir)
		err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
			var fi fs.FileInfo
			if err == nil {
				fi, err = e.Info()
			}
			if errors.Is(err, fs.ErrNotExist) {
				return nil // removed meanwhile
			}
			if err != nil {
				return err
			}
			name := dir + strings.TrimPrefix(path, root)
			line := fmt.Sprintf("%s %s", name, fi.Mode())
			if fi.Mode().IsRegular() {
				line += fmt.Sprintf(" %d bytes %d links", w.h.SizeWithoutRecord(w.d, name, fi), // D-record
					fi.Sys().(*syscall.Stat_t).Nlink)
			}
			if !fi.IsDir() {
				// Gone since then: the next look is another one.
				locks, _ := w.h.LocksOf(w.d, name)
				for _, l := range locks {
					line += fmt.Sprintf(" %s %s-%s", l.Type, l.Start, l.End)
				}
			}
			out = append(out, line)
			return nil
		})
		if err != nil {
			out = append(out, err.Error())
		}
	}
	for name, proc := range w.procs {
		out = append(out, fmt.Sprintf("guest %s dead %v", name, proc.Dead()))
	}
	slices.Sort(out)
	return out
}
