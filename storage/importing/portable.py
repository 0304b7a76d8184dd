"""FrozenTrials out of Optuna's tables in a database of any kind, row by row."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Final

from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Table, select

from storage.database.tables import (
    trial_intermediate_values,
    trial_params,
    trial_system_attributes,
    trial_user_attributes,
    trial_values,
    trials,
)
from storage.database.values import local_time
from storage.trials.frozen import external_of

_NOT_FINITE: Final = {"INF_POS": math.inf, "INF_NEG": -math.inf, "NAN": math.nan}


def read_trials(conn: Connection, trial_ids: Sequence[int]) -> list[FrozenTrial]:
    """Return the trials of these ids by number; one that does not exist is left out."""
    rows = conn.execute(
        select(trials.c.trial_id, trials.c.number, trials.c.state, trials.c.datetime_start, trials.c.datetime_complete)
        .where(trials.c.trial_id.in_(trial_ids))
        .order_by(trials.c.number)
    ).all()
    params, distributions = _params(conn, trial_ids)
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
    ]


class _Distributions:
    """Distributions by their JSON: a study has few, and parsing 250,000 of them takes seconds."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[BaseDistribution, Callable[[float], Any]]] = {}

    def __call__(self, text: str) -> tuple[BaseDistribution, Callable[[float], Any]]:
        """Return the distribution and what makes a param's value of the number stored for it."""
        known = self._known.get(text)
        if known is None:
            distribution = json_to_distribution(text)
            known = self._known[text] = (distribution, external_of(distribution))
        return known


def _params(
    conn: Connection, trial_ids: Sequence[int]
) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, BaseDistribution]]]:
    table = trial_params
    params: dict[int, dict[str, Any]] = defaultdict(dict)
    distributions: dict[int, dict[str, BaseDistribution]] = defaultdict(dict)
    query = (
        select(table.c.trial_id, table.c.param_name, table.c.param_value, table.c.distribution_json)
        .where(table.c.trial_id.in_(trial_ids))
        .order_by(table.c.param_id)
    )
    parse = _Distributions()
    for trial_id, name, internal, text in conn.execute(query):
        distribution, external = parse(text)
        params[trial_id][name] = external(internal)
        distributions[trial_id][name] = distribution
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
        attrs[trial_id][key] = json.loads(text)
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
