-- +goose Up
-- run_key returns the key of the advisory lock that a run of a job has while it is in its
-- transaction. Neither function sets a search_path: each run calls them, as whoever calls, and
-- run_key becomes a part of the statement that way.
CREATE FUNCTION carpool.run_key(id text, kind text) RETURNS bigint LANGUAGE sql IMMUTABLE
    AS $$ SELECT pg_catalog.hashtextextended('carpool job ' || id || ' ' || kind, 0) $$;

-- begin_run begins a run's transaction, and keeps the statements behind it from running that
-- were sent with it. It locks the job, then looks for its record, which in READ COMMITTED is in
-- a snapshot taken after the lock is had. It fails if the run can't be the job's only one:
-- CP001, another run is in its transaction; CP002, the job is done. It returns the
-- transaction's id.
--
-- Before it passes on a message Postgres sends what it has answered so far (see
-- send_message_to_frontend in its elog.c), and INFO passes every client_min_messages. So a
-- worker learns that its transaction has begun although the statement that came with BEGIN
-- takes long.
-- +goose StatementBegin
CREATE FUNCTION carpool.begin_run(id text, kind text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    IF NOT pg_catalog.pg_try_advisory_xact_lock(carpool.run_key(id, kind)) THEN
        RAISE EXCEPTION USING ERRCODE = 'CP001', MESSAGE = 'another run of this job is in its transaction';
    END IF;
    IF EXISTS (SELECT FROM carpool.jobs_done d WHERE d.id = begin_run.id AND d.kind = begin_run.kind) THEN
        RAISE EXCEPTION USING ERRCODE = 'CP002', MESSAGE = 'the job is done already';
    END IF;
    RAISE INFO 'the job has begun';
    RETURN pg_catalog.pg_current_xact_id();
END
$$;
-- +goose StatementEnd

-- +goose Down
DROP FUNCTION carpool.begin_run(text, text);
DROP FUNCTION carpool.run_key(text, text);
