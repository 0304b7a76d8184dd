"""How often the pruner was wrong: trials that were to be pruned and ran on, beside those that are complete."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from sqlalchemy import Connection

from storage.coordination import history
from storage.optuna_storage.rule_tables import PRUNED_AT
from tuner.spec import Direction
from tuner.study.replay import n_best

VALUE, SECONDS = "audit.value", "audit.seconds"
"""Attributes of an audited trial that ended: what it came to, None if it diverged, and how long it ran on."""
Z = 1.96
"""Of the normal distribution, for intervals of 95 %."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """How many of the audited trials, as a part of them, with Wilson's interval of 95 %."""

    count: int
    share: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Audits:
    """The audited trials of a study: how many ended, and would have been better than the complete ones.

    `above_median`: better than the median of these; `top_tenth`: among the best tenth of them and itself; `best`:
    better than all. None while none is complete or audited. `seconds` is what they took since they were to be pruned.
    """

    audited: int
    seconds: float
    above_median: Share | None = None
    top_tenth: Share | None = None
    best: Share | None = None


def audits(conn: Connection, study_id: int, direction: Direction) -> Audits:
    """Return what the audited trials of the study came to."""
    marked = history.marked(conn, study_id, (PRUNED_AT, VALUE, SECONDS))
    ended = [its for its in marked.values() if SECONDS in its]
    values = [_number(its.get(VALUE)) for its in ended]
    return judged(
        values,
        history.complete_values(conn, study_id) if ended else (),
        direction,
        seconds=sum(_number(its[SECONDS]) or 0.0 for its in ended),
    )


def judged(
    values: Sequence[float | None], complete: Sequence[float], direction: Direction, seconds: float = 0.0
) -> Audits:
    """Return how audited trials of these values, None for one that diverged, stand beside complete ones."""
    sign = 1.0 if direction == "minimize" else -1.0
    theirs = [sign * value for value in complete]
    if not values or not theirs:
        return Audits(audited=len(values), seconds=seconds)
    ours = [math.inf if value is None else sign * value for value in values]
    n_better = [sum(other <= its for other in theirs) for its in ours]
    return Audits(
        audited=len(values),
        seconds=seconds,
        above_median=wilson(sum(its < median(theirs) for its in ours), len(ours)),
        top_tenth=wilson(sum(n < n_best(len(theirs) + 1) for n in n_better), len(ours)),
        best=wilson(sum(n == 0 for n in n_better), len(ours)),
    )


def wilson(count: int, n: int) -> Share:
    """Return a part with Wilson's score interval, https://doi.org/10.1080/01621459.1927.10502953."""
    share = count / n
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    # At a share of 0 or 1 the interval ends there, which rounding would miss.
    return Share(
        count=count, share=share, low=max(0.0, min(share, middle - half)), high=min(1.0, max(share, middle + half))
    )


def _number(value: object) -> float | None:
    """Return a finite number that an attribute holds, which anybody may have set."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)
