package cli

import (
	"encoding/json"
	"net/url"
	"strings"
	"syscall"
	"testing"

	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/worker/internal/doctor"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// findings are those that doctor --json prints.
func findings(t *testing.T, stdout string) (list []doctor.Finding) {
	t.Helper()
	for line := range strings.Lines(stdout) {
		var f doctor.Finding
		if err := json.Unmarshal([]byte(line), &f); err != nil || f.Check == "" || f.Says == "" {
			t.Fatalf("%q: %v", line, err)
		}
		list = append(list, f)
	}
	return list
}

func TestDoctor_ALineAFindingAndExitsWith1IfOneIsAFailure(t *testing.T) {
	t.Parallel()
	b := setup(t)
	stdout, stderr, code := b.run(t, nil, "doctor")
	if code != 0 || stderr != "" { // warnings there are: the shared Redis keeps nothing, the role is a superuser
		t.Errorf("exit code %d\n%s%s", code, stdout, stderr)
	}
	shown := lines(stdout)
	for _, want := range []string{"ok redis rights the user may do what workers and commands need", "ok postgres tables every migration is applied", "ok settings 10 jobs at once, a pool of 5 + 5 connections"} {
		if !strings.Contains("\n"+strings.Join(shown, "\n")+"\n", "\n"+want+"\n") {
			t.Errorf("no line %q in\n%s", want, stdout)
		}
	}
	if !strings.Contains(stdout, "→ give the worker a role of its own") {
		t.Errorf("no way out in\n%s", stdout)
	}
	asJSON, stderr, code := b.run(t, nil, "doctor", "--json")
	if list := findings(t, asJSON); code != 0 || stderr != "" || len(list) != len(shown) {
		t.Errorf("exit code %d, %d findings, want %d\n%s%s", code, len(list), len(shown), asJSON, stderr)
	}

	b.Exec(t, "DROP SCHEMA carpool CASCADE")
	stdout, stderr, code = b.run(t, nil, "doctor")
	if code != exitFailed || !strings.HasPrefix(stderr, "worker: failures: ") || strings.Count(stderr, "\n") != 1 || !strings.Contains(stdout, "failure  postgres tables") {
		t.Errorf("exit code %d\n%s%s", code, stdout, stderr)
	}
	if asJSON, _, code := b.run(t, nil, "doctor", "--json"); code != exitFailed || !strings.Contains(asJSON, `{"check":"postgres tables","result":"failure","says":"the database lacks carpool's tables, or their newest form","way_out":"run the command migrate"}`) {
		t.Errorf("exit code %d\n%s", code, asJSON)
	}
}

func TestDoctor_WrongSettingsAreFailuresAndWhatIsRightIsLookedAt(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for name, c := range map[string]struct {
		env         []string
		args        []string
		want, other string
	}{
		"a number":            {[]string{"DB_POOL_SIZE=many"}, nil, `DB_POOL_SIZE is "many"`, "redis rights"},
		"a Redis":             {[]string{"REDIS_URL=hush"}, nil, "REDIS_URL is wrong", "postgres tables"},
		"no Redis":            {[]string{"REDIS_URL="}, nil, "REDIS_URL is not set", "postgres tables"},
		"a database":          {[]string{"DATABASE_URL=mysql://u:hush@h/d"}, nil, "DATABASE_URL is wrong", "redis rights"},
		"a secret in a flag":  {nil, []string{"--database-url=postgres://u:hush@127.0.0.1:1/d"}, "DATABASE_URL is given as a flag with a password in it", "redis rights"},
		"a setting of groups": {[]string{"WEBHOOK_SECRET=hush"}, nil, "WEBHOOK_SECRET", "postgres tables"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			stdout, stderr, code := b.run(t, c.env, append([]string{"doctor", "--json"}, c.args...)...)
			wrong, looked := false, false
			for _, f := range findings(t, stdout) {
				wrong = wrong || f.Check == "settings" && f.Result == doctor.Failure && strings.Contains(f.Says, c.want)
				looked = looked || f.Check == c.other && f.Result == doctor.OK
			}
			if code != exitFailed || !wrong || !looked || strings.Contains(stdout+stderr, "hush") {
				t.Errorf("exit code %d, want a failure %q, and %s\n%s%s", code, c.want, c.other, stdout, stderr)
			}
		})
	}
}

func TestDoctor_TellsWhatTheValuesOfSettingsDoNot(t *testing.T) {
	t.Parallel()
	b := setup(t)
	p := withEnviron(append(b.Env, "WORKER_QUEUE=low", "WORKER_FETCHERS=3", "RENDER=true", "LOG_FORMAT=text"))
	stdout, _, code := p.run(t, "doctor", "--kill-after=20s")
	for _, want := range []string{
		"WORKER_QUEUE is no setting; did you mean WORKER_QUEUES?", "WORKER_FETCHERS has no effect any more", "LOG_FORMAT is text",
		"is killed after 20s; jobs that are cut off run again only when their leases are over → set maxShutdownDelaySeconds to 32",
	} {
		if !strings.Contains(stdout, want) {
			t.Errorf("no %q in\n%s", want, stdout)
		}
	}
	if code != 0 {
		t.Errorf("exit code %d", code)
	}
	if _, stderr, code := p.run(t, "doctor", "--kill-after=-1s"); code != exitUsage || !strings.Contains(stderr, "--kill-after: -1s is less than 0s") {
		t.Errorf("exit code %d\n%s", code, stderr)
	}
}

// The user and the role have what doctor advises, and no more.
func TestDoctor_TheRightsThatItAdvisesSuffice(t *testing.T) {
	t.Parallel()
	b := setup(t)
	rdb, u := b.Redis(t), testservers.ParseURL(t, b.RedisURL)
	name := "advised-of-" + strings.Trim(u.Path, "/")
	acl := func(rules ...string) {
		t.Helper()
		args := []any{"ACL", "SETUSER", name}
		for _, rule := range rules {
			args = append(args, rule)
		}
		if err := rdb.Do(t.Context(), args...).Err(); err != nil {
			t.Fatal(err)
		}
	}
	acl("on", ">hush", "resetkeys", "resetchannels", "-@all", "+@connection")
	t.Cleanup(func() { _ = workertest.OpenRedis(t, b.RedisURL).Do(t.Context(), "ACL", "DELUSER", name).Err() })
	of := *u
	of.User = url.UserPassword(name, "hush")
	b.Env = append(b.Env, "REDIS_URL="+of.String(), "DATABASE_URL="+b.roleURL(t, "advised_by_doctor"))

	for range 5 {
		stdout, _, _ := b.run(t, nil, "doctor", "--json")
		advised := 0
		for _, f := range findings(t, stdout) {
			rules, ok := strings.CutPrefix(f.WayOut, "ACL SETUSER "+name+" ")
			if ok {
				advised++
				acl(strings.Fields(rules)...)
			}
			if _, sql, ok := strings.Cut(f.WayOut, "as the role that migrated: "); ok {
				advised++
				b.Exec(t, sql)
			}
		}
		if advised == 0 {
			break
		}
	}
	stdout, stderr, code := b.run(t, nil, "doctor")
	if code != 0 {
		t.Fatalf("with all that it advises, exit code %d\n%s%s", code, stdout, stderr)
	}
	enqueue := func(args ...string) string {
		t.Helper()
		stdout, stderr, code := b.run(t, nil, append([]string{"enqueue"}, args...)...)
		if code != 0 {
			t.Fatalf("%q: exit code %d\n%s", args, code, stderr)
		}
		return strings.TrimSpace(stdout)
	}
	enqueue("carpool:prune", "{}", "--unique=k")
	enqueue("csv:import", `{"source": "file:///no.csv", "table": "t", "mode": "replace"}`, "--in=1s", "--max-retry=1")
	cancelled := enqueue("carpool:prune", "{}", "--in=1h")
	log, stderr, code := b.run(t, nil, "run", "--burst")
	for _, args := range [][]string{{"cancel", cancelled}, {"status"}, {"archive", "ls"}, {"pause", "default"}, {"resume", "default"}, {"schedule", "ls"}, {"outbox", "ls"}} {
		if _, stderr, code := b.run(t, nil, args...); code != 0 {
			t.Errorf("%q: exit code %d\n%s", args, code, stderr)
		}
	}
	if all := log + stderr; code != 0 || strings.Contains(all, "NOPERM") || strings.Contains(all, "permission denied") || !strings.Contains(all, `"outcome":"done"`) {
		t.Errorf("a worker with what is advised: exit code %d\n%s", code, all)
	}
	// One that stays has a heartbeat, validations and schedules too.
	p := b.Start(t)
	b.Exec(t, "SELECT carpool.enqueue('carpool:prune', '{}')")
	p.Log.Wait(t, `"kind":"carpool:prune"`)
	p.Log.Wait(t, `"kind":"pool:validate"`)
	p.Signal(t, syscall.SIGTERM)
	if code := p.Exit(t); code != 0 || strings.Contains(p.Log.String(), "NOPERM") || strings.Contains(p.Log.String(), "permission denied") {
		t.Errorf("a worker that stays: exit code %d\n%s", code, p.Log.String())
	}
}
