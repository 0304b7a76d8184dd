"""A trial's learning curve, as its epochs end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from storage.trials.curves import CurvePoint
from tuner import training


class Curve:
    """Makes the points of one trial's curve; the first epoch begins now."""

    def __init__(self, metric: str) -> None:
        self._metric = metric
        self._ended_at = time.perf_counter()

    def point(self, epoch: training.Epoch) -> CurvePoint:
        """Return what is kept of an epoch that has just ended.

        One of a loop of the objective's own, which did not measure it, took the time since the one before.
        """
        now = time.perf_counter()
        since_s, self._ended_at = now - self._ended_at, now
        return CurvePoint(
            step=epoch.number,
            value=epoch.metrics[self._metric],
            train_loss=float(epoch.train_loss),
            seconds=round(epoch.train_s + epoch.evaluate_s or since_s, 4),
            rates=tuple(float(rate) for rate in epoch.rates),
            metrics=_numbers(epoch.metrics),
            train_metrics=_numbers(epoch.train_metrics),
        )


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: float(value) for name, value in metrics.items()}  # an own loop may give tensors
