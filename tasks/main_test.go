package tasks_test

import (
	"testing"

	"github.com/carpool-go/carpool/tasks/taskstest"
)

func TestMain(m *testing.M) { taskstest.Main(m) }
