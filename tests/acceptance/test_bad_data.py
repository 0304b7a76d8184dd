"""Data that cannot be trained on: one line before the first epoch, with objective, split and cause, and exit code 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from command import Tuner

BROKEN = """
import math

import torch
from torch import nn

from tuner.data import Data, Samples, Split
from tuner.objective import Objective


class Broken(Objective):
    what: str

    def suggest(self, trial):
        trial.suggest_float("lr", 0.01, 0.1)

    def load_data(self, root):
        splits = {}
        for name in ("train", "valid", "test"):
            inputs, targets = torch.rand(40, 2), torch.arange(40) % 2
            if (self.what, name) in {("nan", "valid"), ("streamed nan", "train")}:
                inputs[7, 1] = math.nan
            if (self.what, name) == ("label", "train"):
                targets[7] = 2
            if (self.what, name) == ("shape", "valid"):
                inputs = inputs[:, :1]
            if (self.what, name) == ("empty", "test"):
                inputs, targets = inputs[:0], targets[:0]
            if (self.what, name) == ("leak", "test"):
                inputs = splits["valid"].inputs.flip(0)
            split = Split(inputs, targets)
            splits[name] = Samples(list(zip(inputs, targets))) if self.what == "streamed nan" else split
        return Data(**splits, class_names=("even", "odd"))

    def build_model(self, params):
        return nn.Linear(2, 2, device="meta" if self.what == "device" else None)
"""


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("nan", "the valid split needs finite numbers, got NaN or infinity: clean the data"),
        ("label", "labels need to be in 0..1, got 0..2 in the train split: check class_names"),
        ("shape", "got {'input 0': 'float32 [2]', 'targets': 'int64 []'} in train and {'input 0': 'float32 [1]',"),
        ("empty", "the test split needs at least one row, got none: check load_data"),
        ("streamed nan", "the train split needs finite numbers, got NaN or infinity: clean the data"),
    ],
)
def test_bad_data_end_the_command_before_any_trial(tuner: Tuner, tmp_path: Path, what: str, told: str) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    options = ["--set", f"what={what}", "--workers", "1", *(["--data", "stream"] if "streamed" in what else [])]
    done = tuner("run", "broken.py:Broken", *options)
    assert told in done.error()
    assert "Broken" in done.error()
    assert done.code == 1
    assert tuner("studies", "--json").json() == []


def test_two_splits_of_the_same_rows_are_refused_unless_they_may_be(tuner: Tuner, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    arguments = ["run", "broken.py:Broken", "--set", "what=leak", "--workers", "1", "--trials", "1", "--no-export"]
    refused = tuner(*arguments, "--no-preflight")
    assert "Broken cannot be searched as it is: the test split has the very rows of valid" in refused.error()
    assert refused.error().endswith("--allow-leak goes on with them")
    assert tuner("studies", "--json").json() == []
    assert tuner(*arguments, "--allow-leak").code == 0


def test_a_model_on_another_device_is_told_before_any_trial(tuner: Tuner, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    done = tuner("run", "broken.py:Broken", "--set", "what=device", "--workers", "1")
    told = "cannot be searched as it is: build_model's model cannot be moved to cpu: Cannot copy out of meta tensor"
    assert f"Broken {told}" in done.error()
    assert done.code == 1


def test_a_data_set_that_was_cut_off_is_told(tuner: Tuner, tmp_path: Path) -> None:
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(bytes((0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 28, 0, 0, 0, 28, 7)))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(bytes((0, 0, 8, 1, 0, 0, 0, 2, 1, 9)))
    done = tuner("run", "fashion_mnist", "--workers", "1")
    assert f"FashionMNIST.load_data('{tmp_path / 'data'}') failed" in done.error()
    assert f"Fashion-MNIST's training part in {tmp_path / 'data'} is damaged or incomplete" in done.error()
    assert done.code == 1


def test_a_data_directory_that_cannot_be_used_is_told(tuner: Tuner, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = tuner("run", "fashion_mnist", "--workers", "1", "--no-export", TUNER_DATA_DIR=f"{tmp_path}/file/data")
    assert f"FashionMNIST.load_data('{tmp_path / 'file' / 'data'}') failed" in done.error()
    assert "Fashion-MNIST's training part cannot be read from" in done.error()
    assert done.code == 1
