"""Models that trials have kept in the database: that of the study's best complete trial, and no other for long.

Which trials have one is told by an attribute, wherever the model lies. It is written before its trial ends, by the
holder of the lease; which is the best is told by the values alone, so that whoever drops the others after the end of
his own trial, in whatever order, never drops the best: what was not the best once cannot become it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, delete, exists, literal, select

from storage.coordination import checkpoints
from storage.coordination.claims import Claim
from storage.coordination.records import TRIALS_WITH_VALUE, best_first
from storage.database.foreign import json_values
from storage.database.sessions import Sessions
from storage.database.tables import trial_user_attributes, trial_values, trials, tuner_models
from storage.database.values import number_of

KEPT: Final = "kept_model"
"""The user attribute of a trial that kept its model: the sha256 of that."""
_FINISHED: Final = ("COMPLETE", "PRUNED", "FAIL")


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best complete trial of those that kept a model."""

    trial_id: int
    number: int
    value: float
    sha256: str | None


def save(sessions: Sessions, held: Claim, data: bytes) -> bool:
    """Keep the model of a trial that is held, over an earlier one; False if it is not held any more.

    Raises InvalidWriteError if it is too large, and StorageError.
    """
    return checkpoints.save(sessions, held, data, table=tuner_models)


def load(sessions: Sessions, trial_id: int) -> bytes | None:
    """Return the model of a trial, None if there is none."""
    return sessions.snapshot(lambda conn: checkpoints.read(conn, trial_id, tuner_models))


def best(sessions: Sessions, study_id: int, direction: str) -> Best | None:
    """Return the best complete trial that kept a model, None if none did."""
    query = _best(study_id, direction, trials.c.number, trial_values.c.value, trial_values.c.value_type)
    row = sessions.statement(lambda conn: conn.execute(query).one_or_none())
    if row is None:
        return None
    of_trial = (trial_user_attributes.c.trial_id == row.trial_id) & (trial_user_attributes.c.key == KEPT)
    text = sessions.statement(lambda conn: conn.scalar(select(trial_user_attributes.c.value_json).where(of_trial)))
    found = json_values([text])[0] if text is not None else None
    return Best(
        trial_id=row.trial_id,
        number=row.number,
        value=number_of(row.value, row.value_type),
        sha256=found if isinstance(found, str) else None,
    )


def would_be_best(sessions: Sessions, study_id: int, direction: str, number: int, value: float) -> bool:
    """Whether a trial that ends with this value is the best of those that kept a model, so far."""
    so_far = best(sessions, study_id, direction)
    if so_far is None:
        return True
    if value == so_far.value:
        return number < so_far.number
    return value < so_far.value if direction == "minimize" else value > so_far.value


def drop_others(sessions: Sessions, study_id: int, direction: str) -> None:
    """Delete the models of the study's trials that have ended, all but the best one's."""
    ended = select(trials.c.trial_id).where(trials.c.study_id == study_id, trials.c.state.in_(_FINISHED))
    the_best = _best(study_id, direction).scalar_subquery()
    statement = delete(tuner_models).where(
        tuner_models.c.trial_id.in_(ended), tuner_models.c.trial_id.is_distinct_from(the_best)
    )
    sessions.statement(lambda conn: conn.execute(statement))


def _best(study_id: int, direction: str, *columns: ColumnElement[Any]) -> Select[Any]:
    attribute = trial_user_attributes
    has_model = exists(select(literal(1)).where(attribute.c.trial_id == trials.c.trial_id, attribute.c.key == KEPT))
    query = select(trials.c.trial_id, *columns).select_from(TRIALS_WITH_VALUE).where(has_model)
    return best_first(query, study_id, direction).limit(1)
