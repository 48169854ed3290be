# SPDX-License-Identifier: LGPL-2.1-or-later
#
# make build     static binaries in bin/
# make demo      two hosts, real libvirtd and QEMU, in private namespaces (root, Debian 12)
# make test      install what the tests need, then all tests (root, Debian 12)
# make storm     a thousand live upgrades under load, some minutes
# make kills     five thousand kills under load, with a keeper and under systemd, half an hour
# make soak      a million pairs, after which nothing is left over
# make bench     our daemon, the C one and a bare server side by side (root); FULL=1 for all rows, BENCH=-help for options
# make fuzz      each fuzz test, FUZZTIME runs
# make lint      gofmt, go vet, staticcheck
# make install   into DESTDIR

# The libvirt release whose behaviour we speak; virt-admin and --version say it.
LIBVIRT_VERSION ?= 9.0.0
VERSION ?= 0.1.0
COMMIT ?= $(shell git rev-parse --short=12 HEAD 2>/dev/null)

PREFIX ?= /usr
SBINDIR ?= $(PREFIX)/sbin
MANDIR ?= $(PREFIX)/share/man
BASHDIR ?= $(PREFIX)/share/bash-completion/completions
ZSHDIR ?= $(PREFIX)/share/zsh/site-functions
FISHDIR ?= $(PREFIX)/share/fish/vendor_completions.d
DATADIR ?= $(PREFIX)/share/virtlockd
UNITDIR ?= $(PREFIX)/lib/systemd/system
SYSCONFDIR ?= /etc
RUNSTATEDIR ?= /run
LOCALSTATEDIR ?= /var
DESTDIR ?=

GO ?= go
# A number of runs, not a time: at the end of a time "go test" sometimes fails with "context deadline exceeded".
FUZZTIME ?= 100000x
TESTFLAGS ?=

INFO = virtlockd/internal/buildinfo
LDFLAGS = -s -w \
	-X $(INFO).LibvirtVersion=$(LIBVIRT_VERSION) \
	-X $(INFO).Version=$(VERSION) \
	-X $(INFO).Commit=$(COMMIT) \
	-X $(INFO).Sysconfdir=$(SYSCONFDIR) \
	-X $(INFO).Runstatedir=$(RUNSTATEDIR) \
	-X $(INFO).Localstatedir=$(LOCALSTATEDIR)
BIN = bin/virtlockd
CTL = bin/virtlockctl
BUILD = CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '$(LDFLAGS)'

# The tests of the whole daemon build it themselves, which the cache of test results does not see: -count=1.
# The race detector watches the packages whose code runs in the test's own process; the tests of the
# whole daemon run the real binary.
RACED = ./cmd/... ./internal/...
UNITS = virtlockd.service virtlockd.socket virtlockd-admin.socket virtlockctl-exporter.service
COMPLETION = cmd/virtlockctl/completion

.PHONY: all build demo test storm kills soak bench fuzz lint install setup clean

all: build

build:
	$(BUILD) -o bin/ ./cmd/...

setup:
	test/setup

demo: build
	test/demo/run

test: setup build
	$(GO) test -race -timeout 10m $(TESTFLAGS) $(RACED)
	$(GO) test -count=1 -timeout 15m $(TESTFLAGS) $$($(GO) list ./... | grep -vE '^virtlockd/(cmd|internal)(/|$$)')

storm: setup
	UPGRADES=1000 $(GO) test -count=1 -v -timeout 30m -run '^TestStorm$$' ./test/upgrade

kills: setup
	KILLS=5000 $(GO) test -count=1 -v -timeout 90m -run '^TestKillStorm$$' ./test/upgrade ./test/systemd

soak: setup
	SOAK=1000000 $(GO) test -count=1 -v -timeout 30m -run '^TestSoak$$' ./test/upgrade

bench: build
	CGO_ENABLED=0 $(GO) build -o bin/bench ./bench
	bin/bench -ours $(BIN) -json bin/bench.json -svg bin/bench.svg $(if $(FULL),-full) $(BENCH)

# One fuzz test at a time is all that "go test -fuzz" takes.
fuzz:
	set -e; for pkg in $$($(GO) list ./...); do \
		for name in $$($(GO) test -list '^Fuzz' $$pkg | grep '^Fuzz' || true); do \
			echo "$$pkg $$name"; \
			$(GO) test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x $$pkg; \
		done; \
	done

lint:
	test -z "$$(gofmt -l . | tee /dev/stderr)"
	$(GO) vet ./...
	$(GO) build -C tools -o ../bin/tools/ honnef.co/go/tools/cmd/staticcheck
	bin/tools/staticcheck ./...

install: build
	install -D -m 0755 $(BIN) '$(DESTDIR)$(SBINDIR)/virtlockd'
	install -D -m 0755 $(CTL) '$(DESTDIR)$(SBINDIR)/virtlockctl'
	install -D -m 0644 man/virtlockd.8 '$(DESTDIR)$(MANDIR)/man8/virtlockd.8'
	install -D -m 0644 man/virtlockctl.8 '$(DESTDIR)$(MANDIR)/man8/virtlockctl.8'
	install -D -m 0644 $(COMPLETION)/virtlockctl.bash '$(DESTDIR)$(BASHDIR)/virtlockctl'
	install -D -m 0644 $(COMPLETION)/_virtlockctl '$(DESTDIR)$(ZSHDIR)/_virtlockctl'
	install -D -m 0644 $(COMPLETION)/virtlockctl.fish '$(DESTDIR)$(FISHDIR)/virtlockctl.fish'
	install -D -m 0644 packaging/grafana/virtlockd.json '$(DESTDIR)$(DATADIR)/grafana/virtlockd.json'
	install -D -m 0644 packaging/prometheus/virtlockd.rules.yaml '$(DESTDIR)$(DATADIR)/prometheus/virtlockd.rules.yaml'
	test -e '$(DESTDIR)$(SYSCONFDIR)/libvirt/virtlockd.conf' || \
		install -D -m 0644 packaging/virtlockd.conf '$(DESTDIR)$(SYSCONFDIR)/libvirt/virtlockd.conf'
	install -d '$(DESTDIR)$(UNITDIR)' '$(DESTDIR)$(LOCALSTATEDIR)/log/libvirt'
	for unit in $(UNITS); do \
		sed -e 's|@SBINDIR@|$(SBINDIR)|g' -e 's|@SYSCONFDIR@|$(SYSCONFDIR)|g' -e 's|@RUNSTATEDIR@|$(RUNSTATEDIR)|g' \
			packaging/systemd/$$unit.in > '$(DESTDIR)$(UNITDIR)'/$$unit || exit 1; \
		chmod 0644 '$(DESTDIR)$(UNITDIR)'/$$unit; \
	done

clean:
	rm -rf bin
