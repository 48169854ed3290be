// SPDX-License-Identifier: LGPL-2.1-or-later

package logging

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// maxQueueBytes bounds the memory of the records that wait for one output.
const maxQueueBytes = 4 << 20

// ownCategory is the source of the lines that an output writes on its own account.
const ownCategory = "util.log"

// writer puts records where they belong. All methods but reopen are called by the sink's goroutine only.
type writer interface {
	// write returns when r is out or can't be. While the destination isn't ready it waits, until stop is set.
	write(r *record, stop *atomic.Bool) error
	// reopen prepares going over to what has the destination's name now, and renew does it; renew reports whether that
	// was something new.
	reopen() error
	renew() bool
	close()
	// inWrite may be called by anybody: see Logs.InWrite.
	inWrite() bool
}

// sink is the queue and the goroutine of one output.
type sink struct {
	output Output
	writer writer
	logs   *Logs
	wake   chan struct{} // capacity 1: there is something to look at
	done   chan struct{} // closed at the end of the goroutine
	abort  atomic.Bool   // give up what is queued

	mu      sync.Mutex // held for moments only, never over a system call
	queue   []*record
	waiting int    // records in queue and in the goroutine's hands
	bytes   int    // their size
	missing uint64 // lost records that no line has told about yet
	reason  error  // of the last loss, nil if the queue was full
	closing bool
}

// open makes the sink of an output. Its goroutine isn't started yet.
func (l *Logs) open(o Output) (*sink, error) {
	s := &sink{output: o, logs: l, wake: make(chan struct{}, 1), done: make(chan struct{})}
	c := &l.config
	switch o.Dest {
	case Stderr:
		s.writer = &stderr{lineWriter{fd: c.StderrFD, pid: c.PID}}
	case Syslog:
		s.writer = &datagrams{path: c.SyslogSocket, stream: true, fd: -1, encode: syslogEncoder(o.Arg, c.PID, c.Now)}
	case Journald:
		s.writer = &datagrams{path: c.JournaldSocket, fd: -1, encode: journalFields}
	case File:
		f, err := openFile(o.Arg, c.PID)
		if err != nil {
			return nil, err
		}
		s.writer = f
	}
	return s, nil
}

// put queues r, or drops it if there is no room. A sink that is closed gets none: it is off the routes before.
func (s *sink) put(r *record) {
	size := len(r.text) + recordOverhead
	s.mu.Lock()
	if s.waiting >= s.logs.config.QueueLen || s.bytes+size > maxQueueBytes {
		s.missing++
		s.logs.dropped.Add(1)
		s.reason = nil
	} else {
		s.queue = append(s.queue, r)
		s.waiting++
		s.bytes += size
	}
	s.mu.Unlock()
	s.ping()
}

// mark returns a channel that is closed when all that was queued before is dealt with.
func (s *sink) mark() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return s.done
	}
	r := &record{mark: make(chan struct{})}
	s.queue = append(s.queue, r)
	s.ping()
	return r.mark
}

func (s *sink) ping() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// reopen goes over to the file that has the name now.
func (s *sink) reopen() error {
	err := s.writer.reopen()
	s.ping()
	return err
}

// close ends the goroutine after it has written what is queued.
func (s *sink) close() {
	s.mu.Lock()
	s.closing = true
	s.mu.Unlock()
	s.ping()
}

// lost returns how many records were dropped without a line about it, or are still waiting.
func (s *sink) lost() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.missing + uint64(s.waiting)
}

// run is the goroutine.
func (s *sink) run() {
	defer close(s.done)
	defer s.logs.ended(s)
	defer s.writer.close()
	started := false // the destination has its first lines
	for range s.wake {
		s.mu.Lock()
		batch, closing := s.queue, s.closing
		s.queue = nil
		s.mu.Unlock()

		renewed := s.writer.renew()
		if renewed {
			started = false
		}
		if len(batch) == 0 && !renewed && !closing {
			continue // what the wake was for was dealt with before
		}
		var err error
		told := false // of what was lost, since the last record
		for _, r := range batch {
			if told = r.mark != nil; told {
				s.tellLost(err)
				close(r.mark)
				continue
			}
			if err = s.start(&started, r.time); err == nil {
				err = s.writer.write(r, &s.abort)
			}
			s.settle(r, err)
		}
		if !told {
			s.tellLost(err)
		}
		if closing {
			return
		}
	}
}

// start writes the lines that come before the first one of a destination, whatever their level.
func (s *sink) start(started *bool, at time.Time) error {
	if *started {
		return nil
	}
	c := &s.logs.config
	for _, text := range []string{
		"libvirt version: " + c.Version + ", package: " + c.Package,
		"hostname: " + c.Hostname,
	} {
		r := &record{time: at, level: Info, category: ownCategory, text: string(appendEscaped(nil, text, maxMessage))}
		if err := s.writer.write(r, &s.abort); err != nil {
			return err
		}
	}
	*started = true
	return nil
}

// settle takes a record off the account. A record that wasn't written is counted.
func (s *sink) settle(r *record, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waiting--
	s.bytes -= len(r.text) + recordOverhead
	if err != nil {
		s.missing++
		s.logs.dropped.Add(1)
		s.reason = err
	}
}

// tellLost writes how many records were lost, unless the output still doesn't work: err is that of the last record.
func (s *sink) tellLost(err error) {
	s.mu.Lock()
	n, reason := s.missing, s.reason
	s.mu.Unlock()
	if n == 0 || err != nil {
		return
	}
	why := "more came than it took"
	if reason != nil {
		why = reason.Error()
	}
	text := fmt.Sprintf("%d messages for this log output were lost: %s", n, why)
	r := &record{time: s.logs.config.Now(), level: Warning, category: ownCategory, text: string(appendEscaped(nil, text, maxMessage))}
	if s.writer.write(r, &s.abort) == nil {
		s.mu.Lock()
		s.missing -= n
		s.mu.Unlock()
	}
}
