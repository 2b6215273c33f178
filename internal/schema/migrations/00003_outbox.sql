-- +goose Up
-- The kinds of job that workers know, written by each worker when it starts, so
-- that carpool.enqueue can refuse what no worker could run.
CREATE TABLE carpool.kinds (
    kind    text        PRIMARY KEY,
    fields  jsonb       NOT NULL, -- an array of {"name", "type", "optional"}
    seen_at timestamptz NOT NULL  -- when a worker last started with it, give or take an hour
);

-- Jobs on their way to Redis: carpool.enqueue inserts a row in its caller's
-- transaction, and once that is committed, a worker's relay enqueues the job and
-- deletes the row. A row with a problem is set aside: relays leave it alone until
-- the problem is set to null again, or the row is deleted.
CREATE TABLE carpool.outbox (
    seq        bigint      GENERATED ALWAYS AS IDENTITY,
    id         uuid        PRIMARY KEY, -- the job's
    kind       text        NOT NULL,
    payload    jsonb       NOT NULL,
    queue      text,        -- this and the others: null is the kind's own
    run_at     timestamptz, -- null: at once
    unique_key text,
    max_retry  int,
    timeout    interval,
    retention  interval,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    problem    text         -- null: it waits for a relay
) WITH (
    -- All rows are soon dead. What counts is how many dead ones a relay has to
    -- step over, not what share of the table they are.
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000,
    toast.autovacuum_vacuum_scale_factor = 0, toast.autovacuum_vacuum_threshold = 2000
);
CREATE INDEX outbox_waiting ON carpool.outbox (seq) WHERE problem IS NULL;

-- enqueue has the rights of the role that migrated, so a producer needs no others than
--   GRANT USAGE ON SCHEMA carpool TO producer;
--   GRANT EXECUTE ON FUNCTION carpool.enqueue TO producer;
-- Its errors have SQLSTATE 22023, invalid_parameter_value, and never repeat the payload.
-- +goose StatementBegin
CREATE FUNCTION carpool.enqueue(
    kind       text,
    payload    jsonb,
    queue      text        DEFAULT NULL,
    run_at     timestamptz DEFAULT NULL,
    unique_key text        DEFAULT NULL,
    max_retry  int         DEFAULT NULL,
    timeout    interval    DEFAULT NULL,
    retention  interval    DEFAULT NULL
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    known jsonb;  -- the kind's fields
    takes text;   -- the same, for people
    field record;
    given text;
    wrong text;
    job   uuid;
BEGIN
    SELECT k.fields INTO known FROM carpool.kinds AS k WHERE k.kind = enqueue.kind;
    IF NOT FOUND THEN
        SELECT 'The kinds are ' || string_agg(k.kind, ', ' ORDER BY k.kind) || '.' INTO takes FROM carpool.kinds AS k;
        RAISE EXCEPTION USING ERRCODE = '22023',
            MESSAGE = format('unknown kind of job: %s', coalesce('"' || left(enqueue.kind, 100) || '"', 'null')),
            HINT = coalesce(takes, 'carpool.kinds is empty, as no worker has ever started; run: worker migrate');
    END IF;

    -- The payload. Its values are the kind's own to check; here it is about their types.
    SELECT 'The fields are ' || string_agg(f.name || ' (' || f.type || CASE WHEN f.optional THEN ', optional' ELSE '' END || ')', ', ') || '.'
        INTO takes FROM jsonb_to_recordset(known) AS f(name text, type text, optional boolean);
    takes := coalesce(takes, 'The kind has no fields: its payload is {}.');
    IF payload IS NULL OR jsonb_typeof(payload) <> 'object' THEN
        RAISE EXCEPTION USING ERRCODE = '22023', HINT = takes,
            MESSAGE = format('%s payload: want a JSON object, got %s', enqueue.kind, coalesce(jsonb_typeof(payload), 'null'));
    END IF;
    SELECT g.name INTO wrong FROM jsonb_object_keys(payload) AS g(name)
        WHERE g.name NOT IN (SELECT f.name FROM jsonb_to_recordset(known) AS f(name text)) LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION USING ERRCODE = '22023', HINT = takes,
            MESSAGE = format('%s payload: unknown field "%s"', enqueue.kind, left(wrong, 64));
    END IF;
    FOR field IN
        SELECT f.*, payload -> f.name AS value FROM jsonb_to_recordset(known) AS f(name text, type text, optional boolean)
    LOOP
        IF field.value IS NULL THEN
            CONTINUE WHEN field.optional;
            RAISE EXCEPTION USING ERRCODE = '22023', HINT = takes,
                MESSAGE = format('%s payload: %s: is missing', enqueue.kind, field.name);
        END IF;
        given := jsonb_typeof(field.value);
        CONTINUE WHEN field.type IN (given, 'any JSON');
        -- An empty list or object of Go is null in JSON.
        CONTINUE WHEN given = 'null' AND (field.optional OR field.type IN ('array', 'object'));
        IF field.type = 'integer' AND given = 'number' AND (field.value #>> '{}') ~ '^-?[0-9]{1,20}$' THEN
            CONTINUE WHEN (field.value #>> '{}')::numeric BETWEEN -9223372036854775808 AND 18446744073709551615;
        END IF;
        RAISE EXCEPTION USING ERRCODE = '22023', HINT = takes,
            MESSAGE = format('%s payload: %s: want %s, got %s', enqueue.kind, field.name, field.type,
                CASE WHEN field.type = 'integer' AND given = 'number' THEN 'a number that is not whole, or has more than 64 bits' ELSE given END);
    END LOOP;

    -- The options.
    wrong := CASE
        WHEN queue !~ '^[A-Za-z0-9_.:-]{1,100}$' THEN 'queue: must be 1 to 100 letters, digits, or _ . : -'
        WHEN run_at > now() + interval '10 years' THEN 'run_at: is more than ten years away'
        WHEN unique_key = '' THEN 'unique_key: is empty; leave it out if the job needs none'
        WHEN octet_length(unique_key) > 1000 THEN 'unique_key: has more than 1000 bytes'
        WHEN max_retry < 0 THEN 'max_retry: is less than 0, which is no retry'
        WHEN timeout < interval '1 second' OR timeout > interval '30 days' THEN 'timeout: must be from 1 second to 30 days'
        WHEN retention < interval '1 second' OR retention > interval '366 days' THEN 'retention: must be from 1 second to 366 days'
    END;
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE = wrong, HINT = 'Leave it out, or pass null, for the kind''s own.';
    END IF;

    -- A UUID of version 7: the random one of version 4, with the milliseconds
    -- since 1970 laid over its first 48 bits and two bits set in its version.
    job := encode(set_bit(set_bit(overlay(uuid_send(gen_random_uuid())
        PLACING substring(int8send(floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint) FROM 3) FROM 1 FOR 6), 52, 1), 53, 1), 'hex')::uuid;
    INSERT INTO carpool.outbox (id, kind, payload, queue, run_at, unique_key, max_retry, timeout, retention)
        VALUES (job, enqueue.kind, enqueue.payload, enqueue.queue,
            CASE WHEN enqueue.run_at > now() THEN enqueue.run_at END,
            enqueue.unique_key, enqueue.max_retry, enqueue.timeout, enqueue.retention);
    -- Transactions that notify commit one after the other, in the whole database,
    -- each waiting for the disk. So a relay that has much to do looks by itself and
    -- holds this lock ("relay" in ASCII), and is not notified.
    IF pg_try_advisory_lock_shared(491327873401) THEN
        PERFORM pg_advisory_unlock_shared(491327873401);
        PERFORM pg_notify('carpool_outbox', '');
    END IF;
    RETURN job::text;
END
$$;
-- +goose StatementEnd
REVOKE EXECUTE ON FUNCTION carpool.enqueue FROM PUBLIC;
COMMENT ON FUNCTION carpool.enqueue IS 'Enqueues a job when the transaction commits, and returns its id. A null option is the kind''s own; max_retry 0 is no retry; '
    'a unique_key is held by at most one job of the kind that has not ended: another one is dropped.';

-- +goose Down
DROP FUNCTION carpool.enqueue;
DROP TABLE carpool.outbox;
DROP TABLE carpool.kinds;
