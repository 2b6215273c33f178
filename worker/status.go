package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/hibiken/asynq"
	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/outbox"
	"github.com/carpool-go/carpool/tasks"
)

type statusCmd struct {
	JSON  bool `name:"json" help:"Print it as JSON, one object a line."`
	Watch bool `help:"Print it anew every 2 seconds, until Ctrl-C."`

	redisSettings    `embed:""`
	databaseSettings `embed:""`
}

const (
	watchEvery = 2 * time.Second
	// statusTimeout bounds what the database may take.
	statusTimeout = 10 * time.Second
)

// Run is `worker status`. What it could not read it names after it has printed
// the rest.
func (s *statusCmd) Run() error {
	var f faults
	redisURL := f.redisURL(s.RedisURL)
	if s.DatabaseURL != "" {
		f.databaseURL(s.DatabaseURL)
	}
	if err := f.err(); err != nil {
		return err
	}
	redis.SetLogger(redisLog{slog.New(slog.DiscardHandler)})
	rdb, err := tasks.OpenRedis(redisURL)
	if err != nil {
		return err
	}
	defer rdb.Close()
	r := statusReader{rdb: rdb}
	if s.DatabaseURL != "" {
		if r.db, err = openOne(s.DatabaseURL); err != nil {
			return err
		}
		defer r.db.Close()
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if !s.Watch {
		return s.show(ctx, r, os.Stdout)
	}
	return s.watch(ctx, r, os.Stdout, os.Stderr)
}

// openOne opens a pool of a single connection for a command, which connects when it
// is used.
func openOne(url string) (*dbpool.Pool, error) {
	cfg := dbpool.DefaultConfig(url)
	cfg.Size, cfg.MaxOverflow, cfg.Timeout = 1, 0, statusTimeout
	cfg.Logger = slog.New(slog.DiscardHandler)
	cfg.ThroughPooler = true // it may be; for a few statements it makes no difference
	return dbpool.Open(context.Background(), cfg)
}

// show prints the status once. Nothing is printed if Redis can't be read.
func (s *statusCmd) show(ctx context.Context, r statusReader, out io.Writer) error {
	now, unread := r.read(ctx)
	if now == nil {
		return unread
	}
	var text bytes.Buffer
	switch {
	case s.JSON:
		if err := json.NewEncoder(&text).Encode(now); err != nil {
			return err
		}
	case s.Watch && isTerminal(out):
		text.WriteString(clearScreen)
		now.print(&text)
	case s.Watch:
		now.print(&text)
		text.WriteByte('\n')
	default:
		now.print(&text)
	}
	if _, err := out.Write(text.Bytes()); err != nil {
		return err
	}
	return unread
}

// clearScreen is ANSI's "erase all of the display" and "cursor to the upper left".
const clearScreen = "\x1b[2J\x1b[H"

// watch shows the status until ctx ends. Servers that don't answer are what one
// watches for, so an error doesn't end it.
func (s *statusCmd) watch(ctx context.Context, r statusReader, out, errs io.Writer) error {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		err := s.show(ctx, r, out)
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, syscall.EPIPE) {
			return err // nobody reads it any more
		}
		if err != nil {
			fmt.Fprintf(errs, "worker: %s %v\n", time.Now().Format(time.TimeOnly), err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// status is how everything stood at one moment, as `worker status --json` prints
// it.
type status struct {
	At        time.Time         `json:"at"`
	Instances []instance        `json:"instances"`
	Missing   []missingInstance `json:"missing"`
	Queues    []queueStatus     `json:"queues"`
	// Outbox is null if it was not read; OutboxNote says why.
	Outbox     *outboxStatus `json:"outbox"`
	OutboxNote string        `json:"outbox_note,omitempty"`
}

// queueStatus is how a queue stands that instances share.
type queueStatus struct {
	Name      string `json:"name"`
	Pending   int    `json:"pending"`
	Active    int    `json:"active"`
	Scheduled int    `json:"scheduled"`
	Retry     int    `json:"retry"`
	Archived  int    `json:"archived"`
	Completed int    `json:"completed"`
	// LatencyMS is how long the oldest pending job has waited, in milliseconds.
	LatencyMS int64 `json:"latency_ms"`
	Paused    bool  `json:"paused"`
	// ArchiveNearlyFull is true from archiveWarning jobs on.
	ArchiveNearlyFull bool `json:"archive_nearly_full"`
}

const (
	// archiveLimit is how many jobs asynq keeps in a queue's archive. For each one
	// more, it drops the oldest.
	archiveLimit   = 10_000
	archiveWarning = 9_000
)

// outboxStatus is how carpool.outbox stands.
type outboxStatus struct {
	// Waiting rows are on their way to Redis; OldestMS is the age of the oldest,
	// in milliseconds.
	Waiting  int   `json:"waiting"`
	OldestMS int64 `json:"oldest_ms"`
	// SetAside rows have a problem; Problems are the most frequent ones.
	SetAside int             `json:"set_aside"`
	Problems []outboxProblem `json:"problems"`
}

type outboxProblem struct {
	Problem string `json:"problem"`
	Rows    int    `json:"rows"`
}

// statusReader reads a [status].
type statusReader struct {
	rdb redis.UniversalClient
	db  *dbpool.Pool // nil: DATABASE_URL is not set
}

// read returns nil if Redis can't be read; with an error besides the status, the
// database can't.
func (r statusReader) read(ctx context.Context) (*status, error) {
	now := &status{At: time.Now().UTC()}
	var err error
	if now.Instances, now.Missing, err = readFleet(ctx, r.rdb); err != nil {
		return nil, fmt.Errorf("REDIS_URL: %w", err)
	}
	if now.Queues, err = readQueues(r.rdb); err != nil {
		return nil, fmt.Errorf("REDIS_URL: %w", err)
	}
	if r.db == nil {
		now.OutboxNote = "not read, as DATABASE_URL is not set"
		return now, nil
	}
	now.Outbox, err = readOutbox(ctx, r.db)
	if e, ok := errors.AsType[*pgconn.PgError](err); ok && e.Code == pgerrcode.UndefinedTable {
		now.OutboxNote = "this database has no table carpool.outbox; run: worker migrate"
		return now, nil
	}
	if err != nil {
		now.OutboxNote = "it could not be read"
		return now, fmt.Errorf("DATABASE_URL: %w", err)
	}
	return now, nil
}

// readQueues leaves out the instances' own queues, which hold nothing but the
// validations of their pools.
func readQueues(rdb redis.UniversalClient) ([]queueStatus, error) {
	inspector := asynq.NewInspectorFromRedisClient(rdb)
	names, err := inspector.Queues()
	if err != nil {
		return nil, fmt.Errorf("read the names of the queues: %w", err)
	}
	slices.Sort(names)
	queues := []queueStatus{}
	for _, name := range names {
		if instanceQueueName.MatchString(name) {
			continue
		}
		info, err := inspector.GetQueueInfo(name)
		if errors.Is(err, asynq.ErrQueueNotFound) {
			continue // it was removed meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("read the queue %s: %w", name, err)
		}
		queues = append(queues, queueStatus{
			Name: name, Pending: info.Pending, Active: info.Active, Scheduled: info.Scheduled,
			Retry: info.Retry, Archived: info.Archived, Completed: info.Completed,
			LatencyMS: info.Latency.Milliseconds(), Paused: info.Paused,
			ArchiveNearlyFull: info.Archived >= archiveWarning,
		})
	}
	return queues, nil
}

// problemsShown is how many of the outbox's problems are shown.
const problemsShown = 5

func readOutbox(ctx context.Context, db *dbpool.Pool) (*outboxStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	stats, err := outbox.ReadStats(ctx, db)
	if err != nil {
		return nil, err
	}
	problems, err := outbox.Problems(ctx, db, problemsShown)
	if err != nil {
		return nil, err
	}
	o := &outboxStatus{Waiting: stats.Waiting, OldestMS: stats.Oldest.Milliseconds(), SetAside: stats.Rejected, Problems: []outboxProblem{}}
	for _, p := range problems {
		o.Problems = append(o.Problems, outboxProblem(p))
	}
	return o, nil
}

// print writes the status for people.
func (s *status) print(out *bytes.Buffer) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	if len(s.Instances) == 0 {
		fmt.Fprintln(w, "no instance is up")
	} else {
		fmt.Fprintln(w, "INSTANCE\tVERSION\tUP SINCE\tHANDS\tPOOL IN\tOUT\tOVERFLOW\tWAITING\tDATABASE\tQUEUES")
	}
	for _, i := range s.Instances {
		database := "there"
		if i.DatabaseAway {
			database = "AWAY"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%d/%d\t%d\t%d\t%d\t%d\t%s\t%s\n",
			printable(i.Name), printable(i.Version), i.Started.UTC().Format(time.DateTime+"Z"), i.Running, i.Hands,
			i.Pool.CheckedIn, i.Pool.CheckedOut, i.Pool.Overflow, i.Pool.Waiting, database, printable(weighted(i.Queues)))
	}
	_ = w.Flush() // a buffer takes everything
	for _, m := range s.Missing {
		fmt.Fprintf(out, "! %s gives no sign of life since %sZ, %s ago\n",
			printable(m.Name), m.Seen.UTC().Format(time.DateTime), age(s.At.Sub(m.Seen)))
	}
	fmt.Fprintln(out)
	s.printQueues(w, out)
	fmt.Fprintln(out)
	s.printOutbox(out)
}

func (s *status) printQueues(w *tabwriter.Writer, out *bytes.Buffer) {
	if len(s.Queues) == 0 {
		fmt.Fprintln(out, "no queue has had a job yet")
		return
	}
	fmt.Fprintln(w, "QUEUE\tPENDING\tACTIVE\tSCHEDULED\tRETRY\tARCHIVED\tLATENCY\t")
	for _, q := range s.Queues {
		paused := ""
		if q.Paused {
			paused = "PAUSED"
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t%d\t%s\t%s\n", printable(q.Name),
			q.Pending, q.Active, q.Scheduled, q.Retry, q.Archived, age(time.Duration(q.LatencyMS)*time.Millisecond), paused)
	}
	_ = w.Flush()
	for _, q := range s.Queues {
		if q.Pending > 0 && !s.isServed(q.Name) {
			fmt.Fprintf(out, "! nobody pulls from %s: no instance has it among its WORKER_QUEUES\n", printable(q.Name))
		}
		if q.ArchiveNearlyFull {
			fmt.Fprintf(out, "! the archive of %s holds %d jobs; beyond %d, asynq drops the oldest\n", printable(q.Name), q.Archived, archiveLimit)
		}
	}
}

// isServed reports whether an instance that is up pulls from the queue.
func (s *status) isServed(queue string) bool {
	return slices.ContainsFunc(s.Instances, func(i instance) bool {
		_, ok := i.Queues[queue]
		return ok || i.OwnQueue == queue
	})
}

func (s *status) printOutbox(out *bytes.Buffer) {
	o := s.Outbox
	if o == nil {
		fmt.Fprintf(out, "outbox: %s\n", s.OutboxNote)
		return
	}
	fmt.Fprintf(out, "outbox: %d waiting", o.Waiting)
	if o.Waiting > 0 {
		fmt.Fprintf(out, ", the oldest for %s", age(time.Duration(o.OldestMS)*time.Millisecond))
	}
	fmt.Fprintf(out, "; %d set aside\n", o.SetAside)
	for _, p := range o.Problems {
		fmt.Fprintf(out, "! %d: %s\n", p.Rows, printable(p.Problem))
	}
}

// weighted is "critical=6,default=3", the heaviest first.
func weighted(queues map[string]int) string {
	var names []string
	for name := range queues {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b string) int {
		if queues[a] != queues[b] {
			return queues[b] - queues[a]
		}
		return strings.Compare(a, b)
	})
	for i, name := range names {
		names[i] += "=" + strconv.Itoa(queues[name])
	}
	return strings.Join(names, ",")
}

// age is a duration to the millisecond if it is short, else to the second.
func age(d time.Duration) string {
	if d < time.Second {
		return d.Round(time.Millisecond).String()
	}
	return d.Round(time.Second).String()
}

// printable keeps what others have written into Redis or the database from moving
// the cursor, and from filling the screen.
func printable(s string) string {
	const most = 120
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
	if runes := []rune(s); len(runes) > most {
		return string(runes[:most-1]) + "…"
	}
	return s
}
