package cli

import (
	"bytes"
	"strings"
	"testing"

	"github.com/alecthomas/kong"
)

// serverSettings is a grammar whose settings are read by kong itself.
type serverSettings struct {
	Run struct {
		URL   string   `env:"CLI_TEST_URL,CLI_TEST_OLD_URL" help:"Where to."`
		Size  int      `env:"CLI_TEST_SIZE" default:"5" help:"Connections."`
		Names []string `env:"CLI_TEST_NAMES"`
		Log   string   `env:"CLI_TEST_LOG" enum:"json,text" default:"text"`
	} `cmd:"" default:"withargs"`
	Check struct {
		URL string `env:"CLI_TEST_URL" required:""`
	} `cmd:""`
}

func variables(m map[string]string) func(string) string {
	return func(name string) string { return m[name] }
}

func TestParser_TakesVariablesFromItsFunctionOnly(t *testing.T) {
	t.Setenv("CLI_TEST_URL", "of-the-process")
	t.Setenv("CLI_TEST_SIZE", "not a number")
	t.Setenv("CLI_TEST_LOG", "neither")
	for name, c := range map[string]struct {
		env  map[string]string
		args []string
		url  string
		size int
		log  string
	}{
		"nothing is set":                         {nil, nil, "", 5, "text"},
		"variables":                              {map[string]string{"CLI_TEST_URL": "a", "CLI_TEST_SIZE": "7", "CLI_TEST_LOG": "json"}, nil, "a", 7, "json"},
		"the second name of a setting":           {map[string]string{"CLI_TEST_OLD_URL": "b"}, nil, "b", 5, "text"},
		"a variable that is set to nothing":      {map[string]string{"CLI_TEST_URL": "", "CLI_TEST_OLD_URL": "b", "CLI_TEST_SIZE": ""}, nil, "b", 5, "text"},
		"a flag wins":                            {map[string]string{"CLI_TEST_URL": "a", "CLI_TEST_SIZE": "7"}, []string{"--url=c", "--size=9"}, "c", 9, "text"},
		"a flag wins over what is wrong with it": {map[string]string{"CLI_TEST_SIZE": "x"}, []string{"run", "--size=9"}, "", 9, "text"},
	} {
		t.Run(name, func(t *testing.T) {
			var grammar serverSettings
			parser, err := newParser(&grammar, variables(c.env), kong.Name("shop"))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := parser.Parse(c.args); err != nil {
				t.Fatal(err)
			}
			if got := grammar.Run; got.URL != c.url || got.Size != c.size || got.Log != c.log {
				t.Errorf("%+v", got)
			}
		})
	}
}

func TestParser_ChecksWhatVariablesHold(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		env  map[string]string
		args []string
		want string
	}{
		"a number":              {map[string]string{"CLI_TEST_SIZE": "x"}, nil, "--size"},
		"an enum":               {map[string]string{"CLI_TEST_LOG": "xml"}, nil, "--log must be one of"},
		"a required flag":       {nil, []string{"check"}, "missing flags: --url"},
		"a required flag given": {map[string]string{"CLI_TEST_URL": "a"}, []string{"check"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			parser, err := newParser(new(serverSettings), variables(c.env), kong.Name("shop"))
			if err != nil {
				t.Fatal(err)
			}
			_, err = parser.Parse(c.args)
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}

func TestParser_ShowsVariablesInHelp(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	parser, err := newParser(new(serverSettings), variables(nil), kong.Name("shop"), kong.Writers(&out, &out), kong.Exit(func(int) {}))
	if err != nil {
		t.Fatal(err)
	}
	_, _ = parser.Parse([]string{"run", "--help"})
	for _, want := range []string{"Where to ($CLI_TEST_URL, $CLI_TEST_OLD_URL).", "Connections ($CLI_TEST_SIZE).", "($CLI_TEST_NAMES)"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
}

func TestParser_RefusesAVariableForAnArgument(t *testing.T) {
	t.Parallel()
	var grammar struct {
		Kind string `arg:"" env:"CLI_TEST_KIND"`
	}
	if _, err := newParser(&grammar, variables(nil)); err == nil || !strings.Contains(err.Error(), "only a flag can") {
		t.Errorf("%v", err)
	}
}
