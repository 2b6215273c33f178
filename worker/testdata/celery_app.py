"""What the chaos test compares carpool with: its job as a careful team would write it for Celery and SQLAlchemy."""

import datetime
import json
import os
import random
import signal
import threading
import time

from celery import Celery
from celery.signals import task_failure, task_retry, task_success, worker_init
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

app = Celery("chaos", broker=os.environ["REDIS_URL"])
app.conf.update(
    task_ignore_result=True,
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    # No time limit: Celery takes a job that ran into one for failed, and drops it, with
    # task_acks_on_failure_or_timeout as without.
    # What runs when the connection to Redis is lost will be delivered again: Celery asks for this in a warning.
    worker_cancel_long_running_tasks_on_connection_loss=True,
    broker_connection_max_retries=None,
    worker_redirect_stdouts=False,
    broker_transport_options={
        # How long until a dead worker's jobs are delivered again. The default, an hour, would outlast the test. It
        # must be longer than a job may run, and than a retry may wait (the worker holds it meanwhile), or healthy
        # jobs are doubled.
        "visibility_timeout": 60,
        "socket_connect_timeout": 5,
        "socket_timeout": 5,
        "socket_keepalive": True,
    },
)

# Each of a worker's processes has its own: nothing is connected before they are forked.
engine = create_engine(
    os.environ["DATABASE_URL"].replace("postgres://", "postgresql://", 1),
    pool_pre_ping=True,
    pool_size=5,
    max_overflow=5,
    pool_recycle=1800,
    pool_timeout=30,
    connect_args={
        "connect_timeout": 5,
        # psycopg2 waits for ever for an answer that a black hole has swallowed. That the server hangs up on who says
        # nothing is what ends it.
        "options": "-c idle_in_transaction_session_timeout=15s -c idle_session_timeout=30s",
    },
)


@app.task(
    bind=True,
    name="chaos:effect",
    autoretry_for=(OperationalError,),
    retry_backoff=True,
    retry_backoff_max=30,  # seconds, less than the visibility timeout
    max_retries=20,
)
def effect(self, n):
    """Takes as long as chaosEffect.happen does."""
    pause = random.uniform(0, 0.02)
    if random.randrange(100) == 0:
        pause = random.uniform(0, 2)
    with engine.begin() as tx:
        tx.execute(text("INSERT INTO effects (job_id, n) VALUES (:id, :n)"), {"id": self.request.id, "n": n})
        time.sleep(pause)


def log(outcome, id, retries, error=None):
    """Writes the line of a job's end that the chaos test counts retries by, in one piece."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat()
    job = {"id": id, "kind": "chaos:effect", "attempt": retries + 1, "outcome": outcome}
    line = {"time": now, "msg": "job", "job": job, "error": error}
    os.write(2, (json.dumps(line, separators=(",", ":")) + "\n").encode())


@task_success.connect
def succeeded(sender, **_):
    log("done", sender.request.id, sender.request.retries)


@task_retry.connect
def retried(request, reason=None, **_):
    if reason:
        log("retry", request.id, request.retries, repr(reason))
    else:  # cancelled: it will be delivered again, and uses up no retry
        log("postponed", request.id, request.retries)


@task_failure.connect
def failed(task_id, exception, **_):
    log("failed", task_id, 0, repr(exception))


@worker_init.connect
def end_with_the_test(**_):
    def wait():
        os.read(0, 1)  # not sys.stdin, whose lock the forked processes would wait for
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
