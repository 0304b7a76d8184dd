"""One trial by its number: as `studies` reads all of them, with its attempts."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

from sqlalchemy import Connection, func, select

from storage.database.tables import trials, tuner_attempts


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One run of a trial. `outcome` and `ended_at` are None while it runs; times are UTC."""

    attempt: int
    worker: str
    slot: int
    device: str
    started_at: dt.datetime
    ended_at: dt.datetime | None
    outcome: str | None
    message: str | None


def last_attempts(conn: Connection, study_id: int) -> dict[int, tuple[int, str]]:
    """Return of each trial that a worker of tuner's has run, by number, how often that was and who ran it last."""
    its = tuner_attempts.c
    query = (
        select(trials.c.number, func.count().over(partition_by=its.trial_id).label("attempts"), its.worker)
        .join(trials, trials.c.trial_id == its.trial_id)
        .where(trials.c.study_id == study_id)
        .order_by(trials.c.number, its.started_at)
    )
    return {row.number: (row.attempts, row.worker) for row in conn.execute(query)}


def attempts(conn: Connection, study_id: int, number: int) -> list[Attempt]:
    """Return the attempts at the trial, oldest first; none of a trial that no worker of tuner's has run."""
    its = tuner_attempts.c
    query = (
        select(its.attempt, its.worker, its.slot, its.device, its.started_at, its.ended_at, its.outcome, its.message)
        .join(trials, trials.c.trial_id == its.trial_id)
        .where(trials.c.study_id == study_id, trials.c.number == number)
        .order_by(its.started_at)
    )
    return [Attempt(**row._mapping) for row in conn.execute(query)]
