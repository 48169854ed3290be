// SPDX-License-Identifier: LGPL-2.1-or-later

// Package strerror gives errno texts as the C library words them, because
// they are part of error messages that clients of the lock protocol see.
package strerror

import (
	"syscall"
	"unicode"
)

// Text is what strerror(3) of glibc returns in the C locale. Go's own table has
// the same texts with the first letter in lower case where a word follows.
func Text(errno syscall.Errno) string {
	s := []rune(errno.Error())
	s[0] = unicode.ToUpper(s[0])
	return string(s)
}
