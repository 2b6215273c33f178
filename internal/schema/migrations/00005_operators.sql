-- +goose Up
-- Kinds that only operators may enqueue by carpool.enqueue, because they are power: with
-- the rights of the worker's role they drop tables, delete rows, or sign with its secret.
ALTER TABLE carpool.kinds ADD COLUMN operators boolean NOT NULL DEFAULT false;
UPDATE carpool.kinds SET operators = true
    WHERE kind IN ('csv:import', 'webhook:deliver', 'rows:prune', 'pool:validate', 'carpool:prune');

-- Operators are the role that migrated, its members, superusers, and the members of this
-- role. A role that may not make roles makes none; then a superuser can.
-- +goose StatementBegin
DO $$ BEGIN
    CREATE ROLE carpool_operator NOLOGIN;
EXCEPTION WHEN duplicate_object OR unique_violation OR insufficient_privilege THEN
    NULL; -- of another database of this server, or made at the same time, or not to be had
END $$;
-- +goose StatementEnd

-- It judges by session_user, who has logged in: in carpool.enqueue, current_user is the role
-- that migrated. Whoever inserts a row without carpool.enqueue needs rights on the table,
-- which is more.
-- +goose StatementBegin
CREATE FUNCTION carpool.outbox_producer() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF current_user = session_user
        OR NOT EXISTS (SELECT FROM carpool.kinds AS k WHERE k.kind = NEW.kind AND k.operators)
        OR pg_has_role(session_user, current_user, 'MEMBER')
        OR EXISTS (SELECT FROM pg_roles AS r WHERE r.rolname = 'carpool_operator' AND pg_has_role(session_user, r.oid, 'MEMBER'))
    THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION USING ERRCODE = '42501',
        MESSAGE = format('the kind %s is for operators, and role %s is none', NEW.kind, quote_ident(session_user)),
        HINT = format('GRANT carpool_operator TO %s;', quote_ident(session_user));
END
$$;
-- +goose StatementEnd
CREATE TRIGGER producer BEFORE INSERT ON carpool.outbox FOR EACH ROW EXECUTE FUNCTION carpool.outbox_producer();

-- +goose Down
DROP TRIGGER producer ON carpool.outbox;
DROP FUNCTION carpool.outbox_producer();
ALTER TABLE carpool.kinds DROP COLUMN operators;
-- The role stays: other databases may use it.
