"""Objectives that do what no objective should, in processes of their own."""

from __future__ import annotations

import os
import signal

import pytest
from command import Tuner, wait_for
from optuna.trial import TrialState
from processes import all_of

from storage import open_storage

OBJECTIVES = r"""
import os, sys, threading

def prints_bytes(trial):
    for _ in range(2000):
        os.write(1, b"\xff\xfe not text " * 20 + b"\n")
    return 1.0

def leaves_quietly(trial):
    if trial.number == 0:
        os._exit(0)
    return 1.0

def reports_half_a_step(trial):
    if trial.number == 0:
        trial.report(1.0, 0.5)
    return 1.0

def fails_in_no_unicode(trial):
    if trial.number == 0:
        raise ValueError("cannot read \udcff.png")
    return 1.0

def trains(trial):
    for step in range(1, 600):
        threading.Event().wait(0.1)
        trial.report(step, step)
    return 1.0
"""


def arguments(tuner: Tuner, name: str) -> tuple[str, ...]:
    path = tuner.directory / "odd.py"
    path.write_text(OBJECTIVES)
    return (f"{path}:{name}", "--trials", "2", "--pruner", "none")


def states(database: str) -> list[TrialState]:
    storage = open_storage(database)
    return [trial.state for trial in storage.get_all_trials(storage.get_study_id_from_name("odd"))]


@pytest.mark.parametrize(
    ("name", "n_failed", "told"),
    [
        ("prints_bytes", 0, "not text"),
        ("leaves_quietly", 1, "died (exit code 0)"),
        ("reports_half_a_step", 1, "a step needs to be a whole number in 0..2147483647, got 0.5"),
        ("fails_in_no_unicode", 1, "cannot read \\udcff.png"),
    ],
)
def test_a_study_goes_on(tuner: Tuner, database: str, name: str, n_failed: int, told: str) -> None:
    done = tuner("run", *arguments(tuner, name), "--workers", "1")
    assert done.code == 0, done.stderr
    assert told in done.stderr
    assert states(database) == [TrialState.FAIL] * n_failed + [TrialState.COMPLETE] * 2


def test_a_scheduler_that_sends_sigterm_to_every_process_loses_nothing(tuner: Tuner, database: str) -> None:
    objective, *options = arguments(tuner, "trains")
    assert tuner("create", objective, *options).code == 0
    with tuner.start("worker", "odd", "--objective", objective, "--log-format", "json") as running:
        wait_for(lambda: len(running.events("report")) >= 3, "it trains", 120)
        pid = running.process.pid
        for process in all_of(pid):
            os.kill(process, signal.SIGTERM)
        assert running.finish().code == 143
    assert [event.get("trial") for event in running.events("trial_released")] == [0]
    assert running.events("slot_died") == []
    assert states(database) == [TrialState.WAITING]
