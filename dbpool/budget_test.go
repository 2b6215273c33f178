package dbpool_test

import (
	"testing"

	"github.com/carpool-go/carpool/dbpool"
)

func TestPool_BudgetAsksTheServer(t *testing.T) {
	t.Parallel()
	p := open(t, nil)
	b, err := p.Budget(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if b.MaxConnections < 10 || b.Reserved < 1 || b.InUse < 1 || b.RoleLimit != -1 || b.DatabaseLimit != -1 || b.PerInstance != 10 {
		t.Errorf("%+v", b)
	}
}

func TestBudget_WarnsWhenADeploysOldAndNewInstancesDoNotFit(t *testing.T) {
	t.Parallel()
	b := dbpool.Budget{MaxConnections: 100, Reserved: 3, RoleLimit: -1, DatabaseLimit: -1, PerInstance: 10}
	for instances, want := range map[int]string{
		1:  "",
		4:  "",
		5:  "5 instances of 10 connections, and as many again during a deploy, are 100, but the server has 97; set DB_POOL_SIZE and DB_MAX_OVERFLOW to 9 together",
		60: "60 instances, and as many again during a deploy, don't fit into the server's 97 connections at all; run fewer, or put a pooler between",
	} {
		if got := b.Warning(instances); got != want {
			t.Errorf("%d instances: %q, want %q", instances, got, want)
		}
	}
	b.DatabaseLimit = 15
	if b.Usable() != 15 || b.Warning(1) == "" {
		t.Errorf("the database's own limit is not heeded: %d usable", b.Usable())
	}
}
