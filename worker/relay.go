package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime/debug"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/pgtext"
	"github.com/carpool-go/carpool/internal/wait"
	"github.com/carpool-go/carpool/tasks"
)

// relay moves committed rows of carpool.outbox to Redis, on a connection of its
// own. Any number of relays share the work: each locks the rows it moves, and
// passes over those that another has locked.
//
// A row is deleted when Redis has its job. Whatever comes between the two, the
// row is moved again, under the same id, which Redis has already.
type relay struct {
	cfg             relayConfig
	connConfig      *pgx.ConnConfig
	kinds           []string
	postgres, redis outage
	woken           bool      // a notification has come since the last look
	tidied          time.Time // when the last tidy was
	pace            pace
	caughtUp        chan struct{}
	caughtUpOnce    sync.Once
	cancel          context.CancelFunc
	done            chan struct{}
}

type relayConfig struct {
	db     dbpool.Config // its URL and ThroughPooler are used
	set    *tasks.Set
	client *tasks.Client
	log    *slog.Logger
	// pollEvery is how often the relay looks without having been notified; 0 is
	// relayPoll, or relayPollPooler.
	pollEvery time.Duration
}

const (
	// relayBatch is how many rows are locked and moved in one transaction.
	relayBatch = 500
	// relayAtOnce is how many of them are on their way to Redis at once.
	relayAtOnce = 16
	// relayPoll is how often a relay looks without having been notified, in case
	// a notification is lost: a pooler that nobody told of loses them all.
	relayPoll = time.Second
	// relayPollPooler is how often it looks where it can't be notified.
	relayPollPooler = 250 * time.Millisecond
	// relayBusy is how many rows in a second make a relay busy: it then looks
	// every relayPollBusy, and producers don't notify it.
	relayBusy     = 50
	relayPollBusy = 10 * time.Millisecond
	// relayRedisTimeout bounds a batch's time with Redis, and relayTimeout its
	// whole time, while which other relays can't have its rows.
	relayRedisTimeout = 4 * time.Second
	relayTimeout      = 10 * time.Second
	// relayStopGrace is what a batch may still take when the relay stops.
	relayStopGrace = 2 * time.Second
	// relayTidyEvery is how often the rows of unknown kinds are looked through.
	relayTidyEvery = time.Minute
	// relayBackoff is the longest wait between two tries while a server is away.
	relayBackoff = 2 * time.Second
)

// startRelay starts a relay, which goes on until stop, whatever becomes of the
// servers.
func startRelay(cfg relayConfig) (*relay, error) {
	pool, err := pgxpool.ParseConfig(cfg.db.URL) // which also takes the URL's pool_* settings
	if err != nil {
		return nil, cfg.db.Validate() // an error that doesn't show the URL
	}
	switch {
	case cfg.pollEvery != 0:
	case cfg.db.ThroughPooler:
		cfg.pollEvery = relayPollPooler
	default:
		cfg.pollEvery = relayPoll
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &relay{
		cfg: cfg, connConfig: pool.ConnConfig, kinds: cfg.set.Kinds(),
		postgres: outage{log: cfg.log, server: "Postgres"},
		redis:    outage{log: cfg.log, server: "Redis"},
		caughtUp: make(chan struct{}),
		cancel:   cancel, done: make(chan struct{}),
	}
	r.connConfig.RuntimeParams["application_name"] = "carpool relay"
	r.connConfig.OnNotification = func(*pgconn.PgConn, *pgconn.Notification) { r.woken = true }
	if r.connConfig.ConnectTimeout <= 0 {
		r.connConfig.ConnectTimeout = 5 * time.Second
	}
	if cfg.db.ThroughPooler {
		r.connConfig.DefaultQueryExecMode = pgx.QueryExecModeCacheDescribe
		r.connConfig.StatementCacheCapacity = 0
	}
	go func() {
		defer close(r.done)
		for ctx.Err() == nil {
			if err := r.session(ctx); ctx.Err() == nil {
				_ = wait.For(ctx, r.postgres.goesOn(err))
			}
		}
	}()
	return r, nil
}

// stop ends the relay. A batch that is under way may be finished, within
// relayStopGrace.
func (r *relay) stop() {
	r.cancel()
	<-r.done
}

// session connects and moves rows until the connection breaks, or ctx ends.
func (r *relay) session(ctx context.Context) error {
	connectCtx, cancel := context.WithTimeout(ctx, r.connConfig.ConnectTimeout+time.Second)
	defer cancel()
	conn, err := pgx.ConnectConfig(connectCtx, r.connConfig)
	if err != nil {
		return err
	}
	defer func() {
		closeCtx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = conn.Close(closeCtx)
	}()
	if !r.cfg.db.ThroughPooler {
		if _, err := conn.Exec(connectCtx, listen); err != nil {
			return fmt.Errorf("listen: %w", err)
		}
	}
	r.tidied, r.pace = time.Time{}, pace{since: time.Now()}
	for ctx.Err() == nil {
		if time.Since(r.tidied) > relayTidyEvery {
			if err := r.tidy(ctx, conn); err != nil {
				return err
			}
			r.tidied = time.Now()
		}
		r.woken = false
		b, err := r.move(ctx, conn)
		if err != nil {
			return fmt.Errorf("move the outbox: %w", err)
		}
		r.postgres.over()
		if b.refused != nil {
			if pause := r.redis.goesOn(b.refused); len(b.gone) == 0 || b.rows < relayBatch {
				_ = wait.For(ctx, pause)
			}
			continue
		}
		if b.rows > 0 {
			r.redis.over()
		}
		if again, err := r.keepPace(ctx, conn, b.rows); err != nil {
			return err
		} else if again || b.rows == relayBatch {
			continue
		}
		r.caughtUpOnce.Do(func() { close(r.caughtUp) })
		if err := r.wait(ctx, conn); err != nil {
			return err
		}
	}
	return nil
}

// listen also lets the server find out soon that the relay's host has vanished,
// as a busy relay's lock ends with its connection.
const listen = `SET tcp_keepalives_idle = 15; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3;
	SET tcp_user_timeout = '20s'; LISTEN carpool_outbox`

// wait returns when a notification has come since the last look, or it is time
// to look without one.
func (r *relay) wait(ctx context.Context, conn *pgx.Conn) error {
	if r.cfg.db.ThroughPooler {
		_ = wait.For(ctx, r.cfg.pollEvery)
		return nil
	}
	if r.woken {
		return nil
	}
	if r.pace.busy {
		_ = wait.For(ctx, relayPollBusy)
		return nil
	}
	waitCtx, cancel := context.WithTimeout(ctx, r.cfg.pollEvery)
	defer cancel()
	if err := conn.PgConn().WaitForNotification(waitCtx); err != nil && waitCtx.Err() == nil {
		return fmt.Errorf("wait for notifications: %w", err)
	}
	return nil
}

// pace is whether a relay has much to do, judged once a second.
type pace struct {
	busy  bool
	holds bool // the lock that keeps producers from notifying
	rows  int
	since time.Time // when the counting of rows began
}

// relayLock is the advisory lock of a busy relay; see carpool.enqueue. One of
// several busy relays has it, and it ends with the connection.
const relayLock = 491327873401

// keepPace counts rows and takes or gives up relayLock accordingly. It reports
// whether to look again at once: what was committed while producers did not
// notify must be seen before the relay waits for a notification.
//
// A transaction that began to enqueue while a relay was busy, and commits after
// the last look, is found within relayPoll.
func (r *relay) keepPace(ctx context.Context, conn *pgx.Conn, rows int) (again bool, err error) {
	r.pace.rows += rows
	if time.Since(r.pace.since) < time.Second || r.cfg.db.ThroughPooler {
		return false, nil
	}
	r.pace.busy = r.pace.rows >= relayBusy
	r.pace.rows, r.pace.since = 0, time.Now()
	if r.pace.busy == r.pace.holds {
		return false, nil
	}
	sql := "SELECT pg_try_advisory_lock($1)"
	if r.pace.holds {
		sql = "SELECT NOT pg_advisory_unlock($1)"
	}
	ctx, cancel := context.WithTimeout(ctx, relayTimeout)
	defer cancel()
	if err := conn.QueryRow(ctx, sql, int64(relayLock)).Scan(&r.pace.holds); err != nil {
		return false, fmt.Errorf("lock or unlock what keeps producers from notifying: %w", err)
	}
	return !r.pace.busy, nil
}

// outboxRow is a row of carpool.outbox; nil is null.
type outboxRow struct {
	id, kind           string
	payload            []byte
	queue, uniqueKey   *string
	runAt              *time.Time
	maxRetry           *int
	timeout, retention *float64 // in seconds
}

// An idle_in_transaction_session_timeout frees the rows of a worker that hangs,
// or was put to sleep.
const (
	beginMove = "BEGIN; SET LOCAL idle_in_transaction_session_timeout = '15s'"

	selectRows = `SELECT id::text, kind, payload::text, queue, unique_key, run_at, max_retry,
			extract(epoch FROM timeout)::float8, extract(epoch FROM retention)::float8
		FROM carpool.outbox WHERE problem IS NULL AND kind = ANY ($1) ORDER BY seq LIMIT $2 FOR UPDATE SKIP LOCKED`

	deleteRows = `DELETE FROM carpool.outbox WHERE id = ANY ($1::text[]::uuid[])`

	setRowsAside = `UPDATE carpool.outbox AS o SET problem = p.problem
		FROM unnest($1::text[], $2::text[]) AS p(id, problem) WHERE o.id = p.id::uuid`
)

// batch is what became of the rows of one transaction.
type batch struct {
	rows    int
	refused error // Redis' last error

	mu         sync.Mutex
	failures   int
	gone       []string // ids of those that Redis has, or need not have
	aside      []string // ids of those that can't become a job,
	problems   []string // and why
	afterwards []func() // what to log when it is committed
}

// move locks rows, moves them to Redis and deletes them. Its error is that of
// Postgres.
func (r *relay) move(ctx context.Context, conn *pgx.Conn) (*batch, error) {
	work, cancel := context.WithTimeout(context.WithoutCancel(ctx), relayTimeout)
	defer cancel()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(relayStopGrace, cancel) })()
	tx, err := conn.BeginTx(work, pgx.TxOptions{BeginQuery: beginMove})
	if err != nil {
		return nil, err
	}
	defer tx.Rollback(work)

	b := new(batch)
	if err := r.enqueue(ctx, work, tx, b); err != nil {
		return nil, err
	}
	if len(b.gone)+len(b.aside) > 0 {
		changes := new(pgx.Batch)
		changes.Queue(deleteRows, b.gone)
		changes.Queue(setRowsAside, b.aside, b.problems)
		if err := tx.SendBatch(work, changes).Close(); err != nil {
			return nil, err
		}
	}
	if err := tx.Commit(work); err != nil {
		return nil, err
	}
	for _, log := range b.afterwards {
		log()
	}
	return b, nil
}

// enqueue locks rows and enqueues their jobs while it reads them, so that it
// holds no more payloads than are on their way. It stops when ctx ends, or when
// so many have failed that it must be Redis, not the jobs.
func (r *relay) enqueue(ctx, work context.Context, tx pgx.Tx, b *batch) error {
	redisCtx, cancel := context.WithTimeout(work, relayRedisTimeout)
	defer cancel()
	rows, err := tx.Query(work, selectRows, r.kinds, relayBatch)
	if err != nil {
		return err
	}
	defer rows.Close()
	var jobs sync.WaitGroup
	defer jobs.Wait()
	slots := make(chan struct{}, relayAtOnce)
	for rows.Next() {
		var row outboxRow
		if err := rows.Scan(&row.id, &row.kind, &row.payload, &row.queue, &row.uniqueKey, &row.runAt, &row.maxRetry, &row.timeout, &row.retention); err != nil {
			return err
		}
		b.rows++
		slots <- struct{}{}
		b.mu.Lock()
		giveUp := ctx.Err() != nil || b.failures >= relayAtOnce
		b.mu.Unlock()
		if giveUp {
			<-slots
			continue
		}
		jobs.Go(func() {
			defer func() { <-slots }()
			err := r.enqueueRow(redisCtx, row)
			b.mu.Lock()
			defer b.mu.Unlock()
			b.note(row, err, r.cfg.log)
		})
	}
	return rows.Err()
}

func (r *relay) enqueueRow(ctx context.Context, row outboxRow) (err error) {
	defer func() { // a task's own code may encode its payload
		if p := recover(); p != nil {
			r.cfg.log.Error("a task panicked over a row of the outbox", "job_id", row.id, "kind", row.kind, "stack", string(debug.Stack()))
			err = tasks.Permanent(fmt.Errorf("%s payload: enqueueing it panicked", row.kind))
		}
	}()
	task, err := r.cfg.set.Lookup(row.kind)
	if err != nil {
		return err
	}
	payload, err := task.Decode(row.payload)
	if err != nil {
		return err
	}
	opts := &tasks.EnqueueOptions{ID: row.id, Timeout: seconds(row.timeout), Retention: seconds(row.retention)}
	if row.queue != nil {
		opts.Queue = *row.queue
	}
	if row.uniqueKey != nil {
		opts.UniqueKey = *row.uniqueKey
	}
	if row.runAt != nil {
		opts.RunAt = *row.runAt
	}
	if row.maxRetry != nil {
		opts.MaxRetry = *row.maxRetry
		if opts.MaxRetry == 0 {
			opts.MaxRetry = tasks.NoRetry
		}
	}
	_, err = r.cfg.client.Enqueue(ctx, payload, opts)
	return err
}

func seconds(s *float64) time.Duration {
	if s == nil {
		return 0
	}
	return time.Duration(*s * float64(time.Second))
}

// note says what becomes of a row whose enqueueing ended with err.
func (b *batch) note(row outboxRow, err error, log *slog.Logger) {
	duplicate, isDuplicate := errors.AsType[*tasks.DuplicateError](err)
	switch {
	case err == nil:
		b.gone = append(b.gone, row.id)
	case isDuplicate:
		b.gone = append(b.gone, row.id)
		b.afterwards = append(b.afterwards, func() {
			log.Info("a job of the outbox was dropped: another one holds its unique key", "job_id", row.id, "kind", row.kind, "held_by", duplicate.ID)
		})
	case tasks.IsPermanent(err):
		problem := pgtext.Clean(err.Error())
		b.aside = append(b.aside, row.id)
		b.problems = append(b.problems, problem)
		b.afterwards = append(b.afterwards, func() {
			log.Warn("a row of the outbox can't become a job, and was set aside", "job_id", row.id, "kind", row.kind, "problem", problem)
		})
	default:
		b.failures++
		b.refused = err
	}
}

const (
	// unknownKind begins the problem of rows that no relay takes. A worker that
	// knows the kind may come with the next deploy.
	unknownKind = "no worker knows the kind "

	takeUpKnown = `UPDATE carpool.outbox SET problem = NULL WHERE problem = $2 || kind AND kind = ANY ($1)`

	setAsideUnknown = `WITH aside AS (
			UPDATE carpool.outbox SET problem = $2 || kind WHERE id IN (
				SELECT id FROM carpool.outbox WHERE problem IS NULL AND kind <> ALL ($1)
				AND created_at < now() - interval '10 minutes' FOR UPDATE SKIP LOCKED)
			RETURNING kind)
		SELECT kind, count(*) FROM aside GROUP BY kind ORDER BY kind`
)

// tidy sets aside rows whose kind nobody has known for long, and takes up those
// set aside whose kind is known here.
func (r *relay) tidy(ctx context.Context, conn *pgx.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, relayTimeout)
	defer cancel()
	if _, err := conn.Exec(ctx, takeUpKnown, r.kinds, unknownKind); err != nil {
		return fmt.Errorf("take up rows of the outbox that were set aside: %w", err)
	}
	rows, err := conn.Query(ctx, setAsideUnknown, r.kinds, unknownKind)
	if err != nil {
		return fmt.Errorf("set rows of the outbox aside: %w", err)
	}
	var kind string
	var n int
	_, err = pgx.ForEachRow(rows, []any{&kind, &n}, func() error {
		r.cfg.log.Warn("rows of the outbox were set aside: "+unknownKind+kind, "rows", n)
		return nil
	})
	if err != nil {
		return fmt.Errorf("set rows of the outbox aside: %w", err)
	}
	return nil
}

// outboxFigures tells how many rows of the outbox wait for a relay, for how long
// the oldest of them has, and how many were set aside.
func outboxFigures(ctx context.Context, db interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
},
) (waiting int, oldest time.Duration, setAside int, err error) {
	var s float64
	err = db.QueryRow(ctx, `SELECT count(*) FILTER (WHERE problem IS NULL), count(*) FILTER (WHERE problem IS NOT NULL),
		coalesce(extract(epoch FROM clock_timestamp() - min(created_at) FILTER (WHERE problem IS NULL)), 0)::float8
		FROM carpool.outbox`).Scan(&waiting, &setAside, &s)
	if err != nil {
		return 0, 0, 0, fmt.Errorf("look at the outbox: %w", err)
	}
	return waiting, max(0, seconds(&s)), setAside, nil
}

// outage logs when a server goes and when it is back, and nothing in between.
type outage struct {
	log    *slog.Logger
	server string
	since  time.Time // zero: it is there
	tries  int
}

// goesOn notes another failure and returns how long to wait before the next try.
func (o *outage) goesOn(err error) time.Duration {
	if o.since.IsZero() {
		o.since = time.Now()
		o.log.Warn("the outbox waits: "+o.server+" does not serve it", "error", err)
	}
	wait := min(relayBackoff, 50*time.Millisecond<<min(o.tries, 10))
	o.tries++
	return wait/2 + rand.N(wait/2)
}

func (o *outage) over() {
	if !o.since.IsZero() {
		o.log.Info("the outbox goes on: "+o.server+" serves it again", "after", time.Since(o.since).Round(time.Millisecond).String())
	}
	o.since, o.tries = time.Time{}, 0
}
