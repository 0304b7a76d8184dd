"""How a study came to its values: its finished trials in the order in which they ended, with what each cost."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, Double, and_, func, select

from storage.coordination.records import State
from storage.database.tables import trial_values, trials, tuner_attempts
from storage.database.values import number_of


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A trial that ended. `value` is None where it has none; `device_s` are seconds times the part of a device."""

    number: int
    state: State
    value: float | None
    device_s: float


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
