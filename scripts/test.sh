#!/usr/bin/env bash
# Tests everything, on real servers: installs what is missing for it (install-test-servers.sh), then vets and tests each module.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "Testing everything: about seven minutes on two cores, and some more the first time, to install and compile."
./scripts/install-test-servers.sh
# What the tests build is compiled as the image is, and so is what vet needs, because Go compiles everything anew for other
# flags; the race detector's are its own.
export CGO_ENABLED=0 GOFLAGS=-trimpath
for module in . examples/own; do
	(cd "$module" && go vet ./... && CGO_ENABLED=1 GOFLAGS= go test -race -count=1 -exec "env CGO_ENABLED=0 GOFLAGS=$GOFLAGS" ./...)
done
(cd internal/composetest && go vet ./... && go test -count=1 ./...) # nothing in it runs side by side
