-- +goose Up
-- The jobs whose effects are in the database: one row for each transactional job,
-- committed together with what the job did. A job that is delivered again is
-- found here and not run. Ids that enqueuers choose are each kind's own.
CREATE TABLE carpool.jobs_done (
    id      text        NOT NULL,
    kind    text        NOT NULL,
    queue   text        NOT NULL,
    result  json,                -- null: the handler returned none
    done_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (id, kind)
);

-- +goose Down
DROP TABLE carpool.jobs_done;
