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
	"github.com/carpool-go/carpool/internal/outbox"
	"github.com/carpool-go/carpool/internal/pgtext"
	"github.com/carpool-go/carpool/internal/wait"
	"github.com/carpool-go/carpool/tasks"
)

// relay moves committed rows of carpool.outbox to Redis, on a connection of its
// own. Any number of relays share the work, because each locks the rows it moves
// and passes over those that another has locked.
//
// A row is deleted when Redis has its job. Whatever comes between the two, the
// row is moved again under the same id, which Redis has already.
type relay struct {
	cfg        relayConfig
	connConfig *pgx.ConnConfig
	kinds      []string // that its rows may be of
	caughtUp   chan struct{}
	cancel     context.CancelFunc // nil before Start
	running    sync.WaitGroup

	// What follows belongs to the goroutine that Start begins.
	postgres, redis outage
	woken           bool      // a notification has come since the last look
	tidied          time.Time // when rows of unknown kinds were last looked through
	load            load
	markCaughtUp    func()
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
	// relayPoll is how often a relay looks without having been notified, because
	// a notification may be lost: a pooler that nobody told of loses them all.
	relayPoll = time.Second
	// relayPollPooler is how often it looks where it can't be notified.
	relayPollPooler = 250 * time.Millisecond
	// relayBusy is how many rows in a second make a relay busy: it then looks
	// every relayPollBusy, and producers don't notify it.
	relayBusy     = 50
	relayPollBusy = 10 * time.Millisecond
	// relayRedisTimeout bounds a batch's time with Redis, and relayTimeout its
	// whole time, during which other relays can't have its rows.
	relayRedisTimeout = 4 * time.Second
	relayTimeout      = 10 * time.Second
	// relayStopGrace is what a batch may still take when the relay stops.
	relayStopGrace = 2 * time.Second
	// relayTidyEvery is how often the rows of unknown kinds are looked through.
	relayTidyEvery = time.Minute
	// relayBackoff is the longest wait between two tries while a server is away.
	relayBackoff = 2 * time.Second
)

// newRelay returns a relay that [relay.Start] starts. Its error is about the URL
// of the database, and doesn't show it.
func newRelay(cfg relayConfig) (*relay, error) {
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
	caughtUp := make(chan struct{})
	r := &relay{
		cfg: cfg, connConfig: pool.ConnConfig, kinds: cfg.set.Kinds(),
		caughtUp: caughtUp, markCaughtUp: sync.OnceFunc(func() { close(caughtUp) }),
		postgres: outage{log: cfg.log, server: "Postgres"},
		redis:    outage{log: cfg.log, server: "Redis"},
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
	return r, nil
}

// Start begins to move rows, which goes on until Stop, whatever becomes of the
// servers: one that is away is no error, it is waited for.
func (r *relay) Start() error {
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	r.running.Go(func() {
		for ctx.Err() == nil {
			if err := r.session(ctx); ctx.Err() == nil {
				_ = wait.For(ctx, r.postgres.note(err))
			}
		}
	})
	return nil
}

// Stop ends the relay and waits until it has ended. A batch that is under way may
// be finished, within relayStopGrace. It may be called twice, and without Start.
func (r *relay) Stop() {
	if r.cancel != nil {
		r.cancel()
	}
	r.running.Wait()
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
	r.tidied, r.load = time.Time{}, load{since: time.Now()}
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
		r.postgres.end()
		if b.redisErr != nil {
			if pause := r.redis.note(b.redisErr); len(b.moved) == 0 || b.rows < relayBatch {
				_ = wait.For(ctx, pause)
			}
			continue
		}
		if b.rows > 0 {
			r.redis.end()
		}
		again, err := r.followLoad(ctx, conn, b.rows)
		if err != nil {
			return err
		}
		if again || b.rows == relayBatch {
			continue
		}
		r.markCaughtUp()
		if err := r.awaitRows(ctx, conn); err != nil {
			return err
		}
	}
	return nil
}

// listen also lets the server find out soon that the relay's host has vanished,
// because a busy relay's lock ends with its connection.
const listen = `SET tcp_keepalives_idle = 15; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3;
	SET tcp_user_timeout = '20s'; LISTEN ` + outbox.Channel

// awaitRows returns when a notification has come since the last look, or it is
// time to look without one.
func (r *relay) awaitRows(ctx context.Context, conn *pgx.Conn) error {
	switch {
	case r.cfg.db.ThroughPooler:
		_ = wait.For(ctx, r.cfg.pollEvery)
		return nil
	case r.woken:
		return nil
	case r.load.busy:
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

// load is whether a relay has much to do, judged once a second.
type load struct {
	busy  bool
	muted bool // this relay keeps producers from notifying
	rows  int
	since time.Time // when the counting of rows began
}

// followLoad counts rows, and mutes producers while there are many. It reports
// whether to look again at once, because what was committed while producers did
// not notify must be seen before the relay waits for a notification.
//
// A transaction that began to enqueue while a relay was busy, and commits after
// the last look, is found within relayPoll.
func (r *relay) followLoad(ctx context.Context, conn *pgx.Conn, rows int) (again bool, err error) {
	r.load.rows += rows
	if time.Since(r.load.since) < time.Second || r.cfg.db.ThroughPooler {
		return false, nil
	}
	r.load.busy = r.load.rows >= relayBusy
	r.load.rows, r.load.since = 0, time.Now()
	if r.load.busy == r.load.muted {
		return false, nil
	}
	change := outbox.Mute
	if r.load.muted {
		change = outbox.Unmute
	}
	ctx, cancel := context.WithTimeout(ctx, relayTimeout)
	defer cancel()
	if r.load.muted, err = change(ctx, conn); err != nil {
		return false, fmt.Errorf("lock or unlock what keeps producers from notifying: %w", err)
	}
	return !r.load.busy, nil
}

// batch is what became of the rows of one transaction.
type batch struct {
	rows     int
	redisErr error // the last one that says that Redis is away

	mu          sync.Mutex // guards what the rows' goroutines write
	failures    int        // rows that Redis did not take
	moved       []string   // ids of those whose jobs Redis has, or need not have
	rejected    []outbox.Rejection
	afterCommit []func() // logs what has then become of them
}

// move locks rows, moves them to Redis and deletes them. Its error is that of
// Postgres.
func (r *relay) move(ctx context.Context, conn *pgx.Conn) (*batch, error) {
	work, cancel := context.WithTimeout(context.WithoutCancel(ctx), relayTimeout)
	defer cancel()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(relayStopGrace, cancel) })()
	tx, err := outbox.Begin(work, conn)
	if err != nil {
		return nil, err
	}
	defer tx.Rollback(work)

	b := new(batch)
	if err := r.enqueueRows(ctx, work, tx, b); err != nil {
		return nil, err
	}
	if len(b.moved)+len(b.rejected) > 0 {
		if err := outbox.Finish(work, tx, b.moved, b.rejected); err != nil {
			return nil, err
		}
	}
	if err := tx.Commit(work); err != nil {
		return nil, err
	}
	for _, log := range b.afterCommit {
		log()
	}
	return b, nil
}

// enqueueRows locks rows and enqueues their jobs while it reads them, so that it
// holds no more payloads than are on their way. It enqueues no more when ctx ends,
// or when so many have failed that it must be Redis, not the jobs.
func (r *relay) enqueueRows(ctx, work context.Context, tx pgx.Tx, b *batch) error {
	redisCtx, cancel := context.WithTimeout(work, relayRedisTimeout)
	defer cancel()
	var jobs sync.WaitGroup
	defer jobs.Wait()
	slots := make(chan struct{}, relayAtOnce)
	return outbox.Take(work, tx, r.kinds, relayBatch, func(row outbox.Row) {
		b.rows++
		slots <- struct{}{}
		b.mu.Lock()
		giveUp := ctx.Err() != nil || b.failures >= relayAtOnce
		b.mu.Unlock()
		if giveUp {
			<-slots
			return
		}
		jobs.Go(func() {
			defer func() { <-slots }()
			err := r.enqueueRow(redisCtx, row)
			b.mu.Lock()
			defer b.mu.Unlock()
			b.record(row, err, r.cfg.log)
		})
	})
}

// enqueueRow enqueues a row's job. The error is a [tasks.DuplicateError], a
// permanent one of the row's own, or one of Redis.
func (r *relay) enqueueRow(ctx context.Context, row outbox.Row) (err error) {
	defer func() { // a task's own code may encode its payload
		if p := recover(); p != nil {
			r.cfg.log.Error("a task panicked over a row of the outbox", "job_id", row.ID, "kind", row.Kind, "stack", string(debug.Stack()))
			err = tasks.Permanent(fmt.Errorf("%s payload: enqueueing it panicked", row.Kind))
		}
	}()
	task, err := r.cfg.set.Lookup(row.Kind)
	if err != nil {
		return err
	}
	payload, err := task.Decode(row.Payload)
	if err != nil {
		return err
	}
	opts := &tasks.EnqueueOptions{
		ID: row.ID, Queue: row.Queue, UniqueKey: row.UniqueKey, RunAt: row.RunAt, Timeout: row.Timeout, Retention: row.Retention,
	}
	if row.MaxRetry != nil {
		opts.MaxRetry = *row.MaxRetry
		if opts.MaxRetry == 0 {
			opts.MaxRetry = tasks.NoRetry
		}
	}
	_, err = r.cfg.client.Enqueue(ctx, payload, opts)
	return err
}

// record decides what becomes of a row whose enqueueing ended with err.
func (b *batch) record(row outbox.Row, err error, log *slog.Logger) {
	duplicate, isDuplicate := errors.AsType[*tasks.DuplicateError](err)
	switch {
	case err == nil:
		b.moved = append(b.moved, row.ID)
	case isDuplicate:
		b.moved = append(b.moved, row.ID)
		b.afterCommit = append(b.afterCommit, func() {
			log.Info("a job of the outbox was dropped: another one holds its unique key", "job_id", row.ID, "kind", row.Kind, "held_by", duplicate.ID)
		})
	case tasks.IsPermanent(err):
		problem := pgtext.Clean(err.Error())
		b.rejected = append(b.rejected, outbox.Rejection{ID: row.ID, Problem: problem})
		b.afterCommit = append(b.afterCommit, func() {
			log.Warn("a row of the outbox can't become a job, and was set aside", "job_id", row.ID, "kind", row.Kind, "problem", problem)
		})
	default:
		b.failures++
		b.redisErr = err
	}
}

// tidy readmits rejected rows whose kind is known here, and rejects those whose
// kind nobody has known for long.
func (r *relay) tidy(ctx context.Context, conn *pgx.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, relayTimeout)
	defer cancel()
	if err := outbox.Readmit(ctx, conn, r.kinds); err != nil {
		return err
	}
	rejected, err := outbox.RejectUnknown(ctx, conn, r.kinds)
	if err != nil {
		return err
	}
	for _, k := range rejected {
		r.cfg.log.Warn("rows of the outbox were set aside: "+outbox.UnknownKind+k.Kind, "rows", k.Rows)
	}
	return nil
}

// outage logs when a server goes and when it is back, and nothing in between.
type outage struct {
	log    *slog.Logger
	server string
	since  time.Time // zero: there is none
	tries  int
}

// note counts another failure and returns how long to wait before the next try.
func (o *outage) note(err error) time.Duration {
	if o.since.IsZero() {
		o.since = time.Now()
		o.log.Warn("the outbox waits: "+o.server+" does not serve it", "error", err)
	}
	pause := min(relayBackoff, 50*time.Millisecond<<min(o.tries, 10))
	o.tries++
	return pause/2 + rand.N(pause/2)
}

// end says that the server has answered.
func (o *outage) end() {
	if !o.since.IsZero() {
		o.log.Info("the outbox goes on: "+o.server+" serves it again", "after", time.Since(o.since).Round(time.Millisecond).String())
	}
	o.since, o.tries = time.Time{}, 0
}
