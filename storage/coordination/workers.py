"""Workers as they are seen from anywhere: each tells now and then that it is there, and what its slots do."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, TypeAlias

from sqlalchemy import Connection, Double, Row, cast, func, select, text, true, update
from sqlalchemy.dialects.postgresql import insert as upsert

from storage.database.sessions import Sessions
from storage.database.tables import trial_intermediate_values, trials, tuner_attempts, tuner_leases, tuner_workers
from storage.database.values import number_of

SEEN_EVERY_S = 10.0
"""How often a worker tells that it is there."""
SILENT_S = 3 * SEEN_EVERY_S
"""A worker that has told nothing for so long is taken for lost, unless the database was away."""

SlotState: TypeAlias = Literal["starting", "idle", "running", "broken", "ended"]
"""A broken slot waits until it tries its device again."""


@dataclass(frozen=True, kw_only=True)
class SlotSeen:
    """A slot as its worker saw it last; `share` is the part of the device that it has."""

    slot: int
    device: str
    share: float
    state: SlotState


@dataclass(frozen=True, kw_only=True)
class WorkerSeen:
    """A worker process and what it last told of itself. `name` is HOST:PID-TOKEN, `versions` those of its packages.

    `placement` is the engine's job that it is, None for one that somebody started by hand.
    """

    worker_id: uuid.UUID
    study_id: int
    name: str
    slots: Sequence[SlotSeen]
    versions: Mapping[str, str]
    placement: Mapping[str, str | None] | None = None


# Nobody could tell anything while the database was away.
_IS_LOST: Final = func.greatest(tuner_workers.c.last_seen, func.pg_postmaster_start_time()) < func.now() - text(
    f"interval '{SILENT_S} seconds'"
)


def seen(sessions: Sessions, worker: WorkerSeen) -> None:
    """Write how the worker is, now by the database's clock. Raises StorageError if the study was deleted."""
    told: dict[str, Any] = {
        "slots": [asdict(slot) for slot in worker.slots],
        "versions": dict(worker.versions),
        "placement": None if worker.placement is None else dict(worker.placement),
        "last_seen": func.clock_timestamp(),
        "ended_at": None,
    }
    row = {"worker_id": worker.worker_id, "study_id": worker.study_id, "name": worker.name, **told}
    statement = upsert(tuner_workers).values(started_at=func.clock_timestamp(), **row)
    statement = statement.on_conflict_do_update(index_elements=["worker_id"], set_=told)
    sessions.statement(lambda conn: conn.execute(statement))


def ended(sessions: Sessions, worker_id: uuid.UUID) -> None:
    """Write that the worker has ended, now by the database's clock."""
    now = func.statement_timestamp()  # the same in both columns
    statement = update(tuner_workers).where(tuner_workers.c.worker_id == worker_id)
    sessions.statement(lambda conn: conn.execute(statement.values(last_seen=now, ended_at=now)))


@dataclass(frozen=True, kw_only=True)
class RunningTrial:
    """The attempt that a slot runs. `step` and `value` are its latest report's, None before the first."""

    number: int
    attempt: int
    started_at: dt.datetime
    step: int | None
    value: float | None


@dataclass(frozen=True, kw_only=True)
class SlotNow:
    """A slot as its worker saw it last, and the trial that it runs now by the database."""

    slot: int
    device: str
    share: float
    state: SlotState
    trial: RunningTrial | None


@dataclass(frozen=True, kw_only=True)
class WorkerNow:
    """A worker that has not told of its end; `silent_s` is how long it has told nothing.

    `is_lost` if that is so long that it was killed, or cannot reach the database.
    """

    name: str
    slots: tuple[SlotNow, ...]
    versions: Mapping[str, str]
    placement: Mapping[str, str | None] | None
    started_at: dt.datetime
    last_seen: dt.datetime
    silent_s: float
    is_lost: bool


@dataclass(frozen=True, kw_only=True)
class Signs:
    """How many workers of a study are there, lost ones not among them, and when any last told of itself or its end."""

    live: int = 0
    last_seen: dt.datetime | None = None


def signs(conn: Connection, study_id: int | None = None) -> dict[int, Signs]:
    """Return them of a study, or of each, if it ever had a worker."""
    its = tuner_workers.c
    query = select(
        its.study_id,
        func.count().filter(its.ended_at.is_(None), ~_IS_LOST).label("live"),
        func.max(its.last_seen).label("last_seen"),
    ).group_by(its.study_id)
    if study_id is not None:
        query = query.where(its.study_id == study_id)
    return {row.study_id: Signs(live=row.live, last_seen=row.last_seen) for row in conn.execute(query)}


def present(conn: Connection, study_id: int) -> list[WorkerNow]:
    """Return the study's workers that have not told of their end, the oldest first, lost ones among them."""
    rows = conn.execute(
        select(
            tuner_workers,
            cast(func.extract("epoch", func.now() - tuner_workers.c.last_seen), Double).label("silent_s"),
            _IS_LOST.label("is_lost"),
        )
        .where(tuner_workers.c.study_id == study_id, tuner_workers.c.ended_at.is_(None))
        .order_by(tuner_workers.c.started_at, tuner_workers.c.name)
    ).all()
    attempts: dict[str, list[Row[Any]]] = {}
    for attempt in _running_attempts(conn, study_id) if rows else []:
        attempts.setdefault(attempt.worker, []).append(attempt)
    workers = []
    # The newest first: a restarted container has its predecessor's name, down to the process id. The first of a name
    # has what is left, should it have told of itself a moment after it took a trial.
    firsts = {row.name: row.worker_id for row in reversed(rows)}
    for row in reversed(rows):
        of_name = attempts.get(row.name, [])
        is_first = firsts[row.name] == row.worker_id
        its = {each.slot: each for each in of_name if is_first or each.started_at >= row.started_at}
        attempts[row.name] = [each for each in of_name if its.get(each.slot) is not each]
        workers.append(_worker_now(row, its))
    return workers[::-1]


def count_ended(conn: Connection, study_id: int) -> int:
    """Return how many workers of the study have told of their end."""
    is_of_study = tuner_workers.c.study_id == study_id
    return conn.execute(
        select(func.count()).select_from(tuner_workers).where(is_of_study, tuner_workers.c.ended_at.is_not(None))
    ).scalar_one()


def _running_attempts(conn: Connection, study_id: int) -> list[Row[Any]]:
    reports = trial_intermediate_values
    latest = (
        select(reports.c.step, reports.c.intermediate_value, reports.c.intermediate_value_type)
        .where(reports.c.trial_id == trials.c.trial_id)
        .order_by(reports.c.step.desc())
        .limit(1)
        .lateral("latest")
    )
    attempts = tuner_attempts
    query = (
        select(
            trials.c.number, attempts.c.attempt, attempts.c.worker, attempts.c.slot, attempts.c.started_at, *latest.c
        )
        .select_from(
            trials.join(tuner_leases, tuner_leases.c.trial_id == trials.c.trial_id)
            .join(attempts, attempts.c.token == tuner_leases.c.token)
            .outerjoin(latest, true())
        )
        .where(trials.c.study_id == study_id, trials.c.state == "RUNNING")
    )
    return list(conn.execute(query).all())


def _worker_now(row: Row[Any], running: Mapping[int, Row[Any]]) -> WorkerNow:
    slots = (
        SlotNow(
            slot=slot["slot"],
            device=slot["device"],
            share=slot["share"],
            state=slot["state"],
            trial=_running_trial(running.get(slot["slot"])),
        )
        for slot in row.slots
    )
    return WorkerNow(
        name=row.name,
        slots=tuple(slots),
        versions=row.versions,
        placement=row.placement,
        started_at=row.started_at,
        last_seen=row.last_seen,
        silent_s=max(0.0, row.silent_s),
        is_lost=row.is_lost,
    )


def _running_trial(row: Row[Any] | None) -> RunningTrial | None:
    if row is None:
        return None
    return RunningTrial(
        number=row.number,
        attempt=row.attempt,
        started_at=row.started_at,
        step=row.step,
        value=None if row.step is None else number_of(row.intermediate_value, row.intermediate_value_type),
    )
