package doctor

import (
	"context"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/carpool-go/carpool/internal/servers"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

func TestExamine_FindsARedisThatIsSetWrong(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "redis")
	redisURL, rdb := startRedis(t, servers.RedisConfig{Dir: dir})
	c := redisOnly(t, redisURL)
	t.Run("no persistence", func(t *testing.T) {
		require(t, examine(t, c), "redis persistence", Warning, "neither a journal (appendonly) nor a snapshot", "appendonly yes")
	})
	t.Run("snapshots only", func(t *testing.T) {
		if err := rdb.ConfigSet(t.Context(), "save", "3600 1").Err(); err != nil {
			t.Fatal(err)
		}
		require(t, examine(t, c), "redis persistence", Warning, "since the last snapshot (save 3600 1)", "persistenceMode: journal-snapshot")
	})
	t.Run("a journal that is not synced", func(t *testing.T) {
		do(t, rdb, "CONFIG SET appendonly yes", "CONFIG SET appendfsync no")
		require(t, examine(t, c), "redis persistence", Warning, "appendfsync is no", "appendfsync everysec")
		do(t, rdb, "CONFIG SET appendfsync everysec")
		requireOK(t, examine(t, c), "redis persistence")
	})
	t.Run("eviction", func(t *testing.T) {
		for _, policy := range []string{"allkeys-lru", "volatile-ttl"} {
			do(t, rdb, "CONFIG SET maxmemory-policy "+policy)
			require(t, examine(t, c), "redis eviction", Failure, "maxmemory-policy is "+policy, "CONFIG SET maxmemory-policy noeviction")
		}
		do(t, rdb, "CONFIG SET maxmemory-policy noeviction")
		requireOK(t, examine(t, c), "redis eviction")
	})
	t.Run("memory", func(t *testing.T) {
		info, err := readInfo(t.Context(), rdb, "memory")
		if err != nil {
			t.Fatal(err)
		}
		used := number(info, "used_memory")
		for share, result := range map[int64]Result{100: Failure, 114: Warning} {
			do(t, rdb, "CONFIG SET maxmemory "+strconv.FormatInt(used*share/100, 10))
			require(t, examine(t, c), "redis memory", result, " are left", "raise maxmemory")
		}
		do(t, rdb, "CONFIG SET maxmemory "+strconv.FormatInt(used*10, 10))
		requireOK(t, examine(t, c), "redis memory")
	})
	t.Run("connections", func(t *testing.T) {
		do(t, rdb, "CONFIG SET maxclients 20")
		require(t, examine(t, c), "redis connections", Warning, " of 20 are open", "raise maxclients")
		do(t, rdb, "CONFIG SET maxclients 1000")
		requireOK(t, examine(t, c), "redis connections")
	})
	t.Run("a replica", func(t *testing.T) {
		do(t, rdb, "REPLICAOF 127.0.0.1 1")
		require(t, examine(t, c), "redis role", Failure, "the server is a replica", "redis-sentinel://")
		do(t, rdb, "REPLICAOF NO ONE")
		requireOK(t, examine(t, c), "redis role")
	})
	t.Run("a disk that can't be written", func(t *testing.T) {
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		do(t, rdb, "BGSAVE")
		testservers.Eventually(t, "the snapshot fails", func() bool {
			info, err := readInfo(t.Context(), rdb, "persistence")
			return err == nil && info["rdb_last_bgsave_status"] == "err"
		})
		require(t, examine(t, c), "redis", Failure, "can't serve now: MISCONF", "")
		do(t, rdb, "CONFIG SET stop-writes-on-bgsave-error no")
		require(t, examine(t, c), "redis persistence", Warning, "the last snapshot failed", "its disk")
	})
}

// user makes a user of the shared Redis with these rules, and returns the URL for it.
func user(t *testing.T, rawURL, name, rules string) string {
	t.Helper()
	rdb, u := workertest.OpenRedis(t, rawURL), testservers.ParseURL(t, rawURL)
	name += "-of-" + strings.Trim(u.Path, "/") // users are the server's, not the database's
	do(t, rdb, "ACL SETUSER "+name+" on >hush "+rules)
	t.Cleanup(func() {
		if err := rdb.ACLDelUser(context.Background(), name).Err(); err != nil {
			t.Error(err)
		}
	})
	u.User = url.UserPassword(name, "hush")
	return u.String()
}

// ofDocs are the rules of docs/security.md for the user of a worker.
func ofDocs(t *testing.T) string {
	t.Helper()
	docs, err := os.ReadFile("../../../docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^ACL SETUSER worker on >PASSWORD (.*)$`).FindSubmatch(docs)
	if m == nil {
		t.Fatal("docs/security.md has no user worker")
	}
	return string(m[1])
}

func TestExamine_NamesWhatARedisUserMayNotDoAndTheRuleThatLetsIt(t *testing.T) {
	t.Parallel()
	redisURL, rules := testservers.Redis(t), ofDocs(t)
	for name, c := range map[string]struct{ without, check, says, wayOut string }{
		"a-command":  {"-zadd", "redis rights", "may not use what workers and commands need: zadd", " +zadd"},
		"scripts":    {"-eval", "redis rights", "need: eval", " +eval"},
		"carpools":   {"resetkeys ~asynq:*", "redis rights", "need: keys like carpool:*", " ~carpool:*"},
		"asynqs":     {"resetkeys ~carpool:*", "redis rights", "need: keys like asynq:*", " ~asynq:*"},
		"readonly":   {"resetkeys %R~asynq:* ~carpool:*", "redis rights", "need: keys like asynq:*", " ~asynq:*"},
		"a-channel":  {"resetchannels", "redis rights", "need: the channel asynq:cancel", " &asynq:cancel"},
		"everything": {"-@all +@connection", "redis rights", "", " +multi +discard"},
		"looking":    {"-info", "redis", "maxmemory-policy, memory, persistence, role and connections could not be looked at: NOPERM", " +info"},
		"the-time":   {"-time", "clocks", "it could not be looked at: the clock of Redis: NOPERM", " +time"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			findings := examine(t, redisOnly(t, user(t, redisURL, name, rules+" "+c.without)))
			result := Warning
			if c.check == "redis rights" && name != "everything" {
				result = Failure
			}
			f := require(t, findings, c.check, result, c.says, c.wayOut)
			if strings.HasPrefix(c.without, "resetkeys ~") {
				require(t, findings, "workers", Warning, "it could not be looked at: ", "the rule that redis rights names")
			}
			if result == Failure && !strings.HasSuffix(f.Says, c.says) {
				t.Errorf("it says more than %q: %+v", c.says, f)
			}
			if !strings.HasPrefix(f.WayOut, "ACL SETUSER "+name+"-of-") {
				t.Errorf("the way out is %q", f.WayOut)
			}
		})
	}
	t.Run("nothing", func(t *testing.T) {
		t.Parallel()
		rdb := workertest.OpenRedis(t, redisURL)
		findings := examine(t, redisOnly(t, user(t, redisURL, "docs", rules)))
		requireOK(t, findings, "redis", "redis rights", "redis eviction", "redis memory", "redis role", "redis connections", "clocks")
		if keys, err := rdb.Keys(t.Context(), "*").Result(); err != nil || len(keys) > 0 {
			t.Errorf("it has left %q in Redis: %v", keys, err)
		}
	})
}

func TestProbes_HaveEveryCommandOfCarpoolsScripts(t *testing.T) {
	t.Parallel()
	probed := make(map[string]bool)
	for _, probe := range probes("default") {
		probed[probe[0].(string)] = true
	}
	call := regexp.MustCompile(`redis\.p?call\(["'](\w+)["']`)
	found := 0
	for _, root := range []string{"../../../internal", "../../../worker", "../../../tasks", "../../../admin", "../../../scheduler"} {
		err := filepath.WalkDir(root, func(path string, entry os.DirEntry, err error) error {
			if err != nil || entry.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") || strings.Contains(path, "wiretest") {
				return err
			}
			source, err := os.ReadFile(path)
			for _, m := range call.FindAllSubmatch(source, -1) {
				found++
				if command := strings.ToLower(string(m[1])); !probed[command] {
					t.Errorf("%s calls %s, which probes don't have", path, command)
				}
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if found < 50 {
		t.Errorf("found only %d calls", found)
	}
}

func TestAllow_NamesTheUserOfTheURLAndNeverThePassword(t *testing.T) {
	t.Parallel()
	for rawURL, want := range map[string]string{
		"redis://127.0.0.1:6379/0":                                 "default",
		"redis://:hush@127.0.0.1":                                  "default",
		"rediss://a%40b:hush@example.com":                          "a@b",
		"redis-sentinel://worker:hush@one,two:26380/0?master=main": "worker",
	} {
		e := &examination{Config: Config{RedisURL: rawURL}}
		if got := e.allow("+time", "+info"); got != "ACL SETUSER "+want+" +time +info" {
			t.Errorf("%s: %q", rawURL, got)
		}
	}
}

func TestTooOld_IsARedisWithoutBLMOVE(t *testing.T) {
	t.Parallel()
	for version, want := range map[string]bool{"5.0.14": true, "6.0.16": true, "6.2.0": false, "7.2.4": false, "10.0.1": false, "": false, "next": false} {
		if tooOld(version) != want {
			t.Errorf("%q: %v", version, !want)
		}
	}
	names := []string{redisName(map[string]string{"redis_version": "7.2.4", "valkey_version": "8.1.0"}), redisName(map[string]string{"redis_version": "7.0.15"})}
	if !slices.Equal(names, []string{"Valkey 8.1.0", "Redis 7.0.15"}) {
		t.Errorf("%q", names)
	}
}
