from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest

from storage.optuna_storage.rules import NEVER, Column, Percentile, Rungs


@dataclass
class Told:
    """A history as a test tells it: by step, a column of each kind."""

    n_complete: int = 0
    reports: dict[int, list[float]] = field(default_factory=dict)
    of_complete: dict[int, list[float]] = field(default_factory=dict)

    def reached(self, step: int) -> Column:
        return Column(sorted(self.reports.get(step, [])))

    def n_beyond(self, step: int) -> int:
        return len(self.reports.get(step + 1, []))

    def completed(self, step: int) -> Column:
        return Column(sorted(self.of_complete.get(step, [])))


def test_a_column_keeps_its_values_in_order_and_leaves_nan_out() -> None:
    column = Column()
    values = [3.0, 1.0, math.nan, 2.0, 1.0]
    for value in values:
        column.add(value)
    assert column.values == [1.0, 1.0, 2.0, 3.0]
    assert (column.n_below(1.0), column.n_below(2.5), len(column)) == (0, 3, 4)
    for share in (0.0, 0.25, 0.6, 1.0):
        assert column.quantile(share) == pytest.approx(np.nanquantile(values, share))
    assert math.isnan(Column().quantile(0.5))
    for many in ([0.5, math.nan], [0.01 * n for n in range(40)]):
        column.add_all(many)
    assert column.values == sorted([1.0, 1.0, 2.0, 3.0, 0.5, *(0.01 * n for n in range(40))])


def test_the_percentile_is_of_complete_trials_at_the_step() -> None:
    history = Told(n_complete=5, of_complete={2: [0.1, 0.2, 0.3, 0.4, 0.5]})
    assert not Percentile().stops(2, 0.3, history)
    assert Percentile().stops(2, 0.31, history)
    assert Percentile(25.0).stops(2, 0.21, history)
    assert not Percentile().stops(3, 9.0, history)  # nobody reported there
    assert not Percentile(n_warmup_steps=3).stops(2, 9.0, history)
    history.n_complete = 4
    assert not Percentile().stops(2, 9.0, history)


@pytest.mark.parametrize(("n", "n_go_on"), [(1, 1), (2, 1), (3, 1), (5, 1), (6, 2), (9, 3)])
def test_a_rung_lets_the_best_third_go_on_and_one_at_least(n: int, n_go_on: int) -> None:
    values = [0.1 * rank for rank in range(n)]
    history = Told(reports={1: values})
    rule = Rungs((1,))
    assert [rule.stops(1, value, history) for value in values] == [False] * n_go_on + [True] * (n - n_go_on)
    assert not rule.stops(2, 9.0, history)


def test_the_first_rung_stops_all_until_some_came_and_one_goes_on_in_the_end() -> None:
    rule = Rungs((1, 3), n_startup=3, latest=5)
    came: list[float] = []

    def stops(value: float, *beyond: float, step: int = 1) -> bool:
        came.append(value)
        return rule.stops(step, value, Told(reports={step: came, step + 1: list(beyond)}))

    assert [stops(value) for value in (0.1, 0.2, 0.3, 0.4)] == [True] * 4  # the third and the fourth are not the best
    assert not stops(0.5)  # nobody has gone on
    assert stops(0.6, 0.5)
    assert not stops(0.05, 0.5)
    came.clear()
    assert [stops(value) for value in (0.3, 0.2, 0.1)] == [True, True, False]
    came.clear()
    assert not stops(0.9, step=3)  # only the first rung waits
    assert rule.stops(1, math.nan, Told(reports={1: [0.1] * 9}))
    came.clear()
    rule = Rungs((1,), n_startup=3, latest=1)
    assert not stops(0.9)


def test_rungs_lie_at_shares_of_the_epochs_and_never_at_the_last() -> None:
    assert Rungs.at((0.1, 0.3), 20).steps == (1, 5)
    assert Rungs.at((0.0, 0.1, 1.0), 4).steps == (0, 2)
    assert Rungs.at((0.1, 0.3), 2).steps == (0,)
    assert Rungs.at((0.1,), 10, 2.0, n_startup=3, latest=4) == Rungs((0,), 2.0, 3, 4)


def test_no_trial_is_stopped_without_a_rule() -> None:
    assert not NEVER.stops(1, math.nan, Told(reports={1: [0.1]}))
