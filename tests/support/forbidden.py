"""What the role that reads may not do, whatever it sets in its session."""

from __future__ import annotations

import psycopg2
import pytest

STATEMENTS = [
    "CREATE TABLE mine (x int)",
    "CREATE TEMPORARY TABLE mine (x int)",
    "CREATE SCHEMA mine",
    "SELECT lo_create(0)",
    "SELECT lo_creat(-1)",
    "SELECT lo_from_bytea(0, 'x')",
    "SELECT lo_put(1, 0, 'x')",
    "SELECT lowrite(0, 'x')",
    "SELECT pg_advisory_lock(1)",
    "SELECT pg_try_advisory_xact_lock_shared(1, 2)",
    "SET temp_file_limit = -1",
    "ALTER ROLE tuner_reader SET temp_file_limit = -1",
    "ALTER ROLE tuner_reader RESET temp_file_limit",
    "ALTER ROLE tuner_reader CONNECTION LIMIT -1",
    "ALTER ROLE tuner_reader CREATEDB",
    "ALTER ROLE tuner PASSWORD NULL",
    "COPY (SELECT 1) TO '/tmp/mine'",
    "COPY (SELECT 1) TO PROGRAM 'true'",
    "SELECT pg_read_file('/etc/passwd')",
]


def check_is_refused_all(reader_url: str) -> None:
    """Try each statement in a transaction that may write, and to get into the other databases of the server."""
    connection = psycopg2.connect(reader_url)
    with connection.cursor() as cursor:
        cursor.execute("SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE")
        connection.commit()
        for statement in STATEMENTS:
            try:
                with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                    cursor.execute(statement)
            except BaseException as failure:
                failure.add_note(statement)
                raise
            connection.rollback()
        cursor.execute("SHOW temp_file_limit")
        assert cursor.fetchone() == ("1GB",)
    connection.close()
    for database in ("postgres", "template1"):
        with pytest.raises(psycopg2.OperationalError, match="permission denied for database"):
            psycopg2.connect(reader_url, dbname=database)
