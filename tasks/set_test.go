package tasks_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hibiken/asynq"
	"pgregory.net/rapid"

	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/builtin"
	"github.com/carpool-go/carpool/tasks/maintenance"
)

// parcel has a field of every sort.
type parcel struct {
	To      string          `json:"to" doc:"who gets it" example:"Ada"`
	Count   int             `json:"count" example:"2"`
	Weight  float64         `json:"weight,omitempty"`
	Fragile bool            `json:"fragile,omitempty"`
	Tags    []string        `json:"tags,omitempty"`
	Extra   json.RawMessage `json:"extra,omitempty"`
	Due     *time.Time      `json:"due,omitempty"`
	Inside  struct {
		Size int `json:"size"`
	} `json:"inside,omitzero"`
}

func (parcel) Kind() string           { return "parcel:send" }
func (parcel) Options() tasks.Options { return tasks.Options{} }
func (p parcel) Validate() error {
	if p.To == "" {
		return errors.New("to: must not be empty")
	}
	return nil
}

func parcelTask(t testing.TB) *tasks.Task {
	t.Helper()
	set := new(tasks.Set)
	tasks.Register(set, func(context.Context, *tasks.Job, parcel) (string, error) { return "sent", nil })
	task, err := set.Lookup("parcel:send")
	if err != nil {
		t.Fatal(err)
	}
	return task
}

// bomb is a payload whose own code panics.
type bomb struct {
	Fuse string `json:"fuse"`
}

func (bomb) Kind() string           { return "bomb" }
func (bomb) Options() tasks.Options { return tasks.Options{} }
func (b bomb) Validate() error      { panic(b.Fuse) }

func TestTask_PayloadWhoseOwnCodePanicsIsRefusedWithThePlace(t *testing.T) {
	t.Parallel()
	set := new(tasks.Set)
	tasks.Register(set, func(context.Context, *tasks.Job, bomb) (any, error) { return nil, nil })
	task, err := set.Lookup("bomb")
	if err != nil {
		t.Fatal(err)
	}
	_, err = task.Decode([]byte(`{"fuse": "s3cret"}`))
	if _, ok := errors.AsType[*tasks.PayloadError](err); !ok || !errors.Is(err, asynq.SkipRetry) ||
		!strings.Contains(err.Error(), "bomb.Validate (set_test.go:") || strings.Contains(err.Error(), "s3cret") {
		t.Errorf("error %v; want a permanent one that names the place and not the content", err)
	}
}

func TestTask_ResultThatIsNotJSONInUTF8IsRefusedForGood(t *testing.T) {
	t.Parallel()
	for _, raw := range []string{"{", "", "\"\xff\""} {
		set := new(tasks.Set)
		tasks.Register(set, func(context.Context, *tasks.Job, parcel) (json.RawMessage, error) { return json.RawMessage(raw), nil })
		task, err := set.Lookup("parcel:send")
		if err != nil {
			t.Fatal(err)
		}
		if result, err := task.Run(t.Context(), &tasks.Job{}, parcel{}); !errors.Is(err, asynq.SkipRetry) {
			t.Errorf("%q: result %q, error %v; want a permanent one", raw, result, err)
		}
	}
}

func TestTask_DescribesItsPayload(t *testing.T) {
	t.Parallel()
	task := parcelTask(t)
	want := []tasks.Field{
		{Name: "to", Type: "string", Doc: "who gets it", Example: `"Ada"`},
		{Name: "count", Type: "integer", Example: "2"},
		{Name: "weight", Type: "number", Optional: true},
		{Name: "fragile", Type: "boolean", Optional: true},
		{Name: "tags", Type: "array", Optional: true},
		{Name: "extra", Type: "any JSON", Optional: true},
		{Name: "due", Type: "string", Optional: true},
		{Name: "inside", Type: "object", Optional: true},
	}
	if diff := cmp.Diff(want, task.Fields); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if got, want := task.Example(), `{"to": "Ada", "count": 2}`; got != want {
		t.Errorf("example %s, want %s", got, want)
	}
	defaults := tasks.Options{Queue: "default", MaxRetry: tasks.DefaultMaxRetry, Timeout: tasks.DefaultTimeout}
	if diff := cmp.Diff(defaults, task.Options); diff != "" {
		t.Errorf("options: (-want +got)\n%s", diff)
	}
}

func TestTask_DecodeNamesWhatIsWrongAndIsPermanent(t *testing.T) {
	t.Parallel()
	task := parcelTask(t)
	for data, want := range map[string]string{
		`{"to":"a","count":"three"}`:              "count: want integer, got string",
		`{"to":"a","count":1.5}`:                  "count: want integer, got number",
		`{"to":"a","inside":{"size":"x"}}`:        "inside.size: want integer, got string",
		`{"to":"a","inside":{"depth":1}}`:         `unknown field "depth": the fields are to, count, weight, fragile, tags, extra, due, inside`,
		`{"To":"a"}`:                              `unknown field "To": the fields are to, count, weight`,
		`{"to":"a","COUNT":1}`:                    `unknown field "COUNT": the fields are to,`,
		`{"to":"a","\u0043ount":1}`:               `unknown field "Count": the fields are to,`,
		"{\"to\":\"a\",\"tag\u017f\":[]}":         `unknown field "tagſ": the fields are to,`,
		`{"to":"a","count":1,"count":1}`:          "count: is there twice",
		"{\"to\" \n:\"a\", \"t\\u006f\"\t: \"\"}": "to: is there twice",
		`{"to":"a","extra":{"to":[1]},"to":""}`:   "to: is there twice",
		`{"to":"a","due":"yesterday"}`:            "it can't be decoded",
		"\ufeff{}":                                "it is not a JSON object",
		`{"to":"a"}x`:                             "there is something after the JSON object",
		`null`:                                    "it is not a JSON object",
		`{}`:                                      "to: must not be empty",
		`{"` + strings.Repeat("x", 300) + `":1`:   "",
	} {
		_, err := task.Decode([]byte(data))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60s: error %v, want %q in it", data, err, want)
			continue
		}
		if !tasks.IsPermanent(err) {
			t.Errorf("%.60s: the error is not permanent: %v", data, err)
		}
		if len(err.Error()) > 250 {
			t.Errorf("%.60s: the error has %d characters", data, len(err.Error()))
		}
	}
}

// labelled has fields of another struct, and one with the name that Go gives it.
type labelled struct {
	parcel
	Label string
}

func TestTask_DecodeTakesWhatIsMarshalledFromItsPayload(t *testing.T) {
	t.Parallel()
	set := new(tasks.Set)
	tasks.Register(set, func(context.Context, *tasks.Job, labelled) (any, error) { return nil, nil })
	task, err := set.Lookup("parcel:send")
	if err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(labelled{parcel: parcel{To: `"to":`, Count: 1, Extra: json.RawMessage(`{"to":1,"To":2,"label":3}`)}, Label: `\"Label\":`})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := task.Decode(data); err != nil {
		t.Errorf("%s: %v", data, err)
	}
	if _, err := task.Decode([]byte(`{"to":"a","label":""}`)); err == nil || !strings.Contains(err.Error(), `unknown field "label"`) {
		t.Errorf("a field in other letters than its own: %v", err)
	}
}

// Names are written in every way that JSON has, and there are names inside of values.
func TestTask_DecodeTakesEachFieldByItsExactNameOnce(t *testing.T) {
	t.Parallel()
	task := parcelTask(t)
	values := map[string]string{
		"to": `"to\\\",\"to\":"`, "tags": `["tags", "to\\", "{"]`, "extra": `{"to": 1, "To": {"tags": []}, "to\"": "}"}`, "fragile": "true", "inside": `{"size": 1}`,
	}
	rapid.Check(t, func(t *rapid.T) {
		var b strings.Builder
		blank := func() { b.WriteString(rapid.SampledFrom([]string{"", " ", "\n\t"}).Draw(t, "blank")) }
		want, seen := true, make(map[string]bool)
		b.WriteString(`{"count":1`)
		for _, name := range append([]string{"to"}, rapid.SliceOfN(rapid.SampledFrom(slices.Sorted(maps.Keys(values))), 0, 3).Draw(t, "names")...) {
			want = want && !seen[name]
			seen[name] = true
			value := values[name]
			if rapid.IntRange(0, 5).Draw(t, "letters") == 0 {
				name, want = strings.ToUpper(name[:1])+name[1:], false
			}
			if rapid.Bool().Draw(t, "escaped") {
				name = fmt.Sprintf(`\u%04x%s`, name[0], name[1:])
			}
			b.WriteString(",")
			blank()
			b.WriteString(`"` + name + `"`)
			blank()
			b.WriteString(":")
			blank()
			b.WriteString(value)
			blank()
		}
		b.WriteString("}")
		if _, err := task.Decode([]byte(b.String())); (err == nil) != want {
			t.Fatalf("%s: %v", b.String(), err)
		}
	})
}

func BenchmarkTask_Decode(b *testing.B) {
	task := parcelTask(b)
	for name, data := range map[string]string{
		"small": `{"to":"Ada","count":2,"weight":1.5,"tags":["a","b"],"extra":{"a":[1,2,3]}}`,
		"large": `{"to":"` + strings.Repeat("x", 500_000) + `","tags":["` + strings.Repeat(`","`, 100_000) + `"]}`,
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := task.Decode([]byte(data)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func FuzzTask_DecodeNeverPanicsAndNeverShowsValues(f *testing.F) {
	task := parcelTask(f)
	for _, seed := range []string{`{"to":"s3cr3t"}`, `{"to":"s3cr3t","to":"s3cr3t"}`, `{"To":"\"s3cr3t\\"}`, `{"to":"s3cr3t","count":"s3cr3t"}`, `{"to":["s3cr3t"]}`, `{`, ``, `{"to":"s3cr3t"}}`} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, data string) {
		// A key may be named, so the secret is only looked for among the values.
		if strings.Contains(data, `s3cr3t":`) {
			return
		}
		_, err := task.Decode([]byte(data))
		if err != nil && strings.Contains(err.Error(), "s3cr3t") && !strings.Contains(err.Error(), "unknown field") {
			t.Errorf("the error shows a value: %v", err)
		}
	})
}

func TestSet_UnknownKindNamesTheKnownOnes(t *testing.T) {
	t.Parallel()
	set, err := tasks.NewSet(new(builtin.Tasks), new(maintenance.Tasks))
	if err != nil {
		t.Fatal(err)
	}
	_, err = set.Lookup("csv:imprt")
	want := `unknown kind "csv:imprt": this worker knows carpool:prune, csv:import, pool:validate, rows:prune, webhook:deliver`
	if !errors.Is(err, tasks.ErrUnknownKind) || !tasks.IsPermanent(err) || err.Error() != want {
		t.Errorf("error %q, want %q", err, want)
	}
}

func TestPermanent_SurvivesWrappingAndKeepsTheText(t *testing.T) {
	t.Parallel()
	cause := errors.New("no such table")
	err := tasks.Permanent(cause)
	if !tasks.IsPermanent(err) || !errors.Is(err, cause) || err.Error() != "no such table" {
		t.Errorf("Permanent: %v", err)
	}
	if tasks.Permanent(nil) != nil || tasks.RetryAfter(time.Second, nil) != nil || tasks.IsPermanent(cause) {
		t.Error("nil, or an ordinary error, counts as one of ours")
	}
}
