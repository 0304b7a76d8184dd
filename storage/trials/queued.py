"""The params that waiting trials were enqueued with; nothing here imports Optuna."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Connection, select

from storage.database.foreign import BadRowError, json_value, skipped
from storage.database.tables import trial_system_attributes, trials

FIXED_PARAMS: Final = "fixed_params"
"""The system attribute that `optuna.Study.enqueue_trial` keeps them in."""


def queued_params(conn: Connection, study_id: int) -> dict[int, dict[str, Any]]:
    """Return the params by the ids of the study's waiting trials that have such, in the order of their numbers."""
    fixed = trial_system_attributes
    rows = conn.execute(
        select(fixed.c.trial_id, fixed.c.value_json)
        .join(trials, trials.c.trial_id == fixed.c.trial_id)
        .where(trials.c.study_id == study_id, trials.c.state == "WAITING", fixed.c.key == FIXED_PARAMS)
        .order_by(trials.c.number)
    )
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        try:
            params = json_value(row.value_json)
            if not isinstance(params, dict):
                raise BadRowError("it is no object of names and values")
            found[row.trial_id] = params
        except BadRowError as error:
            skipped(f"what the trial of id {row.trial_id} was enqueued with", error)
    return found
