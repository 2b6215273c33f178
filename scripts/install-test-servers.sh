#!/usr/bin/env bash
# Installs what the tests need and this machine lacks: redis-server, Postgres, pgbouncer, ps, a C compiler for the race
# detector, and the languages of examples/. With Debian's apt-get (as root) or Homebrew; elsewhere it says what to install. The
# tests start servers of their own: none has to run as a service.
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

have_psycopg2() {
	local python
	for python in python3 /usr/bin/python3; do
		"$python" -c 'import psycopg2' 2>/dev/null && return
	done
	return 1
}

# What examples/node needs of npm's packages. It comes last, since npm itself may be missing.
install_node_packages() {
	cd "$(dirname "${BASH_SOURCE[0]}")/../examples/node"
	[ node_modules/.package-lock.json -nt package-lock.json ] || npm ci --no-audit --no-fund --loglevel=error
}

debian=() brew=()
command -v redis-server >/dev/null || command -v valkey-server >/dev/null || { debian+=(redis-server) brew+=(redis); }
have_postgres || { debian+=(postgresql) brew+=(postgresql@17); }
command -v pgbouncer >/dev/null || { debian+=(pgbouncer) brew+=(pgbouncer); }
command -v ps >/dev/null || debian+=(procps)
command -v psql >/dev/null || { debian+=(postgresql-client) brew+=(libpq); }
have_psycopg2 || debian+=(python3 python3-psycopg2)
command -v npm >/dev/null || { debian+=(nodejs npm) brew+=(node); }
if [ "$(uname -s)" = Linux ] && ! command -v "$(go env CC)" >/dev/null; then
	debian+=(gcc libc6-dev)
fi

if [ "$(uname -s)" = Darwin ]; then
	if [ ${#brew[@]} -gt 0 ] && ! command -v brew >/dev/null; then
		echo "Missing: ${brew[*]}. Install Homebrew and run this again, or install them yourself." >&2
		exit 1
	fi
	[ ${#brew[@]} -eq 0 ] || brew install "${brew[@]}"
	case " ${brew[*]-} " in *" libpq "*) brew link --force libpq ;; esac
	have_psycopg2 || python3 -m pip install --user psycopg2-binary
	install_node_packages
	exit
fi

if [ ${#debian[@]} -gt 0 ]; then
	if ! command -v apt-get >/dev/null; then
		echo "Missing (by their Debian names): ${debian[*]}. Install them with this machine's package manager." >&2
		exit 1
	fi
	if [ "$(id -u)" -ne 0 ]; then
		echo "What the tests need is not all here. Run: sudo apt-get install --no-install-recommends ${debian[*]}" >&2
		exit 1
	fi
	echo "Installing ${debian[*]}"
	export DEBIAN_FRONTEND=noninteractive
	apt-get -o DPkg::Lock::Timeout=300 -qq update
	apt-get -o DPkg::Lock::Timeout=300 -qq install --no-install-recommends -y "${debian[@]}"
fi
install_node_packages
