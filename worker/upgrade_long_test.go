//go:build long && unix

package worker_test

import (
	"testing"
	"time"
)

// The versions are beside each other as in [TestTheLastVersionIsBesideThisOne], under more
// load and for longer, and in the end the version before crashes and leaves its jobs to this one.
func TestLong_TheLastVersionIsBesideThisOne(t *testing.T) {
	upgrade{pause: 5 * time.Millisecond, step: 4 * time.Second, crash: true}.run(t)
}
