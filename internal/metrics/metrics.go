// SPDX-License-Identifier: LGPL-2.1-or-later

// Package metrics shows the daemon's status to Prometheus.
package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"virtlockd/internal/inspect"
)

// All that is shown. Labels have few values, and each is there from the beginning.
var (
	up = prometheus.NewDesc("virtlockd_up",
		"Whether the daemon answers.", nil, nil)
	info = prometheus.NewDesc("virtlockd_info",
		"Always 1; the labels say which daemon it is.", []string{"version", "commit", "libvirt"}, nil)
	started = prometheus.NewDesc("virtlockd_start_time_seconds",
		"When the daemon's process became a lock daemon, in seconds since 1970. A live upgrade keeps it.", nil, nil)
	serving = prometheus.NewDesc("virtlockd_serving_since_seconds",
		"When this binary took over, in seconds since 1970. The counters begin here.", nil, nil)
	upgrades = prometheus.NewDesc("virtlockd_upgrades_total",
		"Live upgrades of this process.", nil, nil)
	recoveries = prometheus.NewDesc("virtlockd_recoveries_total",
		"How often the daemon was started again and found its locks.", nil, nil)
	crashSafe = prometheus.NewDesc("virtlockd_crash_safe",
		"Whether locks outlive the daemon's process.", nil, nil)
	locks = prometheus.NewDesc("virtlockd_locks",
		"Resources that are locked.", []string{"mode"}, nil)
	safeLocks = prometheus.NewDesc("virtlockd_locks_crash_safe",
		"Resources whose locks outlive the daemon's process.", nil, nil)
	lockspaces = prometheus.NewDesc("virtlockd_lockspaces",
		"Lockspaces, the default one included.", nil, nil)
	clients = prometheus.NewDesc("virtlockd_clients",
		"Clients that are connected.", []string{"server"}, nil)
	maxClients = prometheus.NewDesc("virtlockd_clients_max",
		"How many clients may be connected; others have to wait.", []string{"server"}, nil)
	openFiles = prometheus.NewDesc("virtlockd_open_files",
		"Files that the daemon's process has open.", nil, nil)
	maxFiles = prometheus.NewDesc("virtlockd_open_files_max",
		"How many files the daemon's process may have open; each client and each lock needs one.", nil, nil)
	goroutines = prometheus.NewDesc("virtlockd_goroutines",
		"Goroutines of the daemon's process; more and more of them are a fault of it.", nil, nil)
	calls = prometheus.NewDesc("virtlockd_calls",
		"Calls on files in progress.", nil, nil)
	oldestCall = prometheus.NewDesc("virtlockd_call_oldest_seconds",
		"For how long the oldest call on a file has been in progress: a disk that hangs. 0: there is none.", nil, nil)
	workers = prometheus.NewDesc("virtlockd_workers",
		"Processes for disks that may hang.", []string{"state"}, nil)
	logDropped = prometheus.NewDesc("virtlockd_log_messages_dropped_total",
		"Log messages that an output did not take.", nil, nil)
	happened = map[string]*prometheus.Desc{
		"acquired": prometheus.NewDesc("virtlockd_locks_acquired_total",
			"Locks that were acquired.", nil, nil),
		"released": prometheus.NewDesc("virtlockd_locks_released_total",
			"Locks that were given up, by why.", []string{"reason"}, nil),
		"refused": prometheus.NewDesc("virtlockd_locks_refused_total",
			"Locks that were refused, by why: a guest did not start.", []string{"reason"}, nil),
		"killed": prometheus.NewDesc("virtlockd_owners_killed_total",
			"Signals to owners who had lost their connection or a lock.", []string{"step"}, nil),
		"lost": prometheus.NewDesc("virtlockd_locks_lost_total",
			"Locks that were lost while their owner lives, by what was found.", []string{"reason"}, nil),
		"faulty": prometheus.NewDesc("virtlockd_locks_faulty_total",
			"Locks that are held, but something is wrong with their file, by what was found.", []string{"reason"}, nil),
	}
)

// Collector is a prometheus.Collector that asks the daemon each time.
type Collector struct {
	// Ask returns the daemon's status. If it can't be had, the daemon counts as down.
	Ask func() (*inspect.Status, error)
}

// Describe implements prometheus.Collector.
func (c *Collector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{up, info, started, serving, upgrades, recoveries, crashSafe, locks, safeLocks, lockspaces,
		clients, maxClients, openFiles, maxFiles, goroutines, calls, oldestCall, workers, logDropped} {
		out <- d
	}
	for _, d := range happened {
		out <- d
	}
}

// Collect implements prometheus.Collector.
func (c *Collector) Collect(out chan<- prometheus.Metric) {
	s, err := c.Ask()
	if err != nil {
		out <- prometheus.MustNewConstMetric(up, prometheus.GaugeValue, 0)
		return
	}
	show := func(d *prometheus.Desc, kind prometheus.ValueType, v float64, labels []string) {
		// What a newer daemon tells in other words is left out.
		if m, err := prometheus.NewConstMetric(d, kind, v, labels...); err == nil {
			out <- m
		}
	}
	gauge := func(d *prometheus.Desc, v float64, labels ...string) { show(d, prometheus.GaugeValue, v, labels) }
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		show(d, prometheus.CounterValue, float64(v), labels)
	}
	gauge(up, 1)
	gauge(info, 1, s.Version, s.Commit, s.Libvirt)
	gauge(started, float64(s.Started.UnixMilli())/1000)
	gauge(serving, float64(s.Serving.UnixMilli())/1000)
	counter(upgrades, s.Upgrades)
	counter(recoveries, s.Recoveries)
	gauge(crashSafe, yes(s.CrashSafe))
	gauge(locks, float64(s.Locks.Exclusive), "exclusive")
	gauge(locks, float64(s.Locks.Shared), "shared")
	gauge(safeLocks, float64(s.Locks.CrashSafe))
	gauge(lockspaces, float64(s.Lockspaces))
	for _, server := range s.Servers {
		gauge(clients, float64(server.Clients), server.Name)
		gauge(maxClients, float64(server.MaxClients), server.Name)
	}
	if s.Files.Max > 0 { // else the daemon is older, or can't tell
		gauge(openFiles, float64(s.Files.Open))
		gauge(maxFiles, float64(s.Files.Max))
	}
	if s.Goroutines > 0 {
		gauge(goroutines, float64(s.Goroutines))
	}
	gauge(calls, float64(s.CallCount))
	oldest := 0.0
	if len(s.Calls) > 0 {
		oldest = max(0, s.Now.Sub(s.Calls[0].Since).Seconds())
	}
	gauge(oldestCall, oldest)
	gauge(workers, float64(s.Workers.Busy), "busy")
	gauge(workers, float64(s.Workers.All-s.Workers.Busy), "idle")
	counter(logDropped, s.LogDropped)
	for _, n := range s.Counts {
		switch d := happened[n.Kind]; {
		case d == nil: // told by other metrics
		case n.Reason == "":
			counter(d, n.N)
		default:
			counter(d, n.N, n.Reason)
		}
	}
}

func yes(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
