"""A plain function with a loop of its own, from a worker that is killed to an exported model."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import optuna
import torch
from command import Tuner, wait_for
from processes import slots_of

import tuner
from storage import PostgresStorage, open_storage
from storage.coordination import claims
from tuner.slot.attempt import TrialObjective, run_attempt
from tuner.slot.checked_trial import CheckedTrial
from tuner.study.joining import open_study
from tuner.study.registry import find_objective

if TYPE_CHECKING:
    from command import Running

# Waits before a step that is further than the file `gate` beside it says, and leaves what its model gave. The model is
# called by name, also on integers, and gives a dataclass, as those of transformers.
OWN = """
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
import tuner

HERE = Path(__file__).parent
ROWS = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
TARGETS = (ROWS[:, 0] > 0).long()
BATCH = {"rows": ROWS, "kinds": torch.arange(50) % 2}


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.kinds = torch.nn.Embedding(2, 3)
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 2))

    def forward(self, rows, kinds, labels=None):
        logits = self.layers(rows + self.kinds(kinds))
        return Output(logits, None if labels is None else torch.nn.functional.cross_entropy(logits, labels))


def objective(trial):
    device = tuner.device(trial)
    model = Model().to(device)
    batch = {name: its.to(device) for name, its in BATCH.items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=trial.suggest_float("lr", 0.01, 0.1))
    checkpoint = tuner.checkpoint(trial)
    state, first = checkpoint.load(), 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"] + 1
    print(f"trial {trial.number} begins at step {first}")
    for step in range(first, 8):
        while step > int((HERE / "gate").read_text()):
            threading.Event().wait(0.02)
        model.train()
        loss = model(**batch, labels=TARGETS.to(device)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trial.report(loss.item(), step)
        checkpoint.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, now=True)
    tuner.keep_model(trial, model, batch, class_names=("no", "yes"))
    with torch.no_grad():
        torch.save(model.eval()(**batch).logits.cpu(), HERE / f"gave-{trial.number}.pt")
    return loss.item()
"""


def on_machine(command: Tuner, name: str) -> Tuner:
    """The command line of a machine with a data directory of its own."""
    return Tuner({**command.environment, "TUNER_DATA_DIR": str(command.directory / name)}, command.directory)


def kill(running: Running) -> None:
    """End a worker with its slots as the loss of its machine does."""
    pids = [running.process.pid, *slots_of(running.process.pid)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    running.process.wait(30)


def undisturbed(database: str, path: Path, params: dict[str, float]) -> float:
    """The value of the study's first trial, run in one go."""
    storage = PostgresStorage(database)
    spec = open_study(storage.engine, "own").spec
    storage.engine.dispose()
    objective = find_objective(f"{path}:objective").load()
    what = TrialObjective.load(spec, objective, path.parent, torch.device("cpu"))
    study = optuna.create_study()
    study.enqueue_trial(params)
    outcome = run_attempt(what, CheckedTrial(study, study.ask()._trial_id, lambda: None))
    assert outcome.value is not None, outcome.message
    return outcome.value


def test_a_function_goes_on_where_its_killed_worker_was_and_its_model_is_exported(
    tuner: Tuner, database: str, tmp_path: Path
) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    (tmp_path / "gate").write_text("2")
    assert tuner("create", "own.py:objective", "--trials", "2", "--checkpoint-every", "5m").code == 0
    work = ["worker", "own", "--objective", "own.py:objective", "--device", "cpu"]

    def reported() -> bool:
        study = optuna.load_study(study_name="own", storage=open_storage(database))
        return any(len(trial.intermediate_values) == 3 for trial in study.trials)

    with on_machine(tuner, "a").start(*work) as first:
        wait_for(reported, "three steps")
        wait_for(lambda: _n_checkpoints(database) > 0, "a checkpoint of theirs")
        kill(first)
    storage = PostgresStorage(database)
    claims.release_by_number(storage.sessions, open_study(storage.engine, "own").study_id, 0)
    storage.engine.dispose()
    (tmp_path / "gate").write_text("99")
    done = on_machine(tuner, "b")(*work)
    assert done.code == 0, done.stderr
    begun = [line.split("begins at step ")[1].strip() for line in done.stderr.splitlines() if "begins at" in line]
    assert begun[0] in ("2", "3"), "the third step may have been reported and not saved yet"
    assert begun[1:] == ["0"]
    study = optuna.load_study(study_name="own", storage=open_storage(database))
    killed = study.trials[0]
    assert sorted(killed.intermediate_values) == list(range(8))
    (tmp_path / "wanted").mkdir()
    assert killed.value == undisturbed(database, path, killed.params)
    assert _n_checkpoints(database) == 0
    _check_export(tuner, tmp_path, study.best_trial)


def _n_checkpoints(database: str) -> int:
    storage = PostgresStorage(database)
    with storage.engine.connect() as conn:
        found = conn.exec_driver_sql("SELECT count(*) FROM tuner_checkpoints").scalar_one()
    storage.engine.dispose()
    return int(found)


def _check_export(command: Tuner, tmp_path: Path, best: optuna.trial.FrozenTrial) -> None:
    """The export is of the best trial's model, on a machine that ran none of the trials."""
    done = command("export", "own", "--objective", "own.py:objective", "--output", "model", "--json")
    assert done.code == 0, done.stderr
    told = done.json()
    assert (told["number"], told["test"], list(told["missing"])) == (best.number, {}, ["test"])
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    gave = torch.load(tmp_path / f"gave-{best.number}.pt")
    kinds = torch.arange(50) % 2
    assert torch.equal(tuner.load_model(tmp_path / "model")(rows=rows, kinds=kinds)["logits"], gave)
    np.savez(tmp_path / "rows.npz", rows=rows.numpy(), kinds=kinds.numpy())
    said = command("predict", "model", "rows.npz", "--csv").stdout.splitlines()
    assert [line.split(",")[2] for line in said[1:]] == [("no", "yes")[place] for place in gave.argmax(1).tolist()]
    assert command("verify", "model").code == 0
    shown = command("show", "model/", "--json").json()
    assert (shown["kept"]["rows"], shown["retraining"], shown["epochs"]) == (32, None, 8)
