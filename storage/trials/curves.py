"""Learning curves: what a trial reported step by step, and what else is known of each of its epochs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sqlalchemy import Connection, Double, and_, case, cast, func, select

from storage.database.tables import trial_intermediate_values, trials, tuner_curves
from storage.database.values import checked_name, number_of


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A step of a trial: what it reported and, where the step is an epoch of tuner's, what else is known of it.

    `train_loss` is the mean over the epoch's rows, `seconds` what it took, evaluation included, `rates` the learning
    rate of each group of the optimizer's params. `metrics` are all of the validation split's, `train_metrics` those of
    the training split where the study asks for them. In what is read from the database, None stands for what is not
    known, and for NaN and infinity.
    """

    step: int
    value: float | None
    train_loss: float | None = None
    seconds: float | None = None
    rates: tuple[float | None, ...] = ()
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    train_metrics: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def has_details(self) -> bool:
        """Whether there is more than the value."""
        return self.train_loss is not None or bool(self.metrics)

    def epoch_json(self) -> str:
        """Return the details as `tuner_curves` holds them. Raises InvalidWriteError for a name that none can hold."""
        kept = {
            "train_loss": finite(self.train_loss),
            "seconds": finite(self.seconds),
            "rates": [finite(rate) for rate in self.rates],
            "metrics": _finite(self.metrics),
        }
        if self.train_metrics:
            kept["train_metrics"] = _finite(self.train_metrics)
        return json.dumps(kept)


def finite(value: float | None) -> float | None:
    """Return the number, None for NaN and for infinity, which JSON does not have."""
    return None if value is None or not math.isfinite(value) else float(value)


def curves(conn: Connection, study_id: int, numbers: Iterable[int] | None = None) -> dict[int, list[CurvePoint]]:
    """Return the points of the study's trials, or of those `numbers`, by number and in the order of their steps.

    One query; a trial that has reported nothing is not in it.
    """
    reports = trial_intermediate_values
    query = (
        select(
            trials.c.number,
            reports.c.step,
            reports.c.intermediate_value,
            reports.c.intermediate_value_type,
            tuner_curves.c.epoch,
        )
        .select_from(trials)
        .join(reports, reports.c.trial_id == trials.c.trial_id)
        .outerjoin(
            tuner_curves, and_(tuner_curves.c.trial_id == reports.c.trial_id, tuner_curves.c.step == reports.c.step)
        )
        .where(trials.c.study_id == study_id)
        .order_by(trials.c.number, reports.c.step)
    )
    if numbers is not None:
        query = query.where(trials.c.number.in_(list(numbers)))
    found: dict[int, list[CurvePoint]] = {}
    for row in conn.execute(query):
        value = finite(number_of(row.intermediate_value, row.intermediate_value_type))
        found.setdefault(row.number, []).append(_point(row.step, value, row.epoch))
    return found


def _point(step: int, value: float | None, epoch: object) -> CurvePoint:
    """Return the point with as much of the details as is what `epoch_json` writes."""
    kept = epoch if isinstance(epoch, dict) else {}
    rates = kept.get("rates")
    return CurvePoint(
        step=step,
        value=value,
        train_loss=_number(kept.get("train_loss")),
        seconds=_number(kept.get("seconds")),
        rates=tuple(_number(rate) for rate in rates) if isinstance(rates, list) else (),
        metrics=_numbers(kept.get("metrics")),
        train_metrics=_numbers(kept.get("train_metrics")),
    )


def _numbers(found: object) -> dict[str, float | None]:
    return {name: _number(value) for name, value in found.items()} if isinstance(found, dict) else {}


def _number(value: object) -> float | None:
    try:
        return finite(value) if isinstance(value, int | float) else None
    except OverflowError:
        return None


def slowest_epoch_s(conn: Connection, study_id: int) -> float:
    """Return how long the slowest epoch of the study took, 0 while none has ended."""
    column = tuner_curves.c.epoch["seconds"]
    # what is larger, or none, was not written by us and cannot be cast
    is_number = column.astext.regexp_match("^[0-9]{1,9}([.][0-9]{1,30})?(e-[0-9]{1,2})?$")
    seconds = case((is_number, cast(column.astext, Double)))
    query = select(func.coalesce(func.max(seconds), 0.0)).select_from(tuner_curves)
    of_study = query.join(trials, trials.c.trial_id == tuner_curves.c.trial_id).where(trials.c.study_id == study_id)
    return float(conn.execute(of_study).scalar_one())


def _finite(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    return {checked_name(name, "a metric's name"): finite(value) for name, value in metrics.items()}
