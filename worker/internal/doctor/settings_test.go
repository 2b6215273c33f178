package doctor

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net"
	"testing"
	"time"
)

func TestExamine_SettingsThatDoNotGoTogether(t *testing.T) {
	t.Parallel()
	render := PlatformOf(func(name string) string { return map[string]string{"RENDER": "true"}[name] })
	kubernetes := PlatformOf(func(name string) string { return map[string]string{"KUBERNETES_SERVICE_HOST": "10.0.0.1"}[name] })
	for name, c := range map[string]struct {
		change              func(*Config)
		check, says, wayOut string
	}{
		"a pool without jobs": {func(c *Config) { c.Pool.Size = 50 }, "settings", "DB_POOL_SIZE is 50", "lower DB_POOL_SIZE"},
		"no check":            {func(c *Config) { c.Pool.PrePing = false }, "settings", "DB_POOL_PRE_PING is false", "DB_POOL_PRE_PING=true"},
		"short lives":         {func(c *Config) { c.Pool.Recycle = 10 * time.Second }, "settings", "DB_POOL_RECYCLE is 10s", "raise DB_POOL_RECYCLE"},
		"echo":                {func(c *Config) { c.Pool.Echo, c.Platform = true, render }, "settings", "DB_ECHO", "DB_ECHO=false"},
		"no shutdown":         {func(c *Config) { c.ShutdownTimeout = -1 }, "settings", "WORKER_SHUTDOWN_TIMEOUT is 0s", "WORKER_SHUTDOWN_TIMEOUT"},
		"no guard":            {func(c *Config) { c.OutboundAllow = "hooks.internal, 0.0.0.0/0" }, "settings", "OUTBOUND_ALLOW has 0.0.0.0/0", "no more"},
		"a doubt":             {func(c *Config) { c.Doubts = []string{"WORKER_QUEUE is no setting"} }, "settings", "WORKER_QUEUE is no setting", ""},
		"Render's default":    {func(c *Config) { c.Platform = render }, "shutdown", "may take 32s to stop, and Render waits for 30s", "set maxShutdownDelaySeconds to 32 or more"},
		"Render's most": {func(c *Config) {
			c.Platform, c.StopsWithin, c.ShutdownTimeout = render, 407*time.Second, 400*time.Second
		}, "shutdown", "Render waits for 5m0s at most", "WORKER_SHUTDOWN_TIMEOUT to 4m53s"},
		"Kubernetes' default": {func(c *Config) { c.Platform = kubernetes }, "shutdown", "Kubernetes waits for 30s", "terminationGracePeriodSeconds to 32"},
		"what it was told":    {func(c *Config) { c.KillAfter = 10 * time.Second }, "shutdown", "is killed after 10s", "have the platform wait for 32s"},
		"told, on Render":     {func(c *Config) { c.KillAfter, c.Platform = 10*time.Second, render }, "shutdown", "is killed after 10s", "set maxShutdownDelaySeconds to 32"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg := config(t, "", "")
			requireOK(t, examine(t, cfg), c.check)
			c.change(&cfg)
			require(t, examine(t, cfg), c.check, Warning, c.says, c.wayOut)
		})
	}
	enough := config(t, "", "")
	enough.Platform, enough.KillAfter, enough.OutboundAllow = render, time.Minute, "10.0.0.0/8"
	requireOK(t, examine(t, enough), "settings", "shutdown")
}

func TestExamine_OfWrongSettingsNothingElseIsConcluded(t *testing.T) {
	t.Parallel()
	c := config(t, "", "")
	c.Faults, c.Pool.Size = []string{"DB_POOL_SIZE is 3000"}, 3000
	findings := examine(t, c)
	if len(findings) != 1 {
		t.Errorf("%d findings", len(findings))
	}
	require(t, findings, "settings", Failure, "DB_POOL_SIZE is 3000", "")
}

// at is a connection to an address.
type at struct {
	net.Conn
	addr string
}

func (a at) RemoteAddr() net.Addr {
	addr, _ := net.ResolveTCPAddr("tcp", a.addr)
	return addr
}

// overTLS returns the client's side of a connection to a server whose certificate ends then.
func overTLS(t *testing.T, ends time.Time) *tls.Conn {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: ends.AddDate(-1, 0, 0), NotAfter: ends}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	theirs, ours := net.Pipe()
	server := tls.Server(theirs, &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}})
	served := make(chan error, 1)
	go func() { served <- server.Handshake() }()
	client := tls.Client(ours, &tls.Config{InsecureSkipVerify: true})
	if err := client.Handshake(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		<-served
		_ = ours.Close()
		_ = theirs.Close()
	})
	return client
}

func TestCheckTLS_JudgesByTheAddressAndTheCertificate(t *testing.T) {
	t.Parallel()
	e := &examination{Config: Config{now: time.Now}}
	private, public := at{nil, "10.1.2.3:6379"}, at{nil, "8.8.8.8:6379"}
	good, soon, over := overTLS(t, time.Now().AddDate(0, 3, 0)), overTLS(t, time.Now().Add(72*time.Hour)), overTLS(t, time.Now().Add(-time.Hour))
	for name, c := range map[string]struct {
		conn     net.Conn
		remote   net.Addr
		verified bool
		result   Result
		says     string
	}{
		"plain, private":     {private, private.RemoteAddr(), false, OK, "none, at the private address 10.1.2.3:6379"},
		"plain, carrier's":   {private, at{nil, "100.64.1.1:1"}.RemoteAddr(), false, OK, "none"},
		"plain, a socket":    {private, &net.UnixAddr{Name: "/run/x", Net: "unix"}, false, OK, "none"},
		"plain, public":      {public, public.RemoteAddr(), false, Warning, "the public address 8.8.8.8:6379 is not encrypted"},
		"TLS":                {good, public.RemoteAddr(), true, OK, "TLS 1.3, the certificate is verified"},
		"unverified":         {good, public.RemoteAddr(), false, Warning, "certificate is not verified"},
		"unverified, inside": {good, private.RemoteAddr(), false, OK, "the certificate is not verified"},
		"ends soon":          {soon, public.RemoteAddr(), true, Warning, "the server's certificate ends on " + time.Now().Add(72*time.Hour).UTC().Format(time.DateOnly)},
		"has ended":          {over, private.RemoteAddr(), false, Warning, "has expired on "},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			require(t, e.checkTLS("redis tls", c.conn, c.remote, c.verified, "use rediss://"), "redis tls", c.result, c.says, "")
		})
	}
}
