"""How a study stands: all that there is to say of it, read at once."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from sqlalchemy import Connection, Engine, func, select

from storage.coordination import ledger, records, standings, studies, workers
from storage.coordination.ledger import Cost, Pace
from storage.coordination.records import TrialRecord
from storage.coordination.standings import Standing
from storage.coordination.studies import StateCounts
from storage.coordination.workers import WorkerNow
from storage.database.sessions import Sessions
from tuner.study.joining import AnyStudy, Study

StudyStatus: TypeAlias = Literal["idle", "running", "paused", "stopped", "finished"]
"""A finished study runs nothing and hands nothing out, whether or not it was stopped."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """A study at one moment, `at` by the database's clock.

    `reason` says why no trial is handed out any more; None while some are. `lost` of the running trials have lost
    their worker. `best` is None while there is none, and for a study of several objectives. `failures` are counts and
    latest messages by class. `left_s` is None unless the study runs and there is something to reckon it from.
    """

    study: AnyStudy
    at: dt.datetime
    state: StudyStatus
    reason: str | None
    counts: StateCounts
    lost: int
    best: TrialRecord | None
    failures: dict[str, tuple[int, str]]
    cost: Cost
    pace: Pace
    left_s: float | None
    workers: list[WorkerNow]
    ended_workers: int


def look(engine: Engine, study: AnyStudy) -> Status:
    """Return how the study stands. Raises StudyNotFoundError if it was deleted."""
    sessions, study_id = Sessions(engine), study.study_id
    standing = standings.look(sessions, study_id)
    if isinstance(study, Study):
        study = study.as_of(standing)
    counts = studies.count_states(engine, study_id)
    state, reason = _state(standing, study)

    def of_workers(conn: Connection) -> dict[str, Any]:
        return {
            "at": conn.execute(select(func.now())).scalar_one(),
            "cost": ledger.cost(conn, study_id),
            "pace": ledger.pace(conn, study_id),
            "workers": workers.present(conn, study_id),
            "ended_workers": workers.count_ended(conn, study_id),
        }

    seen = sessions.snapshot(of_workers)
    is_going = state == "running" and reason is None
    return Status(
        study=study,
        state=state,
        reason=reason,
        counts=counts,
        lost=standing.expired,
        best=records.best_trial(engine, study_id, study.directions[0]) if len(study.directions) == 1 else None,
        failures=records.count_failures(engine, study_id),
        left_s=_left_s(study, counts, standing, seen["pace"]) if is_going else None,
        **seen,
    )


def _state(standing: Standing, study: AnyStudy) -> tuple[StudyStatus, str | None]:
    """Return the study's state, and the reason why nothing more is handed out."""
    runs = standing.running > standing.expired
    if isinstance(study, Study):
        # Resuming a study whose budget is used up changes nothing.
        end = standings.closed(replace(standing, state="open"), study.budget)
        if end is not None and end.final:
            return ("running" if runs else "finished"), end.reason
        halt = standings.closed(standing, study.budget)
        if standing.state != "open":
            return standing.state, None if halt is None else halt.reason
    return ("running" if runs else "idle"), None


def _left_s(study: AnyStudy, counts: StateCounts, standing: Standing, pace: Pace) -> float | None:
    if study.spec is None or not pace.per_hour:
        return None
    budget = study.spec.budget
    left_s = max(0, budget.trials - counts.done) * 3600 / pace.per_hour
    if budget.timeout_s is None or standing.age_s is None:
        return left_s
    return min(left_s, max(0.0, budget.timeout_s - standing.age_s))
