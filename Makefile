.DEFAULT_GOAL := help

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
GOFUMPT := go run mvdan.cc/gofumpt@v0.12.0
STATICCHECK := go run honnef.co/go/tools/cmd/staticcheck@v0.8.2

.PHONY: help dev test chaos long lint vuln build

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

dev: ## Bring up everything on this machine and show what carpool does
	go run ./dev

test: ## Install the servers that are missing, then vet and test everything on real ones
	./scripts/test.sh

CHAOS := -chaos.mode=all -chaos.long -chaos.jobs=50000 -chaos.time=5m

chaos: ## Break everything at random for half an hour or more, with carpool's protection and without; CHAOS=… for other flags
	./scripts/install-test-servers.sh
	go test -count=1 -timeout 60m ./worker -run TestChaos -v $(CHAOS)

long: ## Run what takes too long for every day: failovers under load, big files (the tests behind the build tag long)
	./scripts/install-test-servers.sh
	go test -tags long -count=1 -timeout 60m -p 1 -run TestLong -v ./...

lint: ## Check the format and look for faults without running anything
	@unformatted="$$($(GOFUMPT) -l .)" && if [ -n "$$unformatted" ]; then \
		echo "gofumpt would change:"; echo "$$unformatted"; exit 1; fi
	go vet ./...
	go vet -tags long ./...
	cd examples/own && go vet ./...
	cd internal/composetest && go vet ./...
	$(STATICCHECK) ./...

vuln: ## Look for known vulnerabilities that the code calls; passes where their database can't be reached
	@./scripts/vulncheck.sh

build: ## Build bin/worker
	CGO_ENABLED=0 go build -trimpath -ldflags "-X github.com/carpool-go/carpool/worker/cli.buildVersion=$(VERSION)" -o bin/ ./cmd/worker
