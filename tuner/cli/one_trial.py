"""One trial and its learning curve, as `tuner trials STUDY --number N` shows them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tuner.errors import TunerError
from tuner.text import duration, number_text, printable, table

if TYPE_CHECKING:
    import datetime as dt

    from sqlalchemy import Engine

    from storage.coordination.one_trial import Attempt
    from storage.coordination.records import TrialRecord
    from storage.trials.curves import CurvePoint
    from tuner.study.joining import AnyStudy


@dataclass(frozen=True, kw_only=True)
class OneTrial:
    """A trial with its attempts and the points of its learning curve."""

    study: AnyStudy
    trial: TrialRecord
    attempts: Sequence[Attempt]
    points: Sequence[CurvePoint]

    def lines(self) -> Iterator[str]:
        """Yield all that is known of the trial, for people."""
        for name, text in self._named():
            yield f"{name:<9} {printable(text)}"

    def attempt_fields(self) -> list[dict[str, Any]]:
        """Return the attempts as JSON has them."""
        return [
            asdict(attempt) | {"started_at": _iso(attempt.started_at), "ended_at": _iso(attempt.ended_at)}
            for attempt in self.attempts
        ]

    def curve_fields(self) -> list[dict[str, Any]]:
        """Return the points as JSON has them; of those that are no epochs of tuner's the value alone."""
        return [
            asdict(point) if point.has_details else {"step": point.step, "value": point.value} for point in self.points
        ]

    def curve_lines(self) -> Iterator[str]:
        """Yield the curve as a table, for people."""
        rows = self._curve_rows()
        if not rows:
            yield f"trial {self.trial.number} has reported nothing"
            return
        cells = [[row["step"], *(number_text(value) for value in list(row.values())[1:])] for row in rows]
        yield from table(list(rows[0]), cells)

    def curve_csv(self) -> Iterator[str]:
        """Yield the lines of the curve's CSV, which has a header even without a point."""
        rows = self._curve_rows()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(rows[0] if rows else ["step", self.study.metrics[0]])
        writer.writerows(row.values() for row in rows)
        yield from text.getvalue().splitlines()

    def _curve_rows(self) -> list[dict[str, Any]]:
        from tuner.study.curves import as_rows

        return as_rows(self.points, self.study.metrics[0])

    def _named(self) -> Iterator[tuple[str, str]]:
        trial = self.trial
        yield "trial", f"{trial.number} of study {self.study.name}"
        yield "state", trial.state.lower()
        if trial.value is not None:
            yield "value", f"{number_text(trial.value)} ({self.study.metrics[0]})"
        if trial.last_step is not None:
            yield "last step", f"{trial.last_step}: {number_text(trial.last_value)} (--curve shows all)"
        if trial.started_at is not None:
            yield "started", f"{_iso(trial.started_at)}{_took(trial.started_at, trial.ended_at)}"
        for name, value in trial.params.items():
            yield "param", f"{name} = {json.dumps(value)}"
        for name, value in trial.user_attrs.items():
            yield "recorded", f"{name} = {json.dumps(value)}"
        for its in self.attempts:
            because = "" if its.message is None else f": {its.message}"
            took = _took(its.started_at, its.ended_at)
            where = f"{its.worker}, slot {its.slot}, {its.device}{took}"
            yield "attempt", f"{its.attempt} {its.outcome or 'running'}{because} ({where})"


def look(engine: Engine, study: AnyStudy, number: int) -> OneTrial:
    """Return the study's trial of that number. Raises TunerError if there is none."""
    from storage.coordination import one_trial, records
    from storage.trials.curves import curves

    trial = records.find_trial(engine, study.study_id, number)
    if trial is None:
        raise TunerError(f"study {study.name!r} has no trial {number}; 'tuner trials {study.name}' lists them")
    with engine.connect() as conn:
        attempts = one_trial.attempts(conn, study.study_id, number)
        points = curves(conn, study.study_id, [number]).get(number, [])
    return OneTrial(study=study, trial=trial, attempts=attempts, points=points)


def _iso(time: dt.datetime | None) -> str | None:
    return None if time is None else time.isoformat(timespec="seconds")


def _took(start: dt.datetime, end: dt.datetime | None) -> str:
    return "" if end is None else f", {duration((end - start).total_seconds())}"
