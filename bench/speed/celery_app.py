"""Celery and SQLAlchemy for the comparison, as a careful team sets them up.

"produce JOB N" fills the queue, and "worker …" is Celery's own command. A worker writes how long a job waited, in ns, to
file 3 when the job has ended.
"""

import base64
import json
import os
import signal
import sys
import time
import uuid

from celery import Celery
from celery.signals import task_failure
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

app = Celery("bench", broker=os.environ["REDIS_URL"])
app.conf.update(
    task_ignore_result=True,
    task_serializer="json",
    accept_content=["json"],
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_cancel_long_running_tasks_on_connection_loss=True,
    worker_disable_rate_limits=True,
    worker_redirect_stdouts=False,
    broker_transport_options={"max_connections": 200},  # not 10: threads acknowledge side by side
)

pool_size = 5
# Each of a worker's processes has its own: nothing is connected before they are forked.
engine = create_engine(
    os.environ["DATABASE_URL"].replace("postgres://", "postgresql://", 1),
    pool_pre_ping=True,
    pool_size=pool_size,
    max_overflow=int(os.environ["POOL_SIZE"]) - pool_size,
    pool_recycle=1800,
    pool_timeout=30,
)
# The same pool, without the BEGIN and the COMMIT that a single statement doesn't need.
autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")

INSERT = text("INSERT INTO effects VALUES (:id)")
FIRST = text("INSERT INTO done VALUES (:id) ON CONFLICT DO NOTHING")


def job(do):
    """Makes a task of what a job does."""

    def run(self, enqueued):
        waited = time.time_ns() - enqueued
        do(self.request.id)
        os.write(3, b"%d\n" % waited)

    return app.task(
        run, bind=True, name=do.__name__, autoretry_for=(OperationalError,), retry_backoff=True, max_retries=20
    )


@job
def empty(id):
    pass


@job
def insert(id):
    with autocommit.connect() as connection:
        connection.execute(INSERT, {"id": id})


@job
def once(id):
    """Inserts unless the job has done so before, which Celery itself doesn't know."""
    with engine.begin() as tx:
        if tx.execute(FIRST, {"id": id}).rowcount:
            tx.execute(INSERT, {"id": id})


@task_failure.connect
def end(exception, **_):
    """Ends the worker, because Celery has given the job up, for which the measurement would wait."""
    print("a job has failed:", exception, file=sys.stderr, flush=True)
    os.killpg(0, signal.SIGKILL)


def produce(name, n):
    """Has Celery send one, and the others are copies of its message: to send each takes longer than to do it."""
    app.send_task(name, args=[0])
    with app.connection() as connection:
        redis, queue = connection.default_channel.client, app.conf.task_default_queue
        message = json.loads(redis.rpop(queue))
        _, kwargs, embed = json.loads(base64.b64decode(message["body"]))
        at_once = 1000
        for done in range(0, n, at_once):
            copies = []
            for _ in range(min(at_once, n - done)):
                id = str(uuid.uuid4())
                message["headers"].update(id=id, root_id=id)
                message["properties"].update(correlation_id=id, delivery_tag=str(uuid.uuid4()))
                body = json.dumps([[time.time_ns()], kwargs, embed])
                message["body"] = base64.b64encode(body.encode()).decode()
                copies.append(json.dumps(message))
            redis.lpush(queue, *copies)


if sys.argv[1] == "produce":
    produce(sys.argv[2], int(sys.argv[3]))
else:
    app.start(sys.argv[1:])
