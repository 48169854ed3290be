// SPDX-License-Identifier: LGPL-2.1-or-later

package daemon

import (
	"testing"

	"golang.org/x/sys/unix"
)

// A reply that nobody has read is known to be sent, but not one of which this may be only a part.
func TestUnread(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		sent int
		read int
		want bool
	}{
		{"nothing", 0, 0, false},
		{"a success", 28, 0, true},
		{"an error", 300, 0, true},
		{"an error that was read", 300, 300, false},
		{"an error that was read in part", 300, 20, true},
		{"as much as fits", 1 << 20, 0, false},
		{"a long one that was read in part", 30 << 10, 29 << 10, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(pair[0])
			defer unix.Close(pair[1])
			if tt.sent > 0 {
				if _, err := unix.Write(pair[0], make([]byte, tt.sent)); err != nil {
					t.Fatal(err)
				}
			}
			if tt.read > 0 {
				if n, err := unix.Read(pair[1], make([]byte, tt.read)); err != nil || n != tt.read {
					t.Fatalf("read %d, %v", n, err)
				}
			}
			if got := unread(pair[0]); got != tt.want {
				t.Errorf("got %v", got)
			}
		})
	}
}
