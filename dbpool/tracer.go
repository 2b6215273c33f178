package dbpool

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// tracer is told by pgx of each statement on the pool's connections. It counts them,
// logs them if Config.Echo asks for it, and learns from their errors which
// connections are dead.
type tracer struct{ pool *Pool }

func (t tracer) began(ctx context.Context, pgxConn *pgx.Conn, sql string) {
	if c := connOf(pgxConn); c != nil {
		c.queries++
		c.wasClosed = pgxConn.IsClosed()
	}
	if t.pool.cfg.Echo {
		t.pool.log.InfoContext(ctx, "sql", "statement", sql)
	}
}

func (t tracer) ended(ctx context.Context, pgxConn *pgx.Conn, err error) {
	c := connOf(pgxConn)
	if c == nil || c.pgx == nil || c.wasClosed {
		return // it is being opened, or the statement only told that it was closed before
	}
	switch {
	case err == nil:
		c.answeredAt = time.Now()
	case isDeath(err), isReadOnly(err) && c.demoted(), pgxConn.IsClosed() && ctx.Err() == nil && isSocketError(err):
		c.markBroken()
		t.pool.newGeneration()
	case isReadOnly(err) && !c.announcesReadOnly():
		// The others keep their generation, because without an announcement the
		// transaction may just be READ ONLY.
		c.markBroken()
	case pgxConn.IsClosed():
		// Its caller gave up on an answer. The statement may have been slow; but
		// if the network is away, the others are too.
		t.pool.newGeneration()
	}
}

// isDeath reports whether err is the server's word that it ends the connection or
// takes none: an SQLSTATE of class 08, or one of a server that is shutting down, has
// crashed or is starting.
func isDeath(err error) bool {
	e, ok := errors.AsType[*pgconn.PgError](err)
	if !ok {
		return false
	}
	switch e.Code {
	case pgerrcode.AdminShutdown, pgerrcode.CrashShutdown, pgerrcode.CannotConnectNow:
		return true
	}
	// By the class, because poolers may send codes of it that Postgres lacks.
	return strings.HasPrefix(e.Code, pgerrcode.ConnectionException[:2])
}

// isSocketError reports whether err comes from a socket: its end, a reset, or pgx's
// word that it had found the connection closed. The socket is the connection's own
// only if pgx has closed the connection over it.
func isSocketError(err error) bool {
	_, network := errors.AsType[net.Error](err)
	return network || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, pgconn.ErrConnClosed)
}

// isReadOnly reports whether err is the server's refusal to write. A primary that
// became a standby gives it, but so does a transaction that was begun READ ONLY.
func isReadOnly(err error) bool {
	e, ok := errors.AsType[*pgconn.PgError](err)
	return ok && e.Code == pgerrcode.ReadOnlySQLTransaction
}

func (t tracer) TraceQueryStart(ctx context.Context, pgxConn *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	t.began(ctx, pgxConn, data.SQL)
	return ctx
}

func (t tracer) TraceQueryEnd(ctx context.Context, pgxConn *pgx.Conn, data pgx.TraceQueryEndData) {
	t.ended(ctx, pgxConn, data.Err)
}

func (t tracer) TraceBatchStart(ctx context.Context, pgxConn *pgx.Conn, data pgx.TraceBatchStartData) context.Context {
	for _, q := range data.Batch.QueuedQueries {
		t.began(ctx, pgxConn, q.SQL)
	}
	return ctx
}

func (t tracer) TraceBatchQuery(context.Context, *pgx.Conn, pgx.TraceBatchQueryData) {}

func (t tracer) TraceBatchEnd(ctx context.Context, pgxConn *pgx.Conn, data pgx.TraceBatchEndData) {
	t.ended(ctx, pgxConn, data.Err)
}

func (t tracer) TraceCopyFromStart(ctx context.Context, pgxConn *pgx.Conn, data pgx.TraceCopyFromStartData) context.Context {
	t.began(ctx, pgxConn, "COPY "+data.TableName.Sanitize()+" FROM STDIN")
	return ctx
}

func (t tracer) TraceCopyFromEnd(ctx context.Context, pgxConn *pgx.Conn, data pgx.TraceCopyFromEndData) {
	t.ended(ctx, pgxConn, data.Err)
}
