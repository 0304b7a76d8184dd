"""Studies that go on beyond what they were created for, with workers that run meanwhile."""

from __future__ import annotations

from pathlib import Path

import optuna
from command import Tuner, wait_for
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial

from storage import open_storage

# Waits for the file `gate` beside it in its trial 1.
GATED = """
import threading
from pathlib import Path

GATE = Path(__file__).with_name("gate")

def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    while trial.number == 1 and not GATE.exists():
        threading.Event().wait(0.02)
    return x
"""


def trials_of(database: str, name: str) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=name, storage=open_storage(database)).get_trials()


def test_a_study_is_extended_under_a_running_worker_and_after_its_end(
    tuner: Tuner, database: str, tmp_path: Path
) -> None:
    (tmp_path / "gated.py").write_text(GATED)
    objective = f"{tmp_path / 'gated.py'}:objective"
    worker = ("worker", "gated", "--objective", objective)
    assert tuner("create", objective, "--trials", "2", "--direction", "minimize").code == 0
    with tuner.start(*worker) as running:
        wait_for(lambda: len(trials_of(database, "gated")) == 2, "the last trial of the budget runs")
        extended = tuner("extend", "gated", "--trials", "+1")
        assert extended.stdout == "study gated: 3 trials (2 before)\n"
        assert "'tuner worker gated --objective path/to/gated.py:objective' starts one" in extended.stderr
        (tmp_path / "gate").touch()
        assert running.finish().code == 0
    assert [trial.state for trial in trials_of(database, "gated")] == [TrialState.COMPLETE] * 3

    refused = tuner("run", objective, "--trials", "5", "--direction", "minimize")
    assert (refused.code, "'tuner extend gated --trials +2' adds to it" in refused.error()) == (1, True)
    assert tuner("stop", "gated").code == 0
    found = tuner("extend", "gated", "--trials", "+2", "--json").json()
    assert (found["before"]["trials"], found["budget"]["trials"]) == (3, 5)
    assert "the study was stopped; 'tuner resume' lets it go on" in found["closed"]
    assert tuner("resume", "gated").code == 0
    assert [tuner("enqueue", "gated", f"x=0.{n}").code for n in (1, 2)] == [0, 0]
    assert tuner("cancel", "gated", "3").stdout == "trial 3 is cancelled\n"
    assert "trial 3 is fail, and not waiting" in tuner("cancel", "gated", "3").error()
    assert tuner(*worker).code == 0
    trials = trials_of(database, "gated")
    assert [trial.state.name for trial in trials] == [*["COMPLETE"] * 3, "FAIL", *["COMPLETE"] * 2]
    assert (trials[3].params, trials[4].params) == ({}, {"x": 0.2})
    assert tuner("extend", "gated").error() == (
        "tuner: extend needs --trials, --timeout or --max-failures, such as --trials +20"
    )


def test_a_study_of_stock_optuna_is_adopted_and_goes_on_by_workers(tuner: Tuner, database: str, tmp_path: Path) -> None:
    (tmp_path / "gate").touch()
    (tmp_path / "gated.py").write_text(GATED)
    objective = f"{tmp_path / 'gated.py'}:objective"
    stock = optuna.create_study(study_name="theirs", storage=RDBStorage(database), direction="maximize")
    stock.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    stock.enqueue_trial({"x": 1.0})
    refused = tuner("worker", "theirs").error()
    assert "'tuner adopt theirs OBJECTIVE' lets workers go on with it" in refused
    adopted = tuner("adopt", "theirs", objective, "--trials", "+2", "--sampler", "random")
    assert adopted.stdout == (
        "study theirs has objective gated.py:objective: 2 of 4 trials are done;"
        " 'tuner worker theirs --objective path/to/gated.py:objective' goes on\n"
    )
    assert "has a spec already, and workers may run its trials" in tuner("adopt", "theirs", objective).error()
    assert tuner("worker", "theirs", "--objective", objective).code == 0
    trials = trials_of(database, "theirs")
    assert [(trial.number, trial.state) for trial in trials] == [(n, TrialState.COMPLETE) for n in range(4)]
    best = tuner("best", "theirs", "--json").json()
    assert (best["number"], best["value"], best["direction"]) == (2, 1.0, "maximize")
    assert "no study named 'nobody'" in tuner("adopt", "nobody", objective).error()


def test_a_new_study_learns_from_another_ones_trials_and_has_none_of_them(
    tuner: Tuner, database: str, tmp_path: Path
) -> None:
    (tmp_path / "gate").touch()
    (tmp_path / "gated.py").write_text(GATED)
    objective = f"{tmp_path / 'gated.py'}:objective"
    old = optuna.create_study(study_name="old", storage=RDBStorage(database), direction="minimize")
    space = {"x": FloatDistribution(0, 1), "gone": FloatDistribution(0, 1)}
    for n in range(40):
        old.add_trial(create_trial(params={"x": n / 40, "gone": 0.5}, distributions=space, value=abs(n / 40 - 0.7)))
    run = ("run", objective, "--study", "new", "--from", "old", "--trials", "3", "--direction", "minimize")
    assert "sampler random does not learn from other trials" in tuner(*run, "--sampler", "random").error()
    done = tuner(*run, "--workers", "1", "--json")
    assert "learns from 40 trials of study old" in done.stderr
    trials = trials_of(database, "new")
    assert [trial.number for trial in trials] == [0, 1, 2]
    assert all(abs(trial.params["x"] - 0.7) < 0.25 for trial in trials), trials
    assert done.json()["value"] == min(trial.value for trial in trials)
    assert tuner("delete", "old", "--yes").code == 0
    assert tuner("create", *run[1:], "--json").json()["created"] is False
