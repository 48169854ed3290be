// SPDX-License-Identifier: LGPL-2.1-or-later

package buildinfo

import "testing"

func TestLibvirtNumber(t *testing.T) {
	defer func(v string) { LibvirtVersion = v }(LibvirtVersion)
	for _, tt := range []struct {
		in   string
		want uint64
		ok   bool
	}{
		{"9.0.0", 9000000, true},
		{"10.3.12", 10003012, true},
		{"9.0", 0, false},
		{"9.0.0.1", 0, false},
		{"9.0.x", 0, false},
		{"9.0.1000", 0, false},
		{"", 0, false},
	} {
		LibvirtVersion = tt.in
		got, err := LibvirtNumber()
		if (err == nil) != tt.ok || got != tt.want {
			t.Errorf("%q: got %d, %v; want %d, ok %v", tt.in, got, err, tt.want, tt.ok)
		}
	}
}
