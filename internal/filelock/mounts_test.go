// SPDX-License-Identifier: LGPL-2.1-or-later

package filelock

import (
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const mountinfoSample = `22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
23 22 0:5 / /dev rw,nosuid shared:2 - devtmpfs udev rw,size=1k
24 22 0:21 / /proc rw,nosuid - proc proc rw
30 22 0:40 / /mnt/nfs rw shared:3 master:1 - nfs4 server:/x rw,addr=::1
31 30 254:1 / /mnt/nfs/local rw - xfs /dev/vdb rw
32 22 254:2 / /mnt/with\040space\134\011 rw - ext4 /dev/vdc rw
33 22 0:50 / /mnt/auto rw - autofs systemd-1 rw
34 33 254:3 / /mnt/auto rw - ext4 /dev/vdd rw
35 22 0:51 / /mnt/links rw,nosymfollow - tmpfs tmpfs rw
36 22 0:52 / /mnt/nf rw - fuse.sshfs host: rw
`

func TestMountinfo(t *testing.T) {
	t.Parallel()
	points, err := parseMountinfo([]byte(mountinfoSample))
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		path, mount string
		local       bool
	}{
		{"/", "/", true},
		{"/x", "/", true},
		{"/dev", "/dev", true},
		{"/dev/sda", "/dev", true},
		{"/devel/sda", "/", true},
		{"/proc/self/root/x", "/proc", false},
		{"/mnt/nfs", "/mnt/nfs", false},
		{"/mnt/nfs/disk", "/mnt/nfs", false},
		{"/mnt/nfs/local/disk", "/mnt/nfs", false},
		{"/mnt/nfsx", "/", true},
		{"/mnt/nf/s", "/mnt/nf", false},
		{"/mnt/with space\\\t/disk", "/mnt/with space\\\t", true},
		{"/mnt/auto/disk", "/mnt/auto", false},
		{"/mnt/links/disk", "/mnt/links", false},
	} {
		if mount, local := points.find(test.path); mount != test.mount || local != test.local {
			t.Errorf("%q: mount %q, local %t", test.path, mount, local)
		}
	}
	if mount, local := (mountPoints{"/x": true}).find("/x/y"); local {
		t.Errorf("below a root that isn't listed: mount %q, local %t", mount, local)
	}
	for _, bad := range []string{"\n", "22 1 254:0 / / rw\n", "22 1 254:0 / / rw -\n", "22 1 254:0 / x rw - ext4 x rw\n", "22 1 254:0 /  rw - ext4 x rw\n"} {
		if points, err := parseMountinfo([]byte(bad)); err == nil {
			t.Errorf("%q: %v", bad, points)
		}
	}
}

func FuzzMountinfo(f *testing.F) {
	f.Add([]byte(mountinfoSample))
	f.Add([]byte("1 1 0:1 / /\\1 rw - ext4 x\n1 1 0:1 / /\\400\\08 rw opt - xfs"))
	f.Fuzz(func(t *testing.T, data []byte) {
		points, err := parseMountinfo(data)
		if err != nil {
			return
		}
		for point, here := range points {
			if point == "" || point[0] != '/' {
				t.Fatalf("mount point %q", point)
			}
			mount, local := points.find(point)
			if local && !here {
				t.Errorf("%q is local", point)
			}
			if _, ok := points[mount]; !ok && mount != "/" {
				t.Errorf("%q is on %q, which isn't mounted", point, mount)
			}
		}
	})
}

func TestTidy(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]string{
		"/a": "/a", "/a/b": "/a/b", "//a": "/a", "/./a//b": "/a/b", "/a/./b": "/a/b", "/...": "/...", "/.a/b.": "/.a/b.",
		"/": "", "/a/": "", "/a/.": "", "/..": "", "/a/..": "", "/a/../b": "", "/../a": "", "//": "", "/.": "",
	} {
		if got, ok := tidy(path); got != want || ok != (want != "") {
			t.Errorf("%q: %q, %t", path, got, ok)
		}
	}
}

func FuzzTidy(f *testing.F) {
	f.Add("/a/./b//c")
	f.Fuzz(func(t *testing.T, path string) {
		if path == "" || path[0] != '/' {
			return
		}
		got, ok := tidy(path)
		if !ok {
			return
		}
		if again, ok := tidy(got); !ok || again != got || strings.Contains(got+"/", "//") || strings.Contains(got+"/", "/../") {
			t.Errorf("%q became %q, then %q", path, got, again)
		}
	})
}

func TestMountsAreNoticed(t *testing.T) {
	if !apart(t) {
		return
	}
	f := newFiles(t, Config{})
	dir := t.TempDir()
	find := func(path string) (string, bool) {
		t.Helper()
		points, err := f.mounts.get()
		if err != nil {
			t.Fatal(err)
		}
		return points.find(path)
	}
	for _, name := range []string{"one", "with space", "with\\back\nslash"} {
		point := mkdir(t, dir+"/"+name)
		path := makeFile(t, point+"/disk", "")
		for range 3 {
			if mount, local := find(path); mount == point || !local {
				t.Errorf("%q is on %q, local %t", path, mount, local)
			}
			if err := unix.Mount("test", point, "tmpfs", 0, ""); err != nil {
				t.Fatal(err)
			}
			if mount, local := find(path); mount != point || !local {
				t.Errorf("%q is on %q, local %t", path, mount, local)
			}
			if err := unix.Unmount(point, 0); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mount("proc", point, "proc", 0, ""); err != nil {
				t.Fatal(err)
			}
			if mount, local := find(path); mount != point || local {
				t.Errorf("%q is on %q, local %t", path, mount, local)
			}
			if err := unix.Unmount(point, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestBindMountIsTheSameFile(t *testing.T) {
	if !apart(t) {
		return
	}
	dir := t.TempDir()
	path := makeFile(t, mkdir(t, dir+"/a")+"/disk", "")
	mount(t, dir+"/a", mkdir(t, dir+"/b"), "", unix.MS_BIND, "")
	mount(t, path, makeFile(t, dir+"/c", ""), "", unix.MS_BIND, "")
	f := newFiles(t, Config{})
	l := mustLock(t, f, path, Exclusive, false)
	for _, name := range []string{"/b/disk", "/c"} {
		if _, err := f.Lock(dir+name, Shared, false, nil); err == nil || l.Remote() {
			t.Errorf("%s while it is locked: %v", name, err)
		}
		if id, err := f.Stat(dir + name); id != l.ID() || err != nil {
			t.Errorf("%s is %v, %v; want %v", name, id, err, l.ID())
		}
	}
	mustRelease(t, l, "")
	// Nothing of it stays open.
	for _, point := range []string{dir + "/b", dir + "/c"} {
		if err := unix.Unmount(point, 0); err != nil {
			t.Errorf("unmount %s: %v", point, err)
		}
	}
}

func TestTwoNodesOfOneDisk(t *testing.T) {
	if !apart(t) {
		return
	}
	dir := t.TempDir()
	mount(t, "tmpfs", dir, "tmpfs", 0, "")
	number := newLoop(t, dir)
	f := newFiles(t, Config{})
	for _, node := range []string{"/one", "/two"} {
		if err := unix.Mknod(dir+node, unix.S_IFBLK|0o600, int(number)); err != nil {
			t.Fatal(err)
		}
		want := FileID{Dev: number, Block: true}
		if id, err := f.Stat(dir + node); id != want || err != nil {
			t.Errorf("%s is %v, %v; want %v", node, id, err, want)
		}
		l, err := f.Lock(dir+node, Exclusive, false, nil)
		if err != nil {
			t.Fatal(err)
		}
		if !l.Remote() || l.ID() != want || l.mount != deviceName(number) {
			t.Errorf("%s: remote %t, %v, mount %q", node, l.Remote(), l.ID(), l.mount)
		}
		if _, err := f.Lock(dir+node, Exclusive, true, nil); err == nil {
			t.Errorf("%s was locked twice", node)
		}
		if err := f.Delete(dir+node, func(id FileID) bool { return id == want }); err == nil {
			t.Errorf("%s was deleted", node)
		}
		defer mustRelease(t, l, dir+node) // which removes no device node
	}
}

// newLoop makes a loop device, and returns its number.
func newLoop(t *testing.T, dir string) uint64 {
	t.Helper()
	control, err := unix.Open("/dev/loop-control", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skip(err)
	}
	defer unix.Close(control)
	minor, err := unix.IoctlRetInt(control, unix.LOOP_CTL_GET_FREE)
	if err != nil {
		t.Skip(err)
	}
	makeFile(t, dir+"/image", strings.Repeat("x", 1<<20))
	image, err := unix.Open(dir+"/image", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(image)
	number := unix.Mkdev(7, uint32(minor))
	node := dir + "/node"
	if err := unix.Mknod(node, unix.S_IFBLK|0o600, int(number)); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(node)
	loop, err := unix.Open(node, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skip(err)
	}
	if err := unix.IoctlSetInt(loop, unix.LOOP_SET_FD, image); err != nil {
		unix.Close(loop)
		t.Skip(err)
	}
	t.Cleanup(func() {
		unix.IoctlSetInt(loop, unix.LOOP_CLR_FD, 0)
		unix.Close(loop)
	})
	return number
}
