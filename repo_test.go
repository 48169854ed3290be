// SPDX-License-Identifier: LGPL-2.1-or-later

// Package repository holds no code, only tests of the rules that all of it follows.
package repository

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// sources calls f with the path and the content of each file that is ours to write.
func sources(t *testing.T, f func(name string, content []byte)) {
	t.Helper()
	err := filepath.WalkDir(".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			switch {
			case name == ".ci" || name == ".":
				return nil
			case strings.HasPrefix(d.Name(), "."), d.Name() == "bin", d.Name() == "testdata":
				return fs.SkipDir
			}
			return nil
		}
		if !d.Type().IsRegular() {
			return nil
		}
		content, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		f(name, content)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// isCode tells whether a file is one that needs a license line.
func isCode(name string, content []byte) bool {
	switch path.Ext(name) {
	case ".go", ".sh", ".py", ".yaml", ".yml", ".8", ".in":
		return true
	}
	return path.Base(name) == "Makefile" || bytes.HasPrefix(content, []byte("#!"))
}

func TestLicense(t *testing.T) {
	t.Parallel()
	n := 0
	sources(t, func(name string, content []byte) {
		if !isCode(name, content) {
			return
		}
		n++
		// On the first line, or on the second one of a script.
		lines := bytes.SplitN(content, []byte("\n"), 3)
		if bytes.HasPrefix(content, []byte("#!")) {
			lines = lines[1:]
		}
		if !bytes.Contains(lines[0], []byte("SPDX-License-Identifier: LGPL-2.1-or-later")) {
			t.Errorf("%s: no SPDX-License-Identifier where it belongs", name)
		}
	})
	if n < 20 {
		t.Errorf("only %d files were looked at", n)
	}
}

func TestPackageComments(t *testing.T) {
	t.Parallel()
	has, names := map[string]bool{}, map[string]string{}
	sources(t, func(name string, content []byte) {
		if path.Ext(name) != ".go" {
			return
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, content, parser.PackageClauseOnly|parser.ParseComments)
		if err != nil {
			t.Error(err)
			return
		}
		if strings.HasSuffix(name, "_test.go") && strings.HasSuffix(file.Name.Name, "_test") {
			return
		}
		dir := path.Dir(name)
		names[dir] = file.Name.Name
		has[dir] = has[dir] || commented(file)
	})
	for dir, name := range names {
		if !has[dir] && !onlyTests(t, dir) {
			t.Errorf("%s: package %s has no comment that says what it is for", dir, name)
		}
		switch name {
		case "util", "utils", "common", "helpers", "misc":
			t.Errorf("%s: package %s: the name says nothing", dir, name)
		}
	}
}

// commented tells whether a file documents its package in the usual form.
func commented(file *ast.File) bool {
	if file.Doc == nil {
		return false
	}
	text := file.Doc.Text()
	return strings.HasPrefix(text, "Package "+file.Name.Name+" ") || file.Name.Name == "main" && len(text) > 0
}

// onlyTests tells whether a directory holds nothing but tests.
func onlyTests(t *testing.T, dir string) bool {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if !strings.HasSuffix(name, "_test.go") {
			return false
		}
	}
	return true
}

// A replaced module is one that nobody else builds with.
func TestNoReplaceDirectives(t *testing.T) {
	t.Parallel()
	sources(t, func(name string, content []byte) {
		if path.Base(name) == "go.mod" && (bytes.Contains(content, []byte("\nreplace ")) || bytes.Contains(content, []byte("=>"))) {
			t.Errorf("%s has a replace directive", name)
		}
	})
}

// TestDaemonImports keeps the daemon lean: it runs on every host, as root, for years.
func TestDaemonImports(t *testing.T) {
	t.Parallel()
	forbidden := []struct{ prefix, reason string }{
		{"net/http", "adds 3 MB and a parser of hostile input; nothing in the daemon speaks HTTP"},
		{"crypto/tls", "adds 2 MB and state that no unix socket needs"},
		{"crypto/x509", "comes with TLS and reads the host's certificates"},
		{"net", "its poller, resolver and deadlines are a second event loop beside internal/poll, which owns all descriptors"},
		{"encoding/gob", "decodes by reflection what it is told to; the wire has its own codec"},
		{"encoding/xml", "libvirt's XML is none of the daemon's business"},
		{"html/template", "pulls in much for nothing"},
		{"text/template", "keeps every exported method in the binary, which the linker could drop otherwise"},
		{"database/sql", "the daemon keeps no database"},
		{"expvar", "starts an HTTP handler"},
		{"plugin", "code that nobody has reviewed"},
		{"flag", "is not getopt_long; see internal/cmdline"},
		{"testing", "test code in the daemon"},
		{"google.golang.org/grpc", "belongs to the cluster's helper process: 77 modules"},
		{"google.golang.org/protobuf", "comes with gRPC"},
		{"github.com/golang/protobuf", "comes with gRPC"},
		{"github.com/prometheus", "metrics have an exporter process of their own: 32 modules"},
		{"go.etcd.io", "the etcd client lives in a helper process that is started only where it is configured"},
		{"github.com/coreos/go-systemd/v22/activation", "pulls in crypto/tls; see internal/systemd"},
		{"github.com/coreos/go-systemd/v22/dbus", "a D-Bus client is a second protocol that runs as root"},
		{"github.com/hanwen/go-fuse", "is for tests of hung disks"},
		{"github.com/spf13", "a command line framework for seven options"},
		{"golang.org/x/net", "as net/http"},
		{"pgregory.net/rapid", "is for tests"},
		{"C", "the binary is static and runs without the host's libraries"},
		{"virtlockd/test", "test code in the daemon"},
	}
	cmd := exec.Command("go", "list", "-deps", "./cmd/virtlockd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	deps := strings.Fields(string(out))
	if len(deps) < 50 {
		t.Fatalf("go list names only %d packages", len(deps))
	}
	for _, dep := range deps {
		for _, f := range forbidden {
			if dep == f.prefix || strings.HasPrefix(dep, f.prefix+"/") && f.prefix != "net" && f.prefix != "C" {
				t.Errorf("the daemon imports %s: %s", dep, f.reason)
			}
		}
	}
}

var placeholder = regexp.MustCompile(`@[A-Z]+@`)

// Units are installed with the paths of the build; a placeholder that nobody replaces would end up in them.
func TestUnits(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	cmd := exec.Command("make", "-s", "install", "DESTDIR="+dir, "SBINDIR=/opt/sbin", "SYSCONFDIR=/opt/etc", "RUNSTATEDIR=/opt/run", "LOCALSTATEDIR=/opt/var")
	// The binary that other tests may be running is left alone.
	cmd.Args = append(cmd.Args, "BUILD=true", "BIN=/bin/true", "CTL=/bin/true")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	units := filepath.Join(dir, "usr/lib/systemd/system")
	for name, wants := range map[string][]string{
		"virtlockd.service": {"ExecStart=/opt/sbin/virtlockd ", "EnvironmentFile=-/opt/etc/default/virtlockd", "Type=notify", "KillMode=process",
			"OOMPolicy=continue", "LimitNOFILE=1024:524288", "Restart=always", "RestartSec=100ms", "StartLimitIntervalSec=0", "NotifyAccess=main"},
		"virtlockd.socket":       {"ListenStream=/opt/run/libvirt/virtlockd-sock", "TriggerLimitIntervalSec=0", "SocketMode=0600"},
		"virtlockd-admin.socket": {"ListenStream=/opt/run/libvirt/virtlockd-admin-sock", "TriggerLimitIntervalSec=0", "SocketMode=0600", "Service=virtlockd.service"},
		"virtlockctl-exporter.service": {"ExecStart=/opt/sbin/virtlockctl exporter ", "EnvironmentFile=-/opt/etc/default/virtlockctl-exporter",
			"CapabilityBoundingSet=", "NoNewPrivileges=yes", "ProtectSystem=strict"},
	} {
		content, err := os.ReadFile(filepath.Join(units, name))
		if err != nil {
			t.Error(err)
			continue
		}
		if placeholder.Match(content) {
			t.Errorf("%s: a placeholder is left\n%s", name, content)
		}
		for _, want := range wants {
			if !strings.Contains(string(content), "\n"+want) {
				t.Errorf("%s: no %s", name, want)
			}
		}
		// Images and leases may be anywhere, and what such a setting filters would be inherited by
		// the C daemon that a host goes back to.
		if name == "virtlockctl-exporter.service" {
			continue
		}
		for _, sandbox := range []string{"ProtectSystem", "ProtectHome", "PrivateTmp", "PrivateDevices", "DevicePolicy", "ProtectClock", "SystemCallFilter"} {
			if strings.Contains(string(content), "\n"+sandbox+"=") {
				t.Errorf("%s: %s= keeps the daemon from images", name, sandbox)
			}
		}
	}
	for _, name := range []string{"opt/sbin/virtlockd", "opt/sbin/virtlockctl", "usr/share/man/man8/virtlockd.8", "usr/share/man/man8/virtlockctl.8",
		"usr/share/bash-completion/completions/virtlockctl", "usr/share/zsh/site-functions/_virtlockctl",
		"usr/share/fish/vendor_completions.d/virtlockctl.fish", "usr/share/virtlockd/grafana/virtlockd.json",
		"usr/share/virtlockd/prometheus/virtlockd.rules.yaml", "opt/etc/libvirt/virtlockd.conf", "opt/var/log/libvirt"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
	// An administrator's configuration isn't overwritten.
	conf := filepath.Join(dir, "opt/etc/libvirt/virtlockd.conf")
	if err := os.WriteFile(conf, []byte("# mine\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("make", cmd.Args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if content, err := os.ReadFile(conf); err != nil || string(content) != "# mine\n" {
		t.Errorf("the configuration is now %q, %v", content, err)
	}
}

// The units are what systemd takes for units.
func TestUnitsAreValid(t *testing.T) {
	t.Parallel()
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("no systemd-analyze: test/setup installs it")
	}
	dir := t.TempDir()
	if out, err := exec.Command("make", "-s", "install", "BUILD=true", "BIN=/bin/true", "CTL=/bin/true", "PREFIX="+dir, "SBINDIR="+dir+"/sbin", "MANDIR="+dir+"/man",
		"UNITDIR="+dir+"/units", "SYSCONFDIR="+dir+"/etc", "LOCALSTATEDIR="+dir+"/var").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	cmd := exec.Command(analyze, "verify", "--man=no", dir+"/units/virtlockd.service", dir+"/units/virtlockctl-exporter.service")
	cmd.Env = append(os.Environ(), "SYSTEMD_UNIT_PATH="+dir+"/units:/lib/systemd/system")
	out, err := cmd.CombinedOutput()
	for line := range bytes.Lines(out) {
		// systemd before 254 ignores it, as it says.
		if bytes.Contains(line, []byte("virtlock")) && !bytes.Contains(line, []byte("Unknown key 'FileDescriptorStorePreserve'")) {
			t.Errorf("%s", line)
		}
	}
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// Each difference to the C daemon is asserted by tests, and the list names them.
func TestDifferencesNameTests(t *testing.T) {
	tests := map[string]bool{}
	sources(t, func(name string, content []byte) {
		if !strings.HasSuffix(name, "_test.go") {
			return
		}
		for line := range bytes.Lines(content) {
			if rest, ok := bytes.CutPrefix(line, []byte("func Test")); ok {
				name, _, _ := bytes.Cut(rest, []byte("("))
				tests["Test"+string(name)] = true
			}
		}
	})
	doc, err := os.ReadFile("docs/differences.md")
	if err != nil {
		t.Fatal(err)
	}
	listed := 0
	for line := range strings.Lines(string(doc)) {
		if !strings.HasPrefix(line, "| D-") {
			continue
		}
		cells := strings.Split(strings.TrimSuffix(strings.TrimSpace(line), "|"), "|")
		id, named := strings.TrimSpace(cells[1]), strings.Split(cells[len(cells)-1], "`")
		if len(named) < 3 {
			t.Errorf("%s names no test", id)
		}
		for i := 1; i < len(named); i += 2 {
			listed++
			if !tests[named[i]] {
				t.Errorf("%s: there is no test %s", id, named[i])
			}
		}
	}
	if listed == 0 {
		t.Error("the list of differences was not understood")
	}
}

// The wire's description has each procedure of the inspection programs under its number.
func TestProtocolHasProcedures(t *testing.T) {
	t.Parallel()
	source, err := os.ReadFile("internal/inspect/inspect.go")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile("docs/protocol.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(doc), "\n## Inspection programs")
	section, _, _ = strings.Cut(section, "\n## ")
	var want, got []string
	for _, m := range regexp.MustCompile(`(?m)^\tProc(\w+) += (\d+)`).FindAllStringSubmatch(string(source), -1) {
		want = append(want, m[2]+" "+strings.ToUpper(m[1]))
	}
	for _, m := range regexp.MustCompile(`(?m)^\|[^|]*\| (\d+) \| ([A-Z_]+) \|`).FindAllStringSubmatch(section, -1) {
		got = append(got, m[1]+" "+strings.ReplaceAll(m[2], "_", ""))
	}
	if len(want) == 0 || !slices.Equal(got, want) {
		t.Errorf("docs/protocol.md has the procedures %q, and they are %q", got, want)
	}
}
