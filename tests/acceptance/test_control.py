"""Stop, pause, resume, enqueue and delete, from outside, while workers run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from command import Tuner, wait_for
from optuna.trial import TrialState
from terminal import on_terminal

from storage import open_storage

# Reports until the file `gate` beside it says that the trial may end.
GATED = """
import threading
from pathlib import Path

GATE = Path(__file__).with_name("gate")

def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    trial.suggest_categorical("kind", ["a", "b"])
    step = 0
    while not GATE.exists():
        trial.report(x, step)
        step += 1
        threading.Event().wait(0.02)
    return x
"""


@pytest.fixture
def objective(tmp_path: Path) -> str:
    path = tmp_path / "gated.py"
    path.write_text(GATED)
    return f"{path}:objective"


@pytest.fixture
def worker(objective: str) -> tuple[str, ...]:
    return ("worker", "gated", "--objective", objective, "--log-format", "json")


def open_gate(tmp_path: Path) -> None:
    (tmp_path / "gate").touch()


def trials_of(database: str) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="gated", storage=open_storage(database)).get_trials()


def wait_until_reporting(database: str, count: int) -> None:
    def reached() -> bool:
        running = [trial for trial in trials_of(database) if trial.state == TrialState.RUNNING]
        return sum(bool(trial.intermediate_values) for trial in running) == count

    wait_for(reached, f"{count} trials run and report")


def status(tuner: Tuner) -> dict[str, Any]:
    found: dict[str, Any] = tuner("status", "gated", "--json").json()
    return found


def test_stop_ends_every_worker_and_resume_lets_the_study_go_on(
    tuner: Tuner, database: str, tmp_path: Path, objective: str, worker: tuple[str, ...]
) -> None:
    assert tuner("create", objective, "--trials", "4", "--sampler", "random").code == 0
    with tuner.start(*worker) as first, tuner.start(*worker) as second:
        wait_until_reporting(database, 2)
        params = [trial.params for trial in trials_of(database)]
        stopped = tuner("stop", "gated")
        assert stopped.stdout == ("study gated is stopped; workers give 2 running trials back at their next report\n")
        done = [first.finish(), second.finish()]
    assert [finished.code for finished in done] == [0, 0], done
    assert "the study was stopped; 'tuner resume' lets it go on" in done[0].stderr
    assert [trial.state for trial in trials_of(database)] == [TrialState.WAITING] * 2
    assert (status(tuner)["state"], status(tuner)["trials"]["running"]) == ("stopped", 0)
    open_gate(tmp_path)
    late = tuner(*worker)
    assert (late.code, [trial.state for trial in trials_of(database)]) == (0, [TrialState.WAITING] * 2)

    assert tuner("resume", "gated", "--json").json() == {"study": "gated", "state": "open", "running": 0}
    assert tuner(*worker).code == 0
    trials = trials_of(database)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 4
    assert [trial.params for trial in trials[:2]] == params
    assert status(tuner)["state"] == "finished"


def test_a_paused_study_keeps_its_workers_and_goes_on_with_them(
    tuner: Tuner, database: str, tmp_path: Path, objective: str, worker: tuple[str, ...]
) -> None:
    assert tuner("create", objective, "--trials", "2", "--sampler", "random").code == 0
    with tuner.start(*worker) as running:
        wait_until_reporting(database, 1)
        assert tuner("pause", "gated").code == 0
        wait_for(lambda: bool(running.events("paused")), "the worker waits")
        (trial,) = trials_of(database)
        assert (trial.state, trial.intermediate_values) == (TrialState.WAITING, {})
        assert status(tuner)["state"] == "paused"
        open_gate(tmp_path)
        assert tuner("resume", "gated").stdout == "study gated is open\n"
        done = running.finish()
    assert done.code == 0, done
    assert len(running.events("paused")) == 1
    assert [event["attempt"] for event in running.events("trial_started")] == [1, 1, 1]
    assert [trial.state for trial in trials_of(database)] == [TrialState.COMPLETE] * 2


def test_an_enqueued_trial_runs_before_any_new_one_and_within_the_budget(
    tuner: Tuner, database: str, tmp_path: Path, objective: str, worker: tuple[str, ...]
) -> None:
    open_gate(tmp_path)
    assert tuner("create", objective, "--trials", "3", "--sampler", "random").code == 0
    assert tuner(*worker, "--trials", "1").code == 0
    first = tuner("enqueue", "gated", "x=0.25", "kind=b", "--json")
    assert (first.json(), first.stderr) == ({"study": "gated", "number": 1, "params": {"x": 0.25, "kind": "b"}}, "")
    second = tuner("enqueue", "gated", "y=1", "--force")
    assert second.stdout == "enqueued trial 2: y=1\n"
    assert "no trial of study gated has had a param 'y' so far" in second.stderr
    assert tuner(*worker).code == 0
    assert [trial.state for trial in trials_of(database)] == [TrialState.COMPLETE] * 3
    assert trials_of(database)[1].params == {"x": 0.25, "kind": "b"}
    late = tuner("enqueue", "gated", "x=0.5")
    assert late.code == 1
    assert late.error() == (
        "tuner: study 'gated' is finished, and would not run it: the budget of 3 trials is used up;"
        " 'tuner extend gated --trials +20' lets it go on"
    )
    assert len(trials_of(database)) == 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("enqueue", "gated", "x"), 2, "enqueue needs PARAM=VALUE, got 'x'"),
        (("enqueue", "gated", "=1"), 2, "enqueue needs PARAM=VALUE, got '=1'"),
        (("enqueue", "gated", "x=0.1", "x=0.2"), 2, "enqueue got 'x' twice"),
        (("enqueue", "gated", "x=2"), 2, "x: 0 to 1; got 2"),
        (("enqueue", "gated", "x=big"), 2, "got 'big'"),
        (("enqueue", "gated", "kind=c"), 2, "kind: a or b; got 'c'"),
        (("enqueue", "gated", "kin=a"), 2, "has had a param 'kin'; did you mean 'kind'? --force enqueues it"),
        (("enqueue", "gated", "k" * 600 + "=1"), 2, "a param's name needs at most 512 characters, got 600"),
        (("enqueue", "gated"), 2, "Missing argument"),
        *(
            ((command, "nobody", *(["x=1"] if command == "enqueue" else [])), 1, "no study named 'nobody' in")
            for command in ("enqueue", "stop", "pause", "resume", "delete")
        ),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    tuner: Tuner, database: str, arguments: tuple[str, ...], code: int, message: str
) -> None:
    storage = open_storage(database)
    study = a_study_of_tuner(storage)
    params = {"x": 0.5, "kind": "a"}
    study.add_trial(optuna.trial.create_trial(value=0.5, params=params, distributions={"x": X, "kind": KIND}))
    refused = tuner(*arguments)
    assert (refused.code, message in refused.error()) == (code, True), refused
    assert len(study.trials) == 1


def test_a_study_is_deleted_once_no_worker_runs_it(
    tuner: Tuner, database: str, objective: str, worker: tuple[str, ...]
) -> None:
    assert tuner("create", objective, "--trials", "2").code == 0
    with tuner.start(*worker) as running:
        wait_until_reporting(database, 1)
        refused = tuner("delete", "gated", "--yes")
        assert refused.code == 1
        assert "study 'gated' is not deleted: workers run 1 of its trials now (number 0, " in refused.error()
        assert tuner("stop", "gated").code == 0
        assert running.finish().code == 0
    unsure = tuner("delete", "gated")
    assert (unsure.code, "study gated is deleted with its 1 trials if you pass --yes" in unsure.error()) == (2, True)
    with on_terminal(tuner, "delete", "gated") as terminal:
        terminal.wait_for("study gated is deleted with its 1 trials? [y/N]:")
        terminal.type("n\r")
        assert terminal.exit_code() == 1
        assert not any("tuner:" in line for line in terminal.screen)
    assert tuner("delete", "gated", "--yes").stdout == "deleted study gated with 1 trials\n"
    assert tuner("studies", "--json").json() == []


def test_a_worker_whose_study_is_deleted_by_force_ends_with_one_line(
    tuner: Tuner, database: str, objective: str, worker: tuple[str, ...]
) -> None:
    assert tuner("create", objective, "--trials", "2").code == 0
    with tuner.start(*worker[:-2]) as running:
        wait_until_reporting(database, 1)
        deleted = tuner("delete", "gated", "--force", "--json")
        assert deleted.json() == {"study": "gated", "deleted": True, "trials": 1, "confirmation": None}
        done = running.finish()
    assert done.code == 1
    assert "was deleted: nothing is left to do" in done.error()


X = optuna.distributions.FloatDistribution(0, 1)
KIND = optuna.distributions.CategoricalDistribution(("a", "b"))


def a_study_of_tuner(storage: Any) -> optuna.Study:
    from storage.coordination import studies
    from tuner.spec import Budget, ObjectiveSpec, PrunerSpec, SamplerSpec, Spec

    spec = Spec(
        objective=ObjectiveSpec(name="gated.py:objective", code_hash="0" * 64, options={}),
        metric="value",
        direction="minimize",
        sampler=SamplerSpec(name="random"),
        pruner=PrunerSpec(name="none"),
        budget=Budget(trials=2),
        epochs=1,
        seed=0,
    )
    studies.create_study(storage.engine, "gated", "minimize", spec.model_dump(mode="json"), {}, "value")
    return optuna.load_study(study_name="gated", storage=storage)
