package startup

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/sentinel"
)

const (
	postgresURL = "postgres://shop:hush@db.example/orders"
	severalURL  = "postgres://shop:hush@db.example,standby.example/orders"
	redisURL    = "rediss://:hush@queue.example/1"
	sentinelURL = "redis-sentinel://:hush@one.example,two.example:26380?master=m"
)

// reply is an error that Redis has answered with.
type reply string

func (r reply) Error() string { return string(r) }
func (reply) RedisError()     {}

func TestExplain_SaysWhatIsWrongWithTheServerAndTheWayOut(t *testing.T) {
	t.Parallel()
	sentinels := func(errs ...error) error {
		return fmt.Errorf("asked: %w", &sentinel.Error{Addrs: []string{"one.example:26379", "two.example:26380"}, Master: "m", Errs: errs})
	}
	for _, c := range []struct {
		url  string
		err  error
		want string
	}{
		{redisURL, io.EOF, "X: Redis at queue.example:6379 cannot be reached: EOF"},
		{redisURL, reply("READONLY You can't write against a read only replica."), "X: Redis at queue.example:6379 can't serve now: READONLY You can't write against a read only replica."},
		{redisURL, reply("NOPERM this user has no permissions"), "X: the server forbids this user a command: NOPERM this user has no permissions; its ACL must allow all commands that a queue needs: ACL SETUSER … +@all ~* &*"},
		{"redis://[::1]", io.EOF, "X: Redis at [::1]:6379 cannot be reached: EOF"},
		{sentinelURL, sentinels(io.EOF, io.EOF), "X: Redis cannot be reached by the Sentinels at one.example:26379, two.example:26380: EOF; one of them must run and be reachable from here"},
		{sentinelURL, io.EOF, "X: Redis cannot be reached at the master that the Sentinels at one.example:26379, two.example:26380 name: EOF"},
		{sentinelURL, sentinels(redis.Nil, redis.Nil), "X: the Sentinels at one.example:26379, two.example:26380 know no master \"m\"; the URL's ?master= must be the name in their configuration"},
		{sentinelURL, sentinels(reply("WRONGPASS invalid username-password pair"), io.EOF), "X: the server refuses this user or password: WRONGPASS invalid username-password pair"},
		{
			postgresURL, &pgconn.PgError{Severity: "FATAL", Code: "28000", Message: `role "shop" does not exist`, Routine: "InitializeSessionUserId"},
			`X: the server refuses this user or password: FATAL: role "shop" does not exist (SQLSTATE 28000); createuser shop makes the role; ALTER ROLE "shop" LOGIN lets one in that there is`,
		},
		{
			postgresURL, fmt.Errorf("outer words: %w", &pgconn.PgError{Severity: "FATAL", Code: "08P01", Message: "unsupported startup parameter: foo"}),
			"X: the server doesn't take a parameter of the URL: FATAL: unsupported startup parameter: foo (SQLSTATE 08P01); take it out of the URL",
		},
	} {
		got, ok := Explain("X", c.url, c.err)
		if !ok || got.Error() != c.want || !errors.Is(got, c.err) {
			t.Errorf("got  %v\nwant %s", got, c.want)
		}
	}
}

// A certificate that is wrong ends the program only if no other server may be found to be right
// by waiting.
func TestFaultOf_CertificateIsForGoodWhereNoOtherServerMayServe(t *testing.T) {
	t.Parallel()
	wrong := x509.CertificateInvalidError{Reason: x509.Expired}
	sentinels := func(errs ...error) error {
		return &sentinel.Error{Addrs: []string{"one", "two"}, Master: "m", Errs: errs}
	}
	for name, c := range map[string]struct {
		url     string
		err     error
		forGood bool
	}{
		"all Sentinels'":               {sentinelURL, sentinels(wrong, wrong), true},
		"one Sentinel's, another away": {sentinelURL, sentinels(wrong, io.EOF), false},
		"the only Postgres'":           {postgresURL, connectError(t, postgresURL, wrong), true},
		"one of two Postgres'":         {severalURL, connectError(t, severalURL, wrong), false},
	} {
		f := faultOf(c.url, c.err)
		if forGood := f != nil && f.forGood; forGood != c.forGood {
			t.Errorf("%s: %+v; want it for good: %t", name, f, c.forGood)
		}
	}
}

// connectError is what pgx makes of an attempt to connect that fails with err.
func connectError(t *testing.T, url string, err error) error {
	t.Helper()
	cfg, parseErr := pgx.ParseConfig(url)
	if parseErr != nil {
		t.Fatal(parseErr)
	}
	cfg.LookupFunc = func(context.Context, string) ([]string, error) { return []string{"192.0.2.1"}, nil }
	cfg.DialFunc = func(context.Context, string, string) (net.Conn, error) { return nil, err }
	_, err = pgx.ConnectConfig(t.Context(), cfg)
	return err
}

func TestExplain_LeavesWhatSaysNothingOfTheServer(t *testing.T) {
	t.Parallel()
	for url, errs := range map[string][]error{
		redisURL:    {nil, redis.Nil, reply("WRONGTYPE Operation against a key"), reply("NOT FOUND")},
		postgresURL: {nil, io.EOF, &pgconn.PgError{Code: "23505"}, &pgconn.PgError{Code: "42704"}},
	} {
		for _, err := range errs {
			if got, ok := Explain("X", url, err); ok || got != err { //nolint:errorlint // the very same
				t.Errorf("%v becomes %v", err, got)
			}
		}
	}
}

func TestExplain_AnExplainedErrorStaysAsItIs(t *testing.T) {
	t.Parallel()
	first, _ := Explain("REDIS_URL", redisURL, io.EOF)
	if again, ok := Explain("DATABASE_URL", postgresURL, fmt.Errorf("worker: %w", first)); !ok || again.Error() != first.Error() {
		t.Errorf("it becomes %v", again)
	}
}

func TestOneLine_LeavesOutWhatSaysTheSame(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"failed to connect to `user=u database=d`:\n\t127.0.0.1:1 (localhost): refused\n\t127.0.0.1:1 (localhost): refused\n\t[::1]:1 (localhost): refused": "failed to connect to `user=u database=d`: 127.0.0.1:1 (localhost): refused; [::1]:1 (localhost): refused",
		"failed:\n\t127.0.0.1:1 (h): tls error: server refused TLS connection\n\t127.0.0.1:1 (h): server error: FATAL: no":                                  "failed: 127.0.0.1:1 (h): server error: FATAL: no",
		"127.0.0.1:1 (h): tls error: server refused TLS connection":                                                                                         "127.0.0.1:1 (h): tls error: server refused TLS connection",
		"plain": "plain",
	} {
		if got := oneLine(text); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}
