#!/usr/bin/env python3
"""Enqueues a job in a transaction, with Debian's python3-psycopg2, or psycopg2 from anywhere else.

    DATABASE_URL=postgres://… python3 enqueue.py
"""

import os

import psycopg2
from psycopg2.extras import Json

ORDER = {"number": "A-17", "net_cents": 1000}


def enqueue(cursor, kind, payload):
    cursor.execute("SELECT carpool.enqueue(%s, %s, queue => %s)", (kind, Json(payload), "low"))
    return cursor.fetchone()[0]


connection = psycopg2.connect(os.environ["DATABASE_URL"])
try:
    with connection, connection.cursor() as cursor:  # a transaction: your own statements go here too
        job = enqueue(cursor, "order:book", ORDER)
    print("committed", job)

    with connection.cursor() as cursor:
        job = enqueue(cursor, "order:book", ORDER)
        connection.rollback()
    print("rolled back", job)
finally:
    connection.close()
