"""The searches that are replayed: an objective, its data, its space as it is or another one, and points of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from tuner.data import Data, Rows, Split
from tuner.objective import Objective
from tuner.slot.attempt import load_data
from tuner.study.registry import build_objective, find_objective, is_objective_class

Bounds = tuple[float, float]
Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """An objective with `options`, trained for `epochs` on at most `rows` rows of train and of valid.

    `bounds` replace those of the params of these names, `choices` those of the categorical ones.
    """

    objective: str
    epochs: int
    options: Mapping[str, Any] = field(default_factory=dict)
    rows: int | None = None
    bounds: Mapping[str, Bounds] = field(default_factory=dict)
    choices: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def build(self) -> Objective:
        kind = find_objective(self.objective).load()
        assert is_objective_class(kind)
        return build_objective(kind, dict(self.options), 0)

    def load(self, objective: Objective, directory: Path) -> Data:
        """Return the data of the objective, in the same split for every point; test as it is."""
        data = load_data(objective, directory)
        if self.rows is None:
            return data
        some = slice(0, self.rows)
        return Data(_first(data.train, some), _first(data.valid, some), data.test, data.class_names)


MLP = {"model": ("mlp",)}

TASKS: dict[str, Task] = {
    "digits": Task(objective="digits", epochs=20),
    "digits-wide": Task(
        objective="digits",
        epochs=20,
        options={"max_units": 512},
        bounds={"lr": (1e-5, 1.0), "dropout": (0.0, 0.9), "units_0": (4, 512), "units_1": (4, 512)},
    ),
    "california": Task(
        objective="california_housing",
        epochs=30,
        rows=4000,
        bounds={"lr": (1e-3, 3e-2), "layers": (1, 3), "weight_decay": (1e-6, 1e-2)},
    ),
    "california-wide": Task(
        objective="california_housing", epochs=30, rows=4000, bounds={"lr": (1e-5, 1.0), "max_grad_norm": (0.01, 100.0)}
    ),
    "fashion": Task(
        objective="fashion_mnist", epochs=15, rows=4000, options={"models": "mlp"}, bounds={"lr": (3e-3, 1e-1)}
    ),
    "fashion-wide": Task(objective="fashion_mnist", epochs=15, rows=4000, choices=MLP),
    "covertype": Task(objective="covertype", epochs=20, rows=6000),
    "covertype-wide": Task(
        objective="covertype",
        epochs=20,
        rows=6000,
        bounds={"lr": (1e-6, 1.0), "weight_decay": (1e-6, 1.0)}
        | {f"units_{layer}": (8.0, 512.0) for layer in range(3)},
    ),
}


class Bounded:
    """A trial that `Objective.suggest` is called with, whose bounds and choices are the task's."""

    def __init__(self, task: Task, trial: Any) -> None:
        self._task = task
        self._trial = trial

    def suggest_float(self, name: str, low: float, high: float, **more: Any) -> float:
        return self._trial.suggest_float(name, *self._task.bounds.get(name, (low, high)), **more)

    def suggest_int(self, name: str, low: int, high: int, **more: Any) -> int:
        low, high = map(int, self._task.bounds.get(name, (low, high)))
        return self._trial.suggest_int(name, low, high, **more)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._trial.suggest_categorical(name, list(self._task.choices.get(name, choices)))


class Point:
    """A trial whose params are read off a point of the unit cube: one coordinate a name, in the order of first use."""

    def __init__(self, coordinates: Sequence[float], names: dict[str, int]) -> None:
        self._coordinates = coordinates
        self._names = names
        self.params: dict[str, Any] = {}
        self.distributions: dict[str, BaseDistribution] = {}

    def _coordinate(self, name: str) -> float:
        return self._coordinates[self._names.setdefault(name, len(self._names))]

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        self.distributions[name] = FloatDistribution(low, high, log=log)
        at = self._coordinate(name)
        value = math.exp(math.log(low) + at * math.log(high / low)) if log else low + at * (high - low)
        self.params[name] = min(max(value, low), high)
        return self.params[name]

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        self.distributions[name] = IntDistribution(low, high, log=log)
        at = self._coordinate(name)
        if log:
            value = round(math.exp(math.log(low - 0.5) + at * math.log((high + 0.5) / (low - 0.5))))
        else:
            value = low + math.floor(at * (high - low + 1))
        self.params[name] = min(max(value, low), high)
        return self.params[name]

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self.distributions[name] = CategoricalDistribution(choices)
        at = self._coordinate(name)
        self.params[name] = choices[min(math.floor(at * len(choices)), len(choices) - 1)]
        return self.params[name]


def points(task: Task, objective: Objective, n: int) -> list[Point]:
    """Return the first `n` points of a scrambled Sobol sequence over the task's space."""
    unit = torch.quasirandom.SobolEngine(24, scramble=True, seed=0).draw(n).double().tolist()
    names: dict[str, int] = {}
    found = [Point(coordinates, names) for coordinates in unit]
    for point in found:
        objective.suggest(Bounded(task, point))  # type: ignore[arg-type]
    return found


def _first(rows: Rows, some: slice) -> Split:
    assert isinstance(rows, Split)
    return rows.rows(some)
