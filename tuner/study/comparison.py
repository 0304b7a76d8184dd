"""Studies side by side: how each stands, and its best value as its trials ended and as devices' time was spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Engine

from storage.coordination import history
from storage.coordination.history import Ended
from storage.database.sessions import Sessions
from tuner.errors import UsageError
from tuner.spec import Direction
from tuner.study.joining import AnyStudy
from tuner.study.status import Status, look

SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
"""The parts of a budget, and of the longest study's devices' time, that best values are compared at."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a study had once a trial ended: trials `done`, the seconds of devices that all had taken, the best value."""

    done: int
    device_s: float
    best: float | None


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A study as it stands, and its curve: a point for each trial that ended."""

    status: Status
    curve: tuple[Point, ...]

    @property
    def device_s(self) -> float:
        """The devices' time of the trials that ended."""
        return self.curve[-1].device_s if self.curve else 0.0

    def best_at_share(self, share: float) -> float | None:
        """Return the best value after this part of the budget, or of the trials if it has none; None before."""
        spec = self.status.study.spec
        budget = spec.budget.trials if spec is not None else self.status.counts.done
        wanted = max(1, math.ceil(share * budget))
        return next((point.best for point in self.curve if point.done >= wanted), None)

    def best_within(self, device_s: float) -> float | None:
        """Return the best value within so much of devices' time, None if there was none."""
        within = [point.best for point in self.curve if point.device_s <= device_s]
        return within[-1] if within else None


def compare(engine: Engine, studies: Sequence[AnyStudy]) -> list[Compared]:
    """Return the studies as they compare. Raises UsageError for one of several objectives."""
    for study in studies:
        if len(study.directions) > 1:
            raise UsageError(f"compare needs studies of one objective, {study.name!r} has {len(study.directions)}")
    return [_compared(engine, study) for study in studies]


def curve(ended: Sequence[Ended], direction: Direction) -> tuple[Point, ...]:
    """Return the best value as the trials ended; of complete ones alone, as of a study's best."""
    points: list[Point] = []
    done, device_s, best = 0, 0.0, None
    better = min if direction == "minimize" else max
    for trial in ended:
        done += trial.state != "FAIL"
        device_s += trial.device_s
        if trial.state == "COMPLETE" and trial.value is not None and not math.isnan(trial.value):
            best = trial.value if best is None else better(best, trial.value)
        points.append(Point(done=done, device_s=device_s, best=best))
    return tuple(points)


def _compared(engine: Engine, study: AnyStudy) -> Compared:
    ended = Sessions(engine).statement(lambda conn: history.ended(conn, study.study_id))
    return Compared(status=look(engine, study), curve=curve(ended, study.directions[0]))
