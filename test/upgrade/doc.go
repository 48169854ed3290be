// SPDX-License-Identifier: LGPL-2.1-or-later

// Package upgrade holds the tests of the live upgrade: the running daemon is replaced on SIGUSR1, by ours or by the C
// daemon, and nobody loses anything. They run the real binaries on private hosts and look at them from outside.
package upgrade
