package worker

import (
	"context"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/carpool-go/carpool/tasks"
)

// lived is a group that has something to start and stop.
type lived struct {
	name string
	fail error
	seen *[]string
}

func (g *lived) Register(*tasks.Set) {}

func (g *lived) Start(ctx context.Context) error {
	*g.seen = append(*g.seen, "start "+g.name)
	return errors.Join(ctx.Err(), g.fail)
}

func (g *lived) Stop() { *g.seen = append(*g.seen, "stop "+g.name) }

// plain is a group of kinds and nothing else.
type plain func(*tasks.Set)

func (plain) Register(*tasks.Set) {}

func TestGroups_StartInOrderAndStopsInReverse(t *testing.T) {
	t.Parallel()
	var seen []string
	g := newGroups(t.Context(), []tasks.Group{&lived{"a", nil, &seen}, plain(nil), &lived{"b", nil, &seen}})
	if err := g.Start(); err != nil {
		t.Fatal(err)
	}
	g.Stop()
	g.Stop()
	if diff := cmp.Diff([]string{"start a", "start b", "stop b", "stop a"}, seen); diff != "" {
		t.Error(diff)
	}
}

func TestGroups_StartStopsThoseBeforeTheOneThatFails(t *testing.T) {
	t.Parallel()
	var seen []string
	away := errors.New("the shop is closed")
	err := newGroups(t.Context(), []tasks.Group{
		&lived{"a", nil, &seen}, &lived{"b", nil, &seen}, &lived{"c", away, &seen}, &lived{"d", nil, &seen},
	}).Start()
	if !errors.Is(err, away) || err.Error() != "start *worker.lived: the shop is closed" {
		t.Errorf("%v", err)
	}
	if diff := cmp.Diff([]string{"start a", "start b", "start c", "stop b", "stop a"}, seen); diff != "" {
		t.Error(diff)
	}
}
