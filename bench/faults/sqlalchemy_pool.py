"""SQLAlchemy's QueuePool for the comparison: takes commands, answers in JSON."""

import json
import sys
import time

from sqlalchemy import create_engine, text

engine = create_engine(
    sys.stdin.readline().strip(),  # not an argument: it has a password
    pool_pre_ping=True, pool_size=5, max_overflow=5, pool_recycle=1800, pool_timeout=30,
    connect_args={"connect_timeout": 5, "options": "-c statement_timeout=5000"},
)


def fill(n):
    held = [engine.connect() for _ in range(n)]
    for c in held:
        c.close()


def run(n):
    failed, recovered, began = 0, None, time.monotonic()
    for _ in range(n):
        try:
            with engine.connect() as c:
                c.execute(text("SELECT 1"))
            if recovered is None:
                recovered = time.monotonic() - began
        except Exception:
            failed += 1
    return {"failed": failed, "recovered_ms": None if recovered is None else recovered * 1000}


for line in sys.stdin:
    command, n = line.split()
    answer = fill(int(n)) if command == "fill" else run(int(n))
    print(json.dumps(answer), flush=True)
