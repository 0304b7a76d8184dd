import socket
import subprocess
import threading
import time
import traceback

import pytest
from proxy import Proxy
from sqlalchemy import text
from sqlalchemy.exc import DataError, IntegrityError, InternalError

from storage import AuthenticationError, InvalidURLError, StorageError, UnreachableError, open_engine, parse_url
from storage.database.engine import CONNECTIONS_PER_PROCESS, is_outage

SECRET = "s3cr3tWord"


@pytest.fixture
def engine_of():
    """Open engines that are disposed of with the test."""
    opened = []

    def open_one(url, **settings):
        opened.append(open_engine(url, **settings))
        return opened[-1]

    yield open_one
    for engine in opened:
        engine.dispose()


def _connect(engine):
    with engine.connect():
        pass


@pytest.mark.parametrize(
    ("setting", "promised"),
    [
        ("TimeZone", "UTC"),
        ("statement_timeout", "1min"),
        ("lock_timeout", "10s"),
        ("idle_in_transaction_session_timeout", "1min"),
        ("application_name", "tuner"),
        ("default_transaction_read_only", "off"),
    ],
)
def test_a_session_has_the_promised_settings(server_url, engine_of, setting, promised):
    with engine_of(server_url).connect() as conn:
        assert conn.scalar(text(f"SHOW {setting}")) == promised


def test_connecting_has_the_promised_deadlines(server_url, engine_of):
    with engine_of(server_url).connect() as conn:
        parameters = conn.connection.dbapi_connection.get_dsn_parameters()
    assert {name: parameters[name] for name in parameters if name.startswith(("connect_", "keep", "tcp_"))} == {
        "connect_timeout": "5",
        "keepalives": "1",
        "keepalives_idle": "10",
        "keepalives_interval": "5",
        "keepalives_count": "3",
        "tcp_user_timeout": "30000",
    }


def test_what_the_url_says_wins(server_url, engine_of):
    query = {
        "application_name": "mine",
        "connect_timeout": "17",
        "options": "-c statement_timeout=7s -c default_transaction_read_only=off",
    }
    with engine_of(parse_url(server_url).update_query_dict(query), read_only=True).connect() as conn:
        assert conn.connection.dbapi_connection.get_dsn_parameters()["connect_timeout"] == "17"
        shown = [
            conn.scalar(text(f"SHOW {name}")) for name in ("application_name", "statement_timeout", "lock_timeout")
        ]
        assert shown == ["mine", "7s", "10s"]
        assert conn.scalar(text("SHOW default_transaction_read_only")) == "on"


@pytest.fixture
def another_server(server, tmp_path):
    """The URL of the same server as one that we did not start is seen: by its socket alone."""
    found = server.status()
    for file in (name := f".s.PGSQL.{found.port}", f"{name}.lock"):
        (tmp_path / file).symlink_to(found.socket_directory / file)
    return f"postgresql://tuner@/tuner?host={tmp_path}"


def test_pgoptions_of_the_environment_still_counts_for_another_server(another_server, engine_of, monkeypatch):
    monkeypatch.setenv("PGOPTIONS", "-c statement_timeout=9s")
    with engine_of(another_server).connect() as conn:
        assert conn.scalar(text("SHOW statement_timeout")) == "9s"


# Each would keep us out, or change what the session does.
MEANT_FOR_ANOTHER = {
    "PGCHANNELBINDING": "require",
    "PGDATESTYLE": "of another",
    "PGGEQO": "of another",
    "PGGSSENCMODE": "require",
    "PGHOSTADDR": "127.0.0.9",
    "PGOPTIONS": "-c search_path=other",
    "PGREQUIREAUTH": "scram-sha-256",
    "PGREQUIREPEER": "somebody",
    "PGSERVICE": "other",
    "PGSERVICEFILE": "/nonexistent",
    "PGSSLMODE": "of another",
    "PGTARGETSESSIONATTRS": "standby",
    "PGTZ": "of another",
}


@pytest.mark.parametrize("name", MEANT_FOR_ANOTHER)
def test_no_variable_of_libpq_counts_for_an_embedded_server(server, engine_of, monkeypatch, name):
    monkeypatch.setenv(name, MEANT_FOR_ANOTHER[name])
    with engine_of(server.url()).connect() as conn:
        assert conn.scalar(text("SELECT current_setting('search_path')")) == '"$user", public'
    # What the process starts itself is to find them: by the environment that the C library has.
    assert subprocess.check_output(["printenv", name], text=True).strip() == MEANT_FOR_ANOTHER[name]


@pytest.mark.parametrize("name", sorted(MEANT_FOR_ANOTHER.keys() - {"PGOPTIONS", "PGSERVICEFILE"}))
def test_an_error_names_the_variable_that_is_in_the_way_of_another_server(another_server, engine_of, monkeypatch, name):
    monkeypatch.setenv(name, MEANT_FOR_ANOTHER[name])
    monkeypatch.setenv("PGDATABASE", "the URL has one")
    with pytest.raises(StorageError, match=rf"; variables of the environment took part: {name}$") as caught:
        _connect(engine_of(another_server))
    assert MEANT_FOR_ANOTHER[name] not in str(caught.value).rpartition(";")[2]


def test_names_in_any_script_are_sent_whatever_the_variables_say(another_server, engine_of, monkeypatch):
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    with engine_of(another_server).connect() as conn:
        assert conn.scalar(text("SELECT length(:name)"), {"name": "模型"}) == 2


def test_a_read_only_engine_reads_and_refuses_to_write(server_url, engine_of):
    with engine_of(server_url, read_only=True).connect() as conn:
        assert conn.scalar(text("SELECT 1")) == 1
        with pytest.raises(InternalError, match=r"read-only transaction"):
            conn.execute(text("CREATE TABLE written ()"))


def test_eight_threads_use_two_connections(server_url, engine_of):
    engine = engine_of(server_url, application_name="counted")
    seen = []

    def work():
        with engine.connect() as conn:
            conn.execute(text("SELECT pg_sleep(0.05)"))
            seen.append(conn.scalar(text("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'counted'")))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert max(seen) == CONNECTIONS_PER_PROCESS == 2


def test_a_connection_that_died_while_idle_is_replaced_unnoticed(server_url, engine_of):
    engine, other = engine_of(server_url), engine_of(server_url)
    with engine.connect() as conn:
        pid = conn.scalar(text("SELECT pg_backend_pid()"))
    with other.connect() as conn:
        assert conn.scalar(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
    with engine.connect() as conn:
        assert conn.scalar(text("SELECT pg_backend_pid()")) != pid


def test_errors_of_statements_stay_sqlalchemys(database, engine_of):
    with engine_of(database).connect() as conn, pytest.raises(IntegrityError):
        conn.execute(text("INSERT INTO studies (study_name) VALUES (NULL)"))


def test_a_connection_that_dies_in_a_statement_is_unreachable_and_another_is_made(database, engine_of):
    engine = engine_of(database)
    with engine.connect() as conn:
        pid = conn.scalar(text("SELECT pg_backend_pid()"))
        with engine_of(database).connect() as other:
            other.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
        with pytest.raises(UnreachableError, match=r"lost the connection to .*; check that the server runs") as caught:
            conn.execute(text("SELECT 1"))
    assert is_outage(caught.value)
    with engine.connect() as conn:
        assert conn.scalar(text("SELECT 1")) == 1


def test_what_the_database_refuses_is_no_outage(database, engine_of):
    with engine_of(database).connect() as conn, pytest.raises(DataError) as caught:
        conn.execute(text("SELECT CAST('x' AS integer)"))
    assert not is_outage(caught.value)


def _closed_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_a_closed_port_is_unreachable_at_once_and_the_password_unshown(engine_of):
    url = f"postgresql://ann:{SECRET}@127.0.0.1:{_closed_port()}/tuner"
    started = time.monotonic()
    with pytest.raises(UnreachableError, match=r"ann:\*\*\*@127.*Connection refused; check that the server") as caught:
        _connect(engine_of(url))
    assert time.monotonic() - started < 2
    assert not isinstance(caught.value, AuthenticationError)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.slow
def test_a_server_that_accepts_and_says_nothing_is_unreachable_by_the_deadline(engine_of):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        started = time.monotonic()
        with pytest.raises(UnreachableError, match=r"timeout expired"):
            _connect(engine_of(f"postgresql://ann@127.0.0.1:{port}/tuner?connect_timeout=2"))
        assert 1 < time.monotonic() - started < 8


def test_a_server_without_tls_is_not_asked_again_where_tls_is_wanted(engine_of):
    def refuse_tls():
        client, _ = listener.accept()
        with client:
            client.recv(8)  # libpq's SSLRequest
            client.sendall(b"N")
            client.recv(1)  # until it hangs up

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=refuse_tls)
        server.start()
        url = f"postgresql://ann@127.0.0.1:{listener.getsockname()[1]}/tuner?sslmode=verify-full"
        with pytest.raises(AuthenticationError, match=r"no TLS at .*; give the server a certificate") as caught:
            _connect(engine_of(url))
        server.join()
    assert not is_outage(caught.value)


def test_an_unknown_host_is_unreachable(engine_of):
    with pytest.raises(UnreachableError, match=r"could not translate host name"):
        _connect(engine_of("postgresql://ann@no-such-host.invalid/tuner"))


def test_a_missing_socket_is_unreachable(engine_of, tmp_path):
    with pytest.raises(UnreachableError, match=r"No such file or directory; check") as caught:
        _connect(engine_of(f"postgresql://ann@/tuner?host={tmp_path}"))
    assert "Is the server running" not in str(caught.value)


def test_a_missing_database_is_named(server_url, engine_of):
    with pytest.raises(UnreachableError, match=r'no such database at .*"absent" does not exist; create it') as caught:
        _connect(engine_of(parse_url(server_url).set(database="absent")))
    assert not isinstance(caught.value, AuthenticationError)


def test_a_role_that_may_not_come_in_is_an_authentication_error(server_url, engine_of):
    with pytest.raises(AuthenticationError, match=r"nobody_we_know"):
        _connect(engine_of(parse_url(server_url).set(username="nobody_we_know")))


def test_a_full_server_is_unreachable_with_the_arithmetic(database, maintenance_url, engine_of):
    name = parse_url(database).database
    with engine_of(maintenance_url).begin() as conn:
        # A superuser gets past the limit, and a role for everyday work is none.
        if conn.scalar(text("SELECT rolsuper FROM pg_roles WHERE rolname = :name"), {"name": _role(database, conn)}):
            pytest.skip("needs a role that is no superuser")
        conn.execute(text(f'ALTER DATABASE "{name}" CONNECTION LIMIT 0'))
    with pytest.raises(UnreachableError, match=r"too many connections for database.*2 x processes"):
        _connect(engine_of(database))


def _role(database, conn):
    return parse_url(database).username or conn.scalar(text("SELECT current_user"))


@pytest.mark.parametrize(
    "query", ["sslmod=require", "sslmode=maybe", "connect_timeout=soon", "plugin=none", "pgbouncer=true"]
)
def test_a_bad_parameter_is_an_error_of_the_url(server_url, engine_of, query):
    name, value = query.split("=")
    url = parse_url(server_url).update_query_dict({name: value}).set(password=SECRET)
    with pytest.raises(InvalidURLError, match=r"cannot use postgresql://.*") as caught:
        _connect(engine_of(url))
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_an_engine_does_not_show_its_password(engine_of):
    assert SECRET not in repr(engine_of(f"postgresql://ann:{SECRET}@db/tuner"))


def test_a_connection_is_asked_whether_it_lives_only_after_it_idled(database, engine_of, monkeypatch):
    proxy = Proxy(database)
    try:
        engine = engine_of(proxy.url)
        with engine.connect() as conn:
            conn.execute(text("SELECT 2"))
        proxy.forget()
        for number, level in enumerate(("AUTOCOMMIT", "REPEATABLE READ", "AUTOCOMMIT")):
            with engine.execution_options(isolation_level=level).connect() as conn:
                conn.execute(text(f"SELECT {number}"))
        begin = "BEGIN ISOLATION LEVEL REPEATABLE READ"
        assert proxy.queries == ["SELECT 0", begin, "SELECT 1", "ROLLBACK", "SELECT 2"]
        proxy.forget()
        monkeypatch.setattr("storage.database.engine._IDLE_S", 0)
        with engine.connect() as conn:
            conn.execute(text("SELECT 4"))
        assert proxy.queries == ["SELECT 1", "BEGIN", "SELECT 4", "ROLLBACK"]
    finally:
        proxy.close()
