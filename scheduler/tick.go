package scheduler

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype/zeronull"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/limit"
	"github.com/carpool-go/carpool/internal/outbox"
	"github.com/carpool-go/carpool/internal/pgtext"
	"github.com/carpool-go/carpool/internal/sqlstate"
	"github.com/carpool-go/carpool/tasks"
)

// registerSQL writes an entry that the program brings along. What an operator
// decided stays: whether it is enabled, and a row of their own under its name.
const registerSQL = insertSQL + `UPDATE SET ` + updateSQL + ` WHERE s.source = 'code'`

// register writes the entries of the code to the table, in one order, so that
// instances that start at once don't lock each other out.
func (s *Scheduler) register(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	for _, e := range s.cfg.Entries {
		tag, err := s.cfg.DB.Exec(ctx, registerSQL, s.code[e.Name].args("code")...)
		if isRefused(err) { // such as for the limit of a worker that has started later
			s.cfg.Log.Warn("an entry of the code can't be written to carpool.schedules", "entry", e.Name, "problem", pgtext.Clean(err.Error()))
			continue
		}
		if err != nil {
			return fmt.Errorf("scheduler: write entry %q: %w", e.Name, err)
		}
		if tag.RowsAffected() == 0 {
			s.cfg.Log.Warn("carpool.schedules has an entry of the same name as one of the code; the table's counts", "entry", e.Name)
		}
	}
	if _, err := s.cfg.DB.Exec(ctx, forgetSQL); err != nil {
		return fmt.Errorf("scheduler: prune carpool.schedule_state: %w", err)
	}
	return nil
}

// forgetSQL deletes how far entries were that have been gone for long.
const forgetSQL = `DELETE FROM carpool.schedule_state AS st WHERE last_tick < now() - interval '7 days'
	AND NOT EXISTS (SELECT FROM carpool.schedules AS s WHERE s.name = st.name)`

// row is an entry with how far it is. The payload is "" if it is above the limit.
type row struct {
	definition
	size, most         int // of the payload, in bytes, and the limit; 0 if there is none
	enabled            bool
	source             string
	changedAt          time.Time
	problem            *string
	hasState           bool // in carpool.schedule_state
	lastTick, waiting  *time.Time
	firedTick, firedAt *time.Time
	jobID, jobQueue    *string
	jobInOutbox        bool
	now                time.Time
}

// selectRows reads entries with how far they are, now being an expression for the
// time. What it says of a job's row in the outbox is older than what Redis is asked
// afterwards: since the row is deleted when Redis has the job, one of them has it.
func selectRows(now, join, rest string) string {
	return `SELECT s.name, s.cron, s.time_zone, s.kind,
		CASE WHEN octet_length(p.text) > ` + limit.SQL + ` THEN '' ELSE p.text END, octet_length(p.text), coalesce(` + limit.SQL + `, 0), s.queue, s.max_retry,
		extract(epoch FROM s.timeout)::float8, extract(epoch FROM s.retention)::float8, s.missed, s.overlap,
		s.enabled, s.source, s.changed_at, s.problem,
		st.name IS NOT NULL, st.last_tick, st.waiting_tick, st.fired_tick, st.fired_at, st.job_id::text, st.job_queue,
		` + outbox.IsWaiting("st.job_id") + `, ` + now + `
	FROM carpool.schedules AS s CROSS JOIN LATERAL (SELECT s.payload::text AS text OFFSET 0) AS p
	` + join + ` JOIN carpool.schedule_state AS st USING (name) ` + rest
}

// selectAll reads all entries by name.
func selectAll(now string) string { return selectRows(now, "LEFT", "ORDER BY s.name") }

func scanRow(r pgx.CollectableRow) (row, error) {
	var w row
	err := r.Scan(&w.name, &w.cron, &w.zone, &w.kind, &w.payload, &w.size, &w.most, &w.queue, &w.maxRetry, &w.timeout, &w.retention, &w.missed, &w.overlap,
		&w.enabled, &w.source, &w.changedAt, &w.problem, &w.hasState, &w.lastTick, &w.waiting, &w.firedTick, &w.firedAt, &w.jobID, &w.jobQueue,
		&w.jobInOutbox, &w.now)
	return w, err
}

func (r *row) position() position {
	p := position{changedAt: r.changedAt}
	if r.lastTick != nil {
		p.lastTick = *r.lastTick
	}
	if r.waiting != nil {
		p.waitingTick = *r.waiting
	}
	return p
}

// readEntry is what came of reading a row, until the row changes.
type readEntry struct {
	cron, zone, kind, payload string

	schedule Schedule
	queue    string // the kind's own
	problem  string // "": none
	unknown  bool   // the kind is not known here, perhaps elsewhere
	warned   string // the last problem that was logged
}

// entry reads what the row says, if it was not read already.
func (s *Scheduler) entry(r *row) readEntry {
	e, ok := s.read[r.name]
	if ok && e.cron == r.cron && e.zone == r.zone && e.kind == r.kind && e.payload == r.payload {
		return e
	}
	e = readEntry{cron: r.cron, zone: r.zone, kind: r.kind, payload: r.payload, warned: e.warned}
	e.schedule, e.queue, e.unknown, e.problem = readRow(s.cfg.Tasks, r)
	s.read[r.name] = e
	return e
}

func readRow(set *tasks.Set, r *row) (schedule Schedule, queue string, unknown bool, problem string) {
	if r.payload == "" {
		return schedule, "", false, fmt.Sprintf("payload: %v", &limit.Error{Size: r.size, Most: r.most})
	}
	schedule, err := ParseSchedule(r.cron, r.zone)
	if err != nil {
		return schedule, "", false, pgtext.Clean(err.Error())
	}
	task, err := set.Lookup(r.kind)
	if err != nil {
		return schedule, "", true, ""
	}
	if _, err := task.Decode([]byte(r.payload)); err != nil {
		return schedule, "", false, pgtext.Clean(err.Error())
	}
	return schedule, task.Options.Queue, false, ""
}

// abandoned is how late a tick of an entry that is left to other instances may be
// before the entry's problem says that there is none to take it.
const abandoned = time.Minute

// look goes once through the entries, enqueues what is due, and returns how long
// to wait before the next look. Its error is that of Postgres as a whole.
func (s *Scheduler) look(ctx context.Context) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	wait := s.cfg.lookEvery
	query, err := s.cfg.DB.Query(ctx, selectAll(s.cfg.clock))
	if err != nil {
		return wait, fmt.Errorf("scheduler: read carpool.schedules: %w", err)
	}
	rows, err := pgx.CollectRows(query, scanRow)
	if err != nil {
		return wait, fmt.Errorf("scheduler: read carpool.schedules: %w", err)
	}
	s.redisAway = nil
	shown := make([]shownEntry, 0, len(rows))
	for i := range rows {
		r := &rows[i]
		e := s.entry(r)
		problem := e.problem
		if r.enabled && problem == "" {
			problem, err = s.tick(ctx, r, e)
			if err != nil {
				return wait, err
			}
		}
		if err := s.noteProblem(ctx, r, problem); err != nil {
			return wait, err
		}
		next := time.Time{}
		if r.enabled && e.problem == "" {
			next = e.schedule.Next(later(r.now, r.position().since()))
			if in := next.Sub(r.now); !next.IsZero() && in < wait {
				wait = max(in, 0)
			}
		}
		shown = append(shown, shownEntry{r, e, next})
	}
	s.forget(rows)
	s.page.show(shown)
	return wait, nil
}

// forget drops what was read of entries that are gone.
func (s *Scheduler) forget(rows []row) {
	if len(s.read) <= len(rows) {
		return
	}
	there := make(map[string]bool, len(rows))
	for i := range rows {
		there[rows[i].name] = true
	}
	for name := range s.read {
		if !there[name] {
			delete(s.read, name)
		}
	}
}

// tick enqueues what is due of an entry. The problem it returns is the entry's
// own, the error one of Postgres as a whole.
func (s *Scheduler) tick(ctx context.Context, r *row, e readEntry) (problem string, err error) {
	p := r.position()
	next := e.schedule.Next(p.since())
	isDue := !next.IsZero() && !next.After(r.now)
	if others, why := s.leftToOthers(r, e); others {
		if isDue && r.now.Sub(next) > abandoned {
			return why, nil
		}
		return textOf(r.problem), nil
	}
	if !isDue && !p.waits() {
		return "", nil
	}
	running := false
	if r.overlap != OverlapAllow {
		if running, err = s.unfinished(ctx, r); err != nil {
			return "overlap: Redis can't say whether the last job has ended: " + pgtext.Clean(err.Error()), nil
		}
		if running && !isDue {
			return "", nil
		}
	}
	err = s.fire(ctx, r, e, running)
	if isRefused(err) {
		return pgtext.Clean(err.Error()), nil
	}
	return "", err
}

// isRefused reports whether the outbox does not take what an entry says. The whole
// classes are meant, because a trigger may raise codes of its own in them.
func isRefused(err error) bool {
	e, ok := errors.AsType[*pgconn.PgError](err)
	return ok && sqlstate.HasClass(e, pgerrcode.DataException, pgerrcode.IntegrityConstraintViolation)
}

func textOf(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}

// leftToOthers reports whether the entry is for other instances to run, and the
// problem to report if none does: during a deploy, the old and the new ones don't
// know the same kinds and entries.
func (s *Scheduler) leftToOthers(r *row, e readEntry) (others bool, problem string) {
	if e.unknown {
		return true, fmt.Sprintf("kind: no running worker knows %.100q; this one knows %s", r.kind, strings.Join(s.cfg.Tasks.Kinds(), ", "))
	}
	if _, ok := s.code[r.name]; r.source == "code" && !ok {
		return true, "no running worker has the entry in its code any more; the command schedule rm removes it"
	}
	return false, ""
}

// unfinished reports whether the entry's last job is queued, runs, or waits for
// a retry. Once Redis has failed to answer, it is not asked again in this look.
func (s *Scheduler) unfinished(ctx context.Context, r *row) (bool, error) {
	if r.jobID == nil || r.jobQueue == nil {
		return false, nil
	}
	if r.jobInOutbox {
		return true, nil
	}
	if s.redisAway != nil {
		return false, s.redisAway
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	state, err := s.cfg.Redis.HGet(ctx, asynqwire.Task(*r.jobQueue, *r.jobID), "state").Result()
	if errors.Is(err, redis.Nil) {
		return false, nil
	}
	s.redisAway = err
	return state != "completed" && state != "archived", err
}

// askTimeout bounds each question to Redis.
const askTimeout = 2 * time.Second

const (
	// beginFire bounds how long an instance that hangs, or was put to sleep,
	// keeps an entry's row from the others.
	beginFire = "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL idle_in_transaction_session_timeout = '3s'"

	ensureState = `INSERT INTO carpool.schedule_state (name) VALUES ($1) ON CONFLICT DO NOTHING`

	updateState = `UPDATE carpool.schedule_state SET last_tick = $2, waiting_tick = $3,
		fired_tick = coalesce($4, fired_tick), fired_at = CASE WHEN $4::timestamptz IS NULL THEN fired_at ELSE $5 END,
		job_id = coalesce($6::text::uuid, job_id), job_queue = coalesce($7, job_queue) WHERE name = $1`
)

// fire decides the ticks of an entry that are due. The entry's row is locked
// meanwhile, and the jobs go to the outbox in the same transaction that moves
// the entry on, so that each tick is decided once, by one instance. It does
// nothing if another one is at it, or was.
func (s *Scheduler) fire(ctx context.Context, seen *row, e readEntry, running bool) error {
	failed := func(err error) error { return fmt.Errorf("scheduler: entry %q: %w", seen.name, err) }
	if !seen.hasState {
		if _, err := s.cfg.DB.Exec(ctx, ensureState, seen.name); err != nil {
			return failed(err)
		}
	}
	tx, err := s.cfg.DB.BeginTx(ctx, pgx.TxOptions{BeginQuery: beginFire})
	if err != nil {
		return failed(err)
	}
	defer func() { // also when ctx has ended
		rollback, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = tx.Rollback(rollback)
	}()
	r, err := s.lock(ctx, tx, seen)
	if err != nil {
		return failed(err)
	}
	if r == nil {
		return nil
	}
	before := r.position()
	d := decide(e.schedule, r.missed, r.overlap, before, r.now, running)
	if len(d.enqueue) == 0 && d.next == before {
		return nil
	}
	ids, err := carryOut(ctx, tx, r, e, d)
	if err != nil {
		return failed(err)
	}
	if err := tx.Commit(ctx); err != nil {
		return failed(err)
	}
	for i, tick := range d.enqueue {
		s.cfg.Log.Debug("enqueued by the clock", "entry", seen.name, "tick", tick, "job_id", ids[i])
	}
	if d.leftOut > 0 {
		s.cfg.Log.Info("ticks were left out, as the entry's policies say", "entry", seen.name, "ticks", d.leftOut,
			"missed", seen.missed, "overlap", seen.overlap)
	}
	s.page.record(seen.name, ids, seen.now)
	return nil
}

// lock locks an entry's row and returns it as it is now. It returns nil if another
// instance has locked it, if somebody has just disabled it, or if what was found
// out about seen no longer holds; the next look goes by the new.
func (s *Scheduler) lock(ctx context.Context, tx pgx.Tx, seen *row) (*row, error) {
	query, err := tx.Query(ctx, selectRows(s.cfg.clock, "", "WHERE s.name = $1 AND s.enabled FOR UPDATE OF st SKIP LOCKED"), seen.name)
	if err != nil {
		return nil, err
	}
	r, err := pgx.CollectExactlyOneRow(query, scanRow)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if s.cfg.locked != nil {
		s.cfg.locked(ctx, seen.name)
	}
	changed := r.cron != seen.cron || r.zone != seen.zone || r.kind != seen.kind || r.payload != seen.payload || r.source != seen.source
	if changed || r.overlap != OverlapAllow && (r.overlap != seen.overlap || textOf(r.jobID) != textOf(seen.jobID)) {
		return nil, nil
	}
	return &r, nil
}

// carryOut writes a decision: the jobs to the outbox, and how far the entry is. It
// returns the jobs' ids.
func carryOut(ctx context.Context, tx pgx.Tx, r *row, e readEntry, d decision) ([]uuid.UUID, error) {
	ids := make([]uuid.UUID, len(d.enqueue))
	jobs := make([]outbox.Row, len(d.enqueue))
	for i, tick := range d.enqueue {
		ids[i] = tickID(r.name, tick)
		jobs[i] = r.job(ids[i])
	}
	var fired *time.Time
	var jobID, jobQueue *string
	if last := len(jobs) - 1; last >= 0 {
		fired, jobID, jobQueue = &d.enqueue[last], &jobs[last].ID, &e.queue
		if r.queue != nil {
			jobQueue = r.queue
		}
	}
	changes := new(pgx.Batch)
	outbox.Insert(changes, jobs...)
	changes.Queue(updateState, r.name, zeronull.Timestamptz(d.next.lastTick), zeronull.Timestamptz(d.next.waitingTick), fired, r.now, jobID, jobQueue)
	return ids, tx.SendBatch(ctx, changes).Close()
}

const setProblem = `UPDATE carpool.schedules SET problem = $2 WHERE name = $1 AND problem IS DISTINCT FROM $2
	AND (cron, time_zone, kind) = ($3, $4, $5) AND ($6 = '' OR payload = nullif($6, '')::jsonb)`

// noteProblem writes a problem to the entry's row, and logs it once.
func (s *Scheduler) noteProblem(ctx context.Context, r *row, problem string) error {
	if e := s.read[r.name]; e.warned != problem {
		if problem != "" {
			s.cfg.Log.Warn("an entry of carpool.schedules can't be run", "entry", r.name, "problem", problem)
		}
		e.warned = problem
		s.read[r.name] = e
	}
	if textOf(r.problem) == problem {
		return nil
	}
	var value *string
	if problem != "" {
		value = &problem
	}
	if _, err := s.cfg.DB.Exec(ctx, setProblem, r.name, value, r.cron, r.zone, r.kind, r.payload); err != nil {
		return fmt.Errorf("scheduler: entry %q: write its problem: %w", r.name, err)
	}
	return nil
}
