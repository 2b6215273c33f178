package servers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// identity is whom a server runs as. The zero value is: as we are.
type identity struct {
	name  string                  // for error messages
	apply func(*exec.Cmd)         // nil: nothing to do
	own   func(path string) error // gives one file or folder to the identity; nil: nothing to do
}

// chooseIdentity finds whom to run a program as that refuses root. The probe runs `program --version` in the folder where
// the server will live: that fails if the identity cannot be taken, may not reach the program, or may not reach the folder.
func chooseIdentity(ctx context.Context, program, folder string, candidates []identity) (identity, error) {
	var failed []error
	for _, id := range candidates {
		if err := id.probe(ctx, program, folder); err != nil {
			failed = append(failed, fmt.Errorf("%s: %w", id.name, err))
			continue
		}
		return id, nil
	}
	return identity{}, fmt.Errorf("Postgres refuses to run as root, and no other way worked: %w", errors.Join(failed...))
}

func (id identity) probe(ctx context.Context, program, folder string) error {
	if err := id.take(folder); err != nil {
		return err
	}
	return run(ctx, id.command(folder, program, "--version"), filepath.Base(program), nil, nil)
}

// command is a command that runs in the folder as this identity.
func (id identity) command(folder, program string, args ...string) *exec.Cmd {
	cmd := exec.Command(program, args...)
	cmd.Dir = folder
	if id.apply != nil {
		id.apply(cmd)
	}
	return cmd
}

// take gives the folder and all that is in it to the identity.
func (id identity) take(folder string) error {
	if id.own == nil {
		return nil
	}
	return filepath.WalkDir(folder, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return id.own(path)
	})
}
