"""Backup and restore as docs/deployment.md says it, line by line; and what `doctor` finds if it was done otherwise."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import pytest
from command import Tuner
from sqlalchemy import create_engine, text

from storage import EmbeddedServer, ensure_schema, open_engine, open_storage, parse_url
from storage.coordination import claims, studies
from storage.coordination.standings import Budget
from storage.database.integrity import faults
from storage.database.sessions import Sessions
from storage.embedded.programs import bundled_programs

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = Path(__file__).parents[2] / "docs" / "deployment.md"
DOCKER = """#!/bin/bash
# 'docker compose exec -T postgres COMMAND ...' runs the command here, as the superuser that an embedded server has.
[ "$1 $2 $3 $4" = "compose exec -T postgres" ] || exit 64
shift 4
exec "${@/#postgres/tuner_admin}"
"""
BUDGET = Budget(trials=10, timeout_s=None, max_failures=3, max_attempts=3)


def lines(heading: str) -> list[str]:
    """The commands of the page under a heading."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    return re.findall(r"^    (docker .*)$", section, re.M)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A server of its own, whose database has the name that the page gives it, and a study in it."""
    embedded = EmbeddedServer(tmp_path_factory.mktemp("data"))
    try:
        embedded.start()
        fill(embedded.url())
        yield embedded
    finally:
        embedded.destroy()


def fill(database: str) -> None:
    engine = open_engine(database)
    ensure_schema(engine)
    study_id = studies.create_study(engine, "s", "maximize", {"version": 1}, {}, "accuracy").study_id
    storage = open_storage(database)
    study = optuna.load_study(study_name="s", storage=storage)
    study.optimize(lambda trial: trial.report(trial.suggest_float("x", 0, 1), 1) or trial.params["x"], n_trials=4)
    claimed = claims.claim(Sessions(engine), study_id, BUDGET, claims.Holder(worker="gpu-1:7"))
    assert isinstance(claimed, claims.Claim)
    storage.engine.dispose()
    engine.dispose()


def seen(database: str) -> list[Any]:
    """All that Optuna reads of the study."""
    storage = open_storage(database, read_only=True)
    study = optuna.load_study(study_name="s", storage=storage)
    found = [(its.number, its.state, its.values, its.params, its.intermediate_values) for its in study.trials]
    storage.engine.dispose()
    return found


@pytest.fixture(scope="module")
def environment(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where the page's commands find `docker`, PostgreSQL's programs and the server."""
    directory = tmp_path_factory.mktemp("bin")
    (directory / "docker").write_text(DOCKER)
    (directory / "docker").chmod(0o755)
    url = parse_url(server.admin_url())
    assert url.username == "tuner_admin"
    programs = bundled_programs()[0].directory / "bin"
    path = os.pathsep.join([str(directory), str(programs), os.environ["PATH"]])
    return {"PATH": path, "PGHOST": str(url.query["host"]), "PGDATABASE": "postgres"}


def run(line: str, environment: dict[str, str], directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line], env=environment, cwd=directory, capture_output=True, text=True, check=False
    )


def test_the_pages_lines_bring_all_back(server: EmbeddedServer, environment: dict[str, str], tmp_path: Path) -> None:
    before = seen(server.url())
    assert len(before) == 5
    backup, rename, restore, check = lines("Backup and restore")
    for line in (backup, rename, restore):
        done = run(line, environment, tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), line
    assert seen(server.url()) == before
    assert seen(server.reader_url()) == before  # who may do what came along
    assert check.endswith(" doctor")
    tuner = Tuner({"TUNER_STORAGE": server.url(), "TUNER_DATA_DIR": str(tmp_path / "data")}, tmp_path)
    looked = {row["check"]: row for row in tuner("doctor", "--json").json()}
    assert looked["records"] == {
        "check": "records",
        "ok": True,
        "found": "every study has its trials, every trial its values",
    }

    # The study goes on where it was: its next trial has the next number.
    study = optuna.load_study(study_name="s", storage=open_storage(server.url()))
    study.enqueue_trial({"x": 0.5})
    assert [its.number for its in study.trials] == [0, 1, 2, 3, 4, 5]


def test_a_dump_restored_over_tables_is_found(
    server: EmbeddedServer, environment: dict[str, str], tmp_path: Path
) -> None:
    admin = create_engine(parse_url(server.admin_url()), isolation_level="AUTOCOMMIT")
    with admin.connect() as conn:
        conn.execute(text("CREATE DATABASE another OWNER tuner"))
    url = parse_url(server.url()).set(database="another").render_as_string(hide_password=False)
    fill(url)
    dumped = run("pg_dump -U tuner_admin -Fc another > it.dump", environment, tmp_path)
    assert (dumped.returncode, dumped.stderr) == (0, "")
    with admin.connect() as conn:
        conn.execute(text("DROP DATABASE another WITH (FORCE)"))
        conn.execute(text("CREATE DATABASE another OWNER tuner"))
    admin.dispose()
    engine = open_engine(url)
    ensure_schema(engine)
    assert faults(engine) == []
    # The new tables have a row of Optuna's own, on which the dump's constraints fail: that is how it was met.
    restored = run(
        "pg_restore -U tuner_admin --data-only -t studies -t trials -d another it.dump", environment, tmp_path
    )
    assert (restored.returncode, restored.stderr) == (0, "")
    assert faults(engine) == [
        "4 complete trials have no value, the first is trial 0 of study 's'",
        "new rows of studies would get numbers that are taken: study_id goes up to 1",
        "new rows of trials would get numbers that are taken: trial_id goes up to 5",
    ]
    with engine.begin() as conn:
        conn.execute(text("ALTER TABLE trial_params DROP CONSTRAINT trial_params_trial_id_fkey"))
        conn.execute(text("INSERT INTO trial_params (trial_id, param_name, param_value) VALUES (77, 'x', 1)"))
        conn.execute(text("ALTER TABLE trial_values DROP CONSTRAINT trial_values_pkey"))
        conn.execute(text("DROP INDEX IF EXISTS tuner_trials_by_number"))
    assert faults(engine)[1:3] == [
        "1 rows of trial_params are of a trial that is not there",
        "trial_values has no primary key",
    ]
    tuner = Tuner({"TUNER_STORAGE": url, "TUNER_DATA_DIR": str(tmp_path / "data")}, tmp_path)
    done = tuner("doctor", "--json")
    assert done.code == 1
    (found,) = [row["found"] for row in done.json() if row["check"] == "records"]
    assert found.startswith("4 complete trials have no value")
    assert found.endswith("restore it into an empty database (docs/deployment.md, Backup and restore)")
    engine.dispose()
