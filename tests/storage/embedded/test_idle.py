"""Servers that nobody uses end by themselves; nobody who uses one, or is about to, loses it."""

import os
import subprocess
import time
from contextlib import closing

import psycopg2
import pytest

from storage import EmbeddedServer, EmbeddedServerError
from storage.embedded.listing import databases, find
from storage.embedded.postmaster import is_held, wait_until
from storage.embedded.users import alone

# Starts the server, or joins it, says so, and lives until its standard input ends.
USE = """
import sys
from pathlib import Path
from storage import EmbeddedServer
print(EmbeddedServer(Path(sys.argv[1])).start(), flush=True)
sys.stdin.read()
"""
IDLE = {"TUNER_DB_IDLE_EXIT": "1s"}


@pytest.fixture
def use(start_python):
    """Start a process that uses a data directory's server."""

    def start(server):
        process = start_python(USE, str(server._data_dir), env=IDLE)
        assert process.stdout.readline().startswith("postgresql://")
        return process

    return start


def _is_gone(server):
    return not server.status().running and not is_held(server._alive) and not is_held(server._watch)


def _hold(server, session_s):
    """Hold a session open for longer than an idle server lives."""
    session = psycopg2.connect(server.url())
    try:
        with session.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(%s)", (session_s,))
    finally:
        session.close()


@pytest.mark.slow
def test_a_server_ends_when_its_last_process_and_its_last_session_have(new_server, use):
    server = new_server()
    first = use(server)
    _hold(server, 2.5)
    assert server.status().running  # though nobody was connected before and will be after: a process lives
    started_at, pid = time.monotonic(), server.status().pid
    first.communicate()
    session = psycopg2.connect(server.url())  # any client's
    second = use(server)
    assert server.status().pid == pid
    second.communicate()
    assert not wait_until(lambda: not server.status().running, 2.5)
    session.close()
    assert wait_until(lambda: _is_gone(server), 30)
    assert time.monotonic() - started_at > 3
    again = use(server)
    assert is_held(server._watch)
    again.communicate()
    assert wait_until(lambda: _is_gone(server), 30)


@pytest.mark.slow
def test_who_joins_while_the_server_is_being_ended_gets_one_that_runs(new_server, use, start_python):
    server = new_server()
    use(server).communicate()
    pid = server.status().pid
    with alone(server._users) as is_alone:  # as the watcher has it from its decision until the server is gone
        assert is_alone
        process = start_python(USE, str(server._data_dir), env=IDLE)
        server.stop()
    assert process.stdout.readline().startswith("postgresql://")
    assert server.status().pid != pid
    process.communicate()


@pytest.mark.slow
def test_a_watcher_that_was_killed_is_replaced_by_who_joins(new_server, use):
    server = new_server()
    first = use(server)
    pids = subprocess.check_output(["pgrep", "-f", f"storage.embedded.watcher {server._data_dir} "], text=True).split()
    os.kill(int(*pids), 9)
    assert wait_until(lambda: not is_held(server._watch), 30)
    second = use(server)
    assert is_held(server._watch)
    for process in (first, second):
        process.communicate()
    assert wait_until(lambda: _is_gone(server), 30)


@pytest.mark.slow
def test_a_server_may_be_kept(new_server, use):
    server = new_server()
    process = use(server)
    server_here = EmbeddedServer(server._data_dir, home=server._home)
    server_here.start(idle_exit="never")
    process.communicate()
    assert wait_until(lambda: not is_held(server._watch), 30)
    assert server.status().running
    with pytest.raises(EmbeddedServerError, match=r"a time such as 90s, 15m or 2h, or never; got 'soon'"):
        server.start(idle_exit="soon")


@pytest.mark.slow
def test_a_database_is_listed_with_its_data_directory_and_deleted_unless_it_is_used(
    new_server, use, shared_directory, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    server = new_server()
    server.start(idle_exit="never")
    [found] = databases()
    assert (found.data_dir, found.running, found.home) == (server._data_dir, True, server._home)
    assert found.size > 10e6
    with pytest.raises(EmbeddedServerError, match=r"is in use: other processes of tuner have it open; end them"):
        find(found.home).delete()
    # As if this process, which has started it, had ended.
    os.unlink(server._users)
    session = psycopg2.connect(server.url())
    with pytest.raises(EmbeddedServerError, match=r"is in use: sessions that are open: 1; end them"):
        find(server._data_dir).delete()
    assert server.status().running
    session.close()
    with closing(server.session()) as caretaker:
        assert wait_until(lambda: server.use(caretaker).sessions == 0, 30)
    find(server._data_dir).delete()
    assert databases() == []
    assert not server._cluster.exists()
