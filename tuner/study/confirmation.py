"""What runs of a few trials on fresh seeds tell: which is the best on average, and whether that can be told at all.

Nothing here reads a database.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from tuner.seeds import derive_seed
from tuner.spec import Direction
from tuner.text import number_text

RESAMPLES: Final = 10_000
SHARE: Final = 0.95
"""The part of the resamples that an interval holds."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A trial of the search, and its runs on fresh seeds: the values of those that are complete, in their order.

    `searched` is its value in the search. `failed` counts runs by class of failure; `unfinished` wait or run.
    `parameters` are its model's, None where there is none.
    """

    number: int
    searched: float
    params: Mapping[str, Any]
    parameters: int | None = None
    values: tuple[float, ...] = ()
    failed: Mapping[str, int]
    unfinished: int = 0

    @property
    def mean(self) -> float | None:
        """The mean of its runs, None without any."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """Their standard deviation, as estimated from a sample; None of less than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def diverged(self) -> int:
        """How many of its runs gave no number, as a retraining may not."""
        return self.failed.get("nan", 0)


@dataclass(frozen=True, kw_only=True)
class Gap:
    """By how much the mean of one is better than that of another, and what holds 95 % of its resamples."""

    value: float
    low: float
    high: float


def gap(one: Sequence[float], other: Sequence[float], direction: Direction, seed: int) -> Gap | None:
    """Return how much better the values of `one` are on average, by a bootstrap; None if either has less than two.

    Each mean is resampled by itself (Efron and Tibshirani 1993, chapter 8), as the runs have no seeds in common. With n
    runs the resampled means spread by sqrt((n - 1) / n) too little, which counts for few: they are spread by that more.
    """
    import numpy as np

    if min(len(one), len(other)) < 2:
        return None
    sign = 1 if direction == "maximize" else -1
    generator = np.random.default_rng(seed)
    means, resampled = [], []
    for values in (np.asarray(one, dtype=float), np.asarray(other, dtype=float)):
        n = len(values)
        means.append(float(values.mean()))
        drawn = values[generator.integers(0, n, (RESAMPLES, n))].mean(axis=1)
        resampled.append(means[-1] + (drawn - means[-1]) * math.sqrt(n / (n - 1)))
    rest = (1 - SHARE) / 2
    low, high = np.quantile(sign * (resampled[0] - resampled[1]), [rest, 1 - rest])
    return Gap(value=sign * (means[0] - means[1]), low=float(low), high=float(high))


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """The runs of the best trials of a study on fresh seeds, which `name` has as its trials.

    `search_best` is the study's best trial, of `n_complete` complete ones.
    """

    study: str
    name: str
    direction: Direction
    metric: str
    seed: int
    candidates: Sequence[Candidate]
    search_best: int
    search_value: float
    n_complete: int

    @cached_property
    def ranked(self) -> list[Candidate]:
        """The candidates by their means, the best first; last those of which a run diverged or none is complete."""
        sign = 1 if self.direction == "minimize" else -1

        def rank(its: Candidate) -> tuple[bool, bool, float, int]:
            return its.mean is None, its.diverged > 0, sign * (its.mean or 0.0), its.number

        return sorted(self.candidates, key=rank)

    @property
    def unfinished(self) -> int:
        """How many runs wait, or run."""
        return sum(its.unfinished for its in self.candidates)

    @property
    def runs(self) -> int:
        """How many runs there are, failed ones too."""
        return sum(len(its.values) + sum(its.failed.values()) + its.unfinished for its in self.candidates)

    @property
    def choice(self) -> Candidate | None:
        """The best on average; None while runs are to be done, and where none is complete."""
        if self.unfinished or not self.ranked or self.ranked[0].mean is None:
            return None
        return self.ranked[0]

    @cached_property
    def gaps(self) -> dict[int, Gap | None]:
        """How much better the choice is than each of the others that has a mean, by their numbers in their order."""
        choice = self.choice
        if choice is None:
            return {}
        seed = derive_seed(self.seed, "confirm", "resamples")
        others = (its for its in self.ranked[1:] if its.values)
        return {its.number: gap(choice.values, its.values, self.direction, seed) for its in others}

    @property
    def alike(self) -> list[Candidate]:
        """The choice and all that cannot be told apart from it; the choice alone if it is better than each other."""
        if self.choice is None:
            return []
        noise = [number for number, its in self.gaps.items() if its is None or its.low <= 0]
        return [self.choice, *(its for its in self.ranked if its.number in noise and not its.diverged)]

    @property
    def regression(self) -> float | None:
        """How much better the search's best trial was in the search than on fresh seeds; None without runs of it."""
        best = next((its for its in self.candidates if its.number == self.search_best), None)
        if best is None or best.mean is None:
            return None
        return (best.searched - best.mean) * (1 if self.direction == "maximize" else -1)

    def sentences(self) -> Iterator[str]:
        """Yield what there is to say of it, in plain words."""
        for its in self.ranked:
            if failed := sum(its.failed.values()):
                of = len(its.values) + failed + its.unfinished
                kinds = ", ".join(f"{count} {kind}" for kind, count in its.failed.items())
                behind = ", and so it is not chosen before others" if its.diverged else ""
                yield f"{failed} of {of} runs of trial {its.number} failed ({kinds}){behind}"
        choice = self.choice
        if choice is None:
            left = f"{self.unfinished} of {self.runs} runs are still to be done"
            yield f"{left if self.unfinished else 'no run is complete'}, and nothing is chosen; 'tuner confirm' goes on"
            return
        yield f"the choice is trial {choice.number}, {self.metric} {_spread(choice)} over {_count(choice)}"
        if self.gaps:
            yield self._runner_up()
        yield from self._alike()
        yield from self._regression()

    def _runner_up(self) -> str:
        number, its = next(iter(self.gaps.items()))
        if its is None:
            return f"its lead over trial {number} cannot be told from less than two runs of each"
        return (
            f"its lead over trial {number}, the runner-up, is {its.value:.3g} (95 %: {its.low:.3g} to {its.high:.3g})"
        )

    def _alike(self) -> Iterator[str]:
        alike = self.alike
        if len(alike) < 2:
            return
        sized = [(its.parameters, its.number) for its in alike if its.parameters is not None]
        simplest = ""
        if len(sized) == len(alike):
            parameters, number = min(sized, key=lambda pair: pair[0])
            simplest = f"; the simplest has {parameters:,} parameters (trial {number})"
        yield f"{len(alike)} of these cannot be told apart{simplest}"

    def _regression(self) -> Iterator[str]:
        lost = self.regression
        told = f"trial {self.search_best} was the best of {self.n_complete} complete ones in the search, with"
        if lost is None:
            yield f"{told} {number_text(self.search_value)}, and has no run here"
            return
        now = f"{told} {number_text(self.search_value)}; on fresh seeds it is"
        if math.isclose(lost, 0.0, abs_tol=1e-6 * abs(self.search_value)):  # what the float32 of a metric rounds off
            yield f"{now} as good on average"
        elif lost > 0:
            yield f"{now} {lost:.3g} worse on average: the best of many was lucky, too"
        else:
            yield f"{now} {-lost:.3g} better on average"


def _spread(its: Candidate) -> str:
    """Return the mean and the standard deviation."""
    return number_text(its.mean) if its.std is None else f"{number_text(its.mean)} ± {its.std:.2g}"


def _count(its: Candidate) -> str:
    return "1 run" if len(its.values) == 1 else f"{len(its.values)} runs"
