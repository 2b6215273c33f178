package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/alecthomas/kong"
	"github.com/google/go-cmp/cmp"

	"github.com/carpool-go/carpool/tasks"
)

// shopTasks is a group with a setting of each type.
type shopTasks struct {
	Dir     string        `env:"SHOP_DIR" placeholder:"DIR" group:"Shop" help:"Orders are read from here."`
	Secret  string        `env:"SHOP_SECRET" secret:"" placeholder:"sec_…" help:"Orders are signed with this."`
	Limit   int           `env:"SHOP_LIMIT" default:"10" help:"Orders at once."`
	Small   int8          `env:"SHOP_SMALL"`
	Count   uint16        `env:"SHOP_COUNT"`
	Rate    float64       `env:"SHOP_RATE" default:"0.25"`
	Dry     bool          `env:"SHOP_DRY" default:"true"`
	Every   time.Duration `env:"SHOP_EVERY" default:"1m"`
	Tags    []string      `env:"SHOP_TAGS" default:"a, b"`
	Level   slog.Level    `env:"SHOP_LEVEL"`
	Since   time.Time     `env:"SHOP_SINCE" placeholder:"2026-01-31T08:00:00Z"`
	Partner string        `env:"PARTNER_URL"`

	handled int // no setting
}

func (*shopTasks) Register(*tasks.Set) {}

// mailTasks is a group that says itself what is wrong with it.
type mailTasks struct {
	From   string `env:"MAIL_FROM"`
	Port   int    `env:"MAIL_PORT" default:"25"`
	faults error
	called int
}

func (*mailTasks) Register(*tasks.Set) {}

func (m *mailTasks) Check() error {
	m.called++
	return m.faults
}

type (
	ownSettings struct {
		Queues   string `name:"queues" env:"WORKER_QUEUES" default:"default=1" help:"Queues."`
		RedisURL string `env:"REDIS_URL" aliases:"redis"`
	}
	runTest struct {
		Burst bool
		ownSettings
		kong.Plugins
	}
	configTest struct {
		ownSettings
		kong.Plugins
	}
)

// program is a command line with groups, as a user would start it.
type program struct {
	Run    runTest    `cmd:"" default:"withargs"`
	Config configTest `cmd:""`
	Status struct{}   `cmd:""`
}

func redactTest(variable, value string) string {
	if u, err := url.Parse(value); err == nil && strings.HasSuffix(variable, "_URL") {
		return u.Redacted()
	}
	return value
}

func settings(t *testing.T, env map[string]string, groups ...tasks.Group) *groupSettings {
	t.Helper()
	s, err := settingsOrError(env, groups...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func settingsOrError(env map[string]string, groups ...tasks.Group) (*groupSettings, error) {
	own, err := namesOf(new(runTest), new(configTest))
	if err != nil {
		return nil, err
	}
	return newGroupSettings(groups, own, variables(env), redactTest)
}

// parse has kong read the command line, and returns what it printed.
func (s *groupSettings) parse(args ...string) (stdout string, err error) {
	var p program
	p.Run.Plugins, p.Config.Plugins = s.plugins(), s.plugins()
	var out bytes.Buffer
	parser, err := newParser(&p, s.env, kong.Name("shop"), kong.Writers(&out, io.Discard), kong.Exit(func(int) {}))
	if err != nil {
		return "", err
	}
	_, err = parser.Parse(args)
	return out.String(), err
}

// readAfter has the groups' settings read after a command line, which must be right.
func readAfter(t *testing.T, s *groupSettings, args ...string) []string {
	t.Helper()
	if _, err := s.parse(args...); err != nil {
		t.Fatal(err)
	}
	return s.read()
}

func noFaults(t *testing.T, faults []string) {
	t.Helper()
	if len(faults) > 0 {
		t.Fatalf("faults:\n%s", strings.Join(faults, "\n"))
	}
}

func same(t *testing.T, got, want any) {
	t.Helper()
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(shopTasks{})); diff != "" {
		t.Errorf("- want, + got:\n%s", diff)
	}
}

func TestSettings_OfEveryType(t *testing.T) {
	t.Parallel()
	env := map[string]string{
		"SHOP_DIR": "/orders", "SHOP_SECRET": "hush", "SHOP_LIMIT": " 7 ", "SHOP_SMALL": "-128", "SHOP_COUNT": "65535",
		"SHOP_RATE": "1.5", "SHOP_DRY": "false", "SHOP_EVERY": "90s", "SHOP_TAGS": "x, y,,z,", "SHOP_LEVEL": "WARN",
		"SHOP_SINCE": "2026-01-31T08:00:00Z", "PARTNER_URL": "https://partner.example",
	}
	want := shopTasks{
		Dir: "/orders", Secret: "hush", Limit: 7, Small: -128, Count: 65535,
		Rate: 1.5, Dry: false, Every: 90 * time.Second, Tags: []string{"x", "y", "z"}, Level: slog.LevelWarn,
		Since: time.Date(2026, 1, 31, 8, 0, 0, 0, time.UTC), Partner: "https://partner.example",
	}
	for _, command := range []string{"run", "config"} {
		var shop shopTasks
		noFaults(t, readAfter(t, settings(t, env, &shop), command))
		same(t, shop, want)
	}
}

func TestSettings_FlagOverVariableOverCodeOverTag(t *testing.T) {
	t.Parallel()
	inCode := func() *shopTasks {
		return &shopTasks{Dir: "/code", Limit: 3, Tags: []string{"with, comma", "c"}, Every: time.Hour, Level: slog.LevelError, Secret: "of-the-code", handled: 1}
	}
	limits := map[string]string{"SHOP_LIMIT": "5", "SHOP_DIR": "/variable", "SHOP_SECRET": "of-the-variable"}
	for name, c := range map[string]struct {
		shop *shopTasks
		env  map[string]string
		args []string
		want shopTasks
	}{
		"the tag": {
			new(shopTasks), nil, nil,
			shopTasks{Limit: 10, Rate: 0.25, Dry: true, Every: time.Minute, Tags: []string{"a", "b"}},
		},
		"the code": {
			inCode(),
			map[string]string{"SHOP_LIMIT": ""},
			nil,
			shopTasks{Dir: "/code", Limit: 3, Rate: 0.25, Dry: true, Every: time.Hour, Tags: []string{"with, comma", "c"}, Level: slog.LevelError, Secret: "of-the-code", handled: 1},
		},
		"the variable": {
			inCode(), limits, nil,
			shopTasks{Dir: "/variable", Limit: 5, Rate: 0.25, Dry: true, Every: time.Hour, Tags: []string{"with, comma", "c"}, Level: slog.LevelError, Secret: "of-the-variable", handled: 1},
		},
		"the flag": {
			inCode(), limits,
			[]string{"--shop-limit=6", "--shop-dir=/flag", "--shop-tags=d", "--shop-level=INFO"},
			shopTasks{Dir: "/flag", Limit: 6, Rate: 0.25, Dry: true, Every: time.Hour, Tags: []string{"d"}, Level: slog.LevelInfo, Secret: "of-the-variable", handled: 1},
		},
		"the flag, back to what the tag says": {
			new(shopTasks),
			map[string]string{"SHOP_LIMIT": "5"},
			[]string{"--shop-limit", "10"},
			shopTasks{Limit: 10, Rate: 0.25, Dry: true, Every: time.Minute, Tags: []string{"a", "b"}},
		},
		"a flag that is set to nothing": {
			inCode(), limits,
			[]string{"--shop-dir=", "--shop-tags="},
			shopTasks{Limit: 5, Rate: 0.25, Dry: true, Every: time.Hour, Level: slog.LevelError, Secret: "of-the-variable", handled: 1},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			noFaults(t, readAfter(t, settings(t, c.env, c.shop), c.args...))
			same(t, *c.shop, c.want)
		})
	}
}

func TestSettings_OfACommandWithoutTheirFlagsAreReadFromVariables(t *testing.T) {
	t.Parallel()
	env := map[string]string{"SHOP_LIMIT": "5", "SHOP_SECRET": "of-the-variable", "SHOP_TAGS": "x,y", "SHOP_EVERY": ""}
	shop := &shopTasks{Dir: "/code", Limit: 3, Every: time.Hour, Secret: "of-the-code"}
	s := settings(t, env, shop)
	if _, err := s.parse("status"); err != nil {
		t.Fatal(err)
	}
	noFaults(t, s.readVariables())
	same(t, *shop, shopTasks{Dir: "/code", Limit: 5, Rate: 0.25, Dry: true, Every: time.Hour, Tags: []string{"x", "y"}, Secret: "of-the-variable"})

	s = settings(t, map[string]string{"SHOP_LIMIT": "many", "SHOP_DRY": "perhaps"}, new(shopTasks), &mailTasks{faults: errors.New("MAIL_FROM is not set")})
	if _, err := s.parse("status"); err != nil {
		t.Fatal(err)
	}
	same(t, s.readVariables(), []string{
		"SHOP_LIMIT is not a whole number; for example SHOP_LIMIT=10",
		"SHOP_DRY is neither true nor false; for example SHOP_DRY=true",
		"MAIL_FROM is not set",
	})
}

func TestSettings_KongErasesNothing(t *testing.T) {
	t.Parallel()
	shop := &shopTasks{Limit: 3, Secret: "of-the-code"}
	s := settings(t, map[string]string{"SHOP_LIMIT": "5"}, shop)
	if _, err := s.parse("status"); err != nil {
		t.Fatal(err)
	}
	same(t, *shop, shopTasks{Limit: 3, Secret: "of-the-code"})
}

func TestSettings_AllFaultsAtOnceAndNoValue(t *testing.T) {
	t.Parallel()
	const wrong = "v-a-l-u-e"
	before := shopTasks{Limit: 3, Rate: 2, Every: time.Hour, Level: slog.LevelError}
	shop := before
	env := map[string]string{
		"SHOP_DIR": "/orders", "SHOP_LIMIT": wrong, "SHOP_SMALL": "128", "SHOP_COUNT": "-1", "SHOP_RATE": wrong,
		"SHOP_DRY": wrong, "SHOP_EVERY": wrong, "SHOP_LEVEL": wrong, "SHOP_SINCE": wrong,
	}
	same(t, readAfter(t, settings(t, env, &shop)), []string{
		"SHOP_LIMIT is not a whole number; for example SHOP_LIMIT=3",
		"SHOP_SMALL is not a whole number from -128 to 127; for example SHOP_SMALL=10",
		"SHOP_COUNT is not a whole number from 0 to 65535; for example SHOP_COUNT=10",
		"SHOP_RATE is not a number; for example SHOP_RATE=2",
		"SHOP_DRY is neither true nor false; for example SHOP_DRY=true",
		"SHOP_EVERY is not a time with its unit, such as 500ms, 30s or 5m; for example SHOP_EVERY=1h0m0s",
		"SHOP_LEVEL is not a valid slog.Level; for example SHOP_LEVEL=ERROR",
		"SHOP_SINCE is not a valid time.Time; for example SHOP_SINCE=2026-01-31T08:00:00Z",
	})
	before.Dir, before.Tags = "/orders", []string{"a", "b"} // what was right
	same(t, shop, before)
}

func TestSettings_AnEmptyFlagIsNoNumber(t *testing.T) {
	t.Parallel()
	same(t, readAfter(t, settings(t, nil, new(shopTasks)), "--shop-limit="), []string{
		"SHOP_LIMIT is not a whole number; for example SHOP_LIMIT=10",
	})
}

func TestSettings_OfAnAbsurdSizeAreFaults(t *testing.T) {
	t.Parallel()
	s := settings(t, map[string]string{"SHOP_LIMIT": "9223372036854775808"}, new(shopTasks))
	same(t, readAfter(t, s), []string{
		"SHOP_LIMIT is not a whole number from -9223372036854775808 to 9223372036854775807; for example SHOP_LIMIT=10",
	})
}

func TestSettings_SecretIsNotTakenFromAFlag(t *testing.T) {
	t.Parallel()
	const hush = "-hush"
	for _, args := range [][]string{{"--shop-secret=" + hush}, {"--shop-secret", hush}, {"config", "--shop-secret=" + hush}, {"--shop-secret="}, {"--shop-secret"}} {
		for _, env := range []map[string]string{nil, {"SHOP_SECRET": hush}} {
			shop := &shopTasks{Secret: "of-the-code"}
			same(t, readAfter(t, settings(t, env, shop), args...), []string{
				"SHOP_SECRET is given as a flag, which everybody on the machine can read in the list of processes; set the variable instead; for example SHOP_SECRET=sec_…",
			})
			same(t, shop.Secret, "of-the-code")
		}
	}
}

// hushTasks is a group whose secret is a number.
type hushTasks struct {
	Pin int `env:"HUSH_PIN" secret:"" default:"4711"`
}

func (*hushTasks) Register(*tasks.Set) {}

func TestSettings_SecretIsShownNowhere(t *testing.T) {
	t.Parallel()
	const hush = "h-u-s-h"
	shop, pin := &shopTasks{Secret: hush + "-of-the-code"}, new(hushTasks)
	s := settings(t, map[string]string{"SHOP_SECRET": hush, "HUSH_PIN": hush}, shop, pin)
	help, _ := s.parse("run", "--help")
	var config strings.Builder
	faults := readAfter(t, s, "config")
	s.print(&config)
	same(t, faults, []string{"HUSH_PIN is not a whole number; for example HUSH_PIN=10"})
	for _, shown := range []string{help, config.String(), fmt.Sprint(faults)} {
		if strings.Contains(shown, hush) || strings.Contains(shown, "4711") {
			t.Errorf("a secret is shown:\n%s", shown)
		}
	}
	if help = strings.Join(strings.Fields(help), " "); !strings.Contains(help, "Environment only ($SHOP_SECRET).") {
		t.Errorf("the help doesn't show the secret's variable:\n%s", help)
	}
}

func TestSettings_Help(t *testing.T) {
	t.Parallel()
	shop := &shopTasks{Every: time.Hour, Partner: "https://shop:hush@partner.example"}
	for _, command := range []string{"run", "config"} {
		help, _ := settings(t, nil, shop).parse(command, "--help")
		help = strings.Join(strings.Fields(help), " ")
		for _, want := range []string{
			"Shop --shop-dir=DIR Orders are read from here ($SHOP_DIR).",
			"Tasks --shop-secret=sec_… Orders are signed with this. Environment only ($SHOP_SECRET).",
			`--shop-limit="10" Orders at once ($SHOP_LIMIT).`,
			"--shop-small=INT ($SHOP_SMALL)",
			`--shop-every="1h0m0s" ($SHOP_EVERY)`,
			"--shop-level=LEVEL ($SHOP_LEVEL)",
			`--partner-url="https://shop:xxxxx@partner.example" ($PARTNER_URL)`,
			"($WORKER_QUEUES)",
		} {
			if !strings.Contains(help, want) {
				t.Errorf("no %q in the help of %s:\n%s", want, command, help)
			}
		}
	}
}

// oddTasks has tags that mean something to kong, and to its reading of quotes.
type oddTasks struct {
	Path string `env:"ODD_PATH" default:"${HOME}\\" placeholder:"\"${X}\"\\" help:"C:\\ or ${HOME}, \"quoted\", $1\\"`
}

func (*oddTasks) Register(*tasks.Set) {}

func TestSettings_TagsReachKongAsTheyAre(t *testing.T) {
	t.Parallel()
	var odd oddTasks
	s := settings(t, nil, &odd)
	help, err := s.parse("run", "--help")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`C:\ or ${HOME}, "quoted", $1\ ($ODD_PATH)`, `--odd-path="${X}"\`} {
		if !strings.Contains(strings.Join(strings.Fields(help), " "), want) {
			t.Errorf("no %s in\n%s", want, help)
		}
	}
	noFaults(t, readAfter(t, s))
	same(t, odd.Path, `${HOME}\`)
}

// print prints the settings as config does, but for the columns.
func (s *groupSettings) print(w io.Writer) {
	for _, set := range s.shown(func(string) string { return fromDefault }) {
		fmt.Fprintf(w, "%s\t%s\n", set.Name, set.Value)
	}
}

func TestSettings_Print(t *testing.T) {
	t.Parallel()
	show := func(env map[string]string, args ...string) string {
		s := settings(t, env, new(shopTasks), plain(nil), new(mailTasks))
		if _, err := s.parse(append([]string{"config"}, args...)...); err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		s.print(&b)
		return b.String()
	}
	same(t, strings.Split(show(map[string]string{"SHOP_SECRET": "hush", "PARTNER_URL": "https://shop:hush@partner.example", "SHOP_EVERY": "wrong"}, "--shop-limit=7"), "\n"), []string{
		"SHOP_DIR\t", "SHOP_SECRET\t***", "SHOP_LIMIT\t7", "SHOP_SMALL\t", "SHOP_COUNT\t", "SHOP_RATE\t0.25", "SHOP_DRY\ttrue",
		"SHOP_EVERY\twrong", "SHOP_TAGS\ta, b", "SHOP_LEVEL\t", "SHOP_SINCE\t", "PARTNER_URL\thttps://shop:xxxxx@partner.example",
		"MAIL_FROM\t", "MAIL_PORT\t25", "",
	})
	if out := show(nil); !strings.Contains(out, "SHOP_SECRET\t\n") {
		t.Errorf("a secret that is not set is shown as one that is:\n%s", out)
	}
}

func TestSettings_CheckIsAskedForFurtherFaults(t *testing.T) {
	t.Parallel()
	from, port := errors.New("MAIL_FROM is not an address"), errors.New("MAIL_PORT is closed")
	for name, c := range map[string]struct {
		check error
		want  []string
	}{
		"none":             {nil, nil},
		"one":              {from, []string{"MAIL_FROM is not an address"}},
		"joined":           {errors.Join(from, errors.Join(port, from)), []string{"MAIL_FROM is not an address", "MAIL_PORT is closed", "MAIL_FROM is not an address"}},
		"one that has two": {fmt.Errorf("%w, and %w", from, port), []string{"MAIL_FROM is not an address, and MAIL_PORT is closed"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			same(t, readAfter(t, settings(t, nil, &mailTasks{faults: c.check})), c.want)
		})
	}
}

func TestSettings_CheckIsNotAskedAboutValuesThatAreNotSet(t *testing.T) {
	t.Parallel()
	mail, other := &mailTasks{faults: errors.New("MAIL_FROM is not set")}, new(checked)
	s := settings(t, map[string]string{"MAIL_PORT": "smtp"}, mail, other)
	same(t, readAfter(t, s), []string{"MAIL_PORT is not a whole number; for example MAIL_PORT=25", "the shelf is empty"})
	same(t, mail.called, 0)
}

// checked is a group without settings that has something to say all the same.
type checked struct{}

func (*checked) Register(*tasks.Set) {}
func (*checked) Check() error        { return errors.New("the shelf is empty") }

// hookedTasks has methods that kong calls on what it is given.
type hookedTasks struct {
	Name string `env:"HOOKED_NAME"`
}

func (*hookedTasks) Register(*tasks.Set)  {}
func (h *hookedTasks) Validate() error    { return errors.New("kong calls Validate") }
func (h *hookedTasks) BeforeReset() error { return errors.New("kong calls BeforeReset") }
func (h *hookedTasks) AfterApply() error  { return errors.New("kong calls AfterApply") }

func TestSettings_KongCallsNoMethodOfAGroup(t *testing.T) {
	t.Parallel()
	var hooked hookedTasks
	noFaults(t, readAfter(t, settings(t, map[string]string{"HOOKED_NAME": "x"}, &hooked)))
	same(t, hooked.Name, "x")
}

type (
	// Shared is settings that several groups have in common, by embedding.
	Shared struct {
		Limit int `env:"SHARED_LIMIT" default:"1"`
	}
	deeper struct {
		Limit int `env:"DEEPER_LIMIT" default:"2"`
	}
	deep struct{ deeper }
	// Pointed is embedded by its pointer.
	Pointed struct {
		Limit int `env:"POINTED_LIMIT" default:"3"`
		*Pointed
	}
	embedding struct {
		Shared
		deep
		*Pointed
	}
)

func (*embedding) Register(*tasks.Set) {}

func TestSettings_OfEmbeddedStructs(t *testing.T) {
	t.Parallel()
	group := &embedding{Pointed: &Pointed{Pointed: new(Pointed)}}
	noFaults(t, readAfter(t, settings(t, map[string]string{"DEEPER_LIMIT": "20"}, group), "--shared-limit=10"))
	same(t, []int{group.Shared.Limit, group.deeper.Limit, group.Pointed.Limit}, []int{10, 20, 3})

	_, err := settingsOrError(nil, new(embedding))
	if err == nil || err.Error() != "*cli.embedding.Limit: the struct that it is embedded with is a nil pointer" {
		t.Errorf("%v", err)
	}
}

type (
	byValue struct {
		Limit int `env:"VALUE_LIMIT"`
	}
	withoutSettings struct{ Limit int }
	wrong           struct {
		Chan    chan int   `env:"WRONG_CHAN"`
		Pointer *int       `env:"WRONG_POINTER"`
		Number  int        `env:"WRONG_NUMBER" default:"ten"`
		Secret  int        `env:"WRONG_SECRET" default:"hush" secret:""`
		Two     string     `env:"WRONG_A,WRONG_B"`
		Empty   string     `env:""`
		Slip    string     `help:"It has no variable." default:"x"`
		Must    string     `env:"WRONG_MUST" required:"" enum:"a,b"`
		Level   slog.Level `env:"WRONG_LEVEL" default:"loud"`
		//lint:ignore U1000 that it can't be used is the point
		own string `env:"WRONG_OWN"`
	}
	takenTasks struct {
		Queues string `env:"WORKER_QUEUES"`
		Burst  string `env:"BURST"`
		Help   string `env:"HELP"`
		Redis  string `env:"REDIS"`
		Limit  int    `env:"SHOP_LIMIT"`
		Low    int    `env:"shop_limit"`
	}
)

func (byValue) Register(*tasks.Set)         {}
func (withoutSettings) Register(*tasks.Set) {}
func (*wrong) Register(*tasks.Set)          {}
func (*takenTasks) Register(*tasks.Set)     {}

func TestSettings_RefusesWrongDeclarationsAllAtOnce(t *testing.T) {
	t.Parallel()
	_, err := settingsOrError(nil, new(shopTasks), nil, byValue{}, (*mailTasks)(nil), new(wrong), new(takenTasks), new(Twice))
	if err == nil {
		t.Fatal("nothing is refused")
	}
	same(t, strings.Split(err.Error(), "\n"), []string{
		"group 2 of 7 is nil",
		"cli.byValue: a group with settings must be a pointer to its struct, *cli.byValue",
		"*cli.mailTasks: a group with settings must not be a nil pointer",
		"*cli.wrong.Chan: a chan int can't be a setting; string, bool, numbers, time.Duration, []string and what has UnmarshalText can",
		"*cli.wrong.Pointer: a *int can't be a setting; string, bool, numbers, time.Duration, []string and what has UnmarshalText can",
		"*cli.wrong.Number: the tag default is not a whole number",
		"*cli.wrong.Secret: the tag default is not a whole number",
		`*cli.wrong.Two: the tag env:"WRONG_A,WRONG_B" is not the name of one variable: letters, digits, and _`,
		`*cli.wrong.Empty: the tag env:"" is not the name of one variable: letters, digits, and _`,
		"*cli.wrong.Slip: it has the tag help, default but no env, so it would not be a setting",
		"*cli.wrong.Must: the tag enum, required has no effect here; what a value must be is for the group's method Check",
		"*cli.wrong.Level: the tag default is not a valid slog.Level",
		"*cli.wrong.own: it has the tag env but is not exported, so it can't be set",
		"*cli.takenTasks.Queues: the variable WORKER_QUEUES is one of the program's own",
		"*cli.takenTasks.Burst: the flag --burst is one of the program's own",
		"*cli.takenTasks.Help: the flag --help is one of the program's own",
		"*cli.takenTasks.Redis: the flag --redis is one of the program's own",
		"*cli.takenTasks.Limit: the variable SHOP_LIMIT is taken by *cli.shopTasks.Limit",
		"*cli.takenTasks.Low: the flag --shop-limit is taken by *cli.shopTasks.Limit",
		"*cli.Twice.B: the variable TWICE is taken by *cli.Twice.A",
	})
}

// Twice has two fields with one variable.
type Twice struct {
	A string `env:"TWICE"`
	B string `env:"TWICE"`
}

func (*Twice) Register(*tasks.Set) {}

func TestSettings_GroupsWithoutSettingsAreFine(t *testing.T) {
	t.Parallel()
	s := settings(t, nil, plain(nil), withoutSettings{}, &withoutSettings{}, (*withoutSettings)(nil))
	noFaults(t, readAfter(t, s, "run"))
	noFaults(t, readAfter(t, settings(t, nil)))
}
