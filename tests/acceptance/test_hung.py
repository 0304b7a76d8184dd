"""Trials that hang where no thread of theirs could end them: seen by their worker, shown, killed, and told as such."""

from __future__ import annotations

import sys
from dataclasses import replace

from command import Finished, Tuner

HANGING = """
import itertools
import threading
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import get_worker_info

from tuner.data import Data, Samples
from tuner.objective import Objective


def in_a_lock(lock):
    with lock:
        lock.acquire()


def in_c(_):
    sum(itertools.repeat(0))  # an endless loop that lets no other thread of Python's run


def hangs(trial):
    trial.suggest_float("x", 0, 1)
    (in_a_lock, in_c)[trial.number % 2](threading.Lock())


class Numbers:
    def __init__(self, root):
        self.n_read, self.has_hung = 0, Path(root) / "hung"

    def __len__(self):
        return 64

    def __getitem__(self, row):
        self.n_read += get_worker_info() is not None
        if self.n_read > 100 and not self.has_hung.exists():
            self.has_hung.touch()
            in_a_lock(threading.Lock())
        return torch.full((2,), row / 64), row % 2


class Reads(Objective):
    epochs = 3
    readers = 1

    def suggest(self, trial):
        trial.suggest_float("lr", 0.01, 0.1)

    def load_data(self, root):
        return Data(*(Samples(Numbers(root)) for _ in range(3)), class_names=("even", "odd"))

    def build_model(self, params):
        return nn.Linear(2, 2)
"""

# The command line with a watchdog that waits for less than a minute.
SOON = """
import sys
from tuner.cli import main
from tuner.worker import watchdog
watchdog.LEAST_S = 8.0
del sys.argv[0]
main()
"""
OPTIONS = ("--workers", "1", "--device", "cpu", "--no-export", "--no-preflight", "--log-format", "json")


def log_of(done: Finished) -> str:
    return done.stderr.replace("\\n", "\n")


def test_a_trial_that_hangs_longer_than_it_may_take_fails_and_is_shown(tuner: Tuner) -> None:
    (tuner.directory / "mine.py").write_text(HANGING)
    limits = ("--trial-timeout", "4s", "--max-failures", "1")
    done = tuner("run", "mine.py:hangs", "--study", "s", *limits, *OPTIONS)
    assert done.code == 5
    assert "2 trials failed, more than the 1 allowed; the last: it took longer than --trial-timeout, 4 s" in done.stderr
    trials = tuner("trials", "s", "--json").json()
    assert [(trial["state"], trial["user_attrs"]["failure"]) for trial in trials] == [("FAIL", "hung")] * 2
    # Where it hung is in the log: in the lock, and in the loop that no other thread could have looked out of.
    for where in ("in in_a_lock", "in in_c"):
        assert log_of(done).count(where) == 1, done.stderr
    attempts = tuner("trials", "s", "--number", "1", "--json").json()["attempts"]
    assert [(its["outcome"], its["message"]) for its in attempts] == [
        ("hung", trials[1]["user_attrs"]["failure_message"])
    ]
    assert tuner("status", "s", "--json").json()["failures"]["hung"][0] == 2


def test_a_trial_whose_reader_is_stuck_is_run_again(tuner: Tuner) -> None:
    (tuner.directory / "mine.py").write_text(HANGING)
    soon = replace(tuner, within=(sys.executable, "-c", SOON))
    done = soon("run", "mine.py:Reads", "--study", "s", "--trials", "1", "--data", "stream", *OPTIONS)
    assert done.code == 0, done.stderr
    assert "trial 0 hangs: no batch and no report for 0:08, and the slowest epoch took" in done.stderr
    assert "in in_a_lock" in log_of(done)  # of the reader
    (trial,) = tuner("trials", "s", "--json").json()
    assert (trial["state"], trial["last_step"]) == ("COMPLETE", 3)
    attempts = tuner("trials", "s", "--number", "0", "--json").json()["attempts"]
    assert [its["outcome"] for its in attempts] == ["hung", "complete"]
