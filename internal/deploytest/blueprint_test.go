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

	"github.com/carpool-go/carpool/monitor"
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
	NumInstances            *int     `yaml:"numInstances"`
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
	workers, monitors := 0, 0
	for _, s := range b.Services {
		if s.NumInstances != nil || s.Scaling != nil {
			fault("%s: a number of instances that is named here is set back to it by each sync", s.Name)
		}
		switch s.Type {
		case "worker":
			workers++
			for _, f := range checkWorker(t, p, s, names) {
				fault("%s: %s", s.Name, f)
			}
		case "web":
			monitors++
			for _, f := range checkMonitor(p, s, names) {
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
	if monitors != 1 {
		fault("there are %d monitors", monitors)
	}
	return faults
}

// checkDocker checks what services have in common that run the image: how it is built, and
// their variables, which are those of a command. It returns the values that are given.
func checkDocker(p program, s service, kinds map[string]string, command string, required ...string) (values map[string]string, faults []string) {
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	if s.Runtime != "docker" {
		fault("the runtime is %q; Go's can't be pinned to a version", s.Runtime)
	}
	if _, err := os.Stat(filepath.Join(root, p.dir, s.DockerfilePath)); s.DockerfilePath == "" || err != nil {
		fault("dockerfilePath %q: %v", s.DockerfilePath, err)
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
	values = make(map[string]string)
	for _, v := range s.EnvVars {
		for _, f := range checkEnvVar(v, kinds) {
			fault("%s: %s", v.Key, f)
		}
		if !v.Value.IsZero() {
			values[v.Key] = v.Value.Value
		}
		if v.Key != "PORT" { // is Render's
			keys = append(keys, v.Key)
		}
	}
	return values, append(faults, checkSettings(p.commands[command], keys, required...)...)
}

// checkMonitor checks the web service.
func checkMonitor(p program, s service, kinds map[string]string) (faults []string) {
	values, faults := checkDocker(p, s, kinds, "monitor", "REDIS_URL", "MONITOR_ADDR", "MONITOR_PASSWORD")
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	if s.Plan != "free" && s.Plan != "starter" {
		fault("the plan is %q; a monitor needs no larger one than starter", s.Plan)
	}
	if want := p.program + " monitor"; s.DockerCommand != want {
		fault("dockerCommand is %q; without %s, it is a worker", s.DockerCommand, want)
	}
	if s.HealthCheckPath != monitor.HealthPath {
		fault("healthCheckPath is %q; only %s needs no login", s.HealthCheckPath, monitor.HealthPath)
	}
	if s.PreDeployCommand != "" || s.MaxShutdownDelaySeconds != 0 {
		fault("preDeployCommand and maxShutdownDelaySeconds are the worker's")
	}
	// Render sends requests to PORT, and reaches no address of the container's own.
	if addr := values["MONITOR_ADDR"]; values["PORT"] == "" || addr != "0.0.0.0:"+values["PORT"] {
		fault("MONITOR_ADDR is %q, where Render does not reach it: PORT is %q", addr, values["PORT"])
	}
	for _, v := range s.EnvVars {
		if v.Key == "MONITOR_PASSWORD" && !v.GenerateValue {
			fault("MONITOR_PASSWORD: let Render generate it; what is in the repository is no secret")
		}
	}
	return faults
}

func checkWorker(t testing.TB, p program, s service, kinds map[string]string) (faults []string) {
	t.Helper()
	values, faults := checkDocker(p, s, kinds, "run", "DATABASE_URL", "REDIS_URL")
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	if s.Plan == "" || s.Plan == "free" {
		fault("the plan is %q; workers have no free one", s.Plan)
	}
	if s.HealthCheckPath != "" {
		fault("healthCheckPath: nobody can reach a worker")
	}
	if migrate := p.program + " migrate"; s.PreDeployCommand != migrate {
		fault("preDeployCommand is %q; without %s, a new version finds an old database", s.PreDeployCommand, migrate)
	}
	delay := time.Duration(s.MaxShutdownDelaySeconds) * time.Second
	if needs := stopsWithin(t, p.commands["run"], values["WORKER_SHUTDOWN_TIMEOUT"]); delay <= needs || s.MaxShutdownDelaySeconds > 300 {
		fault("maxShutdownDelaySeconds is %d, but must be above %s and at most 300", s.MaxShutdownDelaySeconds, needs)
	}
	// A deploy runs the old and the new instances side by side; databases below
	// 8 GB take 100 connections, and some are for others.
	const mostConnections = 90
	each := 1 // the outbox's
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
	if taken := 2 * each; taken > mostConnections {
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
		command := map[string]string{"worker": "config", "web": "monitor"}[s.Type]
		if command == "" {
			continue
		}
		settings := s.environment("postgresql://carpool:pa55word@dpg-abc123-a/carpool", "redis://red-abc123:6379") // in Render's forms
		if command == "monitor" {
			p.startsMonitor(t, settings)
			continue
		}
		p.accepts(t, settings)
	}
}

// environment are the service's variables, as NAME=value, where Postgres and Redis have these
// URLs. What Render generates is of its form.
func (s service) environment(databaseURL, redisURL string) (env []string) {
	for _, v := range s.EnvVars {
		value := v.Value.Value
		switch {
		case v.FromDatabase != nil:
			value = databaseURL
		case v.FromService != nil:
			value = redisURL
		case v.GenerateValue:
			value = generated
		}
		env = append(env, v.Key+"="+value)
	}
	return env
}

// generated is what Render might generate: base64 of 32 bytes.
var generated = base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{0xfb}, 32))

// Each is a fault that Render or a deploy would answer with an error, or, worse, not at all.
func TestBlueprint_FaultsAreFound(t *testing.T) {
	t.Parallel()
	worker := theWorker(t)
	good := worker.read(t, "render.yaml")
	for _, tc := range []struct{ old, new, want string }{
		{"plan: starter # the smallest; workers have no free plan", "plan: free", "workers have no free one"},
		{"plan: starter # the smallest; workers have no free plan", "", "workers have no free one"},
		{"    preDeployCommand:", "    healthCheckPath: /\n    preDeployCommand:", "nobody can reach a worker"},
		{"    preDeployCommand:", "    scaling:\n      minInstance: 1\n    preDeployCommand:", "field minInstance not found"},
		{"    preDeployCommand:", "    scaling:\n      maxInstances: 5\n    preDeployCommand:", "set back to it by each sync"},
		{"    preDeployCommand:", "    numInstances: 1\n    preDeployCommand:", "carpool-worker: a number of instances"},
		{"    dockerCommand:", "    numInstances: 2\n    dockerCommand:", "carpool-monitor: a number of instances"},
		{"runtime: docker\n    dockerfilePath: ./Dockerfile\n    pre", "runtime: go\n    dockerfilePath: ./Dockerfile\n    pre", `carpool-worker: the runtime is "go"`},
		{"    preDeployCommand:", "    dockerCommand: worker serve\n    preDeployCommand:", `"worker serve" is no command`},
		{"    preDeployCommand:", "    dockerCommand: python -m worker\n    preDeployCommand:", `"python" is no program of the image`},
		{"dockerfilePath: ./Dockerfile\n    pre", "dockerfilePath: ./docker/Dockerfile\n    pre", "dockerfilePath"},
		{"dockerCommand: worker monitor", "dockerCommand: worker run", "without worker monitor, it is a worker"},
		{"    dockerCommand: worker monitor\n", "", "without worker monitor, it is a worker"},
		{"healthCheckPath: /healthz", "healthCheckPath: /", "only /healthz needs no login"},
		{"    healthCheckPath: /healthz", "    #", "only /healthz needs no login"},
		{"plan: free", "plan: standard", "needs no larger one than starter"},
		{"value: 0.0.0.0:10000", "value: 0.0.0.0:8080", "Render does not reach it"},
		{"value: 0.0.0.0:10000", "value: 127.0.0.1:10000", "Render does not reach it"},
		{"value: 10000", "value: 10001", "Render does not reach it"},
		{"- key: MONITOR_PASSWORD", "- key: MONITOR_USER", "MONITOR_PASSWORD is not set"},
		{"- key: MONITOR_PASSWORD # of the user carpool; see the service's page Environment\n        generateValue: true", "- key: MONITOR_PASSWORD\n        value: carpool", "no secret"},
		{"preDeployCommand: worker migrate", "preDeployCommand: worker migrat", `"worker migrat" is no command`},
		{"preDeployCommand: worker migrate", "", "without worker migrate"},
		{"maxShutdownDelaySeconds: 60", "maxShutdownDelaySeconds: 30", "must be above 32s"},
		{"maxShutdownDelaySeconds: 60", "", "must be above 32s"},
		{"maxShutdownDelaySeconds: 60", "maxShutdownDelaySeconds: 301", "at most 300"},
		{"- key: LOG_LEVEL\n        value: info", "- key: WORKER_SHUTDOWN_TIMEOUT\n        value: 2m", "must be above 2m7s"},
		{"- key: LOG_LEVEL\n        value: info", "- key: DB_POOL_SIZE\n        value: 50", "a deploy takes 112 connections"},
		{"- key: LOG_LEVEL", "- key: LOGLEVEL", "LOGLEVEL is no setting"},
		{"- key: LOG_LEVEL\n        value: info", "- key: DB_ECHO\n        value: true", "quote it"},
		{"generateValue: true # base64", "generateValue: true\n        value: s3cret #", "2 sources"},
		{"generateValue: true # base64", "sync: true #", "means nothing"},
		{"generateValue: true # base64", "#", "0 sources"},
		{"- key: DATABASE_URL", "- key: DB_POOL_SIZE", "DATABASE_URL is not set"},
		{"property: connectionString\n      - key: REDIS_URL", "property: connectionString\n      - key: IMPORT_DIR", "REDIS_URL is not set"},
		{"          name: carpool-postgres\n", "          name: carpool-postgre\n", `there is no database "carpool-postgre"`},
		{"property: connectionString\n      - key: REDIS", "property: host\n      - key: REDIS", "host is no URL"},
		{"type: keyvalue\n          name: carpool-redis\n          property: connectionString\n      - key: WEBHOOK", "type: redis\n          name: carpool-redis\n          property: connectionString\n      - key: WEBHOOK", `there is no redis "carpool-redis"`},
		{"name: carpool-redis\n          property: connectionString\n      - key: WEBHOOK", "name: carpool-postgres\n          property: connectionString\n      - key: WEBHOOK", `there is no keyvalue "carpool-postgres"`},
		{"name: carpool-redis\n    region: oregon", "name: carpool-redis\n    region: ohio", "regions are not the same"},
		{"  - type: keyvalue\n    name: carpool-redis\n", "  - type: keyvalue\n    name: carpool-worker\n", "not the only one"},
		{"plan: starter # the free plan", "plan: free #", "carpool-redis: what it holds must survive a restart"},
		{"maxmemoryPolicy: noeviction", "maxmemoryPolicy: allkeys-lru", "jobs lost"},
		{"persistenceMode: journal-snapshot", "persistenceMode: off", "must survive a restart"},
		{"    ipAllowList: [] # reached", "    #", "ipAllowList must be []"},
		{"    ipAllowList: [] # reached", "    ipAllowList: [{source: 0.0.0.0/0}] #", "ipAllowList must be []"},
		{`    user: carpool` + "\n    ipAllowList: []", "    user: carpool", "open to all"},
		{`postgresMajorVersion: "17"`, "postgresMajorVersion: 17", "must be a string"},
		{"plan: basic-256mb", "plan: free", "ends after 30 days"},
		{"- type: worker", "- type: pserv", `what is a "pserv"?`},
		{"- type: web", "- type: worker", "there are 0 monitors"},
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
		{"dockerfilePath: ./Dockerfile\n    pre", "dockerfilePath: ./examples/own/Dockerfile\n    pre", "dockerfilePath"},
		{"dockerCommand: shop monitor", "dockerCommand: worker monitor", `"worker" is no program of the image`},
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
		strings.Replace(good, "healthCheckPath:", "healthcheckPath:", 1),
		strings.Replace(good, "type: web", "type: webservice", 1),
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
		if !regexp.MustCompile(`^(starter|standard|pro|pro (plus|max|ultra))$`).MatchString(s.Plan) && (s.Type != "web" || s.Plan != "free") {
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
