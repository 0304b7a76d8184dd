"""Optuna's FrozenTrials, loaded with a handful of set-based queries whatever their number."""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution, json_to_distribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Column, ColumnElement, Connection, Select, Table, literal, select
from sqlalchemy.dialects.postgresql import ARRAY, INTEGER

from storage.tables import (
    trial_intermediate_values,
    trial_params,
    trial_system_attributes,
    trial_user_attributes,
    trial_values,
    trials,
)
from storage.values import local_time, number_of

Which: TypeAlias = "Select[tuple[int]] | Sequence[int]"
"""Trial ids, or a query for them; all queries of one load have to see the same moment."""
LoadReports: TypeAlias = Callable[[], None]

UNFINISHED = ("RUNNING", "WAITING")

_SCALARS = (str, int, float, bool, type(None))


class LazyTrial(FrozenTrial):
    """A finished trial whose intermediate values are read when somebody first asks for one trial's.

    Most are read by nobody: a sampler looks at params and values, and 50,000 trials of 20 steps are a million rows.
    """

    _load: LoadReports

    def __getattr__(self, name: str) -> Any:
        if name == "intermediate_values" and "_load" in self.__dict__:
            self._load()  # puts them into every lazy trial of the study, this one among them
            return self.__dict__[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FrozenTrial):
            return NotImplemented
        return plain(self).__dict__ == plain(other).__dict__

    __hash__ = FrozenTrial.__hash__

    def __repr__(self) -> str:
        return repr(plain(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_restored, (plain(self).__dict__,))


def plain(trial: FrozenTrial) -> FrozenTrial:
    """Return the trial as Optuna's own class, its intermediate values loaded; the attributes are shared."""
    if not isinstance(trial, LazyTrial):
        return trial
    reports = trial.intermediate_values
    attributes = {name: value for name, value in trial.__dict__.items() if name != "_load"}
    return _restored({**attributes, "intermediate_values": reports})


def copied(trial: FrozenTrial) -> FrozenTrial:
    """Return a plain copy for its receiver to change; as a deep copy but 10 times faster.

    Distributions and choices, which nobody changes, are shared.
    """
    source = plain(trial).__dict__
    values = source["_values"]
    return _restored(
        {
            **source,
            "_values": None if values is None else list(values),
            "_params": dict(source["_params"]),
            "_distributions": dict(source["_distributions"]),
            "_user_attrs": _copied_json(source["_user_attrs"]),
            "_system_attrs": _copied_json(source["_system_attrs"]),
            "intermediate_values": dict(source["intermediate_values"]),
        }
    )


def load_trials(conn: Connection, which: Which, lazily: LoadReports | None = None) -> list[FrozenTrial]:
    """Return the trials by number.

    With `lazily`, finished trials come without intermediate values, and call it when they are asked for.
    """
    if isinstance(which, Sequence) and not which:
        return []
    rows = conn.execute(
        select(trials.c.trial_id, trials.c.number, trials.c.state, trials.c.datetime_start, trials.c.datetime_complete)
        .where(_among(trials.c.trial_id, which))
        .order_by(trials.c.number)
    ).all()
    if not rows:
        return []
    params, distributions = _params(conn, which)
    values = _values(conn, which)
    user_attrs = _attrs(conn, trial_user_attributes, which)
    system_attrs = _attrs(conn, trial_system_attributes, which)
    eager = which if lazily is None else [row.trial_id for row in rows if row.state in UNFINISHED]
    reports = load_reports(conn, eager)
    loaded = []
    for trial_id, number, state_name, started, ended in rows:
        state = TrialState[state_name]
        is_lazy = lazily is not None and state.is_finished()
        trial = (LazyTrial if is_lazy else FrozenTrial)(
            number=number,
            state=state,
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
        if is_lazy:
            del trial.__dict__["intermediate_values"]
            trial.__dict__["_load"] = lazily
        loaded.append(trial)
    return loaded


def load_reports(conn: Connection, which: Which) -> dict[int, dict[int, float]]:
    """Return the intermediate values by step of each trial that has any."""
    if isinstance(which, Sequence) and not which:
        return {}
    table = trial_intermediate_values
    reports: dict[int, dict[int, float]] = defaultdict(dict)
    query = (
        select(table.c.trial_id, table.c.step, table.c.intermediate_value, table.c.intermediate_value_type)
        .where(_among(table.c.trial_id, which))
        .order_by(table.c.trial_intermediate_value_id)
    )
    for trial_id, step, value, kind in conn.execute(query):
        reports[trial_id][step] = value if kind == "FINITE" else number_of(value, kind)
    return reports


def fill_in(lazy: Iterable[FrozenTrial], reports: dict[int, dict[int, float]]) -> None:
    """Give lazy trials their intermediate values."""
    for trial in lazy:
        trial.__dict__["intermediate_values"] = reports.get(trial._trial_id, {})


def is_bare(trial: FrozenTrial) -> bool:
    """Whether the trial is lazy and has no intermediate values yet."""
    return "intermediate_values" not in trial.__dict__


class Distributions:
    """Distributions by their JSON: a study has few, and parsing 250,000 of them takes seconds."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[BaseDistribution, Callable[[float], Any]]] = {}

    def __call__(self, text: str) -> tuple[BaseDistribution, Callable[[float], Any]]:
        """Return the distribution and what makes a param's value of the number stored for it."""
        known = self._known.get(text)
        if known is None:
            distribution = json_to_distribution(text)
            known = self._known[text] = (distribution, _external(distribution))
        return known


def _external(distribution: BaseDistribution) -> Callable[[float], Any]:
    if isinstance(distribution, CategoricalDistribution):
        choices: Sequence[Any] = distribution.choices
        return lambda internal: choices[int(internal)]
    return int if isinstance(distribution, IntDistribution) else float


def _among(column: Column[int], which: Which) -> ColumnElement[bool]:
    if isinstance(which, Sequence):
        return column == literal(list(which), ARRAY(INTEGER)).any_()
    return column.in_(which)


def _params(conn: Connection, which: Which) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, BaseDistribution]]]:
    table = trial_params
    params: dict[int, dict[str, Any]] = defaultdict(dict)
    distributions: dict[int, dict[str, BaseDistribution]] = defaultdict(dict)
    query = (
        select(table.c.trial_id, table.c.param_name, table.c.param_value, table.c.distribution_json)
        .where(_among(table.c.trial_id, which))
        .order_by(table.c.param_id)
    )
    parse = Distributions()
    for trial_id, name, internal, text in conn.execute(query):
        distribution, external = parse(text)
        params[trial_id][name] = external(internal)
        distributions[trial_id][name] = distribution
    return params, distributions


def _values(conn: Connection, which: Which) -> dict[int, list[float]]:
    table = trial_values
    values: dict[int, list[float]] = defaultdict(list)
    query = (
        select(table.c.trial_id, table.c.value, table.c.value_type)
        .where(_among(table.c.trial_id, which))
        .order_by(table.c.trial_id, table.c.objective)
    )
    for trial_id, value, kind in conn.execute(query):
        values[trial_id].append(number_of(value, kind))
    return values


def _attrs(conn: Connection, table: Table, which: Which) -> dict[int, dict[str, Any]]:
    attrs: dict[int, dict[str, Any]] = defaultdict(dict)
    query = (
        select(table.c.trial_id, table.c.key, table.c.value_json)
        .where(_among(table.c.trial_id, which))
        .order_by(table.primary_key.columns[0])
    )
    for trial_id, key, text in conn.execute(query):
        attrs[trial_id][key] = json.loads(text)
    return attrs


def _copied_json(attrs: dict[str, Any]) -> dict[str, Any]:
    return {key: value if isinstance(value, _SCALARS) else copy.deepcopy(value) for key, value in attrs.items()}


def _restored(attributes: dict[str, Any]) -> FrozenTrial:
    trial = FrozenTrial.__new__(FrozenTrial)
    trial.__dict__.update(attributes)
    return trial
