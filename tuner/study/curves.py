"""The learning curves of a study, to be looked at from Python, and as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import URL

from storage import ensure_schema, open_engine
from storage.coordination import studies
from storage.trials import curves as curves_of_trials
from storage.trials.curves import CurvePoint


def curves(storage: str | URL, study: str, numbers: Iterable[int] | None = None) -> dict[int, list[CurvePoint]]:
    """Return what was recorded of each epoch of a study's trials, or of those `numbers`, by the trial's number.

        for number, points in tuner.curves("postgresql://user@host/database", "digits").items():
            print(number, [point.train_loss for point in points], [point.metrics["accuracy"] for point in points])

    `storage` is a URL as `tuner db url` prints it. A point is a `step`, the `value` that was reported for it and, of
    an epoch, `train_loss`, `seconds`, the `rates` of the optimizer's groups, and `metrics` and `train_metrics` by name;
    None stands for a number that is NaN or infinite. Raises `storage.StorageError` if there is no such study, or no
    such database.
    """
    engine = open_engine(storage)
    try:
        ensure_schema(engine)
        study_id = studies.find_study(engine, study).study_id
        with engine.connect() as conn:
            return curves_of_trials.curves(conn, study_id, numbers)
    finally:
        engine.dispose()


def as_rows(points: Sequence[CurvePoint], metric: str) -> list[dict[str, Any]]:
    """Return a row for each point, all with the same columns: `metric` is the study's, whose value was reported.

    A column `lr` for each group of params, and one for each metric, those of the training split as `train/NAME`.
    """
    rows = []
    for point in points:
        of_train = {f"train/{name}": value for name, value in point.train_metrics.items()}
        known = {"train_loss": point.train_loss, "seconds": point.seconds} if point.has_details else {}
        rates = {"lr" if number == 1 else f"lr{number}": rate for number, rate in enumerate(point.rates, 1)}
        rows.append({"step": point.step, metric: point.value, **point.metrics, **of_train, **rates, **known})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in columns} for row in rows]
