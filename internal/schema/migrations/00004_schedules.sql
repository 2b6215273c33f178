-- +goose Up
-- What is run by the clock. Workers read it every second, so a change takes
-- effect at once. Rows may be written by hand; `worker schedule` checks more.
CREATE TABLE carpool.schedules (
    name       text        PRIMARY KEY CHECK (name ~ '^[A-Za-z0-9_.:-]{1,100}$'),
    cron       text        NOT NULL, -- '*/5 * * * *', '@daily', '@every 90s'
    time_zone  text        NOT NULL DEFAULT 'UTC', -- 'Europe/Berlin'
    kind       text        NOT NULL,
    payload    jsonb       NOT NULL DEFAULT '{}',
    queue      text        CHECK (queue ~ '^[A-Za-z0-9_.:-]{1,100}$'), -- this and the next three: null is the kind's own
    max_retry  int         CHECK (max_retry >= 0), -- 0: no retry
    timeout    interval    CHECK (timeout BETWEEN interval '1 second' AND interval '30 days'),
    retention  interval    CHECK (retention BETWEEN interval '1 second' AND interval '366 days'),
    missed     text        NOT NULL DEFAULT 'once' CHECK (missed IN ('skip', 'once', 'all')),
    overlap    text        NOT NULL DEFAULT 'allow' CHECK (overlap IN ('allow', 'skip', 'queue')),
    enabled    boolean     NOT NULL DEFAULT true,
    source     text        NOT NULL DEFAULT 'table' CHECK (source IN ('code', 'table')),
    changed_at timestamptz NOT NULL DEFAULT now() CHECK (isfinite(changed_at)), -- no tick before it counts as missed; kept by the trigger
    problem    text        -- why it is not run; written by workers
);

-- How far each entry is. It outlives the entry, so that one which is deleted and
-- inserted again does not run a tick twice.
CREATE TABLE carpool.schedule_state (
    name         text        PRIMARY KEY,
    last_tick    timestamptz, -- all ticks up to it are decided: enqueued, or left out by the entry's policies
    waiting_tick timestamptz, -- overlap 'queue': waits for the end of the job below
    fired_tick   timestamptz, -- the last one that was enqueued
    fired_at     timestamptz, -- when it was
    job_id       uuid,        -- and as which job,
    job_queue    text         -- on which queue
);

-- +goose StatementBegin
CREATE FUNCTION carpool.schedule_changed() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    NEW.changed_at := clock_timestamp();
    RETURN NEW;
END
$$;
-- +goose StatementEnd
CREATE TRIGGER changed BEFORE UPDATE ON carpool.schedules FOR EACH ROW
    WHEN ((OLD.name, OLD.cron, OLD.time_zone, OLD.enabled) IS DISTINCT FROM (NEW.name, NEW.cron, NEW.time_zone, NEW.enabled))
    EXECUTE FUNCTION carpool.schedule_changed();

-- +goose Down
DROP TABLE carpool.schedules;
DROP FUNCTION carpool.schedule_changed();
DROP TABLE carpool.schedule_state;
