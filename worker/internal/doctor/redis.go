package doctor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/instance"
	"github.com/carpool-go/carpool/internal/unique"
	"github.com/carpool-go/carpool/tasks"
)

// CheckScripts asks Redis for what a worker can't do without: scripts, with asynq's keys and
// with carpool's. A user whose ACL forbids them would fetch no job, and say so again and
// again. The error is Redis'.
func CheckScripts(ctx context.Context, rdb redis.UniversalClient) error {
	for _, key := range []string{asynqwire.Queues, instance.Names} {
		if err := rdb.Eval(ctx, `return redis.call("EXISTS", KEYS[1])`, []string{key}).Err(); err != nil {
			return err
		}
	}
	return nil
}

// NoEviction is the maxmemory-policy of a Redis that keeps every key, and so every job.
const NoEviction = "noeviction"

// EvictionPolicy returns the maxmemory-policy of Redis, "" if Redis doesn't say. The error is
// Redis'; not every hosted one shows it, nor to every user.
func EvictionPolicy(ctx context.Context, rdb redis.UniversalClient) (string, error) {
	info, err := readInfo(ctx, rdb, "memory")
	return info["maxmemory_policy"], err
}

// readInfo returns the fields of a section of INFO.
func readInfo(ctx context.Context, rdb redis.UniversalClient, section string) (map[string]string, error) {
	text, err := rdb.Info(ctx, section).Result()
	if err != nil {
		return nil, err
	}
	fields := make(map[string]string)
	for line := range strings.Lines(text) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), ":"); ok {
			fields[name] = value
		}
	}
	return fields, nil
}

func number(info map[string]string, field string) int64 {
	n, _ := strconv.ParseInt(info[field], 10, 64)
	return n
}

// redisLook is what the checks of Redis leave for the others.
type redisLook struct {
	client redis.UniversalClient // nil unless Redis answers
	dialed *dialed
	clock  *clock
}

func (l *redisLook) close() {
	if l.client != nil {
		_ = l.client.Close()
	}
}

// dialed is a hook that remembers the latest connection, and has no command wait for longer
// than the examination takes: asynq has none end with a context.
type dialed struct {
	until time.Time

	mu   sync.Mutex
	conn net.Conn
}

// DialHook implements [redis.Hook].
func (d *dialed) DialHook(next redis.DialHook) redis.DialHook {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		ctx, cancel := context.WithDeadline(ctx, d.until)
		defer cancel()
		conn, err := next(ctx, network, addr)
		if err == nil {
			d.mu.Lock()
			d.conn = conn
			d.mu.Unlock()
		}
		return conn, err
	}
}

// ProcessHook implements [redis.Hook].
func (d *dialed) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		ctx, cancel := context.WithDeadline(ctx, d.until)
		defer cancel()
		return next(ctx, cmd)
	}
}

// ProcessPipelineHook implements [redis.Hook].
func (d *dialed) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		ctx, cancel := context.WithDeadline(ctx, d.until)
		defer cancel()
		return next(ctx, cmds)
	}
}

// checkRedis examines the server of REDIS_URL.
func (e *examination) checkRedis(ctx context.Context) []Finding {
	if e.RedisURL == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, serverTimeout)
	defer cancel()
	r := &report{check: "redis"}
	rdb, err := tasks.OpenRedis(e.RedisURL)
	if err != nil {
		r.fail("", "REDIS_URL: %v", err)
		return r.findings
	}
	look := &e.redis
	look.dialed = &dialed{until: time.Now().Add(serverTimeout + jobsTimeout)}
	rdb.AddHook(look.dialed)
	took, err := pingRedis(ctx, rdb)
	if err != nil {
		_ = rdb.Close()
		r.fail("", "%s", explain("REDIS_URL", e.RedisURL, err))
		return r.findings
	}
	look.client = rdb
	server, infoErr := readInfo(ctx, rdb, "server")
	r.roundTrip(took)
	if infoErr != nil {
		r.warn(e.allow("+info"), "its version, maxmemory-policy, memory, persistence, role and connections could not be looked at: %v", infoErr)
	}
	name := redisName(server)
	if tooOld(server["redis_version"]) {
		r.fail("use Redis 7 or Valkey 8", "%s lacks BLMOVE, with which workers wait for jobs", name)
	}
	findings := r.orOK("%s, a round trip takes %s", name, shortTime(took))

	if clock, err := e.compare(ctx, "Redis", func(ctx context.Context) (time.Time, error) { return rdb.Time(ctx).Result() }); err == nil {
		look.clock = &clock
	} else {
		findings = append(findings, notSeen("clocks", e.allow("+time"), fmt.Errorf("the clock of Redis: %w", err)))
	}
	look.dialed.mu.Lock()
	conn := look.dialed.conn
	look.dialed.mu.Unlock()
	if conn != nil {
		findings = append(findings, e.checkTLS("redis tls", conn, conn.RemoteAddr(), true, "use rediss:// in REDIS_URL, or the platform's internal URL")...)
	}
	findings = append(findings, e.checkRedisRights(ctx, rdb)...)
	if infoErr != nil {
		return findings
	}
	return append(findings, e.checkRedisServer(ctx, rdb)...)
}

// pingRedis returns how long a round trip takes.
func pingRedis(ctx context.Context, rdb redis.UniversalClient) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, reachTimeout)
	defer cancel()
	var took []time.Duration
	for i := range pings {
		started := time.Now()
		if err := rdb.Ping(ctx).Err(); err != nil {
			if ctx.Err() != nil {
				err = fmt.Errorf("no answer within %s: %w", reachTimeout, err)
			}
			return 0, err
		}
		if i > 0 { // the first one connects
			took = append(took, time.Since(started))
		}
	}
	return slices.Min(took), nil // the others have waited for a processor as well
}

func redisName(server map[string]string) string {
	switch {
	case server["valkey_version"] != "":
		return "Valkey " + server["valkey_version"]
	case server["redis_version"] != "":
		return "Redis " + server["redis_version"]
	}
	return "the server, which doesn't say its version,"
}

// tooOld reports whether a version is below 6.2; one that can't be read isn't.
func tooOld(version string) bool {
	var major, minor int
	if n, _ := fmt.Sscanf(version, "%d.%d", &major, &minor); n < 2 {
		return false
	}
	return major < 6 || major == 6 && minor < 2
}

// allow is the rule that lets the worker's user do something.
func (e *examination) allow(rules ...string) string {
	_, rest, _ := strings.Cut(e.RedisURL, "://") // which url.Parse can't read if it has several hosts
	user := ""
	if at := strings.LastIndexByte(rest, '@'); at >= 0 {
		user, _, _ = strings.Cut(rest[:at], ":")
		user, _ = url.PathUnescape(user)
	}
	return "ACL SETUSER " + cmp.Or(user, "default") + " " + strings.Join(rules, " ")
}

// checkRedisServer judges what INFO tells to all who may ask it.
func (e *examination) checkRedisServer(ctx context.Context, rdb redis.UniversalClient) []Finding {
	var all []Finding
	for _, look := range []struct {
		check, section string
		judge          func(context.Context, redis.UniversalClient, *report, map[string]string) []Finding
	}{
		{"redis eviction", "memory", e.judgeEviction},
		{"redis memory", "memory", e.judgeMemory},
		{"redis persistence", "persistence", e.judgePersistence},
		{"redis role", "replication", e.judgeRole},
		{"redis connections", "clients", e.judgeClients},
	} {
		info, err := readInfo(ctx, rdb, look.section)
		if err != nil {
			all = append(all, notSeen(look.check, e.allow("+info"), err))
			continue
		}
		all = append(all, look.judge(ctx, rdb, &report{check: look.check}, info)...)
	}
	return all
}

func (e *examination) judgeEviction(_ context.Context, _ redis.UniversalClient, r *report, memory map[string]string) []Finding {
	const wayOut = "CONFIG SET maxmemory-policy noeviction, and the same in redis.conf; on Render: maxmemoryPolicy: noeviction"
	policy := memory["maxmemory_policy"]
	switch {
	case policy == "":
		r.warn("see that its maxmemory-policy is noeviction", "the server doesn't say what it does when its memory is full")
	case policy != NoEviction:
		r.fail(wayOut, "maxmemory-policy is %s: when its memory is full, Redis drops keys, which are jobs", policy)
	}
	return r.orOK("maxmemory-policy is %s", policy)
}

func (e *examination) judgeMemory(_ context.Context, _ redis.UniversalClient, r *report, memory map[string]string) []Finding {
	used, most := number(memory, "used_memory"), number(memory, "maxmemory")
	if most <= 0 {
		return r.orOK("%s used, no maxmemory is set", megabytes(used))
	}
	const wayOut = "raise maxmemory, or the plan; see what fills it: archived jobs and results that are kept"
	left := max(0, most-used)
	switch {
	case left*20 < most:
		r.fail(wayOut, "%s of %s are left: when they are used up, no job can be enqueued or ended", megabytes(left), megabytes(most))
	case left*5 < most:
		r.warn(wayOut, "%s of %s are left", megabytes(left), megabytes(most))
	}
	return r.orOK("%s of %s are left", megabytes(left), megabytes(most))
}

func megabytes(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/(1<<20)) }

// judgePersistence also asks for the configuration, which few users may see: the rest is
// judged without it.
func (e *examination) judgePersistence(ctx context.Context, rdb redis.UniversalClient, r *report, state map[string]string) []Finding {
	config := func(name string) (string, bool) {
		values, err := rdb.ConfigGet(ctx, name).Result()
		value, has := values[name]
		return value, err == nil && has
	}
	const journal = "CONFIG SET appendonly yes, and the same in redis.conf; on Render: a paid plan, with persistenceMode: journal-snapshot"
	if state["aof_enabled"] == "0" {
		switch save, ok := config("save"); {
		case ok && save == "":
			r.warn(journal, "there is neither a journal (appendonly) nor a snapshot (save): a restart of Redis loses all jobs")
		case ok:
			r.warn(journal, "there is no journal (appendonly): a crash of Redis loses the jobs since the last snapshot (save %s)", save)
		default:
			r.warn(journal, "there is no journal (appendonly): a crash of Redis loses the jobs since the last snapshot, if there are any")
		}
	}
	fsync := ""
	if state["aof_enabled"] == "1" {
		fsync, _ = config("appendfsync")
	}
	if fsync == "no" {
		r.warn("CONFIG SET appendfsync everysec", "appendfsync is no: a crash of the machine loses the jobs of half a minute")
	}
	if state["aof_enabled"] == "" {
		r.warn("", "the server doesn't say whether it writes a journal")
	}
	if state["rdb_last_bgsave_status"] == "err" {
		r.warn("see the server's log, and its disk", "the last snapshot failed")
	}
	if fsync != "" {
		fsync = ", appendfsync " + fsync
	}
	return r.orOK("a journal (appendonly%s)", fsync)
}

func (e *examination) judgeRole(_ context.Context, _ redis.UniversalClient, r *report, replication map[string]string) []Finding {
	if role := replication["role"]; role == "slave" {
		r.fail("use the URL of its master, or redis-sentinel://, which finds it", "the server is a replica, which takes no job")
	}
	return r.orOK("a master with %s", plural(int(number(replication, "connected_slaves")), "replica"))
}

// judgeClients counts what a deploy takes: a worker has a connection for each of its first
// eight queues, some more, and up to ten per core when it is busy.
func (e *examination) judgeClients(_ context.Context, _ redis.UniversalClient, r *report, clients map[string]string) []Finding {
	most, now := number(clients, "maxclients"), number(clients, "connected_clients")
	worker := int64(14 + min(len(e.Queues), 8) + 10*runtime.GOMAXPROCS(0))
	switch {
	case most == 0:
		return r.orOK("%d, the server doesn't say of how many", now)
	case now+worker > most:
		r.warn("raise maxclients, or the plan", "%d of %d are open, and a worker more, as during a deploy, takes up to %d", now, most, worker)
	}
	return r.orOK("%d of %d are open, and a worker takes up to %d", now, most, worker)
}

// probes are a command each that workers, and the commands of the shell, send, in scripts
// or without, with keys and channels as they are.
func probes(queue string) [][]any {
	const job = "01a2"
	task, lease, pending, active := asynqwire.Task(queue, job), asynqwire.Leases(queue), asynqwire.Pending(queue), asynqwire.Active(queue)
	due, archived, completed := asynqwire.Scheduled(queue), asynqwire.Archived(queue), asynqwire.Completed(queue)
	lock, snapshot := unique.Key("a", "b"), instance.SnapshotKey(instance.NewName(""))
	return [][]any{
		{"blmove", pending, pending, "right", "right", 1},
		{"del", snapshot},
		{"del", task},
		{"eval", "return 1", 1, pending},
		{"evalsha", strings.Repeat("0", 40), 1, pending},
		{"exists", asynqwire.Paused(queue)},
		{"expire", lock, 1},
		{"expireat", task, 1},
		{"get", lock},
		{"get", snapshot},
		{"hdel", task, "x"},
		{"hexists", task, "x"},
		{"hget", task, "msg"},
		{"hgetall", asynqwire.Workers + ":{a:1:b}"},
		{"hincrby", task, "x", 1},
		{"hmget", task, "msg"},
		{"hset", task, "x", "y"},
		{"hset", asynqwire.Workers + ":{a:1:b}", "x", "y"},
		{"hstrlen", task, "msg"},
		{"incr", asynqwire.Paused(queue)},
		{"incrby", asynqwire.Paused(queue), 1},
		{"llen", pending},
		{"lpos", pending, job},
		{"lpush", pending, job},
		{"lrange", active, 0, -1},
		{"lrem", active, 0, job},
		{"ltrim", pending, 0, 1},
		{"ping"},
		{"pttl", lock},
		{"publish", asynqwire.CancelChannel, job},
		{"rpush", pending, job},
		{"sadd", asynqwire.Queues, queue},
		{"set", lock, "x"},
		{"set", asynqwire.Paused(queue), 1},
		{"set", snapshot, "x"},
		{"setex", asynqwire.Servers + ":{a:1:b}", 1, "x"},
		{"sismember", asynqwire.Queues, queue},
		{"smembers", asynqwire.Queues},
		{"srem", asynqwire.Queues, queue},
		{"subscribe", asynqwire.CancelChannel},
		{"time"},
		{"type", task},
		{"zadd", due, 1, job},
		{"zadd", instance.Names, 1, "x"},
		{"zadd", asynqwire.Servers, 1, "x"},
		{"zadd", asynqwire.Workers, 1, "x"},
		{"zcard", archived},
		{"zcount", completed, 0, 1},
		{"zrange", instance.Names, 0, -1},
		{"zrangebyscore", lease, 0, 1},
		{"zrem", lease, job},
		{"zremrangebyrank", archived, 0, 0},
		{"zremrangebyscore", archived, 0, 0},
		{"zrevrange", pending, 0, 1},
		{"zscore", lease, job},
	}
}

// checkRedisRights has Redis judge each command without running it: it judges what is said
// between MULTI and DISCARD when it is said.
func (e *examination) checkRedisRights(ctx context.Context, rdb redis.UniversalClient) []Finding {
	r := &report{check: "redis rights"}
	queue := tasks.DefaultQueue
	if len(e.Queues) > 0 {
		queue = slices.Min(slices.Collect(maps.Keys(e.Queues)))
	}
	node, err := oneNode(ctx, rdb)
	if err != nil {
		return []Finding{notSeen(r.check, "", err)}
	}
	list := probes(queue)
	answers := make([]*redis.Cmd, len(list))
	var multi *redis.Cmd
	_, _ = node.Pipelined(ctx, func(p redis.Pipeliner) error { // whose error is that of one of them
		multi = p.Do(ctx, "multi")
		for i, probe := range list {
			answers[i] = p.Do(ctx, probe...)
		}
		p.Do(ctx, "discard")
		return nil
	})
	if err := multi.Err(); err != nil {
		return []Finding{notSeen(r.check, e.allow("+multi", "+discard"), err)}
	}
	var commands, keys, rules []string
	rule := func(text string) {
		if !slices.Contains(rules, text) {
			rules = append(rules, text)
		}
	}
	for i, probe := range list {
		err := answers[i].Err()
		if !redis.HasErrorPrefix(err, "NOPERM") {
			continue
		}
		switch command := probe[0].(string); {
		case strings.Contains(err.Error(), "run the '"):
			if !slices.Contains(commands, command) {
				commands = append(commands, command)
			}
			rule("+" + command)
		case strings.Contains(err.Error(), "channel"):
			keys = append(keys, "the channel "+asynqwire.CancelChannel)
			rule("&" + asynqwire.CancelChannel)
		default:
			prefix, _, _ := strings.Cut(fmt.Sprint(probe[firstKey(command)]), ":")
			keys = append(keys, "keys like "+prefix+":*")
			rule("~" + prefix + ":*")
		}
	}
	slices.Sort(keys)
	if denied := slices.Concat(commands, slices.Compact(keys)); len(denied) > 0 {
		r.fail(e.allow(rules...), "the user may not use what workers and commands need: %s", strings.Join(denied, ", "))
	} else if err := CheckScripts(ctx, rdb); err != nil {
		r.fail("allow the user scripts", "a script can't be run: %s", explain("REDIS_URL", e.RedisURL, err))
	}
	return r.orOK("the user may do what workers and commands need")
}

// firstKey is the place of the first key in a probe.
func firstKey(command string) int {
	if command == "eval" || command == "evalsha" {
		return 3
	}
	return 1
}

// oneNode returns the client of the server itself, of a cluster that of one of its masters.
func oneNode(ctx context.Context, rdb redis.UniversalClient) (*redis.Client, error) {
	switch c := rdb.(type) {
	case *redis.Client:
		return c, nil
	case *redis.ClusterClient:
		return c.MasterForKey(ctx, asynqwire.Queues)
	}
	return nil, errors.New("the client is of an unknown sort")
}
