"""The tables that rules ask, filled trial by trial, without a database."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from storage.optuna_storage.rules import Column

PRUNED_AT = "audit.pruned_at"
"""The attribute of a trial that was to be pruned, and ran on to see whether that was right: at which step.

For the decisions on others it ended there.
"""


class Tables:
    """A `rules.History`. A step is the place of a report among those of its trial, from 0; less is better."""

    def __init__(self) -> None:
        self.n_complete = 0
        self._reached: dict[int, Column] = defaultdict(Column)
        self._completed: dict[int, Column] = defaultdict(Column)

    def report(self, step: int, best: float) -> None:
        """Take in a trial's report: the best value up to it."""
        self._reached[step].add(best)

    def complete(self, values: Sequence[float]) -> None:
        """Take in all that a trial reported that is complete now."""
        self.n_complete += 1
        for step, value in enumerate(values):
            self._completed[step].add(value)

    def reached(self, step: int) -> Column:
        """Return the values at the step of all trials that reported there."""
        return self._reached[step]

    def n_beyond(self, step: int) -> int:
        """Return how many trials reported after the step, too."""
        return len(self._reached[step + 1])

    def completed(self, step: int) -> Column:
        """Return what complete trials reported at the step."""
        return self._completed[step]


def minimized(reported: Mapping[int, float], sign: float, until: object = None) -> list[float]:
    """Return what a trial reported in the order of its steps, as it is to be minimized; up to a step if that is one."""
    last = until if isinstance(until, int) and not isinstance(until, bool) and until >= 0 else math.inf
    return [sign * reported[step] for step in sorted(reported) if step <= last]


def best_so_far(values: Iterable[float]) -> list[float]:
    """Return the least value up to each, NaN before the first number."""
    bests: list[float] = []
    best = math.nan
    for value in values:
        best = value if math.isnan(best) or value < best else best
        bests.append(best)
    return bests
