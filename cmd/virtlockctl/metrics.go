// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/common/expfmt"
	"github.com/spf13/pflag"

	"virtlockd/internal/inspect"
	"virtlockd/internal/inspectclient"
	"virtlockd/internal/metrics"
)

// registry returns one whose metrics are the daemon's, asked by a connection that can only read. note is told why
// it does not answer, and of nil if it does.
func (t *tool) registry(note func(error)) *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(&metrics.Collector{
		Ask: func() (s *inspect.Status, err error) {
			defer func() { note(err) }()
			err = t.ask(func(c *inspectclient.Conn) error {
				if err := c.ReadOnly(); err != nil {
					return err
				}
				s, err = c.Status()
				return err
			})
			return s, err
		},
	})
	return r
}

func printMetrics(flags *pflag.FlagSet) func(*tool, []string) error {
	file := flags.StringP("file", "f", "", "write them to this file, which is replaced in one step")
	return func(t *tool, _ []string) error {
		var failed error
		families, err := t.registry(func(err error) { failed = err }).Gather()
		if err != nil {
			return fmt.Errorf("cannot gather metrics: %w", err)
		}
		var b bytes.Buffer
		for _, f := range families {
			if _, err := expfmt.MetricFamilyToText(&b, f); err != nil {
				return fmt.Errorf("cannot print metrics: %w", err)
			}
		}
		if *file == "" {
			_, err = t.out.Write(b.Bytes())
		} else {
			err = replaceFile(*file, b.Bytes())
		}
		if err != nil {
			return err
		}
		return failed // printed all the same: virtlockd_up is 0
	}
}

// replaceFile writes a file that nobody ever sees half of.
func replaceFile(path string, content []byte) error {
	// The textfile collector reads *.prom only.
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Chmod(0o644)
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return fmt.Errorf("cannot write the metrics: %w", err)
	}
	return nil
}

const (
	// scrapeTime bounds one answer of the exporter.
	scrapeTime = 10 * time.Second
	// maxScrapes is how many are answered at a time.
	maxScrapes = 4
	maxHeader  = 16 << 10
)

func exporter(flags *pflag.FlagSet) func(*tool, []string) error {
	listen := flags.StringP("listen", "l", "localhost:9747", "where to serve /metrics")
	return func(t *tool, _ []string) error {
		l, err := new(net.ListenConfig).Listen(t.ctx, "tcp", *listen)
		if err != nil {
			return fmt.Errorf("cannot serve metrics: %w", err)
		}
		fmt.Fprintf(t.err, "virtlockctl: metrics of %s are at http://%s/metrics\n", clean(t.socket), l.Addr())
		mux := http.NewServeMux()
		o := &outage{tool: t}
		mux.Handle("GET /metrics", promhttp.HandlerFor(t.registry(o.note), promhttp.HandlerOpts{
			MaxRequestsInFlight: maxScrapes, Timeout: scrapeTime,
		}))
		s := &http.Server{
			Handler: mux, MaxHeaderBytes: maxHeader,
			ReadHeaderTimeout: scrapeTime, ReadTimeout: scrapeTime, WriteTimeout: 2 * scrapeTime, IdleTimeout: 5 * time.Minute,
		}
		defer context.AfterFunc(t.ctx, func() { s.Close() })()
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("cannot serve metrics: %w", err)
		}
		return nil
	}
}

// outage says once why the daemon does not answer, and when it does again: not with each scrape.
type outage struct {
	*tool
	mu   sync.Mutex
	said string
}

func (o *outage) note(err error) {
	if o.ctx.Err() != nil {
		return
	}
	why := ""
	if err != nil {
		why = err.Error()
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case why == o.said:
	case why == "":
		fmt.Fprintln(o.err, "virtlockctl: the daemon answers again")
	default:
		fmt.Fprintf(o.err, "virtlockctl: %s\n", clean(why))
	}
	o.said = why
}
