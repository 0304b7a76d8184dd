"""Checkpoints in the database: where a trial goes on, on whichever machine it is claimed next.

The models that trials keep (`storage/coordination/models.py`) lie in a table of the same kind, and are written alike.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any, Final

from psycopg2.errors import ForeignKeyViolation
from sqlalchemy import Connection, Select, Table, bindparam, func, select

from storage.coordination.claims import Claim
from storage.database.copying import copy_row, int4
from storage.database.errors import InvalidWriteError
from storage.database.sessions import Sessions
from storage.database.tables import trials
from storage.database.tables import tuner_checkpoints as checkpoints

MAX_BYTES: Final = 64 * 2**20
PART_BYTES: Final = 4 * 2**20
_CALLED: Final = {"tuner_checkpoints": "a checkpoint", "tuner_models": "a kept model"}
_PARTS: Final = 1024
"""The numbers that each checkpoint of a trial has for its parts; the next one takes those after them."""


def save(
    sessions: Sessions,
    held: Claim,
    data: bytes | memoryview,
    give_up: threading.Event | None = None,
    table: Table = checkpoints,
) -> bool:
    """Replace the checkpoint of a trial that is held. False if it is not any more, or once `give_up` is set.

    Each part is a request of its own, guarded by the lease, so that no lock outlasts it and a slow network keeps
    nobody waiting. The first part is written last, and the checkpoint before goes in the same request: whoever
    reads has the one or the other. Raises InvalidWriteError for more than MAX_BYTES, and StorageError.
    """
    if len(data) > MAX_BYTES:
        raise InvalidWriteError(
            f"{_CALLED[table.name]} in the database may have {MAX_BYTES // 2**20} MB, got {len(data) / 2**20:.0f} MB"
        )
    view = memoryview(data)
    # Nobody else can take the same numbers: an earlier holder's statements have come to their end before our claim.
    first = sessions.statement(lambda conn: conn.scalar(_next(table), {"the_trial": held.trial_id}))
    guard = {"trial": held.trial_id, "token": held.token}
    for part in reversed(range(max(1, -(-len(view) // PART_BYTES)))):
        if give_up is not None and give_up.is_set():
            return False
        values = {**guard, "part": first + part, "replaces": first if part == 0 else None}
        data_of_part = view[part * PART_BYTES : (part + 1) * PART_BYTES]
        if not sessions.statement(partial(_written, table=table, values=values, data=data_of_part)):
            return False
    return True


def load(sessions: Sessions, trial_id: int) -> bytes | None:
    """Return the trial's checkpoint, None if it has none."""
    return sessions.statement(lambda conn: read(conn, trial_id, checkpoints))


def read(conn: Connection, trial_id: int, table: Table) -> bytes | None:
    """Return what the trial has in the table, None if it has nothing there."""
    first = conn.scalar(_current(table), {"the_trial": trial_id})
    if first is None:
        return None
    of_trial, part = table.c.trial_id == trial_id, table.c.part
    numbers = select(part).where(of_trial, part >= first, part < first + _PARTS).order_by(part)
    # A statement each, since a statement has its time limit, and a client the whole of an answer in memory.
    parts = [
        conn.scalar(select(table.c.data).where(of_trial, part == number)) for number in conn.scalars(numbers).all()
    ]
    return b"".join(each for each in parts if each is not None)


def load_head(sessions: Sessions, trial_id: int, n_bytes: int) -> bytes | None:
    """Return the first bytes of the trial's checkpoint, None if it has none."""
    values = {"the_trial": trial_id, "n_bytes": n_bytes}
    head: bytes | None = sessions.statement(lambda conn: conn.scalar(_head(), values))
    return head


def still_needed(sessions: Sessions, study_id: int, numbers: Sequence[int]) -> set[int]:
    """Return those of the study's trials with these numbers that run or wait."""
    unfinished = trials.c.state.in_(["RUNNING", "WAITING"])
    query = select(trials.c.number).where(trials.c.study_id == study_id, trials.c.number.in_(numbers), unfinished)
    return set(sessions.statement(lambda conn: conn.scalars(query).all()))


def _written(conn: Connection, *, table: Table, values: Mapping[str, Any], data: memoryview) -> bool:
    """Write a part if the trial runs under our lease; `replaces`, delete the checkpoint before that number."""
    try:
        part: list[bytes | memoryview] = [int4(values["trial"]), int4(values["part"]), data]
        return copy_row(conn, f"{table.name} (trial_id, part, data)", _guard(table.name, **values), part) > 0
    except ForeignKeyViolation:  # the trial was deleted
        return False


def _guard(table: str, *, trial: int, token: uuid.UUID, part: int, replaces: int | None) -> str:
    """Return what takes a part back that was not ours to write, and tells by a row of one that was.

    All are numbers and names of ours: what comes with a COPY cannot be bound.
    """
    before = "false" if replaces is None else f"part < {replaces:d}"
    return f"""
        WITH ours AS (
            SELECT trial_id FROM tuner_leases
            WHERE trial_id = {trial:d} AND token = '{token}'
              AND expires_at IS NOT NULL -- else the trial has ended: its lease keeps the token
            FOR SHARE
        )
        DELETE FROM {table} WHERE trial_id = {trial:d}
          AND CASE WHEN EXISTS (SELECT FROM ours) THEN {before} ELSE part = {part:d} END;
        SELECT FROM {table} WHERE trial_id = {trial:d} AND part = {part:d}
    """  # noqa: S608 - numbers, and ours


@cache
def _next(table: Table) -> Select[Any]:
    last = func.max(table.c.part)
    return select(func.coalesce((last // _PARTS + 1) * _PARTS, 0)).where(table.c.trial_id == bindparam("the_trial"))


@cache
def _current(table: Table) -> Select[Any]:
    """Select the number of the first part of the latest checkpoint that is complete."""
    return (
        select(table.c.part)
        .where(table.c.trial_id == bindparam("the_trial"), table.c.part % _PARTS == 0)
        .order_by(table.c.part.desc())
        .limit(1)
    )


@cache
def _head() -> Select[Any]:
    return _current(checkpoints).with_only_columns(
        func.substring(checkpoints.c.data, 1, bindparam("n_bytes"), type_=checkpoints.c.data.type)
    )
