-- +goose Up
-- What keeps the statements behind it from running that were sent with it. A run of a job that
-- can't be its own fails so: CP001, another run is in its transaction; CP002, the job is done.
-- +goose StatementBegin
CREATE FUNCTION carpool.refuse_run(state text) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION USING ERRCODE = state, MESSAGE = CASE state
        WHEN 'CP001' THEN 'another run of this job is in its transaction' ELSE 'the job is done already' END;
END
$$;
-- +goose StatementEnd

-- Before it passes on a notice Postgres sends what it has answered so far (see
-- send_message_to_frontend in its elog.c). So a worker learns that its transaction has begun
-- although the statement that came with BEGIN takes long.
-- +goose StatementBegin
CREATE FUNCTION carpool.begin_run(id text, kind text) RETURNS void LANGUAGE plpgsql SET client_min_messages = notice AS $$
BEGIN
    IF EXISTS (SELECT FROM carpool.jobs_done d WHERE d.id = begin_run.id AND d.kind = begin_run.kind) THEN
        PERFORM carpool.refuse_run('CP002');
    END IF;
    RAISE NOTICE 'the job has begun';
END
$$;
-- +goose StatementEnd

-- +goose Down
DROP FUNCTION carpool.begin_run(text, text);
DROP FUNCTION carpool.refuse_run(text);
