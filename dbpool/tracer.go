package dbpool

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// tracer sees every statement on every connection of the pool.
type tracer struct{ pool *Pool }

func memberOf(conn *pgx.Conn) *member {
	m, _ := conn.PgConn().CustomData()[memberKey].(*member)
	return m
}

func (t tracer) began(ctx context.Context, conn *pgx.Conn, sql string) {
	if m := memberOf(conn); m != nil {
		m.queries++
		m.wasShut = conn.IsClosed()
	}
	if t.pool.cfg.Echo {
		t.pool.log.InfoContext(ctx, "sql", "statement", sql)
	}
}

func (t tracer) ended(ctx context.Context, conn *pgx.Conn, err error) {
	m := memberOf(conn)
	if m == nil || m.conn == nil || m.wasShut {
		return // it is not the pool's yet, or not any more
	}
	switch {
	case err == nil:
		m.provenAt = time.Now()
	case isDeath(err), isReadOnly(err) && m.leftBehind(), conn.IsClosed() && ctx.Err() == nil && isSocketError(err):
		m.breaks()
		t.pool.died()
	case isReadOnly(err) && !m.tellsReadOnly():
		m.breaks() // perhaps it alone: it can't tell
	case conn.IsClosed():
		// Its caller waited for an answer in vain. That may be the statement's
		// fault, or the network's: then the others would be waited for as long.
		t.pool.died()
	}
}

// breaks marks a lent connection as one that is of no more use.
func (m *member) breaks() {
	if !m.broken {
		m.broken = true
		m.borrower.lost()
	}
}

// isDeath reports whether err is the server's word that the connection, or it
// itself, is going: SQLSTATE class 08 (connection), 57P01 to 57P03 (the server is
// shutting down, crashed or starting).
func isDeath(err error) bool {
	e, ok := errors.AsType[*pgconn.PgError](err)
	return ok && (strings.HasPrefix(e.Code, "08") || e.Code == "57P01" || e.Code == "57P02" || e.Code == "57P03")
}

// isSocketError reports whether err is the socket's: an end, a reset, or pgx' word
// that it had found one before the statement. Of a connection that pgx has not
// closed over it, it is somebody else's socket.
func isSocketError(err error) bool {
	_, network := errors.AsType[net.Error](err)
	return network || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, pgconn.ErrConnClosed)
}

// isReadOnly is SQLSTATE 25006, which a primary that became a standby gives, but
// so does a transaction that was begun READ ONLY.
func isReadOnly(err error) bool {
	e, ok := errors.AsType[*pgconn.PgError](err)
	return ok && e.Code == "25006"
}

func (t tracer) TraceQueryStart(ctx context.Context, conn *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	t.began(ctx, conn, data.SQL)
	return ctx
}

func (t tracer) TraceQueryEnd(ctx context.Context, conn *pgx.Conn, data pgx.TraceQueryEndData) {
	t.ended(ctx, conn, data.Err)
}

func (t tracer) TraceBatchStart(ctx context.Context, conn *pgx.Conn, data pgx.TraceBatchStartData) context.Context {
	for _, q := range data.Batch.QueuedQueries {
		t.began(ctx, conn, q.SQL)
	}
	return ctx
}

func (t tracer) TraceBatchQuery(context.Context, *pgx.Conn, pgx.TraceBatchQueryData) {}

func (t tracer) TraceBatchEnd(ctx context.Context, conn *pgx.Conn, data pgx.TraceBatchEndData) {
	t.ended(ctx, conn, data.Err)
}

func (t tracer) TraceCopyFromStart(ctx context.Context, conn *pgx.Conn, data pgx.TraceCopyFromStartData) context.Context {
	t.began(ctx, conn, "COPY "+data.TableName.Sanitize()+" FROM STDIN")
	return ctx
}

func (t tracer) TraceCopyFromEnd(ctx context.Context, conn *pgx.Conn, data pgx.TraceCopyFromEndData) {
	t.ended(ctx, conn, data.Err)
}
