"""Workers as they are seen from anywhere: each tells now and then that it is there, and what its slots do."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from sqlalchemy import func, update
from sqlalchemy.dialects.postgresql import insert as upsert

from storage.sessions import Sessions
from storage.tables import tuner_workers

SEEN_EVERY_S = 10.0
"""How often a worker tells that it is there."""

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
    """A worker process and what it last told of itself. `name` is HOST:PID, `versions` those of its packages."""

    worker_id: uuid.UUID
    study_id: int
    name: str
    slots: Sequence[SlotSeen]
    versions: Mapping[str, str]


def seen(sessions: Sessions, worker: WorkerSeen) -> None:
    """Write how the worker is, now by the database's clock. Raises StorageError if the study was deleted."""
    told: dict[str, Any] = {
        "slots": [asdict(slot) for slot in worker.slots],
        "versions": dict(worker.versions),
        "last_seen": func.clock_timestamp(),
        "ended_at": None,
    }
    row = {"worker_id": worker.worker_id, "study_id": worker.study_id, "name": worker.name, **told}
    statement = upsert(tuner_workers).values(started_at=func.clock_timestamp(), **row)
    statement = statement.on_conflict_do_update(index_elements=["worker_id"], set_=told)
    sessions.statement(lambda conn: conn.execute(statement))


def ended(sessions: Sessions, worker_id: uuid.UUID) -> None:
    """Write that the worker has ended, now by the database's clock."""
    now = func.clock_timestamp()
    statement = update(tuner_workers).where(tuner_workers.c.worker_id == worker_id)
    sessions.statement(lambda conn: conn.execute(statement.values(last_seen=now, ended_at=now)))
