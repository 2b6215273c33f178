-- +goose Up
-- A worker pulls from a queue of its own, on which it has itself validate its pool. Any other
-- job there would keep it from that. Like carpool.enqueue, it never repeats the payload.
-- +goose StatementBegin
CREATE FUNCTION carpool.outbox_queue() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE = 'queue: is a worker''s own, which takes pool:validate alone',
        HINT = 'Leave it out, or pass null, for the kind''s own.';
END
$$;
-- +goose StatementEnd
CREATE TRIGGER queue BEFORE INSERT ON carpool.outbox FOR EACH ROW
    WHEN (NEW.queue ~ '^instance-.+-[0-9a-f]{8}$' AND NEW.kind <> 'pool:validate') EXECUTE FUNCTION carpool.outbox_queue();

-- +goose Down
DROP TRIGGER queue ON carpool.outbox;
DROP FUNCTION carpool.outbox_queue();
