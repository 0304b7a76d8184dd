"""Loss and metric of a classification, as they follow from the form of its labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tuner.data import Data, DataError, Rows
from tuner.errors import ObjectiveError
from tuner.labels import Labels, LabelsOfEach
from tuner.training.targets import WeightedLoss, mean_metric, metric_of

if TYPE_CHECKING:
    from torchmetrics import Metric


def loss_of_classes(train: Rows, params: Mapping[str, Any]) -> nn.Module:
    """Return cross entropy, over the labels that are some: binary where a row has several, or a share of one.

    Of several targets it is the sum of theirs, each times the param `weight_` and its name, 1 where not suggested.
    """
    label_smoothing = params.get("label_smoothing", 0.0)
    if isinstance(train.labels, LabelsOfEach):
        of_each = train.labels.by_target
        losses = {target: _loss_of(labels, label_smoothing) for target, labels in of_each.items()}
        return WeightedLoss(losses, {target: params.get(f"weight_{target}", 1.0) for target in of_each})
    return _loss_of(train.labels, label_smoothing)


def _loss_of(labels: Labels | None, label_smoothing: float) -> nn.Module:
    if labels is not None and labels.form != "one":
        return BinaryCrossEntropy(labels, label_smoothing)
    if labels is None or labels.ignored is None:
        return nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    return CrossEntropyOfKnown(labels, label_smoothing)


def accuracies_of_classes(data: Data) -> dict[str, Metric]:
    """Return the share of labels that are right, of those that are some, as `accuracy`.

    Of several targets that is the mean of theirs, which are there too, as `accuracy_` and the target's name. A class of
    several is given from a share of 0.5 on.
    """
    labels = data.train.labels
    if labels is None:
        raise DataError("the default metric needs the names of the classes, got none: give Data class_names")
    if isinstance(labels, Labels):
        return {"accuracy": _accuracy_of(labels)}
    found = {f"accuracy_{target}": metric_of(target, _accuracy_of(its)) for target, its in labels.by_target.items()}
    return found | {"accuracy": mean_metric({target: _accuracy_of(its) for target, its in labels.by_target.items()})}


def _accuracy_of(labels: Labels) -> Metric:
    from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy, MultilabelAccuracy

    if labels.form == "one":
        return MulticlassAccuracy(num_classes=labels.n_classes, average="micro", ignore_index=labels.ignored)
    if labels.form == "several":
        return _of_logits(MultilabelAccuracy)(labels.n_classes, average="micro", ignore_index=labels.ignored)
    return _of_logits(BinaryAccuracy)(ignore_index=labels.ignored)


class CrossEntropyOfKnown(nn.Module):
    """Cross entropy, a mean over the labels that are some: 0 where there are none, for which torch's is NaN."""

    def __init__(self, labels: Labels, label_smoothing: float) -> None:
        super().__init__()
        self.labels = labels
        self.label_smoothing = label_smoothing

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of logits (n, classes, ...) for numbers of classes (n, ...)."""
        assert self.labels.ignored is not None
        total = functional.cross_entropy(
            outputs,
            targets,
            ignore_index=self.labels.ignored,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )
        return total / self.labels.known(targets).sum().clamp(min=1)


class BinaryCrossEntropy(nn.Module):
    """Binary cross entropy, a mean over the labels that are some."""

    def __init__(self, labels: Labels, label_smoothing: float) -> None:
        super().__init__()
        self.labels = labels
        self.label_smoothing = label_smoothing

    def forward(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the loss of as many logits as there are targets, which are from 0 to 1."""
        logits = _as_targets(outputs, targets)
        known = self.labels.known(targets).to(logits.dtype)
        smooth = torch.lerp(targets, torch.full_like(targets, 0.5), self.label_smoothing)
        total = functional.binary_cross_entropy_with_logits(logits, smooth, weight=known, reduction="sum")
        return total / known.sum().clamp(min=1)


def _of_logits(kind: Callable[..., Metric]) -> Callable[..., Metric]:
    """Return the kind of metric for logits: torchmetrics takes those that happen to be in 0..1 for probabilities."""

    class OfLogits(kind):  # type: ignore[misc,valid-type]
        def update(self, outputs: Tensor, targets: Tensor) -> None:
            super().update(_as_targets(outputs, targets).sigmoid(), targets.round().long())

    return OfLogits


def _as_targets(outputs: Any, targets: Tensor) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.numel() != targets.numel():
        found = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ObjectiveError(
            f"labels that are floats need an output for each, of shape {list(targets.shape)}, got {found}:"
            " let the model give so many, or use .long() labels for one of several classes"
        )
    return outputs.reshape(targets.shape)
