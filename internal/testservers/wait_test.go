package testservers

import (
	"fmt"
	"net/url"
	"sync"
	"testing"
)

func TestLog_WaitsForWhatIsYetToBeWritten(t *testing.T) {
	t.Parallel()
	log, waits := new(Log), make(chan struct{})
	var writers sync.WaitGroup
	for i := range 10 {
		writers.Go(func() {
			<-waits
			fmt.Fprintf(log, "line %d\n", i)
		})
	}
	go close(waits)
	for i := range 10 {
		log.Wait(t, fmt.Sprintf("line %d\n", i))
	}
	writers.Wait()
	if got := len(log.String()); got != 10*len("line 0\n") {
		t.Errorf("the log has %d bytes:\n%s", got, log)
	}
}

func TestEventually_LooksUntilItHolds(t *testing.T) {
	t.Parallel()
	looks := 0
	Eventually(t, "three looks were taken", func() bool {
		looks++
		return looks == 3
	})
	if looks != 3 {
		t.Errorf("%d looks", looks)
	}
}

func TestWithParam_KeepsTheRestOfTheURL(t *testing.T) {
	t.Parallel()
	const before = "postgres://u:p%2Fw@127.0.0.1:5432/app?sslmode=disable&a=1"
	u, err := url.Parse(WithParam(t, before, "a", "x&y"))
	if err != nil {
		t.Fatal(err)
	}
	if q := u.Query(); q.Get("a") != "x&y" || len(q["a"]) != 1 || q.Get("sslmode") != "disable" {
		t.Errorf("the query is %v", q)
	}
	u.RawQuery = "sslmode=disable&a=1"
	if got := u.String(); got != before {
		t.Errorf("the URL is %s", got)
	}
}
