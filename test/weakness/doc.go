// SPDX-License-Identifier: LGPL-2.1-or-later

// Package weakness tests what ours does better than the C daemon: one test or more for each known weakness of
// that one, numbered as in the list of observations of virtlockd 9.0.0. They are proven to be able to fail by
// running them against it:
//
//	VIRTLOCKD_BINARY=/usr/sbin/virtlockd go test ./test/weakness
//
// A few pass there, too: TestW07NextOwner and TestW04DeadOwnersOtherLocks, since nobody is served before the owner
// is gone; TestW19DeafClient; TestW21StaleSockets.
package weakness
