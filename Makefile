# Bulkhead. "make up" builds everything and boots a node; "make help" lists the targets.

VERSION    ?= 0.1.0-dev
KUBERNETES ?= out/kubernetes# or "none": an image without Kubernetes, built in seconds
LEVEL      ?= 9# of zstd for the root; 3 packs in half the time and is 8 % larger, 15 takes three times as long and is 7 % smaller
FUZZTIME   ?= 20s
ONLY       ?= # tests, for "make fuzz" and "make test-vm": those whose names this regular expression matches
UNTIL      ?= 0# for "make test-vm": seconds since 1970; what would not end before is left out, and named
SLOW       ?= 1# how many times slower than usual this host has been
POISON     ?= init/panic# for "make poison": what is wrong with it, a file of test/machine/testdata/poison
KEYS       ?= out/keys# to sign the image with: a folder of "mkimage keys"; development keys are made if this one is not there
BUILT      ?= $(shell TZ=UTC0 git log -1 --date=format-local:%Y-%m-%dT%H:%M:%SZ --format=%cd 2>/dev/null)# time of the commit: a node whose clock is before it says so
EPOCH      ?= 1# 1 to 63: raise it when no node may go back behind this image
IMAGE      := out/image
CACHE       = $(or $(BULKHEAD_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/bulkhead)
KERNEL_DEB  = $(CACHE)/debian/$(shell awk '/^linux-image-[0-9]/ { print $$4 }' deploy/image/debian.lock).deb

export CGO_ENABLED ?= 0
# With tracing grpc links html/template, and the linker then keeps every method there is: 2.6 MB. Debug information would be made for each package, and left out by the linker.
# Lint and tests say the same, so that each package is compiled once for all of them.
export GOFLAGS ?= -trimpath -tags=grpcnotrace -gcflags=all=-dwarf=false
# The compiler, told nothing, lets its memory grow to 128 MiB first; with this it is a tenth quicker where pages are dear to get.
GOBUILD = GOGC=200 go build -tags grpcnotrace -trimpath -buildvcs=false -ldflags "-s -w -X github.com/bulkhead-os/bulkhead/internal/version.Version=v$(VERSION) -X github.com/bulkhead-os/bulkhead/internal/version.Built=$(BUILT)"
IMAGEFLAGS = --version $(VERSION) --level $(LEVEL) --keys $(KEYS) --epoch $(EPOCH)
POISONED = $(patsubst %/,%,$(dir $(POISON)))
POISONED_SOURCE = $(if $(filter init,$(POISONED)),init,cmd/$(POISONED))
NODE    = ./init ./cmd/bulkheadd ./cmd/etcdd ./cmd/kubeletd
HOST    = ./cmd/mkimage ./cmd/bhctl

.DELETE_ON_ERROR:
.PHONY: help setup up down build kubernetes image poison observer twin dist reproducible test test-beside test-vm test-matrix test-faults test-ha test-rollback test-powercut test-pid1 bench fuzz lint gen clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup: ## install the host's tools that are missing, by package name (Debian, Ubuntu)
	@deploy/setup.sh

up: setup image ## build all, boot one node in QEMU, wait until Kubernetes is Ready
	@out/bin/bhctl up

down: ## remove the machine of "make up"
	@test ! -x out/bin/bhctl || out/bin/bhctl down

build: ## our binaries, into out/bin
	@mkdir -p out/bin
	@test -x out/bin/bulkheadd || echo "build: our binaries (up to 4 minutes with empty caches)"
	@$(GOBUILD) -o out/bin/ $(NODE) $(HOST)

kubernetes: ## the Kubernetes set, into out/kubernetes (the first time: many minutes)
ifeq ($(KUBERNETES),out/kubernetes)
	@mkdir -p out
	@test -e out/kubernetes || echo "build: Kubernetes and its runtime (up to 15 minutes with empty caches)"
	@dir=$$(deploy/build-kubernetes.sh | tail -n 1) && test -d "$$dir" && \
	  { test "$$dir" -ef out/kubernetes || ln -sfn "$$dir" out/kubernetes; }
	@mkdir -p out/bin && ln -sf ../kubernetes/bin/kube out/bin/kubectl
endif

image: build kubernetes ## the bootable image, into out/image
	@test "$(KEYS)" != out/keys || test -d out/keys || out/bin/mkimage keys --out out/keys
	@out/bin/mkimage build --bin out/bin --kubernetes $(KUBERNETES) --out $(IMAGE) $(IMAGEFLAGS)

poison: build kubernetes ## an image with a mistake in it, into out/poison: a node that gets it must go back by itself
	@test -f test/machine/testdata/poison/$(POISON).go || { echo "POISON=$(POISON): there are" $$(cd test/machine/testdata/poison && ls */*.go | sed 's/\.go$$//' | grep -v /main) >&2; exit 1; }
	@rm -rf out/poison && mkdir -p out/poison && cp -al out/bin out/poison/bin && rm out/poison/bin/$(POISONED)
	@echo '{"Replace": {"$(POISONED_SOURCE)/poison.go": "test/machine/testdata/poison/$(POISON).go"}}' > out/poison/overlay.json
	@$(GOBUILD) -overlay out/poison/overlay.json -o out/poison/bin/ ./$(POISONED_SOURCE)
	@out/bin/mkimage build --bin out/poison/bin --kubernetes $(KUBERNETES) --out out/poison/image $(IMAGEFLAGS)

observer: build kubernetes ## the tests' image, into out/observer/image: one with a unit that shows processes and breaks daemons; see docs/faults.md
	@test "$(KEYS)" != out/keys || test -d out/keys || out/bin/mkimage keys --out out/keys
	@rm -rf out/observer/bin && mkdir -p out/observer && cp -al out/bin out/observer/bin && rm out/observer/bin/init
	@go run ./internal/unit/gen -tree . -tree test/observer/testdata -out out/observer/units.txt
	@echo '{"Replace": {"init/units.go": "out/observer/units.txt"}}' > out/observer/overlay.json
	@$(GOBUILD) -overlay out/observer/overlay.json -o out/observer/bin/ ./init ./test/observer
	@out/bin/mkimage build --bin out/observer/bin --program out/observer/bin/observer --kubernetes $(KUBERNETES) --out out/observer/image $(IMAGEFLAGS)

twin: build ## an image whose daemons are evil twins, into out/twin, for work on TestVMTwin; see docs/confinement/README.md
	@rm -rf out/twin && mkdir -p out/twin/bin
	@go run ./internal/unit/gen -errno 4090 -out out/twin/units.txt
	@echo '{"Replace": {"init/units.go": "out/twin/units.txt"}}' > out/twin/overlay.json
	@$(GOBUILD:grpcnotrace=grpcnotrace,twin) -overlay out/twin/overlay.json -o out/twin/bin/ $(NODE)
	@out/bin/mkimage build --bin out/twin/bin --kubernetes none --out out/twin/image $(IMAGEFLAGS)

dist: image ## other forms of the image, beside it: qcow2 for clouds, an ISO to install from
	@out/bin/mkimage convert qcow2 $(IMAGE)
	@out/bin/mkimage convert iso $(IMAGE)

reproducible: dist ## build the image a second time, elsewhere and from nothing, and compare
	@rm -rf out/again && mkdir -p out/again/bin
	@GOCACHE=$(abspath out/again/gocache) $(GOBUILD) -o out/again/bin/ $(NODE) ./cmd/mkimage
	@out/again/bin/mkimage build --bin out/again/bin --kubernetes $(KUBERNETES) --out out/again/image $(IMAGEFLAGS)
	@for f in qcow2 iso; do out/again/bin/mkimage convert $$f out/again/image || exit 1; done
	@cmp $(IMAGE)/manifest.json out/again/image/manifest.json
	@for f in $(IMAGE)/*; do test -d $$f || cmp $$f out/again/image/$${f##*/} || exit 1; done
	@rm -rf out/again; echo "reproducible: two builds are the same, bit for bit"

# Where nothing runs at once the race detector has nothing to find, and what copies and cuts disks takes five times as long with it. internal/archtest TestSequential holds this list.
SEQUENTIAL := deploy/image internal/bundle internal/fat internal/powercut internal/verity storaged/install storaged/luks storaged/vault

# trustd first: its tests wait more than they work. What is beside fills the time that such tests leave, and takes none of theirs.
test: export CGO_ENABLED = 1
test: ## every test that needs no virtual machine, with the race detector where it can find something; "make lint" has vet
	@all=$$(go list ./...) && mkdir -p out && { { chrt --idle 0 make -s test-beside >out/beside.json; echo $$? >out/beside.status; } & \
	   go test -race -vet=off -json ./trustd $$(echo "$$all" | grep -vxF $(SEQUENTIAL:%=-e github.com/bulkhead-os/bulkhead/%)); \
	   wait; cat out/beside.json; } | go run ./test/report && exit $$(cat out/beside.status)

test-beside:
	@CGO_ENABLED=0 go test -vet=off -json $(SEQUENTIAL:%=./%); status=$$?; cd test/issuer && go test -race -json ./... && exit $$status

test-vm: image observer ## the tests that need a kernel, in QEMU, or those that ONLY matches; see docs/testing.md
	@test/tools/install.sh
	@out/bin/mkimage fetch && rm -rf out/test-kernel && dpkg-deb -x $(KERNEL_DEB) out/test-kernel && ln -s usr/lib out/test-kernel/lib
	@BULKHEAD_VM=1 BULKHEAD_TEST_KERNEL=$(abspath out/test-kernel) go run ./test/vms -only '$(ONLY)' -until $(UNTIL) -slow $(SLOW) | REPORT_LIVE=1 go run ./test/report

test-matrix: observer ## one node, every daemon killed, stopped, starved, flooded and without what it needs (a quarter of an hour); see docs/faults.md
	@BULKHEAD_VM=1 BULKHEAD_VM_STEPS=up,faults go test -json -count=1 -timeout 60m -run 'TestNode$$' ./test/machine | REPORT_LIVE=1 go run ./test/report

test-faults: KUBERNETES = none
test-faults: IMAGE = out/image-none
test-faults: image ## three control planes through ten minutes of faults, and through new authorities, while clients write; see docs/cluster.md
	@BULKHEAD_VM=1 BULKHEAD_ROTATE=1 go test -json -count=1 -timeout 60m -run 'TestFaults$$|TestRotate$$' ./test/machine | REPORT_LIVE=1 go run ./test/report

test-ha: image ## three control planes and a worker with Kubernetes: rolling restart under requests, whole machines killed (three quarters of an hour); BULKHEAD_HA=roll,leader,virtual takes parts, BULKHEAD_HA_SLOW=6 is for a slow host
	@BULKHEAD_VM=1 BULKHEAD_HA=$${BULKHEAD_HA:-all} go test -json -count=1 -timeout 6h -run 'TestHA$$' ./test/machine | REPORT_LIVE=1 go run ./test/report

test-rollback: image ## every poisoned version, each left by itself, and twenty good ones through power cuts (two hours)
	@BULKHEAD_VM=1 BULKHEAD_ROLLBACK=1 go test -json -count=1 -timeout 4h -run 'TestPoison|TestRollback' ./test/machine | REPORT_LIVE=1 go run ./test/report

test-powercut: KUBERNETES = none
test-powercut: IMAGE = out/image-none
test-powercut: image ## power cuts, the long run: 10,000 rebuilt disks and 60 that are booted; see docs/powercuts.md
	@BULKHEAD_CUTS=60 go test -json -count=1 -run 'Cut' ./storaged/slots ./storaged/luks ./internal/fat ./internal/powercut ./services/machined/store | go run ./test/report
	@BULKHEAD_VM=1 BULKHEAD_CUT_STATES=10000 BULKHEAD_CUT_BOOTS=60 go test -json -count=1 -timeout 120m -run 'TestCutDisk$$' ./test/machine | REPORT_LIVE=1 go run ./test/report

test-pid1: ## PID 1, the long run, in a namespace of its own: 100,000 orphans, 10,000 kills, units that misbehave; see docs/init.md
	@BULKHEAD_PID1=1 go test -count=1 -timeout 60m -v -run 'TestPID1$$' ./init/supervise | grep -E '»|FAIL|ok|_test.go'

bench: image observer ## the figures of the design with their budgets, measured in one run
	@BULKHEAD_VM=1 BULKHEAD_BENCH=1 go test -count=1 -timeout 60m -v -run TestBench ./test/machine | grep -E '»|FAIL|_test.go'

fuzz: ## every fuzz target for FUZZTIME (20s, 5m), or those that ONLY matches; see docs/fuzzing.md
	@go run ./test/fuzz -time $(FUZZTIME) -only '$(ONLY)'

lint: ## gofmt, vet, staticcheck; generated code is what gen makes
	@test -z "$$(gofmt -l $$(git ls-files '*.go') | tee /dev/stderr)"
	@go vet ./...
	@go tool staticcheck ./...
	@$(MAKE) -s gen && git diff --exit-code -- '*.pb.go' '*.pb.gw.go' gateway/openapi.json init/units.go internal/syscalls/names.go internal/methods/table.go config/methods.go || { echo "lint: commit what \"make gen\" made" >&2; exit 1; }

gen: ## generated code: protocols, units
	@go run ./api/gen
	@go generate ./...

clean: ## remove what was built; caches outside the clone stay
	@rm -rf out
