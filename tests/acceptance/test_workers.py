"""Workers as processes: joining, stopping, dying, and objectives that misbehave."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import pytest
from command import Tuner, wait_for
from optuna.trial import TrialState
from processes import all_of, slots_of
from sqlalchemy import text

from storage import EmbeddedServer, open_engine, open_storage

if TYPE_CHECKING:
    from command import Running

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

MISBEHAVING = """
import math, os, subprocess, torch

def raises(trial):
    trial.suggest_float("x", 0, 1)
    raise KeyError("no such column")

def returns_nan(trial):
    return math.nan

def runs_out_of_memory(trial):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory")

def names_too_long(trial):
    trial.set_user_attr("k" * 600, 1)
    return 1.0

def leaves_a_child_behind(trial):
    subprocess.Popen(["sleep", "300"])
    return 1.0

def dies(trial):
    os._exit(9)

def prints(trial):
    print("hello from the objective")
    return 1.0
"""


NO_RETURN = """
from objectives.digits import Digits

class Mine(Digits):
    def load_data(self, root):
        super().load_data(root)
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


def wait_until_running(database: str, name: str, count: int, *, reports: int = 1) -> None:
    def reached() -> bool:
        trials = load(database, name).get_trials(states=[TrialState.RUNNING])
        return sum(len(trial.intermediate_values) >= reports for trial in trials) == count

    wait_for(reached, f"{count} trials run and report")


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
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        with tuner.start(*worker) as running:
            wait_until_running(database, "gated", 1)
            running.process.send_signal(number)
            assert running.finish().code == code
        (trial,) = load(database, "gated").trials
        assert trial.state == TrialState.WAITING
        x = trial.params["x"]
    open_gate(study_file, 10)
    assert tuner(*worker).code == 0
    (trial,) = load(database, "gated").trials
    assert (trial.state, trial.value, trial.number) == (TrialState.COMPLETE, x, 0)


def test_a_trial_that_was_given_back_goes_on_within_its_epoch(tuner: Tuner, database: str, tmp_path: Path) -> None:
    path = tmp_path / "trains.py"
    path.write_text(TRAINS)
    open_gate(path, 2)  # an epoch after these takes 2 s, so that it is interrupted in its midst
    objective = f"{path}:Trains"
    assert tuner("create", objective, "--trials", "1").code == 0
    worker = ("worker", "trains", "--objective", objective, "--log-format", "json", "--device", "cpu")
    with tuner.start(*worker) as running:
        wait_until_running(database, "trains", 1, reports=2)
        for process in all_of(running.process.pid):  # as a scheduler, before a time limit
            os.kill(process, signal.SIGUSR1)
        assert running.finish().code == 75
    (trial,) = load(database, "trains").trials
    assert (trial.state, trial.intermediate_values) == (TrialState.WAITING, {})
    (kept,) = (tmp_path / "data" / "checkpoints").glob("study-*/trial-0.pt")

    open_gate(path, 9)
    with tuner.start(*worker) as running:
        assert running.finish().code == 0
    (resumed,) = [event["message"] for event in running.events("note") if "resumed" in event["message"]]
    assert resumed.startswith("trial 0: resumed after epoch 2, batch ")
    assert not kept.exists()
    (trial,) = load(database, "trains").trials
    assert (trial.state, sorted(trial.intermediate_values)) == (TrialState.COMPLETE, [1, 2, 3, 4, 5])


def test_a_slot_that_was_killed_is_started_again_and_its_trial_goes_on(
    tuner: Tuner, database: str, study_file: Path
) -> None:
    assert tuner("create", f"{study_file}:objective", "--trials", "2").code == 0
    arguments = ("worker", "gated", "--objective", f"{study_file}:objective", "--log-format", "json")
    with tuner.start(*arguments) as running:
        wait_until_running(database, "gated", 1)
        (slot,) = slots_of(running.process.pid)
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
        (slot,) = slots_of(running.process.pid)
        running.process.kill()
        wait_for(lambda: not Path(f"/proc/{slot}").exists(), "the slot ends")
    wait_for(lambda: load(database, "gated").trials[0].state == TrialState.WAITING, "the trial is given back")


@pytest.mark.parametrize(
    ("function", "failure", "message"),
    [
        ("raises", "user_error", "KeyError: 'no such column' ("),
        ("returns_nan", "nan", "the objective returned nan"),
        ("names_too_long", "user_error", "InvalidWriteError: an attribute's key needs at most 512 characters, got 600"),
        ("runs_out_of_memory", "oom", "CUDA out of memory"),
    ],
)
def test_a_trial_that_fails_says_why_and_the_study_goes_on_until_max_failures(
    tuner: Tuner, tmp_path: Path, function: str, failure: str, message: str
) -> None:
    (tmp_path / "bad.py").write_text(MISBEHAVING)
    done = tuner("run", f"bad.py:{function}", "--trials", "5", "--max-failures", "1", "--workers", "1")
    assert done.code == 5
    assert "study 'bad' ended: 2 trials failed, more than the 1 allowed; the last: " in done.error()
    assert message in done.error()
    status = tuner("status", "bad", "--json").json()
    assert status["trials"]["failed"] == 2
    assert status["reason"] == "2 trials failed, more than the 1 allowed"
    ((kind, (count, found)),) = status["failures"].items()
    assert (kind, count) == (failure, 2)
    assert message in found
    if function == "raises":
        assert "bad.py, line 6" in found
    assert message in tuner("status", "bad").stdout


def test_a_trial_whose_process_dies_each_time_is_quarantined(tuner: Tuner, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(MISBEHAVING)
    done = tuner("run", "bad.py:dies", "--trials", "5", "--workers", "1", "--max-failures", "0")
    assert done.code == 5
    assert "its process died (exit code 9) in the last of 3 attempts" in done.error()
    (trial,) = tuner("trials", "bad", "--json").json()
    assert trial["state"] == "FAIL"
    assert trial["user_attrs"]["failure"] == "lost"


def test_a_child_that_an_objective_leaves_behind_does_not_hold_the_worker_up(tuner: Tuner, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(MISBEHAVING)
    start = time.monotonic()
    assert tuner("run", "bad.py:leaves_a_child_behind", "--trials", "1", "--workers", "1").code == 0
    assert time.monotonic() - start < 100  # and not the 300 s of the child


def test_a_slot_that_lost_its_lease_writes_nothing(tuner: Tuner, database: str, study_file: Path) -> None:
    study_file.write_text(GATED.replace("trial.report(x, step)", "pass"))  # nothing tells it until its end
    assert tuner("create", f"{study_file}:objective", "--trials", "1").code == 0
    arguments = ("worker", "gated", "--objective", f"{study_file}:objective", "--log-format", "json")
    with tuner.start(*arguments) as running:
        running_trial(running)
        wait_for(lambda: bool(load(database, "gated").trials[0].params), "its param is drawn")
        engine = open_engine(database)
        with engine.begin() as conn:  # as after a minute in which the slot's process was stopped
            taken = "update tuner_leases set token = gen_random_uuid(), expires_at = now() - interval '1 hour'"
            conn.execute(text(taken))
        engine.dispose()
        open_gate(study_file, 10)
        done = running.finish()
    assert done.code == 0, done.stderr
    assert [event["message"] for event in running.events("trial_released")] != []
    assert [event["attempt"] for event in running.events("trial_started")] == [1, 2]
    assert [event["attempt"] for event in running.events("trial_ended")] == [2]


def test_a_slot_that_was_frozen_for_longer_than_its_lease_is_fenced_and_goes_on(
    tuner: Tuner, database: str, study_file: Path
) -> None:
    assert tuner("create", f"{study_file}:objective", "--trials", "2").code == 0
    arguments = ("worker", "gated", "--objective", f"{study_file}:objective", "--log-format", "json")
    with tuner.start(*arguments) as frozen:
        wait_until_running(database, "gated", 1)
        (slot,) = slots_of(frozen.process.pid)
        os.kill(slot, signal.SIGSTOP)
        engine = open_engine(database)
        with engine.begin() as conn:  # as after a minute
            conn.execute(text("update tuner_leases set expires_at = now() - interval '1 hour'"))
        engine.dispose()
        with tuner.start(*arguments) as healthy:
            wait_for(lambda: bool(healthy.events("trial_started")), "another worker takes the trial")
            wait_until_running(database, "gated", 1)
            os.kill(slot, signal.SIGCONT)
            wait_for(lambda: bool(frozen.events("trial_released")), "the frozen one finds that it has lost it")
            open_gate(study_file, 10)
            done = [frozen.finish(), healthy.finish()]
    assert [finished.code for finished in done] == [0, 0], done
    assert "the lease on trial id" in frozen.events("trial_released")[0]["message"]
    assert [event["attempt"] for event in healthy.events("trial_started") if event["trial"] == 0] == [2]
    ended = [event["trial"] for running in (frozen, healthy) for event in running.events("trial_ended")]
    assert sorted(ended) == [0, 1]
    assert [trial.state for trial in load(database, "gated").trials] == [TrialState.COMPLETE] * 2


def test_a_run_outlives_an_immediate_restart_of_the_database(tmp_path: Path, study_file: Path) -> None:
    server = EmbeddedServer(tmp_path / "home")
    tuner = Tuner({"TUNER_DATA_DIR": str(tmp_path / "home")}, tmp_path)
    try:
        url = server.start()
        with tuner.start("run", f"{study_file}:objective", "--trials", "3", "--log-format", "json") as running:
            wait_for(lambda: len(running.events("trial_started")) == 2, "two trials run")
            wait_until_running(url, "gated", 2)
            for _ in range(2):
                pid = server.status().pid
                assert pid is not None
                os.kill(pid, signal.SIGQUIT)  # PostgreSQL's "immediate" shutdown
                wait_for(lambda: not server.status().running, "the server is gone")
                server.start()
                wait_until_running(url, "gated", 2)
            open_gate(study_file, 10)
            done = running.finish()
        assert done.code == 0, done.stderr
        trials = load(url, "gated").trials
        assert [(trial.number, trial.state) for trial in trials] == [(n, TrialState.COMPLETE) for n in range(3)]
    finally:
        server.destroy()


def test_an_objective_that_could_not_load_is_corrected_and_run_again(tuner: Tuner, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(NO_RETURN)
    refused = tuner("run", "mine.py:Mine", "--trials", "1", "--epochs", "1", "--workers", "1", "--no-export")
    assert refused.code == 1
    assert "Mine.load_data needs to return tuner.data.Data, got None" in refused.error()
    assert tuner("studies", "--json").json() == []
    path.write_text(NO_RETURN.replace("        super().load", "        return super().load"))
    done = tuner("run", "mine.py:Mine", "--trials", "1", "--epochs", "1", "--workers", "1", "--no-export")
    assert done.code == 0, done.stderr


def test_a_device_that_is_not_here_is_refused_in_one_line(tuner: Tuner) -> None:
    done = tuner("run", "digits", "--device", "banana", "--no-export")
    assert done.code == 2
    assert "--device needs a device of this machine, got 'banana'" in done.error()


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
        for pid in all_of(running.process.pid):
            assert secret.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        open_gate(study_file, 10)
        done = running.finish()
    assert done.code == 0
    assert secret not in done.stderr + done.stdout
