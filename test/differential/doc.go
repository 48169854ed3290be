// SPDX-License-Identifier: LGPL-2.1-or-later

// Package differential sends the same requests to the C daemon and to ours, each on a host of its own, and compares
// what comes back byte by byte, and what they did: files with their modes and sizes, locks in the kernel, processes
// that live or not. Only scripts whose outcome is meant to be the same are here; what ours does otherwise on purpose
// is in test/vectors and test/weakness.
package differential
