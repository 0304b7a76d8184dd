"""How a study came to its values: its finished trials in the order in which they ended, what each cost, its reports."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Double, and_, case, func, select

from storage.coordination.records import State
from storage.database.foreign import json_values
from storage.database.tables import (
    trial_intermediate_values,
    trial_user_attributes,
    trial_values,
    trials,
    tuner_attempts,
    tuner_leases,
)
from storage.database.values import number_of


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A trial that ended. `value` is None where it has none; `device_s` are seconds times the part of a device."""

    number: int
    state: State
    value: float | None
    device_s: float


@dataclass(frozen=True, kw_only=True)
class Span:
    """From when until when a slot of a worker ran a trial; `outcome` is the attempt's, None while it runs."""

    number: int
    worker: str
    slot: int
    device: str
    since: dt.datetime
    until: dt.datetime
    outcome: str | None


def spans(conn: Connection, study_id: int) -> list[Span]:
    """Return the attempts at the study's trials in the order in which they started.

    One that runs lasts until now, or until its lease ran out; one that another program ended, as long as its trial.
    """
    attempts = tuner_attempts.c
    is_held = and_(trials.c.state == "RUNNING", tuner_leases.c.token == attempts.token)
    until = func.coalesce(
        attempts.ended_at,
        case((is_held, func.least(func.now(), tuner_leases.c.expires_at))),
        func.timezone("UTC", trials.c.datetime_complete),
        attempts.started_at,
    )
    rows = conn.execute(
        select(
            trials.c.number,
            attempts.worker,
            attempts.slot,
            attempts.device,
            attempts.started_at.label("since"),
            func.greatest(until, attempts.started_at).label("until"),
            attempts.outcome,
        )
        .select_from(trials.join(tuner_attempts, attempts.trial_id == trials.c.trial_id))
        .outerjoin(tuner_leases, tuner_leases.c.trial_id == trials.c.trial_id)
        .where(trials.c.study_id == study_id)
        .order_by(attempts.started_at, trials.c.number)
    )
    return [Span(**row._mapping) for row in rows]


def ended(conn: Connection, study_id: int) -> list[Ended]:
    """Return the study's finished trials in the order in which they ended, with the values of the first objective.

    A trial costs all of its attempts, those that were lost too; one without any, of another program, its time.
    """
    attempts = tuner_attempts
    end = func.timezone("UTC", trials.c.datetime_complete)
    until = func.coalesce(attempts.c.ended_at, end, attempts.c.started_at)
    seconds = func.date_part("epoch", func.greatest(until, attempts.c.started_at) - attempts.c.started_at, type_=Double)
    of_attempts = (
        select(attempts.c.trial_id, func.sum(attempts.c.share * seconds).label("device_s"))
        .join(trials, trials.c.trial_id == attempts.c.trial_id)
        .where(trials.c.study_id == study_id)
        .group_by(attempts.c.trial_id)
        .subquery()
    )
    took = func.date_part("epoch", trials.c.datetime_complete - trials.c.datetime_start, type_=Double)
    rows = conn.execute(
        select(
            trials.c.number,
            trials.c.state,
            trial_values.c.value,
            trial_values.c.value_type,
            func.coalesce(of_attempts.c.device_s, took, 0.0).label("device_s"),
        )
        .outerjoin(of_attempts, of_attempts.c.trial_id == trials.c.trial_id)
        .outerjoin(trial_values, and_(trial_values.c.trial_id == trials.c.trial_id, trial_values.c.objective == 0))
        .where(trials.c.study_id == study_id, trials.c.state.in_(("COMPLETE", "PRUNED", "FAIL")))
        .order_by(trials.c.datetime_complete.nulls_first(), trials.c.number)
    )
    return [
        Ended(
            number=row.number,
            state=row.state,
            value=None if row.value_type is None else number_of(row.value, row.value_type),
            device_s=row.device_s,
        )
        for row in rows
    ]


def complete_curves(
    conn: Connection, study_id: int, at_most: int
) -> tuple[int, dict[int, tuple[float, dict[int, float]]]]:
    """Return how many trials are complete, and of at most so many, evenly chosen, value and reports by step."""
    n_complete = func.count().over()
    complete = (
        select(
            trials.c.trial_id,
            trials.c.number,
            trial_values.c.value,
            trial_values.c.value_type,
            n_complete.label("n"),
            (func.row_number().over(order_by=trials.c.number) - 1).label("place"),
        )
        .join(trial_values, and_(trial_values.c.trial_id == trials.c.trial_id, trial_values.c.objective == 0))
        .where(trials.c.study_id == study_id, trials.c.state == "COMPLETE")
        .subquery("complete")
    )
    report = trial_intermediate_values.c
    rows = conn.execute(
        select(complete, report.step, report.intermediate_value, report.intermediate_value_type)
        .outerjoin(trial_intermediate_values, report.trial_id == complete.c.trial_id)
        .where(complete.c.place % ((complete.c.n + (at_most - 1)) // at_most) == 0)
        .order_by(complete.c.number)
    ).all()
    found: dict[int, tuple[float, dict[int, float]]] = {}
    for row in rows:
        _, reports = found.setdefault(row.number, (number_of(row.value, row.value_type), {}))
        if row.step is not None:
            reports[row.step] = number_of(row.intermediate_value, row.intermediate_value_type)
    return (rows[0].n if rows else 0), found


def complete_values(conn: Connection, study_id: int) -> list[float]:
    """Return the values of the study's complete trials, but for those that are no number."""
    rows = conn.execute(
        select(trial_values.c.value, trial_values.c.value_type)
        .join(trials, and_(trial_values.c.trial_id == trials.c.trial_id, trial_values.c.objective == 0))
        .where(trials.c.study_id == study_id, trials.c.state == "COMPLETE")
    )
    values = (number_of(row.value, row.value_type) for row in rows)
    return [value for value in values if not math.isnan(value)]


def marked(conn: Connection, study_id: int, keys: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Return these user attributes of the study's pruned trials that have the first of them, by number."""
    attribute = trial_user_attributes.c
    rows = conn.execute(
        select(trials.c.number, attribute.key, attribute.value_json)
        .join(trial_user_attributes, attribute.trial_id == trials.c.trial_id)
        .where(trials.c.study_id == study_id, trials.c.state == "PRUNED", attribute.key.in_(keys))
    ).all()
    found: dict[int, dict[str, Any]] = {}
    for row, value in zip(rows, json_values([row.value_json for row in rows]), strict=True):
        found.setdefault(row.number, {})[row.key] = value
    return {number: its for number, its in found.items() if keys[0] in its}
