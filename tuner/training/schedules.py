"""Schedules of the learning rate that follow a metric, and the rates that they gave."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

Rates = tuple[float, ...]
"""The learning rate of each group of an optimizer's params."""


def wants_metric(schedule: LRScheduler | None) -> bool:
    """Whether the schedule is stepped with a metric: torch's of plateaus, or one whose step needs an argument."""
    if schedule is None or isinstance(schedule, ReduceLROnPlateau):
        return schedule is not None
    given = list(inspect.signature(type(schedule).step).parameters.values())[1:2]
    return any(its.name in ("metric", "metrics") or its.default is its.empty for its in given)


class Schedule:
    """The schedule of one training, and the rates that it gives.

    `replayed` are the rates of each epoch in another training, which one that follows a metric gives again.
    """

    def __init__(
        self,
        schedule: LRScheduler | None,
        optimizer: Optimizer,
        replayed: Sequence[Sequence[float]],
        log: Callable[[str], None],
    ) -> None:
        self._schedule: Any = schedule
        self._optimizer = optimizer
        self.follows_metric = wants_metric(schedule)
        self._replayed = replayed if self.follows_metric else ()
        self._log = log

    def start_epoch(self, number: int) -> Rates:
        """Return the learning rates of an epoch, counted from 1."""
        groups = self._optimizer.param_groups
        if self._replayed:
            last = self._replayed[min(number, len(self._replayed)) - 1]
            for group, rate in zip(groups, last, strict=False):
                if isinstance(group.get("lr"), Tensor):
                    group["lr"].fill_(rate)  # a captured step reads it there
                else:
                    group["lr"] = rate
        return tuple(float(group["lr"]) for group in groups if "lr" in group)

    def end_epoch(self, number: int, train_loss: float, value: float | None) -> None:
        """Step the schedule; `value` is the metric's, where one was computed, and else the training loss is fed."""
        if self._schedule is None or self._replayed:
            return
        if not self.follows_metric:
            self._schedule.step()
        elif value is not None or getattr(self._schedule, "mode", "min") == "min":
            self._schedule.step(train_loss if value is None else value)
        elif number == 1:
            self._log("the schedule waits for a metric to grow, and none is computed here: the rate stays as it is")
