"""Trials as rows to show: how each stands, its params, what was recorded of it; nothing here imports Optuna."""

from __future__ import annotations

import datetime as dt
import math
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVarTuple

from sqlalchemy import (
    ARRAY,
    Connection,
    Double,
    Engine,
    Integer,
    Row,
    Select,
    Text,
    and_,
    case,
    func,
    select,
)
from sqlalchemy.dialects.postgresql import distinct_on

from storage.database.foreign import BAD, BadRowError, json_value, json_values, known_json, known_time, skipped
from storage.database.tables import (
    trial_intermediate_values,
    trial_params,
    trial_user_attributes,
    trial_values,
    trials,
)
from storage.database.values import number_of
from storage.trials.kinds import CATEGORICAL, checked_internal, kind_of
from storage.trials.queued import queued_params

Ts = TypeVarTuple("Ts")

State = Literal["RUNNING", "COMPLETE", "PRUNED", "FAIL", "WAITING"]


TRIALS_WITH_VALUE: Final = trials.outerjoin(
    trial_values, and_(trial_values.c.trial_id == trials.c.trial_id, trial_values.c.objective == 0)
)


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """A trial as it stands. `value` is infinite where the trial's is; None without one. Times are UTC.

    `last_step` and `last_value` are the latest intermediate value's, `last_value` NaN where that is. The params of a
    trial that waits are those that it was enqueued with.
    """

    trial_id: int
    number: int
    state: State
    value: float | None
    started_at: dt.datetime | None
    ended_at: dt.datetime | None
    last_step: int | None = None
    last_value: float | None = None
    params: dict[str, Any] = field(default_factory=dict)
    user_attrs: dict[str, Any] = field(default_factory=dict)


def list_trials(engine: Engine, study_id: int) -> list[TrialRecord]:
    """Return the study's trials by number, with params, user attributes and the latest intermediate value."""
    with engine.connect() as conn:
        return trials_of(conn, study_id)


def trials_of(conn: Connection, study_id: int) -> list[TrialRecord]:
    """Return the study's trials as `list_trials` does, as `conn`'s transaction sees them."""
    rows = conn.execute(_select_trials().where(trials.c.study_id == study_id).order_by(trials.c.number))
    found = rows.all()
    in_study = select(trials.c.trial_id).where(trials.c.study_id == study_id)
    params, bad = _params(conn, in_study)
    attrs = _user_attrs(conn, in_study)
    latest = _latest_reports(conn, in_study)
    if any(row.state == "WAITING" for row in found):
        for trial_id, queued in queued_params(conn, study_id).items():
            params[trial_id] = queued | params.get(trial_id, {})
    return [_trial(row, params, attrs, latest) for row in found if row.trial_id not in bad]


def find_trial(engine: Engine, study_id: int, number: int) -> TrialRecord | None:
    """Return the trial of that number, None if there is none."""
    return _first_trial(engine, _select_trials().where(trials.c.study_id == study_id, trials.c.number == number))


def best_trial(engine: Engine, study_id: int, direction: str) -> TrialRecord | None:
    """Return the complete trial with the best value, the earliest of equals; None while there is none."""
    return _first_trial(engine, best_first(_select_trials(), study_id, direction))


def _first_trial(engine: Engine, query: Select[Any]) -> TrialRecord | None:
    with engine.connect() as conn:
        unreadable: set[int] = set()
        while True:
            left = query.where(trials.c.trial_id.not_in(unreadable)) if unreadable else query
            row = conn.execute(left.limit(1)).one_or_none()
            if row is None:
                return None
            this = select(trials.c.trial_id).where(trials.c.trial_id == row.trial_id)
            params, bad = _params(conn, this)
            if not bad:
                return _trial(row, params, _user_attrs(conn, this), _latest_reports(conn, this))
            unreadable |= bad


def best_first(query: Select[*Ts], study_id: int, direction: str) -> Select[*Ts]:
    """Narrow a query of trials, joined with the values of their first objective, to the complete ones, best first."""
    value, kind = trial_values.c.value, trial_values.c.value_type
    # An infinite value is NULL, with a type that sorts around the finite ones. NaN, which other writers may have
    # left, would sort above all of them.
    rank = case((kind == "INF_NEG", -1), (kind == "INF_POS", 1), else_=0)
    order = [rank, value] if direction == "minimize" else [rank.desc(), value.desc()]
    return query.where(
        trials.c.study_id == study_id,
        trials.c.state == "COMPLETE",
        trial_values.c.trial_id.is_not(None),
        value.is_distinct_from(math.nan),
    ).order_by(*order, trials.c.number)


def all_values(engine: Engine, study_id: int) -> dict[int, list[float]]:
    """Return the values of each trial that has any, by its number, in the order of the study's objectives."""
    query = (
        select(trials.c.number, trial_values.c.value, trial_values.c.value_type)
        .join(trial_values, trial_values.c.trial_id == trials.c.trial_id)
        .where(trials.c.study_id == study_id)
        .order_by(trials.c.number, trial_values.c.objective)
    )
    values: dict[int, list[float]] = {}
    with engine.connect() as conn:
        for number, value, kind in conn.execute(query):
            values.setdefault(number, []).append(number_of(value, kind))
    return values


def count_failures(engine: Engine, study_id: int) -> dict[str, tuple[int, str]]:
    """Return for each class of failure how many trials failed by it and the latest message, the latest class last."""
    kind, message = trial_user_attributes.alias("kind"), trial_user_attributes.alias("message")
    query = (
        select(
            func.coalesce(kind.c.value_json, '"unknown"').label("kind"),
            func.coalesce(message.c.value_json, '""').label("message"),
        )
        .select_from(trials)
        .outerjoin(kind, and_(kind.c.trial_id == trials.c.trial_id, kind.c.key == "failure"))
        .outerjoin(message, and_(message.c.trial_id == trials.c.trial_id, message.c.key == "failure_message"))
        .where(trials.c.study_id == study_id, trials.c.state == "FAIL")
        .order_by(trials.c.datetime_complete.nulls_first(), trials.c.number)
    )
    failures: dict[str, tuple[int, str]] = {}
    with engine.connect() as conn:
        for row in conn.execute(query):
            its_kind = _attribute_text(row.kind)
            count, _ = failures.pop(its_kind, (0, ""))
            failures[its_kind] = (count + 1, _attribute_text(row.message))
    return failures


def param_value(internal: float | None, distribution_json: str) -> Any:
    """Return a param's value from what Optuna stores: a float, and the distribution that gives it its type.

    Raises BadRowError for what it does not store.
    """
    number = checked_internal(internal, distribution_json)
    kind, attributes = kind_of(distribution_json)
    if kind == CATEGORICAL:
        return attributes["choices"][int(number)]
    return int(number) if kind.startswith("Int") else number


def _select_trials() -> Select[Any]:
    return select(
        trials.c.trial_id,
        trials.c.number,
        trials.c.state,
        known_time(trials.c.datetime_start).label("datetime_start"),
        known_time(trials.c.datetime_complete).label("datetime_complete"),
        trial_values.c.value,
        trial_values.c.value_type,
    ).select_from(TRIALS_WITH_VALUE)


def _params(conn: Connection, of: Select[Any]) -> tuple[dict[int, dict[str, Any]], set[int]]:
    """Return params by trial id, in the order in which they came up in the study; and which trials' cannot be read."""
    table = trial_params
    rows = conn.execute(
        # A row a distribution: 50,000 trials have 250,000 params, and few of these.
        select(
            table.c.param_name,
            table.c.distribution_json,
            func.array_agg(table.c.trial_id, type_=ARRAY(Integer)),
            func.array_agg(table.c.param_value, type_=ARRAY(Double)),
        )
        .where(table.c.trial_id.in_(of))
        .group_by(table.c.param_name, table.c.distribution_json)
        .order_by(func.min(table.c.param_id))
    )
    params: dict[int, dict[str, Any]] = {}
    bad: set[int] = set()
    for name, distribution_json, trial_ids, internals in rows:
        for trial_id, internal in zip(trial_ids, internals, strict=True):
            try:
                params.setdefault(trial_id, {})[name] = param_value(internal, distribution_json)
            except BadRowError as error:
                skipped(f"the trial of id {trial_id}", f"param {name!r}: {error}")
                bad.add(trial_id)
    return params, bad


def _user_attrs(conn: Connection, of: Select[Any]) -> dict[int, dict[str, Any]]:
    """Return user attributes by trial id, in the order in which they came up in the study."""
    table = trial_user_attributes
    rows = conn.execute(
        select(
            table.c.key,
            func.array_agg(table.c.trial_id, type_=ARRAY(Integer)),
            func.array_agg(known_json(table.c.value_json), type_=ARRAY(Text)),
        )
        .where(table.c.trial_id.in_(of))
        .group_by(table.c.key)
        .order_by(func.min(table.c.trial_user_attribute_id))
    )
    attrs: dict[int, dict[str, Any]] = {}
    for key, trial_ids, texts in rows:
        for trial_id, value in zip(trial_ids, json_values(texts), strict=True):
            if value is BAD:
                skipped(f"the attribute {key!r} of the trial of id {trial_id}", "it is no JSON that can be used")
            else:
                attrs.setdefault(trial_id, {})[key] = value
    return attrs


def _latest_reports(conn: Connection, of: Select[Any]) -> dict[int, tuple[int, float]]:
    table = trial_intermediate_values
    rows = conn.execute(
        select(table.c.trial_id, table.c.step, table.c.intermediate_value, table.c.intermediate_value_type)
        .ext(distinct_on(table.c.trial_id))
        .where(table.c.trial_id.in_(of))
        .order_by(table.c.trial_id, table.c.step.desc())
    )
    return {row.trial_id: (row.step, number_of(row.intermediate_value, row.intermediate_value_type)) for row in rows}


def _trial(
    row: Row[Any],
    params: dict[int, dict[str, Any]],
    attrs: dict[int, dict[str, Any]],
    latest: dict[int, tuple[int, float]],
) -> TrialRecord:
    last_step, last_value = latest.get(row.trial_id, (None, None))
    return TrialRecord(
        trial_id=row.trial_id,
        number=row.number,
        state=row.state,
        value=None if row.value_type is None else number_of(row.value, row.value_type),
        started_at=_utc(row.datetime_start),
        ended_at=_utc(row.datetime_complete),
        last_step=last_step,
        last_value=last_value,
        params=params.get(row.trial_id, {}),
        user_attrs=attrs.get(row.trial_id, {}),
    )


def _attribute_text(value_json: str) -> str:
    """Return an attribute that is text as a rule; another program may have set any JSON by its name."""
    try:
        value = json_value(value_json)
    except BadRowError:
        return value_json
    return value if isinstance(value, str) else value_json


def _utc(time: dt.datetime | None) -> dt.datetime | None:
    return None if time is None else time.replace(tzinfo=dt.UTC)
