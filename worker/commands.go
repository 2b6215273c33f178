package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"reflect"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/schema"
	"github.com/carpool-go/carpool/tasks"
)

type enqueueCmd struct {
	Kind    string `arg:"" help:"The kind of job; see: worker kinds."`
	Payload string `arg:"" name:"json" help:"The payload as JSON, or - to read it from standard input, where the list of processes doesn't show it."`

	Queue    string        `help:"Queue to put it on, instead of the kind's own."`
	In       time.Duration `xor:"when" placeholder:"5m" help:"Run it after this time."`
	At       time.Time     `xor:"when" placeholder:"2026-01-31T08:00:00Z" help:"Run it at this time."`
	Unique   string        `placeholder:"KEY" help:"Only if no job of the kind with this key is unfinished; else print that one's id."`
	MaxRetry *int          `placeholder:"N" help:"Tries after the first one fails, instead of the kind's own; 0 for none."`
	Wait     bool          `help:"Wait for its end and print its result; exit with 1 if it failed."`

	redisSettings `embed:""`
}

// retentionForWait keeps a job that is waited for in sight until its result has
// been read.
const retentionForWait = 5 * time.Minute

func (e *enqueueCmd) Run(kinds kindsOf) error {
	payload, err := readPayload(kinds.set(), e.Kind, e.Payload, os.Stdin, exampleLine)
	if err != nil {
		return err
	}
	opts, err := e.options(payload.Options())
	if err != nil {
		return err
	}
	rdb, err := e.open()
	if err != nil {
		return err
	}
	defer rdb.Close()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()

	client := tasks.NewClient(rdb)
	var id, queue string
	info, err := client.Enqueue(ctx, payload, opts)
	if dup, ok := errors.AsType[*tasks.DuplicateError](err); ok {
		id, queue = dup.ID, dup.Queue
		fmt.Fprintf(os.Stderr, "nothing was enqueued: this job holds the unique key %q\n", dup.Key)
	} else if err != nil {
		return err
	} else {
		id, queue = info.ID, info.Queue
	}
	fmt.Println(id)
	if !e.Wait {
		return nil
	}
	result, err := client.Wait(ctx, queue, id, showProgress)
	if err != nil {
		return err
	}
	if result != nil {
		fmt.Printf("%s\n", result)
	}
	return nil
}

// readPayload reads a command's payload of a kind from its argument, or for "-" from
// stdin. example shows what would be right.
func readPayload(set *tasks.Set, kind, arg string, stdin io.Reader, example func(*tasks.Task) string) (tasks.Payload, error) {
	task, err := set.Lookup(kind)
	if err != nil {
		return nil, configError("kind: " + strings.Replace(err.Error(), "this worker knows", "this program knows", 1))
	}
	data := []byte(arg)
	if arg == "-" {
		if data, err = io.ReadAll(stdin); err != nil {
			return nil, fmt.Errorf("read the payload from standard input: %w", err)
		}
	}
	payload, err := task.Decode(data)
	if err != nil {
		return nil, configError(fmt.Sprintf("%v; for example: %s", err, example(task)))
	}
	return payload, nil
}

// maxRetryFlag is [tasks.Options.MaxRetry] for --max-retry, which is nil if it is not
// given.
func maxRetryFlag(n *int) (int, error) {
	switch {
	case n == nil:
		return 0, nil
	case *n < 0:
		return 0, configError(fmt.Sprintf("--max-retry: %d is less than 0, which is no retry", *n))
	case *n == 0:
		return tasks.NoRetry, nil
	}
	return *n, nil
}

func (e *enqueueCmd) options(kind tasks.Options) (*tasks.EnqueueOptions, error) {
	opts := &tasks.EnqueueOptions{Queue: e.Queue, RunAt: e.At, UniqueKey: e.Unique}
	if e.Queue != "" && !queueName.MatchString(e.Queue) {
		return nil, configError(fmt.Sprintf("--queue: %q is no queue's name: letters, digits, and _ . : -", e.Queue))
	}
	if e.In < 0 {
		return nil, configError(fmt.Sprintf("--in: %s has passed", e.In))
	}
	if e.In > 0 {
		opts.RunAt = time.Now().Add(e.In)
	}
	var err error
	if opts.MaxRetry, err = maxRetryFlag(e.MaxRetry); err != nil {
		return nil, err
	}
	if e.Wait {
		opts.Retention = max(kind.Retention, retentionForWait)
	}
	return opts, nil
}

// open opens Redis for a command, which says itself what is wrong with it.
func (s redisSettings) open() (redis.UniversalClient, error) {
	var f faults
	url := f.redisURL(s.RedisURL)
	if err := f.err(); err != nil {
		return nil, err
	}
	redis.SetLogger(redisLog{slog.New(slog.DiscardHandler)})
	return tasks.OpenRedis(url)
}

func showProgress(state asynq.TaskState, result []byte) {
	var so struct {
		Progress json.RawMessage `json:"progress"`
	}
	if err := json.Unmarshal(result, &so); err != nil || so.Progress == nil {
		fmt.Fprintln(os.Stderr, state)
		return
	}
	fmt.Fprintf(os.Stderr, "%s %s\n", state, so.Progress)
}

type kindsCmd struct{}

func (kindsCmd) Run(kinds kindsOf) error {
	set := kinds.set()
	for i, kind := range set.Kinds() {
		task, err := set.Lookup(kind)
		if err != nil {
			return err
		}
		if i > 0 {
			fmt.Println()
		}
		o := task.Options
		fmt.Printf("%s   queue %s, %d retries, %s for each try\n", kind, o.Queue, o.MaxRetry, o.Timeout)
		w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
		for _, f := range task.Fields {
			optional := ""
			if f.Optional {
				optional = " (optional)"
			}
			fmt.Fprintf(w, "  %s\t%s\t%s%s\n", f.Name, f.Type, f.Doc, optional)
		}
		if err := w.Flush(); err != nil {
			return err
		}
		fmt.Printf("  %s\n", exampleLine(task))
	}
	return nil
}

// exampleLine is a command that can be pasted into a shell.
func exampleLine(task *tasks.Task) string {
	return fmt.Sprintf("worker enqueue %s '%s'", task.Kind, strings.ReplaceAll(task.Example(), "'", `'\''`))
}

type migrateCmd struct {
	databaseSettings `embed:""`
	startupSettings  `embed:""`
	logSettings      `embed:""`
}

func (m *migrateCmd) Run(kinds kindsOf) error {
	var f faults
	url := f.databaseURL(m.DatabaseURL)
	timeout := f.startup(m.startupSettings)
	level, format := f.log(m.logSettings)
	if err := f.err(); err != nil {
		return err
	}
	log := newLogger(os.Stderr, level, format)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	db, err := dbpool.Open(ctx, dbpool.DefaultConfig(url))
	if err != nil {
		return err
	}
	defer db.Close()
	if err := waitFor(ctx, timeout, log, server{"DATABASE_URL", db.Ping}); err != nil {
		return err
	}
	if err := schema.Migrate(ctx, url, log); err != nil {
		return err
	}
	return tasks.RecordKinds(ctx, db, kinds.set())
}

type configCmd struct {
	runSettings `embed:""`
}

func (c *configCmd) Run() error {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	printSettings(w, reflect.ValueOf(c.runSettings))
	if err := w.Flush(); err != nil {
		return err
	}
	_, err := c.config()
	return err
}

// printSettings prints NAME=value for every setting, secrets left out.
func printSettings(w io.Writer, settings reflect.Value) {
	for i := range settings.NumField() {
		field := settings.Type().Field(i)
		if field.Anonymous {
			printSettings(w, settings.Field(i))
			continue
		}
		name, value := field.Tag.Get("env"), settings.Field(i).String()
		switch {
		case name == "WEBHOOK_SECRET" && value != "":
			value = "***"
		case strings.HasSuffix(name, "_URL"):
			value = redactURL(value)
		}
		fmt.Fprintf(w, "%s\t%s\n", name, value)
	}
}

type versionCmd struct{}

func (versionCmd) Run() error {
	fmt.Println(version())
	return nil
}
