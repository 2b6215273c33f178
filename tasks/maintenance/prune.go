package maintenance

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/outbox"
	"github.com/carpool-go/carpool/internal/prune"
	"github.com/carpool-go/carpool/tasks"
)

// Prune is the payload of carpool:prune, which deletes what carpool's own tables no longer
// need: records of transactional jobs that can't be delivered again, and the webhooks'
// attempts of more than 30 days ago. Workers schedule it once an hour. It is idempotent: a
// run that was interrupted is simply begun anew.
type Prune struct {
	// Keep is how long the record of a job that is done is kept at least: days and Go's
	// units, such as 30d, 1d12h or 90m; "" means 24h.
	Keep string `json:"keep,omitempty" doc:"how long the record of a job that is done is kept at least; 24h if left out" example:"24h"`
}

const (
	// defaultKeep is for those who enqueue the same id again: see
	// [tasks.EnqueueOptions].
	defaultKeep = 24 * time.Hour
	// webhooksKept is how long the attempts of webhooks are kept.
	webhooksKept = 30 * 24 * time.Hour
	// donePages is how many pages of 8 kB are gone through at a time, and doneBatch
	// how many records at most are deleted by one statement.
	donePages = 128
	doneBatch = 1000
)

// Kind returns "carpool:prune".
func (Prune) Kind() string { return "carpool:prune" }

// Options returns a timeout of an hour, because the first run on a large table may take
// long; a retention of a day; and few retries, because the next run does what this one
// left undone.
func (Prune) Options() tasks.Options {
	return tasks.Options{MaxRetry: 3, Timeout: time.Hour, Retention: 24 * time.Hour, SQL: tasks.SQLOperators}
}

// Validate returns what is wrong with the form of Keep.
func (p Prune) Validate() error {
	if _, err := p.keep(); err != nil {
		return fmt.Errorf("keep: %w", err)
	}
	return nil
}

func (p Prune) keep() (time.Duration, error) {
	if p.Keep == "" {
		return defaultKeep, nil
	}
	return prune.ParseAge(p.Keep)
}

// PruneResult is the result of carpool:prune.
type PruneResult struct {
	// Jobs is how many records of carpool.jobs_done were deleted.
	Jobs int64 `json:"jobs"`
	// Needed is how many were old enough and are kept, because their jobs may be
	// delivered again.
	Needed int64 `json:"needed,omitempty"`
	// Webhooks is how many rows of carpool.webhook_deliveries were deleted.
	Webhooks int64 `json:"webhooks"`
}

// prune goes once through carpool.jobs_done, and holds neither a connection nor a
// lock between two batches.
//
// The record of a job keeps its effects from happening twice. It goes only when
// no one has the job any more who could deliver it: neither the outbox nor Redis.
func (t *Tasks) prune(ctx context.Context, job *tasks.Job, p Prune) (PruneResult, error) {
	var result PruneResult
	keep, err := p.keep()
	if err != nil {
		return result, tasks.Permanent(fmt.Errorf("keep: %w", err))
	}
	if t.Redis == nil {
		return result, tasks.Permanent(errors.New("this program has given maintenance.Tasks no Redis to ask for the jobs; nothing is deleted"))
	}
	if err := t.pruneDone(ctx, job, keep, &result); err != nil {
		return result, fmt.Errorf("prune carpool.jobs_done: %w", err)
	}
	if err := pruneWebhooks(ctx, job, &result); err != nil {
		return result, fmt.Errorf("prune carpool.webhook_deliveries: %w", err)
	}
	return result, nil
}

// pruneWebhooks deletes the webhooks' old attempts.
func pruneWebhooks(ctx context.Context, job *tasks.Job, result *PruneResult) error {
	_, err := prune.Run{
		DB: job.DB, Schema: "carpool", Table: "webhook_deliveries", Column: "delivered_at", OlderThan: webhooksKept,
		Deleted: func(rows int64) {
			result.Webhooks += rows
			// A progress that can't be shown is no reason to stop.
			_ = job.Progress(ctx, *result)
		},
	}.Do(ctx)
	if _, ok := errors.AsType[*prune.PermanentError](err); ok {
		return tasks.Permanent(err)
	}
	return err
}

// doneRecord is an old record of a job.
type doneRecord struct {
	At              string // its ctid
	ID, Kind, Queue string
}

// pruneDone goes through the table in the order in which the records lie. That is
// about the order of their age, takes no index that each job would pay for, and
// comes to an end however many records have to stay.
func (t *Tasks) pruneDone(ctx context.Context, job *tasks.Job, keep time.Duration, result *PruneResult) error {
	var pages int64
	var cutoff time.Time
	err := job.DB.QueryRow(ctx, `
		SELECT pg_relation_size('carpool.jobs_done') / current_setting('block_size')::int, now() - make_interval(secs => $1)`,
		keep.Seconds()).Scan(&pages, &cutoff)
	if err != nil {
		return err
	}
	for page := int64(0); page < pages; page += donePages {
		after, end := fmt.Sprintf("(%d,0)", page), fmt.Sprintf("(%d,0)", page+donePages)
		for more := true; more; {
			old, err := oldRecords(ctx, job, cutoff, after, end)
			if err != nil {
				return err
			}
			if more = len(old) == doneBatch; more {
				after = old[len(old)-1].At
			}
			deleted, err := t.deleteRecords(ctx, job, cutoff, old)
			if err != nil {
				return err
			}
			result.Jobs += deleted
			result.Needed += int64(len(old)) - deleted
			// A progress that can't be shown is no reason to stop.
			_ = job.Progress(ctx, *result)
		}
	}
	return nil
}

func oldRecords(ctx context.Context, job *tasks.Job, cutoff time.Time, after, end string) ([]doneRecord, error) {
	rows, err := job.DB.Query(ctx, `
		SELECT d.ctid::text, d.id, d.kind, d.queue FROM carpool.jobs_done d
		WHERE d.ctid > $1::text::tid AND d.ctid < $2::text::tid AND d.done_at < $3 ORDER BY d.ctid LIMIT $4`,
		after, end, cutoff, doneBatch)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowToStructByPos[doneRecord])
}

// deleteRecords deletes those of the records whose jobs can't be delivered again.
// The outbox is asked first: a relay deletes a row only when Redis has its job.
func (t *Tasks) deleteRecords(ctx context.Context, job *tasks.Job, cutoff time.Time, old []doneRecord) (int64, error) {
	if len(old) == 0 {
		return 0, nil
	}
	old, err := notInOutbox(ctx, job, old)
	if err != nil {
		return 0, err
	}
	ids, kinds, err := notInRedis(ctx, t.Redis, old)
	if err != nil || len(ids) == 0 {
		return 0, err
	}
	tag, err := job.DB.Exec(ctx, `DELETE FROM carpool.jobs_done
		WHERE (id, kind) IN (SELECT * FROM unnest($1::text[], $2::text[])) AND done_at < $3`, ids, kinds, cutoff)
	return tag.RowsAffected(), err
}

func notInOutbox(ctx context.Context, job *tasks.Job, records []doneRecord) ([]doneRecord, error) {
	ids := make([]string, len(records))
	for i, r := range records {
		ids[i] = r.ID
	}
	has, err := outbox.Present(ctx, job.DB, ids)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(records, func(r doneRecord) bool { return has[r.ID] }), nil
}

// notInRedis returns the ids and kinds of the records whose jobs Redis doesn't
// have. Whatever it has can be put back on its queue, by a button or a call.
func notInRedis(ctx context.Context, rdb redis.UniversalClient, records []doneRecord) (ids, kinds []string, err error) {
	if len(records) == 0 {
		return nil, nil, nil
	}
	has := make([]*redis.IntCmd, len(records))
	_, err = rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
		for i, r := range records {
			has[i] = p.Exists(ctx, asynqwire.Task(r.Queue, r.ID))
		}
		return nil
	})
	if err != nil {
		return nil, nil, fmt.Errorf("ask Redis for the jobs: %w", err)
	}
	for i, r := range records {
		if has[i].Val() == 0 {
			ids, kinds = append(ids, r.ID), append(kinds, r.Kind)
		}
	}
	return ids, kinds, nil
}
