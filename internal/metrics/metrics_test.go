// SPDX-License-Identifier: LGPL-2.1-or-later

package metrics

import (
	"errors"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"virtlockd/internal/inspect"
)

func gather(t *testing.T, c *Collector) map[string]int {
	t.Helper()
	r := prometheus.NewPedanticRegistry()
	if err := r.Register(c); err != nil {
		t.Fatal(err)
	}
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	n := map[string]int{}
	for _, f := range families {
		n[f.GetName()] = len(f.GetMetric())
	}
	return n
}

func TestCollector(t *testing.T) {
	t.Parallel()
	now := time.Now()
	s := &inspect.Status{
		Now:     now,
		Servers: []inspect.Server{{Name: "virtlockd"}, {Name: "admin"}},
		Calls:   []inspect.Call{{Since: now.Add(time.Hour)}}, // the clock was set
		Counts: []inspect.Count{
			{Kind: "acquired", N: 1}, {Kind: "refused", Reason: "held"}, {Kind: "refused", Reason: "hung"}, {Kind: "upgraded"},
			// Of a daemon of tomorrow.
			{Kind: "acquired", Reason: "found"}, {Kind: "lost", Reason: "eaten"}, {Kind: "admired"},
		},
	}
	n := gather(t, &Collector{Ask: func() (*inspect.Status, error) { return s, nil }})
	for name, want := range map[string]int{
		"virtlockd_up": 1, "virtlockd_clients": 2, "virtlockd_locks_refused_total": 2, "virtlockd_locks_acquired_total": 1,
		"virtlockd_locks_lost_total": 1, "virtlockd_locks": 2, "virtlockd_workers": 2,
	} {
		if n[name] != want {
			t.Errorf("%s has %d values, want %d", name, n[name], want)
		}
	}
}

// An older daemon does not say how many goroutines it has.
func TestGoroutines(t *testing.T) {
	t.Parallel()
	for n, want := range map[int]int{0: 0, 9: 1} {
		got := gather(t, &Collector{Ask: func() (*inspect.Status, error) { return &inspect.Status{Goroutines: n}, nil }})
		if got["virtlockd_goroutines"] != want {
			t.Errorf("of %d goroutines the metric has %d values, want %d", n, got["virtlockd_goroutines"], want)
		}
	}
}

// An older daemon does not say how many files it may open: no alert is to divide by that.
func TestFiles(t *testing.T) {
	t.Parallel()
	for limit, want := range map[uint64]int{0: 0, 9: 1} {
		n := gather(t, &Collector{Ask: func() (*inspect.Status, error) {
			return &inspect.Status{Files: inspect.FileCount{Open: 5, Max: limit}}, nil
		}})
		for _, name := range []string{"virtlockd_open_files", "virtlockd_open_files_max"} {
			if n[name] != want {
				t.Errorf("with a limit of %d %s has %d values, want %d", limit, name, n[name], want)
			}
		}
	}
}

func TestDown(t *testing.T) {
	t.Parallel()
	n := gather(t, &Collector{Ask: func() (*inspect.Status, error) { return nil, errors.New("away") }})
	if len(n) != 1 || n["virtlockd_up"] != 1 {
		t.Errorf("%v", n)
	}
}
