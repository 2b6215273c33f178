package tasks

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/carpool-go/carpool/internal/instance"
	"github.com/carpool-go/carpool/internal/limit"
)

// Set holds the kinds of job that a worker can run. The zero value is empty and
// ready for [Register]. It is complete before a worker uses it, and only read from then
// on, by several goroutines at once.
type Set struct {
	byKind map[string]*Task
}

// Group has kinds of job that belong together, and the settings they need.
//
// A group that is a pointer to a struct has its settings in the struct's fields, and its
// handlers are methods of the pointer, so that they see them. Package worker/cli makes a
// variable of the environment, and a flag, of each exported field with the tag env:
//
//	type Tasks struct {
//		Limit  int    `env:"SHOP_LIMIT" default:"10" help:"Orders at once."`
//		Secret string `env:"SHOP_SECRET" secret:"" help:"Orders are signed with this."`
//	}
//
// What a field holds when the program starts is the default, and wins over the tag
// default. The tag secret keeps a value out of flags and of what is printed.
//
// A group may have three more methods, which are called if they are there: Check() error
// says what is wrong with the settings before anything starts, every fault at once, joined
// by [errors.Join]; Start(context.Context) error and Stop() are called around a worker's
// run.
type Group interface {
	// Register adds the group's kinds to s, each by [Register], [RegisterTx] or
	// [RegisterOnce]. It is called before any setting is known.
	Register(s *Set)
}

// NewSet returns the set of the groups' kinds. The error is what [Register] panics with,
// or says which group is nil. Package worker makes its set with its function Kinds, which
// adds the kinds that every worker has.
func NewSet(groups ...Group) (s *Set, err error) {
	defer func() {
		switch p := recover().(type) {
		case nil:
		case registerError:
			s, err = nil, p
		default:
			panic(p)
		}
	}()
	s = new(Set)
	for i, g := range groups {
		if g == nil {
			return nil, fmt.Errorf("tasks: group %d of %d is nil", i+1, len(groups))
		}
		g.Register(s)
	}
	return s, nil
}

// registerError is what [Register] panics with.
type registerError string

func (e registerError) Error() string { return string(e) }

// Task is one registered kind of job. A worker runs jobs with it, and the command kinds
// describes it; who enqueues jobs, or writes handlers, has no need of it.
type Task struct {
	// Kind is the payload's.
	Kind string
	// Options are the payload's, with the defaults filled in; here a MaxRetry of 0 is none.
	Options Options
	// Fields are the payload's, in the order of the struct.
	Fields []Field
	// Once is true for a kind whose effects happen once, by [RegisterTx] or
	// [RegisterOnce].
	Once bool

	decode func([]byte) (Payload, error)
	run    func(context.Context, *Job, Payload) (result []byte, err error)
}

// Field describes one field of a payload.
type Field struct {
	// Name and Type are as in JSON: "source", "string".
	Name, Type string
	// Optional is true for a field that may be left out: a pointer, or one with the JSON
	// option omitempty or omitzero.
	Optional bool
	// Doc is one line for people, and Example a value as JSON, from the tags of these
	// names; "" without one.
	Doc, Example string
}

// Register adds the task of payload P and its handler to s. The handler may run more than
// once for one job, because a job is delivered at least once.
//
// It panics on what only a programmer can mend: a kind without a name, one that is
// registered already, one whose queue is a worker's own, or a payload that is not a struct.
func Register[P Payload, R any](s *Set, h Handler[P, R]) {
	t := register[P](s)
	t.run = func(ctx context.Context, job *Job, p Payload) ([]byte, error) {
		return job.marshalResult(h(ctx, job, p.(P)))
	}
}

func register[P Payload](s *Set) *Task {
	var zero P
	kind := zero.Kind()
	if kind == "" || strings.TrimSpace(kind) != kind {
		panic(registerError(fmt.Sprintf("tasks: Register: %T has the kind %q; want a name such as \"csv:import\"", zero, kind)))
	}
	if err := instance.CheckQueue(zero.Options().Queue, kind); err != nil {
		panic(registerError(fmt.Sprintf("tasks: Register: kind %q: %v", kind, err)))
	}
	if _, ok := s.byKind[kind]; ok {
		panic(registerError(fmt.Sprintf("tasks: Register: kind %q is registered twice", kind)))
	}
	if s.byKind == nil {
		s.byKind = make(map[string]*Task)
	}
	t := &Task{
		Kind:    kind,
		Options: zero.Options().withDefaults(),
		Fields:  fieldsOf(reflect.TypeFor[P]()),
	}
	t.decode = func(data []byte) (Payload, error) {
		var p P
		if err := decodeStrictly(data, &p, t.Fields); err != nil {
			return nil, err
		}
		return p, p.Validate()
	}
	s.byKind[kind] = t
	return t
}

// Kinds returns the names of all kinds, sorted.
func (s *Set) Kinds() []string {
	kinds := make([]string, 0, len(s.byKind))
	for kind := range s.byKind {
		kinds = append(kinds, kind)
	}
	slices.Sort(kinds)
	return kinds
}

// Lookup returns the task of a kind. The error wraps [ErrUnknownKind], names the
// kinds there are, and is permanent.
func (s *Set) Lookup(kind string) (*Task, error) {
	if t, ok := s.byKind[kind]; ok {
		return t, nil
	}
	return nil, Permanent(fmt.Errorf("%w %.100q: this worker knows %s", ErrUnknownKind, kind, strings.Join(s.Kinds(), ", ")))
}

// Decode turns JSON into the task's payload and validates it. It takes one object whose
// fields are all known, each by its exact name, and there once at most. Every error is a
// permanent [PayloadError] that names the field and shows nothing of the payload; for a panic
// of the payload's own methods it names the place. A worker calls it before [Task.Run].
func (t *Task) Decode(data []byte) (p Payload, err error) {
	defer func() {
		if recover() != nil { // what with may hold the payload's content
			p, err = nil, Permanent(&PayloadError{t.Kind, fmt.Errorf("reading it panicked in %s", placeOfPanic())})
		}
	}()
	p, err = t.decode(data)
	if err != nil {
		return nil, Permanent(&PayloadError{t.Kind, err})
	}
	return p, nil
}

// placeOfPanic is the function and the line that panicked, for a deferred function
// that has recovered.
func placeOfPanic() string {
	callers := make([]uintptr, 32)
	frames := runtime.CallersFrames(callers[:runtime.Callers(1, callers)])
	panicked := false
	for frame, more := frames.Next(); more; frame, more = frames.Next() {
		ofRuntime := strings.HasPrefix(frame.Function, "runtime.")
		if panicked && !ofRuntime {
			return fmt.Sprintf("%s (%s:%d)", frame.Function, filepath.Base(frame.File), frame.Line)
		}
		panicked = panicked || ofRuntime
	}
	return "a place that isn't known"
}

// Run calls the handler with a payload from [Task.Decode] and returns its result as JSON,
// nil for no result. The error is the handler's, or a permanent one for a result that can't
// be JSON, or is too large; a panic of the handler is passed on. A worker calls it, and
// package taskstest.
func (t *Task) Run(ctx context.Context, job *Job, p Payload) ([]byte, error) {
	delivery := job.delivery()
	delivery.Isolation = t.Options.Isolation
	delivery.Again()
	return t.run(ctx, job, p)
}

// marshalResult returns a handler's result as JSON, nil for none, or the handler's error.
// That of a result itself is permanent.
func (j *Job) marshalResult(result any, err error) ([]byte, error) {
	if err != nil || result == nil {
		return nil, err
	}
	data, isRaw := result.(json.RawMessage)
	switch {
	case !isRaw:
		if data, err = json.Marshal(result); err != nil {
			return nil, Permanent(fmt.Errorf("the handler's result can't be written as JSON: %w", err))
		}
	case data != nil && (!json.Valid(data) || !utf8.Valid(data)):
		return nil, Permanent(errors.New("the handler's result is a json.RawMessage that is not JSON in UTF-8"))
	}
	if err := j.checkSize(data); err != nil {
		return nil, Permanent(fmt.Errorf("the handler's result: %w", err))
	}
	return data, nil
}

// checkSize returns an error for JSON that is too large for the job's result.
func (j *Job) checkSize(data []byte) error {
	most := 0
	if j.Client != nil {
		most = j.Client.MaxPayload
	}
	return limit.Check(len(data), most)
}

// Example returns a payload as one line of JSON, made of its fields' examples. It is valid
// if they are.
func (t *Task) Example() string {
	var b strings.Builder
	b.WriteByte('{')
	for _, f := range t.Fields {
		if f.Example == "" {
			continue
		}
		if b.Len() > 1 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, "%q: %s", f.Name, f.Example)
	}
	b.WriteByte('}')
	return b.String()
}

func decodeStrictly(data []byte, into any, fields []Field) error {
	trimmed := bytes.TrimSpace(data)
	if len(trimmed) == 0 {
		return errors.New("it is empty; a JSON object is expected, {} at least")
	}
	if trimmed[0] != '{' {
		return errors.New("it is not a JSON object")
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return withoutContent(err, fields)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("there is something after the JSON object")
	}
	return checkNames(data, fields)
}

// checkNames refuses an object that has a field twice, or in other letters than its own.
// encoding/json takes both, and has the last one win, but carpool.enqueue knows each field
// by its exact name alone. Like that, it leaves the objects inside to the kind. data must be
// one JSON object, which is read as text because to decode it once more would cost as much
// as the first time.
func checkNames(data []byte, fields []Field) error {
	seen := make([]bool, len(fields))
	depth := 0
	for i := 0; i < len(data); i++ {
		switch data[i] {
		case '{', '[':
			depth++
		case '}', ']':
			depth--
		case '"':
			start := i
			for i++; data[i] != '"'; i++ {
				if data[i] == '\\' {
					i++
				}
			}
			if depth != 1 || !bytes.HasPrefix(bytes.TrimLeft(data[i+1:], " \t\r\n"), []byte(":")) {
				continue
			}
			if err := checkName(data[start:i+1], fields, seen); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkName looks at one name of an object, a string of JSON. seen are the fields that were
// there before.
func checkName(quoted []byte, fields []Field, seen []bool) error {
	name := quoted[1 : len(quoted)-1]
	if bytes.IndexByte(name, '\\') >= 0 {
		var unquoted string
		if err := json.Unmarshal(quoted, &unquoted); err != nil {
			return withoutContent(err, fields)
		}
		name = []byte(unquoted)
	}
	for i, f := range fields {
		switch {
		case f.Name != string(name):
		case seen[i]:
			return fmt.Errorf("%s: is there twice", f.Name)
		default:
			seen[i] = true
			return nil
		}
	}
	for _, f := range fields {
		if strings.EqualFold(f.Name, string(name)) {
			return unknownField(fmt.Sprintf("%q", name), fields)
		}
	}
	return nil // the payload's own code has taken it
}

// withoutContent rewrites an error of encoding/json so that it names the place
// but none of the payload's values.
func withoutContent(err error, fields []Field) error {
	if e, ok := errors.AsType[*json.SyntaxError](err); ok {
		return fmt.Errorf("it is not valid JSON, at byte %d", e.Offset)
	}
	if e, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		got, _, _ := strings.Cut(e.Value, " ")
		return fmt.Errorf("%s: want %s, got %s", e.Field, jsonType(e.Type), got)
	}
	if name, ok := strings.CutPrefix(err.Error(), "json: unknown field "); ok {
		return unknownField(name, fields)
	}
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return errors.New("it is cut off: the JSON object has no end")
	}
	return errors.New("it can't be decoded")
}

// unknownField is the error for a name, in quotes, that is no field's.
func unknownField(name string, fields []Field) error {
	var known []string
	for _, f := range fields {
		known = append(known, f.Name)
	}
	if len(known) == 0 {
		return fmt.Errorf("unknown field %.64s: this kind has no fields", name)
	}
	return fmt.Errorf("unknown field %.64s: the fields are %s", name, strings.Join(known, ", "))
}

func fieldsOf(t reflect.Type) []Field {
	if t.Kind() != reflect.Struct {
		panic(registerError(fmt.Sprintf("tasks: Register: payload %s is not a struct", t)))
	}
	var fields []Field
	for _, f := range reflect.VisibleFields(t) {
		name, rest, _ := strings.Cut(f.Tag.Get("json"), ",")
		if !f.IsExported() || f.Anonymous || name == "-" {
			continue
		}
		if name == "" {
			name = f.Name
		}
		example := f.Tag.Get("example")
		if example != "" && jsonType(f.Type) == "string" {
			quoted, err := json.Marshal(example)
			if err != nil {
				panic(registerError(fmt.Sprintf("tasks: Register: %s.%s: example: %v", t, f.Name, err)))
			}
			example = string(quoted)
		}
		fields = append(fields, Field{
			Name:     name,
			Type:     jsonType(f.Type),
			Optional: strings.Contains(rest, "omitempty") || strings.Contains(rest, "omitzero") || f.Type.Kind() == reflect.Pointer,
			Doc:      f.Tag.Get("doc"),
			Example:  example,
		})
	}
	return fields
}

func jsonType(t reflect.Type) string {
	switch {
	case t.Kind() == reflect.Pointer:
		return jsonType(t.Elem())
	case t == reflect.TypeFor[time.Time]():
		return "string"
	case t.Implements(reflect.TypeFor[json.Marshaler]()), reflect.PointerTo(t).Implements(reflect.TypeFor[json.Marshaler]()):
		return "any JSON"
	case t.Implements(reflect.TypeFor[interface{ MarshalText() ([]byte, error) }]()):
		return "string"
	}
	switch t.Kind() {
	case reflect.Bool:
		return "boolean"
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return "integer"
	case reflect.Float32, reflect.Float64:
		return "number"
	case reflect.String:
		return "string"
	case reflect.Slice, reflect.Array:
		if t.Elem().Kind() == reflect.Uint8 {
			return "string"
		}
		return "array"
	case reflect.Interface:
		return "any JSON"
	default:
		return "object"
	}
}
