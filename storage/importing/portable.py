"""FrozenTrials out of Optuna's tables in a database of any kind, row by row."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Table, select

from storage.database.foreign import BadRowError, json_value, skipped
from storage.database.tables import (
    trial_intermediate_values,
    trial_params,
    trial_system_attributes,
    trial_user_attributes,
    trial_values,
    trials,
)
from storage.database.values import local_time
from storage.trials.kinds import checked_internal
from storage.trials.params import distribution_of, external_of

_NOT_FINITE: Final = {"INF_POS": math.inf, "INF_NEG": -math.inf, "NAN": math.nan}


def read_trials(conn: Connection, trial_ids: Sequence[int]) -> list[FrozenTrial]:
    """Return the trials of these ids by number; one that does not exist is left out."""
    rows = conn.execute(
        select(trials.c.trial_id, trials.c.number, trials.c.state, trials.c.datetime_start, trials.c.datetime_complete)
        .where(trials.c.trial_id.in_(trial_ids))
        .order_by(trials.c.number)
    ).all()
    bad: set[int] = set()
    params, distributions = _params(conn, trial_ids, bad)
    values = _values(conn, trial_ids)
    user_attrs = _attrs(conn, trial_user_attributes, trial_ids)
    system_attrs = _attrs(conn, trial_system_attributes, trial_ids)
    reports = _reports(conn, trial_ids)
    return [
        FrozenTrial(
            number=number,
            state=TrialState[state],
            value=None,
            datetime_start=local_time(started),
            datetime_complete=local_time(ended),
            params=params.get(trial_id, {}),
            distributions=distributions.get(trial_id, {}),
            user_attrs=user_attrs.get(trial_id, {}),
            system_attrs=system_attrs.get(trial_id, {}),
            intermediate_values=reports.get(trial_id, {}),
            trial_id=trial_id,
            values=values.get(trial_id),
        )
        for trial_id, number, state, started, ended in rows
        if trial_id not in bad
    ]


def _params(
    conn: Connection, trial_ids: Sequence[int], bad: set[int]
) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, BaseDistribution]]]:
    """Return params and distributions by trial id; the ids of trials that have one that cannot be read go to `bad`."""
    table = trial_params
    params: dict[int, dict[str, Any]] = defaultdict(dict)
    distributions: dict[int, dict[str, BaseDistribution]] = defaultdict(dict)
    query = (
        select(table.c.trial_id, table.c.param_name, table.c.param_value, table.c.distribution_json)
        .where(table.c.trial_id.in_(trial_ids))
        .order_by(table.c.param_id)
    )
    for trial_id, name, internal, text in conn.execute(query):
        try:
            distribution = distribution_of(text)
            params[trial_id][name] = external_of(distribution)(checked_internal(internal, text))
            distributions[trial_id][name] = distribution
        except BadRowError as error:
            skipped(f"the trial of id {trial_id}", f"param {name!r}: {error}")
            bad.add(trial_id)
    return params, distributions


def _values(conn: Connection, trial_ids: Sequence[int]) -> dict[int, list[float]]:
    table = trial_values
    values: dict[int, list[float]] = defaultdict(list)
    query = (
        select(table.c.trial_id, table.c.value, table.c.value_type)
        .where(table.c.trial_id.in_(trial_ids))
        .order_by(table.c.trial_id, table.c.objective)
    )
    for trial_id, value, kind in conn.execute(query):
        values[trial_id].append(_number(value, kind))
    return values


def _attrs(conn: Connection, table: Table, trial_ids: Sequence[int]) -> dict[int, dict[str, Any]]:
    attrs: dict[int, dict[str, Any]] = defaultdict(dict)
    query = (
        select(table.c.trial_id, table.c.key, table.c.value_json)
        .where(table.c.trial_id.in_(trial_ids))
        .order_by(table.primary_key.columns[0])
    )
    for trial_id, key, text in conn.execute(query):
        try:
            attrs[trial_id][key] = json_value(text)
        except BadRowError as error:
            skipped(f"the attribute {key!r} of the trial of id {trial_id}", error)
    return attrs


def _reports(conn: Connection, trial_ids: Sequence[int]) -> dict[int, dict[int, float]]:
    table = trial_intermediate_values
    reports: dict[int, dict[int, float]] = defaultdict(dict)
    query = (
        select(table.c.trial_id, table.c.step, table.c.intermediate_value, table.c.intermediate_value_type)
        .where(table.c.trial_id.in_(trial_ids))
        .order_by(table.c.trial_intermediate_value_id)
    )
    for trial_id, step, value, kind in conn.execute(query):
        reports[trial_id][step] = _number(value, kind)
    return reports


def _number(value: float | None, kind: str) -> float:
    # NaN given as a finite value is a NULL in SQLite.
    return _NOT_FINITE.get(kind, math.nan) if value is None else value
