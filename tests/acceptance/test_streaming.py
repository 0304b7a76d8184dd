"""Data that is read by processes of a slot while it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from command import wait_for

if TYPE_CHECKING:
    from command import Tuner

READ = """
import sys

import torch
from torch import nn

from tuner.data import Data, Samples
from tuner.objective import Objective


class Signs:
    def __len__(self):
        return 300

    def __getitem__(self, row):
        inputs = torch.randn(2, generator=torch.Generator().manual_seed(row))
        return inputs, int(inputs[0] > 0)


class Read(Objective):
    def suggest(self, trial):
        trial.suggest_float("lr", 0.01, 0.1)

    def load_data(self, root):
        return Data(*[Samples(Signs()) for _ in range(3)], class_names=("negative", "positive"))

    def build_model(self, params):
        assert sys.stdin.read() == ""  # the worker's orders are not for objectives
        return nn.Linear(2, 2)
"""


def test_a_slot_trains_on_streamed_samples_the_same_each_time(tuner: Tuner) -> None:
    path = tuner.directory / "read.py"
    path.write_text(READ)
    found = []
    for study in ("one", "two"):
        options = ("--study", study, "--trials", "2", "--epochs", "3", "--workers", "1", "--no-export")
        with tuner.start("run", f"{path}:Read", *options, "--data", "stream", "--deterministic") as running:
            wait_for(lambda running=running: running.process.poll() is not None, "its end", 90)
            done = running.finish()
        assert done.code == 0, done.stderr
        assert "data streamed to cpu" in done.stderr
        found.append(tuner("trials", study, "--json").json())
    for one, other in zip(*found, strict=True):
        assert one["user_attrs"]["wait_s"] > 0
        same = ("params", "value", "last_value")
        assert {name: one[name] for name in same} == {name: other[name] for name in same}
        assert one["user_attrs"]["train_loss"] == other["user_attrs"]["train_loss"]
