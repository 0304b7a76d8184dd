"""What is refused of a study, a database and a password before any engine is asked."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from storage import InvalidURLError, open_engine, parse_url
from tuner.errors import UsageError
from tuner.launch.command import label, reachable_url, variables, worker_arguments
from tuner.spec import Spec
from tuner.study.joining import create_study, open_study

if TYPE_CHECKING:
    from pathlib import Path

    from command import Tuner

ITSELF = "leads from each machine to itself"
SOCKET = "which other machines do not reach"


@pytest.mark.parametrize(
    ("url", "error"),
    [
        (None, "the private one is reached from this machine alone"),
        ("postgresql://u@localhost/t", ITSELF),
        ("postgresql://u@LOCALHOST./t", ITSELF),
        ("postgresql://u@db.localhost/t", ITSELF),
        ("postgresql://u@127.0.0.1:5433/t", ITSELF),
        ("postgresql://u@127.1/t", ITSELF),
        ("postgresql://u@[::1]/t", ITSELF),
        ("postgresql://u@0.0.0.0/t", ITSELF),
        ("postgresql://u@/t?host=127.0.0.1", ITSELF),
        ("postgresql://u@db.example.org/t?hostaddr=127.0.0.1", ITSELF),
        ("postgresql://u@/t?host=10.0.0.7,127.0.0.1", ITSELF),
        ("postgresql://u@/t?host=::ffff:127.0.0.1", ITSELF),
        ("postgresql://u@/t", f"leads to a socket, as it names no host, {SOCKET}"),
        ("postgresql://u@/t?host=/run/postgresql", f"leads to the socket /run/postgresql, {SOCKET}"),
        ("postgresql://u@%2Frun%2Fpostgresql/t", SOCKET),
    ],
)
def test_a_database_that_only_this_machine_reaches_is_refused(url: str | None, error: str) -> None:
    with pytest.raises(UsageError, match=re.escape(error)):
        reachable_url(url, {})


@pytest.mark.parametrize("url", ["postgresql://u@10.0.0.7/t", "postgresql://u@/t?host=10.0.0.7,10.0.0.8"])
def test_one_that_other_machines_may_reach_is_taken(url: str) -> None:
    assert reachable_url(url, {"PGHOST": "localhost"}) == parse_url(url)


def test_what_a_url_leaves_out_is_where_libpq_looks() -> None:
    assert reachable_url("postgresql:///t", {"PGHOST": "10.0.0.7"})
    assert reachable_url("postgresql:///t", {"PGSERVICE": "team"})
    with pytest.raises(UsageError, match="localhost is its loopback"):
        reachable_url("postgresql:///t", {"PGHOST": "localhost"})
    with pytest.raises(InvalidURLError):
        reachable_url("sqlite:///x.db", {})


@pytest.mark.parametrize(
    ("url", "environ", "error"),
    [
        ("postgresql://u:secret@db/t", {}, "postgresql://u:***@db/t holds a password"),
        ("postgresql://u@db/t?password=secret", {}, "holds a password"),
        ("postgresql://u@db/t?sslpassword=secret", {}, "holds a password"),
        ("postgresql://u@db/t", {"PGPASSWORD": "secret"}, "PGPASSWORD is not given to jobs"),
    ],
)
def test_a_password_that_a_job_would_show_is_refused(url: str, environ: dict[str, str], error: str) -> None:
    with pytest.raises(UsageError, match=re.escape(error)) as caught:
        variables(parse_url(url), {}, environ)
    assert "secret" not in str(caught.value)


def test_a_job_has_what_leads_to_the_database_and_no_secret(tmp_path: Path) -> None:
    environ = {"PGPASSWORD": "secret", "PGSSLMODE": "verify-full", "PGPASSFILE": "/home/u/.pgpass", "HOME": "/home/u"}
    settings = {"TUNER_STORAGE_PASSWORD_FILE": tmp_path / "password", "TUNER_DATA_DIR": None}
    assert variables(parse_url("postgresql://u@db/t"), settings, environ) == {
        "TUNER_STORAGE": "postgresql://u@db/t",
        "TUNER_STORAGE_PASSWORD_FILE": str(tmp_path / "password"),
        "PGSSLMODE": "verify-full",
        "PGPASSFILE": "/home/u/.pgpass",
    }


def test_studies_have_labels_that_every_engine_takes_and_that_differ(database: str) -> None:
    given = {
        "objective": {"name": "digits", "code_hash": "0"},
        "metric": "accuracy",
        "direction": "maximize",
        "budget": {"trials": 30},
        "epochs": 20,
    }
    spec = Spec.model_validate(given)
    names = ["digits", "Digits", "digits/confirm", "über 7", "-", "x" * 200]
    engine = open_engine(database)
    try:
        labels = {name: label(engine, create_study(engine, name, spec)) for name in names}
        again = label(engine, open_study(engine, "digits"))
        arguments = worker_arguments(open_study(engine, "-"), objective="a b.py:X", device="cpu")
    finally:
        engine.dispose()
    assert len(set(labels.values())) == len(names)
    assert all(re.fullmatch(r"tuner-[a-z0-9]([a-z0-9-]{0,60}[a-z0-9])", text) for text in labels.values()), labels
    assert labels["digits/confirm"].startswith("tuner-digits-confirm-")
    assert again == labels["digits"]
    assert arguments == ["worker", "--device", "cpu", "--objective", "a b.py:X", "--", "-"]


@pytest.mark.slow
def test_what_cannot_work_is_refused_before_slurm_is_asked(tuner: Tuner) -> None:
    away = {"TUNER_STORAGE": "postgresql://u@192.0.2.1/t"}
    for options, environment, code, error in (
        (["digits"], {"TUNER_STORAGE": ""}, 2, "the private one is reached from this machine alone"),
        (["digits", "--nodes", "0"], away, 2, "--nodes needs a whole number above 0, got 0"),
        (["digits", "--gpus-per-node", "-1"], away, 2, "--gpus-per-node needs a whole number from 0, got -1"),
        (["digits", "--cpus-per-node", "0"], away, 2, "--cpus-per-node needs a whole number above 0, got 0"),
        (["digits", "--time", "soon"], away, 2, "--time needs a time above 0"),
        (["digits", "--sbatch", "'"], away, 2, "--sbatch: .* cannot be read"),
    ):
        done = tuner("launch", "slurm", *options, "--dry-run", **environment)
        assert re.search(error, done.error()), done.error()
        assert done.code == code
    done = tuner("launch", "slurm", "digits", PATH="/nowhere", **away)
    assert (done.code, done.error()[:21]) == (1, "tuner: no SLURM here:")
