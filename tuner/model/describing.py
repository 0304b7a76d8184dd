"""What an export's manifest tells of a model's inputs and outputs beside their shapes, for those who call it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tuner import training
from tuner.data import Data, Rows, Samples, tensors
from tuner.labels import Labels, LabelsOfEach
from tuner.model.manifest import Kind, TensorDescription
from tuner.objective import Objective

LOOKED_AT = 256
"""How many rows tell what range streamed samples have, and whether outputs are probabilities."""
_KINDS: dict[str, Kind] = {"one": "classes", "several": "multilabel", "binary": "binary"}


def with_ranges(described: Sequence[TensorDescription], train: Rows) -> list[TensorDescription]:
    """Return the inputs with the least and the greatest value that the training split has of each."""
    if isinstance(train, Samples):
        train = train.rows(torch.arange(0, len(train), max(1, len(train) // LOOKED_AT)))
    found = zip(described, tensors(train.inputs), strict=True)
    return [its.model_copy(update={"seen": _range_of(tensor)}) for its, tensor in found]


def with_kinds(
    described: Sequence[TensorDescription], model: nn.Module, data: Data, objective: Objective
) -> list[TensorDescription]:
    """Return the outputs with the kind of the target that each is for, and whether they are probabilities.

    By the default loss and loop they are logits; where one of these, or the prediction, is the objective's own, the
    outputs for some of the validation rows tell.
    """
    if not described:
        return []
    labels, rows = data.train.labels, data.valid.rows(slice(0, LOOKED_AT))
    is_own = any(getattr(type(objective), name) is not getattr(Objective, name) for name in _SAYING)
    outputs = tensors(training.predict(model, rows.inputs)) if is_own else (None,) * len(described)
    found = []
    for number, (its, tensor) in enumerate(zip(described, outputs, strict=True)):
        target = its.name if its.name is not None else number
        known = labels.by_target.get(target) if isinstance(labels, LabelsOfEach) else labels
        kind = _kind_of(known, rows.targets, target)
        is_share = tensor is not None and kind is not None and _are_probabilities(tensor, kind)
        values = None if kind in (None, "number") else "probabilities" if is_share else "logits"
        found.append(its.model_copy(update={"kind": kind, "values": values}))
    return found


def with_classes(
    described: Sequence[TensorDescription], outputs: Any, class_names: Sequence[str]
) -> list[TensorDescription]:
    """Return the outputs of a model of these classes with their kind, and whether they are probabilities.

    Nothing is said where there are no classes, or several outputs, or one that has no place for each class.
    """
    if len(described) != 1 or not class_names:
        return list(described)
    (tensor,) = tensors(outputs)
    has_each = tensor.ndim > 1 and tensor.shape[1] == len(class_names)
    kind: Kind | None = "classes" if has_each else "binary" if len(class_names) == 2 else None
    if kind is None or not tensor.is_floating_point():
        return list(described)
    values = "probabilities" if _are_probabilities(tensor, kind) else "logits"
    return [described[0].model_copy(update={"kind": kind, "values": values})]


_SAYING = ("build_loss", "fit", "prediction")
"""The methods by which an objective can say that outputs are something else than logits."""


def _range_of(tensor: Tensor) -> tuple[float, float] | None:
    if tensor.is_complex() or tensor.numel() == 0:
        return None
    low, high = (tensor.byte() if tensor.dtype == torch.bool else tensor).aminmax()
    return float(low), float(high)


def _kind_of(labels: Labels | LabelsOfEach | None, targets: Any, target: str | int) -> Kind | None:
    """Return the kind of a target; None for one of classes without names, of which nothing more is known."""
    if isinstance(labels, Labels):
        return _KINDS[labels.form]
    if not isinstance(targets, Tensor):
        targets = (targets if isinstance(targets, dict) else dict(enumerate(targets))).get(target)
    return "number" if targets is not None and targets.is_floating_point() else None


def _are_probabilities(outputs: Tensor, kind: Kind) -> bool:
    if not outputs.is_floating_point() or not bool(((outputs >= 0) & (outputs <= 1)).all()):
        return False
    if kind != "classes":
        return True
    return outputs.ndim > 1 and torch.allclose(outputs.double().sum(1), torch.ones((), dtype=torch.float64), atol=1e-4)
