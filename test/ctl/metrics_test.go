// SPDX-License-Identifier: LGPL-2.1-or-later

package ctl

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"go.yaml.in/yaml/v3"

	"virtlockd/test/host"
	"virtlockd/test/wire"
)

// exposition is what a scrape says, as Prometheus reads it.
func exposition(t *testing.T, text string) map[string]*dto.MetricFamily {
	t.Helper()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		t.Fatalf("%v:\n%s", err, text)
	}
	for name, f := range families {
		if f.GetHelp() == "" || f.GetType() == dto.MetricType_UNTYPED {
			t.Errorf("%s has no help or no type", name)
		}
		if counter := f.GetType() == dto.MetricType_COUNTER; counter != strings.HasSuffix(name, "_total") {
			t.Errorf("%s is a %v", name, f.GetType())
		}
	}
	return families
}

// value returns the one of a metric with a label.
func value(families map[string]*dto.MetricFamily, name, label string) float64 {
	for _, m := range families[name].GetMetric() {
		ok := label == ""
		for _, l := range m.GetLabel() {
			ok = ok || l.GetValue() == label
		}
		if ok {
			return m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return -1
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{Config: "max_clients = 9\n"})
	c := d.Client(0x70000001)
	disk, shared := file(h, "disk"), file(h, "shared")
	must(t, c.Acquire("", disk, 0))
	must(t, c.Acquire("", shared, wire.Shared))
	if err := d.Client(0x70000002).Acquire("", disk, 0); !wire.IsLocked(err) {
		t.Fatal(err)
	}
	must(t, c.Release("", shared))
	for _, args := range [][]string{{"metrics"}, {"metrics", "--file", "/tmp/virtlockd.prom"}} {
		text := want(t, h, ok, args...).out
		if len(args) > 1 {
			text = h.ReadFile(args[2])
		}
		families := exposition(t, text)
		for _, c := range []struct {
			name, label string
			want        float64
		}{
			{"virtlockd_up", "", 1},
			{"virtlockd_locks", "exclusive", 1},
			{"virtlockd_locks", "shared", 0},
			{"virtlockd_locks_acquired_total", "", 2},
			{"virtlockd_locks_released_total", "request", 1},
			{"virtlockd_locks_refused_total", "held", 1},
			{"virtlockd_locks_refused_total", "hung", 0},
			{"virtlockd_locks_lost_total", "", 0},
			{"virtlockd_clients", "virtlockd", 2},
			{"virtlockd_clients_max", "virtlockd", 9},
			{"virtlockd_crash_safe", "", 0},
			{"virtlockd_owners_killed_total", "SIGKILL", 0},
			{"virtlockd_info", "9.0.0", 1},
		} {
			if got := value(families, c.name, c.label); got != c.want {
				t.Errorf("%s %s is %v, want %v", c.name, c.label, got, c.want)
			}
		}
	}
	if n := value(exposition(t, want(t, h, ok, "metrics").out), "virtlockd_goroutines", ""); n < 2 {
		t.Errorf("virtlockd_goroutines is %v", n)
	}
	// A file is replaced as a whole, and nothing else is left.
	h.Must(func() error {
		entries, err := os.ReadDir("/tmp")
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), ".virtlockd.prom") {
				t.Errorf("%s is left", e.Name())
			}
		}
		return err
	})
	want(t, h, failure, "metrics", "--file", "/none/x.prom")
	d.Stop()
	r := want(t, h, absent, "metrics")
	if got := value(exposition(t, r.out), "virtlockd_up", ""); got != 0 {
		t.Errorf("without daemon virtlockd_up is %v", got)
	}
}

func TestExporter(t *testing.T) {
	t.Parallel()
	h, d := start(t, host.Options{})
	cmd := command(t, h, "exporter", "--listen", "127.0.0.1:0")
	f := follow(t, h, cmd)
	f.await("/metrics\n")
	url := regexp.MustCompile(`http://\S+/metrics`).FindString(f.printed())
	get := func(method, url string) (int, string) {
		req, err := http.NewRequestWithContext(t.Context(), method, url, nil)
		must(t, err)
		resp, err := http.DefaultClient.Do(req)
		must(t, err)
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		must(t, err)
		return resp.StatusCode, string(body)
	}
	code, body := get(http.MethodGet, url)
	if code != http.StatusOK || value(exposition(t, body), "virtlockd_up", "") != 1 {
		t.Errorf("%d: %s", code, body)
	}
	for _, c := range []struct {
		method, url string
		want        int
	}{{http.MethodPost, url, http.StatusMethodNotAllowed}, {http.MethodGet, strings.TrimSuffix(url, "metrics"), http.StatusNotFound}} {
		if code, _ := get(c.method, c.url); code != c.want {
			t.Errorf("%s %s: %d", c.method, c.url, code)
		}
	}
	// A daemon that goes away and comes back.
	d.Stop()
	if code, body = get(http.MethodGet, url); code != http.StatusOK || value(exposition(t, body), "virtlockd_up", "") != 0 {
		t.Errorf("without daemon: %d: %s", code, body)
	}
	if code, _ = get(http.MethodGet, url); code != http.StatusOK {
		t.Errorf("again without daemon: %d", code)
	}
	h.Start(host.Ours(t), host.Options{})
	if code, body = get(http.MethodGet, url); code != http.StatusOK || value(exposition(t, body), "virtlockd_up", "") != 1 {
		t.Errorf("with a new daemon: %d: %s", code, body)
	}
	// It does not complain with each scrape.
	f.await("answers again")
	if n := strings.Count(f.printed(), "cannot reach the daemon"); n != 1 {
		t.Errorf("it says %s", f.printed())
	}
	http.DefaultClient.CloseIdleConnections()
	must(t, cmd.Process.Signal(syscall.SIGTERM))
	if code := f.end(); code != ok {
		t.Errorf("it ends with %d:\n%s", code, f.printed())
	}
}

// The daemon itself listens on Unix sockets only.
func TestDaemonOpensNoPort(t *testing.T) {
	t.Parallel()
	_, d := start(t, host.Options{})
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.PID()))
	must(t, err)
	ours := map[string]bool{}
	for _, e := range entries {
		if link, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", d.PID(), e.Name())); err == nil && strings.HasPrefix(link, "socket:[") {
			ours[strings.Trim(link, "socket:[]")] = true
		}
	}
	if len(ours) == 0 {
		t.Fatal("the daemon has no sockets")
	}
	for _, table := range []string{"tcp", "tcp6", "udp", "udp6", "raw", "raw6", "netlink", "packet"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", d.PID(), table))
		if err != nil {
			continue // a kernel without that family
		}
		for _, field := range strings.Fields(string(text)) {
			if ours[field] {
				t.Errorf("a socket of the daemon is in %s", table)
			}
		}
	}
}

var metricName = regexp.MustCompile(`virtlockd_[a-z_]+`)

// names insists that an expression's metrics are there.
func wantMetrics(t *testing.T, families map[string]*dto.MetricFamily, where, expr string) (n int) {
	t.Helper()
	for _, name := range metricName.FindAllString(expr, -1) {
		n++
		if families[name] == nil {
			t.Errorf("%s: there is no metric %s", where, name)
		}
	}
	return n
}

func TestDashboardAndAlerts(t *testing.T) {
	t.Parallel()
	h, _ := start(t, host.Options{})
	families := exposition(t, want(t, h, ok, "metrics").out)
	shown := map[string]bool{}

	text, err := os.ReadFile("../../packaging/grafana/virtlockd.json")
	must(t, err)
	var board struct {
		Title  string
		Panels []struct {
			ID      int
			Title   string
			Targets []struct{ Expr string }
		}
	}
	must(t, json.Unmarshal(text, &board))
	ids := map[int]bool{}
	for _, p := range board.Panels {
		if ids[p.ID] || p.Title == "" || len(p.Targets) == 0 {
			t.Errorf("panel %d %q", p.ID, p.Title)
		}
		ids[p.ID] = true
		for _, target := range p.Targets {
			if wantMetrics(t, families, "panel "+p.Title, target.Expr) == 0 {
				t.Errorf("panel %s: %q shows none of our metrics", p.Title, target.Expr)
			}
			for _, name := range metricName.FindAllString(target.Expr, -1) {
				shown[name] = true
			}
		}
	}
	if len(ids) == 0 {
		t.Error("the dashboard is empty")
	}

	text, err = os.ReadFile("../../packaging/prometheus/virtlockd.rules.yaml")
	must(t, err)
	var rules struct {
		Groups []struct {
			Name  string
			Rules []struct {
				Alert, Expr, For    string
				Labels, Annotations map[string]string
			}
		}
	}
	must(t, yaml.Unmarshal(text, &rules))
	alerts := map[string]bool{}
	for _, g := range rules.Groups {
		for _, r := range g.Rules {
			if r.Alert == "" || alerts[r.Alert] || r.Labels["severity"] == "" || r.Annotations["summary"] == "" || r.Annotations["description"] == "" {
				t.Errorf("rule %+v", r)
			}
			alerts[r.Alert] = true
			if wantMetrics(t, families, "alert "+r.Alert, r.Expr) == 0 {
				t.Errorf("alert %s: %q is about none of our metrics", r.Alert, r.Expr)
			}
		}
	}
	for _, name := range []string{"VirtlockdLockLost", "VirtlockdLocksRefused", "VirtlockdNotCrashSafe", "VirtlockdClientsNearLimit", "VirtlockdFilesNearLimit"} {
		if !alerts[name] {
			t.Errorf("there is no alert %s", name)
		}
	}
}
