package doctor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/schema"
)

// postgresLook is what the checks of Postgres leave for the others.
type postgresLook struct {
	db     *dbpool.Pool // nil unless Postgres answers
	tables bool         // carpool's are there, in their newest form
	pooler bool         // there is one between
	budget *dbpool.Budget
	clock  *clock
}

func (l *postgresLook) close() {
	if l.db != nil {
		l.db.Close()
	}
}

// role is who the worker is in Postgres.
type role struct{ name, database string }

func (r role) quoted() string { return pgx.Identifier{r.name}.Sanitize() }

// checkPostgres examines the server of DATABASE_URL.
func (e *examination) checkPostgres(ctx context.Context) []Finding {
	if e.Pool.URL == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, serverTimeout)
	defer cancel()
	r := &report{check: "postgres"}
	cfg := dbpool.DefaultConfig(e.Pool.URL)
	cfg.Size, cfg.MaxOverflow, cfg.Timeout = 1, 1, reachTimeout
	cfg.ThroughPooler = true // it may be
	cfg.Logger = slog.New(slog.DiscardHandler)
	db, err := dbpool.Open(ctx, cfg)
	if err != nil {
		r.fail("", "DATABASE_URL: %v", err)
		return r.findings
	}
	conn, err := acquire(ctx, db)
	if err != nil {
		db.Close()
		r.fail("", "%s", explain("DATABASE_URL", e.Pool.URL, err))
		return r.findings
	}
	e.postgres.db = db
	all := e.checkPostgresServer(ctx, r, conn)
	conn.Release()
	return append(all, e.checkPostgresWorker(ctx, db)...)
}

func acquire(ctx context.Context, db *dbpool.Pool) (*dbpool.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, reachTimeout)
	defer cancel()
	return db.Acquire(ctx)
}

// checkPostgresServer judges the server and the way to it.
func (e *examination) checkPostgresServer(ctx context.Context, r *report, conn *dbpool.Conn) []Finding {
	version, took, err := pingPostgres(ctx, conn)
	if err != nil {
		r.fail("", "%s", explain("DATABASE_URL", e.Pool.URL, err))
		return r.findings
	}
	r.roundTrip(took)
	r.postgresVersion(version)
	all := r.orOK("Postgres %s, a round trip takes %s", version.name, shortTime(took))

	at, err := e.compare(ctx, "Postgres", func(ctx context.Context) (t time.Time, err error) {
		err = conn.QueryRow(ctx, "SELECT clock_timestamp()").Scan(&t)
		return t, err
	})
	if err == nil {
		e.postgres.clock = &at
	}
	raw := conn.Conn().PgConn().Conn()
	all = append(all, e.checkTLS("postgres tls", raw, raw.RemoteAddr(), verifies(conn.Conn().Config()), "add sslmode=verify-full to DATABASE_URL, or use the platform's internal URL")...)
	return append(all, e.checkPooler(ctx, conn)...)
}

// verifies reports whether the server must prove its name.
func verifies(cfg *pgx.ConnConfig) bool {
	return cfg.TLSConfig != nil && (!cfg.TLSConfig.InsecureSkipVerify || cfg.TLSConfig.VerifyPeerCertificate != nil)
}

// oldestPostgres is the first version with gen_random_uuid, which carpool.enqueue calls.
const oldestPostgres = 13

func (r *report) postgresVersion(v postgresVersion) {
	if v.number/10000 < oldestPostgres {
		r.fail("upgrade it", "Postgres %s is older than %d, and lacks what carpool's tables need", v.name, oldestPostgres)
	}
}

type postgresVersion struct {
	name   string
	number int
}

// pingPostgres returns the version, and how long a round trip takes.
func pingPostgres(ctx context.Context, conn *dbpool.Conn) (v postgresVersion, took time.Duration, err error) {
	var times []time.Duration
	for i := range pings {
		started := time.Now()
		if err := conn.QueryRow(ctx, "SELECT current_setting('server_version'), current_setting('server_version_num')::int").Scan(&v.name, &v.number); err != nil {
			return v, 0, err
		}
		if i > 0 { // the first one describes the statement
			times = append(times, time.Since(started))
		}
	}
	v.name, _, _ = strings.Cut(v.name, " ") // of "15.18 (Debian 15.18-0+deb12u1)"
	return v, slices.Min(times), nil
}

// checkPooler finds a pooler by the number of the server's process: that which a client is
// told for cancelling is the pooler's own invention. One in transaction mode gives a second
// client the process that the first has just used, although that is still connected.
func (e *examination) checkPooler(ctx context.Context, conn *dbpool.Conn) []Finding {
	r := &report{check: "postgres pooler"}
	pid, err := backend(ctx, conn)
	if err != nil {
		return []Finding{notSeen(r.check, "", err)}
	}
	e.postgres.pooler = pid != conn.Conn().PgConn().PID()
	if !e.postgres.pooler {
		if e.Pool.ThroughPooler {
			r.warn("unset DB_POOLER", "DB_POOLER is true, and there is no pooler between: statements aren't prepared, and jobs of the outbox wait longer, for nothing")
		}
		return r.orOK("none")
	}
	byTransaction, err := e.poolsTransactions(ctx, conn)
	switch {
	case err != nil && e.Pool.ThroughPooler:
		return r.orOK("one, and DB_POOLER is true")
	case err != nil:
		r.warn("set DB_POOLER=true if it pools transactions", "there is a pooler between, and how it pools can't be told: %s", explain("DATABASE_URL", e.Pool.URL, err))
	case byTransaction && !e.Pool.ThroughPooler:
		r.fail("set DB_POOLER=true; migrate needs the URL that leads to Postgres directly",
			"a pooler in transaction mode is between, and DB_POOLER is not set: statements that were prepared are missing on the next connection, and notices of the outbox are lost")
	}
	if byTransaction {
		return r.orOK("one in transaction mode, and DB_POOLER is true; migrate needs the direct URL")
	}
	return r.orOK("one in session mode: each connection of the worker's is one of the server's")
}

// backend is the number of the server's process that answers.
func backend(ctx context.Context, conn interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
},
) (pid uint32, err error) {
	err = conn.QueryRow(ctx, "SELECT pg_backend_pid()").Scan(&pid)
	return pid, err
}

// poolsTransactions tries more than once, because another client may come between.
func (e *examination) poolsTransactions(ctx context.Context, first *dbpool.Conn) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, reachTimeout/2)
	defer cancel()
	second, err := e.postgres.db.Acquire(ctx)
	if err != nil {
		return false, err
	}
	defer second.Release()
	for range 5 {
		a, err := backend(ctx, first)
		if err != nil {
			return false, err
		}
		b, err := backend(ctx, second)
		if err != nil {
			return false, err
		}
		if a == b {
			return true, nil
		}
	}
	return false, nil
}

// checkPostgresWorker judges what the worker finds there.
func (e *examination) checkPostgresWorker(ctx context.Context, db *dbpool.Pool) []Finding {
	var all []Finding
	if budget, err := WorkerBudget(ctx, db, e.Pool); err == nil {
		e.postgres.budget = &budget
	}
	r := &report{check: "postgres tables"}
	err := schema.Check(ctx, db)
	e.postgres.tables = err == nil
	refused, _ := errors.AsType[*pgconn.PgError](err)
	switch {
	case errors.Is(err, schema.ErrBehind):
		r.fail("run the command migrate", "the database lacks carpool's tables, or their newest form")
	case refused != nil && refused.Code == pgerrcode.InsufficientPrivilege:
		r.fail("the grants that postgres grants names", "the role may not see which migrations are applied")
	case err != nil:
		r.fail("", "%s", explain("DATABASE_URL", e.Pool.URL, err))
	}
	all = append(all, r.orOK("every migration is applied")...)

	var who role
	var super, standby bool
	err = db.QueryRow(ctx, "SELECT current_user::text, current_database()::text, (SELECT rolsuper FROM pg_roles WHERE rolname = current_user), pg_is_in_recovery()").
		Scan(&who.name, &who.database, &super, &standby)
	if err != nil {
		return append(all, notSeen("postgres role", "", err))
	}
	r = &report{check: "postgres role"}
	if standby {
		r.fail("use the URL of its primary; several hosts with target_session_attrs=read-write find it", "the server is a standby, which takes no writes")
	}
	if super {
		r.warn("give the worker a role of its own that may do nothing but what its jobs need; see docs/security.md",
			"the role %s is a superuser, and a job can make it do whatever its handler lets through", who.name)
	}
	all = append(all, r.orOK("%s, no superuser", who.name)...)
	all = append(all, e.checkGrants(ctx, db, who)...)
	return append(all, e.checkSession(ctx, db, who)...)
}

// needs are what a worker does with each of carpool's tables.
func needs() map[string][]string {
	all := []string{"SELECT", "INSERT", "UPDATE", "DELETE"}
	return map[string][]string{
		"schema_version": all[:1], "kinds": all[:3], "settings": all[:3],
		"jobs_done": all, "outbox": all, "schedules": all, "schedule_state": all, "webhook_deliveries": all,
	}
}

// checkGrants asks the catalogs, which everybody may.
func (e *examination) checkGrants(ctx context.Context, db *dbpool.Pool, who role) []Finding {
	r := &report{check: "postgres grants"}
	var tables, privileges []string
	for table, list := range needs() {
		for _, privilege := range list {
			tables, privileges = append(tables, table), append(privileges, privilege)
		}
	}
	rows, err := db.Query(ctx, `
		SELECT 'USAGE ON SCHEMA carpool' FROM pg_namespace WHERE nspname = 'carpool' AND NOT has_schema_privilege(oid, 'USAGE')
		UNION ALL (SELECT string_agg(w.privilege, ', ' ORDER BY w.place) || ' ON carpool.' || w.name
			FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS w(name, privilege, place), pg_class AS c
			WHERE c.relname = w.name AND c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = 'carpool') AND NOT has_table_privilege(c.oid, w.privilege)
			GROUP BY w.name ORDER BY w.name)
		UNION ALL (SELECT 'EXECUTE ON FUNCTION carpool.' || proname FROM pg_proc
			WHERE pronamespace = (SELECT oid FROM pg_namespace WHERE nspname = 'carpool') AND prorettype <> 'trigger'::regtype
			AND NOT has_function_privilege(oid, 'EXECUTE') ORDER BY proname)`, tables, privileges)
	if err != nil {
		return []Finding{notSeen(r.check, "", err)}
	}
	missing, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return []Finding{notSeen(r.check, "", err)}
	}
	if len(missing) > 0 {
		r.fail("as the role that migrated: "+grant(missing, who), "the role %s lacks %s", who.name, strings.Join(missing, "; "))
	}
	if e.Tasks != nil {
		e.checkImports(ctx, db, r, who)
	}
	return r.orOK("the role %s has all that workers need on carpool's tables and functions", who.name)
}

func grant(privileges []string, to role) string {
	statements := make([]string, len(privileges))
	for i, p := range privileges {
		statements[i] = "GRANT " + p + " TO " + to.quoted()
	}
	return strings.Join(statements, "; ")
}

// checkImports is about the one ready-made kind that makes tables.
func (e *examination) checkImports(ctx context.Context, db *dbpool.Pool, r *report, who role) {
	if _, err := e.Tasks.Lookup("csv:import"); err != nil {
		return
	}
	var may bool
	err := db.QueryRow(ctx, `SELECT has_schema_privilege(oid, 'USAGE') AND has_schema_privilege(oid, 'CREATE') FROM pg_namespace WHERE nspname = 'imports'`).Scan(&may)
	if err == nil && !may {
		r.warn("as the role that migrated: "+grant([]string{"USAGE, CREATE ON SCHEMA imports"}, who),
			"the role %s may not make tables in the schema imports, where csv:import does", who.name)
	}
}

// checkConnections compares what the server allows with what the fleet takes when a deploy
// runs it twice. up is how many instances there are.
func (e *examination) checkConnections(up int) []Finding {
	if e.postgres.db == nil || len(e.Faults) > 0 {
		return nil
	}
	r := &report{check: "postgres connections"}
	b := e.postgres.budget
	switch {
	case b == nil:
		return []Finding{notSeen(r.check, "", errors.New("the server doesn't say how many it allows"))}
	case e.postgres.pooler:
		return r.orOK("the pooler shares them out: its max_client_conn must allow %d for each instance, twice during a deploy", b.PerInstance)
	}
	instances := max(1, up)
	if warning := b.Warning(instances); warning != "" {
		r.fail("", "%s", warning)
	} else if free := b.MaxConnections - b.Reserved - b.InUse; free < b.PerInstance {
		r.warn("see who has them: SELECT usename, application_name, count(*) FROM pg_stat_activity GROUP BY 1, 2",
			"%d of the server's %d are in use by all, and one more instance, as during a deploy, takes up to %d", b.InUse, b.MaxConnections-b.Reserved, b.PerInstance)
	}
	return r.orOK("%s of %d, twice during a deploy, of %d; %d are in use by all", plural(instances, "instance"), b.PerInstance, b.Usable(), b.InUse)
}

// setting is one of the session's.
type setting struct{ name, value, source string }

// sessionSettings are looked at; not every version has each.
var sessionSettings = []string{
	"default_transaction_isolation", "default_transaction_read_only", "statement_timeout", "lock_timeout", "transaction_timeout",
	"idle_in_transaction_session_timeout", "idle_session_timeout", "synchronous_commit", "session_replication_role",
	"fsync", "full_page_writes", "autovacuum",
}

// wayOut says where the value of a setting is to be changed.
func (s setting) wayOut(who role, value string) string {
	if s.source == "client" {
		return "take " + s.name + " out of DATABASE_URL"
	}
	return fmt.Sprintf("ALTER ROLE %s IN DATABASE %s SET %s = '%s'", who.quoted(), pgx.Identifier{who.database}.Sanitize(), s.name, value)
}

// checkSession judges the settings that the worker's sessions begin with, which come of the
// role, the database, the URL or the server's configuration.
func (e *examination) checkSession(ctx context.Context, db *dbpool.Pool, who role) []Finding {
	r := &report{check: "postgres session"}
	rows, err := db.Query(ctx, "SELECT name, setting, source FROM pg_settings WHERE name = ANY ($1)", sessionSettings)
	if err != nil {
		return []Finding{notSeen(r.check, "", err)}
	}
	list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (s setting, err error) {
		return s, row.Scan(&s.name, &s.value, &s.source)
	})
	if err != nil {
		return []Finding{notSeen(r.check, "", err)}
	}
	for _, s := range list {
		e.judgeSetting(r, s, who)
	}
	return r.orOK("read committed, synchronous, no timeouts")
}

func (e *examination) judgeSetting(r *report, s setting, who role) {
	longest, kind := e.longest()
	ms := milliseconds(s.value)
	const server = "set it in the server's configuration"
	switch {
	case s.name == "default_transaction_isolation" && s.value != "read committed":
		r.warn(s.wayOut(who, "read committed")+", and give kinds that need more their own (Options.Isolation)",
			"%s is %s: transactions that meet fail, and jobs run again for it", s.name, s.value)
	case s.name == "default_transaction_read_only" && s.value == "on":
		r.fail(s.wayOut(who, "off"), "%s is on: the worker can write nothing", s.name)
	case (s.name == "statement_timeout" || s.name == "transaction_timeout" || s.name == "idle_in_transaction_session_timeout") && ms > 0 && ms < longest:
		r.warn(s.wayOut(who, "0")+"; a job is bounded by its kind's timeout",
			"%s is %s: it ends what jobs do before their own timeouts, which for %s is %s", s.name, ms, kind, longest)
	case s.name == "lock_timeout" && ms > 0 && ms < time.Second:
		r.warn(s.wayOut(who, "0"), "%s is %s: jobs that meet at a row fail", s.name, ms)
	case s.name == "idle_session_timeout" && ms > 0:
		r.warn(s.wayOut(who, "0"), "%s is %s: the server ends connections that the pool keeps open, and the outbox's, which waits for notices", s.name, ms)
	case s.name == "synchronous_commit" && s.value == "off":
		r.warn(s.wayOut(who, "on"), "%s is off: a crash of the server may undo what jobs committed that Redis was told are done", s.name)
	case s.name == "session_replication_role" && s.value != "origin":
		r.fail(s.wayOut(who, "origin"), "%s is %s: the triggers of carpool's tables don't run", s.name, s.value)
	case (s.name == "fsync" || s.name == "full_page_writes") && s.value == "off":
		r.warn(server+": "+s.name+" = on", "%s is off: a crash of the machine may cost the whole database", s.name)
	case s.name == "autovacuum" && s.value == "off":
		r.warn(server+": autovacuum = on", "autovacuum is off: the outbox, whose rows are soon dead, grows without end")
	}
}

// longest is the longest timeout of the kinds, and a kind that has it.
func (e *examination) longest() (longest time.Duration, kind string) {
	if e.Tasks == nil {
		return 0, ""
	}
	for _, name := range e.Tasks.Kinds() {
		if task, err := e.Tasks.Lookup(name); err == nil && task.Options.Timeout > longest {
			longest, kind = task.Options.Timeout, name
		}
	}
	return longest, kind
}

// milliseconds is the value of a setting of Postgres' in this unit.
func milliseconds(value string) time.Duration {
	d, _ := time.ParseDuration(value + "ms")
	return d
}
