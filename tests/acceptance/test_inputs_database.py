"""Databases as people have them: variables meant for another, passwords that change, names in any script."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg2
import pytest
from command import Running, Tuner, wait_for
from dashboards import Client

from storage import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Iterator

INPUTS = Path(__file__).parents[1] / "inputs"


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


def test_a_password_that_changes_keeps_neither_a_worker_nor_a_dashboard_out(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path / "home")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server.start(f"127.0.0.1:{port}")
    file = tmp_path / "password"
    file.touch(0o600)
    file.write_text(server.password_file.read_text())
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
        assert tuner("create", objective, "--trials", "1").code == 0
        with (
            dashboard(tuner, "--log-format", "json") as (_, client),
            tuner.start("status", "search", "--watch", "--interval", "0.2") as watching,
            tuner.start("worker", "search", "--objective", objective, "--log-format", "json") as worker,
        ):
            wait_for(lambda: len(worker.events("report")) >= 2, "it trains")
            assert client.ask("/api/studies").status == 200
            _change_password(server, "second")
            for running in (watching, worker):
                running.wait_for_line("password authentication failed")
            refused = tuner("best", "search")
            assert (refused.code, "password authentication failed" in refused.error()) == (3, True)
            file.write_text("second\n")
            assert worker.finish().code == 0
            assert watching.finish().code == 0
            assert client.ask("/api/studies").status == 200
        [trial] = tuner("trials", "search", "--json").json()
        assert trial["state"] == "COMPLETE"
        assert sum("password authentication failed" in line for line in watching.lines) == 1
    finally:
        server.destroy()


def _change_password(server: EmbeddedServer, password: str) -> None:
    """Change the role's password, and end its sessions so that they meet the new one."""
    with (
        contextlib.closing(psycopg2.connect(server.admin_url())) as connection,
        connection,
        connection.cursor() as cursor,
    ):
        cursor.execute("ALTER ROLE tuner PASSWORD %s", (password,))
        cursor.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'tuner'")
