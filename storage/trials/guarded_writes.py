"""Writes to a trial: one statement each, which changes nothing unless the trial is unfinished and ours to write to.

The statements lock the rows that they depend on and look at them as they are then. FOR SHARE, for one, waits for a
transaction that ends the trial or hands it to another worker, and then finds that there is nothing to do. A statement
that touched no row tells nothing of why; `standing` and `check_writable` do.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from sqlalchemy import (
    CTE,
    ColumnElement,
    Connection,
    Executable,
    Insert,
    Row,
    Select,
    Table,
    Text,
    and_,
    bindparam,
    cast,
    delete,
    func,
    null,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSON, insert
from sqlalchemy.sql.dml import ReturningInsert, ReturningUpdate
from sqlalchemy.types import TypeEngine

from storage.database.errors import LeaseLostError
from storage.database.tables import (
    trial_intermediate_values,
    trial_params,
    trial_values,
    trials,
    tuner_attempts,
    tuner_checkpoints,
    tuner_curves,
    tuner_leases,
    tuner_studies,
)
from storage.database.values import checked_step, stored, stored_objective
from storage.trials.curves import CurvePoint
from storage.trials.finished import CHANGED
from storage.trials.frozen import UNFINISHED


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a trial stands: whose lease is on it, None without one."""

    study_id: int
    state: TrialState
    token: uuid.UUID | None


@dataclass(frozen=True, kw_only=True)
class Write:
    """A guarded statement with its values; building the statement anew would take longer than running it."""

    statement: Executable
    values: dict[str, Any]

    def run(self, conn: Connection) -> int:
        """Return how many rows were written; 0 if the trial was not ours to write to."""
        return conn.execute(self.statement, self.values).rowcount

    def run_returning(self, conn: Connection) -> Row[Any] | None:
        """Return what the statement returns of the row written, None if the trial was not ours to write to."""
        return conn.execute(self.statement, self.values).first()


def report(
    trial_id: int,
    token: uuid.UUID | None,
    point: CurvePoint,
    seen: Mapping[str, Any] | None = None,
) -> Write:
    """Write an intermediate value, and what else is known of its epoch, over an earlier one of the same step.

    Returns the `state` of a study of ours and, with parameters of CHANGED in `seen`, its rows as `changed`.
    """
    number, kind = stored(math.nan if point.value is None else point.value)
    columns = {"step": checked_step(point.step), "intermediate_value": number, "intermediate_value_type": kind}
    if point.has_details:
        columns["epoch"] = point.epoch_json()
    values = {f"new_{name}": given for name, given in columns.items()}
    statement = _report(leased=token is not None, bringing_changes=seen is not None, with_details=point.has_details)
    return _write(statement, trial_id, token, {**values, **(seen or {})})


def param(trial_id: int, token: uuid.UUID | None, name: str, internal: float, distribution_json: str) -> Write:
    """Write a param; as in stock Optuna, one that is there already stays as it is, and no row is written."""
    values = {"new_param_name": name, "new_param_value": internal, "new_distribution_json": distribution_json}
    statement = _upsert(
        trial_params,
        ("trial_id", "param_name"),
        ("param_value", "distribution_json"),
        overwrite=False,
        leased=token is not None,
    )
    return _write(statement, trial_id, token, values)


def attributes(table: Table, trial_id: int, token: uuid.UUID | None, values_json: Mapping[str, str]) -> Write:
    """Write attributes of a trial, at least one, over earlier ones of the same keys."""
    given = {"new_keys": list(values_json), "new_values_json": list(values_json.values())}
    return _write(_set_attributes(table, leased=token is not None), trial_id, token, given)


def start(trial_id: int, token: uuid.UUID | None) -> Write:
    """Set a waiting trial to running; returns when, as `at`."""
    return _write(_set_state(TrialState.RUNNING, leased=token is not None), trial_id, token, {})


def set_state(trial_id: int, token: uuid.UUID | None, state: TrialState, objectives: Sequence[float] | None) -> Write:
    """Set an unfinished trial to a state other than running; its values, if any, in the same statement.

    Returns when it ended, as `at`.
    """
    leased = token is not None
    if not objectives:
        return _write(_set_state(state, leased=leased), trial_id, token, {})
    columns = list(zip(*(stored_objective(value) for value in objectives), strict=True))
    given = {
        "new_objectives": list(range(len(objectives))),
        "new_values": list(columns[0]),
        "new_value_types": list(columns[1]),
    }
    return _write(_set_state_and_values(state, leased=leased), trial_id, token, given)


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


def _write(statement: Executable, trial_id: int, token: uuid.UUID | None, values: dict[str, Any]) -> Write:
    guard = {"the_trial": trial_id} if token is None else {"the_trial": trial_id, "the_token": token}
    return Write(statement=statement, values={**guard, **values})


@cache
def _upsert(table: Table, key: tuple[str, ...], columns: tuple[str, ...], *, overwrite: bool, leased: bool) -> Insert:
    """Insert one row, the trial's id and `new_...` for each other column, if the trial is ours to write to."""
    names = [*key, *columns]
    new = [bindparam(f"new_{name}", type_=table.c[name].type) for name in names if name != "trial_id"]
    statement = insert(table).from_select(names, _locked(UNFINISHED, leased, *new).with_for_update(read=True))
    if overwrite:
        statement = statement.on_conflict_do_update(
            index_elements=key, set_={name: statement.excluded[name] for name in columns}
        )
    else:
        statement = statement.on_conflict_do_nothing(index_elements=key)
    return statement.execution_options(preserve_rowcount=True)


@cache
def _report(*, leased: bool, bringing_changes: bool, with_details: bool) -> ReturningInsert[Any]:
    columns = ("intermediate_value", "intermediate_value_type")
    key = ("trial_id", "step")
    if with_details:
        # The trial and its lease are locked once, for both of the rows.
        ours = _locked(UNFINISHED, leased).with_for_update(read=True).cte("ours")
        upsert = _upsert_from(trial_intermediate_values, key, columns, ours)
        details = _upsert_from(tuner_curves, key, ("epoch",), ours)
        upsert = upsert.add_cte(details.cte("details"))
    else:
        upsert = _upsert(trial_intermediate_values, key, columns, overwrite=True, leased=leased)
    of_study = trials.c.study_id == tuner_studies.c.study_id
    state = select(tuner_studies.c.state).join(trials, of_study).where(trials.c.trial_id == bindparam("the_trial"))
    changed = CHANGED.subquery()
    rows = select(func.json_agg(func.json_build_array(*changed.c))) if bringing_changes else select(null())
    return upsert.returning(state.scalar_subquery().label("state"), rows.scalar_subquery().label("changed"))


def _upsert_from(table: Table, key: tuple[str, ...], columns: tuple[str, ...], ours: CTE) -> Insert:
    """Insert one row, or write over it, of the trial that `ours` has locked, if it has."""
    names = [*key, *columns]
    new = [bindparam(f"new_{name}", type_=_type_of(table, name)) for name in names if name != "trial_id"]
    statement = insert(table).from_select(names, select(ours.c.trial_id, *new))
    return statement.on_conflict_do_update(
        index_elements=key, set_={name: statement.excluded[name] for name in columns}
    )


def _type_of(table: Table, name: str) -> TypeEngine[Any]:
    """Return what a column is given as: JSON as its text, which PostgreSQL takes for that without a cast."""
    found: TypeEngine[Any] = table.c[name].type
    return Text() if isinstance(found, JSON) else found


@cache
def _set_attributes(table: Table, *, leased: bool) -> Insert:
    given = (
        func.unnest(cast(bindparam("new_keys"), ARRAY(Text)), cast(bindparam("new_values_json"), ARRAY(Text)))
        .table_valued("key", "value_json", name="given")
        .render_derived()
    )
    ours = _locked(UNFINISHED, leased).with_for_update(read=True).cte("ours")
    statement = insert(table).from_select(
        ["trial_id", "key", "value_json"],
        select(ours.c.trial_id, given.c.key, given.c.value_json).select_from(ours.join(given, true())),
    )
    return statement.on_conflict_do_update(
        index_elements=["trial_id", "key"], set_={"value_json": statement.excluded.value_json}
    ).execution_options(preserve_rowcount=True)


@cache
def _set_state(state: TrialState, *, leased: bool) -> ReturningUpdate[Any]:
    changes: dict[str, Any] = {"state": state.name}
    if state == TrialState.RUNNING:
        changes["datetime_start"] = utc_now()
    if state.is_finished():
        changes["datetime_complete"] = utc_now()
    # An UPDATE by itself would not lock the lease, and look at it as it was before a wait for the trial's row.
    states = ("WAITING",) if state == TrialState.RUNNING else UNFINISHED
    ours = _locked(states, leased).with_for_update().cte("ours")
    at = trials.c.datetime_start if state == TrialState.RUNNING else trials.c.datetime_complete
    statement = update(trials).values(changes).where(trials.c.trial_id == ours.c.trial_id)
    statement = statement.returning(trials.c.trial_id, at.label("at"))
    if not (leased and state.is_finished()):
        return statement
    # The lease ends with the trial; its token stays, by which the holder knows a repeated write for his own.
    ended = update(tuner_leases).values(expires_at=None).where(tuner_leases.c.trial_id == ours.c.trial_id)
    attempt = (
        update(tuner_attempts)
        .values(ended_at=func.clock_timestamp(), outcome=state.name.lower())
        .where(tuner_attempts.c.token == bindparam("the_token"), select(ours.c.trial_id).exists())
    )
    checkpoint = delete(tuner_checkpoints).where(tuner_checkpoints.c.trial_id == ours.c.trial_id)
    return statement.add_cte(ended.cte("lease"), attempt.cte("attempt"), checkpoint.cte("checkpoint"))


@cache
def _set_state_and_values(state: TrialState, *, leased: bool) -> ReturningInsert[Any]:
    given = (
        func.unnest(
            cast(bindparam("new_objectives"), ARRAY(trial_values.c.objective.type)),
            cast(bindparam("new_values"), ARRAY(trial_values.c.value.type)),
            cast(cast(bindparam("new_value_types"), ARRAY(Text)), ARRAY(trial_values.c.value_type.type)),
        )
        .table_valued("objective", "value", "value_type", name="given")
        .render_derived()
    )
    ended = _set_state(state, leased=leased).cte("ended")
    statement = insert(trial_values).from_select(
        ["trial_id", "objective", "value", "value_type"],
        select(ended.c.trial_id, given.c.objective, given.c.value, given.c.value_type).select_from(
            ended.join(given, true())
        ),
    )
    return statement.on_conflict_do_update(
        index_elements=["trial_id", "objective"],
        set_={"value": statement.excluded.value, "value_type": statement.excluded.value_type},
    ).returning(select(ended.c.at).scalar_subquery().label("at"))


def _locked(states: Sequence[str], leased: bool, *columns: ColumnElement[Any]) -> Select[Any]:
    """Select the trial and its lease, to be locked: none if the trial is not in one of the states, or not ours."""
    # An IN would have SQLAlchemy write the statement anew for each execution: 0.05 ms of a report's 0.7.
    is_in_states = or_(*(trials.c.state == state for state in states))
    query = select(trials.c.trial_id, *columns).where(trials.c.trial_id == bindparam("the_trial"), is_in_states)
    if not leased:
        return query
    ours = and_(tuner_leases.c.trial_id == trials.c.trial_id, tuner_leases.c.token == bindparam("the_token"))
    return query.join(tuner_leases, ours)
