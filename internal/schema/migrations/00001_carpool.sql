-- +goose Up
-- Tables that csv:import makes.
-- Where the schema is there already, nobody needs the right to create one.
-- +goose StatementBegin
DO $$ BEGIN
    IF to_regnamespace('imports') IS NULL THEN CREATE SCHEMA imports; END IF;
END $$;
-- +goose StatementEnd

-- One row for each attempt of webhook:deliver.
CREATE TABLE carpool.webhook_deliveries (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job_id       text        NOT NULL,
    attempt      int         NOT NULL,
    url          text        NOT NULL, -- without user, password and query
    event        text        NOT NULL,
    status       int,                  -- null: there was no answer
    error        text,
    took_ms      int         NOT NULL,
    delivered_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX ON carpool.webhook_deliveries (job_id);
CREATE INDEX ON carpool.webhook_deliveries (delivered_at);

-- +goose Down
DROP TABLE carpool.webhook_deliveries;
-- The schema imports stays: its tables are the users'.
