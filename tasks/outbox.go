package tasks

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/carpool-go/carpool/internal/instance"
	"github.com/carpool-go/carpool/internal/outbox"
)

// EnqueueTx validates the payload and enqueues a job that carries it when tx
// commits, and not at all when it rolls back; a nil opts overrides nothing. It
// returns the job's id. The job waits in carpool.outbox until a worker's relay
// moves it to Redis, which needs milliseconds, or as long as Redis is away.
//
// The database alone does it, so the client may be the zero [Client]. tx is a transaction
// of pgx, or one of its connections or pools, which enqueue the job at once. The database
// must have carpool's tables and know the payload's kind, from the command migrate or the
// start of a worker that has it.
//
// An [EnqueueOptions.UniqueKey] is taken when the job is moved; if another job
// holds it then, this one is dropped. An [EnqueueOptions.ID] is refused, because the
// outbox makes the ids.
//
// The error is a [PayloadError] for a payload that is not valid, or above MaxPayload, or
// one for an ID or a queue that can't be used, which leave tx as it was; or Postgres',
// which aborts tx. What carpool.enqueue refuses, such as a payload above the limit that the
// workers have written to the database, as Postgres writes it, with a space after each
// comma and colon, is a
// [pgconn.PgError] with the code 22023 ([pgerrcode.InvalidParameterValue]), or 42501
// ([pgerrcode.InsufficientPrivilege]) for a kind that is for operators; see [SQL].
func (c *Client) EnqueueTx(ctx context.Context, tx interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}, p Payload, opts *EnqueueOptions,
) (id string, err error) {
	data, err := c.encode(p)
	if err != nil {
		return "", err
	}
	if opts == nil {
		opts = &EnqueueOptions{}
	}
	if opts.ID != "" {
		return "", fmt.Errorf("tasks: enqueue %s: EnqueueTx takes no ID: the outbox makes it, and EnqueueTx returns it", p.Kind())
	}
	if err := instance.CheckQueue(opts.Queue, p.Kind()); err != nil {
		return "", fmt.Errorf("tasks: enqueue %s: %w", p.Kind(), Permanent(err))
	}
	id, err = outbox.Enqueue(ctx, tx, outbox.Row{
		Kind: p.Kind(), Payload: data, Queue: opts.Queue, UniqueKey: opts.UniqueKey, RunAt: opts.RunAt,
		MaxRetry: outbox.MaxRetry(opts.MaxRetry), Timeout: opts.Timeout, Retention: opts.Retention,
	})
	if err != nil {
		return "", fmt.Errorf("tasks: enqueue %s: %w", p.Kind(), withHint(err))
	}
	return id, nil
}

// withHint adds the way out that the database offers.
func withHint(err error) error {
	e, ok := errors.AsType[*pgconn.PgError](err)
	switch {
	case !ok:
		return err
	case e.Code == pgerrcode.UndefinedFunction || e.Code == pgerrcode.InvalidSchemaName:
		return fmt.Errorf("%w (the database lacks carpool's newest tables; run the command migrate)", err)
	case e.Hint != "":
		return fmt.Errorf("%w (%s)", err, e.Hint)
	}
	return err
}

// The kinds are locked in one order, whoever writes them.
const recordKindsSQL = `INSERT INTO carpool.kinds AS k (kind, fields, operators, seen_at)
	SELECT n.kind, n.fields, n.operators, now()
	FROM jsonb_to_recordset($1::jsonb) AS n(kind text, fields jsonb, operators boolean) ORDER BY n.kind
	ON CONFLICT (kind) DO UPDATE SET fields = excluded.fields, operators = excluded.operators, seen_at = excluded.seen_at
	WHERE (k.fields, k.operators) IS DISTINCT FROM (excluded.fields, excluded.operators) OR k.seen_at < now() - interval '1 hour'`

// RecordKinds writes the set's kinds and their fields to carpool.kinds, by which the
// database checks what [Client.EnqueueTx] and the function carpool.enqueue are given.
// Kinds that others wrote stay. The error is the database's. A worker calls it at its
// start, and the command migrate.
func RecordKinds(ctx context.Context, db interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
}, s *Set,
) error {
	type field struct {
		Name     string `json:"name"`
		Type     string `json:"type"`
		Optional bool   `json:"optional"`
	}
	type kind struct {
		Kind      string  `json:"kind"`
		Fields    []field `json:"fields"`
		Operators bool    `json:"operators"`
	}
	kinds := []kind{}
	for _, name := range s.Kinds() {
		task := s.byKind[name]
		k := kind{Kind: name, Fields: []field{}, Operators: task.Options.SQL == SQLOperators}
		for _, f := range task.Fields {
			k.Fields = append(k.Fields, field{f.Name, f.Type, f.Optional})
		}
		kinds = append(kinds, k)
	}
	data, err := json.Marshal(kinds)
	if err != nil {
		return fmt.Errorf("tasks: record the kinds: %w", err)
	}
	if _, err := db.Exec(ctx, recordKindsSQL, string(data)); err != nil {
		return fmt.Errorf("tasks: record the kinds: %w", err)
	}
	return nil
}
