package maintenance

import (
	"context"
	"testing"

	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/taskstest"
)

func TestPoolValidate_CallsAfterValidateWhateverCameOfIt(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	var group Tasks
	set, err := tasks.NewSet(&group)
	if err != nil {
		t.Fatal(err)
	}
	called := 0
	group.AfterValidate = func(context.Context) { called++ } // after it was registered
	task, err := set.Lookup("pool:validate")
	if err != nil {
		t.Fatal(err)
	}
	over, end := context.WithCancel(t.Context())
	end()
	for i, ctx := range []context.Context{t.Context(), over} {
		if _, err := task.Run(ctx, &tasks.Job{DB: kit.DB}, PoolValidate{}); (err != nil) != (i == 1) {
			t.Errorf("validation %d: error %v", i+1, err)
		}
		want(t, "calls", called, i+1)
	}
}
