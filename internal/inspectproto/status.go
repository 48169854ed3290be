// SPDX-License-Identifier: LGPL-2.1-or-later

package inspectproto

import (
	"os"
	"runtime"
	"runtime/metrics"
	"time"

	"golang.org/x/sys/unix"

	"virtlockd/internal/buildinfo"
	"virtlockd/internal/inspect"
)

func (p *reader) status() *inspect.Status {
	life := p.cfg.Life()
	s := &inspect.Status{
		Version: buildinfo.Version, Commit: buildinfo.CommitName(), Libvirt: buildinfo.LibvirtVersion,
		PID: os.Getpid(),
		Now: time.Now().UTC(), Started: life.Started.UTC(), Serving: life.Serving.UTC(),
		Upgrades: life.Upgrades, Recoveries: life.Recoveries,
		LogDropped: p.cfg.Dropped(),
		LastEvent:  p.cfg.Events.Last(),
	}
	s.Unstored = p.cfg.Table.Unstored()
	s.CrashSafe, s.CrashSafeReason, s.Locks.CrashSafe = p.cfg.Safe()
	s.Lockspaces, s.Locks.Exclusive, s.Locks.Shared = p.cfg.Table.Counts()
	s.Workers.All, s.Workers.Busy = p.cfg.Files.Workers()
	s.Files = openFiles()
	s.Goroutines, s.HeapLive = runtime.NumGoroutine(), heapLive()
	for _, server := range p.cfg.Servers() {
		s.Unstored += server.Unstored()
		s.Servers = append(s.Servers, inspect.Server{
			Name: server.Name(), Clients: server.Count(), MaxClients: server.Limits().MaxClients,
		})
	}
	calls := p.cfg.Files.InFlight()
	s.CallCount = len(calls)
	for _, c := range calls[:min(len(calls), maxCalls)] {
		s.Calls = append(s.Calls, inspect.Call{
			Op: c.Op, Path: inspect.Text(c.Path), Mount: inspect.Text(c.Mount), Worker: c.Worker, Since: c.Since.UTC(),
		})
	}
	for _, c := range p.cfg.Events.Counts() {
		s.Counts = append(s.Counts, inspect.Count{Kind: c.Kind.String(), Reason: string(c.Reason), N: c.N})
	}
	return s
}

// heapLive unlike runtime.ReadMemStats stops nobody.
func heapLive() uint64 {
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(live)
	if live[0].Value.Kind() != metrics.KindUint64 {
		return 0 // a run-time that does not know it by this name
	}
	return live[0].Value.Uint64()
}

// openFiles counts the open files of this process, and says how many there may be. It takes no lock that others wait for.
func openFiles() inspect.FileCount {
	var limit unix.Rlimit
	n, err := descriptors()
	if err != nil || unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) != nil {
		return inspect.FileCount{}
	}
	return inspect.FileCount{Open: n, Max: limit.Cur}
}

const ownFiles = "/proc/self/fd"

// descriptors counts those of this process.
func descriptors() (int, error) {
	// Since Linux 6.2 the directory's size is their number; before it is 0.
	if st, err := os.Stat(ownFiles); err == nil && st.Size() > 0 {
		return int(st.Size()), nil
	}
	return listDescriptors()
}

func listDescriptors() (int, error) {
	dir, err := os.Open(ownFiles)
	if err != nil {
		return 0, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	return len(names) - 1, err // without that of the directory
}
