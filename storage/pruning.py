"""Optuna's percentile and median pruners, deciding from an index of what finished trials reported."""

from __future__ import annotations

import math
import threading
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from optuna.pruners import PercentilePruner
from optuna.study import StudyDirection
from sqlalchemy import bindparam, func, select, union_all

from storage.columns import int_array, is_among, packed, stored_number
from storage.frozen import UNFINISHED
from storage.sessions import Retry, Sessions
from storage.tables import trial_intermediate_values, trials

if TYPE_CHECKING:
    from collections.abc import Iterable

    from optuna import Study
    from optuna.trial import FrozenTrial
    from sqlalchemy import Engine


class IndexedPercentilePruner(PercentilePruner):
    """Decides as `optuna.pruners.PercentilePruner` of the same settings does, in large studies as fast as in small.

    With a percentile of 50 it decides as `MedianPruner`. Where Optuna's goes through all finished trials for
    each decision, this one reads a finished trial once: a decision costs one query for what has finished since
    the last, and a look at two values of the step, which are kept sorted. The query looks up each trial that is
    running or waiting: 1,000 of them take it 0.8 ms longer. The first decision reads the history, by two queries.
    Other processes, stock Optuna's too, may change the study meanwhile.

    It serves the one study that it was made for, and any number of threads, one at a time. A decision
    asks the database through `retry`; it raises UnreachableError once that gives up, and leaves the pruner as it was.
    """

    def __init__(
        self,
        engine: Engine,
        study_id: int,
        percentile: float,
        n_startup_trials: int = 5,
        n_warmup_steps: int = 0,
        interval_steps: int = 1,
        *,
        n_min_trials: int = 1,
        retry: Retry | None = None,
    ) -> None:
        super().__init__(percentile, n_startup_trials, n_warmup_steps, interval_steps, n_min_trials=n_min_trials)
        self._finished = _FinishedTrials(Sessions(engine, retry), study_id)
        self._lock = threading.Lock()

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the trial's best value is worse than the percentile of the finished trials at its last step.

        Reads nothing from `study` but its direction.
        """
        step = trial.last_step
        if step is None or not self._is_due(step, trial.intermediate_values):
            return False
        maximize = study.direction == StudyDirection.MAXIMIZE
        with self._lock:
            self._finished.refresh()
            if self._finished.count < max(self._n_startup_trials, 1):
                return False
            values = [value for value in trial.intermediate_values.values() if not math.isnan(value)]
            if not values:
                return True
            reports = self._finished.at(step)
            if reports.count < self._n_min_trials:
                return False
            # NaN, which infinities make as well, is neither above nor below anything.
            if maximize:
                return max(values) < reports.percentile(100 - self._percentile)
            return min(values) > reports.percentile(self._percentile)

    def _is_due(self, step: int, reported: Iterable[int]) -> bool:
        """Whether a check was due at the trial's last step or since the one before it."""
        if step < self._n_warmup_steps:
            return False
        interval, warmup = self._interval_steps, self._n_warmup_steps
        latest_check = (step - warmup) // interval * interval + warmup
        return max((other for other in reported if other != step), default=-1) < latest_check


@dataclass(kw_only=True)
class _Reports:
    """What finished trials reported at one step: how many did, NaN included, and the other values."""

    count: int = 0
    _values: array[float] = field(default_factory=lambda: array("d"))
    _is_sorted: bool = True

    def add(self, big_endian: bytes) -> None:
        """Take in more values, as PostgreSQL sends float8."""
        values = np.frombuffer(big_endian, dtype=">f8").astype(float)
        self.count += len(values)
        self._values.frombytes(values[~np.isnan(values)].tobytes())
        self._is_sorted = False

    def percentile(self, percentile: float) -> float:
        """Return what numpy.nanpercentile returns for these values, without its warnings.

        The arithmetic is numpy's own, operation by operation, so that no rounding differs.
        """
        if not self._values:
            return math.nan
        if not self._is_sorted:
            # A stable sort merges what was added into what was sorted: 0.1 ms for one value among 50,000.
            np.frombuffer(self._values).sort(kind="stable")
            self._is_sorted = True
        last = len(self._values) - 1
        position = last * (percentile / 100)
        below = min(math.floor(position), last)
        weight = position - below
        low, high = self._values[below], self._values[min(below + 1, last)]
        return low + (high - low) * weight if weight < 0.5 else high - (high - low) * (1 - weight)


class _FinishedTrials:
    """The reports of a study's COMPLETE trials by step, each trial read once, after it finished."""

    def __init__(self, sessions: Sessions, study_id: int) -> None:
        self.count = 0
        self._sessions = sessions
        self._study_id = study_id
        self._last_number = -1
        self._unfinished: set[int] = set()
        self._steps: dict[int, _Reports] = {}

    def at(self, step: int) -> _Reports:
        return self._steps.get(step, _Reports())

    def refresh(self) -> None:
        """Read what finished since the last call: one query, and a second where trials did."""
        seen = {"study_id": self._study_id, "last_number": self._last_number, "unfinished": int_array(self._unfinished)}
        # Each statement stands for itself: what a finished trial reported does not change any more.
        changed = self._sessions.statement(lambda conn: conn.execute(_CHANGED, seen).all())
        complete = [row.trial_id for row in changed if row.state == "COMPLETE"]
        ids = {"trial_ids": int_array(complete)}
        reports = self._sessions.statement(lambda conn: conn.execute(_REPORTS, ids).all()) if complete else []
        for row in changed:
            self._last_number = max(self._last_number, row.number)
            (self._unfinished.add if row.state in UNFINISHED else self._unfinished.discard)(row.trial_id)
        for row in reports:
            self._steps.setdefault(row.step, _Reports()).add(row.reported)
        self.count += len(complete)


# By number and not by id: a study's trials get theirs under the lock on its row, one transaction after the
# other, and an index finds those of one study. Two lookups, as an OR of them may become a scan of the study.
_trial = (trials.c.trial_id, trials.c.number, trials.c.state)
_CHANGED = union_all(
    select(*_trial).where(trials.c.study_id == bindparam("study_id"), trials.c.number > bindparam("last_number")),
    select(*_trial).where(
        is_among(trials.c.trial_id, "unfinished"), *(trials.c.state != state for state in UNFINISHED)
    ),
)

# One row a step, not a report.
_report = trial_intermediate_values.c
_REPORTS = (
    select(
        _report.step,
        packed(func.float8send(stored_number(_report.intermediate_value, _report.intermediate_value_type))).label(
            "reported"
        ),
    )
    .where(is_among(_report.trial_id, "trial_ids"))
    .group_by(_report.step)
)
