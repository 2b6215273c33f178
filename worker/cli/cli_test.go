package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/alecthomas/kong"
	"github.com/google/go-cmp/cmp"

	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/scheduler"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/builtin"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// orders is a user's group: one kind of job, with settings.
type orders struct {
	Limit int    `env:"ORDERS_LIMIT" default:"10" help:"Orders at once."`
	Key   string `env:"ORDERS_KEY" secret:"" help:"Orders are signed with this."`

	placed chan string
}

func (o *orders) Register(s *tasks.Set) { tasks.Register(s, o.place) }

func (o *orders) place(_ context.Context, _ *tasks.Job, p order) (any, error) {
	o.placed <- fmt.Sprint(p.Item, o.Limit, o.Key)
	return nil, nil
}

type order struct {
	Item string `json:"item" doc:"What is ordered." example:"tea"`
}

func (order) Kind() string           { return "shop:order" }
func (order) Options() tasks.Options { return tasks.Options{} }
func (order) Validate() error        { return nil }

// shopCommands are a user's own commands.
type shopCommands struct {
	Reindex reindexCmd `cmd:"" help:"Make the index anew."`
	Stock   struct {
		Count countCmd `cmd:"" help:"Count what is there."`
	} `cmd:"" help:"What is there."`
}

type reindexCmd struct {
	Full bool `env:"REINDEX_FULL" help:"All of it."`

	group *orders
	seen  func(ctx context.Context, full bool, group orders) error
}

func (r *reindexCmd) Run(ctx context.Context) error { return r.seen(ctx, r.Full, *r.group) }

type countCmd struct {
	Shelf string `arg:""`
}

func (c *countCmd) Run(k *kong.Kong) error {
	_, err := fmt.Fprintln(k.Stdout, "nothing on", c.Shelf)
	return err
}

// shop is a user's program.
func shop(env map[string]string, groups ...tasks.Group) Program {
	return Program{Name: "shop", Version: "1.2.3", Groups: groups, Env: variables(env)}
}

// run runs a command to its end.
func (p Program) run(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	return p.runTo(t, strings.NewReader(""), args...)
}

// everyCommand is the command line of each command.
var everyCommand = [][]string{
	{},
	{"run"},
	{"enqueue"},
	{"cancel"},
	{"archive"},
	{"archive", "ls"},
	{"archive", "show"},
	{"archive", "retry"},
	{"archive", "delete"},
	{"outbox"},
	{"outbox", "ls"},
	{"outbox", "retry"},
	{"outbox", "delete"},
	{"pause"},
	{"resume"},
	{"schedule"},
	{"schedule", "add"},
	{"schedule", "ls"},
	{"schedule", "enable"},
	{"schedule", "disable"},
	{"schedule", "rm"},
	{"schedule", "run-now"},
	{"schedule", "next"},
	{"status"},
	{"monitor"},
	{"health"},
	{"kinds"},
	{"migrate"},
	{"doctor"},
	{"config"},
	{"version"},
	{"completion"},
	{"completion", "bash"},
	{"completion", "zsh"},
	{"completion", "fish"},
	{"reindex"},
	{"stock"},
	{"stock", "count"},
}

func TestProgram_HelpOfEveryCommand(t *testing.T) {
	t.Parallel()
	for _, command := range everyCommand {
		p := shop(nil, new(orders), new(builtin.Tasks))
		p.Commands = []any{new(shopCommands)}
		stdout, stderr, code := p.run(t, append(append([]string{}, command...), "--help")...)
		usage := strings.TrimSpace("Usage: shop " + strings.Join(command, " "))
		if code != 0 || stderr != "" || !strings.HasPrefix(stdout, usage) {
			t.Errorf("%q: exit code %d, want %q in\n%s%s", command, code, usage, stdout, stderr)
		}
	}
}

// asProgram finds the word worker where it is the name of the program.
var asProgram = regexp.MustCompile(`(?m)^worker:|(Usage|Try|run|see): worker\b|\bworker (run|enqueue|cancel|archive|outbox|pause|resume|schedule|status|monitor|health|kinds|migrate|doctor|config|version|--)`)

func TestProgram_SpeaksOfItselfByItsName(t *testing.T) {
	t.Parallel()
	b := setup(t)
	bare := setup(t)
	bare.Exec(t, "DROP SCHEMA carpool CASCADE")
	servers := map[string]string{"REDIS_URL": b.RedisURL, "DATABASE_URL": b.DatabaseURL}
	for name, c := range map[string]struct {
		env  map[string]string
		args []string
		code int
		want string
	}{
		"an example":                    {nil, []string{"kinds"}, 0, `  shop enqueue shop:order '{"item": "tea"}'`},
		"settings that are missing":     {nil, nil, exitUsage, "shop: 2 settings are wrong:\n  REDIS_URL is not set; "},
		"an unknown command":            {nil, []string{"frobnicate"}, exitUsage, "shop: unexpected argument frobnicate\nTry: shop --help\n"},
		"an unknown flag":               {nil, []string{"status", "--frobnicate"}, exitUsage, "shop: unknown flag --frobnicate\nTry: shop status --help\n"},
		"a command without arguments":   {nil, []string{"enqueue"}, exitUsage, "shop: expected \"<kind> <json>\"\nTry: shop enqueue --help\n"},
		"a command in a command":        {nil, []string{"schedule", "add", "nightly"}, exitUsage, "\nTry: shop schedule add --help\n"},
		"which command in a command":    {nil, []string{"archive"}, exitUsage, "\nTry: shop archive --help\n"},
		"a flag of the default command": {nil, []string{"--burst=perhaps"}, exitUsage, "\nTry: shop --help\n"},
		"which jobs of the outbox":      {nil, []string{"outbox", "retry"}, exitUsage, "or --all\nTry: shop outbox retry --help\n"},
		"which jobs of the archive":     {servers, []string{"archive", "delete"}, exitUsage, "or --all\nTry: shop archive delete --help\n"},
		"a limit of none":               {servers, []string{"archive", "ls", "--limit", "0"}, exitUsage, "--limit: 0 is less than 1\nTry: shop archive ls --help\n"},
		"an entry that is wrong":        {servers, []string{"schedule", "add", "a b", "daily", "shop:oder"}, exitUsage, "\nTry: shop schedule add --help\n"},
		"a flag that is wrong":          {servers, []string{"enqueue", "shop:order", `{"item": "tea"}`, "--max-retry=-1"}, exitUsage, "which is no retry\nTry: shop enqueue --help\n"},
		"a setting that is missing":     {nil, []string{"outbox", "ls"}, exitUsage, exampleDatabaseURL + "\n"},
		"a kind that there isn't":       {nil, []string{"enqueue", "shop:oder", "{}"}, exitUsage, `shop: kind: unknown kind "shop:oder": this program knows `},
		"a payload that is wrong":       {nil, []string{"enqueue", "shop:order", "{"}, exitUsage, "for example: shop enqueue shop:order '"},
		"a job that there isn't":        {servers, []string{"cancel", "nobody"}, exitFailed, "shop: "},
		"a job that isn't archived":     {servers, []string{"archive", "show", "nobody"}, exitFailed, "shop: job nobody is not in the archive; nothing was changed; see: shop archive ls\n"},
		"an entry that there isn't":     {servers, []string{"schedule", "rm", "nightly"}, exitFailed, "see: shop schedule ls"},
		"a database without the tables": {map[string]string{"DATABASE_URL": bare.DatabaseURL}, []string{"schedule", "ls"}, exitFailed, "run the command migrate"},
		"a status without the tables":   {map[string]string{"REDIS_URL": b.RedisURL, "DATABASE_URL": bare.DatabaseURL}, []string{"status"}, 0, "run the command migrate"},
		"a run without the tables":      {map[string]string{"REDIS_URL": b.RedisURL, "DATABASE_URL": bare.DatabaseURL, "WORKER_STARTUP_TIMEOUT": "0s"}, []string{"run"}, exitFailed, "run the command migrate"},
		"the version":                   {nil, []string{"version"}, 0, "1.2.3\n"},
		"help":                          {nil, []string{"enqueue", "--help"}, 0, "see: shop kinds."},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			stdout, stderr, code := shop(c.env, new(orders)).run(t, c.args...)
			if code != c.code || !strings.Contains(stdout+stderr, c.want) {
				t.Errorf("exit code %d, want %d and %q in\n%s%s", code, c.code, c.want, stdout, stderr)
			}
			if strings.HasPrefix(name, "a setting") && strings.Contains(stderr, "Try: ") {
				t.Errorf("it points to the help, where settings have no fault:\n%s", stderr)
			}
			if as := asProgram.FindString(stdout + stderr); as != "" {
				t.Errorf("it calls itself %q:\n%s%s", as, stdout, stderr)
			}
		})
	}
	for _, command := range everyCommand {
		p := shop(nil, new(orders), new(builtin.Tasks))
		p.Commands = []any{new(shopCommands)}
		help, _, _ := p.run(t, append(append([]string{}, command...), "--help")...)
		if as := asProgram.FindString(help); as != "" {
			t.Errorf("in the help of %q it calls itself %q", command, as)
		}
	}
}

func TestProgram_EveryCommandHasTheFlagVersion(t *testing.T) {
	t.Parallel()
	for _, command := range everyCommand {
		p := shop(nil, new(orders))
		p.Commands = []any{new(shopCommands)}
		stdout, stderr, code := p.run(t, append(append([]string{}, command...), "--version")...)
		if code != 0 || stdout != "1.2.3\n" || stderr != "" {
			t.Errorf("%q: exit code %d\n%s%s", command, code, stdout, stderr)
		}
	}
}

func TestProgram_WithoutANameHasThatOfItsFile(t *testing.T) {
	t.Parallel()
	_, stderr, _ := Program{Env: variables(nil)}.run(t, "--frobnicate")
	if !strings.HasSuffix(stderr, "\nTry: cli.test --help\n") {
		t.Errorf("it says %q", stderr)
	}
}

func TestProgram_HelpShowsASecretsVariableOnce(t *testing.T) {
	t.Parallel()
	for command, variable := range map[string]string{"run": "WEBHOOK_SECRET", "config": "WEBHOOK_SECRET", "monitor": "MONITOR_PASSWORD"} {
		stdout, _, _ := shop(nil, new(builtin.Tasks)).run(t, command, "--help")
		help := strings.Join(strings.Fields(stdout), " ")
		if !strings.Contains(help, "Environment only ($"+variable+").") || strings.Count(help, "nvironment only") != 1 || strings.Count(help, "$"+variable) != 1 {
			t.Errorf("the help of %s:\n%s", command, stdout)
		}
	}
}

func TestProgram_GroupsThatDoNotGoTogetherAreOneErrorForEveryCommandThatNeedsTheirKinds(t *testing.T) {
	t.Parallel()
	twice := func() Program {
		return shop(nil, new(orders), plain(func(s *tasks.Set) { new(orders).Register(s) }))
	}
	for _, args := range [][]string{
		{}, {"config"}, {"kinds"}, {"migrate"}, {"enqueue", "shop:order", "{}"}, {"schedule", "add", "a", "@daily", "shop:order"},
	} {
		stdout, stderr, code := twice().run(t, args...)
		want := "shop: the kinds of job don't go together:\n  kind \"shop:order\" is registered twice\n"
		if code != exitUsage || stderr != want || strings.Contains(stdout, "shop:order") {
			t.Errorf("%q: exit code %d\n%s%s", args, code, stdout, stderr)
		}
	}
	if _, stderr, code := twice().run(t, "version"); code != 0 || stderr != "" {
		t.Errorf("version: exit code %d\n%s", code, stderr)
	}

	_, stderr, code := shop(nil, new(orders), nil, new(orders)).run(t, "version")
	want := "shop: the groups of tasks don't go together:\n  group 2 of 3 is nil\n  *cli.orders.Limit: the variable ORDERS_LIMIT is taken by *cli.orders.Limit\n"
	if code != exitUsage || !strings.HasPrefix(stderr, want) {
		t.Errorf("two groups with one variable: exit code %d\n%s", code, stderr)
	}
}

// taker has settings of names that commands have themselves.
type taker struct {
	JSON string `env:"JSON"`
	Addr string `env:"MONITOR_ADDR"`
}

func (*taker) Register(*tasks.Set) {}

func TestProgram_ASettingOfAnyCommandsNameIsRefused(t *testing.T) {
	t.Parallel()
	_, stderr, code := shop(nil, new(taker)).run(t, "version")
	want := "shop: the groups of tasks don't go together:\n" +
		"  *cli.taker.JSON: the flag --json is one of the program's own\n" +
		"  *cli.taker.Addr: the variable MONITOR_ADDR is one of the program's own\n"
	if code != exitUsage || stderr != want {
		t.Errorf("exit code %d\n%s", code, stderr)
	}
}

func TestCancel_WithoutTheDatabaseSaysThatTheOutboxWasNotLookedAt(t *testing.T) {
	t.Parallel()
	const id = "0b5e3c57-3f0f-4cfa-9f3a-6f4f5c3d2a10"
	_, stderr, code := shop(map[string]string{"REDIS_URL": testservers.Redis(t)}).run(t, "cancel", id)
	want := "shop: tasks: cancel job " + id + ": there is no such job in Redis; the outbox was not looked at, as DATABASE_URL is not set\n"
	if code != exitFailed || stderr != want {
		t.Errorf("exit code %d\n%s", code, stderr)
	}
}

func TestProgram_AScheduleThatIsWrongIsAFaultOfTheProgram(t *testing.T) {
	t.Parallel()
	p := shop(map[string]string{"REDIS_URL": exampleRedisURL, "DATABASE_URL": exampleDatabaseURL})
	p.Schedules = []scheduler.Entry{{Name: "nightly", Cron: "@daily", Payload: order{}}}
	for _, command := range []string{"run", "config"} {
		_, stderr, code := p.run(t, command)
		if code != exitUsage || !strings.HasPrefix(stderr, "shop: the program can't be run:\n  Schedules: entry \"nightly\": kind: unknown kind \"shop:order\"") {
			t.Errorf("%s: exit code %d\n%s", command, code, stderr)
		}
	}
	p.Schedules = []scheduler.Entry{{Name: "nightly", Cron: "daily", TimeZone: "Mars", Payload: order{}}}
	_, stderr, _ := p.run(t, "config")
	if strings.Count(stderr, "\n  Schedules: entry \"nightly\": ") != 2 {
		t.Errorf("of two faults it says\n%s", stderr)
	}
}

func TestProgram_OnlyRunAndConfigReadTheSettingsOfOthers(t *testing.T) {
	t.Parallel()
	b := setup(t)
	startInstance(t, b.Redis(t), "a-00000001", time.Now(), false) // pulls from the queue
	env := map[string]string{
		"REDIS_URL": b.RedisURL, "ORDERS_LIMIT": "many", "DB_POOL_SIZE": "many", "WORKER_QUEUES": "a b", "MONITOR_READ_ONLY": "perhaps", "LOG_LEVEL": "loud",
	}
	for _, args := range [][]string{{"enqueue", "shop:order", `{"item": "tea"}`}, {"kinds"}, {"status"}, {"archive", "ls"}, {"version"}} {
		if stdout, stderr, code := shop(env, new(orders)).run(t, args...); code != 0 || stderr != "" {
			t.Errorf("%q: exit code %d\n%s%s", args, code, stdout, stderr)
		}
	}
	for _, args := range [][]string{{}, {"run"}, {"config"}} {
		_, stderr, code := shop(env, new(orders)).run(t, args...)
		if code != exitUsage || !strings.Contains(stderr, "\n  ORDERS_LIMIT is not a whole number; for example ORDERS_LIMIT=10\n") || !strings.Contains(stderr, "DB_POOL_SIZE") {
			t.Errorf("%q: exit code %d\n%s", args, code, stderr)
		}
	}
}

func TestProgram_OwnCommandsFindTheSettingsOfTheGroups(t *testing.T) {
	t.Parallel()
	type key struct{}
	var seen []any
	group := new(orders)
	own := &shopCommands{Reindex: reindexCmd{group: group, seen: func(ctx context.Context, full bool, group orders) error {
		seen = append(seen, ctx.Value(key{}), full, group.Limit, group.Key)
		return nil
	}}}
	p := shop(map[string]string{"ORDERS_LIMIT": "3", "ORDERS_KEY": "hush", "REINDEX_FULL": "true"}, group)
	p.Commands = []any{own}
	if code := p.Run(context.WithValue(t.Context(), key{}, "the context"), []string{"reindex"}, nil, io.Discard, io.Discard); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if diff := cmp.Diff([]any{"the context", true, 3, "hush"}, seen); diff != "" {
		t.Errorf("what it finds (-want +got):\n%s", diff)
	}
	if stdout, stderr, code := p.run(t, "stock", "count", "left"); code != 0 || stdout != "nothing on left\n" {
		t.Errorf("a command within a command: exit code %d\n%s%s", code, stdout, stderr)
	}
	if stdout, _, _ := p.run(t, "--help"); !strings.Contains(stdout, "reindex") || !strings.Contains(stdout, "Make the index anew.") {
		t.Errorf("the help does not show it:\n%s", stdout)
	}
}

func TestProgram_OwnCommandsAreNotRunWithWrongSettings(t *testing.T) {
	t.Parallel()
	group := new(orders)
	p := shop(map[string]string{"ORDERS_LIMIT": "many", "MAIL_PORT": "smtp"}, group, new(mailTasks), new(checked))
	p.Commands = []any{&shopCommands{Reindex: reindexCmd{group: group, seen: func(context.Context, bool, orders) error {
		t.Error("it is run")
		return nil
	}}}}
	_, stderr, code := p.run(t, "reindex")
	want := "shop: 3 settings are wrong:\n" +
		"  ORDERS_LIMIT is not a whole number; for example ORDERS_LIMIT=10\n" +
		"  MAIL_PORT is not a whole number; for example MAIL_PORT=25\n" +
		"  the shelf is empty\n"
	if code != exitUsage || stderr != want {
		t.Errorf("exit code %d\n%s", code, stderr)
	}
}

func TestProgram_AnOwnCommandsErrorIsShownAndExitsWith1(t *testing.T) {
	t.Parallel()
	group := new(orders)
	p := shop(nil, group)
	p.Commands = []any{&shopCommands{Reindex: reindexCmd{group: group, seen: func(context.Context, bool, orders) error {
		return errors.New("the index is locked")
	}}}}
	if _, stderr, code := p.run(t, "reindex"); code != exitFailed || stderr != "shop: the index is locked\n" {
		t.Errorf("exit code %d\n%s", code, stderr)
	}
}

func TestProgram_OwnCommandsThatCanNotBeUsedAreRefused(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		commands any
		want     string
	}{
		"the name of another": {&struct {
			Status countCmd `cmd:""`
		}{}, "duplicate command name"},
		"no pointer":      {shopCommands{}, "cli.shopCommands: it must be a pointer to a struct"},
		"nil":             {nil, "<nil>: it must be a pointer to a struct"},
		"a nil pointer":   {(*shopCommands)(nil), "*cli.shopCommands: it must be a pointer to a struct"},
		"not of a struct": {new(int), "*int: it must be a pointer to a struct"},
	} {
		p := shop(nil)
		p.Commands = []any{c.commands}
		_, stderr, code := p.run(t, "version")
		if code != exitUsage || !strings.HasPrefix(stderr, "shop: the program's own commands can't be used:\n  ") || !strings.Contains(stderr, c.want) {
			t.Errorf("%s: exit code %d, want %q in\n%s", name, code, c.want, stderr)
		}
	}
}

func TestProgram_RunsItsJobsUntilItsContextEnds(t *testing.T) {
	t.Parallel()
	b := setup(t)
	group := &orders{placed: make(chan string, 1)}
	p := shop(map[string]string{
		"REDIS_URL": b.RedisURL, "DATABASE_URL": b.DatabaseURL, "ORDERS_LIMIT": "3", "ORDERS_KEY": "hush", "LOG_FORMAT": "json",
	}, group)
	ctx, end := context.WithCancelCause(t.Context())
	log, ended := workertest.NewLog(), make(chan int)
	go func() { ended <- p.Run(ctx, []string{"run", "--orders-limit=4"}, nil, io.Discard, log) }()
	log.Wait(t, `"msg":"worker started","version":"1.2.3"`)
	if _, stderr, code := shop(map[string]string{"REDIS_URL": b.RedisURL}, new(orders)).run(t, "enqueue", "shop:order", `{"item": "tea"}`); code != 0 {
		t.Fatal(stderr)
	}
	if got := <-group.placed; got != "tea4hush" {
		t.Errorf("the job sees %s", got)
	}
	end(errors.New("closing time"))
	if code := <-ended; code != 0 {
		t.Errorf("exit code %d\n%s", code, log)
	}
	log.Wait(t, `"signal":"closing time"`)
	log.Wait(t, `"msg":"worker stopped"`)
	if strings.Contains(log.String(), "hush") {
		t.Error("the log shows a secret")
	}
}

// asStubborn is the variable with which the tests' own binary is a program with
// stubbornCommands.
const asStubborn = "CARPOOL_TEST_STUBBORN"

// stubbornCommands are one that goes on when its context has ended, and one that doesn't.
type stubbornCommands struct {
	Dig  digCmd  `cmd:""`
	Wait waitCmd `cmd:""`
}

type digCmd struct{}

func (digCmd) Run(ctx context.Context) error {
	fmt.Fprintln(os.Stderr, "digging")
	<-ctx.Done()
	fmt.Fprintln(os.Stderr, "still digging")
	select {}
}

type waitCmd struct{}

func (waitCmd) Run(ctx context.Context) error {
	fmt.Fprintln(os.Stderr, "waiting")
	<-ctx.Done()
	return context.Cause(ctx)
}

func TestMain_SignalsEndAnyCommandTheSecondAtOnce(t *testing.T) {
	t.Parallel()
	start := func(stdin io.Reader, command ...string) (*exec.Cmd, *workertest.Log) {
		cmd, log := exec.Command(os.Args[0], command...), workertest.NewLog()
		cmd.Env, cmd.Stdin, cmd.Stderr = []string{asStubborn + "=1"}, stdin, log
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill() })
		return cmd, log
	}
	signal := func(cmd *exec.Cmd, sig syscall.Signal) {
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
	}
	cmd, log := start(nil, "wait")
	log.Wait(t, "waiting")
	signal(cmd, syscall.SIGINT)
	_ = cmd.Wait() // the exit code tells
	if code := cmd.ProcessState.ExitCode(); code != exitFailed || !strings.HasSuffix(log.String(), "stubborn: interrupt\n") {
		t.Errorf("after one signal: exit code %d\n%s", code, log)
	}
	for _, args := range [][]string{{"enqueue", "carpool:prune", "-"}, {"schedule", "add", "nightly", "@daily", "carpool:prune", "-"}} {
		read, write, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd, log := start(read, args...)
		_ = read.Close()
		if _, err := write.Write(make([]byte, 1<<20)); err != nil { // more than a pipe holds: it reads
			t.Fatal(err)
		}
		signal(cmd, syscall.SIGINT)
		giveUp := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		giveUp.Stop()
		if code := cmd.ProcessState.ExitCode(); code != exitFailed || log.String() != "stubborn: interrupt\n" {
			t.Errorf("after one signal while it reads, %q: exit code %d\n%s", args, code, log)
		}
		_ = write.Close()
	}
	cmd, log = start(nil, "dig")
	log.Wait(t, "digging")
	signal(cmd, syscall.SIGTERM)
	log.Wait(t, "still digging")
	ended := make(chan struct{})
	go func() { defer close(ended); _ = cmd.Wait() }()
	workertest.Eventually(t, "a later signal ends it", func() bool {
		select {
		case <-ended:
			return true
		default:
			_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended
			return false
		}
	})
	if code := cmd.ProcessState.ExitCode(); code != exitFailed {
		t.Errorf("after two signals: exit code %d", code)
	}
}
