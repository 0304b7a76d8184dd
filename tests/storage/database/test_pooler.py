"""Sessions through a real PgBouncer, which gives each transaction another session of the server."""

import io
import os
import re
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import psycopg2
import pytest
from command import wait_for
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from pooler import ListeningServer, a_pooler
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from storage import (
    InvalidURLError,
    NoDatabaseError,
    NotReadyError,
    StorageError,
    UnreachableError,
    ensure_schema,
    open_engine,
)
from storage.database.engine import engine_options, is_outage
from storage.database.errors import NotLetInError
from storage.database.sessions import Backoff, Sessions

TRANSACTION = {
    "pool_mode": "transaction",
    "default_pool_size": 3,
    "query_wait_timeout": 1,
    "server_login_retry": 1,
    "max_client_conn": 20,
}
IGNORING = {**TRANSACTION, "ignore_startup_parameters": "options"}
SHOWN = (
    "SELECT concat_ws(' ', "
    + ", ".join(f"current_setting('{name}')" for name in ("lock_timeout", "statement_timeout", "TimeZone"))
    + ")"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = ListeningServer(tmp_path_factory.mktemp("pooled"))
    try:
        server.start()
        yield server
    finally:
        server.destroy()


@pytest.fixture(scope="module")
def running(server):
    with a_pooler(server, TRANSACTION) as pooler:
        yield pooler


@pytest.fixture
def pooler(running, server):
    """The pooler, and the server behind it, as they were made."""
    server.start()
    running.restart(TRANSACTION)
    return running


@pytest.fixture
def engine_of():
    opened = []

    def open_one(url, **settings):
        opened.append(open_engine(url, **settings))
        return opened[-1]

    yield open_one
    for engine in opened:
        engine.dispose()


@contextmanager
def as_admin(server):
    connection = psycopg2.connect(server.admin_url())
    connection.autocommit = True
    with connection.cursor() as cursor:
        yield cursor.execute
    connection.close()


def one(engine, statement="SELECT 1"):
    return Sessions(engine).statement(lambda conn: conn.scalar(text(statement)))


@pytest.mark.parametrize("settings", [TRANSACTION, IGNORING, {**TRANSACTION, "pool_mode": "session"}])
def test_each_transaction_has_our_settings_and_leaves_none_to_others(pooler, engine_of, settings):
    pooler.restart(settings)
    engine = engine_of(pooler.url, application_name="tuner mine")
    sessions = Sessions(engine)
    for run in (sessions.statement, sessions.snapshot):
        assert run(lambda conn: conn.scalar(text(SHOWN))) == "10s 1min UTC"
    with engine.begin() as conn:
        assert conn.scalar(text("SHOW application_name")) == "tuner mine"
        conn.execute(text("SET LOCAL lock_timeout = '3s'"))
        assert conn.scalar(text(SHOWN)) == "3s 1min UTC"  # what was set since is not set back
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as conn:
        conn.execute(text("CREATE TABLE kept (number integer, it text)"))
        statement = text(f"INSERT INTO kept SELECT :number, {SHOWN.removeprefix('SELECT ')}")
        conn.execute(statement, [{"number": 1}, {"number": 2}])
        copy = f"COPY ({SHOWN} UNION ALL SELECT it FROM kept) TO STDOUT"  # noqa: S608
        with conn.connection.cursor() as cursor:
            cursor.copy_expert(copy, copied := io.BytesIO())
        conn.execute(text("DROP TABLE kept"))
    assert copied.getvalue().decode().splitlines() == 3 * ["10s 1min UTC"]
    plain = psycopg2.connect(pooler.url.render_as_string(hide_password=False))
    with plain.cursor() as cursor:
        cursor.execute("SHOW statement_timeout")
        assert cursor.fetchone() == ("0",)
    plain.close()


def test_options_of_the_url_and_of_the_environment_count_as_they_do_without_a_pooler(pooler, engine_of, monkeypatch):
    monkeypatch.setenv("PGOPTIONS", "-c lock_timeout=7s -c lock-timeout=8s --statement_timeout=9s")
    assert one(engine_of(pooler.url), SHOWN) == "8s 9s UTC"
    given = {"options": r"-c search_path=a,\ public -ctuner.odd=5\0%\ of\ '\\'"}
    engine = engine_of(pooler.url.update_query_dict(given))
    with engine.connect() as conn:
        seen = conn.execute(
            text(f"{SHOWN}, :a, current_setting('search_path'), current_setting('tuner.odd')"), {"a": 1}
        )
        assert seen.one() == ("10s 1min UTC", 1, "a, public", r"50% of '\'")


def test_a_read_only_engine_refuses_to_write(pooler, engine_of):
    with engine_of(pooler.url, read_only=True).connect() as conn:
        assert conn.scalar(text("SELECT 1")) == 1
        with pytest.raises(DBAPIError, match=r"read-only transaction"):
            conn.execute(text("CREATE TABLE written ()"))
    # As optuna-dashboard opens it.
    url = pooler.url.set(drivername="postgresql+psycopg2")
    ensure_schema(engine_of(url))
    theirs = RDBStorage(
        url.render_as_string(hide_password=False),
        engine_kwargs=engine_options(url, read_only=True, application_name="tuner"),
        skip_table_creation=True,
    )
    assert theirs.get_all_studies() == []
    with pytest.raises(StorageInternalError):
        theirs.create_new_study([StudyDirection.MINIMIZE])
    theirs.remove_session()
    theirs.engine.dispose()


def test_statement_pooling_is_refused_with_what_to_set(pooler, engine_of):
    pooler.restart({**IGNORING, "pool_mode": "statement"})
    with pytest.raises(StorageError, match=r"cannot use .*statement pooling mode; .*: set its pool_mode to") as caught:
        engine_of(pooler.url).connect()
    assert not is_outage(caught.value)


def test_who_waits_for_the_tables_leaves_the_poolers_sessions_to_who_makes_them(server, pooler, engine_of):
    with as_admin(server) as execute:
        execute("CREATE DATABASE fresh OWNER tuner")
    pooler.restart({**TRANSACTION, "query_wait_timeout": 30})
    engines = [engine_of(pooler.url.set(database="fresh")) for _ in range(6)]
    failed = []

    def ensure(engine):
        try:
            ensure_schema(engine)
        except StorageError as error:
            failed.append(error)

    starting = [threading.Thread(target=ensure, args=(engine,)) for engine in engines]
    for thread in starting:
        thread.start()
    for thread in starting:
        thread.join()
    assert failed == []
    assert one(engines[0], "SELECT max(version) > 0 FROM tuner_schema") is True


def test_what_the_server_knows_of_a_password_is_enough_for_the_pooler(server, pooler, engine_of):
    (query,) = re.findall(r"SELECT format.*pg_authid.*", (Path(__file__).parents[3] / "docs" / "load.md").read_text())
    plain = pooler.users
    connection = psycopg2.connect(server.admin_url())
    with connection.cursor() as cursor:
        cursor.execute(query.replace("'tuner_reader'", "'nobody'"))
        ((pooler.users,),) = cursor.fetchall()
    connection.close()
    assert pooler.password not in pooler.users
    try:
        pooler.restart()
        assert one(engine_of(pooler.url)) == 1
    finally:
        pooler.users = plain


def test_a_pooler_without_a_free_connection_says_what_to_raise(pooler, engine_of):
    engine = engine_of(pooler.url)
    assert one(engine) == 1
    holders = [engine_of(pooler.url).connect() for _ in range(3)]
    for conn in holders:
        conn.execute(text("SELECT 1"))
    with pytest.raises(
        NotReadyError, match=r"no free connection at .*query_wait_timeout; .*default_pool_size"
    ) as caught:
        one(engine)
    assert "closed the connection" not in str(caught.value)
    for conn in holders:
        conn.close()
    assert one(engine) == 1
    pooler.restart({**TRANSACTION, "max_client_conn": 1})
    with (
        engine.connect(),
        pytest.raises(NotReadyError, match=r"raise the pooler's max_client_conn above 2 x processes"),
    ):
        one(engine_of(pooler.url))


def test_who_is_not_let_in_is_told_so_by_the_pooler_and_by_the_server_behind_it(server, pooler, engine_of):
    with pytest.raises(NotLetInError, match=r"not let in at .*SASL authentication failed"):
        one(engine_of(pooler.url.set(password="another")))
    with pytest.raises(NoDatabaseError, match=r'"absent" does not exist'):
        one(engine_of(pooler.url.set(database="absent")))
    with pytest.raises(InvalidURLError, match=r"unsupported startup parameter: options; leave it out, or name it in"):
        one(engine_of(pooler.url.update_query_dict({"options": "endpoint=of-another"})))
    with as_admin(server) as execute:
        execute("ALTER ROLE tuner PASSWORD 'another'")
        try:
            pooler.restart()
            with pytest.raises(NotLetInError, match=r'not let in at .*password authentication failed for user "tuner"'):
                one(engine_of(pooler.url))
        finally:
            execute(f"ALTER ROLE tuner PASSWORD '{pooler.password}'")


@pytest.mark.slow
def test_what_is_told_to_be_written_is_there_once_whatever_restarts(server, pooler, engine_of):
    engine = engine_of(pooler.url)
    ensure_schema(engine)
    with engine.begin() as conn:
        conn.execute(text("CREATE TABLE written (number integer)"))
    away, written = [], []
    sessions = Sessions(engine, Backoff(60, notice=away.append))
    done = threading.Event()

    def insert(conn):
        conn.execute(text("INSERT INTO written VALUES (:number)"), {"number": len(written)})

    def write():
        while not done.is_set():
            sessions.transaction(insert)
            written.append(len(written))

    def crash():
        os.kill(server.status().pid, signal.SIGQUIT)
        wait_for(lambda: not server.status().running, "the server is gone")
        with pytest.raises(UnreachableError) as caught:
            one(engine)
        assert is_outage(caught.value)
        server.start()

    writer = threading.Thread(target=write)
    writer.start()
    for fault in (pooler.restart, crash):
        before = len(written)
        fault()
        wait_for(lambda before=before: len(written) > before + 1, "it writes again")
    done.set()
    writer.join()
    assert away
    assert one(engine, "SELECT array_agg(number ORDER BY number) FROM written") == written
