// SPDX-License-Identifier: LGPL-2.1-or-later

package rundir

import (
	"path/filepath"
	"testing"
)

func TestFind(t *testing.T) {
	t.Parallel()
	here, err := filepath.Abs("x")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		uid  int
		env  map[string]string
		want string // "": an error
	}{
		{"root", 0, map[string]string{"XDG_RUNTIME_DIR": "/x", "HOME": "/h"}, "/run/libvirt"},
		{"session", 1000, map[string]string{"XDG_RUNTIME_DIR": "/x", "HOME": "/h"}, "/x/libvirt"},
		{"relative", 1000, map[string]string{"XDG_RUNTIME_DIR": "x"}, here + "/libvirt"},
		{"no session", 1000, map[string]string{"XDG_CACHE_HOME": "/c", "HOME": "/h"}, "/c/libvirt"},
		{"home only", 1000, map[string]string{"HOME": "/h"}, "/h/.cache/libvirt"},
		{"nothing", 0x70000001, nil, ""},
	} {
		got, err := Find(c.uid, func(name string) string { return c.env[name] })
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%s: %q, %v, want %q", c.name, got, err, c.want)
		}
	}
}
