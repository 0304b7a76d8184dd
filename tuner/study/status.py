"""How a study stands: all that there is to say of it, read at once."""

from __future__ import annotations

import datetime as dt
import sys
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from sqlalchemy import Connection, Engine, func, select

from storage.coordination import ledger, records, standings, studies, workers
from storage.coordination.ledger import Cost, Pace
from storage.coordination.records import TrialRecord
from storage.coordination.standings import Budget, Standing
from storage.coordination.studies import StateCounts
from storage.coordination.workers import Signs, WorkerNow
from storage.database.sessions import Sessions
from tuner.study.audits import Audits, audits
from tuner.study.joining import AnyStudy, Study
from tuner.study.replay import GLANCE, Replay, replay

StudyStatus: TypeAlias = Literal["idle", "running", "paused", "stopped", "finished"]
"""A finished study runs nothing and hands nothing out, whether or not it was stopped."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """A study at one moment, `at` by the database's clock.

    `reason` says why no trial is handed out any more; None while some are. `lost` of the running trials have lost
    their worker. `best` is None while there is none, and for a study of several objectives. `failures` are counts and
    latest messages by class. `last_seen` is when a worker last told of itself. `left_s` is None unless the study runs
    and there is something to reckon it from. `audits` is of a study that audits its pruner, `replay` of the
    complete trials of a finished study.
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
    last_seen: dt.datetime | None
    audits: Audits | None = None
    replay: Replay | None = None


def look(engine: Engine, study: AnyStudy) -> Status:
    """Return how the study stands. Raises StudyNotFoundError if it was deleted."""
    sessions, study_id = Sessions(engine), study.study_id
    standing = standings.look(sessions, study_id)
    if isinstance(study, Study):
        study = study.as_of(standing)
    counts = studies.count_states(engine, study_id)

    def of_workers(conn: Connection) -> dict[str, Any]:
        is_audited = study.spec is not None and study.spec.audit > 0
        return {
            "audits": audits(conn, study_id, study.directions[0]) if is_audited else None,
            "at": conn.execute(select(func.now())).scalar_one(),
            "cost": ledger.cost(conn, study_id),
            "pace": ledger.pace(conn, study_id),
            "workers": workers.present(conn, study_id),
            "ended_workers": workers.count_ended(conn, study_id),
            "last_seen": workers.signs(conn, study_id).get(study_id, Signs()).last_seen,
        }

    seen = sessions.snapshot(of_workers)
    # Those of a worker that was lost wait for their leases to run out.
    dropped = sum(slot.trial is not None for worker in seen["workers"] if worker.is_lost for slot in worker.slots)
    state, reason = state_of(standing, study.budget if isinstance(study, Study) else None, dropped)
    is_going = state == "running" and reason is None
    return Status(
        study=study,
        state=state,
        reason=reason,
        counts=counts,
        lost=standing.expired,
        best=records.best_trial(engine, study_id, study.directions[0]) if len(study.directions) == 1 else None,
        failures=records.count_failures(engine, study_id),
        replay=replay(engine, study, **GLANCE) if state == "finished" and len(study.directions) == 1 else None,
        left_s=_left_s(study, counts, standing, seen["pace"]) if is_going else None,
        **seen,
    )


def states(engine: Engine) -> tuple[dict[int, StudyStatus], dict[int, Signs]]:
    """Return the state of each study of the database, and the signs of its workers."""
    with engine.connect() as conn:
        found, signs = standings.all_standings(conn), workers.signs(conn)
    states = {
        study_id: state_of(replace(its, budget=None), _budget_of(its.budget))[0] for study_id, its in found.items()
    }
    return states, signs


def _budget_of(stored: Any) -> Budget | None:
    """Return the budget of a spec as far as it can be read: of another version's, too, a list tells what it can."""
    names = ("trials", "timeout_s", "max_failures")
    known = {
        name: stored[name] for name in names if isinstance(stored, dict) and isinstance(stored.get(name), int | float)
    }
    if "trials" not in known:
        return None
    return Budget(**{"timeout_s": None, "max_failures": sys.maxsize, "max_attempts": 0, **known})


def state_of(standing: Standing, budget: Budget | None, dropped: int = 0) -> tuple[StudyStatus, str | None]:
    """Return the study's state, and the reason why nothing more is handed out.

    `budget` is None for a study that tuner did not create; `dropped` of the running trials had a worker that was lost.
    """
    runs = standing.running > max(standing.expired, dropped)
    if budget is not None:
        # Resuming a study whose budget is used up changes nothing.
        end = standings.closed(replace(standing, state="open"), budget)
        if end is not None and end.final:
            return ("running" if runs else "finished"), end.reason
        halt = standings.closed(standing, budget)
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
