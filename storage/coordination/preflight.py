"""Whether a study was tried before its first trial, and by which code: an attribute of the study's, written once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy import Connection, Engine, func, select
from sqlalchemy.dialects.postgresql import insert

from storage.coordination.studies import states_of
from storage.database.foreign import json_values
from storage.database.sessions import Sessions
from storage.database.tables import study_system_attributes as attributes

_KEY: Final = "tuner:preflight"
_LOCKS: Final = 0x74756E70  # "tunp": advisory locks of two numbers, this and the study's


def is_due(sessions: Sessions, study_id: int, code_hash: str, own_hash: str) -> bool:
    """Whether the code of this hash is still to be tried: other code was, or none and the study has no trial yet.

    `own_hash` is of the code that the study was created with: trials that it has run have tried it.
    """

    def work(conn: Connection) -> bool:
        query = select(attributes.c.value_json).where(attributes.c.study_id == study_id, attributes.c.key == _KEY)
        text = conn.scalar(query)
        if text is not None and _code_hash(text) == code_hash:
            return False
        counts = states_of(conn, study_id)
        return code_hash != own_hash or not (counts.done or counts.running or counts.failed)

    return sessions.statement(work)


def _code_hash(text: str) -> object:
    recorded = json_values([text])[0]
    return recorded.get("code_hash") if isinstance(recorded, dict) else None


@contextmanager
def turn(engine: Engine, study_id: int) -> Iterator[bool]:
    """Take the study's turn for the block, if nobody has it; whether it was taken. It goes with the connection."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        taken = bool(conn.scalar(select(func.pg_try_advisory_lock(_LOCKS, study_id))))
        try:
            yield taken
        finally:
            if taken:
                conn.execute(select(func.pg_advisory_unlock(_LOCKS, study_id)))


def record(sessions: Sessions, study_id: int, code_hash: str, lacks: list[str]) -> None:
    """Record that the code was tried, and what its exports will lack."""
    text = json.dumps({"code_hash": code_hash, "lacks": lacks})
    statement = insert(attributes).values(study_id=study_id, key=_KEY, value_json=text)
    replacing = statement.on_conflict_do_update(
        index_elements=[attributes.c.study_id, attributes.c.key], set_={"value_json": statement.excluded.value_json}
    )
    sessions.statement(lambda conn: conn.execute(replacing).rowcount)
