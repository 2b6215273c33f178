//go:build unix

package cli

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/internal/servers"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// withFiles returns a URL with the files of certificates that it names; those that are empty
// are left out.
func withFiles(t *testing.T, rawURL, authority, cert, key string) string {
	t.Helper()
	for name, file := range map[string]string{"sslrootcert": authority, "sslcert": cert, "sslkey": key} {
		if file != "" {
			rawURL = testservers.WithParam(t, rawURL, name, file)
		}
	}
	return rawURL
}

// writeCertificate makes a certificate in a folder of its own.
func writeCertificate(t *testing.T, c servers.Certificate) (cert, key string) {
	t.Helper()
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "its.crt"), filepath.Join(dir, "its.key")
	if err := servers.WriteCertificate(cert, key, c); err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// All of a trio speak TLS alone with their clients and with each other, with a certificate of a
// private authority, and ask for one.
func TestSentinels_OverTLSAJobRunsAndAWrongCertificateIsOneClearError(t *testing.T) {
	t.Parallel()
	b := setup(t)
	trio, err := servers.StartRedisTrio(t.Context(), servers.RedisConfig{TLS: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := trio.Stop(); err != nil {
			t.Error(err)
		}
	})
	served, servedKey := trio.Servers[0].CAFile(), trio.Servers[0].KeyFile()
	ca, key := filepath.Join(t.TempDir(), "ca.crt"), filepath.Join(t.TempDir(), "ca.key") // as they are now
	for from, to := range map[string]string{served: ca, servedKey: key} {
		if err := os.WriteFile(to, readFile(t, from), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	right := withFiles(t, trio.TLSURL(), ca, ca, key)
	worker := b.Start(t, "REDIS_URL="+right)
	if _, stderr, code := b.run(t, []string{"REDIS_URL=" + right}, "enqueue", "pool:validate", "{}", "--wait"); code != 0 {
		t.Fatalf("exit code %d\n%s", code, stderr)
	}
	_ = worker.Cmd.Process.Kill()
	worker.Exit(t)

	other, otherKey := writeCertificate(t, servers.Certificate{})
	isSaid := func(what, url string, want ...string) {
		t.Helper()
		for _, args := range [][]string{{"run"}, {"enqueue", "pool:validate", "{}"}} {
			_, stderr, code := b.run(t, []string{"REDIS_URL=" + url}, args...)
			onlyLine(t, what, stderr, code, append(want, "REDIS_URL: ")...)
		}
	}
	const ofSentinels, rootCert = "the certificate of the Sentinels at 127.0.0.1:", "name the file of its authority in the URL: ?sslrootcert="
	isSaid("another authority", withFiles(t, trio.TLSURL(), other, ca, key), ofSentinels, " can't be trusted: x509: ", rootCert)
	isSaid("no authority", withFiles(t, trio.TLSURL(), "", ca, key), ofSentinels, " can't be trusted: x509: ", rootCert)
	isSaid("no certificate of its own", withFiles(t, trio.TLSURL(), ca, "", ""), "a certificate is demanded by the Sentinels at 127.0.0.1:", "tls: certificate required", showsHow)
	isSaid("a certificate of another authority", withFiles(t, trio.TLSURL(), ca, other, otherKey), "this client's certificate is refused by the Sentinels at 127.0.0.1:", ": tls: ", "sslcert in the URL must name one")

	// What the master has from now on is not what the Sentinels have, which go on without
	// two of them, so that none puts the replica in its place.
	for _, r := range trio.Sentinels[1:] {
		r.Kill()
	}
	one := &servers.RedisTrio{Servers: trio.Servers, Sentinels: trio.Sentinels[:1]}
	certify := func(c servers.Certificate, restart *servers.Redis) (trust string) {
		t.Helper()
		if err := servers.WriteCertificate(served, servedKey, c); err != nil {
			t.Fatal(err)
		}
		if err := restart.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		trust = filepath.Join(t.TempDir(), "all.crt")
		if err := os.WriteFile(trust, append(readFile(t, served), readFile(t, ca)...), 0o600); err != nil {
			t.Fatal(err)
		}
		return trust
	}
	expired, misnamed := servers.Certificate{NotAfter: time.Now().Add(-time.Hour)}, servers.Certificate{Name: "redis.example"}
	const ofMaster, renew, byName = "the certificate of the master that the Sentinels at 127.0.0.1:", "renew it", "the URL must have a name or address that is in the certificate"
	for _, c := range []struct {
		of    string
		which *servers.Redis
	}{{ofMaster, trio.Servers[0]}, {ofSentinels, trio.Sentinels[0]}} {
		trust := certify(expired, c.which)
		isSaid("an expired certificate", withFiles(t, one.TLSURL(), trust, ca, key), c.of, "certificate has expired", renew)
		trust = certify(misnamed, c.which)
		isSaid("a certificate for another name", withFiles(t, one.TLSURL(), trust, ca, key), c.of, "is for another name: x509: ", byName)
	}
}

// showsHow is how a client names its certificate.
const showsHow = "sslcert=/path/to/client.crt&sslkey=/path/to/client.key"

func readFile(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The server lets only clients in that show a certificate of their role's name
// (clientcert=verify-full), beside the password.
func TestServers_APostgresThatDemandsACertificateGetsTheURLs(t *testing.T) {
	t.Parallel()
	pg, err := servers.StartPostgres(t.Context(), servers.PostgresConfig{TLS: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = pg.Stop() })
	cert, key := writeCertificate(t, servers.Certificate{Name: "postgres"})
	other, otherKey := writeCertificate(t, servers.Certificate{Name: "postgres"})
	elsewhere, elsewhereKey := writeCertificate(t, servers.Certificate{Name: "somebody"})
	demandCertificates(t, pg, string(readFile(t, cert))+string(readFile(t, elsewhere)))

	b := &bundle{&workertest.Bundle{RedisURL: testservers.Redis(t)}}
	b.Env = []string{"REDIS_URL=" + b.RedisURL, "LOG_FORMAT=json", "LOG_LEVEL=warn"}
	right := []string{"DATABASE_URL=" + withFiles(t, pg.URL(), "", cert, key)}
	for _, args := range [][]string{{"migrate"}, {"schedule", "add", "nightly", "@daily", "carpool:prune"}, {"schedule", "run-now", "nightly"}, {"run", "--burst"}, {"status"}} {
		if _, stderr, code := b.run(t, right, args...); code != 0 || stderr != "" && args[0] != "migrate" {
			t.Errorf("%v: exit code %d\n%s", args, code, stderr)
		}
	}
	strange, _ := writeCertificate(t, servers.Certificate{})
	isCutOff := regexp.MustCompile("connection reset|broken pipe")
	for name, c := range map[string]struct {
		url  string
		want []string
	}{
		"none":                      {pg.URL(), []string{"a certificate is demanded by Postgres: FATAL: connection requires a valid client certificate", showsHow}},
		"another authority's":       {withFiles(t, pg.URL(), "", other, otherKey), []string{"this client's certificate is refused by Postgres: tls: unknown certificate authority", "sslcert in the URL must name one"}},
		"another role's":            {withFiles(t, pg.URL(), "", elsewhere, elsewhereKey), []string{"the server refuses this user or password: "}},
		"the server's of another's": {withFiles(t, pg.URL(), strange, cert, key), []string{"the certificate of Postgres can't be trusted: x509: ", "?sslrootcert="}},
	} {
		for _, args := range ofTables {
			_, stderr, code := b.run(t, []string{"DATABASE_URL=" + c.url}, args...)
			// With TLS 1.3 the server's word may be lost with the connection, and the worker waits then.
			for tries := 0; tries < 50 && isCutOff.MatchString(stderr); tries++ {
				_, stderr, code = b.run(t, []string{"DATABASE_URL=" + c.url}, args...)
			}
			onlyLine(t, name, stderr, code, append(c.want, "DATABASE_URL")...)
		}
	}
	for name, url := range map[string]string{
		"without a key":                 withFiles(t, pg.URL(), "", cert, ""),
		"a key that is another's":       withFiles(t, pg.URL(), "", cert, otherKey),
		"a certificate that isn't here": withFiles(t, pg.URL(), "", "/nowhere/hush.crt", key),
	} {
		_, stderr, code := b.run(t, []string{"DATABASE_URL=" + url}, "status")
		if code != exitUsage || !strings.Contains(stderr, "DATABASE_URL is wrong: the URL has a wrong setting: failed to configure TLS; ") || strings.Contains(stderr, "hush") {
			t.Errorf("%s: exit code %d\n%s", name, code, stderr)
		}
	}
}

// demandCertificates has the server let in only clients with a certificate of these authorities, in
// PEM, that has the name of their role.
func demandCertificates(t *testing.T, pg *servers.Postgres, authorities string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), pg.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	for _, sql := range []string{
		"COPY (SELECT unnest(string_to_array('" + authorities + "', E'\\n'))) TO PROGRAM 'cat > clients.crt'",
		"COPY (SELECT 'hostssl all all all scram-sha-256 clientcert=verify-full') TO PROGRAM 'cat > pg_hba.conf'",
		"ALTER SYSTEM SET ssl_ca_file = 'clients.crt'",
	} {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	if err := pg.Restart(t.Context(), "fast"); err != nil {
		t.Fatal(err)
	}
}
