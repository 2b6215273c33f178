package once

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"pgregory.net/rapid"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/schema"
	"github.com/carpool-go/carpool/internal/testservers"
)

const (
	maxRuns = 3
	// runTime is how long a run of the property test may take.
	runTime = 5 * time.Second
)

// statement inserts the run's one row into its table, whose default draws a number from
// the sequence drawn_N, which no ROLLBACK takes back.
type statement func(ctx context.Context, tx pgx.Tx, run int, job, token string) error

func insertInto(run int) string {
	return fmt.Sprintf("INSERT INTO effects_%d (job, token) VALUES ($1, $2)", run)
}

// statements are what a handler may do first.
var statements = map[string]statement{
	"Exec": func(ctx context.Context, tx pgx.Tx, run int, job, token string) error {
		_, err := tx.Exec(ctx, insertInto(run), job, token)
		return err
	},
	"Exec of several": func(ctx context.Context, tx pgx.Tx, run int, job, token string) error {
		_, err := tx.Exec(ctx, fmt.Sprintf("SELECT 1; INSERT INTO effects_%d (job, token) VALUES ('%s', '%s')", run, job, token))
		return err
	},
	"Query": func(ctx context.Context, tx pgx.Tx, run int, job, token string) error {
		rows, _ := tx.Query(ctx, insertInto(run)+" RETURNING 1", job, token)
		_, err := pgx.CollectRows(rows, pgx.RowTo[int])
		return err
	},
	"QueryRow": func(ctx context.Context, tx pgx.Tx, run int, job, token string) error {
		return tx.QueryRow(ctx, insertInto(run)+" RETURNING 1", job, token).Scan(new(int))
	},
	"QueryRow with a mode": func(ctx context.Context, tx pgx.Tx, run int, job, token string) error {
		return tx.QueryRow(ctx, insertInto(run)+" RETURNING 1", pgx.QueryExecModeExec, job, token).Scan(new(int))
	},
	"SendBatch": func(ctx context.Context, tx pgx.Tx, run int, job, token string) error {
		var b pgx.Batch
		b.Queue("SELECT 1")
		b.Queue(insertInto(run), job, token)
		return tx.SendBatch(ctx, &b).Close()
	},
	"CopyFrom": func(ctx context.Context, tx pgx.Tx, run int, job, token string) error {
		_, err := tx.CopyFrom(ctx, pgx.Identifier{fmt.Sprintf("effects_%d", run)}, []string{"job", "token"}, pgx.CopyFromRows([][]any{{job, token}}))
		return err
	},
	"Begin": func(ctx context.Context, tx pgx.Tx, run int, job, token string) error {
		return pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error {
			_, err := tx.Exec(ctx, insertInto(run), job, token)
			return err
		})
	},
	"Conn": func(ctx context.Context, tx pgx.Tx, run int, job, token string) error {
		_, err := tx.Conn().Exec(ctx, insertInto(run), job, token)
		return err
	},
	"none":               func(context.Context, pgx.Tx, int, string, string) error { return nil },
	"none, and an error": func(context.Context, pgx.Tx, int, string, string) error { return errors.New("no") },
	"a syntax error": func(ctx context.Context, tx pgx.Tx, run int, job, token string) error {
		_, err := tx.Exec(ctx, "INSRT"+insertInto(run), job, token)
		return err
	},
	"an argument that can't be encoded": func(ctx context.Context, tx pgx.Tx, run int, job, _ string) error {
		_, err := tx.Exec(ctx, insertInto(run), job, make(chan int))
		return err
	},
	"a failure": func(ctx context.Context, tx pgx.Tx, run int, job, token string) error {
		_, err := tx.Exec(ctx, insertInto(run)+" RETURNING 1 / (n - n)", job, token)
		return err
	},
}

// effectless are the statements after which a handler that passes over errors has no effect.
// pgx doesn't send an argument that can't be encoded, so that Postgres knows of no failure.
var effectless = map[string]bool{"none": true, "none, and an error": true, "an argument that can't be encoded": true}

// onceRun is a run of the job, in a process of its own.
type onceRun struct {
	index    int
	job      *Job
	first    string // of statements
	swallows bool   // the handler passes over the error of its first statement
	goesOn   bool   // it makes a second one
	looks    bool   // before anything else, as RegisterOnce does
	tries    int

	gate  *gate
	db    *dbpool.Pool
	done  chan struct{} // nil until it has started
	kill  context.CancelFunc
	ctx   context.Context
	calls int // of the handler
	// allowed are the calls that were not refused.
	allowed int
	killed  bool
	result  string
	err     error
	// failures are the errors of Do, by the handler's last call.
	failures map[string]error
}

func (r *onceRun) start() {
	if r.done != nil {
		return
	}
	r.done = make(chan struct{})
	r.ctx, r.kill = context.WithTimeout(context.Background(), runTime)
	go func() {
		defer close(r.done)
		for range r.tries {
			if r.result, r.err = r.try(r.ctx); r.err == nil {
				return
			}
		}
	}()
}

func (r *onceRun) try(ctx context.Context) (string, error) {
	if r.looks {
		if result, done, err := r.job.Look(ctx); err != nil || done {
			return string(result), err
		}
	}
	r.job.Again()
	token := ""
	result, err := r.job.Do(ctx, func(tx pgx.Tx) ([]byte, error) {
		r.calls++
		token = fmt.Sprintf("call %d of run %d: %s", r.calls, r.index, r.first)
		err := statements[r.first](ctx, tx, r.index, r.job.ID, token)
		if !errors.Is(err, errOtherHolds) && !errors.Is(err, errIsDone) {
			r.allowed++
		}
		if r.goesOn && (err == nil || r.swallows) {
			var one int
			err = tx.QueryRow(ctx, "SELECT 1").Scan(&one)
		}
		if err != nil && !r.swallows {
			return nil, err
		}
		return fmt.Appendf(nil, "%q", token), nil
	})
	if err != nil {
		r.failures[token] = err
	}
	return string(result), err
}

// ended waits for the run's end.
func (r *onceRun) ended(patience time.Duration) bool {
	select {
	case <-r.done:
		return true
	case <-time.After(patience):
		return false
	}
}

// does is a step of a run's history.
type does struct {
	run  int
	what string
	n    int
}

func (d does) String() string { return fmt.Sprintf("run %d: %s %d", d.run, d.what, d.n) }

func drawDoes(runs int) *rapid.Generator[does] {
	return rapid.Custom(func(t *rapid.T) does {
		return does{
			rapid.IntRange(0, runs-1).Draw(t, "run"),
			rapid.SampledFrom([]string{
				"goes on", "goes on", "goes on", "goes on", "goes on", "goes on", "goes on to its end",
				"loses an answer", "loses its connections", "is killed", "is killed, and what it has sent arrives",
			}).Draw(t, "what"),
			rapid.IntRange(1, 20).Draw(t, "messages"),
		}
	})
}

func (r *onceRun) do(d does) {
	r.start()
	switch d.what {
	case "goes on":
		r.gate.step(d.n, 3*time.Millisecond)
	case "goes on to its end": // while the others sleep, beyond their leases
		r.gate.set(func() { r.gate.open = true })
		r.ended(100 * time.Millisecond)
		r.gate.set(func() { r.gate.open = false })
	case "loses an answer":
		r.gate.set(func() { r.gate.deaf = true })
	case "loses its connections":
		r.gate.reset()
	default:
		select {
		case <-r.done:
		default:
			r.killed = true
		}
		r.gate.kill(d.what == "is killed")
		r.kill()
	}
}

// watch counts the effects, whatever becomes of them, that happen while another run's
// transaction has one, or the job is done. (A transaction that ends gives back its locks one
// after the other; hence the second look.)
const watch = `CREATE SEQUENCE intrusions;
	CREATE FUNCTION watch() RETURNS trigger LANGUAGE plpgsql AS $$
	DECLARE alone boolean := false;
	BEGIN
		FOR look IN 1..4 LOOP
			alone := alone OR pg_try_advisory_xact_lock(hashtextextended('effect of ' || NEW.job, 0));
			EXIT WHEN alone;
			PERFORM pg_sleep(0.01);
		END LOOP;
		IF NOT alone OR EXISTS (SELECT FROM carpool.jobs_done WHERE id = NEW.job) THEN
			PERFORM nextval('intrusions');
		END IF;
		RETURN NEW;
	END $$`

// Runs of one job in several processes, of which each message to and from Postgres may be
// held as long as the others need, and each be the last.
func TestJob_IsDoneOnceHoweverItsRunsMeet(t *testing.T) {
	t.Parallel()
	url := testservers.Postgres(t)
	if err := schema.Migrate(t.Context(), url, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	cfg := dbpool.DefaultConfig(url)
	cfg.Logger = slog.New(slog.DiscardHandler)
	db, err := dbpool.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.Exec(t.Context(), watch); err != nil {
		t.Fatal(err)
	}
	var all []string
	for i := range maxRuns + 1 {
		if _, err := db.Exec(t.Context(), fmt.Sprintf(`CREATE SEQUENCE drawn_%[1]d; CREATE TABLE effects_%[1]d (job text, token text, n bigint DEFAULT nextval('drawn_%[1]d'));
			CREATE TRIGGER watch BEFORE INSERT ON effects_%[1]d FOR EACH ROW EXECUTE FUNCTION watch()`, i)); err != nil {
			t.Fatal(err)
		}
		all = append(all, fmt.Sprintf("SELECT job, token FROM effects_%d", i))
	}
	if _, err := db.Exec(t.Context(), "CREATE VIEW effects AS "+strings.Join(all, " UNION ALL ")); err != nil {
		t.Fatal(err)
	}
	jobs := 0
	rapid.Check(t, func(rt *rapid.T) {
		jobs++
		h := &history{t: rt, db: db, id: fmt.Sprintf("job-%d", jobs)}
		defer h.close()
		for i := range rapid.IntRange(2, maxRuns).Draw(rt, "runs") {
			h.add(i, t, url)
		}
		for _, d := range rapid.SliceOfN(drawDoes(len(h.runs)), 0, 20).Draw(rt, "history") {
			h.runs[d.run].do(d)
		}
		if rapid.Bool().Draw(rt, "the last finds them asleep") {
			h.deliverLast()
			h.end()
		} else {
			h.end()
			h.deliverLast()
		}
		h.check()
	})
}

// history is what becomes of a job.
type history struct {
	t    *rapid.T
	db   *dbpool.Pool // without a gate
	id   string
	runs []*onceRun
	last *onceRun // which nothing disturbs
}

func (h *history) newJob(db *dbpool.Pool, first bool, isolation pgx.TxIsoLevel) *Job {
	return &Job{
		DB: db, ID: h.id, Kind: "a", Queue: "default", First: first, Isolation: isolation, Log: slog.New(slog.DiscardHandler),
		grace: 30 * time.Millisecond, check: 3 * time.Millisecond,
	}
}

func (h *history) add(i int, t *testing.T, url string) {
	r := &onceRun{
		index:    i,
		failures: map[string]error{},
		first:    rapid.SampledFrom(append(slices.Sorted(maps.Keys(statements)), "none", "none")).Draw(h.t, "first statement"),
		swallows: rapid.IntRange(0, 3).Draw(h.t, "swallows") == 3,
		goesOn:   rapid.Bool().Draw(h.t, "goes on"),
		looks:    rapid.IntRange(0, 2).Draw(h.t, "looks") == 2,
		tries:    rapid.IntRange(1, 2).Draw(h.t, "tries"),
	}
	first := rapid.Bool().Draw(h.t, "is a first delivery")
	isolation := rapid.SampledFrom([]pgx.TxIsoLevel{"", "", pgx.RepeatableRead, pgx.Serializable}).Draw(h.t, "isolation")
	mode := rapid.SampledFrom([]string{"cache_statement", "cache_describe", "exec", "simple_protocol"}).Draw(h.t, "mode")
	u := testservers.ParseURL(t, testservers.WithParam(t, url, "default_query_exec_mode", mode))
	r.gate = newGate(t, u.Host)
	u.Host = r.gate.addr()
	cfg := dbpool.DefaultConfig(u.String())
	cfg.Size, cfg.MaxOverflow, cfg.Logger = 1, 0, slog.New(slog.DiscardHandler)
	h.runs = append(h.runs, r)
	var err error
	if r.db, err = dbpool.Open(context.Background(), cfg); err != nil {
		h.t.Fatal(err)
	}
	if rapid.Bool().Draw(h.t, "has prepared its statements") {
		r.job = h.newJob(r.db, first, isolation)
		r.job.ID = fmt.Sprintf("%s, of run %d before", h.id, i)
		_, _ = r.try(context.Background())
		h.drawn(fmt.Sprintf("drawn_%d", i))
		r.calls, r.allowed, r.failures = 0, 0, map[string]error{}
	} else if err := r.db.Ping(context.Background()); err != nil {
		h.t.Fatal(err)
	}
	r.job = h.newJob(r.db, first, isolation)
	r.gate.set(func() { r.gate.open = false })
}

// end lets all runs go on to their ends.
func (h *history) end() {
	for _, r := range h.runs {
		r.gate.set(func() { r.gate.open = true })
		r.start()
	}
	for _, r := range h.runs {
		if !r.ended(2 * runTime) {
			h.t.Fatalf("run %d does not end", r.index)
		}
		if n := r.db.Stats().CheckedOut; n != 0 {
			h.t.Errorf("run %d has kept %d connections", r.index, n)
		}
		h.t.Logf("run %d: %d calls, %d not refused, killed: %t, result %s, error %v", r.index, r.calls, r.allowed, r.killed, r.result, r.err)
	}
	h.close()
}

// close ends what is left of the runs' processes, and returns when nothing of them is on its
// way any more.
func (h *history) close() {
	var all sync.WaitGroup
	for _, r := range h.runs {
		all.Go(func() {
			r.gate.set(func() { r.gate.open = true })
			if r.done != nil {
				r.kill()
				<-r.done
			}
			if r.db != nil {
				r.db.Close()
			}
			r.gate.close()
		})
	}
	all.Wait()
}

func (h *history) deliverLast() {
	h.last = &onceRun{index: maxRuns, first: "Exec", tries: 1, failures: map[string]error{}}
	h.last.job = h.newJob(h.db, rapid.Bool().Draw(h.t, "the last is a first delivery"), "")
	h.last.start()
	defer h.last.kill()
	<-h.last.done
	if h.last.err != nil {
		h.t.Errorf("the last run, which nothing disturbed: %v", h.last.err)
	}
}

func (h *history) check() {
	ctx := context.Background()
	rows, _ := h.db.Query(ctx, "SELECT result::text FROM carpool.jobs_done WHERE id = $1", h.id)
	records, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || len(records) != 1 {
		h.t.Fatalf("the job has the records %q, error %v; want one", records, err)
	}
	token := strings.Trim(records[0], `"`)
	for _, r := range append(h.runs, h.last) {
		if r.err == nil && r.result != records[0] && !r.killed {
			h.t.Errorf("run %d has succeeded with the result %s, and the record's is %s", r.index, r.result, records[0])
		}
		if err := r.failures[token]; err != nil && !r.killed && (!errors.Is(err, ErrNoAnswer) || errors.Is(err, ErrNotBegun)) {
			h.t.Errorf("run %d is the one that is recorded, and doesn't say that it may be: %v", r.index, err)
		}
	}
	rows, _ = h.db.Query(ctx, "SELECT token FROM effects WHERE job = $1", h.id)
	effects, err := pgx.CollectRows(rows, pgx.RowTo[string])
	var want []string
	if _, first, _ := strings.Cut(token, ": "); !effectless[first] {
		want = []string{token}
	}
	if err != nil || fmt.Sprint(effects) != fmt.Sprint(want) {
		h.t.Errorf("the job has the effects %q, error %v; want %q", effects, err, want)
	}
	for _, r := range append(h.runs, h.last) {
		if drawn := h.drawn(fmt.Sprintf("drawn_%d", r.index)); drawn > r.allowed {
			h.t.Errorf("run %d has run %d statements, in %d calls of its handler of which %d were not refused", r.index, drawn, r.calls, r.allowed)
		}
	}
	if n := h.drawn("intrusions"); n > 0 {
		h.t.Errorf("%d statements ran in a transaction beside another run's, or after the job was done", n)
	}
}

// drawn returns how many numbers were drawn from a sequence since it was last asked.
func (h *history) drawn(sequence string) (n int) {
	ctx := context.Background()
	err := h.db.QueryRow(ctx, "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM "+sequence).Scan(&n)
	if err == nil && n > 0 {
		_, err = h.db.Exec(ctx, "SELECT setval($1::regclass, 1, false)", sequence)
	}
	if err != nil {
		h.t.Fatal(err)
	}
	return n
}
