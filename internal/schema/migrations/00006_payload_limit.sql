-- +goose Up
-- What workers are told by their environment and SQL has to know. A worker writes it when
-- it starts, and so does `migrate` if it is told; the last one counts.
CREATE TABLE carpool.settings (
    name  text   PRIMARY KEY,
    value bigint NOT NULL
);
INSERT INTO carpool.settings (name, value) VALUES ('max_payload', 1048576); -- in bytes; MAX_PAYLOAD

-- Who may write down kinds is a worker, whose role need not be the one that migrates.
-- +goose StatementBegin
DO $$
DECLARE
    worker record;
BEGIN
    FOR worker IN
        SELECT a.privilege_type AS may, CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END AS name
        FROM pg_class AS c, aclexplode(c.relacl) AS a
        WHERE c.oid = 'carpool.kinds'::regclass AND a.grantee <> c.relowner AND a.privilege_type IN ('SELECT', 'INSERT', 'UPDATE')
    LOOP
        EXECUTE format('GRANT %s ON carpool.settings TO %s', worker.may, worker.name);
    END LOOP;
END $$;
-- +goose StatementEnd

-- The size is kept because a payload must be read, and written as text, to know it: relays
-- judge many rows by it and read few.
ALTER TABLE carpool.outbox ADD COLUMN payload_size int GENERATED ALWAYS AS (octet_length(payload::text)) STORED;

-- It has the rights of the role that migrated, because who inserts need not see the
-- settings. Its error has SQLSTATE 22023, as those of carpool.enqueue have.
-- +goose StatementBegin
CREATE FUNCTION carpool.limit_payload() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    size int    := octet_length(NEW.payload::text);
    most bigint := (SELECT s.value FROM carpool.settings AS s WHERE s.name = 'max_payload');
BEGIN
    IF size > most THEN
        RAISE EXCEPTION USING ERRCODE = '22023',
            MESSAGE = format('%s payload: %s bytes are more than the limit of %s, which MAX_PAYLOAD sets', left(NEW.kind, 100), size, most),
            HINT = 'Keep what is large elsewhere, and where it is in the payload; or start the workers with a larger MAX_PAYLOAD.';
    END IF;
    RETURN NEW;
END
$$;
-- +goose StatementEnd
-- On a table of somebody else's, the casts to text would be theirs, and run with these rights.
REVOKE EXECUTE ON FUNCTION carpool.limit_payload FROM PUBLIC;
CREATE TRIGGER payload_limit BEFORE INSERT OR UPDATE OF payload ON carpool.outbox FOR EACH ROW EXECUTE FUNCTION carpool.limit_payload();
CREATE TRIGGER payload_limit BEFORE INSERT OR UPDATE OF payload ON carpool.schedules FOR EACH ROW EXECUTE FUNCTION carpool.limit_payload();

-- +goose Down
DROP TRIGGER payload_limit ON carpool.schedules;
DROP TRIGGER payload_limit ON carpool.outbox;
DROP FUNCTION carpool.limit_payload();
ALTER TABLE carpool.outbox DROP COLUMN payload_size;
DROP TABLE carpool.settings;
