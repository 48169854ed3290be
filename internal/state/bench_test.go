// SPDX-License-Identifier: LGPL-2.1-or-later

package state

import (
	"fmt"
	"testing"

	"golang.org/x/sys/unix"
)

// populated returns a state with so many guests, each with one registered and restricted connection and, as far as
// there are any left, one lease.
func populated(locks, clients int) *Snapshot {
	s := &Snapshot{
		PID: 4711, PIDFile: NoFD, Vault: NoFD, StartTime: 1_795_335_851_123_456_789,
		Admin: &Server{MaxClients: 5000, MaxUnauth: 5000, KeepaliveInterval: 1<<32 - 1, NextClientID: 1,
			Services: []Service{{MaxRequests: 1, Sockets: []Socket{{FD: 5, Unlink: true}}}}},
		Lock: &Server{MaxClients: 20000, MaxUnauth: 20000, KeepaliveInterval: 1<<32 - 1, NextClientID: uint64(clients) + 1,
			Services: []Service{{MaxRequests: 1, Sockets: []Socket{{FD: 4, Unlink: true}}}}},
	}
	fd := int32(10)
	var space Lockspace
	space.Dir = "/var/lib/libvirt/lockd/files"
	for i := range max(locks, clients) {
		d := Details{Name: fmt.Sprintf("instance-%08x", i), ID: uint32(i + 1), PID: int32(100_000 + i)}
		copy(d.UUID[:], fmt.Sprintf("%016d", i))
		s.Owners = append(s.Owners, Owner{Details: d, Kind: Verified, PIDFD: fd, StartTime: uint64(1000 + i)})
		fd++
		if i < clients {
			s.Lock.Clients = append(s.Lock.Clients, Client{
				ID: uint64(i + 1), ConnectTime: 1_795_335_851_000_000_001 + int64(i), FD: fd, MaxRequests: 1,
				Registered: true, Restricted: true, Owner: d, Self: int32(i), Uptime: int64(i + 1),
			})
			fd++
		}
		if i < locks {
			name := fmt.Sprintf("%064x", i)
			space.Resources = append(space.Resources, Resource{
				Name: name, Path: space.Dir + "/" + name, FD: fd, Held: true, Flags: 2, Owners: []int32{int32(i)},
				File: File{Dev: 2049, Ino: uint64(i + 1)},
			})
			fd++
		}
	}
	s.Lockspaces = []Lockspace{space}
	return s
}

var sizes = []struct{ locks, clients int }{{0, 0}, {1000, 1000}, {10000, 4096}, {10000, 9500}, {20000, 19000}}

// cpu returns the time that the process has used, in ns: what counts where others use the machine too.
func cpu(b *testing.B) int64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return u.Utime.Nano() + u.Stime.Nano()
}

var readers = []struct {
	name string
	Reader
}{{"ours", Ours}, {"c", C}}

func BenchmarkEncode(b *testing.B) {
	for _, n := range sizes {
		s := populated(n.locks, n.clients)
		for _, r := range readers {
			b.Run(fmt.Sprintf("locks=%d/clients=%d/for=%s", n.locks, n.clients, r.name), func(b *testing.B) {
				b.ReportAllocs()
				before := cpu(b)
				for b.Loop() {
					data, err := Encode(s, r.Reader)
					if err != nil {
						b.Skip(err)
					}
					b.SetBytes(int64(len(data)))
				}
				b.ReportMetric(float64(cpu(b)-before)/float64(b.N), "cpu-ns/op")
			})
		}
	}
}

func BenchmarkDecode(b *testing.B) {
	for _, n := range sizes {
		s := populated(n.locks, n.clients)
		for _, r := range readers {
			data := encode(nil, s, r.Reader).b
			b.Run(fmt.Sprintf("locks=%d/clients=%d/from=%s", n.locks, n.clients, r.name), func(b *testing.B) {
				b.ReportAllocs()
				b.SetBytes(int64(len(data)))
				before := cpu(b)
				for b.Loop() {
					if _, problems, err := Decode(data, s.PID); err != nil || problems != nil {
						b.Fatal(err, problems)
					}
				}
				b.ReportMetric(float64(cpu(b)-before)/float64(b.N), "cpu-ns/op")
			})
		}
	}
}
