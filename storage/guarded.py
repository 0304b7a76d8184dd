"""Writes to a trial: one statement each, which changes nothing unless the trial is unfinished and ours to write to.

The statements lock the rows that they depend on and look at them as they are then. FOR SHARE, for one, waits for a
transaction that ends the trial or hands it to another worker, and then finds that there is nothing to do. A statement
that touched no row tells nothing of why; `standing` and `check_writable` do.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from sqlalchemy import (
    ColumnElement,
    Connection,
    Insert,
    Select,
    Table,
    Text,
    Update,
    and_,
    cast,
    func,
    literal,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, insert

from storage.errors import LeaseLostError
from storage.frozen import UNFINISHED
from storage.tables import (
    trial_intermediate_values,
    trial_params,
    trial_values,
    trials,
    tuner_leases,
)
from storage.values import stored, stored_objective


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a trial stands: whose lease is on it, None without one."""

    study_id: int
    state: TrialState
    token: uuid.UUID | None


def report(trial_id: int, token: uuid.UUID | None, step: int, value: float) -> Insert:
    """Write an intermediate value, over an earlier one of the same step."""
    number, kind = stored(value)
    table = trial_intermediate_values
    statement = insert(table).from_select(
        ["trial_id", "step", "intermediate_value", "intermediate_value_type"],
        _writable(
            trial_id,
            token,
            literal(step),
            literal(number, table.c.intermediate_value.type),
            literal(kind, table.c.intermediate_value_type.type),
        ),
    )
    return statement.on_conflict_do_update(
        index_elements=["trial_id", "step"],
        set_={
            "intermediate_value": statement.excluded.intermediate_value,
            "intermediate_value_type": statement.excluded.intermediate_value_type,
        },
    ).execution_options(preserve_rowcount=True)


def param(trial_id: int, token: uuid.UUID | None, name: str, internal: float, distribution_json: str) -> Insert:
    """Write a param; as in stock Optuna, one that is there already stays as it is."""
    table = trial_params
    statement = insert(table).from_select(
        ["trial_id", "param_name", "param_value", "distribution_json"],
        _writable(
            trial_id, token, literal(name), literal(internal, table.c.param_value.type), literal(distribution_json)
        ),
    )
    return statement.on_conflict_do_nothing(index_elements=["trial_id", "param_name"]).execution_options(
        preserve_rowcount=True
    )


def attribute(table: Table, trial_id: int, token: uuid.UUID | None, key: str, value_json: str) -> Insert:
    """Write an attribute of a trial, over an earlier one of the same key."""
    statement = insert(table).from_select(
        ["trial_id", "key", "value_json"], _writable(trial_id, token, literal(key), literal(value_json))
    )
    return statement.on_conflict_do_update(
        index_elements=["trial_id", "key"], set_={"value_json": statement.excluded.value_json}
    ).execution_options(preserve_rowcount=True)


def start(trial_id: int, token: uuid.UUID | None) -> Update:
    """Set a waiting trial to running."""
    return _set_state(trial_id, token, {"state": "RUNNING", "datetime_start": utc_now()}, ("WAITING",))


def set_state(
    trial_id: int, token: uuid.UUID | None, state: TrialState, objectives: Sequence[float] | None
) -> Update | Insert:
    """Set the state of a trial with, where given, its values; they are written in the same statement."""
    changes: dict[str, Any] = {"state": state.name}
    if state.is_finished():
        changes["datetime_complete"] = utc_now()
    changed = _set_state(trial_id, token, changes, UNFINISHED)
    if not objectives:
        return changed
    rows = [(number, *stored_objective(value)) for number, value in enumerate(objectives)]
    numbers, given_values, kinds = (list(given) for given in zip(*rows, strict=True))
    given = (
        func.unnest(
            cast(numbers, ARRAY(trial_values.c.objective.type)),
            cast(given_values, ARRAY(trial_values.c.value.type)),
            cast(cast(kinds, ARRAY(Text)), ARRAY(trial_values.c.value_type.type)),
        )
        .table_valued("objective", "value", "value_type", name="given")
        .render_derived()
    )
    ended = changed.returning(trials.c.trial_id).cte("ended")
    statement = insert(trial_values).from_select(
        ["trial_id", "objective", "value", "value_type"],
        select(ended.c.trial_id, given.c.objective, given.c.value, given.c.value_type).select_from(
            ended.join(given, true())
        ),
    )
    return statement.on_conflict_do_update(
        index_elements=["trial_id", "objective"],
        set_={"value": statement.excluded.value, "value_type": statement.excluded.value_type},
    ).execution_options(preserve_rowcount=True)


def standing(conn: Connection, trial_id: int) -> Standing:
    """Return how a trial stands. Raises KeyError if there is none."""
    row = conn.execute(
        select(trials.c.study_id, trials.c.state, tuner_leases.c.token)
        .outerjoin(tuner_leases, tuner_leases.c.trial_id == trials.c.trial_id)
        .where(trials.c.trial_id == trial_id)
    ).one_or_none()
    if row is None:
        raise KeyError(f"no trial has the id {trial_id}")
    return Standing(study_id=row.study_id, state=TrialState[row.state], token=row.token)


def check_writable(trial_id: int, now: Standing, token: uuid.UUID | None) -> None:
    """Raise UpdateFinishedTrialError or LeaseLostError if the trial, as it stands, is not ours to write to."""
    if token is not None and now.token != token:
        raise LeaseLostError(f"the lease on trial id {trial_id} was lost: another worker may run it; drop this attempt")
    if now.state.is_finished():
        raise UpdateFinishedTrialError(f"trial id {trial_id} is {now.state.name}; a finished trial cannot be changed")


def utc_now() -> ColumnElement[Any]:
    """The database's clock, as Optuna's columns hold time."""
    return func.timezone("UTC", func.clock_timestamp())


def _writable(trial_id: int, token: uuid.UUID | None, *columns: ColumnElement[Any]) -> Select[Any]:
    return _locked(trial_id, token, UNFINISHED, *columns).with_for_update(read=True)


def _set_state(trial_id: int, token: uuid.UUID | None, changes: Mapping[str, Any], states: Sequence[str]) -> Update:
    statement = update(trials).values(changes)
    if token is None:
        return statement.where(trials.c.trial_id == trial_id, trials.c.state.in_(states))
    # UPDATE ... FROM would not lock the lease, and look at it as it was before a wait for the trial's row.
    ours = _locked(trial_id, token, states).with_for_update().cte("ours")
    return statement.where(trials.c.trial_id == ours.c.trial_id)


def _locked(trial_id: int, token: uuid.UUID | None, states: Sequence[str], *columns: ColumnElement[Any]) -> Select[Any]:
    query = select(trials.c.trial_id, *columns).where(trials.c.trial_id == trial_id, trials.c.state.in_(states))
    if token is None:
        return query
    return query.join(tuner_leases, and_(tuner_leases.c.trial_id == trials.c.trial_id, tuner_leases.c.token == token))
