"""Workers as processes: joining, stopping, dying, and objectives that misbehave."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import pytest
from command import wait_for
from optuna.trial import TrialState

from storage import open_storage

if TYPE_CHECKING:
    from command import Running, Tuner

# Reports once a step, and goes on only as far as the file `gate` beside it says.
GATED = """
import os, threading
from pathlib import Path

GATE = Path(__file__).with_name("gate")

def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    pause = threading.Event()
    for step in range(10):
        while int(GATE.read_text() or 0) <= step:
            pause.wait(0.01)
            trial.report(x, step)
    trial.set_user_attr("pid", os.getpid())
    return x
"""

MISBEHAVING = """
import math, os, torch

def raises(trial):
    trial.suggest_float("x", 0, 1)
    raise KeyError("no such column")

def returns_nan(trial):
    return math.nan

def runs_out_of_memory(trial):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory")

def dies(trial):
    os._exit(9)

def prints(trial):
    print("hello from the objective")
    return 1.0
"""


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    path = tmp_path / "gated.py"
    path.write_text(GATED)
    open_gate(path, 0)
    return path


def open_gate(study_file: Path, step: int) -> None:
    aside = study_file.with_name("gate.new")
    aside.write_text(str(step))
    aside.replace(study_file.with_name("gate"))


def load(database: str, name: str) -> optuna.Study:
    return optuna.load_study(study_name=name, storage=open_storage(database))


def running_trial(running: Running) -> dict[str, Any]:
    wait_for(lambda: bool(running.events("trial_started")), "a trial starts")
    return running.events("trial_started")[0]


def wait_until_running(database: str, name: str, count: int) -> None:
    def reached() -> bool:
        trials = load(database, name).get_trials(states=[TrialState.RUNNING])
        return sum(bool(trial.intermediate_values) for trial in trials) == count

    wait_for(reached, f"{count} trials run and report")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_worker_joins_a_running_study_by_its_name_alone(tuner: Tuner) -> None:
    assert tuner("create", "digits", "--trials", "6", "--epochs", "2", "--sampler", "random").code == 0
    with (
        tuner.start("worker", "digits", "--log-format", "json") as first,
        tuner.start("worker", "digits", "--trials", "2", "--log-format", "json") as second,
    ):
        done = [first.finish(), second.finish()]
    assert [finished.code for finished in done] == [0, 0], done
    ended = [event["trial"] for worker in (first, second) for event in worker.events("trial_ended")]
    assert sorted(ended) == list(range(6))
    assert len(second.events("trial_ended")) <= 2
    assert {event["study"] for event in first.events("trial_ended")} == {"digits"}


def test_every_worker_takes_sampler_and_seed_from_the_spec(tuner: Tuner, database: str) -> None:
    def params_of(study: str, *workers: list[str]) -> list[dict[str, Any]]:
        tuner("create", "digits", "--study", study, "--trials", "4", "--epochs", "1", "--sampler", "random")
        for options in workers:
            assert tuner("worker", study, *options).code == 0
        return [trial.params for trial in load(database, study).trials]

    assert params_of("a", ["--trials", "2"], ["--trials", "2"]) == params_of("b", ["--slots", "2"])


def test_interrupted_a_worker_gives_its_trial_back_and_another_resumes_it(
    tuner: Tuner, database: str, study_file: Path
) -> None:
    assert tuner("create", f"{study_file}:objective", "--trials", "1").code == 0
    worker = ("worker", "gated", "--objective", f"{study_file}:objective", "--log-format", "json")
    for number in (signal.SIGINT, signal.SIGTERM):
        with tuner.start(*worker) as running:
            wait_until_running(database, "gated", 1)
            running.process.send_signal(number)
            assert running.finish().code == 130
        (trial,) = load(database, "gated").trials
        assert trial.state == TrialState.WAITING
        x = trial.params["x"]
    open_gate(study_file, 10)
    assert tuner(*worker).code == 0
    (trial,) = load(database, "gated").trials
    assert (trial.state, trial.value, trial.number) == (TrialState.COMPLETE, x, 0)


def test_a_slot_that_was_killed_is_started_again_and_its_trial_goes_on(
    tuner: Tuner, database: str, study_file: Path
) -> None:
    assert tuner("create", f"{study_file}:objective", "--trials", "2").code == 0
    arguments = ("worker", "gated", "--objective", f"{study_file}:objective", "--log-format", "json")
    with tuner.start(*arguments) as running:
        wait_until_running(database, "gated", 1)
        (slot,) = children(running.process.pid)
        x = load(database, "gated").trials[0].params["x"]
        os.kill(slot, signal.SIGKILL)
        wait_for(lambda: bool(running.events("slot_died")), "the worker notices")
        open_gate(study_file, 10)
        done = running.finish()
    assert done.code == 0, done.stderr
    first, second = load(database, "gated").trials
    assert (first.state, second.state) == (TrialState.COMPLETE, TrialState.COMPLETE)
    assert first.value == x
    assert [event["attempt"] for event in running.events("trial_started") if event["trial"] == 0] == [1, 2]


def test_a_worker_that_was_killed_leaves_no_slot_and_no_running_trial(
    tuner: Tuner, database: str, study_file: Path
) -> None:
    assert tuner("create", f"{study_file}:objective", "--trials", "2").code == 0
    with tuner.start("worker", "gated", "--objective", f"{study_file}:objective") as running:
        wait_until_running(database, "gated", 1)
        (slot,) = children(running.process.pid)
        running.process.kill()
        wait_for(lambda: not Path(f"/proc/{slot}").exists(), "the slot ends")
    wait_for(lambda: load(database, "gated").trials[0].state == TrialState.WAITING, "the trial is given back")


@pytest.mark.parametrize(
    ("function", "failure", "message"),
    [
        ("raises", "user_error", "KeyError: 'no such column' ("),
        ("returns_nan", "nan", "the objective returned nan"),
        ("runs_out_of_memory", "oom", "CUDA out of memory"),
    ],
)
def test_a_trial_that_fails_says_why_and_the_study_goes_on_until_max_failures(
    tuner: Tuner, tmp_path: Path, function: str, failure: str, message: str
) -> None:
    (tmp_path / "bad.py").write_text(MISBEHAVING)
    done = tuner("run", f"bad.py:{function}", "--trials", "5", "--max-failures", "1", "--workers", "1")
    assert done.code == 1
    assert "study 'bad' has no complete trial yet" in done.error()
    status = tuner("status", "bad", "--json").json()
    assert status["trials"]["failed"] == 2
    assert status["reason"] == "2 trials failed, more than the 1 allowed"
    ((kind, (count, found)),) = status["failures"].items()
    assert (kind, count) == (failure, 2)
    assert message in found
    if failure == "user_error":
        assert "bad.py, line 6" in found
    assert message in tuner("status", "bad").stdout


def test_a_trial_whose_process_dies_each_time_is_quarantined_and_the_worker_ends_with_a_reason(
    tuner: Tuner, tmp_path: Path
) -> None:
    (tmp_path / "bad.py").write_text(MISBEHAVING)
    done = tuner("run", "bad.py:dies", "--trials", "5", "--workers", "1")
    assert done.code == 1
    assert "slot 0 died 3 times in a row, last by exit code 9" in done.error()
    (trial,) = tuner("trials", "bad", "--json").json()
    assert trial["state"] == "FAIL"
    assert trial["user_attrs"]["failure"] == "lost"


def test_a_plain_function_runs_but_cannot_be_exported(tuner: Tuner, tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text("def objective(trial):\n    return trial.suggest_float('x', -1, 1) ** 2\n")
    done = tuner("run", "plain.py:objective", "--trials", "5", "--workers", "1")
    assert done.code == 0, done.stderr
    assert "not exported: plain.py:objective is a plain function and has no model" in done.stderr
    best = tuner("best", "plain", "--json").json()
    assert best["value"] == pytest.approx(best["params"]["x"] ** 2)
    assert (best["metric"], best["direction"], best["epoch"]) == ("value", "minimize", None)
    refused = tuner("export", "plain", "--objective", "plain.py:objective")
    assert refused.code == 1
    assert "is a plain function and has no model to export" in refused.error()
    assert "give yours: --objective path/to/plain.py:objective" in tuner("worker", "plain").error()


def test_what_an_objective_prints_is_shown_and_does_not_disturb(tuner: Tuner, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(MISBEHAVING)
    done = tuner("run", "bad.py:prints", "--trials", "1", "--workers", "1")
    assert done.code == 0, done.stderr
    assert "hello from the objective" in done.stderr
    assert "hello" not in done.stdout


def test_other_code_of_the_objective_is_refused_naming_both_hashes(tuner: Tuner, tmp_path: Path) -> None:
    path = tmp_path / "plain.py"
    path.write_text("def objective(trial):\n    return 1.0\n")
    assert tuner("create", "plain.py:objective", "--trials", "2").code == 0
    path.write_text("def objective(trial):\n    return 2.0\n")
    refused = tuner("worker", "plain", "--objective", "plain.py:objective")
    assert refused.code == 1
    assert len({word for word in refused.error().replace(",", " ").replace(";", " ").split() if len(word) == 12}) >= 2
    allowed = tuner("worker", "plain", "--objective", "plain.py:objective", "--allow-code-change")
    assert allowed.code == 0, allowed.stderr
    assert tuner("best", "plain", "--json").json()["value"] == 2.0


def test_no_password_is_in_any_process_of_a_worker(tuner: Tuner, database: str, study_file: Path) -> None:
    secret = "correct-horse-battery"
    url = database.replace("tuner@", f"tuner:{secret}@") if "tuner@" in database else database
    environment = {"TUNER_STORAGE": url}
    assert tuner("create", f"{study_file}:objective", "--trials", "1", **environment).code == 0
    with tuner.start(
        "worker", "gated", "--objective", f"{study_file}:objective", "--log-format", "json", **environment
    ) as running:
        wait_until_running(database, "gated", 1)
        for pid in (running.process.pid, *children(running.process.pid)):
            assert secret.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        open_gate(study_file, 10)
        done = running.finish()
    assert done.code == 0
    assert secret not in done.stderr + done.stdout
