"""Creating a trial, whole, under its study's lock."""

from __future__ import annotations

from typing import Any

from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
)
from optuna.trial import FrozenTrial
from sqlalchemy import Connection, func, insert, select

from storage.database.foreign import BadRowError, json_text
from storage.database.sessions import Sessions
from storage.database.tables import (
    trial_intermediate_values,
    trial_params,
    trial_system_attributes,
    trial_user_attributes,
    trial_values,
    trials,
)
from storage.database.values import checked_name, checked_step, stored, stored_objective, utc_time
from storage.trials.guarded_writes import utc_now
from storage.trials.params import distribution_of


def create_trial(conn: Connection, study_id: int, template: FrozenTrial | None) -> int:
    """Create the study's next trial, running or like the template, and return its id.

    The caller holds the study row's lock, as stock Optuna does, so that numbers are unique and dense.
    Raises ValueError for a param that had another kind of distribution, InvalidWriteError.
    """
    state, started, ended = ("RUNNING", utc_now(), None) if template is None else _state_of(template)
    next_number = select(func.coalesce(func.max(trials.c.number) + 1, 0)).where(trials.c.study_id == study_id)
    trial_id: int = conn.execute(
        insert(trials)
        .values(
            study_id=study_id,
            number=next_number.scalar_subquery(),
            state=state,
            datetime_start=started,
            datetime_complete=ended,
        )
        .returning(trials.c.trial_id)
    ).scalar_one()
    if template is not None:
        _fill(conn, study_id, trial_id, template)
    return trial_id


def known_distribution(conn: Connection, study_id: int, param_name: str) -> BaseDistribution | None:
    """Return the distribution that the study's latest trial with such a param has for it; None if it is new.

    Also None where that trial's cannot be read.
    """
    # From the latest trial back, an index probe each: the planner would rather read all params of all studies.
    in_trial = select(trial_params.c.distribution_json).where(
        trial_params.c.trial_id == trials.c.trial_id, trial_params.c.param_name == param_name
    )
    latest_first = (
        select(in_trial.scalar_subquery().label("found"))
        .where(trials.c.study_id == study_id)
        .order_by(trials.c.number.desc())
        .subquery()
    )
    query = select(latest_first.c.found).where(latest_first.c.found.is_not(None)).limit(1)
    found: str | None = conn.execute(query).scalar()
    try:
        return None if found is None else distribution_of(found)
    except BadRowError:
        return None  # whoever reads that trial is told


def distributions_of(sessions: Sessions, study_id: int, names: list[str]) -> dict[str, BaseDistribution]:
    """Return the distributions that the study's latest trials have for the params, without those it never had."""
    found = sessions.snapshot(lambda conn: {name: known_distribution(conn, study_id, name) for name in names})
    return {name: distribution for name, distribution in found.items() if distribution is not None}


def param_names(sessions: Sessions, study_id: int) -> list[str]:
    """Return the names of all params that trials of the study have had."""
    query = (
        select(trial_params.c.param_name)
        .join(trials, trials.c.trial_id == trial_params.c.trial_id)
        .where(trials.c.study_id == study_id)
        .distinct()
        .order_by(trial_params.c.param_name)
    )
    return sessions.snapshot(lambda conn: list(conn.execute(query).scalars()))


def _state_of(template: FrozenTrial) -> tuple[str, Any, Any]:
    return template.state.name, utc_time(template.datetime_start), utc_time(template.datetime_complete)


def _fill(conn: Connection, study_id: int, trial_id: int, template: FrozenTrial) -> None:
    of_trial = {"trial_id": trial_id}
    values: list[dict[str, Any]] = []
    for objective, number in enumerate(template.values or []):
        value, kind = stored_objective(number)
        values.append({**of_trial, "objective": objective, "value": value, "value_type": kind})
    params: list[dict[str, Any]] = []
    for name, external in template.params.items():
        distribution = template.distributions[name]
        known = known_distribution(conn, study_id, checked_name(name, "a param's name"))
        if known is not None:
            check_distribution_compatibility(known, distribution)
        params.append(
            {
                **of_trial,
                "param_name": name,
                "param_value": float(distribution.to_internal_repr(external)),
                "distribution_json": distribution_to_json(distribution),
            }
        )
    reports: list[dict[str, Any]] = []
    for step, number in template.intermediate_values.items():
        value, kind = stored(number)
        reports.append(
            {
                **of_trial,
                "step": checked_step(step),
                "intermediate_value": value,
                "intermediate_value_type": kind,
            }
        )
    for table, rows in (
        (trial_values, values),
        (trial_params, params),
        (trial_user_attributes, _attributes(of_trial, template.user_attrs)),
        (trial_system_attributes, _attributes(of_trial, template.system_attrs)),
        (trial_intermediate_values, reports),
    ):
        if rows:
            conn.execute(insert(table).values(rows))


def _attributes(of_trial: dict[str, int], attrs: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {**of_trial, "key": checked_name(key, "an attribute's key"), "value_json": json_text(value)}
        for key, value in attrs.items()
    ]
