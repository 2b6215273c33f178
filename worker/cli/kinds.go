package cli

import (
	"encoding/json"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/carpool-go/carpool/tasks"
)

type kindsCmd struct {
	Kind string `arg:"" optional:"" help:"Show only this kind, with all of its options."`

	JSON bool `name:"json" help:"One JSON object a line."`
}

// Run prints the kinds.
func (c *kindsCmd) Run(in *invocation) error {
	set, err := in.kinds()
	if err != nil {
		return err
	}
	kinds := set.Kinds()
	if c.Kind != "" {
		kinds = []string{c.Kind}
	}
	var list []*tasks.Task
	for _, kind := range kinds {
		task, err := lookup(set, kind)
		if err != nil {
			return err
		}
		list = append(list, task)
	}
	if c.JSON {
		lines := make([]kindJSON, len(list))
		for i, task := range list {
			lines[i] = kindOf(task)
		}
		return printLines(in.stdout, lines)
	}
	for i, task := range list {
		if i > 0 {
			fmt.Fprintln(in.stdout)
		}
		if c.Kind != "" {
			err = in.printKind(task)
		} else {
			err = in.printKindInShort(task)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// lookup returns the task of a kind that was given on the command line.
func lookup(set *tasks.Set, kind string) (*tasks.Task, error) {
	task, err := set.Lookup(kind)
	if err != nil {
		return nil, argumentError("kind: " + strings.Replace(err.Error(), "this worker knows", "this program knows", 1))
	}
	return task, nil
}

// kindJSON is a kind for programs.
type kindJSON struct {
	Kind        string          `json:"kind"`
	Queue       string          `json:"queue"`
	MaxRetry    int             `json:"max_retry"`
	TimeoutMS   int64           `json:"timeout_ms"`
	RetentionMS int64           `json:"retention_ms"`
	Isolation   string          `json:"isolation,omitempty"`
	Once        bool            `json:"once"`
	Fields      []fieldJSON     `json:"fields"`
	Example     json.RawMessage `json:"example"`
}

type fieldJSON struct {
	Name     string          `json:"name"`
	Type     string          `json:"type"`
	Optional bool            `json:"optional"`
	Doc      string          `json:"doc,omitempty"`
	Example  json.RawMessage `json:"example,omitempty"`
}

func kindOf(task *tasks.Task) kindJSON {
	o := task.Options
	kind := kindJSON{
		Kind: task.Kind, Queue: o.Queue, MaxRetry: o.MaxRetry, TimeoutMS: o.Timeout.Milliseconds(), RetentionMS: o.Retention.Milliseconds(),
		Isolation: string(o.Isolation), Once: task.Once, Fields: []fieldJSON{}, Example: asJSON(task.Example()),
	}
	for _, f := range task.Fields {
		kind.Fields = append(kind.Fields, fieldJSON{f.Name, f.Type, f.Optional, f.Doc, asJSON(f.Example)})
	}
	return kind
}

// asJSON is the text of an example, which a programmer has written, if it is JSON.
func asJSON(example string) json.RawMessage {
	if !json.Valid([]byte(example)) {
		return nil
	}
	return json.RawMessage(example)
}

func (in *invocation) printKindInShort(task *tasks.Task) error {
	o := task.Options
	fmt.Fprintf(in.stdout, "%s   queue %s, %d retries, %s for each try\n", task.Kind, o.Queue, o.MaxRetry, o.Timeout)
	if err := in.printFields(task); err != nil {
		return err
	}
	_, err := fmt.Fprintf(in.stdout, "  %s\n", in.exampleLine(task))
	return err
}

func (in *invocation) printFields(task *tasks.Task) error {
	w := tabwriter.NewWriter(in.stdout, 0, 0, 2, ' ', 0)
	for _, f := range task.Fields {
		optional := ""
		if f.Optional {
			optional = " (optional)"
		}
		fmt.Fprintf(w, "  %s\t%s\t%s%s\n", f.Name, f.Type, f.Doc, optional)
	}
	return w.Flush()
}

func (in *invocation) printKind(task *tasks.Task) error {
	o := task.Options
	fmt.Fprintf(in.stdout, "%s\n", task.Kind)
	if err := in.printFields(task); err != nil {
		return err
	}
	retention, isolation, once := "none: a job that is done is forgotten", "the database's", "may happen more than once, as after a crash"
	if o.Retention > 0 {
		retention = shortDuration(o.Retention) + " after it is done, with its result"
	}
	if o.Isolation != "" {
		isolation = string(o.Isolation)
	}
	if task.Once {
		once = "happen exactly once, in Postgres"
	}
	w := tabwriter.NewWriter(in.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "\n  queue\t%s\n  retries\t%d\n  timeout\t%s for each try\n  retention\t%s\n", o.Queue, o.MaxRetry, shortDuration(o.Timeout), retention)
	if task.Once {
		fmt.Fprintf(w, "  isolation\t%s\n", isolation)
	}
	fmt.Fprintf(w, "  effects\t%s\n", once)
	if err := w.Flush(); err != nil {
		return err
	}
	sql := fmt.Sprintf("SELECT carpool.enqueue(%s, %s)", quoteSQL(task.Kind), quoteSQL(task.Example()))
	_, err := fmt.Fprintf(in.stdout, "\n  %s\n  %s\n", in.exampleLine(task), sql)
	return err
}

// shortDuration is a duration without the units that are 0: 10m for 10m0s.
func shortDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

func quoteSQL(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" }

func quoteShell(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// exampleLine is a command that can be pasted into a shell.
func (in *invocation) exampleLine(task *tasks.Task) string {
	return fmt.Sprintf("%s enqueue %s %s", in.Name, task.Kind, quoteShell(task.Example()))
}
