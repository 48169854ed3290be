// SPDX-License-Identifier: LGPL-2.1-or-later

// Package logging is libvirt's logging (levels, filters, outputs, line format) on log/slog.
//
// A line of a stderr or file output looks like
//
//	2026-11-22 08:17:31.788+0000: 50: error : lockproto.(*Program).Call:274 : text: key=value key="other value"
//
// with the time in UTC, our process id where the C daemon has its thread's, and function and line of the caller. The first
// line of each output follows two that name the version and the host. Attributes stand behind the message on the same
// line; keys of groups are joined by dots; a key or value is quoted as Go quotes strings when it is empty or has blanks,
// '=', quotation marks or anything unprintable in it. In the message itself unprintable characters and bytes that are no
// UTF-8 are replaced by their Go escapes. So one record is always one line, whatever a client put into a name.
//
// A message must pass its category's level (that of the first filter that matches, else the general one) and each
// output's own.
//
// Each output has a queue with bounds and a goroutine of its own. Logging never waits for an output: a record that finds
// the queue of one full is lost there, and a line in that output says how many were as soon as it works again.
package logging

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Keys of attributes with a meaning of their own, at the top level of a logger (outside of groups).
const (
	// Category is set by With only and names the source of a logger's messages, as in libvirt:
	// log.With(logging.Category, "locking.lock_daemon"). Filters match on it. Names must come from the program: each is
	// remembered for good.
	Category = "category"
	// ErrorDomain and ErrorCode are libvirt's numbers for an error. Only journald gets them.
	ErrorDomain = "libvirt_domain"
	ErrorCode   = "libvirt_code"
)

// Defaults of Config.
const (
	JournaldSocket = "/run/systemd/journal/socket"
	SyslogSocket   = "/dev/log"
	QueueLen       = 4096
)

// Config is what Logs needs from the outside. The zero value of a field means its default.
type Config struct {
	Version        string           // libvirt release for the first line of an output
	Package        string           // our own version for the same line
	Hostname       string           // os.Hostname
	PID            int              // os.Getpid
	StderrFD       int              // 2; not closed
	JournaldSocket string           // JournaldSocket
	SyslogSocket   string           // SyslogSocket
	QueueLen       int              // QueueLen: records that wait for an output
	Now            func() time.Time // time.Now; for our own lines, a record has its time
}

// Logs takes records and routes them to outputs. It is made by New and must be closed.
type Logs struct {
	config     Config
	retireTime time.Duration // see there
	dropped    atomic.Uint64 // see Dropped

	mu         sync.RWMutex // held for moments only, never over a system call; before a sink's mutex
	settings   Settings
	generation uint64               // counts changes of settings
	routes     []route              // the outputs of settings, in their order
	sinks      map[*sink]struct{}   // all whose goroutine runs: those of routes and old ones that still flush
	categories map[string]*category // every one that a logger was made for
	closed     bool
}

// route is an output in use.
type route struct {
	Output
	sink *sink
}

// category is the source of a logger's messages.
type category struct {
	name string
	min  atomic.Int64 // slog.Level from which on some output wants its messages
}

// off is above all levels.
const off = math.MaxInt64

// New opens the outputs of s.
func New(c Config, s Settings) (*Logs, error) {
	if c.Hostname == "" {
		c.Hostname, _ = os.Hostname() // the line then has an empty name
	}
	if c.PID == 0 {
		c.PID = os.Getpid()
	}
	if c.StderrFD == 0 {
		c.StderrFD = 2
	}
	if c.JournaldSocket == "" {
		c.JournaldSocket = JournaldSocket
	}
	if c.SyslogSocket == "" {
		c.SyslogSocket = SyslogSocket
	}
	if c.QueueLen == 0 {
		c.QueueLen = QueueLen
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	l := &Logs{config: c, retireTime: retireTime, sinks: make(map[*sink]struct{}), categories: make(map[string]*category)}
	if err := l.Apply(s); err != nil {
		return nil, err
	}
	return l, nil
}

// Logger returns the logger without a category, from which the others are made: l.Logger().With(Category, "rpc.netserver").
func (l *Logs) Logger() *slog.Logger {
	return slog.New(&handler{logs: l, category: l.category("")})
}

// category returns the one of that name.
func (l *Logs) category(name string) *category {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.categories[name]
	if c == nil {
		c = &category{name: name}
		l.categories[name] = c
		l.setMin(c)
	}
	return c
}

// setMin computes a category's threshold anew. l.mu is held for writing.
func (l *Logs) setMin(c *category) {
	if len(l.routes) == 0 {
		c.min.Store(off)
		return
	}
	level := l.settings.Level
	for _, f := range l.settings.Filters {
		if f.matches(c.name) {
			level = f.Level
			break
		}
	}
	lowest := Error
	for _, r := range l.routes {
		lowest = min(lowest, r.Level)
	}
	c.min.Store(int64(max(level, lowest).threshold()))
}

// route hands r to the outputs that want it.
func (l *Logs) route(r *record) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	for _, o := range l.routes {
		if r.level >= o.Level {
			o.sink.put(r)
		}
	}
}

// Apply changes all settings at once. On error, an *OpenError within, nothing has changed. Outputs that were in use
// before go on as they are, others are flushed and closed in the background.
func (l *Logs) Apply(s Settings) error {
	return l.change(func(*Settings) Settings { return s })
}

// SetLevel changes the general level.
func (l *Logs) SetLevel(level Level) error {
	return l.change(func(s *Settings) Settings { s.Level = level; return *s })
}

// SetFilters replaces the filters by those of text, "" for none. On error, an *InvalidError, nothing has changed.
func (l *Logs) SetFilters(text string) error {
	filters, err := ParseFilters(text)
	if err != nil {
		return err
	}
	return l.change(func(s *Settings) Settings { s.Filters = filters; return *s })
}

// SetOutputs replaces the outputs by those of text, "" for the default. Relative paths start at the working directory. On
// error, an *InvalidError or an *OpenError, nothing has changed.
func (l *Logs) SetOutputs(text string) error {
	outputs, err := ParseOutputs(text, "")
	if err != nil {
		return err
	}
	return l.change(func(s *Settings) Settings {
		s.Outputs, s.OutputsFrom = outputs, ""
		if len(outputs) == 0 {
			s.Outputs = s.Default
		}
		return *s
	})
}

// retireTime is for how long an output that isn't wanted any more may go on writing what it has.
const retireTime = 5 * time.Second

// change applies what edit makes of the settings. Outputs are opened without the mutex, so it starts again when
// somebody else was faster.
func (l *Logs) change(edit func(*Settings) Settings) error {
	for {
		l.mu.RLock()
		settings, generation, inUse := l.settings, l.generation, l.routes
		l.mu.RUnlock()
		settings = edit(&settings)

		var routes []route
		var opened []*sink
		for _, o := range settings.Outputs {
			if i := slices.IndexFunc(inUse, func(r route) bool { return r.same(o) }); i >= 0 {
				routes = append(routes, route{o, inUse[i].sink})
				continue
			}
			s, err := l.open(o)
			if err != nil {
				discard(opened)
				if settings.OutputsFrom != "" {
					err = fmt.Errorf("%s: %w", settings.OutputsFrom, err)
				}
				return err
			}
			routes = append(routes, route{o, s})
			opened = append(opened, s)
		}

		l.mu.Lock()
		if l.closed || l.generation != generation {
			closed := l.closed
			l.mu.Unlock()
			discard(opened)
			if closed {
				return errors.New("logging: changed after Close")
			}
			continue
		}
		l.settings, l.routes = settings, routes
		l.generation++
		for _, s := range opened {
			l.sinks[s] = struct{}{}
			go s.run()
		}
		for _, c := range l.categories {
			l.setMin(c)
		}
		l.mu.Unlock()
		for _, old := range inUse {
			if !slices.ContainsFunc(routes, func(r route) bool { return r.sink == old.sink }) {
				old.sink.close()
				time.AfterFunc(l.retireTime, func() { old.sink.abort.Store(true) })
			}
		}
		return nil
	}
}

// discard closes sinks that were never run.
func discard(opened []*sink) {
	for _, s := range opened {
		s.writer.close()
	}
}

// ended is called by a sink's goroutine at its end.
func (l *Logs) ended(s *sink) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.sinks, s)
}

// Settings returns what is in force.
func (l *Logs) Settings() Settings {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.settings
}

// Filters returns the filters as virt-admin shows them, and their number.
func (l *Logs) Filters() (string, int) {
	s := l.Settings()
	return FormatFilters(s.Filters), len(s.Filters)
}

// Outputs returns the outputs as virt-admin shows them, and their number.
func (l *Logs) Outputs() (string, int) {
	s := l.Settings()
	return FormatOutputs(s.Outputs), len(s.Outputs)
}

// Reopen opens the log files by their names again, after logrotate has moved them away. A file that can't be opened is an
// *OpenError within the result, and the old one stays in use.
func (l *Logs) Reopen() error {
	l.mu.RLock()
	routes := l.routes
	l.mu.RUnlock()
	var errs []error
	for _, r := range routes {
		errs = append(errs, r.sink.reopen())
	}
	return errors.Join(errs...)
}

// Dropped returns how many messages an output has not taken so far.
func (l *Logs) Dropped() uint64 { return l.dropped.Load() }

// Flush returns when all that was logged before is written or lost, or with ctx's error.
func (l *Logs) Flush(ctx context.Context) error {
	l.mu.RLock()
	var marks []<-chan struct{}
	for s := range l.sinks {
		marks = append(marks, s.mark())
	}
	l.mu.RUnlock()
	for _, m := range marks {
		select {
		case <-m:
		case <-ctx.Done():
			return fmt.Errorf("log output is blocked: %w", ctx.Err())
		}
	}
	return nil
}

// InWrite returns the outputs that are in write(2) at this moment. After a Flush that failed, these are files
// on a disk that hangs: neither exec(2) nor the end of the process comes before it answers.
func (l *Logs) InWrite() (in []Output) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	for s := range l.sinks {
		if s.writer.inWrite() {
			in = append(in, s.output)
		}
	}
	return in
}

// Close writes what is queued, until ctx ends, and closes the outputs. The error says what was lost. What is logged later
// is lost silently.
func (l *Logs) Close(ctx context.Context) error {
	l.mu.Lock()
	l.closed, l.routes = true, nil
	for _, c := range l.categories {
		c.min.Store(off)
	}
	sinks := slices.Collect(maps.Keys(l.sinks))
	l.mu.Unlock()
	for _, s := range sinks {
		s.close()
	}
	var errs []error
	for _, s := range sinks {
		select {
		case <-s.done:
		case <-ctx.Done():
			s.abort.Store(true)
		}
		if n := s.lost(); n > 0 {
			errs = append(errs, fmt.Errorf("%d messages for log output %s lost", n, s.output))
		}
	}
	return errors.Join(errs...)
}
