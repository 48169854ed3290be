// SPDX-License-Identifier: LGPL-2.1-or-later

// Package weakness tests what ours does better than the C daemon: one test or more for each known weakness of
// that one, numbered as in the list of observations of virtlockd 9.0.0. Each of them fails against the C daemon:
//
//	VIRTLOCKD_BINARY=/usr/sbin/virtlockd go test ./test/weakness
package weakness
