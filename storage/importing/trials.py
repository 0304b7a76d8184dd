"""Trials of other storages as rows of our tables: what they cannot hold made fit, then written set-based."""

from __future__ import annotations

import datetime as dt
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from optuna.distributions import BaseDistribution, CategoricalDistribution, distribution_to_json
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import (
    Connection,
    Insert,
    Subquery,
    Table,
    Text,
    Update,
    bindparam,
    cast,
    column,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import JSON

from storage.database.errors import InvalidWriteError
from storage.database.tables import (
    trial_intermediate_values,
    trial_params,
    trial_system_attributes,
    trial_user_attributes,
    trial_values,
    trials,
)
from storage.database.values import checked_name, checked_step, stored, utc_time

SOURCE_NUMBER: Final = "tuner:source_number"
"""The system attribute with the number that a trial has in its source, where it had to get another one here."""

_TRIAL = ("study_id", "number", "state", "datetime_start", "datetime_complete")
_CHILDREN: Final = {
    trial_params: ("trial_id", "param_name", "param_value", "distribution_json"),
    trial_values: ("trial_id", "objective", "value", "value_type"),
    trial_user_attributes: ("trial_id", "key", "value_json"),
    trial_system_attributes: ("trial_id", "key", "value_json"),
    trial_intermediate_values: ("trial_id", "step", "intermediate_value", "intermediate_value_type"),
}


@dataclass(frozen=True, kw_only=True)
class Change:
    """What of a study could not be taken as it was. `trial` is a number here, None for the study itself."""

    trial: int | None
    what: str


# The state of Optuna's CMA-ES sampler is a pickle, and somebody else's would be code: an imported study starts it anew.
_PICKLED: Final = re.compile(r"(cma|sepcma|cmawm):(optimizer:\d+|generation)")


def fitted(trial: FrozenTrial, number: int, n_objectives: int) -> tuple[FrozenTrial, list[Change]]:
    """Return the trial as it will be here, under this number, and what had to change for that.

    A running trial becomes a waiting one without reports, as one does that lost its worker: nobody runs it here.
    A complete one without a number for each objective becomes a failed one of class `nan`.
    """
    changes: list[str] = []
    state, values, started = trial.state, trial.values, trial.datetime_start
    params = {name: value for name, value in trial.params.items() if _fits(name, "a param's name", changes)}
    user_attrs = {key: value for key, value in trial.user_attrs.items() if _fits(key, "an attribute's key", changes)}
    system_attrs = {
        key: value
        for key, value in trial.system_attrs.items()
        if not _PICKLED.fullmatch(key) and _fits(key, "an attribute's key", changes)
    }
    reports = {step: value for step, value in trial.intermediate_values.items() if _step_fits(step, changes)}
    if state == TrialState.RUNNING:
        state, values, started, reports = TrialState.WAITING, None, None, {}
    elif not _are_numbers(values, n_objectives):
        if state == TrialState.COMPLETE:
            state = TrialState.FAIL
            message = f"it was complete with {_values_text(values)} for {n_objectives} objective(s) where it came from"
            user_attrs |= {"failure": "nan", "failure_message": message}
            changes.append(f"{message}; here it is failed")
        elif values is not None:
            changes.append(f"its value {_values_text(values)} is left out")
        values = None
    if trial.number != number:
        system_attrs[SOURCE_NUMBER] = trial.number
        changes.append(f"it has the number {trial.number} where it came from")
    fit = FrozenTrial(
        number=number,
        trial_id=trial._trial_id,
        state=state,
        value=None,
        values=values,
        datetime_start=started,
        datetime_complete=trial.datetime_complete if state.is_finished() else None,
        params=params,
        distributions={name: trial.distributions[name] for name in params},
        user_attrs=user_attrs,
        system_attrs=system_attrs,
        intermediate_values=reports,
    )
    return fit, [Change(trial=number, what=what) for what in changes]


def is_same(ours: FrozenTrial, theirs: FrozenTrial) -> bool:
    """Whether two trials agree in all but their ids; NaN agrees with itself."""
    return _content(ours) == _content(theirs)


def insert_trials(conn: Connection, study_id: int, new: Sequence[FrozenTrial]) -> None:
    """Create the trials, which come by number, whole. The caller holds the study's lock."""
    if not new:
        return
    rows = [
        (
            study_id,
            trial.number,
            trial.state.name,
            _time_text(trial.datetime_start),
            _time_text(trial.datetime_complete),
        )
        for trial in new
    ]
    found = conn.execute(_insertion(trials, _TRIAL), {"rows": _json(_TRIAL, rows)})
    ids: dict[int, int] = {row.number: row.trial_id for row in found}
    _fill(conn, [(ids[trial.number], trial) for trial in new])


def replace_trials(conn: Connection, changed: Sequence[tuple[int, FrozenTrial]]) -> None:
    """Overwrite unfinished trials, given with their ids here. The caller holds locks on their rows."""
    if not changed:
        return
    ids = [trial_id for trial_id, _ in changed]
    for child in _CHILDREN:
        conn.execute(delete(child).where(child.c.trial_id.in_(ids)))
    names = ("trial_id", "state", "datetime_start", "datetime_complete")
    rows = [
        (trial_id, trial.state.name, _time_text(trial.datetime_start), _time_text(trial.datetime_complete))
        for trial_id, trial in changed
    ]
    conn.execute(_update(), {"rows": _json(names, rows)})
    _fill(conn, changed)


def _fits(name: str, what: str, changes: list[str]) -> bool:
    try:
        checked_name(name, what)
    except InvalidWriteError as error:
        changes.append(f"left out: {error}")
        return False
    return True


def _step_fits(step: int, changes: list[str]) -> bool:
    try:
        checked_step(step)
    except InvalidWriteError as error:
        changes.append(f"left out: {error}")
        return False
    return True


def _are_numbers(values: Sequence[float] | None, n_objectives: int) -> bool:
    return values is not None and len(values) == n_objectives and not any(math.isnan(value) for value in values)


def _values_text(values: Sequence[float] | None) -> str:
    return "no value" if not values else ", ".join("NaN" if math.isnan(value) else repr(value) for value in values)


def _content(trial: FrozenTrial) -> str:
    distributions = {name: distribution_to_json(trial.distributions[name]) for name in trial.params}
    times = (trial.datetime_start, trial.datetime_complete)
    attrs = (trial.user_attrs, trial.system_attrs)
    return repr((trial.state, times, trial.values, trial.params, distributions, attrs, trial.intermediate_values))


def _fill(conn: Connection, with_ids: Sequence[tuple[int, FrozenTrial]]) -> None:
    rows: dict[Table, list[tuple[Any, ...]]] = {child: [] for child in _CHILDREN}
    distributions: dict[int, str] = {}  # by the id of an object, which `with_ids` keeps alive
    for trial_id, trial in with_ids:
        for name, value in trial.params.items():
            distribution = trial.distributions[name]
            text = distributions.get(id(distribution))
            if text is None:
                text = distributions[id(distribution)] = distribution_to_json(distribution)
            rows[trial_params].append((trial_id, name, _internal(distribution, value), text))
        for objective, value in enumerate(trial.values or ()):
            rows[trial_values].append((trial_id, objective, *stored(value)))
        for child, attrs in (
            (trial_user_attributes, trial.user_attrs),
            (trial_system_attributes, trial.system_attrs),
        ):
            rows[child].extend((trial_id, key, json.dumps(value)) for key, value in attrs.items())
        for step, report in trial.intermediate_values.items():
            rows[trial_intermediate_values].append((trial_id, step, *stored(math.nan if report is None else report)))
    for child, names in _CHILDREN.items():
        if rows[child]:
            conn.execute(_insertion(child, names), {"rows": _json(names, rows[child])})


def _internal(distribution: BaseDistribution, value: Any) -> float | str:
    """Return the number that Optuna stores for a param, as JSON can hold it."""
    if isinstance(distribution, CategoricalDistribution):
        # A choice that was read is the object in the list of choices; Optuna's search takes 1 for True.
        for index, choice in enumerate(distribution.choices):
            if choice is value:
                return index
        return distribution.to_internal_repr(value)
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _time_text(time: dt.datetime | None) -> str | None:
    utc = utc_time(time)
    return None if utc is None else utc.isoformat()


def _json(names: Sequence[str], rows: Iterable[tuple[Any, ...]]) -> str:
    return json.dumps([dict(zip(names, row, strict=True)) for row in rows], allow_nan=False)


def _records(target: Table, names: Sequence[str]) -> Subquery:
    """Select the rows of a JSON array; one parameter, however many rows, in their order."""
    records = (
        func.json_to_recordset(cast(bindparam("rows", type_=Text), JSON))
        .table_valued(*(column(name, target.c[name].type) for name in names))
        .render_derived(name="records", with_types=True)
    )
    return select(*(records.c[name] for name in names)).subquery()


@cache
def _insertion(target: Table, names: tuple[str, ...]) -> Insert:
    records = _records(target, names)
    insertion = insert(target).from_select(list(names), select(*records.c))
    return insertion.returning(trials.c.number, trials.c.trial_id) if target is trials else insertion


@cache
def _update() -> Update:
    names = ("trial_id", "state", "datetime_start", "datetime_complete")
    records = _records(trials, names)
    return (
        update(trials)
        .where(trials.c.trial_id == records.c.trial_id)
        .values({name: records.c[name] for name in names[1:]})
    )
