"""Rules that were tried, and are not the product's: docs/search.md tells what they came to."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from storage.optuna_storage.rule_tables import Tables, best_so_far
from storage.optuna_storage.rules import Column, History, Reached, Rule, Rungs


class Gains(Tables):
    """Tables that tell what trials gained after each step, too."""

    def __init__(self) -> None:
        super().__init__()
        self.best = math.inf
        """The best final value of a complete trial."""
        self._gains: dict[int, Column] = defaultdict(Column)

    def complete(self, values: Sequence[float]) -> None:
        super().complete(values)
        bests = best_so_far(values)
        for step, best in enumerate(bests):
            self._gains[step].add(best - bests[-1])
        self.best = min([self.best, *bests[-1:]])

    def gains(self, step: int) -> Column:
        """Return by how much the values of complete trials still fell from the step to their end."""
        return self._gains[step]


@dataclass(frozen=True)
class FromEta(Rungs):
    """Rungs whose first stops all until eta trials came, and then all but the best: a study may have none complete."""

    def stops(self, step: int, value: float, history: Reached) -> bool:
        is_early = step == self.steps[0] and len(history.reached(step)) < self.eta
        return is_early or super().stops(step, value, history)


@dataclass(frozen=True)
class Calibrated:
    """Stops a trial that, gaining as much from here on as complete trials did, would not come to the best value.

    What it is granted is the quantile of their gains; it needs no setting that depends on the study.
    """

    quantile: float = 0.75
    n_startup_trials: int = 4
    first: int = 0

    def stops(self, step: int, value: float, history: History) -> bool:
        if step < self.first or history.n_complete < self.n_startup_trials:
            return False
        assert isinstance(history, Gains)
        return value - history.gains(step).quantile(self.quantile) > history.best


@dataclass(frozen=True)
class AnyOf:
    """Stops a trial that any of several rules stops."""

    rules: tuple[Rule, ...]

    def stops(self, step: int, value: float, history: History) -> bool:
        return any(rule.stops(step, value, history) for rule in self.rules)


@dataclass(frozen=True)
class Until:
    """Goes by one rule until so many trials are complete, and by another from then on."""

    n_complete: int
    first: Rule
    then: Rule

    def stops(self, step: int, value: float, history: History) -> bool:
        rule = self.first if history.n_complete < self.n_complete else self.then
        return rule.stops(step, value, history)
