#!/usr/bin/env bash
# Tests everything, on real servers: installs what is missing for it (install-test-servers.sh), then vets and tests each module.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "Testing everything: about five minutes on two cores, and some more the first time, to install and compile."
./scripts/install-test-servers.sh
for module in . examples/own internal/composetest; do
	(cd "$module" && go vet ./... && go test -race -count=1 ./...)
done
