#!/usr/bin/env bash
# Looks for known vulnerabilities in what the code calls, and fails if it finds one. Where the tool or the database of
# vulnerabilities can't be had, it says so and passes. Arguments are govulncheck's, such as -db URL.
set -uo pipefail
cd "$(dirname "$0")/.."

tool=golang.org/x/vuln/cmd/govulncheck@v1.9.0
bound=240 # seconds for each module

bounded() {
	if command -v timeout >/dev/null; then timeout "$bound" "$@"; else "$@"; fi
}

for module in . examples/own; do
	said=$(cd "$module" && bounded go run "$tool" "$@" ./... 2>&1)
	code=$?
	if [ "$code" = 0 ]; then
		echo "vulncheck: $module: no known vulnerability is called"
	elif [ "$code" = 124 ]; then
		echo "vulncheck: skipped: it did not end within $bound s"
		exit 0
	elif grep -qE '^go: .*(dial tcp|i/o timeout|TLS handshake|EOF|(403|404|410|429|50[0-9]) |module lookup disabled|toolchain not available)' <<<"$said"; then
		echo "vulncheck: skipped: the tool can't be had"
		exit 0
	elif grep -q '^govulncheck: fetching vulnerabilities: ' <<<"$said"; then
		echo "vulncheck: skipped: the database of vulnerabilities can't be reached"
		exit 0
	else
		printf '%s\n' "$said" >&2
		echo "vulncheck: $module: failed" >&2
		exit 1
	fi
done
