"""How workers and slots end that nobody waits for, or that are told so in unusual ways."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from command import Running, Tuner, wait_for
from optuna.trial import TrialState
from processes import slots_of

from storage import open_storage

OBJECTIVES = """
import subprocess, threading
from pathlib import Path

def trains(trial):
    for step in range(1, 600):
        threading.Event().wait(0.1)
        trial.report(step, step)
    return 1.0

def hears_nothing(trial):
    child = subprocess.Popen(["sleep", "600"])
    path = Path(__file__).with_name("child")
    path.with_suffix(".new").write_text(str(child.pid))
    path.with_suffix(".new").rename(path)
    threading.Event().wait(600)
"""


def create(tuner: Tuner, name: str) -> tuple[str, ...]:
    """Create the study and return the worker command for it."""
    path = tuner.directory / "mine.py"
    path.write_text(OBJECTIVES)
    assert tuner("create", f"{path}:{name}", "--study", "s", "--trials", "1", "--pruner", "none").code == 0
    return ("worker", "s", "--objective", f"{path}:{name}", "--log-format", "json")


def state(database: str) -> TrialState:
    storage = open_storage(database)
    (trial,) = storage.get_all_trials(storage.get_study_id_from_name("s"))
    return trial.state


def train(running: Running) -> None:
    wait_for(lambda: len(running.events("report")) >= 3, "it trains", 120)


def test_signals_that_come_together_are_one(tuner: Tuner, database: str) -> None:
    worker = create(tuner, "trains")
    with tuner.start(*worker) as running:
        train(running)
        running.process.terminate()
        threading.Event().wait(0.01)  # as much as `timeout` may take from the worker to its group
        running.process.terminate()
        assert running.finish().code == 143
    assert [event["trial"] for event in running.events("trial_released")] == [0]
    assert state(database) == TrialState.WAITING


def test_a_worker_whose_terminal_is_gone_gives_its_trials_back(tuner: Tuner, database: str) -> None:
    worker = create(tuner, "trains")
    told = replace(tuner, within=("env", "--default-signal=HUP"))  # though the tests run under nohup
    with told.start(*worker) as running:
        train(running)
        running.process.send_signal(signal.SIGHUP)
        assert running.finish().code == 129
    assert [event["trial"] for event in running.events("trial_released")] == [0]
    assert state(database) == TrialState.WAITING


def test_under_nohup_a_worker_outlives_its_terminal(tuner: Tuner) -> None:
    worker = create(tuner, "trains")
    with replace(tuner, within=("nohup",)).start(*worker) as running:
        train(running)
        running.process.send_signal(signal.SIGHUP)
        n_reports = len(running.events("report"))
        wait_for(lambda: len(running.events("report")) > n_reports + 3, "it goes on")
        assert running.events("stopping") == []


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_worker_whose_log_nobody_reads_any_more_gives_its_trials_back(
    tuner: Tuner, database: str, log_format: str
) -> None:
    *worker, _ = create(tuner, "trains")
    n_lines = {"text": 2, "json": 6}[log_format]
    piped = ("bash", "-o", "pipefail", "-c", f'"$0" "$@" 2>&1 | head -n {n_lines}')
    done = replace(tuner, within=piped)(*worker, log_format)
    assert (done.code, len(done.stdout.splitlines())) == (75, n_lines)
    assert state(database) == TrialState.WAITING


def test_a_slot_whose_worker_is_gone_ends_whatever_its_trial_does_with_all_that_it_started(tuner: Tuner) -> None:
    worker = create(tuner, "hears_nothing")
    told = tuner.directory / "child"
    with tuner.start(*worker) as running:
        wait_for(told.exists, "the trial runs", 120)
        pid = running.process.pid
        (slot,) = slots_of(pid)
        running.process.kill()
        wait_for(lambda: not any(is_running(number) for number in (str(slot), told.read_text())), "they end", 20)


def is_running(pid: str) -> bool:
    """Whether the process is there, and no zombie that nobody has waited for."""
    try:
        return os.fsencode(") Z ") not in Path(f"/proc/{pid}/stat").read_bytes()
    except FileNotFoundError:
        return False
