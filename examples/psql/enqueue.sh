#!/usr/bin/env bash
# Enqueues a job in a transaction, with psql.
#
#	DATABASE_URL=postgres://… ./enqueue.sh
set -euo pipefail

# The list of processes shows psql's arguments to everybody: the password is not to be among them.
url=$DATABASE_URL
if [[ $url =~ ^([a-z]+://[^:/@]*):([^@/]*)@(.*)$ ]]; then
	url=${BASH_REMATCH[1]}@${BASH_REMATCH[3]}
	password=${BASH_REMATCH[2]//\\/\\\\}
	PGPASSWORD=$(printf '%b' "${password//%/\\x}")
	export PGPASSWORD
fi

psql "$url" --no-psqlrc --quiet --set ON_ERROR_STOP=1 <<'SQL'
\set order '{"number": "A-17", "net_cents": 1000}'

BEGIN; -- your own statements go into the transaction too
SELECT carpool.enqueue('order:book', :'order', queue => 'low') AS id \gset
COMMIT;
\echo committed :id

BEGIN;
SELECT carpool.enqueue('order:book', :'order', queue => 'low') AS id \gset
ROLLBACK;
\echo rolled back :id
SQL
