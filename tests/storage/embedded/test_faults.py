"""Processes killed at the worst moments; each test injects its fault for real."""

import os
import signal
import threading

import psycopg2
import pytest

from storage import EmbeddedServer, EmbeddedServerError
from storage.embedded.cluster import aside_of
from storage.embedded.postmaster import is_held, wait_until

START = """
import signal, sys
from pathlib import Path
from storage import EmbeddedServer
print("ready", flush=True)
sys.stdin.readline()
server = EmbeddedServer(Path(sys.argv[1]))
print(server.start(), server.status().pid, flush=True)
signal.pause()
"""


def _query(url, statement):
    connection = psycopg2.connect(url)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchone()[0] if cursor.description else None
    finally:
        connection.close()


@pytest.fixture
def starter(start_python):
    """Start a process that starts a server when told to."""

    def start(data_dir):
        process = start_python(START, str(data_dir))
        assert process.stdout.readline() == "ready\n"
        return process

    return start


def _kill(server):
    """Kill the postmaster and wait until the kernel has done so; its sessions may live on."""
    pid = server.status().pid
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not server.status().running, 30)
    return pid


def _go(process):
    process.stdin.write("go\n")
    process.stdin.flush()


@pytest.mark.slow
def test_six_processes_at_once_in_an_empty_directory_share_one_server(tmp_path, new_server, starter):
    server = new_server(tmp_path / "data")
    processes = [starter(tmp_path / "data") for _ in range(6)]
    for process in processes:
        _go(process)
    answers = {process.stdout.readline() for process in processes}
    assert answers == {f"{server.url()} {server.status().pid}\n"}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGHUP])
def test_the_server_outlives_the_process_that_started_it(killable, starter, how):
    killable.stop()
    process = starter(killable._data_dir)
    _go(process)
    url, pid = process.stdout.readline().split()
    os.killpg(process.pid, how)  # the whole process group, as a terminal does
    process.communicate(timeout=30)
    assert (killable.status().pid, _query(url, "SELECT 1")) == (int(pid), 1)


@pytest.mark.slow
def test_a_starter_killed_while_it_makes_the_cluster_does_no_harm(tmp_path, new_server, starter):
    server = new_server(tmp_path / "data")
    process = starter(tmp_path / "data")
    _go(process)
    assert wait_until((aside_of(server.status().directory) / "global").exists, 30)
    process.kill()  # initdb goes on
    process.communicate(timeout=30)
    assert not server.status().directory.exists()
    assert _query(server.start(), "SELECT current_user") == "tuner"
    assert not aside_of(server.status().directory).exists()


def test_a_starter_killed_while_the_server_starts_does_no_harm(killable, starter):
    killable.stop()
    process = starter(killable._data_dir)
    _go(process)
    assert wait_until(lambda: is_held(killable._alive), 30)
    process.kill()
    process.communicate(timeout=30)
    assert _query(killable.start(), "SELECT 1") == 1
    killable.stop()
    assert not is_held(killable._alive)


def test_what_was_committed_survives_the_servers_death(killable):
    url = killable.start()
    _query(url, "CREATE TABLE kept AS SELECT 7 AS x")
    pid = _kill(killable)
    assert _query(killable.start(), "SELECT x FROM kept") == 7
    assert killable.status().pid != pid


@pytest.mark.slow
def test_a_start_waits_for_the_sessions_of_a_server_that_was_killed(killable):
    url = killable.start()
    busy = psycopg2.connect(url)
    ended = []

    def work():
        # A loop that does not look whether the postmaster lives, until its timeout.
        busy.cursor().execute("SET statement_timeout = '1500ms'")
        with pytest.raises(psycopg2.Error) as caught:
            busy.cursor().execute("SELECT count(*) FROM generate_series(1, 1000000000)")
        ended.append(caught.value)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        active = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT count(*) FROM generate%'"
        assert wait_until(lambda: _query(url, active) == 1, 30)
        _kill(killable)
        impatient = EmbeddedServer(killable._data_dir, timeout_s=0.2)
        with pytest.raises(EmbeddedServerError, match=r"has not answered for 0 seconds"):
            impatient.start()
        assert _query(killable.start(), "SELECT 1") == 1
    finally:
        thread.join()
        busy.close()
    assert len(ended) == 1


@pytest.mark.parametrize("pid", ["of this process", "of nobody"])
def test_a_stale_pid_file_is_got_over(killable, pid):
    killable.start()
    found = killable.status()
    pid_file = found.directory / "postmaster.pid"
    content = pid_file.read_text()
    socket_lock = found.socket_directory / f".s.PGSQL.{found.port}.lock"
    _kill(killable)
    assert wait_until(lambda: not is_held(killable._alive), 30)
    reused = str(os.getpid()) if pid == "of this process" else "4194303"
    pid_file.write_text(content.replace(str(found.pid), reused))
    socket_lock.write_text(socket_lock.read_text().replace(str(found.pid), reused))
    assert not killable.status().running
    killable.stop()  # must not take this process for the server
    assert _query(killable.start(), "SELECT 1") == 1


def test_stopping_never_signals_a_process_that_is_not_the_server(killable):
    killable.start()
    found = killable.status()
    pid_file = found.directory / "postmaster.pid"
    content = pid_file.read_text()
    pid_file.write_text(content.replace(str(found.pid), str(os.getpid()), 1))
    try:
        with pytest.raises(EmbeddedServerError, match=r"stop it there"):
            killable.stop()
    finally:
        pid_file.write_text(content)
    assert killable.status().pid == found.pid


def test_a_server_that_cannot_start_tells_why(killable):
    killable.stop()
    control = killable.status().directory / "global" / "pg_control"
    control.rename(control.with_name("hidden"))
    try:
        with pytest.raises(EmbeddedServerError, match=r"did not start in .*pg_control.*log: ") as caught:
            killable.start()
        assert "\n" not in str(caught.value)
    finally:
        control.with_name("hidden").rename(control)
    assert _query(killable.start(), "SELECT 1") == 1


def test_a_log_that_grew_large_is_set_aside(killable):
    killable.stop()
    os.truncate(killable._log, 17 * 2**20)
    killable.start()
    assert killable._log.stat().st_size < 2**20
    assert killable._log.with_name("postgresql.log.old").stat().st_size == 17 * 2**20
