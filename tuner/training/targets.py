"""Loss and metrics where a model answers several questions at once. Knows nothing of Optuna or of a database."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from tuner.errors import ObjectiveError

if TYPE_CHECKING:
    from torchmetrics import Metric

Target: TypeAlias = str | int
"""One of several targets: its name in a dict, or its place in a tuple."""


class WeightedLoss(nn.Module):
    """The sum of a loss for each target, times its weight: 1 for those that `weights` does not name."""

    def __init__(
        self,
        losses: Mapping[Any, Callable[[Any, Any], Tensor]],
        weights: Mapping[Any, float] | None = None,
    ) -> None:
        super().__init__()
        self.losses = dict(losses)
        self.weights = dict(weights or {})
        if unknown := self.weights.keys() - self.losses.keys():
            raise ObjectiveError(
                f"weights need targets that have a loss, {_listed(self.losses)}, got {min(unknown, key=str)!r}"
            )
        # So that they move to the device with it.
        self.modules_of_losses = nn.ModuleList(loss for loss in losses.values() if isinstance(loss, nn.Module))

    def forward(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss of outputs and targets in the same form: dicts with the same names, or tuples."""
        if (found := _names(targets)) != self.losses.keys():
            raise ObjectiveError(
                f"the loss needs one of each target, {_listed(found)}, got those of {_listed(self.losses)}:"
                " give class_names of those that are of classes, or override build_loss"
            )
        parts = [
            self.weights.get(target, 1.0) * loss(part_of(outputs, target), targets[target])
            for target, loss in self.losses.items()
        ]
        return torch.stack(parts).sum()


def metric_of(target: Target, metric: Metric) -> Metric:
    """Return the metric of one of several targets: it gets the model's output for it, and its values."""
    return mean_metric({target: metric})


def mean_metric(metrics: Mapping[Any, Metric]) -> Metric:
    """Return the mean of a metric for each target, or the one metric as it is."""
    from torchmetrics.wrappers.abstract import WrapperMetric

    class OfTargets(WrapperMetric):
        """Metrics of some of several targets."""

        def __init__(self) -> None:
            super().__init__()
            self.targets = list(metrics)
            self.metrics = nn.ModuleList(metrics.values())

        def update(self, outputs: Any, targets: Any) -> None:
            for target, metric in zip(self.targets, self.metrics, strict=True):
                metric.update(part_of(outputs, target), targets[target])  # type: ignore[operator]

        def compute(self) -> Any:
            found = [metric.compute() for metric in self.metrics]  # type: ignore[operator]
            return found[0] if len(found) == 1 else torch.stack(found).mean()

        def reset(self) -> None:
            super().reset()
            for metric in self.metrics:
                metric.reset()  # type: ignore[operator]

    return OfTargets()


def part_of(outputs: Any, target: Target) -> Any:
    """Return a model's output for one of several targets. Raises ObjectiveError if it has none."""
    names = _names(outputs)
    if target not in names:
        found = _listed(names) if names else type(outputs).__name__
        raise ObjectiveError(
            f"a model of several targets needs to return an output for {target!r}, got {found}: let it return a dict by"
            " the targets' names, or a tuple in their order"
        )
    return outputs[target]


def _names(values: Any) -> set[Any]:
    if isinstance(values, Mapping):
        return set(values)
    return set(range(len(values))) if isinstance(values, tuple | list) else set()


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names)) or "none"
