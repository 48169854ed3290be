// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestReport(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 2*maxReport)
	for _, tt := range []struct {
		name string
		send func(r *reporter)
		code int    // 0: it serves
		text string // prefix
	}{
		{"it serves", func(r *reporter) { r.report(0, "") }, 0, ""},
		{"a reason", func(r *reporter) { r.report(6, "no socket") }, 6, "no socket"},
		{"the first report counts", func(r *reporter) { r.report(2, "first"); r.report(0, "") }, 2, "first"},
		{"it died", func(r *reporter) { unix.Close(r.fd) }, 1, "the daemon ended before it served clients"},
		{"a long reason", func(r *reporter) { r.report(1, long) }, 1, long[:1000]},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var pipe [2]int
			if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
				t.Fatal(err)
			}
			in := os.NewFile(uintptr(pipe[0]), "pipe")
			defer in.Close()
			go tt.send(&reporter{pipe[1]})
			err := awaitReport(in)
			if tt.code == 0 {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil || exitCode(err) != tt.code || !strings.HasPrefix(err.Error(), tt.text) {
				t.Errorf("%v; want code %d, %.100s", err, tt.code, tt.text)
			}
		})
	}
	// Nobody waits.
	(*reporter)(nil).report(0, "")
}

// A mark that strayed into the environment is removed and means nothing.
func TestDetachStage(t *testing.T) {
	for _, mark := range []string{"", "1", "1:3", "2:0:0", "2:-1:0", "3:3:0", "x:y:z", "2:999999:0", "2:" + openNull(t) + ":0"} {
		t.Setenv(envDetach, mark)
		if stage, r := detachStage(); stage != 0 || r != nil {
			t.Errorf("%q: stage %d, %v", mark, stage, r)
		}
		if _, ok := os.LookupEnv(envDetach); ok {
			t.Errorf("%q: still there", mark)
		}
	}
}

// openNull returns the number of a descriptor that is no pipe.
func openNull(t *testing.T) string {
	f, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	dup, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 100)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(dup) })
	return strconv.Itoa(dup)
}
