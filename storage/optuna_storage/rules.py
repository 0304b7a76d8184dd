"""When a trial is stopped early: rules over what a study's trials reported, without a database.

Values are to be minimized here; who maximizes gives them with the other sign. A trial's value at a step is its best up
to it. A rule is asked after each report but the last of a training, and the same rule, asked in the same order with the
same history, decides the same: the replay of `benchmarks/search_replay` asks these very objects.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

# `--pruner rungs`, as docs/search.md tells how it was chosen:
RUNGS_AT = (0.1, 0.3)
"""Where its rungs lie, in parts of a training."""
ETA = 3.0
"""Of how many trials one goes on from each."""
N_STARTUP = 3
"""How many trials come to the first rung before one goes on there."""
LATEST = 6
"""With how many there one goes on anyway."""


@dataclass
class Column:
    """Values in order; NaN, which is neither above nor below anything, is left out."""

    values: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        if not math.isnan(value):
            insort(self.values, value)

    def add_all(self, values: Iterable[float]) -> None:
        """Add several, many of them in less time than one by one."""
        numbers = [value for value in values if not math.isnan(value)]
        if len(numbers) < 20:  # to sort 50,000 and one more takes as long as to insert 100
            for number in numbers:
                insort(self.values, number)
        else:
            self.values += numbers
            self.values.sort()

    def __len__(self) -> int:
        return len(self.values)

    def n_below(self, value: float) -> int:
        """Return how many are smaller than `value`."""
        return bisect_left(self.values, value)

    def quantile(self, share: float) -> float:
        """Return the value below which a share of them lies, interpolated; NaN of none."""
        if not self.values:
            return math.nan
        at = share * (len(self.values) - 1)
        low = math.floor(at)
        high = min(low + 1, len(self.values) - 1)
        return self.values[low] + (self.values[high] - self.values[low]) * (at - low)


class Reached(Protocol):
    """How far the trials of a study came, and with what values."""

    def reached(self, step: int) -> Column:
        """Return the values at the step of all trials that reported there, whatever became of them."""

    def n_beyond(self, step: int) -> int:
        """Return how many trials reported after the step, too."""


class History(Reached, Protocol):
    """What the trials of a study reported, as far as a rule asks."""

    @property
    def n_complete(self) -> int:
        """How many trials are complete."""

    def completed(self, step: int) -> Column:
        """Return what complete trials reported at the step itself, which may be worse than their best up to it."""


class Rule(Protocol):
    """Decides whether a trial is stopped."""

    def stops(self, step: int, value: float, history: History) -> bool:
        """Whether a trial of this value at this step is stopped; `history` has its report already."""


@dataclass(frozen=True)
class Never:
    """Stops no trial."""

    def stops(self, step: int, value: float, history: History) -> bool:
        del step, value, history
        return False


NEVER = Never()


@dataclass(frozen=True)
class Percentile:
    """Stops a trial whose value is above the percentile of what complete trials reported at the step: Optuna's."""

    percentile: float = 50.0
    n_startup_trials: int = 5
    n_warmup_steps: int = 0

    def stops(self, step: int, value: float, history: History) -> bool:
        if step < self.n_warmup_steps or history.n_complete < max(self.n_startup_trials, 1):
            return False
        return value > history.completed(step).quantile(self.percentile / 100)


@dataclass(frozen=True)
class Rungs:
    """Stops a trial that is not among the best 1/eta of all that came to the same rung: ASHA that stops.

    Of fewer than eta trials the best alone goes on, and none without a number. `steps` are the rungs, counted from 0 as
    reports are. The first one stops all until `n_startup` came to it: a single worker sees some points before it trains
    one to its end; from the `latest` on a trial goes on there if none has, so that one does.
    """

    steps: tuple[int, ...]
    eta: float = 3.0
    n_startup: int = 1
    latest: int = LATEST

    @classmethod
    def at(cls, shares: Iterable[float], epochs: int, eta: float = 3.0, **startup: int) -> Rungs:
        """Return it with rungs at shares of the epochs, each at least one epoch and before the last."""
        ends = sorted({min(max(round(share * epochs), 1), epochs - 1) for share in shares})
        return cls(tuple(end - 1 for end in ends), eta, **startup)

    def stops(self, step: int, value: float, history: Reached) -> bool:
        if step not in self.steps:
            return False
        if math.isnan(value):
            return True
        there = history.reached(step)
        if step == self.steps[0] and self.n_startup > 1:
            if len(there) >= self.latest and not history.n_beyond(step):
                return False
            if len(there) < self.n_startup:
                return True
        return there.n_below(value) >= max(1, math.floor(len(there) / self.eta))


def standard_rungs(epochs: int, eta: float = ETA, trials: int | None = None) -> Rungs:
    """Return the rule of `--pruner rungs` for trainings of so many epochs, in a study of so many trials.

    One of fewer than `LATEST` has none to spare: the first that comes goes on.
    """
    n_startup = N_STARTUP if trials is None or trials >= LATEST else 1
    return Rungs.at(RUNGS_AT, epochs, eta, n_startup=n_startup)
