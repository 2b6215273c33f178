#!/usr/bin/env bash
# Installs what the tests need and this machine lacks: redis-server, Postgres, pgbouncer, ps, and a C compiler for the race
# detector. With Debian's apt-get (as root) or Homebrew; elsewhere it says what to install. The tests start servers of their
# own: none has to run as a service.
set -euo pipefail

# A program's name, and what to install for it: Debian's packages, then Homebrew's formula.
PATH=$PATH:/usr/sbin:/sbin # where Debian keeps pgbouncer

have_postgres() {
	local dir
	for dir in /usr/lib/postgresql/*/bin /opt/homebrew/opt/postgresql@*/bin /usr/local/opt/postgresql@*/bin; do
		[ -x "$dir/initdb" ] && [ -x "$dir/postgres" ] && return
	done
	command -v postgres >/dev/null && command -v initdb >/dev/null
}

debian=() brew=()
command -v redis-server >/dev/null || command -v valkey-server >/dev/null || { debian+=(redis-server) brew+=(redis); }
have_postgres || { debian+=(postgresql) brew+=(postgresql@17); }
command -v pgbouncer >/dev/null || { debian+=(pgbouncer) brew+=(pgbouncer); }
command -v ps >/dev/null || debian+=(procps)
if [ "$(uname -s)" = Linux ] && ! command -v "$(go env CC)" >/dev/null; then
	debian+=(gcc libc6-dev)
fi

if [ "$(uname -s)" = Darwin ]; then
	[ ${#brew[@]} -gt 0 ] || exit 0
	if ! command -v brew >/dev/null; then
		echo "Missing: ${brew[*]}. Install Homebrew and run this again, or install them yourself." >&2
		exit 1
	fi
	brew install "${brew[@]}"
	exit
fi

[ ${#debian[@]} -gt 0 ] || exit 0
if ! command -v apt-get >/dev/null; then
	echo "Missing (by their Debian names): ${debian[*]}. Install them with this machine's package manager." >&2
	exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
	echo "Missing: ${debian[*]}. Run: sudo apt-get install ${debian[*]}" >&2
	exit 1
fi
echo "Installing ${debian[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get -o DPkg::Lock::Timeout=300 -qq update
apt-get -o DPkg::Lock::Timeout=300 -qq install --no-install-recommends -y "${debian[@]}"
