import socket
import stat

import pytest
from sqlalchemy import text

from storage import AuthenticationError, EmbeddedServer, EmbeddedServerError, open_engine, parse_url
from storage.database.engine import is_outage
from storage.database.url import with_password_file


@pytest.fixture(scope="module")
def port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def listening(tmp_path_factory, port):
    server = EmbeddedServer(tmp_path_factory.mktemp("listening"))
    server.start(f"127.0.0.1:{port}")
    yield server
    server.destroy()


@pytest.fixture
def connect():
    engines = []

    def connect(url):
        engines.append(open_engine(url))
        with engines[-1].connect() as conn:
            return conn.scalar(text("SELECT current_user || ' at ' || host(inet_server_addr())"))

    yield connect
    for engine in engines:
        engine.dispose()


@pytest.mark.slow
def test_the_generated_password_opens_the_port(listening, port, connect):
    url = with_password_file(f"postgresql://tuner@127.0.0.1:{port}/tuner", listening.password_file)
    assert connect(url) == "tuner at 127.0.0.1"
    assert stat.S_IMODE(listening.password_file.stat().st_mode) == 0o600
    assert len(listening.password_file.read_text()) >= 32
    assert listening.status().listen == f"127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("role", "told"),
    [
        ("tuner", "password authentication failed"),
        ("tuner_admin", "no pg_hba.conf entry"),
        ("tuner_reader", "no pg_hba"),
    ],
)
def test_a_wrong_password_or_another_role_is_an_authentication_error(port, listening, connect, role, told):
    url = parse_url(f"postgresql://{role}@127.0.0.1:{port}/tuner").set(password="wr0ng")
    with pytest.raises(AuthenticationError, match=rf"not let in at postgresql://{role}:.*{told}") as caught:
        connect(url)
    assert "wr0ng" not in str(caught.value)


def test_a_password_is_read_at_each_connection_and_one_that_is_wrong_is_an_outage(listening, port, connect, tmp_path):
    file = tmp_path / "password"
    file.touch(0o600)
    file.write_text("wr0ng")
    url = with_password_file(f"postgresql://tuner@127.0.0.1:{port}/tuner", file)
    for content, told in (("wr0ng", "password authentication failed"), ("", "must hold the password alone")):
        file.write_text(content)
        with pytest.raises(AuthenticationError, match=told) as caught:
            connect(url)
        assert is_outage(caught.value)
    file.write_text(listening.password_file.read_text())
    assert connect(url) == "tuner at 127.0.0.1"


def test_no_password_is_an_authentication_error(port, listening, connect, monkeypatch):
    monkeypatch.setenv("PGPASSFILE", "/nonexistent")
    with pytest.raises(AuthenticationError, match=r"no password supplied; check the user name"):
        connect(f"postgresql://tuner@127.0.0.1:{port}/tuner")


def test_pgpassword_counts(port, listening, connect, monkeypatch):
    monkeypatch.setenv("PGPASSWORD", listening.password_file.read_text())
    assert connect(f"postgresql://tuner@127.0.0.1:{port}/tuner") == "tuner at 127.0.0.1"


def test_the_password_is_in_no_log(listening):
    password = listening.password_file.read_text()
    assert password not in listening._log.read_text()


def test_starting_again_keeps_address_and_password(listening, port, connect):
    password = listening.password_file.read_text()
    pid = listening.status().pid
    listening.start(f"127.0.0.1:{port}")
    assert listening.start() == listening.url()
    assert (listening.status().pid, listening.password_file.read_text()) == (pid, password)


def test_another_address_while_it_runs_is_refused(listening, server, port):
    with pytest.raises(EmbeddedServerError, match=rf"runs with 127.0.0.1:{port}, not \[::1\]:1; stop it"):
        listening.start("[::1]:1")
    with pytest.raises(EmbeddedServerError, match=r"runs with no TCP port, not 127.0.0.1:1; stop it"):
        server.start("127.0.0.1:1")


@pytest.mark.parametrize(
    "address", ["0.0.0.0:5433", "10.1.2.3:5433", "*:5433", "5433", "127.0.0.1", "127.0.0.1:0", "::1:x"]
)
def test_an_address_that_is_not_loopback_is_refused(tmp_path, address):
    with pytest.raises(EmbeddedServerError, match=r"listens on loopback addresses only, as 127.0.0.1:5433"):
        EmbeddedServer(tmp_path / "data").start(address)
    assert not (tmp_path / "data").exists()


def test_a_port_in_use_is_told_and_the_server_can_start_without(killable):
    killable.stop()
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(EmbeddedServerError, match=r"did not start in .*Address already in use.*log: ") as caught,
    ):
        killable.start(f"127.0.0.1:{taken.getsockname()[1]}")
    assert "\n" not in str(caught.value)
    assert killable.start() == killable.url()
