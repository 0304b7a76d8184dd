"""The database goes away while workers train: no attempt, no training time and no result is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from command import Tuner, wait_for
from optuna.trial import TrialState
from sqlalchemy import text

from storage import EmbeddedServer, open_engine, open_storage
from storage.coordination import claims

if TYPE_CHECKING:
    from collections.abc import Iterator

    from optuna.trial import FrozenTrial

OUTAGE_S = claims.LEASE_S + 5
"""Longer than a lease."""

# An epoch is half a second; each that ends is noted in a file beside the objective, with the time.
PACED = """
import threading, time
from pathlib import Path

EPOCHS = {epochs}

def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    with Path(__file__).with_name("epochs").open("a", buffering=1) as notes:
        for step in range(1, EPOCHS + 1):
            threading.Event().wait(0.5)
            trial.report(x * step, step)
            notes.write(f"{{trial.number}} {{time.time()}}\\n")
            if trial.should_prune():
                raise AssertionError("nothing is to be pruned")
    return x
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A server of the test's own, to be stopped as it likes."""
    server = EmbeddedServer(tmp_path / "home")
    server.start()
    yield server
    server.destroy()


@pytest.fixture
def tuner(server: EmbeddedServer, tmp_path: Path) -> Tuner:
    return Tuner({"TUNER_STORAGE": server.url()}, tmp_path)


def create(tuner: Tuner, epochs: int, trials: int) -> tuple[str, ...]:
    path = tuner.directory / "paced.py"
    path.write_text(PACED.format(epochs=epochs))
    reference = f"{path}:objective"
    assert tuner("create", reference, "--trials", str(trials), "--pruner", "none").code == 0
    return ("worker", "paced", "--objective", reference, "--log-format", "json")


def stop(server: EmbeddedServer) -> None:
    pid = server.status().pid
    assert pid is not None
    os.kill(pid, signal.SIGQUIT)  # PostgreSQL's "immediate" shutdown
    wait_for(lambda: not server.status().running, "the server is gone")


def trials_of(server: EmbeddedServer) -> list[FrozenTrial]:
    storage = open_storage(server.url())
    return storage.get_all_trials(storage.get_study_id_from_name("paced"))


def outcomes(server: EmbeddedServer) -> list[str]:
    engine = open_engine(server.url())
    with engine.connect() as conn:
        found = list(conn.execute(text("select outcome from tuner_attempts order by started_at")).scalars())
    engine.dispose()
    return found


def test_an_outage_longer_than_a_lease_costs_no_attempt_and_no_training_time(
    server: EmbeddedServer, tuner: Tuner, tmp_path: Path
) -> None:
    epochs = 2 * int(OUTAGE_S) + 60
    worker = create(tuner, epochs, 2)
    with (
        tuner.start(*worker, "--trials", "1", TUNER_DATA_DIR=str(tmp_path / "a")) as first,
        tuner.start(*worker, "--trials", "1", TUNER_DATA_DIR=str(tmp_path / "b")) as second,
    ):
        for running in (first, second):
            wait_for(lambda running=running: len(running.events("report")) >= 3, "it trains", 120)
        stop(server)
        away_at = time.time()
        threading.Event().wait(OUTAGE_S)
        back_at = time.time()
        server.start()
        # One that comes fresh takes no trial away, though the leases have run out.
        with tuner.start(*worker, "--idle-exit", "3s", TUNER_DATA_DIR=str(tmp_path / "c")) as third:
            done = [running.finish() for running in (third, first, second)]
    assert [finished.code for finished in done] == [0, 0, 0], done
    assert third.events("trial_started") == []
    assert outcomes(server) == ["complete"] * 2
    trials = trials_of(server)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 2
    for trial in trials:
        assert sorted(trial.intermediate_values) == list(range(1, epochs + 1))
    notes = [line.split() for line in (tmp_path / "epochs").read_text().splitlines()]
    for number in ("0", "1"):
        meanwhile = sum(number == noted and away_at < float(at) < back_at for noted, at in notes)
        assert meanwhile > 2 * OUTAGE_S * 0.8, "training went on during the outage"


def test_a_result_waits_on_disk_if_the_worker_must_end_and_the_next_one_delivers_it(
    server: EmbeddedServer, tuner: Tuner, tmp_path: Path
) -> None:
    worker = create(tuner, 10, 2)
    machine = {"TUNER_DATA_DIR": str(tmp_path / "machine")}
    with tuner.start(*worker, **machine) as running:
        wait_for(lambda: len(running.events("report")) >= 3, "it trains", 120)
        x = trials_of(server)[0].params["x"]
        stop(server)
        wait_for(lambda: len((tmp_path / "epochs").read_text().splitlines()) == 10, "the trial ends")
        running.process.terminate()
        assert running.finish().code == 143
    (kept,) = running.events("result_kept")
    (file,) = (tmp_path / "machine" / "spool").iterdir()
    assert str(file) in kept["message"]
    server.start()
    assert [trial.state for trial in trials_of(server)] == [TrialState.RUNNING]
    with tuner.start(*worker, **machine) as running:
        assert running.finish().code == 0
    assert [event["trial"] for event in running.events("result_delivered")] == [0]
    assert not file.exists()
    first, second = trials_of(server)
    assert (first.state, first.value) == (TrialState.COMPLETE, x)
    assert first.intermediate_values == {step: x * step for step in range(1, 11)}
    assert second.state == TrialState.COMPLETE
    assert outcomes(server) == ["complete"] * 2


def test_a_worker_that_is_stopped_during_an_outage_ends_in_time(server: EmbeddedServer, tuner: Tuner) -> None:
    worker = create(tuner, 1000, 1)
    with tuner.start(*worker) as running:
        wait_for(lambda: len(running.events("report")) >= 3, "it trains", 120)
        stop(server)
        wait_for(lambda: bool(running.events("database_away")), "it notices")
        start = time.monotonic()
        running.process.terminate()
        assert running.finish().code == 143
    assert time.monotonic() - start < 10
    (released,) = running.events("trial_released")
    assert "its lease has to run out" in released["message"]
