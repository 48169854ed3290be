// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

func TestMain(m *testing.M) {
	if os.Getenv(floorEnv) != "" {
		floor()
	}
	if os.Getenv(idleEnv) != "" {
		idle()
	}
	if os.Getenv(mainEnv) != "" {
		main()
		os.Exit(0)
	}
	host.Main(m)
}

// mainEnv makes the test binary the benchmark.
const mainEnv = "VIRTLOCKD_BENCH_MAIN"

// Nothing that was started outlives an interrupted run, a daemon and its keeper neither, which start each other again.
func TestInterrupted(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("a private mount namespace needs root")
	}
	program, err := os.ReadFile(host.Ours(t))
	if err != nil {
		t.Fatal(err)
	}
	own := filepath.Join(t.TempDir(), "virtlockd")
	if err := os.WriteFile(own, program, 0o755); err != nil {
		t.Fatal(err)
	}
	running := func() (pids []int) {
		all, _ := filepath.Glob("/proc/[0-9]*")
		for _, p := range all {
			exe, err := os.Readlink(p + "/exe")
			if pid, _ := strconv.Atoi(filepath.Base(p)); err == nil && exe == own {
				pids = append(pids, pid)
			}
		}
		return pids
	}
	cmd := exec.Command("/proc/self/exe", "-ours", own, "-c", "/nonexistent", "-dir", t.TempDir(), "-run", "^safety$")
	cmd.Env = append(os.Environ(), mainEnv+"=1")
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	const most = 3 // a daemon without a keeper, and one with
	if !host.Eventually(func() bool { return len(running()) == most }) {
		t.Errorf("%d daemons and keepers run; want %d", len(running()), most)
	}
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Errorf("an interrupted run ends well:\n%s", &output)
	}
	if left := running(); len(left) > 0 {
		t.Errorf("the processes %v are left", left)
	}
}

// The loops that measure are right about what they did, here with the floor, which answers like a daemon.
func TestFloor(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("a private mount namespace needs root")
	}
	b := bench{dir: t.TempDir()}
	err := inScope(func(s *scope) {
		f := b.start(s, bare, false)
		for _, p := range []place{{}, {indirect: true}} {
			cs := b.workers(f, p, 3)
			c := cs[0]
			if err := c.call(c.acquire); err != nil {
				t.Fatal(err)
			}
			file := host.Data + "/images/instance-00000000.qcow2"
			if p.indirect {
				file = host.Data + "/leases/" + strings.Repeat("0", 64)
			}
			if f.h.Free(file, false) {
				t.Errorf("%+v: acquired, but %s isn't locked", p, file)
			}
			if err := c.call(c.release); err != nil {
				t.Fatal(err)
			}
			if !f.h.Free(file, true) {
				t.Errorf("%+v: released, but %s is locked", p, file)
			}
			if f.h.Exists(file) == p.indirect {
				t.Errorf("%+v: %s exists: %v", p, file, !p.indirect)
			}
			one, err := repeat(-1, time.Millisecond, c.pair)
			if err != nil || len(one.ns) == 0 || one.quantile(0.5) <= 0 || one.quantile(0.5) > one.quantile(0.99) {
				t.Errorf("%+v: one client: %+v, %v", p, one, err)
			}
			all, err := closedLoop(cs, time.Millisecond)
			if err != nil || len(all.ns) < 3 || all.rate() <= 0 {
				t.Errorf("%+v: three clients: %+v, %v", p, all, err)
			}
		}
		c := f.client()
		c.resource("", "/nowhere/x", 0)
		if err := c.send(c.acquire); err != nil {
			t.Fatal(err)
		}
		if err := c.recv(); err == nil {
			t.Error("an error reply counts as success")
		}
		f.connect(50)
		f.lock(100)
		f.stop()
		if err := c.call(owner(1)); !errors.Is(err, errClosed) && err == nil {
			t.Error("a dead server answers")
		}
	})
	if err != nil {
		t.Error(err)
	}
}

func TestScope(t *testing.T) {
	t.Parallel()
	var order []string
	err := inScope(func(s *scope) {
		s.Cleanup(func() { order = append(order, "outer") })
		s.part(func(s *scope) {
			s.Cleanup(func() { order = append(order, "inner") })
			s.Fatalf("bad %d", 1)
		})
		order = append(order, "not reached")
	})
	if err == nil || err.Error() != "bad 1" || strings.Join(order, " ") != "inner outer" {
		t.Errorf("got %v, order %v", err, order)
	}
}

func TestOwnProcess(t *testing.T) {
	t.Parallel()
	before, err := cpuTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for x, end := 0.0, time.Now().Add(20*time.Millisecond); time.Now().Before(end); {
		x = math.Sqrt(x + 1)
	}
	if after, err := cpuTime(os.Getpid()); err != nil || after <= before {
		t.Errorf("CPU time went from %v to %v, %v", before, after, err)
	}
	if u, err := memoryOf(os.Getpid()); err != nil || u.private < 100<<10 || u.pss < u.private {
		t.Errorf("memory is %+v, %v", u, err)
	}
	if contextSwitches(os.Getpid()) <= 0 {
		t.Error("no context switch is seen")
	}
	if stack(os.Getpid()) == "" {
		t.Error("no stack")
	}
}

func TestFormat(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		unit unit
		v    float64
		want string
	}{
		{seconds, 1.5e-6, "1.50 us"}, {seconds, 55e-6, "55.0 us"}, {seconds, 8.5e-3, "8.50 ms"}, {seconds, 1.8, "1.80 s"}, {seconds, 1800, "1800 s"},
		{bytesUnit, 614, "614 B"}, {bytesUnit, 2.5 * 1024, "2.50 KiB"}, {bytesUnit, 6 << 20, "6.00 MiB"},
		{perSecond, 18000, "18.0 k/s"}, {count, 3.7, "3.70"}, {bytesUnit, -2048, "-2.00 KiB"},
	} {
		if got := c.unit.format(c.v); got != c.want {
			t.Errorf("%v %s: got %q, want %q", c.v, c.unit, got, c.want)
		}
	}
}

func TestRatio(t *testing.T) {
	t.Parallel()
	// A drift that hits both alike does not show.
	if r := ratio([]float64{1, 10, 100}, []float64{2, 20, 200}); r != 0.5 {
		t.Errorf("got %v", r)
	}
	if r := ratio([]float64{4, 5, 6}, []float64{10}); r != 0.5 {
		t.Errorf("got %v", r)
	}
	if r := ratio([]float64{1}, nil); !math.IsNaN(r) {
		t.Errorf("got %v", r)
	}
	if m := median([]float64{3, 1, 2, 10}); m != 2.5 {
		t.Errorf("got %v", m)
	}
}

func TestVerdict(t *testing.T) {
	t.Parallel()
	values := func(o, c float64) map[kind][]float64 {
		v := map[kind][]float64{ours: {o, o, o, o, o}}
		if c > 0 {
			v[cOne] = []float64{c, c, c, c, c}
		}
		return v
	}
	for _, c := range []struct {
		name string
		row  row
		want string
	}{
		{"no goal", row{Values: values(1, 1)}, ""},
		{"reached", row{Values: values(6, 10), Goal: atMostC(0.6)}, "pass"},
		{"missed", row{Values: values(6.1, 10), Goal: atMostC(0.6)}, "MISS"},
		{"no C", row{Values: values(6.1, 0), Goal: atMostC(0.6)}, ""},
		{"rate", row{Values: values(20, 10), Goal: atLeastC(2)}, "pass"},
		{"low rate", row{Values: values(19, 10), Goal: atLeastC(2)}, "MISS"},
		{"value", row{Values: values(5, 0), Goal: atMost(5)}, "pass"},
		{"value, of too few rounds", row{Values: map[kind][]float64{ours: {4, 4, 4, 4}}, Goal: atMost(5)}, ""},
		{"both, one missed", row{Values: values(5, 6), Goal: both(atMost(5), atMostC(0.5))}, "MISS"},
		{"flat", row{Values: values(11, 1), Base: []float64{10}, Goal: atMostBase(1.1, "at 0")}, "pass"},
		{"not flat", row{Values: values(12, 100), Base: []float64{10}, Goal: atMostBase(1.1, "at 0")}, "MISS"},
		{"nothing measured", row{Values: map[kind][]float64{}, Goal: atMost(5)}, ""},
	} {
		if _, got := c.row.verdict(); got != c.want {
			t.Errorf("%s: got %q, want %q", c.name, got, c.want)
		}
	}
}

// sample is a small result with a curve.
func sample() results {
	r := results{Date: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), Form: "quick"}
	r.section("beside idle clients")
	for _, n := range []int{0, 1000} {
		x := r.row("pair", seconds, atMostC(0.5))
		x.Curve, x.Load = "idle clients", n
		x.add(ours, 20e-6)
		x.add(cOne, float64(n+60)*1e-6)
		x.add(bare, 10e-6)
	}
	return r
}

func TestTable(t *testing.T) {
	t.Parallel()
	r := sample()
	var out bytes.Buffer
	r.print(&out)
	for _, want := range []string{"beside idle clients", "1.06 ms", "| pass |", "2 goals reached, 0 missed"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
}

func TestFiles(t *testing.T) {
	t.Parallel()
	r, dir := sample(), t.TempDir()
	if err := errors.Join(r.writeJSON(filepath.Join(dir, "json")), r.writeSVG(filepath.Join(dir, "svg"))); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "json"))
	if err != nil {
		t.Fatal(err)
	}
	var back results
	if err := json.Unmarshal(b, &back); err != nil || len(back.Rows) != 2 || back.Rows[1].Values[cOne][0] != 1060e-6 {
		t.Errorf("got %+v, %v", back, err)
	}
	if b, err = os.ReadFile(filepath.Join(dir, "svg")); err != nil {
		t.Fatal(err)
	}
	lines := 0
	for d := xml.NewDecoder(bytes.NewReader(b)); ; {
		token, err := d.Token()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if e, ok := token.(xml.StartElement); ok && e.Name.Local == "polyline" {
			lines++
		}
	}
	if lines != 3 {
		t.Errorf("plot has %d lines, want 3\n%s", lines, b)
	}
}

// Requests are those of libvirt's client.
func TestOwner(t *testing.T) {
	t.Parallel()
	m, err := wire.Parse(owner(7))
	if err != nil || m.Program != wire.LockProgram || m.Proc != wire.ProcRegister || m.Type != wire.TypeCall {
		t.Errorf("got %s, %v", m, err)
	}
}
