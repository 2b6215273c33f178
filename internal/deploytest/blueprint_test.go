package deploytest

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.yaml.in/yaml/v3"
)

// blueprint is what our render.yaml makes use of. What it knows nothing of is
// taken for a typing error, also where Render's schema is silent, as it is within
// scaling.
type blueprint struct {
	Services  []service  `yaml:"services"`
	Databases []database `yaml:"databases"`
}

type service struct {
	Type                    string   `yaml:"type"`
	Name                    string   `yaml:"name"`
	Region                  string   `yaml:"region"`
	Plan                    string   `yaml:"plan"`
	Runtime                 string   `yaml:"runtime"`
	DockerfilePath          string   `yaml:"dockerfilePath"`
	DockerCommand           string   `yaml:"dockerCommand"`
	PreDeployCommand        string   `yaml:"preDeployCommand"`
	HealthCheckPath         string   `yaml:"healthCheckPath"`
	MaxShutdownDelaySeconds int      `yaml:"maxShutdownDelaySeconds"`
	NumInstances            int      `yaml:"numInstances"`
	Scaling                 *scaling `yaml:"scaling"`
	EnvVars                 []envVar `yaml:"envVars"`
	// Of a Key Value store.
	MaxmemoryPolicy string       `yaml:"maxmemoryPolicy"`
	PersistenceMode string       `yaml:"persistenceMode"`
	IPAllowList     *[]yaml.Node `yaml:"ipAllowList"`
}

type scaling struct {
	MinInstances        int `yaml:"minInstances"`
	MaxInstances        int `yaml:"maxInstances"`
	TargetCPUPercent    int `yaml:"targetCPUPercent"`
	TargetMemoryPercent int `yaml:"targetMemoryPercent"`
}

type envVar struct {
	Key           string     `yaml:"key"`
	Value         yaml.Node  `yaml:"value"`
	GenerateValue bool       `yaml:"generateValue"`
	Sync          *bool      `yaml:"sync"`
	FromDatabase  *reference `yaml:"fromDatabase"`
	FromService   *reference `yaml:"fromService"`
}

type reference struct {
	Type     string `yaml:"type"`
	Name     string `yaml:"name"`
	Property string `yaml:"property"`
}

type database struct {
	Name                 string       `yaml:"name"`
	Region               string       `yaml:"region"`
	Plan                 string       `yaml:"plan"`
	PostgresMajorVersion yaml.Node    `yaml:"postgresMajorVersion"`
	DatabaseName         string       `yaml:"databaseName"`
	User                 string       `yaml:"user"`
	IPAllowList          *[]yaml.Node `yaml:"ipAllowList"`
}

func parseBlueprint(data string) (blueprint, error) {
	var b blueprint
	dec := yaml.NewDecoder(strings.NewReader(data))
	dec.KnownFields(true)
	return b, dec.Decode(&b)
}

// checkBlueprint returns all that is wrong with the render.yaml of a program's repository.
func checkBlueprint(t testing.TB, p program, data string) (faults []string) {
	t.Helper()
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	b, err := parseBlueprint(data)
	if err != nil {
		return []string{err.Error()}
	}
	names, regions := make(map[string]string), make(map[string]bool)
	name := func(kind, name string) {
		if name == "" || names[name] != "" {
			fault("the name %q is missing or not the only one", name)
		}
		names[name] = kind
	}
	for _, s := range b.Services {
		name(s.Type, s.Name)
		regions[s.Region] = true
	}
	for _, d := range b.Databases {
		name("database", d.Name)
		regions[d.Region] = true
		if d.Plan == "" || d.Plan == "free" {
			fault("%s: the plan %q won't do; a free database ends after 30 days", d.Name, d.Plan)
		}
		if d.IPAllowList == nil || len(*d.IPAllowList) > 0 {
			fault("%s: ipAllowList must be []; left out, it is open to all", d.Name)
		}
		if d.PostgresMajorVersion.Tag != "!!str" {
			fault("%s: postgresMajorVersion must be a string", d.Name)
		}
	}
	if len(regions) != 1 || regions[""] {
		fault("the regions are not the same everywhere")
	}
	workers := 0
	for _, s := range b.Services {
		switch s.Type {
		case "worker":
			workers++
			for _, f := range checkWorker(t, p, s, names) {
				fault("%s: %s", s.Name, f)
			}
		case "keyvalue":
			if s.MaxmemoryPolicy != "noeviction" {
				fault("%s: maxmemoryPolicy is %q; keys that are evicted are jobs lost", s.Name, s.MaxmemoryPolicy)
			}
			if s.Plan == "" || s.Plan == "free" || s.PersistenceMode == "off" {
				fault("%s: what it holds must survive a restart: the plan is %q, persistenceMode %q", s.Name, s.Plan, s.PersistenceMode)
			}
			if s.IPAllowList == nil || len(*s.IPAllowList) > 0 {
				fault("%s: ipAllowList must be []", s.Name)
			}
		default:
			fault("%s: what is a %q?", s.Name, s.Type)
		}
	}
	if workers == 0 {
		fault("there is no worker")
	}
	return faults
}

func checkWorker(t testing.TB, p program, s service, kinds map[string]string) (faults []string) {
	t.Helper()
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	if s.Plan == "" || s.Plan == "free" {
		fault("the plan is %q; workers have no free one", s.Plan)
	}
	if s.HealthCheckPath != "" {
		fault("healthCheckPath: nobody can reach a worker")
	}
	if s.Runtime != "docker" {
		fault("the runtime is %q; Go's can't be pinned to a version", s.Runtime)
	}
	if _, err := os.Stat(filepath.Join(root, p.dir, s.DockerfilePath)); s.DockerfilePath == "" || err != nil {
		fault("dockerfilePath %q: %v", s.DockerfilePath, err)
	}
	if migrate := p.program + " migrate"; s.PreDeployCommand != migrate {
		fault("preDeployCommand is %q; without %s, a new version finds an old database", s.PreDeployCommand, migrate)
	}
	for _, command := range []string{s.PreDeployCommand, s.DockerCommand} {
		if command == "" {
			continue
		}
		if f := checkCommand(p, strings.Fields(command)); f != "" {
			fault("%s", f)
		}
	}

	var keys []string
	values := make(map[string]string)
	for _, v := range s.EnvVars {
		keys = append(keys, v.Key)
		for _, f := range checkEnvVar(v, kinds) {
			fault("%s: %s", v.Key, f)
		}
		if !v.Value.IsZero() {
			values[v.Key] = v.Value.Value
		}
	}
	for _, f := range checkSettings(p.commands["run"], keys, "DATABASE_URL", "REDIS_URL") {
		fault("%s", f)
	}

	delay := time.Duration(s.MaxShutdownDelaySeconds) * time.Second
	if needs := stopsWithin(t, p.commands["run"], values["WORKER_SHUTDOWN_TIMEOUT"]); delay <= needs || s.MaxShutdownDelaySeconds > 300 {
		fault("maxShutdownDelaySeconds is %d, but must be above %s and at most 300", s.MaxShutdownDelaySeconds, needs)
	}
	// A deploy runs the old and the new instances side by side; databases below
	// 8 GB take 100 connections, and some are for others.
	const mostConnections = 90
	instances := max(1, s.NumInstances)
	if s.Scaling != nil {
		instances = max(instances, s.Scaling.MaxInstances)
	}
	each := 0
	for _, name := range []string{"DB_POOL_SIZE", "DB_MAX_OVERFLOW"} {
		value, ok := values[name]
		if !ok {
			value = p.commands["run"][name]
		}
		n, err := strconv.Atoi(value)
		if err != nil {
			fault("%s: %v", name, err)
		}
		each += n
	}
	if taken := 2 * instances * each; taken > mostConnections {
		fault("a deploy takes %d connections, which is more than %d", taken, mostConnections)
	}
	return faults
}

func checkEnvVar(v envVar, kinds map[string]string) (faults []string) {
	sources := 0
	for _, given := range []bool{!v.Value.IsZero(), v.GenerateValue, v.Sync != nil, v.FromDatabase != nil, v.FromService != nil} {
		if given {
			sources++
		}
	}
	if sources != 1 {
		faults = append(faults, fmt.Sprintf("it has %d sources of its value, not one", sources))
	}
	if v.Sync != nil && *v.Sync {
		faults = append(faults, "sync: true means nothing")
	}
	if !v.Value.IsZero() && v.Value.Tag != "!!str" && v.Value.Tag != "!!int" && v.Value.Tag != "!!float" {
		faults = append(faults, "its value must be a string or a number; quote it")
	}
	if r := v.FromDatabase; r != nil && (kinds[r.Name] != "database" || r.Type != "") {
		faults = append(faults, fmt.Sprintf("there is no database %q", r.Name))
	}
	if r := v.FromService; r != nil && (kinds[r.Name] == "database" || kinds[r.Name] != r.Type) {
		faults = append(faults, fmt.Sprintf("there is no %s %q", r.Type, r.Name))
	}
	for _, r := range []*reference{v.FromDatabase, v.FromService} {
		if r != nil && strings.HasSuffix(v.Key, "_URL") && r.Property != "connectionString" {
			faults = append(faults, fmt.Sprintf("%s is no URL", r.Property))
		}
	}
	return faults
}

func TestBlueprint_HoldsTogether(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, p program) {
		for _, f := range checkBlueprint(t, p, p.read(t, "render.yaml")) {
			t.Error("render.yaml:", f)
		}
	})
}

func TestBlueprint_IsAcceptedByTheWorker(t *testing.T) {
	t.Parallel()
	each(t, blueprintIsAccepted)
}

func blueprintIsAccepted(t *testing.T, p program) {
	b, err := parseBlueprint(p.read(t, "render.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range b.Services {
		if s.Type != "worker" {
			continue
		}
		var settings []string
		for _, v := range s.EnvVars {
			// In Render's forms.
			value := ""
			switch {
			case v.FromDatabase != nil:
				value = "postgresql://carpool:pa55word@dpg-abc123-a/carpool"
			case v.FromService != nil:
				value = "redis://red-abc123:6379"
			case v.GenerateValue:
				value = base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{0xfb}, 32))
			case !v.Value.IsZero():
				value = v.Value.Value
			}
			settings = append(settings, v.Key+"="+value)
		}
		p.accepts(t, settings)
	}
}

// Each is a fault that Render or a deploy would answer with an error, or, worse, not at all.
func TestBlueprint_FaultsAreFound(t *testing.T) {
	t.Parallel()
	worker := theWorker(t)
	good := worker.read(t, "render.yaml")
	for _, tc := range []struct{ old, new, want string }{
		{"plan: starter # the smallest; workers have no free plan", "plan: free", "workers have no free one"},
		{"plan: starter # the smallest; workers have no free plan", "", "workers have no free one"},
		{"runtime: docker\n", "runtime: docker\n    healthCheckPath: /\n", "nobody can reach a worker"},
		{"runtime: docker\n", "runtime: docker\n    scaling:\n      minInstance: 1\n", "field minInstance not found"},
		{"runtime: docker\n", "runtime: docker\n    scaling:\n      maxInstances: 5\n", "a deploy takes 100 connections"},
		{"runtime: docker\n", "runtime: docker\n    numInstances: 5\n", "a deploy takes 100 connections"},
		{"runtime: docker\n", "runtime: go\n", `the runtime is "go"`},
		{"runtime: docker\n", "runtime: docker\n    dockerCommand: worker serve\n", `"worker serve" is no command`},
		{"runtime: docker\n", "runtime: docker\n    dockerCommand: python -m worker\n", `"python" is no program of the image`},
		{"dockerfilePath: ./Dockerfile", "dockerfilePath: ./docker/Dockerfile", "dockerfilePath"},
		{"preDeployCommand: worker migrate", "preDeployCommand: worker migrat", `"worker migrat" is no command`},
		{"preDeployCommand: worker migrate", "", "without worker migrate"},
		{"maxShutdownDelaySeconds: 60", "maxShutdownDelaySeconds: 30", "must be above 32s"},
		{"maxShutdownDelaySeconds: 60", "", "must be above 32s"},
		{"maxShutdownDelaySeconds: 60", "maxShutdownDelaySeconds: 301", "at most 300"},
		{"- key: LOG_LEVEL\n        value: info", "- key: WORKER_SHUTDOWN_TIMEOUT\n        value: 2m", "must be above 2m7s"},
		{"- key: LOG_LEVEL\n        value: info", "- key: DB_POOL_SIZE\n        value: 50", "a deploy takes 110 connections"},
		{"- key: LOG_LEVEL", "- key: LOGLEVEL", "LOGLEVEL is no setting"},
		{"- key: LOG_LEVEL\n        value: info", "- key: DB_ECHO\n        value: true", "quote it"},
		{"generateValue: true", "generateValue: true\n        value: s3cret", "2 sources"},
		{"generateValue: true", "sync: true", "means nothing"},
		{"generateValue: true", "", "0 sources"},
		{"- key: DATABASE_URL", "- key: DB_POOL_SIZE", "DATABASE_URL is not set"},
		{"- key: REDIS_URL", "- key: IMPORT_DIR", "REDIS_URL is not set"},
		{"          name: carpool-postgres\n", "          name: carpool-postgre\n", `there is no database "carpool-postgre"`},
		{"property: connectionString\n      - key: REDIS", "property: host\n      - key: REDIS", "host is no URL"},
		{"type: keyvalue\n          name", "type: redis\n          name", `there is no redis "carpool-redis"`},
		{"          name: carpool-redis\n", "          name: carpool-postgres\n", `there is no keyvalue "carpool-postgres"`},
		{"name: carpool-redis\n    region: oregon", "name: carpool-redis\n    region: ohio", "regions are not the same"},
		{"  - type: keyvalue\n    name: carpool-redis\n", "  - type: keyvalue\n    name: carpool-worker\n", "not the only one"},
		{"plan: starter # the free plan", "plan: free #", "must survive a restart"},
		{"maxmemoryPolicy: noeviction", "maxmemoryPolicy: allkeys-lru", "jobs lost"},
		{"persistenceMode: journal-snapshot", "persistenceMode: off", "must survive a restart"},
		{"    ipAllowList: [] # reached", "    #", "ipAllowList must be []"},
		{"    ipAllowList: [] # reached", "    ipAllowList: [{source: 0.0.0.0/0}] #", "ipAllowList must be []"},
		{`    user: carpool` + "\n    ipAllowList: []", "    user: carpool", "open to all"},
		{`postgresMajorVersion: "17"`, "postgresMajorVersion: 17", "must be a string"},
		{"plan: basic-256mb", "plan: free", "ends after 30 days"},
		{"- type: worker", "- type: web", `what is a "web"?`},
		{"databases:", "database:", "field database not found"},
	} {
		if strings.Count(good, tc.old) != 1 {
			t.Errorf("render.yaml has %q %d times; change this test with it", tc.old, strings.Count(good, tc.old))
			continue
		}
		faults := strings.Join(checkBlueprint(t, worker, strings.Replace(good, tc.old, tc.new, 1)), "\n")
		if !strings.Contains(faults, tc.want) {
			t.Errorf("%q for %q: %q is not among the faults found:\n%s", tc.new, tc.old, tc.want, faults)
		}
	}
}

// The rules know the user's program and its settings.
func TestBlueprint_FaultsOfAUsersAreFound(t *testing.T) {
	t.Parallel()
	shop := programOf(t, own)
	good := shop.read(t, "render.yaml")
	for _, tc := range []struct{ old, new, want string }{
		{"preDeployCommand: shop migrate", "preDeployCommand: worker migrate", `"worker" is no program of the image`},
		{"- key: SHOP_TAX_PERCENT", "- key: SHOP_TAX", "SHOP_TAX is no setting"},
		{"dockerfilePath: ./Dockerfile", "dockerfilePath: ./examples/own/Dockerfile", "dockerfilePath"},
	} {
		if strings.Count(good, tc.old) != 1 {
			t.Errorf("render.yaml has %q %d times; change this test with it", tc.old, strings.Count(good, tc.old))
			continue
		}
		faults := strings.Join(checkBlueprint(t, shop, strings.Replace(good, tc.old, tc.new, 1)), "\n")
		if !strings.Contains(faults, tc.want) {
			t.Errorf("%q for %q: %q is not among the faults found:\n%s", tc.new, tc.old, tc.want, faults)
		}
	}
}

// Render publishes the schema; it is not ours to keep in this repository.
// RENDER_SCHEMA is the path of a copy; without it, one in ../shared/data beside
// the repository is looked for.
func TestBlueprint_FollowsRendersSchema(t *testing.T) {
	t.Parallel()
	path := os.Getenv("RENDER_SCHEMA")
	if path == "" {
		path = filepath.Join(root, "..", "shared", "data", "render.schema.json")
		if _, err := os.Stat(path); err != nil {
			t.Log("there is no copy of Render's schema (set RENDER_SCHEMA to its path), so the other tests' checks must do")
			return
		}
	}
	schema, err := jsonschema.NewCompiler().Compile(path)
	if err != nil {
		t.Fatal(err)
	}
	each(t, func(t *testing.T, p program) { followsSchema(t, schema, p.read(t, "render.yaml")) })
}

func followsSchema(t *testing.T, schema *jsonschema.Schema, good string) {
	if err := schema.Validate(asJSON(t, good)); err != nil {
		t.Errorf("render.yaml: %v", err)
	}
	// That it is a schema which says no.
	for _, bad := range []string{
		strings.Replace(good, "runtime: docker", "runtime: dockr", 1),
		strings.Replace(good, "dockerfilePath:", "dockerFilePath:", 1),
		strings.Replace(good, "region: oregon", "region: mars", 1),
		regexp.MustCompile(`(?m)^    ipAllowList:.*\n`).ReplaceAllString(good, ""),
	} {
		if schema.Validate(asJSON(t, bad)) == nil {
			t.Errorf("the schema accepts:\n%s", bad)
		}
	}
}

// Where there is no schema, this looks up the values that it has lists of.
func TestBlueprint_ValuesAreOnesOfRenders(t *testing.T) {
	t.Parallel()
	each(t, valuesAreRenders)
}

func valuesAreRenders(t *testing.T, p program) {
	b, err := parseBlueprint(p.read(t, "render.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	regions := regexp.MustCompile(`^(oregon|ohio|virginia|frankfurt|singapore)$`)
	for _, s := range b.Services {
		if !regions.MatchString(s.Region) {
			t.Errorf("%s: region %q", s.Name, s.Region)
		}
		if !regexp.MustCompile(`^(starter|standard|pro|pro (plus|max|ultra))$`).MatchString(s.Plan) {
			t.Errorf("%s: plan %q", s.Name, s.Plan)
		}
		if s.Type == "keyvalue" && s.PersistenceMode != "" && !regexp.MustCompile(`^(journal-snapshot|snapshot|off)$`).MatchString(s.PersistenceMode) {
			t.Errorf("%s: persistenceMode %q", s.Name, s.PersistenceMode)
		}
	}
	for _, d := range b.Databases {
		if !regions.MatchString(d.Region) || !regexp.MustCompile(`^(basic|pro|accelerated)-\d+(mb|gb)$`).MatchString(d.Plan) {
			t.Errorf("%s: region %q, plan %q", d.Name, d.Region, d.Plan)
		}
	}
}

// asJSON is YAML as the schema's checker takes it.
func asJSON(t *testing.T, data string) any {
	t.Helper()
	var v any
	if err := yaml.Unmarshal([]byte(data), &v); err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return doc
}
