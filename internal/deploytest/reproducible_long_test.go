//go:build long

package deploytest

import (
	"path/filepath"
	"testing"
)

// As [TestDockerfile_BuildsTheSameBytesInTwoFolders], but everything is compiled twice, and
// nothing is taken from the first.
func TestLong_DockerfileBuildsTheSameBytesFromNothing(t *testing.T) {
	each(t, func(t *testing.T, p program) {
		one := p.buildElsewhere(t, "GOCACHE="+filepath.Join(t.TempDir(), "cache"))
		other := p.buildElsewhere(t, "GOCACHE="+filepath.Join(t.TempDir(), "cache"))
		sameBytes(t, one, other)
	})
}
