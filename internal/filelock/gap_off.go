// SPDX-License-Identifier: LGPL-2.1-or-later

//go:build !gap

package filelock

// gap is for a test of a test: see gap_on.go.
func (*Lock) gap() {}
