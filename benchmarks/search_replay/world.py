"""What a training would have given: recorded curves, or curves between recorded points."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from scipy.stats import spearmanr
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern, WhiteKernel

from benchmarks.search_replay.curves import Curves
from benchmarks.search_replay.tasks import Task, points
from tuner.objective import Objective

Floats = npt.NDArray[np.float64]
N_NEAR = 16
"""Recorded points of whose departures from the mean one is drawn."""


@dataclass(frozen=True)
class Training:
    """A training as it would go: `value` to be minimized, `test` likewise, `seconds` of each epoch (epochs,).

    `value` is NaN from the epoch on at which it diverges.
    """

    value: Floats
    test: Floats
    seconds: Floats


class World(Protocol):
    """A task whose trainings are known."""

    task: Task
    table: Table
    has_params: bool
    """Whether params decide how a training goes, so that the time a sampler takes is the search's."""

    def training(
        self, params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution], noise: np.random.Generator
    ) -> Training:
        """Return how a training with these params goes; what chance does to it is drawn from `noise`."""


@dataclass(frozen=True)
class Scale:
    """What regret is measured by: 0 is the best that any recorded point comes to, 1 the median of them."""

    best: float
    median: float
    full_s: float

    @classmethod
    def of(cls, table: Table) -> Scale:
        finals = np.nanmin(np.where(np.isnan(table.value), np.inf, table.value), axis=1)
        return cls(float(finals.min()), float(np.median(finals)), float(np.median(np.nansum(table.seconds, axis=1))))

    def regret(self, value: float) -> float:
        return (value - self.best) / (self.median - self.best)


@dataclass(frozen=True)
class Table:
    """The recorded trainings of a task, one a point: `value`, `test`, `seconds` (points, epochs), to be minimized."""

    value: Floats
    test: Floats
    seconds: Floats
    point: npt.NDArray[np.int32]
    ceiling: float
    """Spearman's correlation of the best values of two seeds of the same points."""
    noise: Floats
    """By how much seeds of a good point differ in their best values up to an epoch (epochs,): a standard deviation."""

    @classmethod
    def load(cls, directory: Path, name: str, objective: Objective) -> Table:
        """Read a packed task. Its first training of each point is taken.

        Raises ValueError if it was not recorded to its end.
        """
        curves = Curves.load(directory / f"{name}.npz")
        if not curves.has_seeds:
            raise ValueError(f"{name} was not recorded to its end: none of its points is there on several seeds")
        firsts = curves.repeat == 0

        def minimized(scores: npt.NDArray[np.float32]) -> Floats:
            return (1.0 - scores if objective.direction == "maximize" else scores)[firsts].astype(float)

        seconds = curves.seconds[firsts].astype(float)
        usual = np.nanmedian(seconds, axis=1, keepdims=True)
        return cls(
            minimized(curves.metric),
            minimized(curves.test),
            np.where(np.isnan(seconds), usual, seconds),
            curves.point[firsts],
            _ceiling(curves, objective.direction == "maximize"),
            _noise(curves, objective.direction == "maximize"),
        )


def _ceiling(curves: Curves, maximizes: bool) -> float:
    bests = (np.fmax if maximizes else np.fmin).reduce(curves.metric, axis=1)
    of = [
        dict(zip(curves.point[its].tolist(), bests[its].tolist(), strict=True))
        for its in (curves.repeat == 0, curves.repeat == 1)
    ]
    both = sorted(set(of[0]) & set(of[1]))
    return float(spearmanr([of[0][each] for each in both], [of[1][each] for each in both]).statistic)


def _noise(curves: Curves, maximizes: bool) -> Floats:
    bests = np.fmin.accumulate((-curves.metric if maximizes else curves.metric).astype(float), axis=1)
    several = [point for point in np.unique(curves.point) if np.sum(curves.point == point) > 1]
    of_point = [bests[curves.point == point] for point in several]
    of_point.sort(key=lambda found: float(found[:, -1].mean()))  # those that have diverged come last
    good = of_point[: len(of_point) // 3]
    apart = [(found - found.mean(axis=0)) * math.sqrt(len(found) / (len(found) - 1)) for found in good]
    return np.concatenate(apart).std(axis=0)


def between(params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution], names: Sequence[str]) -> Floats:
    """Return where params lie: each of `names` from 0 to 1, 0.5 for one that is not suggested."""
    found = np.full(len(names), 0.5)
    for column, name in enumerate(names):
        if name in params:
            found[column] = _unit(params[name], distributions[name])
    return found


def _unit(value: Any, distribution: BaseDistribution) -> float:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.to_internal_repr(value) / max(len(distribution.choices) - 1, 1)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high = distribution.low, distribution.high
    if low == high:
        return 0.5
    if distribution.log:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


class Smooth:
    """The world between recorded points: the mean of a Gaussian process over the logarithms of the curves, one for all
    epochs, and chance: what one of the nearest recorded points of the same choices departs from it, drawn anew for each
    training. The nearest of all predicts no better than another of them, so it is nothing but chance."""

    has_params = True

    def __init__(self, task: Task, table: Table) -> None:
        self.task = task
        self.table = table
        of_space = points(task, task.build(), int(table.point.max()) + 1)
        of_table = [of_space[point] for point in table.point]
        self._names = sorted({each for point in of_table for each in point.params})
        self._categorical = [
            each
            for each in self._names
            if any(isinstance(point.distributions.get(each), CategoricalDistribution) for point in of_table)
        ]
        self._x = np.array([between(point.params, point.distributions, self._names) for point in of_table])
        self._kinds = [self._kind(point.params) for point in of_table]
        worst = np.nanmax(table.value)
        filled = np.where(np.isnan(table.value), worst, table.value)
        self._logs = np.hstack(
            [
                np.log(np.maximum(filled, 1e-6)),
                np.log(np.maximum(table.test, 1e-6)),
                np.log(np.maximum(table.seconds, 1e-6)),
            ]
        )
        self._logs = np.where(np.isnan(self._logs), np.nanmax(self._logs, axis=0), self._logs)
        self._fit()

    def _fit(self) -> None:
        epochs = self.table.value.shape[1]
        final = self._logs[:, epochs - 1]
        kernel = 1.0 * Matern(np.full(len(self._names), 0.5), (0.05, 50.0), nu=2.5) + WhiteKernel(0.05, (1e-4, 1.0))
        some = slice(0, 300)  # what the lengths are found by
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0).fit(self._x[some], final[some])
        scaled, noise = fitted.kernel_.k1, fitted.kernel_.k2.noise_level
        self._kernel = scaled.k2
        self._level = scaled.k1.constant_value
        gram = self._level * self._kernel(self._x) + noise * np.eye(len(self._x))
        self._mean = self._logs.mean(axis=0)
        inverse = np.linalg.inv(gram)
        self._weights = inverse @ (self._logs - self._mean)
        self._at_points = self._level * self._kernel(self._x) @ self._weights + self._mean
        # What is predicted of each point by the others, in closed form.
        self._left_out = self._logs - self._weights / np.diag(inverse)[:, None]

    def check(self) -> tuple[float, float]:
        """Return Spearman's correlation of the recorded bests with what the world says of each point without it, and
        that of two seeds of the same points, which none can exceed by much."""
        epochs = self.table.value.shape[1]
        noise = np.random.default_rng(0)
        bests, predicted = self._logs[:, :epochs].min(axis=1), []
        for row in range(len(self._x)):
            near = self._near(self._x[row], self._kinds[row], noise, without=row)
            residual = self._logs[near, :epochs] - self._at_points[near, :epochs]
            predicted.append(float((self._left_out[row, :epochs] + residual).min()))
        return float(spearmanr(bests, predicted).statistic), self.table.ceiling

    def _kind(self, params: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(params.get(name) for name in self._categorical)

    def _near(self, x: Floats, kind: tuple[Any, ...], noise: np.random.Generator, without: int = -1) -> int:
        lengths = np.atleast_1d(self._kernel.length_scale)
        away = (((self._x - x) / lengths) ** 2).sum(axis=1)
        for row, other in enumerate(self._kinds):
            if other != kind or row == without:
                away[row] = math.inf
        near = np.argsort(away, kind="stable")[: min(N_NEAR, int(np.isfinite(away).sum()))]
        return int(noise.choice(near))

    def training(
        self, params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution], noise: np.random.Generator
    ) -> Training:
        x = between(params, distributions, self._names)
        near = self._near(x, self._kind(params), noise)
        mean = self._level * self._kernel(x[None], self._x)[0] @ self._weights + self._mean
        curves = np.exp(mean + self._logs[near] - self._at_points[near])
        value, test, seconds = np.split(curves, 3)
        value = np.where(np.isnan(self.table.value[near]), math.nan, value)
        return Training(value, test, seconds)


class Recorded:
    """The recorded points alone, in an order of the seed's: for rules, without any surrogate."""

    has_params = False

    def __init__(self, task: Task, table: Table, seed: int) -> None:
        self.task = task
        self.table = table
        self._order = iter(np.random.default_rng(seed).permutation(len(table.value)))

    def training(
        self, params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution], noise: np.random.Generator
    ) -> Training:
        del params, distributions, noise
        row = next(self._order)
        return Training(self.table.value[row], self.table.test[row], self.table.seconds[row])
