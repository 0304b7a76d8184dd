"""Checkpoints in the database: where a trial goes on, on whichever machine it is claimed next."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any, Final

from sqlalchemy import Connection, Integer, Select, bindparam, cast, delete, func, insert, select
from sqlalchemy.dialects.postgresql import UUID
from sqlalchemy.sql.dml import ReturningInsert

from storage.coordination.claims import Claim
from storage.database.errors import InvalidWriteError
from storage.database.sessions import Sessions
from storage.database.tables import trials, tuner_leases
from storage.database.tables import tuner_checkpoints as checkpoints

MAX_BYTES: Final = 64 * 2**20
PART_BYTES: Final = 4 * 2**20
_PARTS: Final = 1024
"""The numbers that each checkpoint of a trial has for its parts; the next one takes those after them."""


def save(sessions: Sessions, held: Claim, data: bytes | memoryview, give_up: threading.Event | None = None) -> bool:
    """Replace the checkpoint of a trial that is held. False if it is not any more, or once `give_up` is set.

    Each part is a statement of its own, guarded by the lease, so that no lock outlasts it and a slow network keeps
    nobody waiting. The first part is written last, and the checkpoint before goes in the same statement: whoever
    reads has the one or the other. Raises InvalidWriteError for more than MAX_BYTES, and StorageError.
    """
    if len(data) > MAX_BYTES:
        raise InvalidWriteError(
            f"a checkpoint in the database may have {MAX_BYTES // 2**20} MB, got {len(data) / 2**20:.0f} MB"
        )
    view = memoryview(data)
    # Nobody else can take the same numbers: an earlier holder's statements have come to their end before our claim.
    first = sessions.statement(lambda conn: conn.scalar(_next(), {"the_trial": held.trial_id}))
    guard = {"the_trial": held.trial_id, "the_token": held.token, "first": first}
    for part in reversed(range(max(1, -(-len(view) // PART_BYTES)))):
        if give_up is not None and give_up.is_set():
            return False
        values = {**guard, "new_part": first + part, "new_data": view[part * PART_BYTES : (part + 1) * PART_BYTES]}
        if sessions.statement(partial(_written, completing=part == 0, values=values)) is None:
            return False
    return True


def load(sessions: Sessions, trial_id: int) -> bytes | None:
    """Return the trial's checkpoint, None if it has none."""

    def work(conn: Connection) -> bytes | None:
        first = conn.scalar(_current(), {"the_trial": trial_id})
        if first is None:
            return None
        of_trial, part = checkpoints.c.trial_id == trial_id, checkpoints.c.part
        numbers = select(part).where(of_trial, part >= first, part < first + _PARTS).order_by(part)
        # A statement each, since a statement has its time limit, and a client the whole of an answer in memory.
        parts = [
            conn.scalar(select(checkpoints.c.data).where(of_trial, part == number))
            for number in conn.scalars(numbers).all()
        ]
        return b"".join(each for each in parts if each is not None)

    return sessions.statement(work)


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


def _written(conn: Connection, *, completing: bool, values: Mapping[str, Any]) -> int | None:
    part: int | None = conn.scalar(_add(completing=completing), values)
    return part


@cache
def _next() -> Select[Any]:
    last = func.max(checkpoints.c.part)
    return select(func.coalesce((last // _PARTS + 1) * _PARTS, 0)).where(
        checkpoints.c.trial_id == bindparam("the_trial")
    )


@cache
def _current() -> Select[Any]:
    """Select the number of the first part of the latest checkpoint that is complete."""
    return (
        select(checkpoints.c.part)
        .where(checkpoints.c.trial_id == bindparam("the_trial"), checkpoints.c.part % _PARTS == 0)
        .order_by(checkpoints.c.part.desc())
        .limit(1)
    )


@cache
def _head() -> Select[Any]:
    return _current().with_only_columns(
        func.substring(checkpoints.c.data, 1, bindparam("n_bytes"), type_=checkpoints.c.data.type)
    )


@cache
def _add(*, completing: bool) -> ReturningInsert[Any]:
    """Insert a part if the trial runs under our lease; `completing`, delete the checkpoint before."""
    ours = (
        select(tuner_leases.c.trial_id)
        .where(
            tuner_leases.c.trial_id == bindparam("the_trial"),
            tuner_leases.c.token == bindparam("the_token", type_=UUID),
            tuner_leases.c.expires_at.is_not(None),  # else the trial has ended: its lease keeps the token
        )
        .with_for_update(read=True)
        .cte("ours")
    )
    part, data = bindparam("new_part", type_=Integer), bindparam("new_data", type_=checkpoints.c.data.type)
    statement = insert(checkpoints).from_select(
        ["trial_id", "part", "data"], select(ours.c.trial_id, cast(part, Integer), data)
    )
    if completing:
        before = delete(checkpoints).where(
            checkpoints.c.trial_id == ours.c.trial_id, checkpoints.c.part < bindparam("first")
        )
        statement = statement.add_cte(before.cte("before"))
    return statement.returning(checkpoints.c.part)
