"""Where an objective failed, in the words of its author's files and of its model."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import pytest
import torch
from attempts import Constant, Signs, attempt
from torch import nn

from tuner.slot.where import with_line

if TYPE_CHECKING:
    from pathlib import Path

    import optuna

PARTS = """
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.widen = nn.Sequential(nn.Linear(2, 4), nn.Linear(3, 2))

    def forward(self, rows):
        return self.widen(rows)


def helps(number):
    return {}[number]
"""
SHAPES = "RuntimeError: mat1 and mat2 shapes cannot be multiplied (40x4 and 3x2)"
LINEAR = "Linear(in_features=3, out_features=2, bias=True)"


@pytest.fixture
def parts(tmp_path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("parts", tmp_path / "parts.py")
    assert spec is not None
    assert spec.loader is not None
    (tmp_path / "parts.py").write_text(PARTS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def line_of(method: Any) -> int:
    return method.__code__.co_firstlineno


def message(study: optuna.Study, **methods: Any) -> str:
    objective = type("Odd", (Signs,), {**methods, "__module__": __name__})()
    return attempt(study, objective)[0].message


def test_a_layer_is_told_with_the_line_that_called_it(study: optuna.Study, parts: Any) -> None:
    def build_model(self: Signs, params: dict) -> nn.Module:
        return nn.ModuleDict({"block": parts.Block()})["block"]

    told = message(study, build_model=build_model)
    assert told == f"{SHAPES}, in widen.1: {LINEAR} ({parts.__file__}, line 11)"


def test_a_layer_that_no_line_of_the_author_s_calls_is_told_with_the_def_of_build_model(study: optuna.Study) -> None:
    def build_model(self: Signs, params: dict) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 4), nn.Sequential(nn.ReLU(), nn.Linear(3, 2)))

    told = message(study, build_model=build_model)
    assert told == f"{SHAPES}, in 1.1: {LINEAR} ({__file__}, line {line_of(build_model)})"


def test_the_deepest_line_may_be_in_a_file_beside_the_objective(study: optuna.Study, parts: Any) -> None:
    told = message(study, build_model=lambda self, params: parts.helps(3))
    assert told == f"KeyError: 3 ({parts.__file__}, line 15)"


def test_a_metric_and_a_loss_are_told_by_their_kind(study: optuna.Study) -> None:
    class Broken(Constant):
        def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
            raise LookupError("empty")

    told = message(study, build_metrics=lambda self, data: {"accuracy": Broken(1.0)})
    assert told.startswith(f"LookupError: empty, in Broken ({__file__}, line ")
    told = message(study, build_loss=lambda self, params, train: nn.NLLLoss(weight=torch.ones(7)))
    assert ", in NLLLoss(" in told


def test_the_trial_s_traceback_is_shown_where_it_is_wanted(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build_model(self: Signs, params: dict) -> nn.Module:
        raise OSError("nothing there")

    told = message(study, build_model=build_model)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TUNER_DEBUG", "1")
    assert message(study, build_model=build_model) == told
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):")
    assert f'File "{__file__}", line {line_of(build_model) + 1}, in build_model' in shown
    assert shown.endswith("OSError: nothing there\n")


def test_what_a_process_of_a_loader_raised_is_told_and_not_that_it_did(study: optuna.Study, parts: Any) -> None:
    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, row: int) -> float:
            return float(parts.helps(row))

    def build_model(self: Signs, params: dict) -> nn.Module:
        loader = torch.utils.data.DataLoader(Rows(), num_workers=1, multiprocessing_context="fork")
        return nn.Linear(*next(iter(loader)))

    assert message(study, build_model=build_model) == f"KeyError: 0 ({parts.__file__}, line 15)"


def test_a_callable_object_s_error_has_no_line_of_ours() -> None:
    class Callable:
        def __call__(self, trial: object) -> None: ...

    assert with_line(ValueError("what it returned"), Callable()) == "ValueError: what it returned"  # type: ignore[arg-type]
