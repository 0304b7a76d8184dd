"""Databases as people have them: variables meant for another, passwords that change, names in any script."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
import psycopg2
import pytest
from command import Running, Tuner, wait_for
from dashboards import TOKEN, Client
from sqlalchemy import text

from storage import EmbeddedServer, open_engine, open_storage
from storage.embedded.accounts import server_account
from storage.embedded.programs import bundled_programs, reachable_by
from storage.embedded.server import SHARED_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

INPUTS = Path(__file__).parents[1] / "inputs"
PAGE = Path(__file__).parents[2] / "docs" / "operations.md"


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuner]:
    """The command line of somebody who has an embedded server, with a study of one trial in it."""
    directory = tmp_path_factory.mktemp("laptop")
    tuner = Tuner({"TUNER_DATA_DIR": str(directory / "data")}, directory)
    done = tuner("run", f"{INPUTS}/26-large-attribute/search.py:objective", "--trials", "1", "--workers", "1")
    assert done.code == 0, done.stderr
    yield tuner
    EmbeddedServer(directory / "data").destroy()


@contextlib.contextmanager
def dashboard(tuner: Tuner, *options: str, **environment: str) -> Iterator[tuple[Running, Client]]:
    with tuner.start("dashboard", "--port", "0", *options, **environment) as running:
        running.wait_for_line("dashboard on ")
        [port] = [
            re.findall(r"http://127\.0\.0\.1:(\d+)/", line)[0] for line in running.lines if "dashboard on" in line
        ]
        yield running, Client(int(port))


def test_neither_large_attributes_nor_variables_of_another_database_keep_a_study_from_its_pages(laptop: Tuner) -> None:
    variables = {"PGSERVICE": "other", "PGHOSTADDR": "127.0.0.9", "PGOPTIONS": "-c search_path=other"}
    assert laptop("best", "search", "--json", **variables).json()["number"] == 0
    with dashboard(laptop, **variables) as (_, client):
        answer = client.ask("/csv/1")
    assert answer.status == 200
    assert len(answer.body) > 300_000


SCRIPT = """
import sys, optuna
study = optuna.load_study(study_name="search", storage=sys.argv[1])
study.optimize(lambda trial: trial.suggest_float("width", 1, 2), n_trials=1)
print([trial.state.name for trial in study.trials])
"""


def test_the_url_is_one_that_stock_optuna_opens(laptop: Tuner) -> None:
    url = laptop("db", "url").stdout.strip()
    assert url.startswith("postgresql+psycopg2://")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "TUNER_"))}
    optuna = [str(Path(sys.executable).with_name("optuna"))]
    for command, told in (
        ([*optuna, "studies", "--storage", url], "search"),
        ([*optuna, "best-trial", "--study-name", "search", "--storage", url], "width"),
        ([sys.executable, "-c", SCRIPT, url], "['COMPLETE', 'COMPLETE']"),
    ):
        done = subprocess.run(command, env=plain, cwd=laptop.directory, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert told in done.stdout
    assert len(laptop("trials", "search", "--json").json()) == 2


def test_secrets_that_change_under_load_keep_neither_workers_nor_a_dashboard_out(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path / "home")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server.start(f"127.0.0.1:{port}")
    (tmp_path / "secrets").mkdir()
    file = tmp_path / "secrets" / "postgres_password"
    file.touch(0o600)
    file.write_text(server.password_file.read_text())
    change, take_over, new_token = _rotation(server, tmp_path)
    token = tmp_path / "secrets" / "dashboard_token"
    token.touch(0o600)
    token.write_text(TOKEN)
    first = {"Authorization": f"Bearer {TOKEN}"}
    tuner = Tuner(
        {
            "TUNER_STORAGE": f"postgresql://tuner@127.0.0.1:{port}/tuner",
            "TUNER_STORAGE_PASSWORD_FILE": str(file),
            "TUNER_DATA_DIR": str(tmp_path / "data"),
        },
        tmp_path,
    )
    objective = f"{INPUTS}/30-password-changes/search.py:objective"
    try:
        assert tuner("create", objective, "--trials", "6", "--pruner", "none").code == 0
        with (
            dashboard(tuner, TUNER_DASHBOARD_TOKEN_FILE=str(token)) as (pages, client),
            tuner.start("worker", "search", "--objective", objective, "--slots", "3", "--log-format", "json") as worker,
            contextlib.ExitStack() as stack,
        ):
            watching = stack.enter_context(tuner.start("status", "search", "--watch", "--interval", "0.5"))
            assert watching.process.stdout is not None
            assert watching.process.stdout.readline()  # it has looked; nobody reads the rest before the end
            wait_for(lambda: {event["slot"] for event in worker.events("report")} == {0, 1, 2}, "they train", 120)
            assert (client.ask("/api/studies", headers=first).status, client.ask("/healthz").status) == (200, 200)
            new_token()
            second = {"Authorization": f"Bearer {token.read_text().strip()}"}
            assert client.ask("/api/studies", headers=first).status == 401
            change()
            _as_admin(server, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'tuner'")
            for running in (watching, worker):
                running.wait_for_line("password authentication failed")
            for path in ("/api/studies", "/api/studies/1", "/csv/1"):
                away = client.ask(path, headers=second)
                assert (away.status, away.headers["Retry-After"]) == (503, "5")
                assert "password authentication failed" in away.reason()
            assert (client.ask("/healthz").status, client.ask("/healthz").body) == (503, b'{"database": "away"}\n')
            refused = tuner("best", "search")
            assert (refused.code, "password authentication failed" in refused.error()) == (4, True)
            take_over()
            assert worker.finish().code == 0
            assert watching.finish().code == 0
            assert client.ask("/api/studies", headers=second).status == 200
            assert client.ask("/csv/1", headers=second).status == 200
            pages.wait_for_line("the database is back")
        assert sum("password authentication failed" in line for line in pages.lines) == 1
        assert not [line for line in pages.lines if "Traceback" in line or "File " in line]
        assert [trial["state"] for trial in tuner("trials", "search", "--json").json()] == ["COMPLETE"] * 6
        assert _attempts(server) == ["complete"] * 6
        assert sum("password authentication failed" in line for line in watching.lines) == 1
    finally:
        server.destroy()


@pytest.fixture(params=["a read-only database", "a standby"])
def reader(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tuner]:
    """The command line on a database with a study and a trial, which takes no writes."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="tuner-test-") as home:
        server = EmbeddedServer(tmp_path / "home")
        writer = Tuner({"TUNER_STORAGE": server.start(), "TUNER_DATA_DIR": str(tmp_path / "data")}, tmp_path)
        assert writer("create", f"{INPUTS}/26-large-attribute/search.py:objective").code == 0
        storage = open_storage(server.url())
        study = optuna.load_study(storage=storage, study_name="search")
        study.optimize(lambda trial: trial.suggest_float("width", 1, 2), n_trials=1)
        storage.engine.dispose()
        Path(home).chmod(0o755)
        try:
            if request.param == "a standby":
                with _standby_of(server, Path(home)) as url:
                    yield Tuner({"TUNER_STORAGE": url, "TUNER_DATA_DIR": str(tmp_path / "data")}, tmp_path)
            else:
                _as_admin(server, "ALTER DATABASE tuner SET default_transaction_read_only = on")
                yield Tuner({"TUNER_STORAGE": server.url(), "TUNER_DATA_DIR": str(tmp_path / "data")}, tmp_path)
        finally:
            server.destroy()


@contextlib.contextmanager
def _standby_of(server: EmbeddedServer, home: Path) -> Iterator[str]:
    """A server in recovery on a copy of another's cluster, for the time of the block."""
    cluster = server.status().directory
    account = server_account(cluster)
    postgres = reachable_by(account, bundled_programs()[0], SHARED_DIRECTORY).path("postgres")
    server.stop()
    shutil.copytree(cluster, home / "cluster")
    (home / "cluster" / "standby.signal").touch()
    (home / "hba").write_text("local all all trust\n")
    for path in (home, *home.rglob("*")):
        os.chown(path, account.uid, account.gid)
    settings = {"hba_file": home / "hba", "listen_addresses": "", "unix_socket_directories": home}
    process = subprocess.Popen(
        [postgres, "-D", home / "cluster", *(f"--{name}={value}" for name, value in settings.items())],
        env={"PATH": os.defpath},
        cwd=home,
        stderr=subprocess.DEVNULL,
        user=None if account.is_us else account.uid,
        group=None if account.is_us else account.gid,
    )
    url = f"postgresql://tuner@/tuner?host={home}"
    try:
        wait_for(lambda: subprocess.run([postgres.with_name("pg_isready"), "-qh", home]).returncode == 0, "it starts")
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def test_what_takes_no_writes_can_be_read_and_the_rest_is_one_line(reader: Tuner) -> None:
    for command in ("best search", "trials search", "status search", "studies"):
        done = reader(*command.split(), "--json")
        assert done.code == 0, done.stderr
        assert done.json()
    with dashboard(reader) as (_, client):
        assert {client.ask(path).status for path in ("/api/studies", "/api/studies/1", "/csv/1")} == {200}
    create = ["create", f"{INPUTS}/26-large-attribute/search.py:objective", "--study", "another"]
    for command in (create, ["enqueue", "search", "width=1.5"]):
        done = reader(*command)
        assert done.code == 1
        assert re.search(r"takes no writes from this session: .*: name the server that takes them$", done.error())


def test_an_idle_database_ends_and_what_a_deleted_directory_left_can_be_deleted(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    environment = {"TUNER_DATA_DIR": str(data_dir), "TUNER_DB_IDLE_EXIT": "1s"}
    tuner = Tuner({**environment, "XDG_STATE_HOME": str(tmp_path / "state")}, tmp_path)
    try:
        create = ("create", f"{INPUTS}/26-large-attribute/search.py:objective")
        assert tuner(*create).code == 0
        wait_for(lambda: not tuner("db", "status", "--json").json()["running"], "it ends")
        assert [study["study"] for study in tuner("studies", "--json").json()] == ["search"]
        if os.geteuid() == 0:
            shutil.rmtree(data_dir, ignore_errors=True)  # root has its database elsewhere
        [found] = [one for one in tuner("db", "list", "--json").json() if one["data_dir"] == str(data_dir)]
        assert Path(found["home"]) == EmbeddedServer(data_dir)._home
        unsure = tuner("db", "delete")
        assert (unsure.code, "if you pass --yes" in unsure.error()) == (2, True)
        done = tuner("db", "delete", "--yes")
        assert done.code == 0, done.stderr
        assert str(data_dir) not in tuner("db", "list").stdout
        nothing = tuner("db", "delete", "--yes")
        assert (nothing.code, "there is no embedded database of" in nothing.error()) == (1, True)
    finally:
        EmbeddedServer(data_dir).destroy()


def _as_admin(server: EmbeddedServer, *statements: str) -> None:
    with (
        contextlib.closing(psycopg2.connect(server.admin_url())) as connection,
        connection,
        connection.cursor() as cursor,
    ):
        for statement in statements:
            cursor.execute(statement)


def _attempts(server: EmbeddedServer) -> list[str]:
    engine = open_engine(server.url())
    with engine.connect() as conn:
        found = list(conn.execute(text("select outcome from tuner_attempts")).scalars())
    engine.dispose()
    return found


def _rotation(server: EmbeddedServer, directory: Path) -> list[Callable[[], None]]:
    """What the page has operators type: the database's new password, then the file's; and the dashboard's new token."""
    section = PAGE.read_text().partition("\n## Rotation\n")[2].partition("\n## ")[0]
    make, alter, write = re.findall(r"^    (\S.*)$", section, re.M)
    [new_token] = re.findall(r"`(openssl .* > secrets/dashboard_token)`", section)
    psql = f"{bundled_programs()[0].path('psql')} -d '{server.admin_url()}' "
    by_compose = "docker compose exec -T postgres psql -U postgres "
    assert by_compose in alter

    def run(line: str) -> None:
        subprocess.run(["bash", "-e", "-o", "pipefail", "-c", line], cwd=directory, check=True)

    return [partial(run, f"{make}\n{alter.replace(by_compose, psql)}"), partial(run, write), partial(run, new_token)]
