// Package testservers gives tests real servers: one Postgres and one Redis for each package's tests, started when a test
// first asks, and in them a database and a key space for each test.
//
// A package that uses it has this in one of its test files:
//
//	func TestMain(m *testing.M) { testservers.Main(m) }
package testservers

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
	"go.uber.org/goleak"

	"github.com/carpool-go/carpool/internal/servers"
)

// shared holds the servers of this test program. It is package-level because a test has no other way to reach what TestMain
// made.
var shared pair

// pair is the two servers of a test program.
type pair struct {
	mu        sync.Mutex
	running   bool // between the start and the end of Main
	postgres  *servers.Postgres
	redis     *servers.Redis
	databases int   // how many Postgres databases were made
	keySpaces []int // Redis databases that are free again
	used      int   // how many Redis databases were handed out for the first time
}

// giveUpAfter bounds the start of a server. It is generous: the machine may be busy with other packages' tests.
const giveUpAfter = 2 * time.Minute

// Main is to be called by TestMain. It runs the package's tests, stops the servers they started, fails if a goroutine is
// left, calls then, and exits.
func Main(m *testing.M, then ...func()) {
	code := shared.main(m.Run)
	for _, f := range then {
		f()
	}
	os.Exit(code)
}

// RunMoreAtOnce has four times as many parallel tests run as there are processors, unless -parallel says otherwise. It is
// for TestMain of packages whose tests wait, for leases and timeouts and processes, more than they compute.
func RunMoreAtOnce() {
	if err := flag.Set("test.parallel", strconv.Itoa(4*runtime.GOMAXPROCS(0))); err != nil {
		panic(err)
	}
}

func (p *pair) main(tests func() int) int {
	p.mu.Lock()
	p.running = true
	p.mu.Unlock()
	code := tests()
	if err := p.stop(); err != nil {
		fmt.Fprintln(os.Stderr, "testservers:", err)
		code = max(code, 1)
	}
	if code == 0 {
		// go-redis goes on dialling for some seconds after its pool was closed.
		err := goleak.Find()
		for end := time.Now().Add(10 * time.Second); err != nil && time.Now().Before(end); {
			err = goleak.Find()
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "testservers: the tests passed, but left goroutines behind:", err)
			code = 1
		}
	}
	return code
}

func (p *pair) stop() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.running = false
	var errs []error
	if p.postgres != nil {
		errs = append(errs, p.postgres.Stop())
	}
	if p.redis != nil {
		errs = append(errs, p.redis.Stop())
	}
	p.postgres, p.redis = nil, nil
	return errors.Join(errs...)
}

// Postgres returns the URL of a fresh, empty database, dropped when the test ends whoever still uses it. Tests must not
// break its server, which others use: for that they start their own with servers.StartPostgres.
func Postgres(t testing.TB) string {
	t.Helper()
	url, name := shared.createDatabase(t)
	t.Cleanup(func() { shared.dropDatabase(t, name) })
	return url
}

func (p *pair) createDatabase(t testing.TB) (url, name string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), giveUpAfter)
	defer cancel()
	server := p.startPostgres(ctx, t)
	p.mu.Lock()
	p.databases++
	name = fmt.Sprintf("test_%d", p.databases)
	p.mu.Unlock()
	url, err := server.Database(ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	return url, name
}

func (p *pair) startPostgres(ctx context.Context, t testing.TB) *servers.Postgres {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mustRun(t)
	if p.postgres == nil {
		pg, err := servers.StartPostgres(ctx, servers.PostgresConfig{Settings: map[string]string{"max_connections": "500", "max_prepared_transactions": "20"}})
		if err != nil {
			t.Fatalf("%v\n(in a clone of carpool, ./scripts/test.sh installs what is missing)", err)
		}
		p.postgres = pg
	}
	return p.postgres
}

func (p *pair) dropDatabase(t testing.TB, name string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), giveUpAfter)
	defer cancel()
	conn, err := pgx.Connect(ctx, p.startPostgres(ctx, t).URL())
	if err != nil {
		t.Errorf("drop the test's database: %v", err)
		return
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, "DROP DATABASE "+pgx.Identifier{name}.Sanitize()+" WITH (FORCE)"); err != nil {
		t.Errorf("drop the test's database: %v", err)
	}
}

// Redis returns the URL of an empty key space, a logical database of its own, emptied when the test ends. Pub/Sub channels
// are common to all of them. Tests must not break its server, which others use: for that they start their own with
// servers.StartRedis.
func Redis(t testing.TB) string {
	t.Helper()
	url, n := shared.takeKeySpace(t)
	t.Cleanup(func() { shared.returnKeySpace(t, url, n) })
	return url
}

func (p *pair) takeKeySpace(t testing.TB) (url string, n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), giveUpAfter)
	defer cancel()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mustRun(t)
	if p.redis == nil {
		r, err := servers.StartRedis(ctx, servers.RedisConfig{})
		if err != nil {
			t.Fatalf("%v\n(in a clone of carpool, ./scripts/test.sh installs what is missing)", err)
		}
		p.redis = r
	}
	if last := len(p.keySpaces) - 1; last >= 0 {
		n, p.keySpaces = p.keySpaces[last], p.keySpaces[:last]
	} else if p.used < servers.RedisDatabases {
		n, p.used = p.used, p.used+1
	} else {
		t.Fatalf("testservers: all %d key spaces are in use at once", servers.RedisDatabases)
	}
	return p.redis.DatabaseURL(n), n
}

func (p *pair) returnKeySpace(t testing.TB, url string, n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), giveUpAfter)
	defer cancel()
	options, err := redis.ParseURL(url)
	if err != nil {
		t.Errorf("empty the test's key space: %v", err)
		return
	}
	client := redis.NewClient(options)
	defer client.Close()
	if err := client.FlushDB(ctx).Err(); err != nil {
		t.Errorf("empty the test's key space: %v", err)
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.keySpaces = append(p.keySpaces, n)
}

// mustRun refuses to start a server that nobody would stop.
func (p *pair) mustRun(t testing.TB) {
	t.Helper()
	if !p.running {
		t.Fatal("testservers: the package's TestMain does not call testservers.Main")
	}
}
