// SPDX-License-Identifier: LGPL-2.1-or-later

package logging

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Nothing that a test started may be left: neither goroutines nor descriptors of outputs.
func TestMain(m *testing.M) {
	code := m.Run()
	deadline := time.Now().Add(10 * time.Second)
	for {
		left := leftovers()
		if left == "" {
			break
		}
		if time.Now().After(deadline) {
			fmt.Fprintln(os.Stderr, "left behind:", left)
			code = max(code, 1)
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	os.Exit(code)
}

func leftovers() string {
	stacks := make([]byte, 1<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	if bytes.Contains(stacks, []byte("logging.(*sink).run")) {
		return string(stacks)
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err.Error()
	}
	for _, fd := range fds {
		if n, _ := strconv.Atoi(fd.Name()); n <= 2 {
			continue // whatever the tests were started with
		}
		target, _ := os.Readlink("/proc/self/fd/" + fd.Name())
		if strings.HasPrefix(target, os.TempDir()) || strings.HasPrefix(target, "socket:") || target == "/dev/full" {
			return "descriptor of " + target
		}
	}
	return ""
}

// listen makes a Unix socket of that type and returns its path and descriptor. It is closed at the end of the test.
func listen(t *testing.T, kind int) (string, int) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	return path, listenAt(t, path, kind)
}

func listenAt(t *testing.T, path string, kind int) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	// A receive that nothing comes for ends the test instead of hanging it.
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if kind == unix.SOCK_STREAM {
		if err := unix.Listen(fd, 5); err != nil {
			t.Fatal(err)
		}
	}
	return fd
}

func receive(t *testing.T, fd int) string {
	t.Helper()
	b := make([]byte, 1<<17)
	for {
		n, err := unix.Read(fd, b)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
}

// decodeJournal is journald's side of the native protocol.
func decodeJournal(t *testing.T, datagram string) map[string]string {
	t.Helper()
	fields := map[string]string{}
	for rest := datagram; rest != ""; {
		line, after, ok := strings.Cut(rest, "\n")
		if !ok {
			t.Fatalf("no line end in %q", datagram)
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok {
			if len(after) < 8 {
				t.Fatalf("no length in %q", datagram)
			}
			n := binary.LittleEndian.Uint64([]byte(after))
			after = after[8:]
			if uint64(len(after)) < n+1 || after[n] != '\n' {
				t.Fatalf("wrong length in %q", datagram)
			}
			value, after = after[:n], after[n+1:]
		}
		if _, dup := fields[key]; dup || !regexp.MustCompile(`^[A-Z][A-Z0-9_]*$`).MatchString(key) {
			t.Fatalf("field %q in %q", key, datagram)
		}
		fields[key] = value
		rest = after
	}
	return fields
}

func TestJournald(t *testing.T) {
	t.Parallel()
	path, fd := listen(t, unix.SOCK_DGRAM)
	l, _ := newLogs(t, Config{JournaldSocket: path}, Debug, "", "1:journald")
	log := l.Logger().With(Category, "locking.lock_daemon")
	for _, text := range []string{"libvirt version: 9.0.0, package: ours 1.2", "hostname: vm"} {
		if text != "hostname: vm" {
			log.Error("refused\nforged=1", ErrorDomain, 7, "path", "/a b", ErrorCode, 1)
		}
		want := map[string]string{"MESSAGE": text, "PRIORITY": "6", "SYSLOG_FACILITY": "3", "LIBVIRT_SOURCE": "util.log"}
		if got := decodeJournal(t, receive(t, fd)); !mapsEqual(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	got := decodeJournal(t, receive(t, fd))
	line, err := strconv.Atoi(got["CODE_LINE"])
	if err != nil || line < 100 || !strings.HasSuffix(got["CODE_FILE"], "internal/logging/output_test.go") {
		t.Errorf("CODE_LINE %q, CODE_FILE %q", got["CODE_LINE"], got["CODE_FILE"])
	}
	delete(got, "CODE_LINE")
	delete(got, "CODE_FILE")
	want := map[string]string{
		"MESSAGE": `refused\nforged=1: path="/a b"`, "PRIORITY": "3", "SYSLOG_FACILITY": "3", "LIBVIRT_SOURCE": "locking.lock_daemon",
		"LIBVIRT_DOMAIN": "7", "LIBVIRT_CODE": "1", "CODE_FUNC": "logging.TestJournald",
	}
	if !mapsEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	for level, priority := range map[slog.Level]string{slog.LevelDebug: "7", slog.LevelInfo: "6", slog.LevelWarn: "4", slog.LevelError: "3"} {
		logOne(t, l.Logger(), level, "m")
		want := map[string]string{"MESSAGE": "m", "PRIORITY": priority, "SYSLOG_FACILITY": "3"}
		if got := decodeJournal(t, receive(t, fd)); !mapsEqual(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	// A category can have anything in it.
	logOne(t, l.Logger().With(Category, "two\nLINES=1"), slog.LevelInfo, "m")
	if got := decodeJournal(t, receive(t, fd)); got["LIBVIRT_SOURCE"] != "two\nLINES=1" || len(got) != 4 {
		t.Errorf("got %q", got)
	}
	// The longest record fits a datagram.
	logOne(t, l.Logger(), slog.LevelInfo, strings.Repeat("\x00", maxMessage))
	if got := decodeJournal(t, receive(t, fd)); len(got["MESSAGE"]) < maxText {
		t.Errorf("%d bytes", len(got["MESSAGE"]))
	}
}

func mapsEqual(a, b map[string]string) bool { return fmt.Sprint(a) == fmt.Sprint(b) }

func TestSyslog(t *testing.T) {
	t.Parallel()
	path, fd := listen(t, unix.SOCK_DGRAM)
	l, _ := newLogs(t, Config{SyslogSocket: path}, Debug, "", "1:syslog:lock\nd")
	stamp := someTime.Local().Format("Jan _2 15:04:05")
	logOne(t, l.Logger(), slog.LevelError, "refused", slog.String("path", "/x"))
	for _, want := range []string{
		"<30>" + stamp + ` lock\nd: 50: info : libvirt version: 9.0.0, package: ours 1.2` + "\n",
		"<30>" + stamp + ` lock\nd: 50: info : hostname: vm` + "\n",
		"<27>" + stamp + ` lock\nd: 50: error : refused: path=/x` + "\n",
	} {
		if got := receive(t, fd); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	for level, pri := range map[slog.Level]string{slog.LevelDebug: "<31>", slog.LevelInfo: "<30>", slog.LevelWarn: "<28>", slog.LevelError: "<27>"} {
		logOne(t, l.Logger(), level, "m")
		if got := receive(t, fd); !strings.HasPrefix(got, pri) {
			t.Errorf("got %q, want %s", got, pri)
		}
	}
	l.Logger().Info("with its caller")
	if got := receive(t, fd); !regexp.MustCompile(`^<30>\w{3} [ \d]\d \d\d:\d\d:\d\d lock\\nd: 50: info : logging\.TestSyslog:\d+ : with its caller\n$`).MatchString(got) {
		t.Errorf("got %q", got)
	}
}

// A syslog daemon with a stream socket gets the same, each message ended by a NUL.
func TestSyslogStream(t *testing.T) {
	t.Parallel()
	path, fd := listen(t, unix.SOCK_STREAM)
	l, _ := newLogs(t, Config{SyslogSocket: path}, Debug, "", "1:syslog:id")
	logOne(t, l.Logger(), slog.LevelWarn, strings.Repeat("x", maxMessage))
	conn, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(conn)
	all := ""
	for strings.Count(all, "\x00") < 3 {
		all += receive(t, conn)
	}
	messages := strings.Split(all, "\x00")
	if len(messages) != 4 || !strings.HasSuffix(messages[1], "hostname: vm\n") || !strings.HasSuffix(messages[2], "warning : "+strings.Repeat("x", maxMessage)+"\n") {
		t.Errorf("got %q", messages)
	}
}

// Sockets that nobody listens on hold up nothing, and the messages since are told when somebody does.
func TestListenerComesLate(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	l, _ := newLogs(t, Config{JournaldSocket: path, SyslogSocket: path}, Debug, "", "1:journald")
	logOne(t, l.Logger(), slog.LevelInfo, "one")
	flush(t, l)
	fd := listenAt(t, path, unix.SOCK_DGRAM)
	logOne(t, l.Logger(), slog.LevelInfo, "two")
	for _, want := range []string{"libvirt version: 9.0.0, package: ours 1.2", "hostname: vm", "two", "1 messages for this log output were lost: no such file or directory"} {
		if got := decodeJournal(t, receive(t, fd)); got["MESSAGE"] != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	// It stops taking anything; another one takes its place, as when it is restarted.
	if err := unix.Shutdown(fd, unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	logOne(t, l.Logger(), slog.LevelInfo, "three")
	flush(t, l)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	fd = listenAt(t, path, unix.SOCK_DGRAM)
	logOne(t, l.Logger(), slog.LevelInfo, "four")
	for _, want := range []string{"four", "1 messages for this log output were lost: broken pipe"} {
		if got := decodeJournal(t, receive(t, fd)); got["MESSAGE"] != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	if err := l.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

// within runs f and fails if it doesn't return soon.
func within(t *testing.T, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatal("blocked: " + what)
	}
}

var lostLine = regexp.MustCompile(`^(\d+) messages for this log output were lost: more came than it took$`)

// A journal that isn't read (as when systemd-journald is stopped) delays nobody who logs, nor the other outputs; when it
// goes on, it gets what was queued, in order, and is told how much wasn't.
func TestBlockedJournald(t *testing.T) {
	t.Parallel()
	path, fd := listen(t, unix.SOCK_DGRAM)
	const total = 3000
	l, file := newLogs(t, Config{JournaldSocket: path, QueueLen: total / 4}, Debug, "", "1:journald 1:file:FILE")
	log := l.Logger()
	within(t, "logging", func() {
		for i := range total {
			logOne(t, log, slog.LevelInfo, strconv.Itoa(i))
			if i%100 == 99 { // the file must keep pace, it has the same queue
				waitLines(t, file, 2+i+1)
			}
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := l.Flush(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("the journal isn't blocked: %v", err)
	}
	last, received, lost := -1, 0, 0
	for received+lost < total {
		m := decodeJournal(t, receive(t, fd))["MESSAGE"]
		if strings.HasPrefix(m, "libvirt version") || strings.HasPrefix(m, "hostname") {
			continue
		}
		if told := lostLine.FindStringSubmatch(m); told != nil {
			n, _ := strconv.Atoi(told[1])
			lost += n
			continue
		}
		i, err := strconv.Atoi(m)
		if err != nil || i <= last {
			t.Fatalf("%q after %d", m, last)
		}
		last = i
		received++
	}
	if received < total/4 || lost == 0 {
		t.Errorf("%d received, %d lost", received, lost)
	}
	log.Info("after")
	if m := decodeJournal(t, receive(t, fd)); m["MESSAGE"] != "after" {
		t.Errorf("got %q", m)
	}
	if err := l.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

func waitLines(t *testing.T, path string, want int) {
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		b, err := os.ReadFile(path)
		if err == nil && bytes.Count(b, []byte("\n")) == want {
			return
		}
	}
	t.Errorf("no %d lines in %s", want, path)
}

// Large records fill the queue by their size.
func TestQueueBytes(t *testing.T) {
	t.Parallel()
	path, fd := listen(t, unix.SOCK_DGRAM)
	l, _ := newLogs(t, Config{JournaldSocket: path}, Debug, "", "1:journald")
	message := strings.Repeat("x", maxMessage)
	within(t, "logging", func() {
		for range 400 { // 256 fill it
			logOne(t, l.Logger(), slog.LevelInfo, message)
		}
	})
	received := 0
	for {
		m := decodeJournal(t, receive(t, fd))["MESSAGE"]
		if m == message {
			received++
		}
		if lostLine.MatchString(m) {
			break
		}
	}
	if received*maxMessage > maxQueueBytes*5/4 { // some are in the socket
		t.Errorf("%d records of 16 KiB were queued", received)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_ = l.Close(ctx) // more may have been queued, which nobody reads any more
}

// What was written makes room again.
func TestQueueBytesReturn(t *testing.T) {
	t.Parallel()
	l, path := newLogs(t, Config{}, Debug, "", "1:file:FILE")
	message := strings.Repeat("x", maxMessage)
	const n = 2 * maxQueueBytes / maxMessage
	for range n {
		logOne(t, l.Logger(), slog.LevelInfo, message)
		flush(t, l)
	}
	if got := strings.Count(read(t, path), message+"\n"); got != n {
		t.Errorf("%d of %d messages", got, n)
	}
}

// An output that is blocked when it is replaced delays nobody, and ends in time.
func TestRetireBlocked(t *testing.T) {
	t.Parallel()
	path, _ := listen(t, unix.SOCK_DGRAM)
	l, file := newLogs(t, Config{JournaldSocket: path}, Debug, "", "1:journald")
	l.retireTime = 10 * time.Millisecond
	for range 1000 {
		l.Logger().Info("m")
	}
	within(t, "SetOutputs", func() {
		if err := l.SetOutputs("1:file:" + file); err != nil {
			t.Error(err)
		}
	})
	logOne(t, l.Logger(), slog.LevelInfo, "m")
	waitLines(t, file, 3)
	waitSinks(t, l, 1)
}

// waitSinks waits until only n outputs are left.
func waitSinks(t *testing.T, l *Logs, n int) {
	t.Helper()
	within(t, "the goroutine of the output", func() {
		for {
			l.mu.RLock()
			left := len(l.sinks)
			l.mu.RUnlock()
			if left == n {
				return
			}
			time.Sleep(time.Millisecond)
		}
	})
}

// Closing while an output is blocked: nobody waits beyond the time given, what is lost is said and the goroutine ends.
func TestCloseBlocked(t *testing.T) {
	t.Parallel()
	path, _ := listen(t, unix.SOCK_DGRAM)
	l, _ := newLogs(t, Config{JournaldSocket: path}, Debug, "", "1:journald")
	for range 1000 {
		l.Logger().Info("m")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	err := l.Close(ctx)
	if err == nil || !regexp.MustCompile(`^\d+ messages for log output 1:journald lost$`).MatchString(err.Error()) {
		t.Errorf("got %v", err)
	}
	waitSinks(t, l, 0)
	if l.Logger().Enabled(t.Context(), slog.LevelError) {
		t.Error("still enabled")
	}
	l.Logger().Error("nobody reads this")
	if err := l.SetOutputs("1:stderr"); err == nil {
		t.Error("changed after Close")
	}
	if err := l.Close(t.Context()); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

// A pipe on stderr that nobody reads delays nobody; its lines come whole.
func TestBlockedStderr(t *testing.T) {
	t.Parallel()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	r := os.NewFile(uintptr(p[0]), "pipe")
	defer r.Close()
	l, _ := newLogs(t, Config{StderrFD: p[1], QueueLen: 100}, Debug, "", "1:stderr")
	message := strings.Repeat("x", 3000)
	within(t, "logging", func() {
		for range 500 {
			logOne(t, l.Logger(), slog.LevelInfo, message)
		}
	})
	go func() {
		_ = l.Close(context.Background())
		_ = unix.Close(p[1])
	}()
	if err := r.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil && !errors.Is(err, os.ErrNoDeadline) {
		t.Fatal(err)
	}
	b := new(bytes.Buffer)
	if _, err := b.ReadFrom(r); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n")
	received, lost := 0, 0
	for _, line := range lines[2:] {
		_, text, _ := strings.Cut(line, "info : ")
		_, why, _ := strings.Cut(line, "warning : ")
		if m := lostLine.FindStringSubmatch(why); m != nil {
			n, _ := strconv.Atoi(m[1])
			lost += n
		} else if text == message {
			received++
		} else {
			t.Fatalf("odd line %q", line)
		}
	}
	if received < 100 || received+lost != 500 {
		t.Errorf("%d received, %d lost", received, lost)
	}
}

// A line of which only a part could be written is ended before the next one.
func TestUnfinishedLine(t *testing.T) {
	t.Parallel()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[0])
	defer unix.Close(p[1])
	w := lineWriter{fd: p[1], pid: 50}
	var stop atomic.Bool
	stop.Store(true)
	long := &record{level: Info, text: strings.Repeat("x", maxText)}
	var err error
	for range 3 {
		if err = w.write(long, &stop, false); err != nil {
			break
		}
	}
	if err != errGivenUp || !w.unfinished {
		t.Fatalf("%v, unfinished %t", err, w.unfinished)
	}
	receive(t, p[0])
	if err := w.write(&record{level: Info, text: "next"}, &stop, false); err != nil || w.unfinished {
		t.Fatal(err)
	}
	if rest := receive(t, p[0]); !strings.HasSuffix(rest, "\n50: info : next\n") {
		t.Errorf("got %q", rest)
	}
}

// A full disk costs messages, which are counted, and nothing else.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "log")
	if err := os.Symlink("/dev/full", path); err != nil {
		t.Fatal(err)
	}
	l, _ := newLogs(t, Config{Now: func() time.Time { return someTime }}, Debug, "", "1:file:"+path)
	for range 3 {
		logOne(t, l.Logger(), slog.LevelInfo, "lost")
	}
	flush(t, l)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := l.Reopen(); err != nil {
		t.Fatal(err)
	}
	logOne(t, l.Logger(), slog.LevelInfo, "back")
	flush(t, l)
	want := heading + "2026-11-22 08:17:31.788+0000: 50: info : back\n" +
		"2026-11-22 08:17:31.788+0000: 50: warning : 3 messages for this log output were lost: no space left on device\n"
	if got := read(t, path); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "log")
	if err := os.WriteFile(path, []byte("before\n"), 0o640); err != nil {
		t.Fatal(err)
	}
	l, _ := newLogs(t, Config{}, Debug, "", "1:file:"+path+" 1:file:"+path+"2")
	logOne(t, l.Logger(), slog.LevelInfo, "m")
	flush(t, l)
	line := "2026-11-22 08:17:31.788+0000: 50: info : m\n"
	if got := read(t, path); got != "before\n"+heading+line {
		t.Errorf("not appended: %s", got)
	}
	// logrotate: moved away, Reopen, lines in the new file.
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	logOne(t, l.Logger(), slog.LevelInfo, "m")
	flush(t, l)
	if err := l.Reopen(); err != nil {
		t.Fatal(err)
	}
	logOne(t, l.Logger(), slog.LevelInfo, "m")
	flush(t, l)
	for name, want := range map[string]string{path + ".1": "before\n" + heading + line + line, path: heading + line, path + "2": heading + line + line + line} {
		if got := read(t, name); got != want {
			t.Errorf("%s: got\n%s\nwant\n%s", name, got, want)
		}
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	// A file that can't be opened anew leaves the old one in use.
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	err = l.Reopen()
	var open *OpenError
	if !errors.As(err, &open) || !strings.Contains(err.Error(), "failed to open "+path+": No such file or directory") {
		t.Errorf("got %v", err)
	}
	logOne(t, l.Logger(), slog.LevelInfo, "m")
	if err := l.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if err := l.Reopen(); err != nil { // after Close there is nothing to open
		t.Error(err)
	}
}

// Reopen may come while an output is on its way out: its new descriptor must not be left behind (see TestMain).
func TestReopenClosed(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "log")
	for _, steps := range []func(*file){
		func(f *file) { f.close(); _ = f.reopen() },
		func(f *file) { _ = f.reopen(); f.close() },
		func(f *file) { _ = f.reopen(); _ = f.reopen(); f.renew(); f.close() },
	} {
		f, err := openFile(path, 50)
		if err != nil {
			t.Fatal(err)
		}
		steps(f)
	}
}

func TestNewFails(t *testing.T) {
	t.Parallel()
	s, err := Resolve(Env{}, settingsOf(t, "\nlog_outputs='1:stderr 3:file:/nodir/x'"), false, Mode{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = New(Config{}, s)
	var open *OpenError
	if err == nil || err.Error() != "/c:2: failed to open /nodir/x: No such file or directory" || !errors.As(err, &open) || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

// What virt-admin does with filters and outputs, and that a refused change changes nothing.
func TestChanges(t *testing.T) {
	t.Parallel()
	l, path := newLogs(t, Config{}, Warning, "", "3:file:FILE")
	log := l.Logger().With(Category, "locking.lock_daemon")
	check := func(filters string, nf int, outputs string, no int) {
		t.Helper()
		if got, n := l.Filters(); got != filters || n != nf {
			t.Errorf("filters %q, %d, want %q, %d", got, n, filters, nf)
		}
		if got, n := l.Outputs(); got != outputs || n != no {
			t.Errorf("outputs %q, %d, want %q, %d", got, n, outputs, no)
		}
	}
	succeeds := func(err error) {
		t.Helper()
		if err != nil {
			t.Error(err)
		}
	}
	fails := func(err error, want string) {
		t.Helper()
		if err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	def := "3:file:" + path
	check("", 0, def, 1)

	log.Debug("off")
	succeeds(l.SetFilters("1:locking 3:util"))
	check("1:*locking* 3:*util* ", 2, def, 1)
	log.Debug("still off: the output's own level")
	succeeds(l.SetOutputs("1:file:" + path))
	check("1:*locking* 3:*util* ", 2, "1:file:"+path, 1)
	log.Debug("on")
	l.Logger().Debug("other category")
	fails(l.SetFilters("9:foo"), "invalid argument: Invalid priority '9' for filter '9:foo'")
	fails(l.SetOutputs("1:bogus"), "invalid argument: Invalid log destination 'bogus' for log output '1:bogus'")
	fails(l.SetOutputs("2:file:"+path+"2 1:file:/nodir/x"), "failed to open /nodir/x: No such file or directory")
	check("1:*locking* 3:*util* ", 2, "1:file:"+path, 1)
	log.Debug("still on")
	succeeds(l.SetFilters(""))
	log.Debug("off again")
	succeeds(l.SetLevel(Debug))
	log.Debug("on by level")
	succeeds(l.SetOutputs("3:stderr 4:file:" + path + "3"))
	check("", 0, "3:stderr 4:file:"+path+"3", 2)
	log.Error("elsewhere", "to", path)
	flush(t, l) // else what is queued for an output and what comes after its return are in no order
	succeeds(l.SetOutputs(""))
	check("", 0, def, 1)
	log.Warn("back")
	if err := l.Close(t.Context()); err != nil {
		t.Error(err)
	}

	var texts []string
	for _, line := range strings.Split(strings.TrimSpace(read(t, path)), "\n") {
		texts = append(texts, line[strings.LastIndex(line, " : ")+3:])
	}
	version := "libvirt version: 9.0.0, package: ours 1.2"
	// The same file goes on through changes of its level; after it was away it starts anew.
	want := []string{version, "hostname: vm", "on", "still on", "on by level", version, "hostname: vm", "back"}
	if !slices.Equal(texts, want) {
		t.Errorf("got %q, want %q", texts, want)
	}
	if other := read(t, path+"3"); !strings.HasSuffix(other, " : elsewhere: to="+path+"\n") {
		t.Errorf("got %q", other)
	}
}

// A change that comes in the middle of another one isn't lost, and no output is opened in vain.
func TestChangeWithinChange(t *testing.T) {
	t.Parallel()
	l, path := newLogs(t, Config{}, Warning, "", "3:file:FILE")
	first := true
	err := l.change(func(s *Settings) Settings {
		if first {
			first = false
			if err := l.SetFilters("1:x"); err != nil {
				t.Error(err)
			}
		}
		s.Outputs = []Output{{Debug, File, path + "2"}}
		return *s
	})
	if err != nil {
		t.Fatal(err)
	}
	o, _ := l.Outputs()
	f, _ := l.Filters()
	if o != "1:file:"+path+"2" || f != "1:*x* " {
		t.Errorf("got %s and %s", o, f)
	}
	if first {
		t.Error("not called")
	}
}

// A named pipe without a reader, and one that isn't read.
func TestFIFO(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	within(t, "opening", func() {
		_, err := New(Config{}, Settings{Level: Debug, Outputs: []Output{{Debug, File, path}}})
		if !errors.Is(err, syscall.ENXIO) {
			t.Errorf("got %v", err)
		}
	})
	r, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	l, _ := newLogs(t, Config{}, Debug, "", "1:file:"+path)
	within(t, "logging", func() {
		for range 100 {
			logOne(t, l.Logger(), slog.LevelInfo, strings.Repeat("x", maxMessage))
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := l.Close(ctx); err == nil {
		t.Error("nothing was lost")
	}
}

// Everybody logs while settings change all the time: with -race, no line is broken, doubled or lost between two outputs.
func TestConcurrent(t *testing.T) {
	t.Parallel()
	l, path := newLogs(t, Config{}, Info, "", "1:file:FILE")
	const loggers, messages = 4, 500
	var logging, changing sync.WaitGroup
	for g := range loggers {
		logging.Go(func() {
			log := l.Logger().With(Category, fmt.Sprintf("category.%d", g%3))
			for i := range messages {
				log.Error("m", "n", g*messages+i)
				log.Debug("perhaps")
				if i%50 == 0 {
					log = log.With("a", "b")
				}
			}
		})
	}
	done := make(chan struct{})
	for _, change := range []func(i int) error{
		func(i int) error { return l.SetFilters([]string{"", "1:category.1", "4:cat", "x"}[i%3]) },
		func(i int) error { return l.SetLevel(Level(1 + i%4)) },
		func(i int) error {
			return l.SetOutputs([]string{"", "1:file:" + path + "2", "1:file:" + path}[i%3])
		},
		func(int) error { return l.Reopen() },
		func(int) error { l.Outputs(); l.Filters(); return nil },
	} {
		changing.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-done:
					return
				default:
				}
				if err := change(i); err != nil {
					t.Error(err)
					return
				}
				runtime.Gosched()
			}
		})
	}
	logging.Wait()
	close(done)
	changing.Wait()
	if err := l.Close(t.Context()); err != nil {
		t.Error(err)
	}
	seen := map[string]int{}
	for _, name := range []string{path, path + "2"} {
		b, err := os.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		for line := range strings.Lines(string(b)) {
			line = strings.TrimSuffix(line, "\n")
			m := regexp.MustCompile(`^\S+ \S+\+0000: 50: (?:info : (?:libvirt|hostname).*|debug : \S+ : perhaps.*|error : \S+ : m:.* n=(\d+))$`).FindStringSubmatch(line)
			if m == nil {
				t.Fatalf("odd line %q", line)
			}
			if m[1] != "" {
				seen[m[1]]++
			}
		}
	}
	for i := range loggers * messages {
		if n := seen[strconv.Itoa(i)]; n != 1 {
			t.Fatalf("message %d came %d times", i, n)
		}
	}
}
