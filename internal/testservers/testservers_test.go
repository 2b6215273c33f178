package testservers

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
)

func TestMain(m *testing.M) { Main(m) }

func TestPostgres_EachHasAnEmptyDatabaseOfItsOwn(t *testing.T) {
	t.Parallel()
	for range 3 {
		conn, err := pgx.Connect(t.Context(), Postgres(t))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(t.Context())
		if _, err := conn.Exec(t.Context(), "CREATE TABLE mine (id int)"); err != nil {
			t.Fatal(err)
		}
	}
}

func TestPostgres_TheDatabaseIsDroppedThoughSomebodyStillUsesIt(t *testing.T) {
	t.Parallel()
	var inUse string
	t.Run("test", func(t *testing.T) {
		inUse = Postgres(t)
		conn, err := pgx.Connect(t.Context(), inUse)
		if err != nil {
			t.Fatal(err)
		}
		_ = conn // never closed
	})
	conn, err := pgx.Connect(t.Context(), inUse)
	if err == nil || !strings.Contains(err.Error(), "does not exist") {
		t.Errorf("connect: %v, %v; want no such database", conn, err)
	}
}

func TestRedis_EachHasAnEmptyKeySpaceOfItsOwn(t *testing.T) {
	t.Parallel()
	for range 3 {
		t.Run("", func(t *testing.T) {
			first, second := redisClient(t, Redis(t)), redisClient(t, Redis(t))
			if err := first.Set(t.Context(), "key", "value", 0).Err(); err != nil {
				t.Fatal(err)
			}
			if err := second.Get(t.Context(), "key").Err(); !errors.Is(err, redis.Nil) {
				t.Errorf("the other key space: %v, want nothing in it", err)
			}
		})
	}
}

func redisClient(t *testing.T, url string) *redis.Client {
	t.Helper()
	options, err := redis.ParseURL(url)
	if err != nil {
		t.Fatal(err)
	}
	client := redis.NewClient(options)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// scenarioEnv makes TestScenario do something, in a test program of its own.
const scenarioEnv = "CARPOOL_TESTSERVERS_SCENARIO"

// TestScenario is what the test programs of TestMain_… run.
func TestScenario(t *testing.T) {
	switch os.Getenv(scenarioEnv) {
	case "asks for no server":
		if shared.postgres != nil || shared.redis != nil {
			t.Error("a server runs that nobody asked for")
		}
	case "asks for both":
		fmt.Println("server", Postgres(t))
		fmt.Println("server", Redis(t))
	case "fails":
		fmt.Println("server", Postgres(t))
		fmt.Println("server", Redis(t))
		t.Error("as it was told")
	case "panics":
		fmt.Println("server", Postgres(t))
		fmt.Println("server", Redis(t))
		go panic("as it was told")
		select {}
	case "leaves a goroutine":
		go func() { select {} }()
	case "asks for Redis":
		Redis(t)
	case "without Main":
		(&pair{}).takeKeySpace(t)
	}
}

func TestMain_ExitsAsTheTestsDidAndLeavesNoServer(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		scenario string
		servers  int
		fails    bool
		says     string
	}{
		{"asks for no server", 0, false, "PASS"},
		{"asks for both", 2, false, "PASS"},
		{"fails", 2, true, "as it was told"},
		{"panics", 2, true, "as it was told"},
		{"leaves a goroutine", 0, true, "left goroutines behind"},
		{"without Main", 0, true, "does not call testservers.Main"},
	} {
		t.Run(tc.scenario, func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command(os.Args[0], "-test.run=^TestScenario$", "-test.v")
			cmd.Env = append(os.Environ(), scenarioEnv+"="+tc.scenario)
			out, err := cmd.CombinedOutput()
			if (err != nil) != tc.fails {
				t.Errorf("it ended with %v", err)
			}
			if !bytes.Contains(out, []byte(tc.says)) {
				t.Errorf("it does not say %q", tc.says)
			}
			servers := 0
			for line := range strings.Lines(string(out)) {
				if address, ok := strings.CutPrefix(strings.TrimSpace(line), "server "); ok {
					servers++
					waitUntilNobodyListens(t, address)
				}
			}
			if servers != tc.servers {
				t.Errorf("%d servers, want %d", servers, tc.servers)
			}
			if t.Failed() {
				t.Logf("%s", out)
			}
		})
	}
}

func waitUntilNobodyListens(t *testing.T, address string) {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(giveUp); ; time.Sleep(10 * time.Millisecond) {
		conn, err := net.Dial("tcp", u.Host)
		if errors.Is(err, syscall.ECONNREFUSED) {
			return
		}
		if err == nil {
			_ = conn.Close()
		}
		if time.Now().After(deadline) {
			t.Fatalf("somebody still listens on %s", u.Host)
		}
	}
}

// The advice fits a clone of carpool, and a repository whose tasks are tested with taskstest.
func TestRedis_SaysWhatToInstallWhereThereIsNone(t *testing.T) {
	t.Parallel()
	cmd := exec.Command(os.Args[0], "-test.run=^TestScenario$")
	cmd.Env = append(os.Environ(), scenarioEnv+"=asks for Redis", "PATH="+t.TempDir())
	out, err := cmd.CombinedOutput()
	if err == nil {
		t.Error("the test passes without a Redis")
	}
	for _, want := range []string{"apt-get install redis-server", "brew install redis", "in a clone of carpool, ./scripts/test.sh"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("it does not say %q:\n%s", want, out)
		}
	}
}
