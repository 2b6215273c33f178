package tasks_test

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/hibiken/asynq"
	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/once"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
)

// firstStatements are the ways in which a transaction's first statement can be made. Each of
// them draws a number from the sequence drawn, which no ROLLBACK takes back.
var firstStatements = map[string]func(context.Context, pgx.Tx) error{
	"Exec": func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "UPDATE account SET balance = balance + $1 * sign(nextval('drawn'))", 5)
		return err
	},
	"Exec of several statements": func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "SELECT nextval('drawn'); UPDATE account SET balance = balance + 5")
		return err
	},
	"Exec with a mode": func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "UPDATE account SET balance = balance + $1 * sign(nextval('drawn'))", pgx.QueryExecModeExec, 5)
		return err
	},
	"Exec with named arguments": func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "UPDATE account SET balance = balance + @amount * sign(nextval('drawn'))", pgx.NamedArgs{"amount": 5})
		return err
	},
	"Query": func(ctx context.Context, tx pgx.Tx) error {
		rows, _ := tx.Query(ctx, "UPDATE account SET balance = balance + 5 * sign(nextval('drawn')) RETURNING balance")
		_, err := pgx.CollectExactlyOneRow(rows, pgx.RowTo[int])
		return err
	},
	"Query whose rows are closed at once": func(ctx context.Context, tx pgx.Tx) error {
		rows, err := tx.Query(ctx, "WITH u AS (UPDATE account SET balance = balance + 5 * sign(nextval('drawn')) RETURNING 1) SELECT * FROM u, generate_series(1, 10000)")
		rows.Close()
		return errors.Join(err, rows.Err())
	},
	"Query with a result format": func(ctx context.Context, tx pgx.Tx) error {
		rows, _ := tx.Query(ctx, "UPDATE account SET balance = balance + 5 * sign(nextval('drawn')) RETURNING balance", pgx.QueryResultFormats{pgx.TextFormatCode})
		_, err := pgx.CollectExactlyOneRow(rows, pgx.RowTo[int])
		return err
	},
	"QueryRow": func(ctx context.Context, tx pgx.Tx) error {
		return tx.QueryRow(ctx, "UPDATE account SET balance = balance + $1 * sign(nextval('drawn')) RETURNING balance", 5).Scan(new(int))
	},
	"SendBatch": func(ctx context.Context, tx pgx.Tx) error {
		var b pgx.Batch
		b.Queue("SELECT nextval('drawn')")
		b.Queue("UPDATE account SET balance = balance + $1", 3)
		b.Queue("UPDATE account SET balance = balance + $1", 2)
		return tx.SendBatch(ctx, &b).Close()
	},
	"SendBatch of nothing": func(ctx context.Context, tx pgx.Tx) error {
		if err := tx.SendBatch(ctx, &pgx.Batch{}).Close(); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, "UPDATE account SET balance = balance + $1 * sign(nextval('drawn'))", 5)
		return err
	},
	"CopyFrom": func(ctx context.Context, tx pgx.Tx) error {
		// The trigger on it adds to the account.
		_, err := tx.CopyFrom(ctx, pgx.Identifier{"deposits"}, []string{"amount"}, pgx.CopyFromRows([][]any{{5}}))
		return err
	},
	"Prepare": func(ctx context.Context, tx pgx.Tx) error {
		if _, err := tx.Prepare(ctx, "add", "UPDATE account SET balance = balance + $1 * sign(nextval('drawn'))"); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, "add", 5)
		return err
	},
	"Begin": func(ctx context.Context, tx pgx.Tx) error {
		return pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error {
			_, err := tx.Exec(ctx, "UPDATE account SET balance = balance + $1 * sign(nextval('drawn'))", 5)
			return err
		})
	},
	"Conn": func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Conn().Exec(ctx, "UPDATE account SET balance = balance + $1 * sign(nextval('drawn'))", 5)
		return err
	},
	"LargeObjects": func(ctx context.Context, tx pgx.Tx) error {
		objects := tx.LargeObjects()
		if _, err := objects.Create(ctx, 0); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, "UPDATE account SET balance = balance + $1 * sign(nextval('drawn'))", 5)
		return err
	},
}

// openFirstAccount opens an account for a handler that makes a first statement, after which
// err says what the handler returns.
func openFirstAccount(t *testing.T, first func(context.Context, pgx.Tx) error, returned func(error) error) *account {
	t.Helper()
	a := openAccount(t, func(s *tasks.Set) {
		tasks.RegisterTx(s, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, _ credit) (string, error) {
			return "done", returned(first(ctx, tx))
		})
	})
	_, err := a.DB.Exec(t.Context(), `CREATE SEQUENCE drawn; CREATE TABLE deposits (amount int);
		CREATE FUNCTION deposit() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN UPDATE account SET balance = balance + NEW.amount * sign(nextval('drawn')); RETURN NEW; END $$;
		CREATE TRIGGER deposit BEFORE INSERT ON deposits FOR EACH ROW EXECUTE FUNCTION deposit()`)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

const byDefault = "by default"

// modes are the ways in which pgx sends statements, and what has it do so in a database's URL.
var modes = map[string]string{
	byDefault:                "",
	"in the simple protocol": "&default_query_exec_mode=simple_protocol",
	"in mode exec":           "&default_query_exec_mode=exec",
}

func asItIs(err error) error { return err }

// drawn is how many first statements have run, whatever became of their transactions.
func (a *account) drawn(t *testing.T) (n int) {
	t.Helper()
	if err := a.DB.QueryRow(t.Context(), "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM drawn").Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestFirstDelivery_EachFirstStatementHasItsEffectOnce(t *testing.T) {
	t.Parallel()
	for name, first := range firstStatements {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := openFirstAccount(t, first, asItIs)
			for range 2 { // a counter that is wrong the second time
				if result, err := a.deliver(t.Context(), a.DB, "1"); result != `"done"` || err != nil {
					t.Errorf("result %s, error %v; want done", result, err)
				}
			}
			if balance, drawn := a.balance(t), a.drawn(t); balance != 5 || drawn != 1 {
				t.Errorf("the balance is %d, and the statement ran %d times; want 5, and once", balance, drawn)
			}
		})
	}
}

func TestFirstDelivery_EachFirstStatementHasItsEffectOnceInEachModeOfPgx(t *testing.T) {
	t.Parallel()
	for mode, suffix := range modes {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			testFirstStatements(t, func(url string) *dbpool.Pool { return openPool(t, url+suffix) })
		})
	}
}

// testFirstStatements delivers a job for each first statement, and one whose first statement
// takes long, on a pool.
func testFirstStatements(t *testing.T, open func(url string) *dbpool.Pool) {
	t.Helper()
	statements := maps.Clone(firstStatements)
	statements["a long one"] = func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "UPDATE account SET balance = balance + 5 * sign(nextval('drawn')) FROM pg_sleep($1)", (answerBound + time.Second).Seconds())
		return err
	}
	a := openFirstAccount(t, nil, nil)
	var set tasks.Set
	tasks.RegisterTx(&set, func(ctx context.Context, job *tasks.Job, tx pgx.Tx, _ credit) (string, error) {
		return "done", statements[job.ID](ctx, tx)
	})
	var err error
	if a.task, err = set.Lookup("account:credit"); err != nil {
		t.Fatal(err)
	}
	// That a transaction has begun is said in whatever a session leaves out.
	if _, err := a.DB.Exec(t.Context(), "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET client_min_messages = error', current_database()); END $$"); err != nil {
		t.Fatal(err)
	}
	db := open(a.DatabaseURL)
	for name := range statements {
		for range 2 { // a counter that is wrong the second time
			if result, err := a.deliver(t.Context(), db, name); result != `"done"` || err != nil {
				t.Errorf("%s: result %s, error %v; want done", name, result, err)
			}
		}
	}
	if balance, drawn := a.balance(t), a.drawn(t); balance != 5*len(statements) || drawn != len(statements) {
		t.Errorf("the balance is %d, and %d statements ran; want 5 for each of %d", balance, drawn, len(statements))
	}
}

func TestFirstDelivery_NothingRunsWhileAnotherRunHasTheJobAndTheWaitHoldsNoConnection(t *testing.T) {
	t.Parallel()
	for name, first := range firstStatements {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			swallow := func(error) error { return nil }
			for how, returned := range map[string]func(error) error{"the error returned": asItIs, "the error passed over": swallow} {
				a := openFirstAccount(t, first, returned)
				other := connect(t, a.DatabaseURL)
				if _, err := other.Exec(t.Context(), "SELECT pg_advisory_lock(hashtextextended('carpool job 1 account:credit', 0))"); err != nil {
					t.Fatal(err)
				}
				cfg := dbpool.DefaultConfig(a.DatabaseURL)
				cfg.Size, cfg.MaxOverflow = 1, 0
				db, err := dbpool.Open(t.Context(), cfg)
				if err != nil {
					t.Fatal(err)
				}
				defer db.Close()
				delivered := make(chan error, 1)
				go func() {
					_, err := a.deliver(t.Context(), db, "1")
					delivered <- err
				}()
				for range 10 {
					if err := db.Ping(t.Context()); err != nil {
						t.Fatal(err)
					}
					time.Sleep(20 * time.Millisecond) // only to give a statement that is wrongly sent the time to run
				}
				if drawn := a.drawn(t); drawn != 0 {
					t.Errorf("%s: the statement ran %d times while another run had the job", how, drawn)
				}
				_ = other.Close(t.Context())
				if err := <-delivered; err != nil {
					t.Errorf("%s: %v", how, err)
				}
				if balance := a.balance(t); balance != 5 {
					t.Errorf("%s: the balance is %d once the other run has ended, want 5", how, balance)
				}
			}
		})
	}
}

// What another run commits between the beginning of the statement that locks the job and the
// lock itself is seen by the look: nothing runs then, not even to be undone.
func TestFirstDelivery_LookIsNoOlderThanTheLock(t *testing.T) {
	t.Parallel()
	for mode, suffix := range modes {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			a := openFirstAccount(t, firstStatements["Exec"], asItIs)
			// The key isn't had before the test says so.
			if _, err := a.DB.Exec(t.Context(), `CREATE OR REPLACE FUNCTION carpool.run_key(id text, kind text) RETURNS bigint LANGUAGE plpgsql AS $$
				BEGIN PERFORM pg_advisory_xact_lock_shared(7); RETURN 8; END $$`); err != nil {
				t.Fatal(err)
			}
			other := connect(t, a.DatabaseURL)
			if _, err := other.Exec(t.Context(), "SELECT pg_advisory_lock(7)"); err != nil {
				t.Fatal(err)
			}
			delivered := make(chan error, 1)
			var result string
			go func() {
				r, err := a.deliver(t.Context(), openPool(t, a.DatabaseURL+suffix), "1")
				result = string(r)
				delivered <- err
			}()
			testservers.Eventually(t, "the run waits for its key", func() bool {
				var waits bool
				err := other.QueryRow(t.Context(), `SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted
					AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))`).Scan(&waits)
				return err == nil && waits
			})
			if _, err := other.Exec(t.Context(), `INSERT INTO carpool.jobs_done (id, kind, queue, result) VALUES ('1', 'account:credit', 'default', '"earlier"')`); err != nil {
				t.Fatal(err)
			}
			_ = other.Close(t.Context())
			if err := <-delivered; err != nil || result != `"earlier"` {
				t.Errorf("result %s, error %v; want the earlier one's", result, err)
			}
			if drawn := a.drawn(t); drawn != 0 {
				t.Errorf("the statement ran %d times", drawn)
			}
		})
	}
}

func TestFirstDelivery_StatementThatFailsLeavesAFailedTransaction(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		sql  string
		args []any
		says string
	}{
		"a syntax error":                       {"UPDAT account SET balance = $1", []any{7}, "syntax error"},
		"a table that is missing":              {"INSERT INTO nowhere VALUES ($1)", []any{7}, "nowhere"},
		"an argument that can't be encoded":    {"UPDATE account SET balance = $1", []any{make(chan int)}, "chan int"},
		"an argument that is no number":        {"UPDATE account SET balance = $1", []any{"seven"}, "seven"},
		"named arguments that can't be":        {"UPDATE account SET balance = @amount", []any{pgx.StrictNamedArgs{"other": 7}}, "amount"},
		"a failure of the statement that runs": {"UPDATE account SET balance = balance / $1", []any{0}, "division by zero"},
	} {
		for mode, suffix := range modes {
			t.Run(name+", "+mode, func(t *testing.T) {
				t.Parallel()
				var first, second error
				a := openFirstAccount(t, func(ctx context.Context, tx pgx.Tx) error {
					_, first = tx.Exec(ctx, c.sql, c.args...)
					_, second = tx.Exec(ctx, "UPDATE account SET balance = $1", 9)
					return nil
				}, asItIs)
				_, err := a.deliver(t.Context(), openPool(t, a.DatabaseURL+suffix), "1")
				if err == nil || !strings.Contains(err.Error(), "went on after a statement") || errors.Is(err, once.ErrNotBegun) {
					t.Errorf("the handler went on, and the delivery's error is %v", err)
				}
				if first == nil || !strings.Contains(first.Error(), c.says) && mode == byDefault {
					t.Errorf("the first statement's error is %v, want %q in it", first, c.says)
				}
				if e, ok := errors.AsType[*pgconn.PgError](second); !ok || e.Code != pgerrcode.InFailedSQLTransaction {
					t.Errorf("the second statement's error is %v, want 25P02", second)
				}
				if balance := a.balance(t); balance != 0 {
					t.Errorf("the balance is %d", balance)
				}
			})
		}
	}
}

// swallowers are handlers that make something else of the error of their first statement.
var swallowers = map[string]func(context.Context, pgx.Tx) error{
	"returns another error": func(ctx context.Context, tx pgx.Tx) error {
		_, _ = tx.Exec(ctx, "UPDATE account SET balance = $1", 5)
		return errors.New("it didn't work")
	},
	"passes over it": func(ctx context.Context, tx pgx.Tx) error {
		_, _ = tx.Exec(ctx, "UPDATE account SET balance = $1", 5)
		return nil
	},
	"gives up for good": func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "UPDATE account SET balance = $1", 5)
		return tasks.Permanent(err)
	},
	"has a first statement that is wrong itself": func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "UPDAT account SET balance = $1", 5)
		return err
	},
	"makes no statement": func(context.Context, pgx.Tx) error { return nil },
	"panics for lack of a connection": func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Conn().Exec(ctx, "UPDATE account SET balance = $1", 5)
		return err
	},
	"wants large objects": func(ctx context.Context, tx pgx.Tx) error {
		objects := tx.LargeObjects()
		_, err := objects.Create(ctx, 0)
		return err
	},
}

func TestFirstDelivery_WhatKeepsItFromBeginningWinsOverWhatTheHandlerMakesOfIt(t *testing.T) {
	t.Parallel()
	for does, handler := range swallowers {
		t.Run("without a privilege, the handler "+does, func(t *testing.T) {
			t.Parallel()
			a := openFirstAccount(t, handler, asItIs)
			as, role := newRole(t, a.Kit)
			if _, err := a.DB.Exec(t.Context(), fmt.Sprintf("GRANT USAGE ON SCHEMA carpool TO %[1]s; GRANT ALL ON account TO %[1]s", role)); err != nil {
				t.Fatal(err)
			}
			db := openPool(t, as)
			if _, err := a.deliver(t.Context(), db, "1"); !errors.Is(err, once.ErrNotBegun) || errors.Is(err, asynq.SkipRetry) {
				t.Errorf("the error is %v, want that it has not begun", err)
			}
			if balance := a.balance(t); balance != 0 {
				t.Errorf("the balance is %d", balance)
			}
		})
		t.Run("with no connection, the handler "+does, func(t *testing.T) {
			t.Parallel()
			a := openFirstAccount(t, handler, asItIs)
			cfg := dbpool.DefaultConfig(a.DatabaseURL)
			cfg.Size, cfg.MaxOverflow, cfg.Timeout = 1, 0, time.Second
			db, err := dbpool.Open(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			busy, err := db.Acquire(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer busy.Release()
			if _, err := a.deliver(t.Context(), db, "1"); !errors.Is(err, once.ErrNotBegun) || errors.Is(err, asynq.SkipRetry) {
				t.Errorf("the error is %v, want that it has not begun", err)
			}
		})
		t.Run("with a session that is ended, the handler "+does, func(t *testing.T) {
			t.Parallel()
			a := openFirstAccount(t, handler, asItIs)
			other := connect(t, a.DatabaseURL)
			if _, err := other.Exec(t.Context(), "BEGIN; LOCK TABLE carpool.jobs_done"); err != nil {
				t.Fatal(err)
			}
			delivered := make(chan error, 1)
			db := openPool(t, a.DatabaseURL)
			go func() {
				_, err := a.deliver(t.Context(), db, "1")
				delivered <- err
			}()
			testservers.Eventually(t, "the look waits, and its session is ended", func() bool {
				var ended bool
				err := a.DB.QueryRow(t.Context(), `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
					WHERE datname = current_database() AND wait_event_type = 'Lock'`).Scan(&ended)
				return err == nil && ended
			})
			if err := <-delivered; !errors.Is(err, once.ErrNotBegun) || errors.Is(err, asynq.SkipRetry) {
				t.Errorf("the error is %v, want that it has not begun", err)
			}
		})
		t.Run("done already, the handler "+does, func(t *testing.T) {
			t.Parallel()
			a := openFirstAccount(t, handler, asItIs)
			if _, err := a.DB.Exec(t.Context(), `INSERT INTO carpool.jobs_done (id, kind, queue, result) VALUES ('1', 'account:credit', 'default', '"earlier"')`); err != nil {
				t.Fatal(err)
			}
			if result, err := a.deliver(t.Context(), a.DB, "1"); result != `"earlier"` || err != nil {
				t.Errorf("result %s, error %v; want the earlier one's", result, err)
			}
			if balance := a.balance(t); balance != 0 {
				t.Errorf("the balance is %d", balance)
			}
		})
	}
}

func openPool(t *testing.T, url string) *dbpool.Pool {
	t.Helper()
	db, err := dbpool.Open(t.Context(), dbpool.DefaultConfig(url))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// The record is looked for before a handler's own error counts: here it found the job done
// elsewhere, or met its own effect.
func TestFirstDelivery_FailureOfAJobThatIsDoneIsNone(t *testing.T) {
	t.Parallel()
	for name, handler := range map[string]func(context.Context, pgx.Tx) error{
		"before a statement": func(context.Context, pgx.Tx) error { return tasks.Permanent(errors.New("it was done elsewhere")) },
		"in a snapshot from before the record": func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Exec(ctx, "INSERT INTO once VALUES ($1)", 1)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := openFirstAccount(t, handler, asItIs)
			// In place of a look whose snapshot is too old: one that looks elsewhere.
			if _, err := a.DB.Exec(t.Context(), `CREATE TABLE once (n int PRIMARY KEY); INSERT INTO once VALUES (1);
				INSERT INTO carpool.jobs_done (id, kind, queue, result) VALUES ('1', 'account:credit', 'default', '"earlier"');
				CREATE OR REPLACE FUNCTION carpool.begin_run(id text, kind text) RETURNS text LANGUAGE sql AS 'SELECT pg_current_xact_id()::text'`); err != nil {
				t.Fatal(err)
			}
			if result, err := a.deliver(t.Context(), a.DB, "1"); result != `"earlier"` || err != nil {
				t.Errorf("result %s, error %v; want the earlier one's", result, err)
			}
		})
	}
}

func TestFirstDelivery_HandlerWithoutAStatementIsRecorded(t *testing.T) {
	t.Parallel()
	ran := 0
	a := openAccount(t, func(s *tasks.Set) {
		tasks.RegisterTx(s, func(context.Context, *tasks.Job, pgx.Tx, credit) (int, error) {
			ran++
			return ran, nil
		})
	})
	for i := range 3 {
		a.delivery = i + 1
		if result, err := a.deliver(t.Context(), a.DB, "1"); result != "1" || err != nil {
			t.Errorf("result %s, error %v; want the first one's", result, err)
		}
	}
	if ran != 1 {
		t.Errorf("the handler ran %d times", ran)
	}
}

func TestFirstDelivery_BatchIsTheCallersStill(t *testing.T) {
	t.Parallel()
	var b pgx.Batch
	var called []int64
	for i := range 3 {
		b.Queue("UPDATE account SET balance = balance + @amount", pgx.NamedArgs{"amount": i}).Exec(func(tag pgconn.CommandTag) error {
			called = append(called, int64(i)*tag.RowsAffected())
			return nil
		})
	}
	var tx pgx.Tx
	a := openFirstAccount(t, func(ctx context.Context, first pgx.Tx) error {
		results := first.SendBatch(ctx, &b)
		tx = results.Tx()
		return results.Close()
	}, asItIs)
	if _, err := a.deliver(t.Context(), a.DB, "1"); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(called) != "[0 1 2]" || tx != nil {
		t.Errorf("the callbacks had %v and a transaction %v, want each once, and none", called, tx)
	}
	if q := b.QueuedQueries[1]; b.Len() != 3 || !strings.Contains(q.SQL, "@amount") {
		t.Errorf("the caller's batch has %d queries, and the second is %q; want it as it was", b.Len(), q.SQL)
	}
}

// answerBound is how long the beginning of a transaction may go without an answer.
const answerBound = 10 * time.Second

func TestFirstDelivery_BeginningThatGetsNoAnswerIsBounded(t *testing.T) {
	t.Parallel()
	a := openFirstAccount(t, firstStatements["Exec"], asItIs)
	proxied, proxy := testservers.ThroughProxy(t, a.DatabaseURL)
	cfg := dbpool.DefaultConfig(proxied)
	cfg.PingIdle = time.Hour // it finds out by the statement
	db, err := dbpool.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	proxy.Blackhole()
	defer proxy.Heal()
	ctx, cancel := context.WithTimeout(t.Context(), 4*answerBound)
	defer cancel()
	_, err = a.deliver(ctx, db, "1")
	if !errors.Is(err, once.ErrNotBegun) || !errors.Is(err, tasks.ErrNoAnswer) || ctx.Err() != nil {
		t.Errorf("the error is %v, want that there was no answer, before the job's time is over", err)
	}
}

// A statement of the handler's that is broken off has been in the job's transaction, and is
// the job's failure like any other.
func TestFirstDelivery_FirstStatementThatIsBrokenOffIsTheHandlersOwnFailure(t *testing.T) {
	t.Parallel()
	for mode, suffix := range modes {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			a := openFirstAccount(t, func(ctx context.Context, tx pgx.Tx) error {
				ctx, cancel := context.WithTimeout(ctx, time.Second)
				defer cancel()
				_, err := tx.Exec(ctx, "UPDATE account SET balance = 5 FROM pg_sleep($1)", 20)
				return err
			}, asItIs)
			_, err := a.deliver(t.Context(), openPool(t, a.DatabaseURL+suffix), "1")
			if !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, once.ErrNotBegun) {
				t.Errorf("the error is %v, want the statement's own", err)
			}
		})
	}
}

// All that a handler without a statement sends is its COMMIT: without an answer to that, it
// may have been done.
func TestFirstDelivery_HandlerWithoutAStatementWhoseCommitGetsNoAnswerMayBeDone(t *testing.T) {
	t.Parallel()
	for mode, suffix := range modes {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			a := openFirstAccount(t, func(context.Context, pgx.Tx) error { return nil }, asItIs)
			proxied, proxy := testservers.ThroughProxy(t, a.DatabaseURL+suffix)
			db := openPool(t, proxied)
			if _, err := a.deliver(t.Context(), db, "0"); err != nil { // its statements are prepared
				t.Fatal(err)
			}
			proxy.DropAnswers()
			delivered := make(chan error)
			go func() {
				_, err := a.deliver(t.Context(), db, "1")
				delivered <- err
			}()
			testservers.Eventually(t, "the job is recorded", func() bool {
				var n int
				return a.DB.QueryRow(t.Context(), "SELECT count(*) FROM carpool.jobs_done WHERE id = '1'").Scan(&n) == nil && n == 1
			})
			proxy.Reset() // also if the answer comes only now
			proxy.Heal()
			if err := <-delivered; !errors.Is(err, tasks.ErrNoAnswer) || errors.Is(err, once.ErrNotBegun) {
				t.Errorf("the error is %v, want that there was no answer", err)
			}
		})
	}
}

// pgx has a statement prepared first, for which the server looks at its tables.
func TestFirstDelivery_FirstStatementMayWaitForALockToBePrepared(t *testing.T) {
	t.Parallel()
	a := openFirstAccount(t, firstStatements["Exec"], asItIs)
	holder, err := a.DB.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := holder.Exec(t.Context(), "LOCK TABLE account"); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(answerBound+2*time.Second, func() { _ = holder.Rollback(context.Background()) })
	if _, err := a.deliver(t.Context(), openPool(t, a.DatabaseURL), "1"); err != nil {
		t.Fatal(err)
	}
	if balance := a.balance(t); balance != 5 {
		t.Errorf("the balance is %d", balance)
	}
}

func TestFirstDelivery_BatchThatBeginsATransactionIsRefused(t *testing.T) {
	t.Parallel()
	a := openFirstAccount(t, func(ctx context.Context, tx pgx.Tx) error {
		var b pgx.Batch
		b.BeginTx(pgx.TxOptions{})
		b.Queue("UPDATE account SET balance = 5")
		return tx.SendBatch(ctx, &b).Close()
	}, asItIs)
	for range 2 {
		if _, err := a.deliver(t.Context(), a.DB, "1"); err == nil || !strings.Contains(err.Error(), "BeginTx") {
			t.Errorf("delivery %d: the error is %v, want what pgx says to it in a transaction", a.delivery, err)
		}
		a.delivery++
	}
}

// panics is an argument whose encoding panics.
type panics struct{}

func (panics) Value() (driver.Value, error) { panic("no") }

func TestFirstDelivery_PanicAmidTheFirstStatementGivesTheConnectionBack(t *testing.T) {
	t.Parallel()
	for name, first := range map[string]func(context.Context, pgx.Tx) error{
		"of an argument": func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Exec(ctx, "UPDATE account SET balance = $1", panics{})
			return err
		},
		"of a batch's callback": func(ctx context.Context, tx pgx.Tx) error {
			var b pgx.Batch
			b.Queue("UPDATE account SET balance = 5").Exec(func(pgconn.CommandTag) error { panic("no") })
			return tx.SendBatch(ctx, &b).Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := openFirstAccount(t, first, asItIs)
			func() {
				defer func() {
					if recover() == nil {
						t.Error("the panic does not come through")
					}
				}()
				_, _ = a.deliver(t.Context(), a.DB, "1")
			}()
			if s := a.DB.Stats(); s.CheckedOut != 0 || a.balance(t) != 0 {
				t.Errorf("%d connections are out, the balance is %d", s.CheckedOut, a.balance(t))
			}
		})
	}
}

func TestFirstDelivery_ConnectionIsThereAfterAStatementThatCouldNotBeSent(t *testing.T) {
	t.Parallel()
	a := openFirstAccount(t, func(ctx context.Context, tx pgx.Tx) error {
		_, _ = tx.Exec(ctx, "UPDATE account SET balance = $1", make(chan int))
		_, err := tx.Conn().Exec(ctx, "UPDATE account SET balance = $1", 7)
		return err
	}, asItIs)
	if _, err := a.deliver(t.Context(), a.DB, "1"); err == nil || !strings.Contains(err.Error(), "went on after a statement") {
		t.Errorf("the error is %v, want that the handler went on after a failure", err)
	}
	if balance := a.balance(t); balance != 0 {
		t.Errorf("the balance is %d", balance)
	}
}

func TestFirstDelivery_PanicOfAJobThatIsDoneIsNone(t *testing.T) {
	t.Parallel()
	a := openFirstAccount(t, func(context.Context, pgx.Tx) error { panic("it was done elsewhere") }, asItIs)
	if _, err := a.DB.Exec(t.Context(), `INSERT INTO carpool.jobs_done (id, kind, queue, result) VALUES ('1', 'account:credit', 'default', '"earlier"')`); err != nil {
		t.Fatal(err)
	}
	if result, err := a.deliver(t.Context(), a.DB, "1"); result != `"earlier"` || err != nil {
		t.Errorf("result %s, error %v; want the earlier one's", result, err)
	}
}

// That a connection broke under a job tells an outage from the job's failure.
func TestFirstDelivery_JobIsChargedWithItsConnectionWhateverTheStatementsContext(t *testing.T) {
	t.Parallel()
	a := openFirstAccount(t, func(_ context.Context, tx pgx.Tx) error {
		return firstStatements["Exec"](context.Background(), tx)
	}, asItIs)
	ctx, borrower := a.DB.Track(t.Context(), "job")
	if _, err := a.deliver(ctx, a.DB, "1"); err != nil {
		t.Fatal(err)
	}
	if usage := borrower.End(); usage.Acquires != 1 {
		t.Errorf("the job is charged with %d connections, want its transaction's", usage.Acquires)
	}
}

// What a batch can't have is looked for behind what rewrites the statement too.
func TestFirstDelivery_StatementWithNamedArgumentsMayHaveAMode(t *testing.T) {
	t.Parallel()
	a := openFirstAccount(t, func(ctx context.Context, tx pgx.Tx) error {
		// Only the simple protocol takes two statements.
		_, err := tx.Exec(ctx, "SELECT nextval('drawn'); UPDATE account SET balance = balance + @amount",
			pgx.NamedArgs{"amount": 5}, pgx.QueryExecModeSimpleProtocol)
		return err
	}, asItIs)
	db := openPool(t, a.DatabaseURL+"&default_query_exec_mode=exec")
	if _, err := a.deliver(t.Context(), db, "1"); err != nil {
		t.Fatal(err)
	}
	if balance := a.balance(t); balance != 5 {
		t.Errorf("the balance is %d", balance)
	}
}

func TestFirstDelivery_BytesThatAreNoTextFailTheStatement(t *testing.T) {
	t.Parallel()
	for mode, suffix := range modes {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			a := openFirstAccount(t, func(ctx context.Context, tx pgx.Tx) error {
				return tx.QueryRow(ctx, "SELECT length($1)", "\xff").Scan(new(int))
			}, asItIs)
			_, err := a.deliver(t.Context(), openPool(t, a.DatabaseURL+suffix), "1")
			if e, ok := errors.AsType[*pgconn.PgError](err); !ok || e.Code != pgerrcode.CharacterNotInRepertoire || errors.Is(err, once.ErrNotBegun) {
				t.Errorf("the error is %v, want the statement's own", err)
			}
		})
	}
}
