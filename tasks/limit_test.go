package tasks_test

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/carpool-go/carpool/internal/limit"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/taskstest"
)

// parcelOf returns a parcel whose JSON has so many bytes.
func parcelOf(t *testing.T, size int) parcel {
	t.Helper()
	data, err := json.Marshal(parcel{})
	if err != nil {
		t.Fatal(err)
	}
	return parcel{To: strings.Repeat("x", size-len(data))}
}

func TestClient_RefusesAPayloadAboveTheLimit(t *testing.T) {
	t.Parallel()
	kit := outbox(t)
	if err := limit.Record(t.Context(), kit.DB, 8<<20); err != nil { // the database's is not what is meant
		t.Fatal(err)
	}
	for _, c := range []struct{ limit, most int }{{0, 1 << 20}, {2 << 20, 2 << 20}, {100, 100}} {
		client := *kit.Client
		client.MaxPayload = c.limit
		for _, enqueue := range []func(tasks.Payload) error{
			func(p tasks.Payload) error {
				_, err := client.Enqueue(t.Context(), p, nil)
				return err
			},
			func(p tasks.Payload) error {
				tx, err := kit.DB.Begin(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				defer tx.Rollback(context.Background())
				_, enqueueErr := client.EnqueueTx(t.Context(), tx, p, nil)
				if _, err := tx.Exec(t.Context(), "SELECT 1"); err != nil {
					t.Errorf("the transaction is aborted: %v", err)
				}
				return enqueueErr
			},
		} {
			if err := enqueue(parcelOf(t, c.most)); err != nil {
				t.Errorf("limit %d, a payload of as much: %v", c.limit, err)
			}
			err := enqueue(parcelOf(t, c.most+1))
			if !isPayloadError(err) || !tasks.IsPermanent(err) || !strings.Contains(err.Error(), "parcel:send payload: ") ||
				!strings.Contains(err.Error(), limit.Check(c.most+1, c.most).Error()) || !strings.Contains(err.Error(), "MAX_PAYLOAD") ||
				strings.Contains(err.Error(), "xxx") {
				t.Errorf("limit %d, a payload of a byte more: %.300v", c.limit, err)
			}
		}
	}
}

func TestEnqueueSQL_RefusesAPayloadAboveTheLimitOfTheDatabase(t *testing.T) {
	t.Parallel()
	kit := outbox(t)
	client := tasks.Client{MaxPayload: 8 << 20}
	for _, most := range []int{1 << 20, 3 << 20, 2000} {
		if most != 1<<20 { // which is there by default
			if err := limit.Record(t.Context(), kit.DB, most); err != nil {
				t.Fatal(err)
			}
		}
		small := parcelOf(t, most-20) // Postgres puts a space after each comma and colon
		if _, err := client.EnqueueTx(t.Context(), kit.DB, small, nil); err != nil {
			t.Errorf("limit %d, a payload below it: %v", most, err)
		}
		_, err := client.EnqueueTx(t.Context(), kit.DB, parcelOf(t, most+1), nil)
		if e, ok := errors.AsType[*pgconn.PgError](err); !ok || e.Code != pgerrcode.InvalidParameterValue ||
			!strings.Contains(e.Message, "more than the limit of ") || !strings.Contains(e.Message, "MAX_PAYLOAD") || strings.Contains(err.Error(), "xxx") {
			t.Errorf("limit %d, a payload above it: %.300v", most, err)
		}
	}
}

const tooLarge = "1048577 bytes are more than the limit of 1048576, which MAX_PAYLOAD sets"

// large is a result whose JSON has a byte more than the default allows.
var large = strings.Repeat("x", 1<<20-1)

func TestTask_ResultAboveTheLimitIsRefusedForGood(t *testing.T) {
	t.Parallel()
	set := new(tasks.Set)
	tasks.Register(set, func(_ context.Context, _ *tasks.Job, p parcel) (string, error) { return p.To, nil })
	task, err := set.Lookup("parcel:send")
	if err != nil {
		t.Fatal(err)
	}
	_, err = task.Run(t.Context(), &tasks.Job{}, parcel{To: large})
	if err == nil || !tasks.IsPermanent(err) || err.Error() != "the handler's result: "+tooLarge {
		t.Errorf("error %.300v", err)
	}
	for name, job := range map[string]*tasks.Job{"by default": {}, "by a larger limit": {Client: &tasks.Client{MaxPayload: 2 << 20}}} {
		result := large[:len(large)-1]
		if job.Client != nil {
			result = large
		}
		if data, err := task.Run(t.Context(), job, parcel{To: result}); err != nil || len(data) != len(result)+2 {
			t.Errorf("%s: a result of %d bytes, %.300v", name, len(data), err)
		}
	}
}

func TestRegisterTx_NothingIsCommittedWithAResultAboveTheLimit(t *testing.T) {
	t.Parallel()
	a := openAccount(t, func(s *tasks.Set) {
		tasks.RegisterTx(s, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, p credit) (string, error) {
			_, err := add(ctx, tx, p.Amount)
			return large, err
		})
	})
	_, err := a.deliver(t.Context(), a.DB, uuid.NewString())
	if !tasks.IsPermanent(err) || !strings.Contains(err.Error(), tooLarge) {
		t.Errorf("error %.300v", err)
	}
	if got := a.balance(t); got != 0 {
		t.Errorf("the balance is %d: the effect is there, and the job has failed", got)
	}
}

// A result may be in the record that was written when the limit was another.
func TestRegisterTx_TheRecordedResultIsTakenWhateverItsSize(t *testing.T) {
	t.Parallel()
	a := openAccount(t, func(s *tasks.Set) {
		tasks.RegisterTx(s, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, p credit) (int, error) {
			return add(ctx, tx, p.Amount)
		})
	})
	id := uuid.NewString()
	if _, err := a.DB.Exec(t.Context(), "INSERT INTO carpool.jobs_done (id, kind, queue, result) VALUES ($1, 'account:credit', 'default', to_json($2::text))", id, large); err != nil {
		t.Fatal(err)
	}
	if result, err := a.deliver(t.Context(), a.DB, id); err != nil || result != `"`+large+`"` {
		t.Errorf("a result of %d bytes, %.300v", len(result), err)
	}
}

func TestRegisterOnce_AJobThatIsDoneHasItsRecordedResultIfAnotherCanBeNone(t *testing.T) {
	t.Parallel()
	for name, result := range map[string]any{"too large": large, "not JSON": func() {}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := openAccount(t, func(s *tasks.Set) {
				tasks.RegisterOnce(s, func(ctx context.Context, job *tasks.Job, p credit) (any, error) {
					_, err := tasks.Once(ctx, job, func(tx pgx.Tx) (int, error) { return add(ctx, tx, p.Amount) })
					return result, err
				})
			})
			id := uuid.NewString()
			for range 2 {
				if got, err := a.deliver(t.Context(), a.DB, id); err != nil || got != "5" {
					t.Errorf("the result is %.300s, %.300v, want the recorded 5", got, err)
				}
			}
			if got := a.balance(t); got != 5 {
				t.Errorf("the balance is %d", got)
			}
		})
	}
	a := openAccount(t, func(s *tasks.Set) {
		tasks.RegisterOnce(s, func(ctx context.Context, job *tasks.Job, p credit) (string, error) {
			return tasks.Once(ctx, job, func(tx pgx.Tx) (string, error) {
				_, err := add(ctx, tx, p.Amount)
				return large, err
			})
		})
	})
	_, err := a.deliver(t.Context(), a.DB, uuid.NewString())
	if !tasks.IsPermanent(err) || !strings.Contains(err.Error(), tooLarge) || a.balance(t) != 0 {
		t.Errorf("a result above the limit in the transaction: %.300v, the balance is %d", err, a.balance(t))
	}
}

func TestJob_ProgressAboveTheLimitIsNotWritten(t *testing.T) {
	t.Parallel()
	written := 0
	job := &tasks.Job{WriteResult: func([]byte) error { written++; return nil }}
	if err := job.Progress(t.Context(), large); err == nil || !strings.Contains(err.Error(), "MAX_PAYLOAD") || written != 0 {
		t.Errorf("written %d times, %.300v", written, err)
	}
	if err := job.Progress(t.Context(), 5); err != nil || written != 1 {
		t.Errorf("what is small: written %d times, %v", written, err)
	}
}

// A test sets the limit where a worker does.
func TestKit_TheLimitIsTheClients(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	handler := func(context.Context, *tasks.Job, parcel) (string, error) { return large, nil }
	if _, err := taskstest.Run(t, kit, handler, parcel{To: "a"}); !tasks.IsPermanent(err) {
		t.Errorf("by default: %.300v", err)
	}
	kit.Client.MaxPayload = 2 << 20
	if result, err := taskstest.Run(t, kit, handler, parcel{To: "a"}); err != nil || result != large {
		t.Errorf("with a larger limit: %.300v", err)
	}
}
