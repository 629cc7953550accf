# Every command that a person or CI runs. `make help` lists them.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VERSION := $(shell cat VERSION)
COMMIT := $(shell git rev-parse --short HEAD 2>/dev/null || echo unknown)

# Set to true for a release: the tree must be clean, and the image's tag is the bare version.
RELEASE ?=
# Where the image goes.
IMAGE_REGISTRY ?= ghcr.io/oxidecomputer
IMAGE_NAME ?= omni-infra-provider
IMAGE_TAG ?= $(VERSION)$(if $(filter true,$(RELEASE)),,-$(COMMIT))
IMAGE ?= $(IMAGE_REGISTRY)/$(IMAGE_NAME):$(IMAGE_TAG)
# Certificate authorities that the image trusts: this machine's.
CA_BUNDLE ?= $(firstword $(wildcard /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/cert.pem))
# How many schedules `make fuzz-schedules` plays.
N ?= 10000
# Arguments for `make dev`, for example ARGS="--nameserver 10.0.0.1".
ARGS ?=

# How long `make test-ganeti` may test; on a free machine it takes a third of that. And how long it may take to start a cluster:
# packages are fetched the first time.
GANETI_SECONDS ?= 900
GANETI_UP_SECONDS ?= 240
# Tests that wait for the cluster beside each other.
GANETI_THREADS ?= 6
# How long `make fuzz` works at each target, and at which ones.
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= $(notdir $(wildcard fuzz/corpus/*))

TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
TARGET := $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p')
BINARY := omni-infra-provider
CARGO_DENY_VERSION := 0.20.2
CARGO_FUZZ_VERSION := 0.13.1
# The features that the container has: clouds, and no sandbox.
IMAGE_FEATURES := --no-default-features --features oxide,ganeti

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' Makefile

# The clouds, by their names on the command line.
CLOUDS := oxide ganeti

.PHONY: demo
demo: ## Show machines appear and disappear, with an Omni and an Oxide in one process (0 -> 3 -> 1 -> 0)
	@echo "Building; the first time this takes some minutes."
	@cargo run --quiet -- sandbox --demo

.PHONY: test
test: ## Run all tests
	@echo "Building and testing; the first time this takes some minutes."
	cargo test --all-features

.PHONY: test-ganeti
test-ganeti: ## Run the tests on a real Ganeti with QEMU, which this starts and stops (root on Debian; installs packages)
	@echo "Building; the first time this takes some minutes."
	@cargo test --all-features --test main --no-run
	@trap 'tests/ganeti/cluster.sh down' EXIT; \
	timeout $(GANETI_UP_SECONDS) tests/ganeti/cluster.sh up; \
	eval "$$(tests/ganeti/cluster.sh env)"; \
	GANETI_TEST=required timeout $(GANETI_SECONDS) cargo test --all-features --test main ganeti:: -- --test-threads=$(GANETI_THREADS)

.PHONY: model
model: ## Explore the planner's model without a bound, two daemons included (hours; gigabytes)
	MODEL_STATES=0 cargo test --release --all-features --test main model:: -- --nocapture

.PHONY: fuzz-schedules
fuzz-schedules: ## Play N seeded schedules of faults and wishes, optimised, until one fails (N=1000000)
	SCHEDULES=$(N) SCHEDULE_PROGRESS=1 cargo test --release --all-features --test main \
		schedules_of_faults -- --nocapture

.PHONY: bench
bench: ## Measure the figures of the README, optimised, against the sandbox (FIGURES=up,idle,many,import)
	@echo "Building, optimised; the first time this takes some minutes."
	@cargo build --quiet --release --no-default-features --features oxide
	@install -D $(TARGET_DIR)/release/$(BINARY) $(TARGET_DIR)/measured/$(BINARY)
	@BENCH_DAEMON=$(abspath $(TARGET_DIR))/measured/$(BINARY) cargo bench --quiet --all-features --bench figures

.PHONY: bench-ganeti
bench-ganeti: ## Measure fifty machines on a real Ganeti, optimised, beside fifty of its own command line (as test-ganeti)
	@echo "Building, optimised; the first time this takes some minutes."
	@cargo test --profile bench --quiet --all-features --test main --no-run
	@trap 'tests/ganeti/cluster.sh down' EXIT; \
	timeout $(GANETI_UP_SECONDS) tests/ganeti/cluster.sh up; \
	eval "$$(tests/ganeti/cluster.sh env)"; \
	GANETI_TEST=required cargo test --profile bench --quiet --all-features --test main fifty_machines -- --ignored --nocapture

.PHONY: check
check: ## Check formatting, lints, dependencies, documentation and generated files
	cargo fmt --check
	cargo clippy --all-features --all-targets -- -D warnings
	cargo clippy $(IMAGE_FEATURES) -- -D warnings
	@cargo deny --version 2>/dev/null | grep -qx "cargo-deny $(CARGO_DENY_VERSION)" \
		|| cargo install --locked cargo-deny --version $(CARGO_DENY_VERSION)
	cargo deny --log-level error check bans licenses sources
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --all-features --document-private-items
	@for cloud in $(CLOUDS); do \
		cargo run --quiet -- schema --cloud $$cloud | diff -u machine-classes/$$cloud.schema.json - \
			|| { echo "machine-classes/$$cloud.schema.json is stale: run 'make schema'"; exit 1; }; \
	done

# Without a sanitizer, so that the stable compiler will do: there is no unsafe code here. Nothing that is found is new to the
# corpus in the tree: inputs that reach new code are kept in the target folder.
.PHONY: fuzz
fuzz: ## Throw bad input at every door (FUZZ_SECONDS=60 each, FUZZ_TARGETS="...")
	@cargo fuzz --version 2>/dev/null | grep -qx "cargo-fuzz $(CARGO_FUZZ_VERSION)" \
		|| cargo install --locked cargo-fuzz --version $(CARGO_FUZZ_VERSION)
	@for target in $(FUZZ_TARGETS); do \
		mkdir -p fuzz/target/corpus/$$target; \
		RUSTC_BOOTSTRAP=1 cargo fuzz run --dev --sanitizer none $$target \
			fuzz/target/corpus/$$target fuzz/corpus/$$target -- \
			-max_total_time=$(FUZZ_SECONDS) -max_len=65536 -rss_limit_mb=1024 -malloc_limit_mb=512 -timeout=20 \
			-print_final_stats=1; \
	done

.PHONY: fmt
fmt: ## Format the sources
	cargo fmt

.PHONY: schema
schema: ## Write the schemas in machine-classes anew
	@for cloud in $(CLOUDS); do set -x; \
		cargo run --quiet -- schema --cloud $$cloud > machine-classes/$$cloud.schema.json.new; \
		mv machine-classes/$$cloud.schema.json.new machine-classes/$$cloud.schema.json; \
	done

.PHONY: audit
audit: ## Look for security advisories (needs the advisory database)
	cargo deny check advisories

.PHONY: dev
dev: ## Run the daemon with the exported environment (ARGS="..." for flags)
	cargo run -- run $(ARGS)

.PHONY: clean-tree
clean-tree:
	@if [ "$(RELEASE)" = true ] && [ -n "$$(git status --porcelain)" ]; then \
		echo "RELEASE=true needs a clean tree:"; git status --short; exit 1; \
	fi

.PHONY: build
build: clean-tree ## Build the static binary, dist/omni-infra-provider
	@echo "Building release $(VERSION); this takes some minutes."
	CARGO_PROFILE_RELEASE_STRIP=symbols RUSTFLAGS="-C target-feature=+crt-static" \
		cargo build --release --locked --target $(TARGET) $(IMAGE_FEATURES)
	install -D $(TARGET_DIR)/$(TARGET)/release/$(BINARY) dist/$(BINARY)

.PHONY: image
image: build ## Build the container image, with podman, docker or buildah (RELEASE=true for a release)
	@test -n "$(CA_BUNDLE)" || { echo "no CA certificates on this machine: set CA_BUNDLE"; exit 1; }
	install -D -m 0755 dist/$(BINARY) dist/image/$(BINARY)
	install -D -m 0644 $(CA_BUNDLE) dist/image/ca-certificates.crt
	@if command -v podman > /dev/null; then set -x; \
		podman build --file Containerfile --tag $(IMAGE) dist/image; \
	elif docker info > /dev/null 2>&1; then set -x; \
		docker build --file Containerfile --tag $(IMAGE) dist/image; \
	elif command -v buildah > /dev/null; then set -x; \
		buildah --storage-driver vfs bud --isolation chroot --file Containerfile --tag $(IMAGE) dist/image; \
		buildah --storage-driver vfs push $(IMAGE) oci-archive:dist/$(BINARY).oci.tar:$(IMAGE); \
	else echo "neither podman, nor docker with its daemon, nor buildah is here"; exit 1; fi

.PHONY: push
push: image ## Build and push the container image (RELEASE=true for a release)
	@if command -v podman > /dev/null; then set -x; podman push $(IMAGE); \
	elif docker info > /dev/null 2>&1; then set -x; docker push $(IMAGE); \
	else set -x; buildah --storage-driver vfs push $(IMAGE) docker://$(IMAGE); fi
