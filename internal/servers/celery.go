package servers

import (
	"fmt"
	"os/exec"
	"strings"
)

// CeleryPython is Debian's Python, which has the packages of FindCelery; another one on PATH would lack them.
const CeleryPython = "/usr/bin/python3"

const celeryPackages = "python3-celery python3-redis python3-sqlalchemy python3-psycopg2"

// FindCelery returns an error that wraps ErrNotFound and says what to install if CeleryPython has no Celery, or not what
// Celery needs for Redis and Postgres.
func FindCelery() error {
	out, err := exec.Command(CeleryPython, "-c", "import celery, redis, sqlalchemy, psycopg2").CombinedOutput()
	if err == nil {
		return nil
	}
	reason := strings.TrimSpace(string(out))
	reason = reason[strings.LastIndexByte(reason, '\n')+1:]
	return fmt.Errorf("celery %w; install it for %s (Debian: apt-get install %s): %w: %s", ErrNotFound, CeleryPython, celeryPackages, err, reason)
}
