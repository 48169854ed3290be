// SPDX-License-Identifier: LGPL-2.1-or-later

package vmhost

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Names of a host's daemons.
const (
	Lockd    = "virtlockd"
	Libvirtd = "libvirtd"
)

// pidFiles are where the daemons write their pids in a host.
var pidFiles = map[string]string{
	Lockd: "/run/virtlockd.pid", Libvirtd: "/run/libvirtd.pid",
}

// A daemon is a process of the host that runs in the foreground below an nsenter.
type daemon struct {
	cmd   *exec.Cmd
	log   string        // file with its stdout and stderr
	ended chan struct{} // closed when it has been reaped
	err   error         // how it ended; valid after ended
}

// StartAll starts the given lock daemon, and libvirtd when that is ready.
func (h *Host) StartAll(ctx context.Context, lockd string) error {
	if err := h.StartDaemon(ctx, Lockd, lockd); err != nil {
		return err
	}
	return h.StartDaemon(ctx, Libvirtd, "/usr/sbin/libvirtd")
}

// StartDaemon starts a daemon of the host in the foreground and returns when it has told that it is ready, by the datagram
// READY=1 that systemd would get.
func (h *Host) StartDaemon(ctx context.Context, name string, argv ...string) error {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	// An absolute path: "Relative" would be found anew in another working directory.
	path, err := filepath.Abs(argv[0])
	if err != nil {
		return err
	}
	argv = append([]string{path}, argv[1:]...)
	socket := filepath.Join(h.dir, "notify-"+name)
	os.Remove(socket)
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return err
	}
	defer notify.Close()
	log, err := os.OpenFile(h.logPath(name), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	d := &daemon{cmd: h.command(context.Background(), nil, argv), log: log.Name(), ended: make(chan struct{})}
	d.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+socket)
	d.cmd.Stdout, d.cmd.Stderr = log, log
	h.mu.Lock()
	if old := h.daemons[name]; old != nil {
		select {
		case <-old.ended:
		default:
			h.mu.Unlock()
			return fmt.Errorf("%s: %s runs already", h.opts.Name, name)
		}
	}
	if err := d.cmd.Start(); err != nil {
		h.mu.Unlock()
		return err
	}
	h.daemons[name] = d
	h.mu.Unlock()
	go func() {
		d.err = d.cmd.Wait()
		close(d.ended)
	}()

	ready := make(chan error, 1)
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := notify.Read(buf)
			if err != nil || strings.Contains("\n"+string(buf[:n])+"\n", "\nREADY=1\n") {
				ready <- err
				return
			}
		}
	}()
	select {
	case err := <-ready:
		return err
	case <-d.ended:
		return fmt.Errorf("%s: %s ended at start (%w): %s", h.opts.Name, name, exitError(d.err), h.Log(name))
	case <-ctx.Done():
		return fmt.Errorf("%s: %s did not get ready: %w: %s", h.opts.Name, name, ctx.Err(), h.Log(name))
	}
}

func exitError(err error) error {
	if err == nil {
		return errors.New("exit status 0")
	}
	return err
}

func (h *Host) logPath(name string) string { return filepath.Join(h.dir, "log-"+name) }

// Log returns what a daemon has written to stdout and stderr.
func (h *Host) Log(name string) string {
	text, err := os.ReadFile(h.logPath(name))
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// DaemonPID returns the pid, in the host, of a daemon.
func (h *Host) DaemonPID(name string) (int, error) { return h.ReadPID(pidFiles[name]) }

// StopDaemon sends a signal ("TERM", "KILL") to a daemon and waits for its end.
func (h *Host) StopDaemon(ctx context.Context, name, signal string) error {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	pid, err := h.DaemonPID(name)
	if err != nil {
		return fmt.Errorf("pid of %s: %w", name, err)
	}
	h.mu.Lock()
	d := h.daemons[name]
	h.mu.Unlock()
	if err := h.Signal(ctx, signal, pid); err != nil {
		return err
	}
	select {
	case <-d.ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s: %s did not end after SIG%s: %w", h.opts.Name, name, signal, ctx.Err())
	}
}

// DaemonEnded returns a channel that is closed when the daemon ends.
func (h *Host) DaemonEnded(name string) <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.daemons[name].ended
}

// Poll asks cond again and again, quickly at first, until it is true, it fails, or ctx is done.
func Poll(ctx context.Context, cond func() (bool, error)) error {
	wait := time.Millisecond
	for {
		ok, err := cond()
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
		wait = min(2*wait, 50*time.Millisecond)
	}
}
