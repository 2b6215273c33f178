package tasks_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hibiken/asynq"
	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/taskstest"
)

// credit is a job that adds to an account.
type credit struct {
	Amount int `json:"amount"`
}

func (credit) Kind() string           { return "account:credit" }
func (credit) Options() tasks.Options { return tasks.Options{} }
func (credit) Validate() error        { return nil }

// account is a database with an account, and a way to deliver jobs to a handler.
type account struct {
	*taskstest.Kit
	task *tasks.Task
	// delivery is what each delivery says of itself: that it is the first, unless a test sets
	// it. A worker counts, but what is promised doesn't rest on that.
	delivery int
}

func openAccount(t *testing.T, register func(*tasks.Set)) *account {
	t.Helper()
	a := &account{Kit: taskstest.New(t), delivery: 1}
	if _, err := a.DB.Exec(t.Context(), "CREATE TABLE account AS SELECT 0 AS balance"); err != nil {
		t.Fatal(err)
	}
	var set tasks.Set
	register(&set)
	var err error
	if a.task, err = set.Lookup("account:credit"); err != nil {
		t.Fatal(err)
	}
	return a
}

// deliver runs the job once, as a worker that was given it would.
func (a *account) deliver(ctx context.Context, db *dbpool.Pool, id string) (string, error) {
	p, err := a.task.Decode([]byte(`{"amount": 5}`))
	if err != nil {
		return "", err
	}
	result, err := a.task.Run(ctx, &tasks.Job{
		ID: id, Kind: a.task.Kind, Queue: "default", Delivery: a.delivery, DB: db, Log: slog.New(slog.DiscardHandler),
	}, p)
	return string(result), err
}

func (a *account) balance(t *testing.T) (balance int) {
	t.Helper()
	if err := a.DB.QueryRow(t.Context(), "SELECT balance FROM account").Scan(&balance); err != nil {
		t.Fatal(err)
	}
	return balance
}

func add(ctx context.Context, tx pgx.Tx, amount int) (balance int, err error) {
	err = tx.QueryRow(ctx, "UPDATE account SET balance = balance + $1 RETURNING balance", amount).Scan(&balance)
	return balance, err
}

func TestRegisterTx_SecondDeliveryHasTheFirstOnesResultAndDoesNothing(t *testing.T) {
	t.Parallel()
	ran := 0
	a := openAccount(t, func(s *tasks.Set) {
		tasks.RegisterTx(s, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, p credit) (int, error) {
			ran++
			return add(ctx, tx, p.Amount)
		})
	})
	id := uuid.NewString()
	for range 3 {
		result, err := a.deliver(t.Context(), a.DB, id)
		if result != "5" || err != nil {
			t.Errorf("result %s, error %v; want 5", result, err)
		}
		a.delivery++
	}
	if ran != 1 || a.balance(t) != 5 {
		t.Errorf("the handler ran %d times, and the balance is %d", ran, a.balance(t))
	}
	if result, err := a.deliver(t.Context(), a.DB, uuid.NewString()); result != "10" || err != nil {
		t.Errorf("another job: result %s, error %v; want 10", result, err)
	}
	a.task.Kind = "account:gift"
	if result, err := a.deliver(t.Context(), a.DB, id); result != "15" || err != nil {
		t.Errorf("a job of another kind that has the same id: result %s, error %v; want 15", result, err)
	}
}

func TestRegisterTx_FailureLeavesNeitherEffectsNorRecord(t *testing.T) {
	t.Parallel()
	for name, failure := range map[string]func(context.Context, pgx.Tx) error{
		"an error": func(context.Context, pgx.Tx) error { return errors.New("no") },
		"a failed statement that the handler passes over": func(ctx context.Context, tx pgx.Tx) error {
			_, _ = tx.Exec(ctx, "SELECT 1/0")
			return nil
		},
		"rows that are left open": func(ctx context.Context, tx pgx.Tx) error {
			_, _ = tx.Query(ctx, "SELECT generate_series(1, 100000)")
			return nil
		},
		"a deferred constraint": func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Exec(ctx, `CREATE TABLE twice (n int UNIQUE DEFERRABLE INITIALLY DEFERRED); INSERT INTO twice VALUES (1), (1)`)
			return err
		},
		"a snooze": func(context.Context, pgx.Tx) error { return tasks.Snooze(time.Minute) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			fail := true
			a := openAccount(t, func(s *tasks.Set) {
				tasks.RegisterTx(s, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, p credit) (int, error) {
					balance, err := add(ctx, tx, p.Amount)
					if err == nil && fail {
						err = failure(ctx, tx)
					}
					return balance, err
				})
			})
			id := uuid.NewString()
			if _, err := a.deliver(t.Context(), a.DB, id); err == nil {
				t.Error("the delivery succeeds")
			}
			if balance := a.balance(t); balance != 0 {
				t.Errorf("the balance is %d after a failure", balance)
			}
			fail = false
			if result, err := a.deliver(t.Context(), a.DB, id); result != "5" || err != nil {
				t.Errorf("the next try: result %s, error %v; want 5", result, err)
			}
		})
	}
}

func TestRegisterTx_PanicRollsBackAndGivesTheConnectionBack(t *testing.T) {
	t.Parallel()
	a := openAccount(t, func(s *tasks.Set) {
		tasks.RegisterTx(s, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, p credit) (int, error) {
			_, _ = add(ctx, tx, p.Amount)
			panic("no")
		})
	})
	func() {
		defer func() { _ = recover() }()
		_, _ = a.deliver(t.Context(), a.DB, "1")
	}()
	if s := a.DB.Stats(); s.CheckedOut != 0 || a.balance(t) != 0 {
		t.Errorf("%d connections are out, the balance is %d", s.CheckedOut, a.balance(t))
	}
}

func TestRegisterTx_ManyRunsAtOnceHaveOneEffect(t *testing.T) {
	t.Parallel()
	for name, delivery := range map[string]int{"first deliveries": 1, "later ones": 2} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var atOnce, most atomic.Int32
			alone := func() {
				most.Store(max(most.Load(), atOnce.Add(1)))
				defer atOnce.Add(-1)
				time.Sleep(20 * time.Millisecond)
			}
			a := openAccount(t, func(s *tasks.Set) {
				tasks.RegisterTx(s, func(ctx context.Context, job *tasks.Job, tx pgx.Tx, p credit) (int, error) {
					if job.Delivery > 1 {
						alone()
					}
					balance, err := add(ctx, tx, p.Amount)
					if err == nil {
						alone()
					}
					return balance, err
				})
			})
			a.delivery = delivery
			var wg sync.WaitGroup
			for range 20 {
				wg.Go(func() {
					if result, err := a.deliver(t.Context(), a.DB, "the same"); result != "5" || err != nil {
						t.Errorf("result %s, error %v; want 5", result, err)
					}
				})
			}
			wg.Wait()
			if balance := a.balance(t); balance != 5 || most.Load() != 1 {
				t.Errorf("the balance is %d, and %d runs were in the transaction at once", balance, most.Load())
			}
		})
	}
}

func TestRegisterTx_HandlerThatSleptBeyondItsLeaseCannotCommitAfterItsSuccessor(t *testing.T) {
	t.Parallel()
	asleep, wake := make(chan struct{}), make(chan struct{})
	first := true
	a := openAccount(t, func(s *tasks.Set) {
		tasks.RegisterTx(s, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, p credit) (int, error) {
			balance, err := add(ctx, tx, p.Amount)
			if first {
				first = false
				close(asleep)
				<-wake
			}
			return balance, err
		})
	})
	slept := make(chan error)
	go func() {
		_, err := a.deliver(t.Context(), a.DB, "1")
		slept <- err
	}()
	<-asleep
	// Another process: it has a pool of its own.
	db, err := dbpool.Open(t.Context(), dbpool.DefaultConfig(a.DatabaseURL))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if result, err := a.deliver(t.Context(), db, "1"); result != "5" || err != nil {
		t.Errorf("the successor: result %s, error %v; want 5", result, err)
	}
	close(wake)
	if err := <-slept; err == nil {
		t.Error("the sleeper has committed as well")
	}
	if balance := a.balance(t); balance != 5 {
		t.Errorf("the balance is %d", balance)
	}
}

func TestRegisterTx_CommitWhoseAnswerIsLostIsResolvedByLooking(t *testing.T) {
	t.Parallel()
	for name, commits := range map[string]bool{"committed": true, "not committed": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := openAccount(t, func(s *tasks.Set) {
				tasks.RegisterTx(s, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, p credit) (int, error) {
					return add(ctx, tx, p.Amount)
				})
			})
			// The commit takes a moment, in which the connection is cut. Then it goes
			// on, or its session is ended.
			for _, sql := range []string{
				`CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(1); RETURN NULL; END $$`,
				`CREATE CONSTRAINT TRIGGER slowly AFTER INSERT ON carpool.jobs_done DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slowly()`,
			} {
				if _, err := a.DB.Exec(t.Context(), sql); err != nil {
					t.Fatal(err)
				}
			}
			proxied, proxy := testservers.ThroughProxy(t, a.DatabaseURL)
			db, err := dbpool.Open(t.Context(), dbpool.DefaultConfig(proxied))
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			delivered := make(chan error)
			go func() {
				_, err := a.deliver(t.Context(), db, "1")
				delivered <- err
			}()
			const committing = "FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
			testservers.Eventually(t, "the commit is under way", func() bool {
				var n int
				return a.DB.QueryRow(t.Context(), "SELECT count(*) "+committing).Scan(&n) == nil && n == 1
			})
			proxy.Reset()
			if !commits {
				if _, err := a.DB.Exec(t.Context(), "SELECT pg_terminate_backend(pid) "+committing); err != nil {
					t.Fatal(err)
				}
			}
			if err := <-delivered; !errors.Is(err, tasks.ErrNoAnswer) {
				t.Errorf("the error is %v, want one that says that the commit got no answer", err)
			}
			if result, err := a.deliver(t.Context(), db, "1"); result != "5" || err != nil {
				t.Errorf("the next delivery: result %s, error %v; want 5", result, err)
			}
			if balance := a.balance(t); balance != 5 {
				t.Errorf("the balance is %d", balance)
			}
		})
	}
}

func TestRegisterTx_CommitMayTakeAsLongAsTheJob(t *testing.T) {
	t.Parallel()
	ran := 0
	a := openAccount(t, func(s *tasks.Set) {
		tasks.RegisterTx(s, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, p credit) (int, error) {
			ran++
			return add(ctx, tx, p.Amount)
		})
	})
	if _, err := a.DB.Exec(t.Context(), `CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(11); RETURN NULL; END';
		CREATE CONSTRAINT TRIGGER slowly AFTER UPDATE ON account DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slowly()`); err != nil {
		t.Fatal(err)
	}
	if result, err := a.deliver(t.Context(), a.DB, "1"); result != "5" || err != nil || ran != 1 {
		t.Errorf("result %s, error %v after %d runs; want 5", result, err, ran)
	}
}

func TestRegisterTx_TransactionIsTheWorkersToEnd(t *testing.T) {
	t.Parallel()
	a := openAccount(t, func(s *tasks.Set) {
		tasks.RegisterTx(s, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, p credit) (int, error) {
			if tx.Commit(ctx) == nil || tx.Rollback(ctx) == nil {
				t.Error("the handler can end the transaction")
			}
			savepoint := pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error {
				_, _ = add(ctx, tx, 100)
				return errors.New("undo")
			})
			if savepoint == nil {
				t.Error("a savepoint can't be rolled back")
			}
			return add(ctx, tx, p.Amount)
		})
	})
	if result, err := a.deliver(t.Context(), a.DB, "1"); result != "5" || err != nil {
		t.Errorf("result %s, error %v; want 5", result, err)
	}
}

// In a script that brings its own BEGIN and COMMIT, for one.
func TestRegisterTx_TransactionThatWasEndedInSQLIsAFailure(t *testing.T) {
	t.Parallel()
	for name, end := range map[string][]string{
		"ROLLBACK":           {"ROLLBACK"},
		"COMMIT":             {"BEGIN; UPDATE account SET balance = 7; COMMIT"},
		"ROLLBACK AND CHAIN": {"ROLLBACK AND CHAIN"},
		"COMMIT AND CHAIN":   {"COMMIT AND CHAIN"},
		"and then BEGIN":     {"ROLLBACK", "BEGIN"},
		"BEGIN in it":        {"COMMIT; BEGIN; UPDATE account SET balance = 7"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := openAccount(t, func(s *tasks.Set) {
				tasks.RegisterTx(s, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, p credit) (int, error) {
					balance, _ := add(ctx, tx, p.Amount)
					for _, sql := range end {
						if _, err := tx.Exec(ctx, sql); err != nil {
							return 0, err
						}
					}
					return balance, nil
				})
			})
			_, err := a.deliver(t.Context(), a.DB, "1")
			if !errors.Is(err, asynq.SkipRetry) || !strings.Contains(err.Error(), "not by COMMIT or ROLLBACK") {
				t.Errorf("error %v, want a permanent one that says whose the transaction is", err)
			}
		})
	}
}

// The connection serves the next job by then.
func TestRegisterTx_TransactionCannotBeUsedAfterTheHandlerHasReturned(t *testing.T) {
	t.Parallel()
	var kept, savepoint pgx.Tx
	a := openAccount(t, func(s *tasks.Set) {
		tasks.RegisterTx(s, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, p credit) (int, error) {
			if kept != nil {
				for name, old := range map[string]pgx.Tx{"transaction": kept, "savepoint": savepoint} {
					if _, err := old.Exec(ctx, "UPDATE account SET balance = 0"); err == nil {
						t.Errorf("Exec of the %s", name)
					}
					if err := old.QueryRow(ctx, "SELECT 1").Scan(new(int)); err == nil {
						t.Errorf("QueryRow of the %s", name)
					}
					if _, err := old.Query(ctx, "SELECT 1"); err == nil {
						t.Errorf("Query of the %s", name)
					}
					if err := old.SendBatch(ctx, &pgx.Batch{}).Close(); err == nil {
						t.Errorf("SendBatch of the %s", name)
					}
					if _, err := old.CopyFrom(ctx, pgx.Identifier{"account"}, []string{"balance"}, pgx.CopyFromRows(nil)); err == nil {
						t.Errorf("CopyFrom of the %s", name)
					}
					if _, err := old.Prepare(ctx, "s", "SELECT 1"); err == nil {
						t.Errorf("Prepare of the %s", name)
					}
					if _, err := old.Begin(ctx); err == nil {
						t.Errorf("Begin of the %s", name)
					}
					objects := old.LargeObjects()
					if _, err := objects.Create(ctx, 0); !errors.Is(err, pgx.ErrTxClosed) {
						t.Errorf("LargeObjects of the %s: %v", name, err)
					}
					if old.Conn() != nil {
						t.Errorf("Conn of the %s", name)
					}
					if old.Commit(ctx) == nil || old.Rollback(ctx) == nil {
						t.Errorf("Commit or Rollback of the %s", name)
					}
				}
				return add(ctx, tx, p.Amount)
			}
			kept = tx
			var err error
			if savepoint, err = tx.Begin(ctx); err != nil {
				return 0, err
			}
			return add(ctx, savepoint, p.Amount)
		})
	})
	cfg := dbpool.DefaultConfig(a.DatabaseURL)
	cfg.Size, cfg.MaxOverflow = 1, 0
	db, err := dbpool.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for i, want := range []string{"5", "10"} {
		if result, err := a.deliver(t.Context(), db, uuid.NewString()); result != want || err != nil {
			t.Errorf("job %d: result %s, error %v; want %s", i, result, err, want)
		}
	}
}

func TestRegisterOnce_HandlerIsNotEvenCalledForAJobThatIsDone(t *testing.T) {
	t.Parallel()
	called := 0
	a := openAccount(t, func(s *tasks.Set) {
		tasks.RegisterOnce(s, func(ctx context.Context, job *tasks.Job, p credit) (string, error) {
			called++
			return tasks.Once(ctx, job, func(tx pgx.Tx) (string, error) {
				balance, err := add(ctx, tx, p.Amount)
				return fmt.Sprint("now ", balance), err
			})
		})
	})
	for range 2 {
		if result, err := a.deliver(t.Context(), a.DB, "1"); result != `"now 5"` || err != nil {
			t.Errorf("result %s, error %v", result, err)
		}
	}
	if called != 1 {
		t.Errorf("the handler was called %d times", called)
	}
}

func TestRegisterOnce_OnceMustBeCalledOnce(t *testing.T) {
	t.Parallel()
	for want, handler := range map[string]tasks.Handler[credit, int]{
		"without having called": func(context.Context, *tasks.Job, credit) (int, error) { return 0, nil },
		"called twice": func(ctx context.Context, job *tasks.Job, p credit) (balance int, err error) {
			for range 2 {
				balance, err = tasks.Once(ctx, job, func(tx pgx.Tx) (int, error) { return add(ctx, tx, p.Amount) })
			}
			return balance, err
		},
	} {
		t.Run(want, func(t *testing.T) {
			t.Parallel()
			a := openAccount(t, func(s *tasks.Set) { tasks.RegisterOnce(s, handler) })
			if _, err := a.deliver(t.Context(), a.DB, "1"); !tasks.IsPermanent(err) || !strings.Contains(err.Error(), want) {
				t.Errorf("the error is %v; want a permanent one that has %q in it", err, want)
			}
		})
	}
}
