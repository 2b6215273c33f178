#!/usr/bin/env bash
# Tests everything, on real servers: installs what is missing for it (install-test-servers.sh), then vets and tests each module.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "Testing everything: about seven minutes on two cores, and some more the first time, to install and compile."
./scripts/install-test-servers.sh
for module in . examples/own; do
	(cd "$module" && go vet ./... && go test -race -count=1 ./...)
done
(cd internal/composetest && go vet ./... && go test -count=1 ./...) # nothing in it runs side by side
