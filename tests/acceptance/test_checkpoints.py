"""A trial that is stopped on one machine goes on where it was on another, which has a data directory of its own."""

from __future__ import annotations

import datetime as dt
import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
import pytest
from command import Tuner, wait_for
from optuna.trial import TrialState
from processes import slots_of
from sqlalchemy import text

from storage import EmbeddedServer, open_engine, open_storage
from tuner.worker.supervisor import DRAIN_S

if TYPE_CHECKING:
    from collections.abc import Iterator

    from command import Running

# Trains 100 batches an epoch, slowly once it is further than the file `gate` beside it says.
TRAINS = """
import threading
from pathlib import Path

import torch
from torch import nn

from tuner.data import Data, Split
from tuner.objective import Objective

GATE = Path(__file__).with_name("gate")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("n_batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.n_batches += 1
            if int(GATE.read_text() or 0) < self.n_batches / 100:
                threading.Event().wait(0.02)
        return nn.functional.dropout(self.layer(x), 0.2, self.training)


class Trains(Objective):
    epochs = 5

    def suggest(self, trial):
        trial.suggest_float("lr", 0.01, 0.1)

    def load_data(self, root):
        drawn = [torch.randn(200, 2, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
        return Data(*(Split(x, (x[:, 0] > 0).long()) for x in drawn), class_names=("a", "b"))

    def build_model(self, params):
        return Model()

    def batch_size(self, params):
        return 2
"""


@pytest.fixture
def objective(tmp_path: Path) -> str:
    (tmp_path / "trains.py").write_text(TRAINS)
    open_gate(tmp_path, 2)  # an epoch after these takes 2 s, so that it is interrupted in its midst
    return f"{tmp_path}/trains.py:Trains"


def open_gate(directory: Path, epoch: int) -> None:
    aside = directory / "gate.new"
    aside.write_text(str(epoch))
    aside.replace(directory / "gate")


def on_machine(tuner: Tuner, name: str, **environment: str) -> Tuner:
    """The command line of a machine with a data directory of its own."""
    environment = {**tuner.environment, "TUNER_DATA_DIR": str(tuner.directory / name), **environment}
    return Tuner(environment, tuner.directory)


def worker(objective: str) -> list[str]:
    return ["worker", "trains", "--objective", objective, "--log-format", "json", "--device", "cpu"]


def the_trial(database: str) -> optuna.trial.FrozenTrial:
    (trial,) = optuna.load_study(study_name="trains", storage=open_storage(database)).trials
    return trial


def wait_for_epoch_three(database: str) -> None:
    def has_come() -> bool:
        trials = optuna.load_study(study_name="trains", storage=open_storage(database)).trials
        return any(len(trial.intermediate_values) >= 2 for trial in trials)

    wait_for(has_come, "two epochs have ended")


def interrupt_in_epoch_three(running: Running, database: str) -> None:
    wait_for_epoch_three(database)
    running.process.send_signal(signal.SIGTERM)


def notes(running: Running, part: str) -> list[str]:
    return [event["message"] for event in running.events("note") if part in event["message"]]


def seconds_from_the_signal_to(running: Running, name: str) -> float:
    """How long the worker took to the first event of that name; its processes may take longer to end."""
    first, then = (dt.datetime.fromisoformat(running.events(each)[0]["time"]) for each in ("stopping", name))
    return (then - first).total_seconds()


def kept_in(database: str) -> int:
    engine = open_engine(database)
    with engine.connect() as conn:
        count = int(conn.execute(text("select count(*) from tuner_checkpoints")).scalar_one())
    engine.dispose()
    return count


def files_below(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("place", ["database", "folder"])
def test_a_trial_that_was_stopped_goes_on_within_its_epoch_on_another_machine(
    tuner: Tuner, database: str, objective: str, tmp_path: Path, place: str
) -> None:
    (tmp_path / "share").mkdir()
    chosen = ["--checkpoints", f"file://{tmp_path}/share"] if place == "folder" else []
    assert tuner("create", objective, "--trials", "1", *chosen).code == 0
    with on_machine(tuner, "a").start(*worker(objective)) as running:
        interrupt_in_epoch_three(running, database)
        assert running.finish().code == 143
    assert seconds_from_the_signal_to(running, "trial_released") < DRAIN_S
    assert the_trial(database).state == TrialState.WAITING
    is_there = (1, []) if place == "database" else (0, ["trial-0.pt"])
    assert (kept_in(database), files_below(tmp_path / "share")) == is_there

    open_gate(tmp_path, 9)
    with on_machine(tuner, "b").start(*worker(objective)) as running:
        assert running.finish().code == 0
    (resumed,) = notes(running, "resumed")
    assert resumed.startswith("trial 0: resumed after epoch 2, batch ")
    trial = the_trial(database)
    assert (trial.state, sorted(trial.intermediate_values)) == (TrialState.COMPLETE, [1, 2, 3, 4, 5])
    assert trial.user_attrs["epochs"] == 5
    assert (kept_in(database), files_below(tmp_path / "share"), files_below(tmp_path / "b")) == (0, [], [])

    # The first machine still has its file, until a worker joins there.
    assert files_below(tmp_path / "a") == ["trial-0.pt"]
    assert on_machine(tuner, "a")(*worker(objective)).code == 0
    assert files_below(tmp_path / "a") == []


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A directory that nobody can write to, root neither."""
    directory = tmp_path / "read-only"
    directory.mkdir()
    if os.geteuid() != 0:
        directory.chmod(0o555)
        yield directory
        return
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,mode=700", "tmpfs", directory], check=False).returncode != 0:
        pytest.skip("nothing can be mounted here")
    yield directory
    subprocess.run(["umount", "--lazy", directory], check=True)


def test_a_trial_whose_process_is_killed_goes_on_from_what_it_saved_last_though_its_machine_keeps_nothing(
    tuner: Tuner, database: str, objective: str, tmp_path: Path, read_only: Path
) -> None:
    assert tuner("create", objective, "--trials", "1", "--checkpoint-every", "0.1s").code == 0
    with on_machine(tuner, read_only.name).start(*worker(objective)) as running:
        wait_for_epoch_three(database)
        pid = running.process.pid
        (slot,) = slots_of(pid)
        wait_for(lambda: kept_in(database) == 1, "a state is copied")
        os.kill(slot, signal.SIGKILL)
        open_gate(tmp_path, 9)
        assert running.finish().code == 0
    (resumed,) = notes(running, "resumed")
    assert resumed.startswith("trial 0: resumed after epoch "), resumed
    (told,) = notes(running, f"cannot write to {read_only}: ")
    assert "; checkpoints are kept in the database alone, and " in told
    assert len(notes(running, "cannot write the checkpoint")) == 2  # once an attempt
    trial = the_trial(database)
    assert (trial.state, sorted(trial.intermediate_values)) == (TrialState.COMPLETE, [1, 2, 3, 4, 5])


def test_kept_local_a_trial_starts_again_on_another_machine(
    tuner: Tuner, database: str, objective: str, tmp_path: Path
) -> None:
    assert tuner("create", objective, "--trials", "1", "--checkpoints", "local").code == 0
    with on_machine(tuner, "a").start(*worker(objective)) as running:
        interrupt_in_epoch_three(running, database)
        assert running.finish().code == 143
    assert kept_in(database) == 0
    open_gate(tmp_path, 9)
    with on_machine(tuner, "b").start(*worker(objective)) as running:
        assert running.finish().code == 0
    assert notes(running, "resumed") == []


def test_stopped_while_the_database_is_away_a_worker_ends_in_time_and_its_machine_has_the_state(
    objective: str, tmp_path: Path
) -> None:
    server = EmbeddedServer(tmp_path / "server")
    try:
        url = server.start()
        a = Tuner({"TUNER_STORAGE": url, "TUNER_DATA_DIR": str(tmp_path / "a")}, tmp_path)
        assert a("create", objective, "--trials", "1").code == 0
        with a.start(*worker(objective)) as running:
            wait_for_epoch_three(url)
            server.stop()
            running.process.send_signal(signal.SIGTERM)
            assert running.finish().code != 0
        assert seconds_from_the_signal_to(running, "database_away") < DRAIN_S
        assert len(notes(running, "cannot copy the checkpoint to the database: ")) == 1
        server.start()
        engine = open_engine(url)
        with engine.begin() as conn:  # as after a minute
            conn.execute(text("update tuner_leases set expires_at = now() - interval '1 hour'"))
        engine.dispose()
        open_gate(tmp_path, 9)
        with a.start(*worker(objective)) as running:
            assert running.finish().code == 0
        (resumed,) = notes(running, "resumed")
        assert resumed.startswith("trial 0: resumed after epoch 2, batch ")
    finally:
        server.destroy()


def test_deleting_a_study_deletes_what_its_stopped_trials_kept(
    tuner: Tuner, database: str, objective: str, tmp_path: Path
) -> None:
    assert tuner("create", objective, "--trials", "1", "--checkpoints", f"{tmp_path}/share").code == 0
    a = on_machine(tuner, "a")
    with a.start(*worker(objective)) as running:
        interrupt_in_epoch_three(running, database)
        assert running.finish().code == 143
    assert files_below(tmp_path / "share") == files_below(tmp_path / "a") == ["trial-0.pt"]
    done = a("delete", "trains", "--yes")
    assert (done.code, done.stderr) == (0, "")
    assert files_below(tmp_path / "share") == files_below(tmp_path / "a") == []


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("here", "needs database, local, an absolute path or a URL such as s3://bucket/folder, got 'here'"),
        ("nosuch://bucket", "knows no protocol 'nosuch'"),
        ("wandb://entity/project", "needs a package that is not installed here: Install wandbfs"),
        ("sftp://me:secret@host/x", "must hold no password"),
    ],
)
def test_a_place_that_is_none_is_refused_in_one_line(tuner: Tuner, place: str, told: str) -> None:
    done = tuner("create", "digits", "--checkpoints", place)
    assert done.code == 2
    assert told in done.error()
    assert "secret" not in done.stderr
