"""Writing a trial's result after its worker could not: late, and only if the trial is still nobody else's."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from optuna.trial import TrialState
from sqlalchemy import Connection, Row, func, select, update

from storage.coordination import claims, standings
from storage.coordination.standings import Budget
from storage.database.sessions import Sessions
from storage.database.tables import trial_user_attributes, trials, tuner_attempts, tuner_leases
from storage.database.values import json_texts
from storage.trials import guarded_writes
from storage.trials.curves import CurvePoint

Delivery: TypeAlias = Literal["delivered", "late", "unknown"]
"""Late: the trial has ended otherwise, runs again, or the budget is used up. Unknown: there is no such attempt."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """How the attempt `token` ended: state, value, attributes, and what it reported."""

    token: uuid.UUID
    state: TrialState
    value: float | None
    attrs: Mapping[str, Any]
    reports: Sequence[CurvePoint]


def find_attempt(sessions: Sessions, token: uuid.UUID) -> tuple[int, int] | None:
    """Return (study id, trial number) of an attempt, None if this database has no such one."""
    query = (
        select(trials.c.study_id, trials.c.number)
        .join(tuner_attempts, tuner_attempts.c.trial_id == trials.c.trial_id)
        .where(tuner_attempts.c.token == token)
    )
    row = sessions.statement(lambda conn: conn.execute(query).one_or_none())
    return None if row is None else (row.study_id, row.number)


def deliver(sessions: Sessions, study_id: int, budget: Budget, result: Result) -> Delivery:
    """Write the result if its attempt still holds the trial, or nobody does and the budget has room for it.

    One transaction, which may be repeated. Raises StudyNotFoundError if the study was deleted.
    """

    def work(conn: Connection) -> Delivery:
        claims.lock(conn, study_id)
        row = _attempt(conn, result.token)
        if row is None:
            return "unknown"
        if row.holder == result.token and row.state not in ("RUNNING", "WAITING"):
            return "delivered"  # by an earlier call, whose answer was lost
        if row.state == "WAITING" and row.holder is None and row.is_latest and _has_room(conn, study_id, budget):
            _take_back(conn, row.trial_id, result.token)
        elif row.state != "RUNNING" or row.holder != result.token:
            return "late"
        _write(conn, row.trial_id, result)
        return "delivered"

    return sessions.transaction(work)


def _attempt(conn: Connection, token: uuid.UUID) -> Row[Any] | None:
    """Return the attempt's trial, locked, with its holder, and whether no attempt has begun since."""
    later = tuner_attempts.alias("later")
    query = (
        select(
            trials.c.trial_id,
            trials.c.state,
            tuner_leases.c.token.label("holder"),
            ~select(later.c.token)
            .where(later.c.trial_id == trials.c.trial_id, later.c.started_at > tuner_attempts.c.started_at)
            .exists()
            .label("is_latest"),
        )
        .join(tuner_attempts, tuner_attempts.c.trial_id == trials.c.trial_id)
        .join(tuner_leases, tuner_leases.c.trial_id == trials.c.trial_id)
        .where(tuner_attempts.c.token == token)
        .with_for_update(of=[trials, tuner_leases])
    )
    return conn.execute(query).one_or_none()


def _has_room(conn: Connection, study_id: int, budget: Budget) -> bool:
    standing = standings.standing_of(conn, study_id)
    return standing.done + standing.running < standing.now_of(budget).trials


def _take_back(conn: Connection, trial_id: int, token: uuid.UUID) -> None:
    conn.execute(update(trials).where(trials.c.trial_id == trial_id).values(state="RUNNING"))
    lease = update(tuner_leases).where(tuner_leases.c.trial_id == trial_id)
    conn.execute(lease.values(token=token, expires_at=func.clock_timestamp()))


def _write(conn: Connection, trial_id: int, result: Result) -> None:
    for point in result.reports:
        guarded_writes.report(trial_id, result.token, point).run_returning(conn)
    if result.attrs:
        guarded_writes.attributes(trial_user_attributes, trial_id, result.token, json_texts(result.attrs)).run(conn)
    values = None if result.value is None else [result.value]
    guarded_writes.set_state(trial_id, result.token, result.state, values).run_returning(conn)
