package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"
)

// patience is how long a contestant's process may take for an answer.
const patience = 15 * time.Minute

// child is a contestant's process.
type child struct {
	cmd     *exec.Cmd
	stop    context.CancelFunc
	in      io.WriteCloser
	answers *json.Decoder
}

func start(ctx context.Context, path string, s spec) (*child, error) {
	ctx, stop := context.WithCancel(ctx)
	c := &child{cmd: exec.CommandContext(ctx, path, asContestant), stop: stop}
	c.cmd.Stderr = os.Stderr
	in, err := c.cmd.StdinPipe()
	if err == nil {
		c.in = in
		var out io.ReadCloser
		if out, err = c.cmd.StdoutPipe(); err == nil {
			c.answers = json.NewDecoder(out)
			err = c.cmd.Start()
		}
	}
	if err != nil {
		stop()
		return nil, err
	}
	if err := json.NewEncoder(in).Encode(s); err != nil {
		c.kill()
		return nil, err
	}
	return c, nil
}

// ask puts a question and waits for the answer.
func (c *child) ask(question string) (report, error) {
	if err := json.NewEncoder(c.in).Encode(question); err != nil {
		return report{}, fmt.Errorf("%s: %w", question, err)
	}
	return c.answer(question)
}

func (c *child) answer(question string) (r report, err error) {
	hung := time.AfterFunc(patience, c.stop)
	defer hung.Stop()
	if err := c.answers.Decode(&r); err != nil {
		return r, fmt.Errorf("%s: no answer: %w", question, err)
	}
	return r, nil
}

// end has the process end by itself.
func (c *child) end() error {
	_ = c.in.Close()
	hung := time.AfterFunc(patience, c.stop)
	defer hung.Stop()
	defer c.stop()
	return c.cmd.Wait()
}

// kill ends the process, if it has not ended.
func (c *child) kill() {
	c.stop()
	_ = c.cmd.Wait()
}

// finish has a process do what is no work, and returns what it reports.
func finish(ctx context.Context, path string, s spec) (report, error) {
	c, err := start(ctx, path, s)
	if err != nil {
		return report{}, err
	}
	defer c.kill()
	r, err := c.answer(s.Task)
	if err != nil {
		return r, err
	}
	return r, c.end()
}
