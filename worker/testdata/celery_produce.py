"""Enqueues the job of each number that it reads, and answers when the broker has acknowledged it, or has not."""

import sys
from concurrent.futures import ThreadPoolExecutor

from celery_app import effect


def enqueue(line):
    n = int(line)
    try:
        effect.apply_async((n,), task_id=f"chaos-{n}")
        answer = f"ok {n}\n"
    except Exception as error:  # whatever it is, the test tries again
        answer = f"failed {n} {error!r}\n"
        sys.stderr.write(answer)
    sys.stdout.write(answer)
    sys.stdout.flush()


with ThreadPoolExecutor(8) as producers:  # as many as the test has
    for line in sys.stdin:
        producers.submit(enqueue, line)
