// SPDX-License-Identifier: LGPL-2.1-or-later

package strerror

import (
	"syscall"
	"testing"
)

func TestText(t *testing.T) {
	for errno, want := range map[syscall.Errno]string{
		syscall.ENOENT:       "No such file or directory",
		syscall.EISDIR:       "Is a directory",
		syscall.ENAMETOOLONG: "File name too long",
		syscall.EACCES:       "Permission denied",
		syscall.EIO:          "Input/output error",
		syscall.EUNATCH:      "Protocol driver not attached",
		syscall.ERESTART:     "Interrupted system call should be restarted",
	} {
		if got := Text(errno); got != want {
			t.Errorf("Text(%d) = %q, want %q", int(errno), got, want)
		}
	}
}
