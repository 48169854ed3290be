// SPDX-License-Identifier: LGPL-2.1-or-later

package logging

import (
	"encoding/binary"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// daemonFacility is syslog's LOG_DAEMON, before it is shifted.
const daemonFacility = 3

// datagrams writes each record as one message to a Unix socket: of journald or syslog. It connects when there is
// something to write, so nothing depends on whether anybody listens, and again when the listener was replaced.
//
// github.com/coreos/go-systemd/v22/journal isn't used for journald: it knows one fixed path, keeps its socket in a package
// variable, waits without end when the journal is stuck and registers with the runtime's poller. A record's size is
// bounded far below what a socket takes (net.core.wmem_default, 208 KiB), so the memfd for larger ones isn't needed.
type datagrams struct {
	path     string
	stream   bool // also try a stream socket, in which a NUL ends a message
	encode   func(*record) []byte
	fd       int // -1: not connected; non-blocking
	isStream bool
}

func (d *datagrams) write(r *record, stop *atomic.Bool) error {
	data := d.encode(r)
	for {
		old := d.fd >= 0
		if !old {
			if err := d.connect(); err != nil {
				return err
			}
		}
		err := d.send(data, stop)
		if err == nil || err == unix.EMSGSIZE {
			return err
		}
		d.close() // a stream may have the message in part
		if !old || err == errGivenUp {
			return err
		}
	}
}

func (d *datagrams) connect() error {
	kinds := []int{unix.SOCK_DGRAM, unix.SOCK_STREAM}
	if !d.stream {
		kinds = kinds[:1]
	}
	var err error
	for _, kind := range kinds {
		var fd int
		if fd, err = unix.Socket(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
			return err
		}
		if err = unix.Connect(fd, &unix.SockaddrUnix{Name: d.path}); err == nil {
			d.fd, d.isStream = fd, kind == unix.SOCK_STREAM
			return nil
		}
		closeFD(fd)
		if err != unix.EPROTOTYPE {
			return err
		}
	}
	return err
}

func (d *datagrams) send(data []byte, stop *atomic.Bool) error {
	if d.isStream {
		data = append(data, 0)
	}
	for {
		n, err := unix.SendmsgN(d.fd, data, nil, nil, unix.MSG_NOSIGNAL)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			if stop.Load() {
				return errGivenUp
			}
			if _, err := writable(d.fd); err != nil {
				return err
			}
		case err != nil:
			return err
		case d.isStream && n < len(data):
			data = data[n:]
		default:
			return nil
		}
	}
}

func (d *datagrams) reopen() error { return nil }
func (d *datagrams) inWrite() bool { return false } // it waits in poll(2), which ends with the process
func (d *datagrams) renew() bool   { return false }

func (d *datagrams) close() {
	closeFD(d.fd)
	d.fd = -1
}

// syslogEncoder returns the form of syslog(3): "<PRIORITY>TIME IDENT: " in local time, then a line without its time.
func syslogEncoder(ident string, pid int, now func() time.Time) func(*record) []byte {
	ident = string(appendEscaped(nil, ident, maxValue))
	return func(r *record) []byte {
		at := r.time
		if at.IsZero() {
			at = now()
		}
		b := make([]byte, 0, len(r.text)+128)
		b = append(b, '<')
		b = strconv.AppendInt(b, int64(daemonFacility<<3|r.level.syslog()), 10)
		b = append(b, '>')
		b = at.Local().AppendFormat(b, time.Stamp)
		b = append(b, ' ')
		b = append(b, ident...)
		b = append(b, ": "...)
		return r.appendLine(b, pid)
	}
}

// journalFields returns the record in journald's native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL).
func journalFields(r *record) []byte {
	b := make([]byte, 0, len(r.text)+256)
	b = appendField(b, "MESSAGE", r.text)
	b = appendField(b, "PRIORITY", strconv.Itoa(r.level.syslog()))
	b = appendField(b, "SYSLOG_FACILITY", strconv.Itoa(daemonFacility))
	if r.category != "" {
		b = appendField(b, "LIBVIRT_SOURCE", r.category)
	}
	if r.hasDomain {
		b = appendField(b, "LIBVIRT_DOMAIN", strconv.FormatInt(r.domain, 10))
	}
	if r.hasCode {
		b = appendField(b, "LIBVIRT_CODE", strconv.FormatInt(r.code, 10))
	}
	if r.function != "" {
		b = appendField(b, "CODE_FILE", r.file)
		b = appendField(b, "CODE_LINE", strconv.Itoa(r.line))
		b = appendField(b, "CODE_FUNC", r.function)
	}
	return b
}

// appendField appends one field; a value with a line end needs its length before it.
func appendField(b []byte, key, value string) []byte {
	b = append(b, key...)
	if strings.Contains(value, "\n") {
		b = append(b, '\n')
		b = binary.LittleEndian.AppendUint64(b, uint64(len(value)))
	} else {
		b = append(b, '=')
	}
	b = append(b, value...)
	return append(b, '\n')
}
