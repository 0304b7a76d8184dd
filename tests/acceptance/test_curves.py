"""Learning curves: recorded by real trials, read by the command line and from Python, and opened in TensorBoard."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import Tuner, wait_for

import tuner as package
from storage import StorageError

OBJECTIVE = """
import torch
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassRecall

from tuner.data import split_rows
from tuner.objective import Objective


class Signs(Objective):
    epochs = 3

    def suggest(self, trial):
        trial.suggest_float("lr", 0.01, 0.1)
        trial.suggest_categorical("bias", [True, False])

    def load_data(self, root):
        points = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
        return split_rows(points, (points[:, 0] > 0).long(), class_names=("negative", "positive"), seed=self.seed)

    def build_model(self, params):
        return nn.Linear(3, 2, bias=params["bias"])

    def build_optimizer(self, model, params):
        groups = [{"params": [weight]} for weight in model.parameters()]
        return torch.optim.SGD(groups, lr=params["lr"])

    def build_scheduler(self, optimizer, params, epochs):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def build_metrics(self, data):
        return {"accuracy": MulticlassAccuracy(2), "recall": MulticlassRecall(2), "odd": Odd()}


class Odd(MulticlassRecall):
    def __init__(self):
        super().__init__(2)

    def compute(self):
        return torch.tensor(float("nan"))


def loss(trial):
    for step in (10, 20):
        trial.report(1 / step, step)
    return trial.suggest_float("x", 0, 1)
"""


@pytest.fixture
def searched(tuner: Tuner) -> Tuner:
    """Studies of an objective, with and without metrics of its training split, and of a plain function."""
    (tuner.directory / "mine.py").write_text(OBJECTIVE)
    options = ("--workers", "1", "--device", "cpu", "--no-export", "--no-preflight")
    live = ("--tensorboard", str(tuner.directory / "live"))
    of_it = ("--train-metrics", "--trials", "2", "--pruner", "none", *live)
    for study, more in (("it", of_it), ("f", ("--trials", "1"))):
        objective = "mine.py:loss" if study == "f" else "mine.py:Signs"
        ran = tuner("run", objective, "--study", study, *more, *options)
        assert ran.code == 0, ran.stderr
    return tuner


def test_the_curves_of_trials_are_kept_and_seen(searched: Tuner, database: str, opened: Any) -> None:
    trials = searched("trials", "it", "--json").json()
    curve = searched("trials", "it", "--number", "1", "--curve", "--json").json()
    assert [point["step"] for point in curve] == [1, 2, 3]
    lr, n_groups = trials[1]["params"]["lr"], 2 if trials[1]["params"]["bias"] else 1
    for epoch, point in enumerate(curve):
        assert point["rates"] == pytest.approx([lr / 2**epoch] * n_groups)
        assert point["metrics"].keys() == point["train_metrics"].keys() == {"accuracy", "recall", "odd"}
        assert (point["metrics"]["odd"], point["value"]) == (None, point["metrics"]["accuracy"])
        assert point["seconds"] > 0
    assert max(point["value"] for point in curve) == trials[1]["value"]
    assert curve[trials[1]["user_attrs"]["epoch"] - 1]["train_loss"] == trials[1]["user_attrs"]["train_loss"]

    # The same as a table of people and of programs, and from Python.
    rows = list(csv.DictReader(io.StringIO(searched("trials", "it", "--number", "1", "--curve", "--csv").stdout)))
    assert [float(row["train/accuracy"]) for row in rows] == [point["train_metrics"]["accuracy"] for point in curve]
    assert [(row["odd"], float(row["lr"])) for row in rows] == [("", point["rates"][0]) for point in curve]
    table = searched("trials", "it", "--number", "1", "--curve").stdout.splitlines()
    assert table[0].split() == list(rows[0])
    assert len(table) == 4
    of_python = package.curves(database, "it")
    assert [(point.train_loss, point.metrics) for point in of_python[1]] == [
        (point["train_loss"], point["metrics"]) for point in curve
    ]
    with pytest.raises(StorageError, match="no study named 'that'"):
        package.curves(database, "that")

    # What a plain function reported is its curve.
    assert searched("trials", "f", "--number", "0", "--curve", "--json").json() == [
        {"step": 10, "value": 0.1},
        {"step": 20, "value": 0.05},
    ]
    assert searched("trials", "f", "--number", "0", "--curve", "--csv").stdout == "step,value\n10,0.1\n20,0.05\n"

    # All that is known of one trial.
    one = searched("trials", "it", "--number", "1", "--json").json()
    (attempt,) = one.pop("attempts")
    ran = {"attempts": 1, "worker": attempt["worker"], "machine": attempt["worker"].rpartition(":")[0]}
    assert one | ran == trials[1]
    assert (attempt["attempt"], attempt["outcome"], attempt["device"]) == (1, "complete", "cpu")
    shown = searched("trials", "it", "--number", "1").stdout
    assert re.search(rf"param     lr = {lr}\n", shown)
    assert re.search(r"attempt   1 complete \(\S+, slot 0, cpu, 0:0\d\)\n", shown)
    for options, error in {
        ("--number", "2"): "study 'it' has no trial 2; 'tuner trials it' lists them",
        ("--curve",): "--curve needs --number N",
        ("--number", "1", "--csv"): "--csv needs --curve",
        ("--number", "1", "--tensorboard", "x"): "--tensorboard writes all trials",
    }.items():
        assert error in searched("trials", "it", *options).stderr
    _check_tensorboard(searched, opened, trials, curve)


@pytest.fixture
def opened() -> Iterator[Any]:
    """Open a directory in a real TensorBoard; returns its URL."""
    started: list[subprocess.Popen[str]] = []

    def start(directory: Path) -> str:
        process = subprocess.Popen(
            [sys.executable, "-m", "tensorboard.main", "--logdir", str(directory), "--port", "0"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stderr is not None
        for line in process.stderr:
            if (found := re.search(r"http://\S+/", line)) is not None:
                return found[0]
        raise AssertionError("TensorBoard has ended")

    yield start
    for process in started:
        process.terminate()
        process.communicate()


def asked(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})  # noqa: S310 - its own
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        return json.load(answer)


def written(directory: Path) -> dict[str, list[tuple[int, str, list[float]]]]:
    """What the files of each trial hold, in their order."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return {
        file.parent.name: [
            (event.step, value.tag, list(value.tensor.float_val))
            for event in EventFileLoader(str(file)).Load()
            for value in event.summary.value
        ]
        for file in sorted(directory.glob("*/events.out.tfevents.*"))
    }


def _check_tensorboard(searched: Tuner, opened: Any, trials: list[Any], curve: list[Any]) -> None:
    directory = searched.directory / "tensorboard"
    for _ in range(2):  # written again, it shows each trial once
        wrote = searched("trials", "it", "--tensorboard", str(directory))
        assert wrote.stdout == f"wrote 2 trials; look at them by: tensorboard --logdir {directory}\n", wrote.stderr
    live = written(searched.directory / "live")
    assert live == written(directory)  # by the worker, as epochs ended
    assert len(live) == 2
    url = opened(directory)

    def tags() -> Any:
        found = asked(url, "data/plugin/scalars/tags")
        return found if len(found) == 2 and all("trial/accuracy" in its for its in found.values()) else None

    wait_for(tags, "TensorBoard has read both")
    assert sorted(tags()) == ["trial-00000", "trial-00001"]
    assert {"accuracy", "recall", "train_loss", "lr", "seconds", "train/recall"} < set(tags()["trial-00001"])
    points = asked(url, "data/plugin/scalars/scalars?run=trial-00001&tag=train_loss")
    assert [(step, value) for _, step, value in points] == [
        (point["step"], pytest.approx(point["train_loss"])) for point in curve
    ]
    wanted = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_SUCCESS"],
        "colParams": [],
        "startIndex": 0,
        "sliceSize": 9,
    }
    groups = asked(url, "data/plugin/hparams/session_groups", wanted)["sessionGroups"]
    assert {group["name"]: group["hparams"] for group in groups} == {
        f"trial {trial['number']}": {"lr": pytest.approx(trial["params"]["lr"]), "bias": trial["params"]["bias"]}
        for trial in trials
    }
