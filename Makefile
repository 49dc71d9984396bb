# Husk: build, test, install. `make` alone lists the targets.

SHELL := /bin/sh
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PREFIX ?= /usr/local
DESTDIR ?=
FUZZTIME ?= 30s
# The newest containerd that Husk is tested with, beside Debian's.
CONTAINERD_VERSION ?= v2.4.2

BUILD := build
BIN := $(BUILD)/bin
GUEST := $(BUILD)/guest
# Lies to bin as it does where it is installed, which is how it is found.
LIB := $(BUILD)/lib/husk
CONTAINERD := $(BUILD)/containerd-2.4
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
COMMIT ?= $(shell git rev-parse --short=12 HEAD 2>/dev/null)
VERSION_PACKAGE := github.com/husk-containers/husk/internal/version
LDFLAGS := -s -w -X $(VERSION_PACKAGE).version=$(VERSION) -X $(VERSION_PACKAGE).commit=$(COMMIT)
GO_BUILD := CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)'
SUITE := go run ./test/suite

.PHONY: help
help: ## list the targets
	@echo 'Usage: make TARGET [VARIABLE=VALUE]...'
	@echo
	@sed -n 's/^\([a-z0-9.-]*\):.*## \(.*\)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  %-16s %s\n' "$$name" "$$text"; done
	@echo
	@echo 'Variables: PREFIX ($(PREFIX)), DESTDIR, FUZZTIME ($(FUZZTIME)), CONTAINERD_VERSION ($(CONTAINERD_VERSION))'

.PHONY: deps
deps: ## install the Debian packages that are missing
	@scripts/install-deps run build test

.PHONY: build
build: ## build shim, operator's tool and agent into build/bin
	@mkdir -p $(BIN)
	$(GO_BUILD) -o $(BIN)/ ./cmd/containerd-shim-husk-v2 ./cmd/husk ./cmd/husk-agent

# See docs/decisions/026-virtiofsd-preload.md.
$(LIB)/virtiofsd-preload.so: hypervisor/virtiofs/preload/open.c
	@mkdir -p $(LIB)
	gcc -std=gnu11 -O2 -Wall -Wextra -Werror -U_FORTIFY_SOURCE -fPIC -shared -s -Wl,-z,relro,-z,now -o $@ $<

.PHONY: guest
guest: build $(LIB)/virtiofsd-preload.so ## assemble the guest's kernel and image into build/guest
	@mkdir -p $(GUEST)
	guest/build-crun.sh $(GUEST)/crun
	@set -e; kernel=$$(ls /boot/vmlinuz-*-cloud-amd64 2>/dev/null | sort -V | tail -n 1); \
	test -n "$$kernel" || { echo 'make: no cloud kernel in /boot; make deps installs one' >&2; exit 1; }; \
	echo "guest kernel: $$kernel"; \
	cmp -s "$$kernel" $(GUEST)/vmlinuz || cp "$$kernel" $(GUEST)/vmlinuz; \
	go run ./guest/mkinitrd -agent $(BIN)/husk-agent -crun $(GUEST)/crun -kernel-release "$${kernel#/boot/vmlinuz-}" -o $(GUEST)/initrd.img

.PHONY: containerd-2.4
containerd-2.4: $(CONTAINERD)/$(CONTAINERD_VERSION) ## build the newest containerd to test with

# One directory per make target, one stamp per version in it. The module is
# built by its own go.mod, not by ours.
$(CONTAINERD)/$(CONTAINERD_VERSION):
	@mkdir -p $(CONTAINERD)
	CGO_ENABLED=0 GOBIN=$(abspath $(CONTAINERD)) go install -trimpath -tags no_btrfs -ldflags '-s -w' \
		github.com/containerd/containerd/v2/cmd/containerd@$(CONTAINERD_VERSION) \
		github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2@$(CONTAINERD_VERSION) \
		github.com/containerd/containerd/v2/cmd/ctr@$(CONTAINERD_VERSION)
	@touch $@

.PHONY: demo
demo: deps build guest ## run a container in a micro-VM, from nothing
	@go run ./test/demo

.PHONY: test
test: deps build guest containerd-2.4 ## run every test this machine can run
	@$(SUITE) unit e2e cri rig

.PHONY: unit
unit: ## run the tests that need neither root nor QEMU
	@$(SUITE) unit

.PHONY: e2e
e2e: deps build guest containerd-2.4 ## run the end-to-end tests on both containerds
	@$(SUITE) e2e cri

.PHONY: smoke
smoke: deps build guest containerd-2.4 ## run the unit tests and the main end-to-end tests, in less than ten minutes
	@$(SUITE) unit smoke

.PHONY: rig
rig: deps build guest containerd-2.4 ## run the end-to-end tests, or CMD, in a host in a box with KVM, vhost and cgroup v2
ifdef CMD
	@CGO_ENABLED=0 go build -o $(BIN)/ ./test/rig
	@CGO_ENABLED=0 go build -o $(BIN)/rig-init ./test/rig/init
	@$(BIN)/rig -init $(BIN)/rig-init -- sh -c '$(subst ','\'',$(CMD))'
else
	@$(SUITE) rig
endif

.PHONY: bench
bench: deps build guest ## measure, and print the tables of docs/numbers.md
	@CGO_ENABLED=0 go build -o $(BIN)/bench ./test/bench
	@CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o $(BIN)/bench-peer ./test/bench/peer
	@CGO_ENABLED=0 go build -C test/cri -o $(abspath $(BIN))/bench-pods ./bench
	@$(BIN)/bench
	@$(BIN)/bench-pods
	@$(MAKE) --no-print-directory bench-resources bench-files

# FLAGS are the program's: -only reclaim measures that part alone.
.PHONY: bench-resources
bench-resources: deps build guest ## measure memory, resizes, reclaim, statistics and pauses alone, with FLAGS
	@CGO_ENABLED=0 go build -C test/cri -o $(abspath $(BIN))/bench-resources ./bench/resources
	@$(BIN)/bench-resources $(FLAGS)

# FLAGS are the program's: -matrix compares the ways to run virtiofsd, for hours but
# with loads as small as those of decision 022.
.PHONY: bench-files
bench-files: deps build guest ## measure files and sockets alone, with FLAGS
	@test/bench/build-fio.sh $(BIN)/fio
	@CGO_ENABLED=0 go build -o $(BIN)/bench-files ./test/bench/files
	@CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o $(BIN)/bench-load ./test/bench/load
	@$(BIN)/bench-files $(FLAGS)

.PHONY: fuzz
fuzz: ## fuzz every target for FUZZTIME
	@set -e; for package in $$(go list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}}{{end}}' ./...); do \
		for target in $$(go test -list '^Fuzz' $$package | grep '^Fuzz' || true); do \
			echo "fuzz $$package $$target"; \
			go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) $$package; \
		done; \
	done

SHELL_SCRIPTS = $(shell grep -rlE '^#!/bin/(ba)?sh' scripts guest test deploy .ci 2>/dev/null)

.PHONY: lint
lint: ## check format, vet, staticcheck and shell syntax
	@unformatted=$$(go tool gofumpt -l .); \
	test -z "$$unformatted" || { echo "not formatted; go tool gofumpt -w these:" >&2; echo "$$unformatted" >&2; exit 1; }
	go vet ./...
	go vet -C test/cri ./...
	go tool staticcheck ./...
	@for script in $(SHELL_SCRIPTS); do sh -n $$script || exit 1; done

.PHONY: generate
generate: ## generate code and pages from their sources
	@scripts/install-deps generate
	go generate ./...

.PHONY: install
install: ## install programs, guest, configuration and containerd drop-in
	@for file in $(addprefix $(BIN)/,containerd-shim-husk-v2 husk) $(addprefix $(GUEST)/,vmlinuz initrd.img) $(LIB)/virtiofsd-preload.so; do \
		test -e $$file || { echo "make: $$file is missing; first run make guest" >&2; exit 1; }; done
	install -d $(addprefix $(DESTDIR)$(PREFIX)/,bin lib/husk share/husk) $(DESTDIR)/etc/husk $(DESTDIR)/etc/containerd/conf.d
	install -m 755 $(BIN)/containerd-shim-husk-v2 $(BIN)/husk $(DESTDIR)$(PREFIX)/bin/
	install -m 644 $(LIB)/virtiofsd-preload.so $(DESTDIR)$(PREFIX)/lib/husk/
	install -m 644 $(GUEST)/vmlinuz $(GUEST)/initrd.img $(DESTDIR)$(PREFIX)/share/husk/
	sed 's|"/usr/share/husk/|"$(PREFIX)/share/husk/|' configuration.toml > $(BUILD)/configuration.toml
	install -m 644 $(BUILD)/configuration.toml $(DESTDIR)/etc/husk/configuration.toml.new
	@# An operator's changes stay: the new default then lies beside them.
	@cd $(DESTDIR)/etc/husk && if [ ! -e configuration.toml ] || cmp -s configuration.toml configuration.toml.new; then \
		mv configuration.toml.new configuration.toml; \
	else echo "kept /etc/husk/configuration.toml; the new default is configuration.toml.new"; fi
	install -m 644 deploy/containerd/husk.toml $(DESTDIR)/etc/containerd/conf.d/

.PHONY: uninstall
uninstall: ## take away all that install put in place
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/bin/,containerd-shim-husk-v2 husk)
	rm -f $(DESTDIR)/etc/containerd/conf.d/husk.toml
	rm -rf $(DESTDIR)$(PREFIX)/lib/husk $(DESTDIR)$(PREFIX)/share/husk $(DESTDIR)/etc/husk
	@for dir in /etc/containerd/conf.d /etc/containerd $(PREFIX)/bin $(PREFIX)/lib $(PREFIX)/share; do rmdir $(DESTDIR)$$dir 2>/dev/null || true; done

.PHONY: clean
clean: ## remove what was built
	rm -rf $(BUILD)
