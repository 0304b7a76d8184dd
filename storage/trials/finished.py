"""An index of what a study's finished trials reported, kept up by reading what finished since."""

from __future__ import annotations

import math
import threading
import time
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from sqlalchemy import bindparam, func, select, union_all

from storage.database.columns import int_array, is_among, packed, stored_number
from storage.database.sessions import Sessions
from storage.database.tables import trial_intermediate_values, trials
from storage.trials.frozen import UNFINISHED

_MOMENT_S: Final = 1.0
"""How long after a report a decision may go by what the report brought along."""


@dataclass(kw_only=True)
class Reports:
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


class FinishedTrials:
    """The reports of a study's COMPLETE trials by step, each trial read once, after it finished."""

    def __init__(self, sessions: Sessions, study_id: int) -> None:
        self.count = 0
        self._sessions = sessions
        self._study_id = study_id
        self._lock = threading.RLock()
        self._last_number = -1
        self._unfinished: set[int] = set()
        self._unread: set[int] = set()  # complete trials whose reports are to be read
        self._steps: dict[int, Reports] = {}
        self._as_of: tuple[int, int, float] | None = None  # trial id, step, time.monotonic()

    def seen(self) -> dict[str, Any]:
        """Return what is known so far, as the bound parameters of CHANGED."""
        with self._lock:
            unfinished = int_array(self._unfinished)
            return {"study_id": self._study_id, "last_number": self._last_number, "unfinished": unfinished}

    def learn(self, changed: Iterable[tuple[int, int, str]], trial_id: int, step: int) -> None:
        """Take in the rows of CHANGED, as a report of that trial and step brought them along."""
        with self._lock:
            self._take_in(changed)
            self._as_of = (trial_id, step, time.monotonic())

    def at(self, step: int) -> Reports:
        """Return what was reported at the step."""
        return self._steps.get(step, Reports())

    @contextmanager
    def up_to_date(self, trial_id: int, step: int) -> Iterator[None]:
        """Hold what has finished by now, or, if that is a moment ago, by the report of this trial and step."""
        with self._lock:
            is_fresh = self._as_of is not None and self._as_of[:2] == (trial_id, step)
            if self._as_of is None or not is_fresh or time.monotonic() - self._as_of[2] > _MOMENT_S:
                # Each statement stands for itself: what a finished trial reported does not change any more.
                self._take_in(self._sessions.statement(lambda conn: conn.execute(CHANGED, self.seen()).all()))
            if self._unread:
                self._read()
            yield

    def _take_in(self, changed: Iterable[tuple[int, int, str]]) -> None:
        known = self._last_number  # rows come in any order
        for trial_id, number, state in changed:
            if number <= known and trial_id not in self._unfinished:
                continue  # another thread's answer told it before
            self._last_number = max(self._last_number, number)
            (self._unfinished.add if state in UNFINISHED else self._unfinished.discard)(trial_id)
            if state == "COMPLETE":
                self._unread.add(trial_id)

    def _read(self) -> None:
        ids = {"trial_ids": int_array(self._unread)}
        for step, reported in self._sessions.statement(lambda conn: conn.execute(_REPORTS, ids).all()):
            self._steps.setdefault(step, Reports()).add(reported)
        self.count += len(self._unread)
        self._unread.clear()


# By number and not by id: a study's trials get theirs under the lock on its row, one transaction after the
# other, and an index finds those of one study. Two lookups, as an OR of them may become a scan of the study.
_trial = (trials.c.trial_id, trials.c.number, trials.c.state)
CHANGED = union_all(
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
