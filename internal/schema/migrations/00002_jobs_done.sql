-- +goose Up
-- The jobs whose effects are in the database: one row for each transactional job,
-- committed together with what the job did. A job that is delivered again is
-- found here and not run.
CREATE TABLE carpool.jobs_done (
    id      text        PRIMARY KEY,
    kind    text        NOT NULL,
    queue   text        NOT NULL,
    result  json,                -- null: the handler returned none
    done_at timestamptz NOT NULL DEFAULT now()
);
-- The rows lie in the order of done_at, so a few bytes for each stretch of the
-- table find the old ones, and an insert pays nothing for it.
CREATE INDEX ON carpool.jobs_done USING brin (done_at) WITH (autosummarize);

-- +goose Down
DROP TABLE carpool.jobs_done;
