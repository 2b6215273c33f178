// Package relay moves jobs from the outbox in Postgres to their queues in Redis.
package relay

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/outbox"
	"github.com/carpool-go/carpool/internal/pgtext"
	"github.com/carpool-go/carpool/internal/wait"
	"github.com/carpool-go/carpool/tasks"
)

// Relay moves committed rows of carpool.outbox to Redis, on a connection of its
// own. Any number of relays share the work, because each locks the rows it moves
// and passes over those that another has locked.
//
// A row is deleted when Redis has its job. Whatever comes between the two, the
// row is moved again under the same id, which Redis has already.
type Relay struct {
	cfg        Config
	connConfig *pgx.ConnConfig
	kinds      []string // the kinds of the rows that it moves
	caughtUp   chan struct{}

	ending  context.Context // ends with Stop
	end     context.CancelFunc
	running sync.WaitGroup

	// What follows belongs to the goroutine that Start begins.
	postgres, redis outage
	woken           bool      // a notification has come since the last move began
	tidied          time.Time // when tidy was last called
	toldUnknown     []string  // the kinds that warnOfUnknown has logged
	held            held
	load            load
	markCaughtUp    func()
}

// Config is what a [Relay] works with. All fields but FleetKinds and PollEvery are required.
type Config struct {
	// DB is the database that has the outbox; only its URL and ThroughPooler are used.
	DB dbpool.Config
	// Tasks has the kinds of the rows that the relay moves. Rows of other kinds wait
	// for a worker that knows them, and are rejected after ten minutes.
	Tasks *tasks.Set
	// Redis has the queues.
	Redis redis.UniversalClient
	Log   *slog.Logger
	// FleetKinds returns the kinds that all workers that are up know; ok is false if that
	// can't be said. With nil, the relay logs no kind that nobody knows before it rejects
	// the rows.
	FleetKinds func(context.Context) (kinds []string, ok bool, err error)
	// PollEvery is how often the relay looks for rows without having been notified; 0 is
	// a second, or a quarter of one through a pooler.
	PollEvery time.Duration

	batchBytes int // for tests; 0 is batchBytes
}

const (
	// batchSize is how many rows are locked and moved in one transaction.
	batchSize = 500
	// batchBytes is how many bytes the payloads of a batch have together, unless a single
	// one has more: what the relay holds of payloads is a few times as much.
	batchBytes = 4 << 20
	// atOnce is how many of a batch's rows are on their way to Redis at once. After so many
	// failures the rest of a batch is left out.
	atOnce = 16
	// poll is how often a relay looks for rows without having been notified, because
	// notifications may be lost, and all are behind a pooler if ThroughPooler is false.
	poll = time.Second
	// pollPooler is how often it looks through a pooler, where nothing notifies it.
	pollPooler = 250 * time.Millisecond
	// busyRows is how many rows in a second make a relay busy: it then looks
	// every pollBusy, and producers don't notify it.
	busyRows = 50
	pollBusy = 10 * time.Millisecond
	// redisTimeout bounds a batch's time with Redis, and batchTimeout its
	// whole time, during which other relays can't have its rows.
	redisTimeout = 4 * time.Second
	batchTimeout = 10 * time.Second
	// aloneTimeout bounds the time with Redis of a row that is tried alone.
	aloneTimeout = 7 * time.Second
	// stopGrace is what a batch may still take when the relay stops.
	stopGrace = 2 * time.Second
	// tidyEvery is how often rows of unknown kinds are looked for, to be readmitted,
	// rejected or logged.
	tidyEvery = time.Minute
	// unknownAfter is how long a row of a kind that nobody knows has waited when it is
	// logged, because the worker that knows it may be about to restart.
	unknownAfter = 15 * time.Second
	// backoff is the longest wait between two tries while a server is away.
	backoff = 2 * time.Second
)

// New returns a relay that [Relay.Start] starts. It connects to nothing. Its error is
// about the URL of the database, and doesn't show it.
func New(cfg Config) (*Relay, error) {
	pool, err := pgxpool.ParseConfig(cfg.DB.URL) // which also takes the URL's pool_* settings
	if err != nil {
		return nil, cfg.DB.Validate() // an error that doesn't show the URL
	}
	switch {
	case cfg.PollEvery != 0:
	case cfg.DB.ThroughPooler:
		cfg.PollEvery = pollPooler
	default:
		cfg.PollEvery = poll
	}
	cfg.batchBytes = cmp.Or(cfg.batchBytes, batchBytes)
	caughtUp := make(chan struct{})
	r := &Relay{
		cfg: cfg, connConfig: pool.ConnConfig, kinds: cfg.Tasks.Kinds(),
		held:     make(held),
		caughtUp: caughtUp, markCaughtUp: sync.OnceFunc(func() { close(caughtUp) }),
		postgres: outage{log: cfg.Log, server: "Postgres"},
		redis:    outage{log: cfg.Log, server: "Redis"},
	}
	r.ending, r.end = context.WithCancel(context.Background())
	r.connConfig.RuntimeParams["application_name"] = "carpool relay"
	r.connConfig.RuntimeParams["client_encoding"] = "UTF8" // a role's or a database's own would change text
	r.connConfig.OnNotification = func(*pgconn.PgConn, *pgconn.Notification) { r.woken = true }
	if r.connConfig.ConnectTimeout <= 0 {
		r.connConfig.ConnectTimeout = 5 * time.Second
	}
	if cfg.DB.ThroughPooler {
		r.connConfig.DefaultQueryExecMode = pgx.QueryExecModeCacheDescribe
		r.connConfig.StatementCacheCapacity = 0
	}
	return r, nil
}

// Start begins to move rows, which goes on until [Relay.Stop]. It returns nil, also
// while a server is away, because the relay waits for it and logs that it does.
func (r *Relay) Start() error {
	r.running.Go(func() {
		for r.ending.Err() == nil {
			if err := r.session(r.ending); r.ending.Err() == nil {
				_ = wait.For(r.ending, r.postgres.note(err))
			}
		}
	})
	return nil
}

// Stop ends the relay and waits until it has ended. A batch that is under way may
// be finished, within stopGrace. Stop may be called twice, and without [Relay.Start].
func (r *Relay) Stop() {
	r.end()
	r.running.Wait()
}

// CaughtUp returns a channel that is closed once the relay has found the outbox empty.
func (r *Relay) CaughtUp() <-chan struct{} { return r.caughtUp }

// session connects and moves rows until the connection breaks, or ctx ends.
func (r *Relay) session(ctx context.Context) error {
	// pgx gives each address of each host its ConnectTimeout. How many there are, only it
	// knows, so there is no bound on all of them together.
	conn, err := pgx.ConnectConfig(ctx, r.connConfig)
	if err != nil {
		return err
	}
	defer func() {
		closeCtx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = conn.Close(closeCtx)
		// A batch that was given up is cancelled by pgx in the background. It keeps its rows
		// locked until then, and the worker may be about to exit.
		select {
		case <-conn.PgConn().CleanupDone():
		case <-closeCtx.Done():
		}
	}()
	if !r.cfg.DB.ThroughPooler {
		if err := r.listen(ctx, conn); err != nil {
			return err
		}
	}
	r.tidied, r.load = time.Time{}, load{since: time.Now()}
	for ctx.Err() == nil {
		if time.Since(r.tidied) > tidyEvery {
			if err := r.tidy(ctx, conn); err != nil {
				return err
			}
			r.tidied = time.Now()
		}
		r.woken = false
		b, err := r.moveNext(ctx, conn)
		if err != nil {
			return fmt.Errorf("move the outbox: %w", err)
		}
		r.postgres.end()
		if b.redisErr != nil {
			if pause := r.redis.note(b.redisErr); len(b.moved) == 0 || !b.more {
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
		if again || b.more {
			continue
		}
		if !r.held.undecided() {
			r.markCaughtUp()
		}
		if err := r.awaitRows(ctx, conn); err != nil {
			return err
		}
	}
	return nil
}

// listen has the connection notified of new rows.
func (r *Relay) listen(ctx context.Context, conn *pgx.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, r.connConfig.ConnectTimeout)
	defer cancel()
	if _, err := conn.Exec(ctx, listenSQL); err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	return nil
}

// listenSQL also lets the server find out soon that the relay's host has vanished,
// because a busy relay's lock ends with its connection.
const listenSQL = `SET tcp_keepalives_idle = 15; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3;
	SET tcp_user_timeout = '20s'; LISTEN ` + outbox.Channel

// awaitRows returns when a notification has come since the last move began, or it is
// time to look for rows without one.
func (r *Relay) awaitRows(ctx context.Context, conn *pgx.Conn) error {
	next := r.held.untilNext(r.cfg.PollEvery)
	switch {
	case r.cfg.DB.ThroughPooler:
		_ = wait.For(ctx, next)
		return nil
	case r.woken:
		return nil
	case r.load.busy:
		_ = wait.For(ctx, pollBusy)
		return nil
	}
	waitCtx, cancel := context.WithTimeout(ctx, next)
	defer cancel()
	if err := conn.PgConn().WaitForNotification(waitCtx); err != nil && waitCtx.Err() == nil {
		return fmt.Errorf("wait for notifications: %w", err)
	}
	return nil
}

// load says whether a relay has much to do, judged once a second.
type load struct {
	busy  bool
	muted bool // this relay keeps producers from notifying
	rows  int
	since time.Time // when the counting of rows began
}

// followLoad counts rows, and mutes producers while there are many. It reports
// whether to move again at once, because rows that were committed while producers
// did not notify must be found before the relay waits for a notification.
//
// The rows of a transaction that enqueued while a relay was busy, and commits after
// that last move, are found within poll.
func (r *Relay) followLoad(ctx context.Context, conn *pgx.Conn, rows int) (again bool, err error) {
	r.load.rows += rows
	if time.Since(r.load.since) < time.Second || r.cfg.DB.ThroughPooler {
		return false, nil
	}
	r.load.busy = r.load.rows >= busyRows
	r.load.rows, r.load.since = 0, time.Now()
	if r.load.busy == r.load.muted {
		return false, nil
	}
	change := outbox.Mute
	if r.load.muted {
		change = outbox.Unmute
	}
	ctx, cancel := context.WithTimeout(ctx, batchTimeout)
	defer cancel()
	if r.load.muted, err = change(ctx, conn); err != nil {
		return false, fmt.Errorf("lock or unlock what keeps producers from notifying: %w", err)
	}
	return !r.load.busy, nil
}

// batch says what became of the rows of one transaction.
type batch struct {
	rows int
	more bool // there may be more rows to move at once

	mu          sync.Mutex // guards what the rows' goroutines write
	failed      []failure  // rows that Redis did not take
	redisErr    error      // the last of their errors; nil if the fault is the rows'
	moved       []string   // ids of those whose jobs Redis has, or need not have
	rejected    []outbox.Rejection
	afterCommit []func() // logs what has then become of them
}

// moveNext moves the next batch, and then one of the rows that are held, if no others wait.
func (r *Relay) moveNext(ctx context.Context, conn *pgx.Conn) (*batch, error) {
	all := outbox.Choice{Kinds: r.kinds, Except: r.held.ids(), Limit: batchSize, Bytes: r.cfg.batchBytes}
	b, err := r.move(ctx, conn, all)
	if err != nil || b.redisErr != nil || b.more {
		return b, err
	}
	id, due := r.held.next()
	if !due {
		return b, nil
	}
	alone, err := r.move(ctx, conn, outbox.Choice{Kinds: r.kinds, Only: id, Limit: 1, Bytes: r.cfg.batchBytes})
	if err != nil {
		return nil, err
	}
	r.held.forget(id, alone)
	alone.rows += b.rows
	alone.more = true // it is time to look for others again
	return alone, nil
}

// move locks rows, moves them to Redis and deletes them. Its error is that of
// Postgres.
func (r *Relay) move(ctx context.Context, conn *pgx.Conn, which outbox.Choice) (*batch, error) {
	work, cancel := context.WithTimeout(context.WithoutCancel(ctx), batchTimeout)
	defer cancel()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(stopGrace, cancel) })()
	tx, err := outbox.Begin(work, conn)
	if err != nil {
		return nil, err
	}
	defer tx.Rollback(work)

	b := new(batch)
	if err := r.enqueueRows(ctx, work, tx, which, b); err != nil {
		return nil, err
	}
	if b.redisErr != nil {
		r.hold(work, b)
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
// or when atOnce rows have failed, because then Redis may be away. Rows that it leaves
// out stay in the outbox.
func (r *Relay) enqueueRows(ctx, work context.Context, tx pgx.Tx, which outbox.Choice, b *batch) (err error) {
	timeout := redisTimeout
	if which.Only != "" {
		timeout = aloneTimeout
	}
	redisCtx, cancel := context.WithTimeout(work, timeout)
	defer cancel()
	var jobs sync.WaitGroup
	defer jobs.Wait()
	slots := make(chan struct{}, atOnce)
	// A client lists each queue once, in Redis' set of queues. A Redis that lost its data has
	// forgotten it, so each batch has a client of its own.
	client := tasks.NewClient(r.cfg.Redis)
	client.MaxPayload = math.MaxInt // Take has judged by the size that the outbox knows
	leftOut := false
	b.more, err = outbox.Take(work, tx, which, func(row outbox.Taken) {
		b.rows++
		if row.Problem != "" {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.reject(row, row.Problem, r.cfg.Log)
			return
		}
		slots <- struct{}{}
		b.mu.Lock()
		giveUp := ctx.Err() != nil || len(b.failed) >= atOnce
		b.mu.Unlock()
		if giveUp {
			<-slots
			leftOut = true
			return
		}
		jobs.Go(func() {
			defer func() { <-slots }()
			err := r.enqueueRow(redisCtx, client, row.Row)
			b.mu.Lock()
			defer b.mu.Unlock()
			b.record(row, err, r.cfg.Log)
		})
	})
	b.more = b.more || leftOut
	return err
}

// enqueueRow enqueues a row's job. The error is a [tasks.DuplicateError], a
// permanent one of the row's own, or one of Redis.
func (r *Relay) enqueueRow(ctx context.Context, client *tasks.Client, row outbox.Row) (err error) {
	defer func() { // a task's own code may encode its payload
		if p := recover(); p != nil {
			r.cfg.Log.Error("a task panicked over a row of the outbox", "job_id", row.ID, "kind", row.Kind, "stack", string(debug.Stack()))
			err = tasks.Permanent(fmt.Errorf("%s payload: enqueueing it panicked", row.Kind))
		}
	}()
	task, err := r.cfg.Tasks.Lookup(row.Kind)
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
	_, err = client.Enqueue(ctx, payload, opts)
	return err
}

// record decides what becomes of a row whose enqueueing ended with err.
func (b *batch) record(row outbox.Taken, err error, log *slog.Logger) {
	row.Payload = nil // it is kept no longer than it is on its way
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
		b.reject(row, err.Error(), log)
	case isTooLarge.MatchString(err.Error()):
		b.reject(row, fmt.Sprintf("Redis does not take the %d bytes of its payload: %v", row.Size, err), log)
	default:
		b.failed = append(b.failed, failure{row, err})
		b.redisErr = err
	}
}

// reject sets a row aside.
func (b *batch) reject(row outbox.Taken, problem string, log *slog.Logger) {
	problem = pgtext.Clean(problem)
	b.rejected = append(b.rejected, outbox.Rejection{ID: row.ID, Problem: problem})
	b.afterCommit = append(b.afterCommit, func() {
		log.Warn("a row of the outbox can't become a job, and was set aside", "job_id", row.ID, "kind", row.Kind, "problem", problem)
	})
}

// tidy readmits rejected rows whose kind is known here, and rejects those whose
// kind nobody has known for long.
func (r *Relay) tidy(ctx context.Context, conn *pgx.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, batchTimeout)
	defer cancel()
	if err := outbox.Readmit(ctx, conn, r.kinds); err != nil {
		return err
	}
	rejected, err := outbox.RejectUnknown(ctx, conn, r.kinds)
	if err != nil {
		return err
	}
	for _, k := range rejected {
		r.cfg.Log.Warn("rows of the outbox were set aside: "+outbox.UnknownKind+k.Kind, "rows", k.Rows)
	}
	return r.warnOfUnknown(ctx, conn)
}

// warnOfUnknown logs the kinds of waiting rows that no worker that is up knows, each kind
// once. It logs nothing while it can't be said what the others know: Redis is away, or a
// worker of an older version is up, which doesn't tell.
func (r *Relay) warnOfUnknown(ctx context.Context, conn *pgx.Conn) error {
	if r.cfg.FleetKinds == nil {
		return nil
	}
	unknown, err := outbox.Unknown(ctx, conn, slices.Concat(r.kinds, r.toldUnknown), unknownAfter)
	if err != nil || len(unknown) == 0 {
		return err
	}
	known, ok, err := r.cfg.FleetKinds(ctx)
	if err != nil || !ok {
		return nil
	}
	for _, k := range unknown {
		if !slices.Contains(known, k.Kind) {
			r.toldUnknown = append(r.toldUnknown, k.Kind)
			r.cfg.Log.Warn("rows of the outbox wait, and are set aside after ten minutes: no worker that is up knows the kind "+k.Kind, "rows", k.Rows)
		}
	}
	return nil
}

// outage logs the start and the end of a server's outage, and nothing in between.
type outage struct {
	log    *slog.Logger
	server string
	since  time.Time // zero: the server is up
	tries  int       // failures since
}

// note counts another failure and returns how long to wait before the next try.
func (o *outage) note(err error) time.Duration {
	if o.since.IsZero() {
		o.since = time.Now()
		o.log.Warn("the outbox waits: "+o.server+" does not serve it", "error", err)
	}
	pause := min(backoff, 50*time.Millisecond<<min(o.tries, 10))
	o.tries++
	return pause/2 + rand.N(pause/2)
}

// end ends the outage, if there is one, because the server has answered.
func (o *outage) end() {
	if !o.since.IsZero() {
		o.log.Info("the outbox goes on: "+o.server+" serves it again", "after", time.Since(o.since).Round(time.Millisecond).String())
	}
	o.since, o.tries = time.Time{}, 0
}
