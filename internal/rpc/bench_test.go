// SPDX-License-Identifier: LGPL-2.1-or-later

package rpc

import (
	"testing"

	"golang.org/x/sys/unix"
)

// BenchmarkPair measures two requests of the usual size one after the other, as
// acquire and release are, from one process to another. With idle clients beside
// it must take as long as without.
func BenchmarkPair(b *testing.B) {
	for _, bb := range []struct {
		name string
		idle int
	}{{"idle=0", 0}, {"idle=4000", 4000}} {
		b.Run(bb.name, func(b *testing.B) {
			path, _, _ := startChild(b, 0)
			for range bb.idle {
				dial(b, path)
			}
			p := dial(b, path)
			m := request(procBig, 1, make([]byte, 68))
			buf := make([]byte, 4096)
			b.ResetTimer()
			for range b.N {
				for range 2 {
					if _, err := unix.Write(p.fd, m); err != nil {
						b.Fatal(err)
					}
					if n, err := p.read(buf); err != nil || n != headerSize {
						b.Fatal(n, err)
					}
				}
			}
		})
	}
}

// BenchmarkServe measures what the server itself does for a request, with one
// process on both ends, for its allocations.
func BenchmarkServe(b *testing.B) {
	s := serve(b, nil)
	p := s.dial()
	m := request(procBig, 1, make([]byte, 68))
	buf := make([]byte, 4096)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := unix.Write(p.fd, m); err != nil {
			b.Fatal(err)
		}
		if n, err := p.read(buf); err != nil || n != headerSize {
			b.Fatal(n, err)
		}
	}
}

// BenchmarkConnect measures connecting, one request, and disconnecting.
func BenchmarkConnect(b *testing.B) {
	path, _, _ := startChild(b, 0)
	m := request(procBig, 1, make([]byte, 68))
	buf := make([]byte, 4096)
	b.ResetTimer()
	for range b.N {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			b.Fatal(err)
		}
		p := &peer{t: b, fd: fd}
		if err := retry(func() error { return unix.Connect(fd, &unix.SockaddrUnix{Name: path}) }); err != nil {
			b.Fatal(err)
		}
		p.send(m)
		if n, err := p.read(buf); err != nil || n != headerSize {
			b.Fatal(n, err)
		}
		p.close()
	}
}
